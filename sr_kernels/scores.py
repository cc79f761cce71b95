"""The attention scores that one layer computes and later layers reuse, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor


@dataclass
class JointUse:
    """How the first reuse of grouped scores joins the backward of the layer that computed them.

    See `sr_kernels._joint_scores`. token: None once a reuse has taken it.
    """

    token: Tensor | None
    left: Any


@dataclass(frozen=True)
class WindowScores:
    """What determines a windowed attention matrix A, so that ``A v'`` can be formed again.

    A itself is never stored: its tiles are recomputed from q, k and the row log-sum-exp,
    ``A[i, j] = exp(s[i, j] - lse[i])``, which costs less than reading A back; the CPU kernels
    repeat a row's maximum and sum instead, since that difference loses digits where ``|lse|`` is
    large. Made by ``window_attention(..., return_scores=True)`` and
    ``grouped_window_attention(..., return_scores=True)``; used by ``apply_window_scores``.
    Gradients flow to ``q``, ``k`` and ``bias`` through every use.

    Attributes:
        kind: "window" (one window size, heads), "grouped" (ELAN's channel groups) or "block" (the
            same, from ``grouped_attention_block`` for ``apply_grouped_attention_block`` alone).
        q: "window": queries (N, num_heads * d, H, W). "grouped": the whole qv (N, 2C, H, W).
            "block": queries, as many elements as (N, C, H, W), in an order of the backend's own.
        k: keys, shaped as q; None where the keys are the queries.
        lse: log of the softmax denominator of every row, (N, num_heads or groups, H, W) at the
            pixel of the query; float32 (float64 for float64 input). None where A is to be
            recomputed in full (the reference).
        bias: relative position bias table ((2 wh - 1)(2 ww - 1), num_heads), or None.
        window: "window": (height, width) of a window in pixels.
        windows: "grouped", "block": side of each group's windows in pixels.
        shift: "window": (height, width) of the cyclic shift, pixels.
        shifted: "grouped", "block": whether the windows are shifted by half their side.
        num_heads: "window": number of heads.
        scale: "window": factor of the logits.
        backend: "block": which backend made it, and alone can apply it.
        joint: "grouped": where a backward pass may follow on the CPU, how the first reuse joins it.
        mask: "window": whether tokens that the cyclic shift brought together are kept apart.
    """

    kind: Literal["window", "grouped", "block"]
    q: Tensor
    k: Tensor | None = None
    lse: Tensor | None = None
    bias: Tensor | None = None
    window: tuple[int, int] = (1, 1)
    windows: tuple[int, ...] = ()
    shift: tuple[int, int] = (0, 0)
    shifted: bool = False
    num_heads: int = 1
    scale: float = 1.0
    mask: bool = False
    backend: str | None = None
    joint: JointUse | None = field(default=None, repr=False, compare=False)
