"""Registration of ``channel_moments``: mean and covariance of a feature map's channels.

    mean = mean_p x_p,  covariance = mean_p (x_p - mean) (x_p - mean)^T

over the pixels p of the whole batch; float64, shapes (C,) and (C, C). `sr_kernels.nn` computes the
batch statistics of BatchNorm behind a 1x1 convolution from them.
"""

from __future__ import annotations

from typing import Any

import torch

from sr_kernels.ops._registration import (
    declare_autograd,
    declare_fake,
    declare_no_double_backward,
    empty_feature_map,
)

Tensor = torch.Tensor


@declare_fake("channel_moments", not_in_triton=True)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    return x.new_empty(c, dtype=torch.float64), x.new_empty((c, c), dtype=torch.float64)


@declare_fake("channel_moments_backward", not_in_triton=True)
def _(mean_grad: Tensor, covariance_grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return empty_feature_map(x, x.shape[1])


@declare_fake("channel_moments_joint_backward", not_in_triton=True)
def _(
    mean_grad: Tensor,
    covariance_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    other_grad: Tensor,
    another_grad: Tensor | None,
) -> Tensor:
    return empty_feature_map(x, x.shape[1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (x,) = inputs
    mean, _ = output
    ctx.save_for_backward(x, mean)


def _backward(ctx: Any, mean_grad: Tensor | None, covariance_grad: Tensor | None) -> Tensor:
    x, mean = ctx.saved_tensors
    if mean_grad is None:
        mean_grad = torch.zeros_like(mean)
    if covariance_grad is None:
        covariance_grad = mean.new_zeros(mean.shape * 2)
    dx: Tensor = ctx.operators.channel_moments_backward(mean_grad, covariance_grad, x, mean)
    return dx


declare_autograd("channel_moments", _context, _backward)
for _name in ("channel_moments_backward", "channel_moments_joint_backward"):
    declare_no_double_backward(_name)
