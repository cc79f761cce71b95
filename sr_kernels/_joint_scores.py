"""Training on the CPU: one gradient of the scores for a grouped attention and its first reuse.

With S the scores, which both uses turn into the same probabilities P, and v, v' their values::

    out = P v,  out' = P v',  dP = dout v^T + dout' v'^T,  dq = (dS + dS^T) q

A backward pass meets the reuse first. Instead of a gradient of q of its own, to be added to the
other's, it leaves v', out' and dout' to the layer that computed the scores, whose backward makes
one dS of both: `grouped_window_attention_joint_backward`. A token, computed with the scores and
taken by the reuse, makes autograd run the reuse first, and tells the layer whether it ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sr_kernels.scores import JointUse

__all__ = ["attend", "can_join", "reuse"]


def can_join(tensor: Tensor | None) -> bool:
    """Whether a backward pass of the ordinary kind may come to this tensor."""
    return (
        tensor is not None
        and tensor.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


class _Left:
    """What a reuse leaves to the layer that computed its scores, between their backwards."""

    def __init__(self) -> None:
        self.use: tuple[Tensor, Tensor, Tensor] | None = None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        qv: Tensor, windows: list[int], shifted: bool, left: _Left
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = torch.ops.sr_kernels.grouped_window_attention(qv, windows, shifted)
        return out, lse, qv.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        qv, *settings, ctx.left = inputs
        out, lse, _ = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qv, out, lse)
        ctx.settings = settings

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, _, token = gradients
        qv, out, lse = ctx.saved_tensors
        use, ctx.left.use = ctx.left.use, None
        ops = torch.ops.sr_kernels
        if token is not None:
            grad = torch.zeros_like(out) if grad is None else grad
            dqv = ops.grouped_window_attention_joint_backward(
                grad, qv, out, lse, *use, *ctx.settings
            )
        elif grad is not None:
            dqv = ops.grouped_window_attention_backward(grad, qv, out, lse, *ctx.settings)
        else:
            dqv = None
        return dqv, None, None, None


class _Reuse(torch.autograd.Function):
    @staticmethod
    def forward(
        v: Tensor,
        token: Tensor,
        qv: Tensor,
        lse: Tensor,
        windows: list[int],
        shifted: bool,
        left: _Left,
    ) -> Tensor:
        out: Tensor = torch.ops.sr_kernels.apply_grouped_window_scores(qv, lse, v, windows, shifted)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, _, qv, lse, *settings, ctx.left = inputs
        ctx.save_for_backward(qv, lse, v, output)
        ctx.settings = settings

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        qv, lse, v, out = ctx.saved_tensors
        dv = None
        if ctx.needs_input_grad[0]:
            _, dv = torch.ops.sr_kernels.apply_grouped_window_scores_backward(
                grad, qv, lse, v, out, *ctx.settings, False, True
            )
        # Detached: what is left here must not keep the graph alive that it belongs to.
        ctx.left.use = (grad.detach(), v.detach(), out.detach())
        return dv, grad.new_zeros(()), None, None, None, None, None


def attend(qv: Tensor, windows: list[int], shifted: bool) -> tuple[Tensor, Tensor, JointUse]:
    """out and lse of ``grouped_window_attention``, and what their first reuse needs."""
    left = _Left()
    out, lse, token = _Attend.apply(qv, windows, shifted, left)
    return out, lse, JointUse(token, left)


def reuse(
    joint: JointUse, qv: Tensor, lse: Tensor, v: Tensor, windows: list[int], shifted: bool
) -> Tensor:
    """``apply_grouped_window_scores``, as the first reuse of these scores."""
    token, joint.token = joint.token, None
    return _Reuse.apply(v, token, qv, lse, windows, shifted, joint.left)
