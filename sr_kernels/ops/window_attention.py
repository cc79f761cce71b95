"""Registration of the window attention operators. Maths: sr_kernels/functional.py.

``lse``, the second output of the forwards, is not differentiable: the reuse operators
(``apply_*``) return the whole gradient of the scores through q, k and bias instead, so that
gradients of several uses add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sr_kernels.ops._registration import (
    declare_autocast,
    declare_autograd,
    declare_fake,
    declare_no_double_backward,
    empty_feature_map,
    gradient_or_none,
    statistics_dtype,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None


def _empty_lse(q: Tensor, heads: int) -> Tensor:
    n, _, h, w = q.shape
    return torch.empty((n, heads, h, w), dtype=statistics_dtype(q), device=q.device)


def _empty_map_gradient(of: OptionalTensor, needed: bool, like: Tensor) -> Tensor:
    if not needed or of is None:
        return like.new_empty(0)
    return empty_feature_map(of, of.shape[1])


# ---------------------------------------------------------------- one window size, heads


@declare_fake("window_attention")
def _(
    q: Tensor,
    k: OptionalTensor,
    v: Tensor,
    bias: OptionalTensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    return empty_feature_map(v, v.shape[1]), _empty_lse(q, num_heads)


@declare_fake("apply_window_scores")
def _(
    q: Tensor,
    k: OptionalTensor,
    lse: Tensor,
    v: Tensor,
    bias: OptionalTensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
    mask: bool,
) -> Tensor:
    return empty_feature_map(v, v.shape[1])


@declare_fake("window_attention_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: OptionalTensor,
    lse: Tensor,
    v: Tensor,
    bias: OptionalTensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
    mask: bool,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(bias.shape) if need_bias and bias is not None else q.new_empty(0)
    return (
        _empty_map_gradient(q, need_q, q),
        _empty_map_gradient(k, need_k, q),
        _empty_map_gradient(v, need_v, v),
        dbias,
    )


def _window_attention_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, bias, *settings = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, lse, v, bias)
    ctx.settings = settings


def _window_attention_backward(ctx: Any, grad: Tensor, grad_lse: OptionalTensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    gradients = ctx.operators.window_attention_backward(
        grad, *ctx.saved_tensors, *ctx.settings, *needs
    )
    return (*map(gradient_or_none, gradients, needs), *[None] * len(ctx.settings))


def _apply_window_scores_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, lse, v, bias, *settings = inputs
    ctx.save_for_backward(q, k, lse, v, bias)
    ctx.settings = settings


def _apply_window_scores_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_q, need_k, _, need_v, need_bias = needs = ctx.needs_input_grad[:5]
    dq, dk, dv, dbias = ctx.operators.window_attention_backward(
        grad, *ctx.saved_tensors, *ctx.settings, need_q, need_k, need_v, need_bias
    )
    gradients = map(gradient_or_none, (dq, dk, None, dv, dbias), (*needs[:2], False, *needs[3:]))
    return (*gradients, *[None] * len(ctx.settings))


# ---------------------------------------------------------------- channel groups


@declare_fake("grouped_window_attention")
def _(qv: Tensor, windows: Sequence[int], shifted: bool) -> tuple[Tensor, Tensor]:
    return empty_feature_map(qv, qv.shape[1] // 2), _empty_lse(qv, len(windows))


@declare_fake("apply_grouped_window_scores")
def _(qv: Tensor, lse: Tensor, v: Tensor, windows: Sequence[int], shifted: bool) -> Tensor:
    return empty_feature_map(v, v.shape[1])


@declare_fake("grouped_window_attention_backward")
def _(
    grad: Tensor, qv: Tensor, out: Tensor, lse: Tensor, windows: Sequence[int], shifted: bool
) -> Tensor:
    return empty_feature_map(qv, qv.shape[1])


@declare_fake("grouped_window_attention_joint_backward", not_in_triton=True)
def _(
    grad: Tensor,
    qv: Tensor,
    out: Tensor,
    lse: Tensor,
    reuse_grad: Tensor,
    reuse_v: Tensor,
    reuse_out: Tensor,
    windows: Sequence[int],
    shifted: bool,
) -> Tensor:
    return empty_feature_map(qv, qv.shape[1])


@declare_fake("apply_grouped_window_scores_backward")
def _(
    grad: Tensor,
    qv: Tensor,
    lse: Tensor,
    v: Tensor,
    out: Tensor,
    windows: Sequence[int],
    shifted: bool,
    need_qv: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_map_gradient(qv, need_qv, qv), _empty_map_gradient(v, need_v, v)


def _grouped_window_attention_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    qv, *settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qv, out, lse)
    ctx.settings = settings


def _grouped_window_attention_backward(
    ctx: Any, grad: Tensor, grad_lse: OptionalTensor
) -> tuple[Any, ...]:
    dqv = ctx.operators.grouped_window_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (dqv, *[None] * len(ctx.settings))


def _apply_grouped_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qv, lse, v, *settings = inputs
    ctx.save_for_backward(qv, lse, v, output)
    ctx.settings = settings


def _apply_grouped_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_qv, _, need_v = ctx.needs_input_grad[:3]
    dqv, dv = ctx.operators.apply_grouped_window_scores_backward(
        grad, *ctx.saved_tensors, *ctx.settings, need_qv, need_v
    )
    return (
        gradient_or_none(dqv, need_qv),
        None,
        gradient_or_none(dv, need_v),
        *[None] * len(ctx.settings),
    )


declare_autograd("window_attention", _window_attention_context, _window_attention_backward)
declare_autograd("apply_window_scores", _apply_window_scores_context, _apply_window_scores_backward)
declare_autograd(
    "grouped_window_attention",
    _grouped_window_attention_context,
    _grouped_window_attention_backward,
)
declare_autograd("apply_grouped_window_scores", _apply_grouped_context, _apply_grouped_backward)
# lse keeps its precision under autocast: it is a statistic, not data.
declare_autocast("window_attention")
declare_autocast("apply_window_scores", keep=(2,))
declare_autocast("grouped_window_attention")
declare_autocast("apply_grouped_window_scores", keep=(1,))
for _name in (
    "window_attention_backward",
    "grouped_window_attention_backward",
    "grouped_window_attention_joint_backward",
    "apply_grouped_window_scores_backward",
):
    declare_no_double_backward(_name)
