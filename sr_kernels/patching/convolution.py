"""Plain 3x3 convolutions, for inference: in any network by themselves, and inside known ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import functional as F
from sr_kernels.ops._registration import is_channels_last

from . import recogniser as recogniser_module
from .recogniser import (
    NotRecognised,
    Recogniser,
    in_format_of,
    is_conv,
    maps,
    needs_gradient,
    register,
    runs,
)

# Where torch's own convolution is faster (one AVX2 core, 12 to 512 channels, maps of 20x20 to
# 96x96): with few products this package's calls cost more than they save, narrow maps fill half of
# the tiles, and few output channels fill a vector badly. With 3 input channels also on large maps.
# Of at most 16 channels in and out, the transformations cost as much as the products save: networks
# of such layers took up to 1.1 times as long (64x64 to 128x128, contiguous and channels_last).
LEAST_CHANNELS = 12
NARROW = 16
LEAST_PIXELS = 400
LEAST_PRODUCTS = 1_000_000
LEAST_SIDE = 8
FEW_OUTPUTS, LEAST_CHANNELS_OF_FEW_OUTPUTS = 8, 48


def narrow(convolution: Any) -> str:
    """Why torch is faster on maps of any size; "" if it is not."""
    if convolution.in_channels < LEAST_CHANNELS:
        return f"stock is faster for less than {LEAST_CHANNELS} channels"
    if max(convolution.in_channels, convolution.out_channels) <= NARROW:
        return f"stock is faster for at most {NARROW} channels in and out"
    return ""


def worth(convolution: Any, x: Tensor) -> bool:
    """Whether ``conv3x3`` is faster than torch on a map (N, C, H, W) of this size."""
    n, channels, height, width = x.shape
    if narrow(convolution):
        return False
    if not recogniser_module.sizes_matter():
        return True
    outputs, pixels = convolution.out_channels, n * height * width
    return (
        pixels >= max(LEAST_PIXELS, channels)  # each call transforms the weights
        and pixels * channels * outputs >= LEAST_PRODUCTS
        and min(height, width) >= LEAST_SIDE
        and (
            outputs >= FEW_OUTPUTS or channels >= LEAST_CHANNELS_OF_FEW_OUTPUTS or x.is_contiguous()
        )
    )


def takes(convolution: Any, x: Any) -> bool:
    """Whether ``conv3x3`` runs a plain 3x3 convolution on this map, and is faster."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    weight, bias = convolution.weight, convolution.bias
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.shape[1] == weight.shape[1]
        and worth(convolution, x)
        and not needs_gradient(convolution, x)
        and runs(("conv3x3",), x, weight, bias)
        and not torch.is_autocast_enabled(x.device.type)
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
    if is_channels_last(x):
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
        if why := narrow(part):
            raise NotRecognised(why)
        if part.weight.dtype not in (torch.float32, torch.float64):
            raise NotRecognised(f"conv3x3 is used in float32 only, not in {part.weight.dtype}")
        return [()]

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        part: Any = module
        return maps(part.in_channels, 21, 20)

    def declines(self, module: nn.Module, options: Any, *args: Any) -> bool:
        # On a small map the convolution itself takes less than a look at all of the module.
        x = args[0] if len(args) == 1 else None
        return (
            not isinstance(x, Tensor)
            or x.dim() != 4
            or not worth(module, x)
            or needs_gradient(module, x)
        )

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        part: Any = module
        if len(args) != 1 or not takes(part, args[0]):
            return NotImplemented
        return F.conv3x3(in_format_of(part.weight, args[0]), part.weight, part.bias)


register(Convolution())
