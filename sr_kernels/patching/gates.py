"""Attention gates: channel attention (RCAN, IMDN), pixel attention (PAN), spatial attention (CBAM).

What a gate is called differs from repository to repository, its layers do not: they are found in
the order in which they were registered, and the probe decides the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sr_kernels import functional as F
from sr_kernels.ops._registration import is_channels_last

from .convolution import convolve
from .elan import fixed_norm, folded
from .recogniser import (
    NotRecognised,
    Recogniser,
    calls,
    child_names,
    in_format_of,
    is_conv,
    is_less,
    maps,
    needs_gradient,
    only_map,
    owns_tensors,
    part_at,
    register,
    runs,
    state_names,
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


# Longer than the neighbourhoods of gates that are global in training and local in use.
LONG = 1031


class _Channel(NamedTuple):
    down: tuple[str, ...]
    up: tuple[str, ...]
    statistic: F.Statistic


class ChannelAttention(Recogniser):
    """``x * sigmoid(W_up relu(W_down z))``: CALayer, ChannelAttention, CCALayer and their like."""

    name = "channel_attention"
    replacement = "channel_attention"
    operators = ("channel_attention",)
    least_of_mean = (math.inf, 131072)  # the deviation is faster everywhere

    def options(self, module: nn.Module) -> Iterable[_Channel]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside = leaves(module)
        weighted = [
            (path, layer) for path, layer in inside if any(True for _ in layer.parameters())
        ]
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
                    f"{type(other).__name__} in it is none of global average pooling, ReLU, Sigmoid"
                )
        statistics: tuple[F.Statistic, ...] = ("mean", "contrast")
        return [_Channel(down_path, up_path, statistic) for statistic in statistics]

    def examples(self, module: nn.Module, options: _Channel) -> list[tuple[Any, ...]]:
        channels = part_at(module, options.down).in_channels
        # The long ones: some look at a neighbourhood only where the image is larger than it.
        return [*maps(channels, 9, 6), *maps(channels, 2, LONG)]

    def declines(self, module: nn.Module, options: _Channel, *args: Any) -> bool:
        least = self.least_of_mean if options.statistic == "mean" else self.least
        return is_less(least, module, *args)

    def forward(self, module: nn.Module, options: _Channel, *args: Any) -> Any:
        down, up = part_at(module, options.down), part_at(module, options.up)
        x = only_map(self.operators, args, down.weight.shape[1], down.weight, up.weight)
        if x is None:
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
    least = (131072, math.inf)

    def options(self, module: nn.Module) -> Iterable[tuple[str, ...]]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside = leaves(module)
        convolutions = [(path, layer) for path, layer in inside if isinstance(layer, nn.Conv2d)]
        named = original_class(module).__name__.lower()
        sigmoid = any(calls(layer, nn.Sigmoid) for _, layer in inside)
        if len(convolutions) != 1 or not (
            sigmoid or "pixel" in named or named in ("pa", "palayer")
        ):
            return []
        path, convolution = convolutions[0]
        if convolution.in_channels != convolution.out_channels or convolution.in_channels == 1:
            return []
        if not is_conv(convolution, 1):
            raise NotRecognised("its convolution is not a plain 1x1 convolution")
        for _, other in inside:
            if other is not convolution and not calls(other, nn.Sigmoid):
                raise NotRecognised(
                    f"{type(other).__name__} in it is neither 1x1 convolution nor Sigmoid"
                )
        return [path]

    def examples(self, module: nn.Module, options: tuple[str, ...]) -> list[tuple[Any, ...]]:
        return maps(part_at(module, options).in_channels, 5, 7)

    def forward(self, module: nn.Module, options: tuple[str, ...], *args: Any) -> Any:
        convolution = part_at(module, options)
        x = only_map(self.operators, args, convolution.weight.shape[1], convolution.weight)
        if x is None:
            return NotImplemented
        return F.pixel_attention(x, convolution.weight, convolution.bias)


# ----------------------------------------------------------------------------- spatial attention


class _Spatial(NamedTuple):
    """norm: the way to the BatchNorm behind the convolution, if there is one."""

    convolution: tuple[str, ...]
    norm: tuple[str, ...] | None
    mean_first: bool


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class SpatialAttention(Recogniser):
    """CBAM's spatial gate: ``x * sigmoid(conv([max, mean]))``, or with the mean first; with
    BatchNorm behind the convolution, as the authors have it, in eval mode."""

    name = "spatial_attention"
    replacement = "spatial_attention"
    operators = ("spatial_attention",)

    def options(self, module: nn.Module) -> Iterable[_Spatial]:
        if owns_tensors(module) or calls(module, nn.Sequential):
            return []
        inside: list[tuple[tuple[str, ...], Any]] = []
        for path, layer in leaves(module):
            block = leaves(layer, path)
            opened = any(isinstance(part, _NORMS) for _, part in block)  # a convolution with norm
            inside += block if opened else [(path, layer)]
        weighted = [(path, layer) for path, layer in inside if state_names(layer)]
        convolutions = [(path, layer) for path, layer in weighted if isinstance(layer, nn.Conv2d)]
        norms = [(path, layer) for path, layer in weighted if isinstance(layer, _NORMS)]
        if len(convolutions) != 1 or len(weighted) != 1 + len(norms):
            return []
        path, convolution = convolutions[0]
        if (convolution.in_channels, convolution.out_channels) != (2, 1):
            return []
        if convolution.kernel_size[0] % 2 == 0 or not is_conv(
            convolution, convolution.kernel_size[0]
        ):
            raise NotRecognised("its convolution is not plain, odd and square with zero padding")
        if len(norms) > 1 or any(
            not calls(norm, nn.BatchNorm2d) or norm.num_features != 1 for _, norm in norms
        ):
            raise NotRecognised(
                "it normalises other than with one BatchNorm2d behind its convolution: "
                + ", ".join(type(norm).__name__ for _, norm in norms)
            )
        for _, other in inside:
            known = state_names(other) or calls(other, nn.Sigmoid) or calls(other, nn.Identity)
            # A layer of someone's own, such as CBAM's pooling over channels, is tried out.
            if not known and original_class(other).__module__.startswith("torch."):
                raise NotRecognised(
                    f"{type(other).__name__} in it is none of convolution, BatchNorm, Sigmoid"
                )
        norm_path = norms[0][0] if norms else None
        return [_Spatial(path, norm_path, mean_first) for mean_first in (False, True)]

    def examples(self, module: nn.Module, options: _Spatial) -> list[tuple[Any, ...]]:
        return maps(6, 9, 11)

    def forward(self, module: nn.Module, options: _Spatial, *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        x, convolution = args[0], part_at(module, options.convolution)
        if not runs(self.operators, x, convolution.weight) or not (x.dim() == 4 and x.numel() > 0):
            return NotImplemented
        weight, bias = convolution.weight, convolution.bias
        if options.norm is not None:
            norm = part_at(module, options.norm)
            if not fixed_norm(norm):
                return NotImplemented
            weight, bias = folded(convolution, norm)
        return F.spatial_attention(x, weight.flip(1) if options.mean_first else weight, bias)


# ------------------------------------------------------------------------------ blocks with gates


class PixelAttentionConv(Recogniser):
    """PAN's PAConv: ``k4(k3(x) * sigmoid(k2(x)))``, k2 1x1 and the others k x k."""

    name = "pixel_attention_conv"
    replacement = "shift_conv2d + conv3x3"
    operators = ("shift_conv2d",)
    least = (60000, math.inf)

    def options(self, module: nn.Module) -> Iterable[Any]:
        if state_names(module) - {"sigmoid"} != {"k2", "k3", "k4"}:
            return []
        part: Any = module
        if not is_conv(part.k2, 1) or not all(
            calls(k, nn.Conv2d) and is_conv(k, k.kernel_size[0]) for k in (part.k3, part.k4)
        ):
            raise NotRecognised("its convolutions are not a plain 1x1 one and two of one size")
        return [()]

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.k2.in_channels, 5, 7)

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.k2.weight.shape[1], part.k2.weight)
        if x is None:
            return NotImplemented
        return _pa_conv(part, in_format_of(part.k3.weight, x))


def _pa_conv(part: Any, x: Tensor, slope: float | None = None) -> Tensor:
    gate = F.shift_conv2d(x, part.k2.weight, part.k2.bias, pattern="none").sigmoid()
    return convolve(part.k4, convolve(part.k3, x) * gate, slope)


def _as(like: Tensor, y: Tensor) -> Tensor:
    """y, contiguous unless ``like`` is channels_last: code behind a module may call view on what it
    returns."""
    return y if is_channels_last(like) else y.contiguous()


class SelfCalibratedPixelAttention(Recogniser):
    """PAN's SCPA: two half-width branches, one through PAConv, joined with a residual.

    options: the slope of its leaky ReLU.
    """

    name = "self_calibrated_pixel_attention"
    replacement = "shift_conv2d + conv3x3"
    operators = ("shift_conv2d",)
    least = (120000, math.inf)

    def options(self, module: nn.Module) -> Iterable[float]:
        if state_names(module) != {"conv1_a", "conv1_b", "k1", "PAConv", "conv3", "lrelu"}:
            return []
        part: Any = module
        if not all(
            is_conv(c, 1) and c.bias is None for c in (part.conv1_a, part.conv1_b, part.conv3)
        ):
            raise NotRecognised("its 1x1 convolutions are not plain ones without bias")
        if part.conv1_a.weight.shape != part.conv1_b.weight.shape:
            raise NotRecognised("its two branches differ in width")
        if not PixelAttentionConv().options(part.PAConv) or not (
            calls(part.k1, nn.Sequential) and len(part.k1) == 1 and calls(part.k1[0], nn.Conv2d)
        ):
            raise NotRecognised("its PAConv or k1 is not PAN's")
        if not calls(part.lrelu, nn.LeakyReLU):
            raise NotRecognised(f"its activation is a {type(part.lrelu).__name__}")
        return [float(part.lrelu.negative_slope)]

    def examples(self, module: nn.Module, options: float) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.conv1_a.in_channels, 5, 7)

    def forward(self, module: nn.Module, options: float, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.conv1_a.weight.shape[1], part.conv1_a.weight)
        if x is None:
            return NotImplemented
        return _scpa(part, options, in_format_of(part.k1[0].weight, x))


def _scpa(part: Any, slope: float, x: Tensor) -> Tensor:
    weight = torch.cat([part.conv1_a.weight, part.conv1_b.weight])
    both = F.shift_conv2d(x, weight, activation="leaky_relu", negative_slope=slope, pattern="none")
    first, second = both.chunk(2, 1)
    joined = torch.cat(
        [convolve(part.k1[0], first, slope), _pa_conv(part.PAConv, second, slope)], 1
    )
    return F.shift_conv2d(joined, part.conv3.weight, pattern="none", residual=x)


class _Pan(NamedTuple):
    slopes: tuple[float, ...]
    slope: float
    stages: int


class PixelAttentionNetwork(Recogniser):
    """PAN x4 as a whole: what its blocks save, and channels_last throughout, which its narrow
    convolutions on large maps run faster in."""

    name = "pixel_attention_network"
    replacement = "shift_conv2d + pixel_attention + conv3x3, channels_last"
    operators = ("shift_conv2d", "pixel_attention")
    least = (1500, 5000)

    def options(self, module: nn.Module) -> Iterable[_Pan]:
        part: Any = module
        first = {"conv_first", "SCPA_trunk", "trunk_conv", "upconv1", "att1", "HRconv1"}
        names = state_names(module)
        if names != first | {"upconv2", "att2", "HRconv2", "conv_last", "lrelu"}:
            return []
        if getattr(part, "scale", 4) != 4:
            raise NotRecognised("its scale is not 4")
        if not calls(part.SCPA_trunk, nn.Sequential) or not calls(part.lrelu, nn.LeakyReLU):
            raise NotRecognised("its trunk is not a Sequential, or its activation not a leaky ReLU")
        plain = (
            "conv_first",
            "trunk_conv",
            "upconv1",
            "HRconv1",
            "upconv2",
            "HRconv2",
            "conv_last",
        )
        if not all(is_conv(part._modules[name], 3) for name in plain):
            raise NotRecognised("its convolutions are not plain 3x3 ones")
        slopes = [list(SelfCalibratedPixelAttention().options(b)) for b in part.SCPA_trunk]
        if not all(slopes) or not all(PixelAttention().options(a) for a in (part.att1, part.att2)):
            raise NotRecognised("its blocks or its attentions are not PAN's")
        return [_Pan(tuple(s[0] for s in slopes), float(part.lrelu.negative_slope), 2)]

    def examples(self, module: nn.Module, options: _Pan) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.conv_first.in_channels, 5, 7)

    def forward(self, module: nn.Module, options: _Pan, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.conv_first.weight.shape[1], part.conv_first.weight)
        if x is None or torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        x = in_format_of(part.conv_first.weight, x)
        y = convolve(part.conv_first, x.contiguous(memory_format=torch.channels_last))
        trunk = y
        for block, slope in zip(part.SCPA_trunk, options.slopes, strict=True):
            trunk = _scpa(block, slope, trunk)
        y = convolve(part.trunk_conv, trunk, skip=y)
        for up, attention, convolution in (
            (part.upconv1, part.att1, part.HRconv1),
            (part.upconv2, part.att2, part.HRconv2),
        ):
            y = convolve(up, nn.functional.interpolate(y, scale_factor=2, mode="nearest"))
            gate = part_at(attention, next(iter(PixelAttention().options(attention))))
            y = F.pixel_attention(y, gate.weight, gate.bias)
            y = nn.functional.leaky_relu(y, options.slope)
            y = convolve(convolution, y, options.slope)
        large = nn.functional.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        return _as(x, convolve(part.conv_last, y)) + large


class _Distillation(NamedTuple):
    gate: _Channel
    slope: float


class InformationDistillation(Recogniser):
    """IMDN's IMDModule: three 3x3 convolutions that each hand on a part, contrast-aware channel
    attention, a 1x1 convolution and a residual."""

    name = "information_distillation"
    replacement = "channel_gate + gated_conv1x1 + conv3x3"
    operators = ("channel_gate", "gated_conv1x1")
    least = (36000, 140000)

    def options(self, module: nn.Module) -> Iterable[_Distillation]:
        if state_names(module) != {"c1", "c2", "c3", "c4", "act", "c5", "cca"}:
            return []
        part: Any = module
        if not all(is_conv(c, 3) for c in (part.c1, part.c2, part.c3, part.c4)):
            raise NotRecognised("its convolutions are not plain 3x3 ones")
        if not is_conv(part.c5, 1) or not calls(part.act, nn.LeakyReLU):
            raise NotRecognised("its c5 and act are not a 1x1 convolution and a leaky ReLU")
        kept = getattr(part, "distilled_channels", None)
        rest = getattr(part, "remaining_channels", None)
        if type(kept) is not int or type(rest) is not int:
            raise NotRecognised("it does not say how many channels it distils")
        gates = list(ChannelAttention().options(part.cca))
        if not gates or part_at(part.cca, gates[0].down).in_channels != part.c5.in_channels:
            raise NotRecognised("its cca is not a known channel attention")
        gates.reverse()  # contrast first
        return [_Distillation(gate, float(part.act.negative_slope)) for gate in gates]

    def examples(self, module: nn.Module, options: _Distillation) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.c1.in_channels, 5, 7)

    def forward(self, module: nn.Module, options: _Distillation, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.c1.weight.shape[1], part.c5.weight)
        if x is None:
            return NotImplemented
        return _distil(part, options, in_format_of(part.c1.weight, x))


def _distil(part: Any, options: _Distillation, x: Tensor) -> Tensor:
    sizes = (part.distilled_channels, part.remaining_channels)
    parts, rest = [], x
    for convolution in (part.c1, part.c2, part.c3):
        y = convolve(convolution, rest, options.slope)
        first, rest = y.split(sizes, 1)
        parts.append(first)
    y = torch.cat([*parts, convolve(part.c4, rest)], 1)
    down, up = part_at(part.cca, options.gate.down), part_at(part.cca, options.gate.up)
    gate = F.channel_gate(
        y, down.weight, down.bias, up.weight, up.bias, statistic=options.gate.statistic
    )
    return F.gated_conv1x1(y, gate, part.c5.weight, part.c5.bias, residual=x)


class _Imdn(NamedTuple):
    blocks: tuple[str, ...]
    each: tuple[_Distillation, ...]
    slope: float


class InformationDistillationNetwork(Recogniser):
    """IMDN as a whole: what its blocks save, and channels_last throughout."""

    name = "information_distillation_network"
    replacement = "channel_gate + gated_conv1x1 + shift_conv2d + conv3x3, channels_last"
    operators = ("channel_gate", "gated_conv1x1", "shift_conv2d")
    least = (1100, 5000)

    def options(self, module: nn.Module) -> Iterable[_Imdn]:
        part: Any = module
        outside = {"fea_conv", "c", "LR_conv", "upsampler"}
        blocks = [name for name in child_names(module) if name not in outside]
        if not outside <= state_names(module) or blocks != [
            f"IMDB{i + 1}" for i in range(len(blocks))
        ]:
            return []
        found = [list(InformationDistillation().options(part._modules[b])) for b in blocks]
        if not blocks or not all(found) or owns_tensors(module):
            raise NotRecognised("its blocks are not IMDN's")
        joined, last = part.c, part.upsampler
        if not (
            is_conv(part.fea_conv, 3)
            and is_conv(part.LR_conv, 3)
            and calls(joined, nn.Sequential)
            and len(joined) == 2
            and is_conv(joined[0], 1)
            and calls(joined[1], nn.LeakyReLU)
            and calls(last, nn.Sequential)
            and len(last) == 2
            and is_conv(last[0], 3)
            and calls(last[1], nn.PixelShuffle)
        ):
            raise NotRecognised("its layers outside the blocks are not IMDN's")
        return [
            _Imdn(tuple(blocks), each, float(joined[1].negative_slope))
            for each in zip(*found, strict=False)
        ]

    def examples(self, module: nn.Module, options: _Imdn) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.fea_conv.in_channels, 5, 7)

    def forward(self, module: nn.Module, options: _Imdn, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.fea_conv.weight.shape[1], part.fea_conv.weight)
        if x is None or torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        x = in_format_of(part.fea_conv.weight, x)
        first = convolve(part.fea_conv, x.contiguous(memory_format=torch.channels_last))
        outputs, y = [], first
        for name, each in zip(options.blocks, options.each, strict=True):
            y = _distil(part._modules[name], each, y)
            outputs.append(y)
        y = F.shift_conv2d(
            torch.cat(outputs, 1),
            part.c[0].weight,
            part.c[0].bias,
            activation="leaky_relu",
            negative_slope=options.slope,
            pattern="none",
        )
        y = convolve(part.LR_conv, y, skip=first)
        return _as(
            x,
            nn.functional.pixel_shuffle(
                convolve(part.upsampler[0], y), part.upsampler[1].upscale_factor
            ),
        )


# ------------------------------------------------------------------------------------------- ESA


# Smaller maps have no 7x7 pooling behind a stride of 2; what a module does then is its own affair.
LEAST_SIDE = 15


class EnhancedSpatialAttention(Recogniser):
    """ESA: ``x * sigmoid(W4 (small(x) + W_f W1 x))``, small on few pixels and stretched again.

    Its 1x1 convolutions work on all pixels and are ours, which takes 0.85 of the time (measured: 52
    channels, 180x320, one AVX2 core); the rest stays torch's. options: whether small has three
    convolutions with ReLU between them (RFANet, RFDN), or one (RLFN).
    """

    name = "enhanced_spatial_attention"
    replacement = "shift_conv2d"
    operators = ("shift_conv2d",)
    least = (262144, math.inf)

    def options(self, module: nn.Module) -> Iterable[bool]:
        names, wanted = state_names(module), {"conv1", "conv_f", "conv2", "conv3", "conv4"}
        if not wanted <= names:
            return []
        part: Any = module
        others = names - wanted - {"sigmoid", "relu"}
        if others not in (set(), {"conv_max", "conv3_"}):
            raise NotRecognised(f"its layers are not ESA's: {', '.join(sorted(others))}")
        if not all(is_conv(c, 1) for c in (part.conv1, part.conv_f, part.conv4)):
            raise NotRecognised("its conv1, conv_f and conv4 are not plain 1x1 convolutions")
        return [bool(others)]

    def examples(self, module: nn.Module, options: bool) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.conv1.in_channels, 33, 40)

    def forward(self, module: nn.Module, options: bool, *args: Any) -> Any:
        part: Any = module
        x = only_map(self.operators, args, part.conv1.weight.shape[1], part.conv1.weight)
        if x is None:
            return NotImplemented
        if not torch.compiler.is_exporting() and min(x.shape[2:]) < LEAST_SIDE:
            return NotImplemented
        first = _conv1x1(part.conv1, x)
        small = nn.functional.max_pool2d(part.conv2(first), 7, 3)
        if options:
            small = nn.functional.relu(part.conv3(nn.functional.relu(part.conv_max(small))))
            small = part.conv3_(small)
        else:
            small = part.conv3(small)
        size = (x.shape[2], x.shape[3])
        small = nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)
        gate = _conv1x1(part.conv4, _conv1x1(part.conv_f, first, small))
        if needs_gradient(module, x):
            return x * gate.sigmoid()
        return gate.sigmoid_().mul_(x)


def _conv1x1(convolution: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    return F.shift_conv2d(x, weight, bias, pattern="none", residual=residual)


for _recogniser in (
    ChannelAttention(),
    PixelAttention(),
    SpatialAttention(),
    PixelAttentionConv(),
    SelfCalibratedPixelAttention(),
    PixelAttentionNetwork(),
    InformationDistillation(),
    InformationDistillationNetwork(),
    EnhancedSpatialAttention(),
):
    register(_recogniser)
