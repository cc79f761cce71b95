"""Registration of the attention gates' operators. Maths: sr_kernels/functional.py."""

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


# ------------------------------------------------------------------ pixel attention


@declare_fake("pixel_attention")
def _(x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
    return empty_feature_map(x, x.shape[1])


@declare_fake("pixel_attention_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(weight, need_weight, x),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


# ------------------------------------------------------------------ spatial attention


@declare_fake("spatial_attention")
def _(x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
    return empty_feature_map(x, x.shape[1])


@declare_fake("spatial_attention_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(weight, need_weight, x),
        x.new_empty(1 if need_bias else 0),
    )


@declare_fake("pixel_spatial_attention")
def _(
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: OptionalTensor,
    spatial_weight: Tensor,
    spatial_bias: OptionalTensor,
) -> Tensor:
    return empty_feature_map(x, x.shape[1])


@declare_fake("pixel_spatial_attention_backward")
def _(
    grad: Tensor,
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: OptionalTensor,
    spatial_weight: Tensor,
    spatial_bias: OptionalTensor,
    need_x: bool,
    need_pixel_weight: bool,
    need_pixel_bias: bool,
    need_spatial_weight: bool,
    need_spatial_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(pixel_weight, need_pixel_weight, x),
        x.new_empty(pixel_weight.shape[0] if need_pixel_bias else 0),
        empty_gradient(spatial_weight, need_spatial_weight, x),
        x.new_empty(1 if need_spatial_bias else 0),
    )


# ------------------------------------------------------------------ channel gate and attention


@declare_fake("channel_gate")
def _(
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@declare_fake("channel_attention")
def _(
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
) -> Tensor:
    return empty_feature_map(x, x.shape[1])


def _fake_channel_backward(
    grad: Tensor,
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
    need_x: bool,
    need_w_down: bool,
    need_b_down: bool,
    need_w_up: bool,
    need_b_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(w_down, need_w_down, x),
        x.new_empty(w_down.shape[0] if need_b_down else 0),
        empty_gradient(w_up, need_w_up, x),
        x.new_empty(w_up.shape[0] if need_b_up else 0),
    )


declare_fake("channel_gate_backward")(_fake_channel_backward)
declare_fake("channel_attention_backward")(_fake_channel_backward)


# ------------------------------------------------------------------ gated convolution


@declare_fake("gated_conv1x1")
def _(
    x: Tensor, gate: Tensor, weight: Tensor, bias: OptionalTensor, residual: OptionalTensor
) -> Tensor:
    return empty_feature_map(x, weight.shape[0])


@declare_fake("gated_conv1x1_backward")
def _(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    need_x: bool,
    need_gate: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(x, need_x, x),
        empty_gradient(gate, need_gate, x),
        empty_gradient(weight, need_weight, x),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _gated_conv1x1_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, _, _ = inputs
    ctx.save_for_backward(x, gate, weight)


def _gated_conv1x1_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *needs, need_residual = ctx.needs_input_grad
    gradients: tuple[Any, ...] = (None,) * 4
    if any(needs):
        gradients = ctx.operators.gated_conv1x1_backward(grad, *ctx.saved_tensors, *needs)
    return (
        *map(gradient_or_none, gradients, needs),
        gradient_or_none(grad, need_residual),
    )


# ------------------------------------------------------------------ the rest have one shape


def _register(name: str, tensors: int) -> None:
    """Autograd of an operator whose first ``tensors`` arguments are tensors, all of which its
    backward takes again, and whose other arguments are settings."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:tensors]
        gradients = getattr(ctx.operators, f"{name}_backward")(
            grad, *ctx.saved_tensors, *ctx.settings, *needs
        )
        return (*map(gradient_or_none, gradients, needs), *[None] * len(ctx.settings))

    declare_autograd(name, setup_context, backward)


_register("pixel_attention", 3)
_register("spatial_attention", 3)
_register("pixel_spatial_attention", 5)
_register("channel_gate", 5)
_register("channel_attention", 5)
declare_autograd("gated_conv1x1", _gated_conv1x1_context, _gated_conv1x1_backward)
for _name in (
    "pixel_attention",
    "spatial_attention",
    "pixel_spatial_attention",
    "channel_gate",
    "channel_attention",
    "gated_conv1x1",
):
    declare_autocast(_name)
    declare_no_double_backward(f"{_name}_backward")
