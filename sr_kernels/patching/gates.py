"""Attention gates: channel attention (RCAN, IMDN), pixel attention (PAN), spatial attention (CBAM).

What a gate is called differs from repository to repository, its layers do not: they are found in
the order in which they were registered, and the probe decides the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from sr_kernels import functional as F

from .recogniser import (
    NotRecognised,
    Recogniser,
    calls,
    is_conv,
    is_map,
    maps,
    owns_tensors,
    part_at,
    register,
    runs,
)
from .swap import original_class


def leaves(module: nn.Module, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """``(path, layer)`` of every layer inside, Sequentials opened, in order."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, child in module._modules.items():
        if child is None:
            continue
        if calls(child, nn.Sequential):
            found += leaves(child, (*path, name))
        else:
            found.append(((*path, name), child))
    return found


def _pooling(layer: Any) -> bool:
    return calls(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


# ----------------------------------------------------------------------------- channel attention


class _Channel(NamedTuple):
    down: tuple[str, ...]
    up: tuple[str, ...]
    statistic: F.Statistic


class ChannelAttention(Recogniser):
    """``x * sigmoid(W_up relu(W_down z))``: CALayer, ChannelAttention, CCALayer and their like."""

    name = "channel_attention"
    replacement = "channel_attention"
    operators = ("channel_attention",)

    def options(self, module: nn.Module) -> Iterable[_Channel]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside = leaves(module)
        weighted = [(path, layer) for path, layer in inside if any(True for _ in layer.parameters())]
        if len(weighted) != 2 or len(inside) > 6:
            return []
        (down_path, down), (up_path, up) = weighted
        if not isinstance(down, nn.Conv2d) or not isinstance(up, nn.Conv2d):
            return []
        if down.in_channels != up.out_channels or up.in_channels != down.out_channels:
            return []
        if down.kernel_size != (1, 1) or up.kernel_size != (1, 1):
            return []
        if down.in_channels == 1 or down.in_channels < up.in_channels:
            return []
        others = [layer for _, layer in inside if layer is not down and layer is not up]
        if not (any(_pooling(o) for o in others) or any(calls(o, nn.Sigmoid) for o in others)):
            return []  # two 1x1 convolutions, but no gate
        if not is_conv(down, 1) or not is_conv(up, 1):
            raise NotRecognised("its 1x1 convolutions have groups, strides or padding")
        for other in others:
            if not (_pooling(other) or calls(other, nn.ReLU) or calls(other, nn.Sigmoid)):
                raise NotRecognised(
                    f"{type(other).__name__} in it is none of average pooling, ReLU, Sigmoid"
                )
        statistics: tuple[F.Statistic, ...] = ("mean", "contrast")
        return [_Channel(down_path, up_path, statistic) for statistic in statistics]

    def examples(self, module: nn.Module, options: _Channel) -> list[tuple[Any, ...]]:
        return maps(part_at(module, options.down).in_channels, 9, 6)

    def forward(self, module: nn.Module, options: _Channel, *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        x = args[0]
        down, up = part_at(module, options.down), part_at(module, options.up)
        if not runs(self.operators, x, down.weight, up.weight) or not is_map(
            x, down.weight.shape[1]
        ):
            return NotImplemented
        return F.channel_attention(
            x, down.weight, down.bias, up.weight, up.bias, statistic=options.statistic
        )


# ------------------------------------------------------------------------------- pixel attention


class PixelAttention(Recogniser):
    """PAN's PA: ``x * sigmoid(conv1x1(x))``."""

    name = "pixel_attention"
    replacement = "pixel_attention"
    operators = ("pixel_attention",)

    def options(self, module: nn.Module) -> Iterable[tuple[str, ...]]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside = leaves(module)
        convolutions = [(path, layer) for path, layer in inside if isinstance(layer, nn.Conv2d)]
        named = original_class(module).__name__.lower()
        sigmoid = any(calls(layer, nn.Sigmoid) for _, layer in inside)
        if len(convolutions) != 1 or not (sigmoid or "pixel" in named or named in ("pa", "palayer")):
            return []
        path, convolution = convolutions[0]
        if convolution.in_channels != convolution.out_channels or convolution.in_channels == 1:
            return []
        if not is_conv(convolution, 1):
            raise NotRecognised("its convolution is not a plain 1x1 convolution")
        for _, other in inside:
            if other is not convolution and not calls(other, nn.Sigmoid):
                raise NotRecognised(f"{type(other).__name__} in it is neither 1x1 convolution nor Sigmoid")
        return [path]

    def examples(self, module: nn.Module, options: tuple[str, ...]) -> list[tuple[Any, ...]]:
        return maps(part_at(module, options).in_channels, 5, 7)

    def forward(self, module: nn.Module, options: tuple[str, ...], *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        x, convolution = args[0], part_at(module, options)
        if not runs(self.operators, x, convolution.weight) or not is_map(
            x, convolution.weight.shape[1]
        ):
            return NotImplemented
        return F.pixel_attention(x, convolution.weight, convolution.bias)


# ----------------------------------------------------------------------------- spatial attention


class SpatialAttention(Recogniser):
    """CBAM's spatial gate: ``x * sigmoid(conv([max, mean]))``, or with the mean first.

    options: the way to the convolution, and whether the mean comes first.
    """

    name = "spatial_attention"
    replacement = "spatial_attention"
    operators = ("spatial_attention",)

    def options(self, module: nn.Module) -> Iterable[tuple[tuple[str, ...], bool]]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside = leaves(module)
        convolutions = [(p, layer) for p, layer in inside if isinstance(layer, nn.Conv2d)]
        if len(convolutions) != 1:
            return []
        path, convolution = convolutions[0]
        if (convolution.in_channels, convolution.out_channels) != (2, 1):
            return []
        if convolution.kernel_size[0] % 2 == 0 or not is_conv(convolution, convolution.kernel_size[0]):
            raise NotRecognised("its convolution is not plain, odd and square with zero padding")
        for _, other in inside:
            if other is not convolution and not calls(other, nn.Sigmoid):
                raise NotRecognised(f"{type(other).__name__} in it is neither convolution nor Sigmoid")
        return [(path, False), (path, True)]

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        return maps(6, 9, 11)

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        path, mean_first = options
        x, convolution = args[0], part_at(module, path)
        if not runs(self.operators, x, convolution.weight) or not (x.dim() == 4 and x.numel() > 0):
            return NotImplemented
        weight = convolution.weight.flip(1) if mean_first else convolution.weight
        return F.spatial_attention(x, weight, convolution.bias)


for _recogniser in (ChannelAttention(), PixelAttention(), SpatialAttention()):
    register(_recogniser)
