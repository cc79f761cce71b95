"""BatchNorm as what it is once its statistics are known: a factor and an offset of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def affine(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(factor, offset), each (C,), such that ``norm(x) = factor x + offset`` by these statistics;
    of their dtype where that is the wider one."""
    factor = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    offset = -mean * factor
    if norm.bias is not None:
        offset = offset + norm.bias
    return factor, offset


def folded(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that a convolution and the BatchNorm behind it are."""
    factor, bias = affine(norm, mean, variance)
    if convolution.bias is not None:
        bias = bias + convolution.bias * factor
    return convolution.weight * factor[:, None, None, None], bias
