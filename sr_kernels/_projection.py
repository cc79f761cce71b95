"""A 1x1 convolution with BatchNorm in training mode, for which no normalised map is ever stored.

With ``m`` and ``S`` the mean and the covariance of x over the pixels of the batch, what BatchNorm
measures behind ``z = W x + b`` follows from the weights::

    mean z = W m + b        var z = diag(W S W^T)
    y = gamma r (z - mean z) + beta        r = 1 / sqrt(var z + eps)

so that ``y = A x + beta - A m`` with ``A = diag(s) W`` and ``s = gamma r``: one 1x1 convolution.
b cancels. Backward, for P pixels, with
``G`` the gradient of y and ``D = sum G (x - m)^T``::

    dbeta = sum G        dgamma = r rowsum(W D)        dW = diag(s) (D - diag(r dgamma) W S)
    db = 0               dx = A^T (G - dbeta / P) - M (x - m)      M = A^T diag(r dgamma / P) W

The small matrices are in float64: a variance that W S W^T nearly cancels keeps its digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels.backends import operators
from sr_kernels.ops.options import ACTIVATIONS, PATTERNS

__all__ = ["conv1x1_batch_norm"]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) over all pixels, float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n, c, h, w = x.shape
    mean = x.mean((0, 2, 3), dtype=dtype)
    covariance = torch.zeros(c, c, dtype=torch.float64, device=x.device)
    rows = x.permute(0, 2, 3, 1)
    for image in range(n):  # centred copies of one image stay in the cache
        if rows[image].is_contiguous():
            centred = rows[image].reshape(h * w, c) - mean
            covariance += centred.T @ centred
        else:
            centred = x[image].reshape(c, h * w) - mean[:, None]
            covariance += centred @ centred.T
    return mean.double(), covariance / (n * h * w)


_NO_ACTIVATION = (ACTIVATIONS[None], 0.0, PATTERNS["none"], 4)


def _as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix.to(like.dtype)[:, :, None, None]


class _Conv1x1BatchNorm(torch.autograd.Function):
    """(x, weight, b, gamma, beta, mean, covariance, var z, eps, backend) -> y.

    mean, covariance and var z are functions of the others and get no gradient of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        b: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        covariance: Tensor,
        var: Tensor,
        eps: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gamma, mean, covariance, var)
        ctx.eps, ctx.backend = eps, backend
        a = (gamma.double() * torch.rsqrt(var + eps))[:, None] * weight.flatten(1).double()
        bias = beta.double() - a @ mean
        return operators(backend).shift_conv2d(
            x, _as_weight(a, x), bias.to(x.dtype), None, *_NO_ACTIVATION
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, mean, covariance, var = ctx.saved_tensors
        ops = operators(ctx.backend)
        w = weight.flatten(1).double()
        r = torch.rsqrt(var + ctx.eps)
        s = gamma.double() * r
        pixels = x.numel() // x.shape[1]
        _, raw, dbeta = ops.shift_conv2d_backward(
            grad, x, weight, None, *_NO_ACTIVATION, False, True, True
        )
        total = dbeta.double()
        d = raw.flatten(1).double() - total[:, None] * mean
        dgamma = r * (w * d).sum(1)
        dw = s[:, None] * (d - (r * dgamma)[:, None] * (w @ covariance))
        dx = None
        if ctx.needs_input_grad[0]:
            a = s[:, None] * w
            m = a.T @ ((r * dgamma / pixels)[:, None] * w)
            bias = m @ mean - a.T @ (total / pixels)
            through_moments = ops.shift_conv2d(
                x, _as_weight(-m, x), bias.to(x.dtype), None, *_NO_ACTIVATION
            )
            dx = ops.shift_conv2d(grad, _as_weight(a.T, x), None, through_moments, *_NO_ACTIVATION)
        return (
            dx,
            dw.to(weight.dtype).reshape(weight.shape),
            torch.zeros_like(dbeta) if ctx.needs_input_grad[2] else None,
            dgamma.to(gamma.dtype),
            dbeta.to(gamma.dtype),
            *[None] * 5,
        )


def conv1x1_batch_norm(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, backend: str
) -> Tensor:
    """``norm(convolution(x))`` in training mode; updates the running statistics as norm does.

    backend: one that has ``shift_conv2d``, not "reference".
    """
    pixels = x.numel() // x.shape[1]
    if pixels < 2:
        raise ValueError(f"x is {tuple(x.shape)}; BatchNorm needs more than one value per channel")
    with torch.no_grad():
        mean, covariance = _moments(x)
        w = convolution.weight.flatten(1).double()
        var = ((w @ covariance) * w).sum(1).clamp_(min=0)
        if norm.track_running_stats:
            _track(norm, convolution, w @ mean, var * (pixels / (pixels - 1)))
    y: Tensor = _Conv1x1BatchNorm.apply(
        x,
        convolution.weight,
        convolution.bias,
        norm.weight,
        norm.bias,
        mean,
        covariance,
        var,
        norm.eps,
        backend,
    )
    return y


def _track(norm: nn.BatchNorm2d, convolution: nn.Conv2d, mean: Tensor, var: Tensor) -> None:
    """BatchNorm's moving averages (momentum None: the plain mean) of W x and its variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if convolution.bias is not None:
        mean = mean + convolution.bias
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)
