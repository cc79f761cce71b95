"""The 3x3 convolution with what follows it: the definition, and the test oracle."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d

from .shift_conv import activate


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.05,
) -> Tensor:
    """``act(conv2d(x, weight, padding=1) + bias + skip)``.

    Args:
        x: (N, C_in, H, W).
        weight, bias: (C_out, C_in, 3, 3) and (C_out,).
        skip: (N, C_out, H, W).
        activation, negative_slope: see :func:`activate`.
    """
    z = conv2d(x, weight, bias, padding=1)
    return activate(z if skip is None else z + skip, activation, negative_slope)
