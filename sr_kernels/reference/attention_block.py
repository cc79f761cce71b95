"""ELAN's attention with its projections and its residual: the definition, and the test oracle."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d

from sr_kernels.scores import WindowScores

from .window_attention import apply_window_scores, grouped_window_attention


def grouped_attention_block(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    windows: tuple[int, ...] = (4, 8, 16),
    shifted: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, WindowScores]:
    """``W_out a + b_out + x`` with ``a = grouped_window_attention(W_in x + b_in)``.

    Args:
        x: (N, C, H, W).
        w_in, b_in: (2C, C, 1, 1) and (2C,), rows in the order q0 v0 q1 v1 ...
        w_out, b_out: (C, C, 1, 1) and (C,).
        windows, shifted: see :func:`grouped_window_attention`.
        return_scores: return ``(y, WindowScores)``.
    """
    attended = grouped_window_attention(
        conv2d(x, w_in, b_in), windows=windows, shifted=shifted, return_scores=True
    )
    assert isinstance(attended, tuple)
    a, scores = attended
    y = conv2d(a, w_out, b_out) + x
    return (y, scores) if return_scores else y


def apply_grouped_attention_block(
    scores: WindowScores,
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    """``W_out a + b_out + x`` with ``a = apply_window_scores(scores, W_v x + b_v)``.

    Args:
        scores: from :func:`grouped_attention_block`.
        w_v, b_v: (C, C, 1, 1) and (C,), groups in order.
    """
    return conv2d(apply_window_scores(scores, conv2d(x, w_v, b_v)), w_out, b_out) + x
