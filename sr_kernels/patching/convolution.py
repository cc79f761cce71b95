"""Plain 3x3 convolutions, for inference: in any network by themselves, and inside known ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import functional as F

from .recogniser import NotRecognised, Recogniser, is_conv, maps, needs_gradient, register, runs

# Below these torch's own convolution is faster, with 3 channels also on large maps (one AVX2 core,
# 3 to 256 channels, maps of 8x8 to 90x160).
LEAST_CHANNELS = 12
LEAST_PIXELS = 400


def takes(convolution: Any, x: Any) -> bool:
    """Whether ``conv3x3`` runs a plain 3x3 convolution on this map, and is faster."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    weight, bias = convolution.weight, convolution.bias
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.shape[1] == weight.shape[1] >= LEAST_CHANNELS
        and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS
        and not torch.is_autocast_enabled(x.device.type)
        and not needs_gradient(convolution, x)
        and runs(("conv3x3",), x, weight, bias)
    )


def convolve(
    convolution: Any, x: Tensor, slope: float | None = None, skip: Tensor | None = None
) -> Tensor:
    """``leaky_relu(convolution(x) + skip)``, without what is None; for 3x3 ones in one operator."""
    if convolution.kernel_size == (3, 3) and takes(convolution, x):
        return F.conv3x3(
            x,
            convolution.weight,
            convolution.bias,
            skip=skip,
            activation=None if slope is None else "leaky_relu",
            negative_slope=0.0 if slope is None else slope,
        )
    weight = convolution.weight
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # Without this torch convolves in the other format.
        weight = weight.contiguous(memory_format=torch.channels_last)
    y = nn.functional.conv2d(x, weight, convolution.bias, padding=convolution.padding)
    if skip is not None:
        y = y + skip
    return y if slope is None else nn.functional.leaky_relu_(y, slope)


class Convolution(Recogniser):
    """Conv2d 3x3 with stride 1 and zero padding 1, on maps that are large enough."""

    name = "convolution"
    replacement = "conv3x3 (inference only)"
    operators = ("conv3x3",)
    plain = True

    def options(self, module: nn.Module) -> Iterable[Any]:
        if not is_conv(module, 3):
            return []
        part: Any = module
        if part.in_channels < LEAST_CHANNELS:
            raise NotRecognised(f"stock is faster for less than {LEAST_CHANNELS} channels")
        if part.weight.dtype not in (torch.float32, torch.float64):
            raise NotRecognised(f"conv3x3 is used in float32 only, not in {part.weight.dtype}")
        return [()]

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.in_channels, 21, 20)

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        part: Any = module
        if len(args) != 1 or not takes(part, args[0]):
            return NotImplemented
        return F.conv3x3(args[0], part.weight, part.bias)


register(Convolution())
