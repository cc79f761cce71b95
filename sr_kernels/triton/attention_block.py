"""ELAN's attention with its projections, for inference, as a composition of kernels.

Formula: ``y = W_out grouped_window_attention(W_in x + b_in) + b_out + x``.

Not one kernel: the projections are `shift_conv.conv_kernel` without a shift, the residual in the
second one's epilogue, and `window_attention.attention_kernel` stands between them. q, v and the
attended values are temporaries in memory; scores are not. The queries that are handed on are
(N, C, H, W) in the order of their groups.

Floor: 2 C elements of memory traffic a pixel for one kernel; this composition moves 9 C (apply:
8 C). Fraction reached: unmeasured; no GPU has run this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sr_kernels.ops._registration import empty_feature_map
from sr_kernels.triton._launch import allocate
from sr_kernels.triton.shift_conv import conv
from sr_kernels.triton.window_attention import attend_groups

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None

OPERATORS = ("grouped_attention_block", "apply_grouped_attention_block")


def grouped_attention_block(
    x: Tensor,
    w_in: Tensor,
    b_in: OptionalTensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
    return_q: bool,
) -> tuple[Tensor, Tensor]:
    out, kept = allocate(
        "grouped_attention_block", x, w_in, b_in, w_out, b_out, windows, shifted, return_q
    )
    channels, groups = x.shape[1], len(windows)

    def rows(parameter: OptionalTensor, part: int) -> OptionalTensor:
        """Of q0 v0 q1 v1 ...: all q (part 0) or all v (part 1)."""
        if parameter is None:
            return None
        split = parameter.reshape(groups, 2, channels // groups, *parameter.shape[1:])
        return split[:, part].reshape(channels, *parameter.shape[1:])

    q = kept if return_q else empty_feature_map(x, channels)
    v = empty_feature_map(x, channels)
    for part, projected in enumerate((q, v)):
        weight = rows(w_in, part)
        assert weight is not None
        conv(x, weight, rows(b_in, part), projected)
    _attend_and_project(x, q, v, w_out, b_out, windows, shifted, out)
    return out, kept


def apply_grouped_attention_block(
    x: Tensor,
    q: Tensor,
    w_v: Tensor,
    b_v: OptionalTensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
) -> Tensor:
    out: Tensor = allocate(
        "apply_grouped_attention_block", x, q, w_v, b_v, w_out, b_out, windows, shifted
    )
    v = conv(x, w_v, b_v, empty_feature_map(x, x.shape[1]))
    _attend_and_project(x, q, v, w_out, b_out, windows, shifted, out)
    return out


def _attend_and_project(
    x: Tensor,
    q: Tensor,
    v: Tensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
    out: Tensor,
) -> None:
    groups = len(windows)
    attended = torch.empty_like(v)
    attend_groups(q.chunk(groups, 1), v.chunk(groups, 1), attended, None, windows, shifted)
    conv(attended, w_out, b_out, out, other=x)
