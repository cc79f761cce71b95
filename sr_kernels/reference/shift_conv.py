"""Shift convolution in plain PyTorch: the definition, and the test oracle.

Source: ELAN (Zhang et al., "Efficient Long-Range Attention Network for Image Super-resolution",
ECCV 2022, arXiv 2203.06697).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (dy, dx) of the channel groups 0..3: group i of the shifted image at (h, w) is x at
# (h + dy, w + dx). All remaining channels stay. "plus" is ELAN's, "cross" FriedRiceLab's 'x' mode;
# with "none" the operators are plain 1x1 convolutions.
SHIFT_OFFSETS = {
    "plus": ((0, 1), (0, -1), (1, 0), (-1, 0)),
    "cross": ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    "none": ((0, 0), (0, 0), (0, 0), (0, 0)),
}


def shift(x: Tensor, *, pattern: str = "plus", groups: int = 5) -> Tensor:
    """Move the first four of ``groups`` channel groups by one pixel each, with zero fill.

    ``y[:, c, h, w] = x[:, c, h + dy, w + dx]`` with (dy, dx) of c's group, 0 outside the image;
    a group has ``C // groups`` channels, all channels after the fourth group stay.

    Args:
        x: (N, C, H, W), any dtype.
        pattern: "plus" (right, left, below, above) "cross" (the four diagonals) or "none".
        groups: number of channel groups, >= 1.
    """
    if pattern not in SHIFT_OFFSETS:
        raise ValueError(f"pattern is {pattern!r}; accepted are {', '.join(SHIFT_OFFSETS)}")
    if groups < 1:
        raise ValueError(f"groups is {groups}; expected at least 1")
    height, width = x.shape[2:]
    size = x.shape[1] // groups
    if pattern == "none":
        return x
    padded = F.pad(x, (1, 1, 1, 1))
    parts = []
    for group, (dy, dx) in enumerate(SHIFT_OFFSETS[pattern]):
        channels = padded[:, group * size : (group + 1) * size]
        parts.append(channels[:, :, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width])
    parts.append(x[:, 4 * size :])
    return torch.cat(parts, 1)


def activate(x: Tensor, activation: str | None, negative_slope: float = 0.05) -> Tensor:
    """None, "relu", "leaky_relu" (``negative_slope``), "gelu" (exact, erf) or "silu" of x."""
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "silu":
        return F.silu(x)
    raise ValueError(
        f"activation is {activation!r}; accepted are None, 'relu', 'leaky_relu', 'gelu', 'silu'"
    )


def shift_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pattern: str = "plus",
    groups: int = 5,
    negative_slope: float = 0.05,
) -> Tensor:
    """``act(W shift(x) + b) (+ residual)``.

    x (N, C_in, H, W), weight (C_out, C_in, 1, 1), bias (C_out,) or None, residual
    (N, C_out, H, W) or None; returns (N, C_out, H, W). See :func:`shift` and :func:`activate`.
    """
    y = F.conv2d(shift(x, pattern=pattern, groups=groups), weight, bias)
    y = activate(y, activation, negative_slope)
    return y if residual is None else y + residual


def shift_conv_block(
    x: Tensor,
    w0: Tensor,
    b0: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    *,
    activation: str | None = "relu",
    residual: bool = True,
    pattern: str = "plus",
    groups: int = 5,
    negative_slope: float = 0.05,
) -> Tensor:
    """ELAN's local feature extraction: ``W1 shift(act(W0 shift(x) + b0)) + b1 (+ x)``.

    x (N, C, H, W), w0 (R, C, 1, 1), w1 (C_out, R, 1, 1); ``residual`` needs C_out = C.
    """
    hidden = shift_conv2d(
        x,
        w0,
        b0,
        activation=activation,
        pattern=pattern,
        groups=groups,
        negative_slope=negative_slope,
    )
    return shift_conv2d(
        hidden, w1, b1, residual=x if residual else None, pattern=pattern, groups=groups
    )
