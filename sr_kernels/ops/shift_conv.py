"""Registration of ``shift_conv2d`` and ``shift_conv_block``. Maths: sr_kernels/functional.py."""

from __future__ import annotations

from typing import Any

import torch

from sr_kernels.ops._registration import (
    declare_autocast,
    declare_autograd,
    declare_fake,
    declare_no_double_backward,
    empty_feature_map,
    empty_gradient,
    gradient_or_none,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None


@declare_fake("shift_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    residual: OptionalTensor,
    activation: int,
    negative_slope: float,
    pattern: int,
    groups: int,
) -> Tensor:
    return empty_feature_map(x, weight.shape[0])


@declare_fake("shift_conv2d_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    activation: int,
    negative_slope: float,
    pattern: int,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(weight, need_weight, x),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _shift_conv2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, *settings = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.settings = settings


def _shift_conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    *needs, need_residual = ctx.needs_input_grad[:4]
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs):
        computed = ctx.operators.shift_conv2d_backward(grad, x, weight, bias, *ctx.settings, *needs)
        gradients = tuple(map(gradient_or_none, computed, needs))
    return (*gradients, gradient_or_none(grad, need_residual), *[None] * len(ctx.settings))


@declare_fake("shift_conv_block")
def _(
    x: Tensor,
    w0: Tensor,
    b0: OptionalTensor,
    w1: Tensor,
    b1: OptionalTensor,
    activation: int,
    negative_slope: float,
    residual: bool,
    pattern: int,
    groups: int,
) -> Tensor:
    return empty_feature_map(x, w1.shape[0])


@declare_fake("shift_conv_block_out", not_in_triton=True)
def _(*arguments: Any) -> None:
    return None


@declare_fake("shift_conv_block_backward")
def _(
    grad: Tensor,
    x: Tensor,
    w0: Tensor,
    b0: OptionalTensor,
    w1: Tensor,
    activation: int,
    negative_slope: float,
    residual: bool,
    pattern: int,
    groups: int,
    need_x: bool,
    need_w0: bool,
    need_b0: bool,
    need_w1: bool,
    need_b1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(w0, need_w0, x),
        x.new_empty(w0.shape[0] if need_b0 else 0),
        empty_gradient(w1, need_w1, x),
        x.new_empty(w1.shape[0] if need_b1 else 0),
    )


def _shift_conv_block_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w0, b0, w1, _, *settings = inputs
    ctx.save_for_backward(x, w0, b0, w1)
    ctx.settings = settings


def _shift_conv_block_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    gradients = ctx.operators.shift_conv_block_backward(
        grad, *ctx.saved_tensors, *ctx.settings, *needs
    )
    return (*map(gradient_or_none, gradients, needs), *[None] * len(ctx.settings))


declare_autograd("shift_conv2d", _shift_conv2d_context, _shift_conv2d_backward)
declare_autograd("shift_conv_block", _shift_conv_block_context, _shift_conv_block_backward)
for _name in ("shift_conv2d", "shift_conv_block"):
    declare_autocast(_name)
    declare_no_double_backward(f"{_name}_backward")
