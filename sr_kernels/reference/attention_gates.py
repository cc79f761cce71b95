"""Attention gates in plain PyTorch: the definition of each operator, and the test oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_attention(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x * sigmoid(conv1x1(x))`` (PAN's pixel attention; Zhao et al., ECCVW 2020).

    x (N, C, H, W), weight (C, C, 1, 1), bias (C,) or None; returns (N, C, H, W).
    """
    return x * torch.sigmoid(F.conv2d(x, weight, bias))


def spatial_attention(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x * sigmoid(conv_kxk([max_c x, mean_c x]))`` (CBAM's spatial gate; Woo et al., ECCV 2018).

    x (N, C, H, W), weight (1, 2, k, k) with k odd and the maximum first, zero padding k // 2;
    bias (1,) or None; returns (N, C, H, W). Where several channels share the maximum, its
    gradient is divided equally between them.
    """
    statistics = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
    return x * torch.sigmoid(F.conv2d(statistics, weight, bias, padding=weight.shape[-1] // 2))


def contrast(x: Tensor) -> Tensor:
    """mean + population standard deviation over H and W: (N, C, H, W) -> (N, C, 1, 1).

    The derivative of the square root at a constant channel is infinite; it is defined as zero
    here (IMDN's public code yields NaN there).
    """
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().mean((2, 3), keepdim=True)
    positive = variance > 0
    # The inner where keeps sqrt away from 0, so that no infinite derivative is ever formed.
    deviation = torch.where(positive, variance, torch.ones_like(variance)).sqrt()
    return mean + torch.where(positive, deviation, torch.zeros_like(deviation))


def channel_gate(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    statistic: str = "mean",
) -> Tensor:
    """``sigmoid(W_up relu(W_down z + b_down) + b_up)``, one value a channel: (N, C, 1, 1).

    z is the spatial mean ("mean": RCAN, Zhang et al., ECCV 2018) or the mean plus the population
    standard deviation ("contrast": IMDN, Hui et al., ACM MM 2019). w_down (R, C, 1, 1),
    w_up (C, R, 1, 1), biases (R,) and (C,) or None.
    """
    if statistic == "mean":
        z = x.mean((2, 3), keepdim=True)
    elif statistic == "contrast":
        z = contrast(x)
    else:
        raise ValueError(f"statistic is {statistic!r}; accepted are 'mean' and 'contrast'")
    return torch.sigmoid(F.conv2d(F.relu(F.conv2d(z, w_down, b_down)), w_up, b_up))


def channel_attention(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    statistic: str = "mean",
) -> Tensor:
    """``x * channel_gate(x)``; arguments as :func:`channel_gate`."""
    return x * channel_gate(x, w_down, b_down, w_up, b_up, statistic=statistic)


def pixel_spatial_attention(
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: Tensor | None,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None = None,
) -> Tensor:
    """``spatial_attention(pixel_attention(x))``, the chain that MAFDN's branches run."""
    return spatial_attention(
        pixel_attention(x, pixel_weight, pixel_bias), spatial_weight, spatial_bias
    )


def gated_conv1x1(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``W (gate * x) + b (+ residual)``: a 1x1 convolution that takes a channel gate on its input.

    x (N, C_in, H, W), gate (N, C_in, 1, 1), weight (C_out, C_in, 1, 1), bias (C_out,) or None,
    residual (N, C_out, H, W) or None; returns (N, C_out, H, W).
    """
    y = F.conv2d(gate * x, weight, bias)
    return y if residual is None else y + residual
