"""Window attention in Triton, one window size with heads, and ELAN's channel groups.

Formula (gradients: docs/operators.md), for tokens i, j of one window and head::

    s[i, j] = scale q_i . k_j + bias[index(i, j)]      out_i = sum_j softmax_j(s[i, j]) v_j

Tile: BLOCK_Q tokens of one window and head; the window's keys stream past BLOCK_K at a time with
an online softmax, so that no scores reach memory. Roll, window partition, head split, shift mask
and relative position are the index arithmetic of `token_pixels` and `scores`. Tokens that a window
does not have, and channels that a head does not have, are masked in the tile (d = 20 takes 32
columns); nothing is padded in memory.

Reuse takes q and the log-sum-exp: e[i, j] = exp(s[i, j] - lse_i), one pass without a running
maximum. The row is divided by its own sum, which would be 1 but for the rounding of lse: what
lse lost in its last digits (it reaches 877 with trained weights) cancels.

Backward, from the same: `statistics_kernel` forms r_i = 1 / sum_j e[i, j] and
delta_i = sum_j P[i, j] dP[i, j] of every row, two floats a pixel and head; `gradient_kernel` then
gives each tile of tokens its dq (as queries) and dk, dv (as keys) from one pass over the others,
adding dq and dk where k is q. `bias_kernel` sums dS over the windows of a chunk in registers, and
`bias_sum_kernel` adds the chunks in order.

A channel group is a launch of its own, on views of the tensors: its window decides the tile and
the warps (16 tokens: one warp; more: four), and a 320 x 192 image has 3,840, 960 and 240 windows of
4, 8 and 16 pixels, the last in 4 tiles each: each launch by itself has several programs for every
multiprocessor of a large GPU.

Windows of fewer than 16 tokens waste part of a tile.

Floor of the forward: 4 d elements of memory traffic, 4 T d FLOP and T exponentials a pixel and
head, T the tokens of a window. Fraction reached: unmeasured; no GPU has run this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sr_kernels.triton._configs import configuration
from sr_kernels.triton._launch import (
    allocate,
    index_type,
    launch,
    load,
    power_of_two,
    precision,
    strides,
    tile,
    wanted,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None

OPERATORS = (
    "window_attention",
    "apply_window_scores",
    "window_attention_backward",
    "grouped_window_attention",
    "grouped_window_attention_backward",
    "apply_grouped_window_scores",
    "apply_grouped_window_scores_backward",
)


@triton.jit
def window_of_program(
    pid, H, W, HEADS: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TILES: tl.constexpr
):
    """pid -> (image, head, row of windows, column of windows, tile of the window)."""
    across = W // WW
    count = (H // WH) * across
    window = (pid // TILES) % count
    rest = pid // TILES // count
    return rest // HEADS, rest % HEADS, window // across, window % across, pid % TILES


@triton.jit
def token_pixels(
    token, row, column, H, W, shift_h, shift_w, WH: tl.constexpr, WW: tl.constexpr
):  # fmt: skip
    """(h, w, region) of a window's tokens: the roll as one subtraction, for shifts in [0, H) and
    [0, W). The region says on which side of the seams a token lies: Swin's mask."""
    h = row * WH + token // WW + shift_h
    w = column * WW + token % WW + shift_w
    below = h >= H
    right = w >= W
    region = below.to(tl.int32) * 2 + right.to(tl.int32)
    return tl.where(below, h - H, h), tl.where(right, w - W, w), region


@triton.jit
def load_tokens(
    x, h, w, valid, s_c, s_h, s_w, D: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """A tile [token, channel] of one head."""
    c = tl.arange(0, BLOCK).to(INDEX)
    pointers = x + c[None, :] * s_c + h[:, None] * s_h + w[:, None] * s_w
    return load(pointers, valid[:, None] & (c < D)[None, :])


@triton.jit
def scores(
    q, k, bias, i, j, region_i, region_j, head, scale,
    HEADS: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s[i, j], and whether i sees j, of queries i (rows) and keys j (columns)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = (i < WH * WW)[:, None] & (j < WH * WW)[None, :]
    if HAS_BIAS:
        entry = bias_row(i[:, None], j[None, :], WH, WW)
        s += load(bias + entry * HEADS + head, seen).to(tl.float32)
    if MASK:
        seen = seen & (region_i[:, None] == region_j[None, :])
    return s, seen


@triton.jit
def bias_row(i, j, WH: tl.constexpr, WW: tl.constexpr):
    """Row of the relative position bias table for query i and key j."""
    dh = i // WW - j // WW
    dw = i % WW - j % WW
    return (dh + WH - 1) * (2 * WW - 1) + dw + WW - 1


@triton.jit
def attention_kernel(
    q, k, v, bias, lse, out,
    H, W, shift_h, shift_w, scale,
    q_n, q_c, q_h, q_w,
    k_n, k_c, k_h, k_w,
    v_n, v_c, v_h, v_w,
    o_n, o_c, o_h, o_w,
    l_n, l_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    REUSE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out of BLOCK_Q tokens of one window and head, and their lse, or from their lse (REUSE)."""
    T: tl.constexpr = WH * WW
    TILES: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    n, head, row, column, tile_i = window_of_program(tl.program_id(0), H, W, HEADS, WH, WW, TILES)
    n = n.to(tl.int64)
    i = tile_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    h_i, w_i, region_i = token_pixels(i, row, column, H, W, shift_h, shift_w, WH, WW)
    h_i = h_i.to(INDEX)
    w_i = w_i.to(INDEX)
    q += n * q_n + tl.cast(head * D, INDEX) * q_c
    k += n * k_n + tl.cast(head * D, INDEX) * k_c
    v += n * v_n + tl.cast(head * DV, INDEX) * v_c
    lse += n * l_n + tl.cast(head, tl.int64) * l_head
    query = load_tokens(q, h_i, w_i, i < T, q_c, q_h, q_w, D, BLOCK_D, INDEX)
    if REUSE:
        maximum = tl.load(lse + h_i * W + w_i, mask=i < T, other=0.0)
    else:
        maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    for first in range(0, T, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        h_j, w_j, region_j = token_pixels(j, row, column, H, W, shift_h, shift_w, WH, WW)
        h_j = h_j.to(INDEX)
        w_j = w_j.to(INDEX)
        key = load_tokens(k, h_j, w_j, j < T, k_c, k_h, k_w, D, BLOCK_D, INDEX)
        value = load_tokens(v, h_j, w_j, j < T, v_c, v_h, v_w, DV, BLOCK_V, INDEX)
        s, seen = scores(
            query, key, bias, i, j, region_i, region_j, head, scale,
            HEADS, WH, WW, HAS_BIAS, MASK, PRECISION,
        )  # fmt: skip
        if not REUSE:
            larger = tl.maximum(maximum, tl.max(tl.where(seen, s, float("-inf")), 1))
            # While a row has seen no key both are -inf, and there is nothing to rescale.
            factor = tl.where(larger == maximum, 1.0, tl.exp(maximum - larger))
            maximum = larger
            total *= factor
            y *= factor[:, None]
        # A bias of -inf excludes a key: a row that has seen no other has no finite maximum yet.
        finite = tl.where(maximum == float("-inf"), 0.0, maximum)
        e = tl.where(seen, tl.exp(s - finite[:, None]), 0.0)
        total += tl.sum(e, 1)
        y = tl.dot(e.to(value.dtype), value, y, input_precision=PRECISION)
    c = tl.arange(0, BLOCK_V).to(INDEX)
    out += n * o_n + tl.cast(head * DV, INDEX) * o_c
    tl.store(
        out + c[None, :] * o_c + h_i[:, None] * o_h + w_i[:, None] * o_w,
        y / total[:, None],
        mask=(i < T)[:, None] & (c < DV)[None, :],
    )
    if HAS_LSE and not REUSE:
        tl.store(lse + h_i * W + w_i, maximum + tl.log(total), mask=i < T)


class _Call:
    """One attention problem: what every launch about it takes."""

    def __init__(
        self,
        q: Tensor,
        k: OptionalTensor,
        v: Tensor,
        bias: OptionalTensor,
        window: tuple[int, int],
        shift: tuple[int, int],
        heads: int,
        scale: float,
        mask: bool,
    ) -> None:
        self.q, self.k, self.v = q, q if k is None else k, v
        self.bias = None if bias is None else bias.contiguous()
        self.window, self.heads, self.scale = window, heads, scale
        self.height, self.width = q.shape[2:]
        # An image without pixels has no windows, and no shift.
        self.shift = (shift[0] % max(1, self.height), shift[1] % max(1, self.width))
        self.tokens = window[0] * window[1]
        self.d, self.d_v = q.shape[1] // heads, v.shape[1] // heads
        self.constants: dict[str, Any] = {
            "HEADS": heads,
            "D": self.d,
            "DV": self.d_v,
            "WH": window[0],
            "WW": window[1],
            "HAS_BIAS": bias is not None,
            # Nothing is on another side without a shift.
            "MASK": mask and self.shift != (0, 0),
            "PRECISION": precision(),
            "BLOCK_D": tile(self.d, 1 << 30),
            "BLOCK_V": tile(self.d_v, 1 << 30),
        }

    @property
    def geometry(self) -> tuple[float, ...]:
        return (self.height, self.width, *self.shift, self.scale)

    def windows(self) -> int:
        """Over the whole batch."""
        n = self.q.shape[0]
        return n * (self.height // self.window[0]) * (self.width // self.window[1])

    def tiles(self, kernel: str) -> dict[str, int]:
        """BLOCK_Q, BLOCK_K, num_warps, num_stages for this window."""
        config = configuration(kernel, self.v, tokens=self.tokens, d=self.d, d_v=self.d_v)
        block_q = tile(self.tokens, config["BLOCK_Q"])
        return {
            "BLOCK_Q": block_q,
            "BLOCK_K": tile(self.tokens, config["BLOCK_K"]),
            # A tile of 16 rows is one warp's: windows of up to 16 tokens are many.
            "num_warps": 1 if block_q == 16 else config["num_warps"],
            "num_stages": config["num_stages"],
        }

    def grid(self, block: int) -> tuple[int]:
        return (self.windows() * self.heads * triton.cdiv(self.tokens, block),)


def _attend(call: _Call, out: Tensor, lse: OptionalTensor, *, reuse: bool) -> None:
    tiles = call.tiles("attention")
    launch(
        attention_kernel,
        call.grid(tiles["BLOCK_Q"]),
        call.q,
        call.k,
        call.v,
        call.bias,
        # Where nobody wants it, any address will do.
        out if lse is None else lse,
        out,
        *call.geometry,
        *strides(call.q),
        *strides(call.k),
        *strides(call.v),
        *strides(out),
        *((0, 0) if lse is None else lse.stride()[:2]),
        REUSE=reuse,
        HAS_LSE=lse is not None,
        INDEX=index_type(call.q, call.k, call.v, out, lse),
        **call.constants,
        **tiles,
    )


@triton.jit
def statistics_kernel(
    grad, q, k, v, bias, lse, inverse, delta,
    H, W, shift_h, shift_w, scale,
    g_n, g_c, g_h, g_w,
    q_n, q_c, q_h, q_w,
    k_n, k_c, k_h, k_w,
    v_n, v_c, v_h, v_w,
    l_n, l_head,
    s_n, s_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """inverse_i = 1 / sum_j e[i, j] and delta_i = sum_j P[i, j] (G_i . v_j) of BLOCK_Q tokens."""
    T: tl.constexpr = WH * WW
    TILES: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    n, head, row, column, tile_i = window_of_program(tl.program_id(0), H, W, HEADS, WH, WW, TILES)
    n = n.to(tl.int64)
    i = tile_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    h_i, w_i, region_i = token_pixels(i, row, column, H, W, shift_h, shift_w, WH, WW)
    h_i = h_i.to(INDEX)
    w_i = w_i.to(INDEX)
    q += n * q_n + tl.cast(head * D, INDEX) * q_c
    k += n * k_n + tl.cast(head * D, INDEX) * k_c
    v += n * v_n + tl.cast(head * DV, INDEX) * v_c
    grad += n * g_n + tl.cast(head * DV, INDEX) * g_c
    lse += n * l_n + tl.cast(head, tl.int64) * l_head
    query = load_tokens(q, h_i, w_i, i < T, q_c, q_h, q_w, D, BLOCK_D, INDEX)
    g = load_tokens(grad, h_i, w_i, i < T, g_c, g_h, g_w, DV, BLOCK_V, INDEX)
    lse_i = tl.load(lse + h_i * W + w_i, mask=i < T, other=0.0)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum_i = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, T, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        h_j, w_j, region_j = token_pixels(j, row, column, H, W, shift_h, shift_w, WH, WW)
        h_j = h_j.to(INDEX)
        w_j = w_j.to(INDEX)
        key = load_tokens(k, h_j, w_j, j < T, k_c, k_h, k_w, D, BLOCK_D, INDEX)
        value = load_tokens(v, h_j, w_j, j < T, v_c, v_h, v_w, DV, BLOCK_V, INDEX)
        s, seen = scores(
            query, key, bias, i, j, region_i, region_j, head, scale,
            HEADS, WH, WW, HAS_BIAS, MASK, PRECISION,
        )  # fmt: skip
        e = tl.where(seen, tl.exp(s - lse_i[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(value), input_precision=PRECISION)
        total += tl.sum(e, 1)
        sum_i += tl.sum(e * dp, 1)
    where = n * s_n + tl.cast(head, tl.int64) * s_head + h_i * W + w_i
    tl.store(inverse + where, 1.0 / total, mask=i < T)
    tl.store(delta + where, sum_i / total, mask=i < T)


@triton.jit
def load_rows(lse, inverse, delta, w_l, w_s, mask):
    """lse, inverse and delta of a tile's rows; a row that does not exist gets 0 for all."""
    return (
        tl.load(lse + w_l, mask=mask, other=0.0),
        tl.load(inverse + w_s, mask=mask, other=0.0),
        tl.load(delta + w_s, mask=mask, other=0.0),
    )


@triton.jit
def gradient_kernel(
    grad, q, k, v, bias, lse, inverse, delta, dq, dk, dv,
    H, W, shift_h, shift_w, scale,
    g_n, g_c, g_h, g_w,
    q_n, q_c, q_h, q_w,
    k_n, k_c, k_h, k_w,
    v_n, v_c, v_h, v_w,
    dq_n, dq_c, dq_h, dq_w,
    dk_n, dk_c, dk_h, dk_w,
    dv_n, dv_c, dv_h, dv_w,
    l_n, l_head,
    s_n, s_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    SHARED: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of BLOCK_Q tokens i: as queries of the keys j, and as keys of the queries j.

    SHARED: k is q, and dq gets both parts.
    """
    T: tl.constexpr = WH * WW
    TILES: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    AS_QUERY: tl.constexpr = NEED_Q
    AS_KEY: tl.constexpr = NEED_K or (SHARED and NEED_Q)
    n, head, row, column, tile_i = window_of_program(tl.program_id(0), H, W, HEADS, WH, WW, TILES)
    n = n.to(tl.int64)
    i = tile_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    h_i, w_i, region_i = token_pixels(i, row, column, H, W, shift_h, shift_w, WH, WW)
    h_i = h_i.to(INDEX)
    w_i = w_i.to(INDEX)
    q += n * q_n + tl.cast(head * D, INDEX) * q_c
    k += n * k_n + tl.cast(head * D, INDEX) * k_c
    v += n * v_n + tl.cast(head * DV, INDEX) * v_c
    grad += n * g_n + tl.cast(head * DV, INDEX) * g_c
    lse += n * l_n + tl.cast(head, tl.int64) * l_head
    inverse += n * s_n + tl.cast(head, tl.int64) * s_head
    delta += n * s_n + tl.cast(head, tl.int64) * s_head
    valid_i = i < T
    q_i = load_tokens(q, h_i, w_i, valid_i, q_c, q_h, q_w, D, BLOCK_D, INDEX)
    k_i = q_i
    if not SHARED:
        k_i = load_tokens(k, h_i, w_i, valid_i, k_c, k_h, k_w, D, BLOCK_D, INDEX)
    v_i = load_tokens(v, h_i, w_i, valid_i, v_c, v_h, v_w, DV, BLOCK_V, INDEX)
    g_i = load_tokens(grad, h_i, w_i, valid_i, g_c, g_h, g_w, DV, BLOCK_V, INDEX)
    at_i = h_i * W + w_i
    lse_i, inverse_i, delta_i = load_rows(lse, inverse, delta, at_i, at_i, valid_i)
    y_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    y_k = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    y_v = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    for first in range(0, T, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        h_j, w_j, region_j = token_pixels(j, row, column, H, W, shift_h, shift_w, WH, WW)
        h_j = h_j.to(INDEX)
        w_j = w_j.to(INDEX)
        valid_j = j < T
        q_j = load_tokens(q, h_j, w_j, valid_j, q_c, q_h, q_w, D, BLOCK_D, INDEX)
        k_j = q_j
        if not SHARED:
            k_j = load_tokens(k, h_j, w_j, valid_j, k_c, k_h, k_w, D, BLOCK_D, INDEX)
        if AS_QUERY:
            v_j = load_tokens(v, h_j, w_j, valid_j, v_c, v_h, v_w, DV, BLOCK_V, INDEX)
            s, seen = scores(
                q_i, k_j, bias, i, j, region_i, region_j, head, scale,
                HEADS, WH, WW, HAS_BIAS, MASK, PRECISION,
            )  # fmt: skip
            p = tl.where(seen, tl.exp(s - lse_i[:, None]), 0.0) * inverse_i[:, None]
            dp = tl.dot(g_i, tl.trans(v_j), input_precision=PRECISION)
            ds = p * (dp - delta_i[:, None])
            y_q = tl.dot(ds.to(k_j.dtype), k_j, y_q, input_precision=PRECISION)
        if AS_KEY or NEED_V:
            g_j = load_tokens(grad, h_j, w_j, valid_j, g_c, g_h, g_w, DV, BLOCK_V, INDEX)
            at_j = h_j * W + w_j
            lse_j, inverse_j, delta_j = load_rows(lse, inverse, delta, at_j, at_j, valid_j)
            s, seen = scores(
                q_j, k_i, bias, j, i, region_j, region_i, head, scale,
                HEADS, WH, WW, HAS_BIAS, MASK, PRECISION,
            )  # fmt: skip
            p = tl.where(seen, tl.exp(s - lse_j[:, None]), 0.0) * inverse_j[:, None]
            if NEED_V:
                y_v = tl.dot(
                    tl.trans(p).to(g_j.dtype), g_j, y_v, input_precision=PRECISION
                )  # fmt: skip
            if AS_KEY:
                dp = tl.dot(g_j, tl.trans(v_i), input_precision=PRECISION)
                ds = p * (dp - delta_j[:, None])
                y_k = tl.dot(tl.trans(ds).to(q_j.dtype), q_j, y_k, input_precision=PRECISION)
    c = tl.arange(0, BLOCK_D).to(INDEX)
    mask = valid_i[:, None] & (c < D)[None, :]
    if NEED_Q:
        if SHARED:
            y_q += y_k
        dq += n * dq_n + tl.cast(head * D, INDEX) * dq_c
        at = c[None, :] * dq_c + h_i[:, None] * dq_h + w_i[:, None] * dq_w
        tl.store(dq + at, y_q * scale, mask=mask)
    if NEED_K:
        dk += n * dk_n + tl.cast(head * D, INDEX) * dk_c
        at = c[None, :] * dk_c + h_i[:, None] * dk_h + w_i[:, None] * dk_w
        tl.store(dk + at, y_k * scale, mask=mask)
    if NEED_V:
        c = tl.arange(0, BLOCK_V).to(INDEX)
        dv += n * dv_n + tl.cast(head * DV, INDEX) * dv_c
        at = c[None, :] * dv_c + h_i[:, None] * dv_h + w_i[:, None] * dv_w
        tl.store(dv + at, y_v, mask=valid_i[:, None] & (c < DV)[None, :])


@triton.jit
def bias_kernel(
    grad, q, k, v, bias, lse, inverse, delta, partials,
    H, W, shift_h, shift_w, scale,
    g_n, g_c, g_h, g_w,
    q_n, q_c, q_h, q_w,
    k_n, k_c, k_h, k_w,
    v_n, v_c, v_h, v_w,
    l_n, l_head,
    s_n, s_head,
    windows,
    chunk,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """partials[chunk, head, i, j] = sum of dS[i, j] over the chunk's windows, of all images."""
    T: tl.constexpr = WH * WW
    head = tl.program_id(1)
    tiles_j = (T + BLOCK_K - 1) // BLOCK_K
    i = (tl.program_id(2) // tiles_j) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = (tl.program_id(2) % tiles_j) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid_i = i < T
    valid_j = j < T
    across = W // WW
    count = (H // WH) * across
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    start = tl.program_id(0) * chunk
    for window in range(start, tl.minimum(start + chunk, windows)):
        n = (window // count).to(tl.int64)
        row = (window % count) // across
        column = (window % count) % across
        h_i, w_i, region_i = token_pixels(i, row, column, H, W, shift_h, shift_w, WH, WW)
        h_j, w_j, region_j = token_pixels(j, row, column, H, W, shift_h, shift_w, WH, WW)
        h_i = h_i.to(INDEX)
        w_i = w_i.to(INDEX)
        h_j = h_j.to(INDEX)
        w_j = w_j.to(INDEX)
        q_at = q + n * q_n + tl.cast(head * D, INDEX) * q_c
        k_at = k + n * k_n + tl.cast(head * D, INDEX) * k_c
        v_at = v + n * v_n + tl.cast(head * DV, INDEX) * v_c
        g_at = grad + n * g_n + tl.cast(head * DV, INDEX) * g_c
        query = load_tokens(q_at, h_i, w_i, valid_i, q_c, q_h, q_w, D, BLOCK_D, INDEX)
        key = load_tokens(k_at, h_j, w_j, valid_j, k_c, k_h, k_w, D, BLOCK_D, INDEX)
        value = load_tokens(v_at, h_j, w_j, valid_j, v_c, v_h, v_w, DV, BLOCK_V, INDEX)
        g = load_tokens(g_at, h_i, w_i, valid_i, g_c, g_h, g_w, DV, BLOCK_V, INDEX)
        at = h_i * W + w_i
        head_64 = tl.cast(head, tl.int64)
        lse_i, inverse_i, delta_i = load_rows(
            lse, inverse, delta, n * l_n + head_64 * l_head + at, n * s_n + head_64 * s_head + at,
            valid_i,
        )  # fmt: skip
        s, seen = scores(
            query, key, bias, i, j, region_i, region_j, head, scale,
            HEADS, WH, WW, HAS_BIAS, MASK, PRECISION,
        )  # fmt: skip
        p = tl.where(seen, tl.exp(s - lse_i[:, None]), 0.0) * inverse_i[:, None]
        dp = tl.dot(g, tl.trans(value), input_precision=PRECISION)
        total += p * (dp - delta_i[:, None])
    slot = tl.program_id(0).to(tl.int64) * HEADS + head
    tl.store(
        partials + slot * (T * T) + i[:, None] * T + j[None, :],
        total,
        mask=valid_i[:, None] & valid_j[None, :],
    )


@triton.jit
def bias_sum_kernel(
    partials,
    out,
    chunks,
    HEADS: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[entry, head] = the sum of partials over the chunks and the pairs (i, j) of this entry."""
    T: tl.constexpr = WH * WW
    entry = tl.program_id(0)
    head = tl.program_id(1)
    dh = entry // (2 * WW - 1) - (WH - 1)
    dw = entry % (2 * WW - 1) - (WW - 1)
    i = tl.arange(0, BLOCK)
    h_j = i // WW - dh
    w_j = i % WW - dw
    valid = (i < T) & (h_j >= 0) & (h_j < WH) & (w_j >= 0) & (w_j < WW)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        slot = tl.cast(chunk, tl.int64) * HEADS + head
        total += tl.load(partials + slot * (T * T) + i * T + h_j * WW + w_j, mask=valid, other=0.0)
    tl.store(out + entry * HEADS + head, tl.sum(total, 0))


def _differentiate(
    call: _Call,
    grad: Tensor,
    lse: Tensor,
    dq: OptionalTensor,
    dk: OptionalTensor,
    dv: OptionalTensor,
    dbias: OptionalTensor,
    *,
    shared: bool,
) -> None:
    """Writes those gradients that are not None."""
    n = call.q.shape[0]
    shape = (n, call.heads, call.height, call.width)
    inverse = torch.empty(shape, dtype=torch.float32, device=grad.device)
    delta = torch.empty_like(inverse)
    index = index_type(call.q, call.k, call.v, grad, dq, dk, dv, lse)
    rows = (*lse.stride()[:2], *inverse.stride()[:2])
    sources = (grad, call.q, call.k, call.v, call.bias, lse, inverse, delta)
    source_strides = tuple(s for t in (grad, call.q, call.k, call.v) for s in strides(t))
    tiles = call.tiles("attention_statistics")
    launch(
        statistics_kernel,
        call.grid(tiles["BLOCK_Q"]),
        *sources,
        *call.geometry,
        *source_strides,
        *rows,
        INDEX=index,
        **call.constants,
        **tiles,
    )
    if any(gradient is not None for gradient in (dq, dk, dv)):
        tiles = call.tiles("attention_gradient")
        launch(
            gradient_kernel,
            call.grid(tiles["BLOCK_Q"]),
            *sources,
            dq,
            dk,
            dv,
            *call.geometry,
            *source_strides,
            *strides(dq),
            *strides(dk),
            *strides(dv),
            *rows,
            SHARED=shared,
            NEED_Q=dq is not None,
            NEED_K=dk is not None,
            NEED_V=dv is not None,
            INDEX=index,
            **call.constants,
            **tiles,
        )
    if dbias is not None:
        tiles = call.tiles("attention_bias")
        windows, tokens = call.windows(), call.tokens
        blocks = triton.cdiv(tokens, tiles["BLOCK_Q"]) * triton.cdiv(tokens, tiles["BLOCK_K"])
        chunk = max(1, triton.cdiv(windows * call.heads * blocks, 1024))
        chunks = triton.cdiv(windows, chunk)
        partials = torch.empty(
            (chunks, call.heads, tokens, tokens), dtype=torch.float32, device=grad.device
        )
        launch(
            bias_kernel,
            (chunks, call.heads, blocks),
            *sources,
            partials,
            *call.geometry,
            *source_strides,
            *rows,
            windows,
            chunk,
            INDEX=index,
            **call.constants,
            **tiles,
        )
        launch(
            bias_sum_kernel,
            (dbias.shape[0], call.heads),
            partials,
            dbias,
            chunks,
            HEADS=call.heads,
            WH=call.window[0],
            WW=call.window[1],
            BLOCK=power_of_two(tokens),
        )


# ------------------------------------------------------------------ one window size, heads


def window_attention(
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
    settings = (window_h, window_w, shift_h, shift_w, num_heads, scale, mask)
    out, lse = allocate("window_attention", q, k, v, bias, *settings)
    window, shift = (window_h, window_w), (shift_h, shift_w)
    call = _Call(q, k, v, bias, window, shift, num_heads, scale, mask)
    _attend(call, out, lse, reuse=False)
    return out, lse


def apply_window_scores(
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
    settings = (window_h, window_w, shift_h, shift_w, num_heads, scale, mask)
    out: Tensor = allocate("apply_window_scores", q, k, lse, v, bias, *settings)
    window, shift = (window_h, window_w), (shift_h, shift_w)
    call = _Call(q, k, v, bias, window, shift, num_heads, scale, mask)
    _attend(call, out, lse.contiguous(), reuse=True)
    return out


def window_attention_backward(
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
    gradients = allocate(
        "window_attention_backward", grad, q, k, lse, v, bias, window_h, window_w, shift_h,
        shift_w, num_heads, scale, mask, need_q, need_k, need_v, need_bias,
    )  # fmt: skip
    window, shift = (window_h, window_w), (shift_h, shift_w)
    call = _Call(q, k, v, bias, window, shift, num_heads, scale, mask)
    needs = (need_q, need_k and k is not None, need_v, need_bias and bias is not None)
    _differentiate(call, grad, lse.contiguous(), *wanted(gradients, needs), shared=k is None)
    return gradients


# ------------------------------------------------------------------ channel groups


def _group(group: int, q: Tensor, v: Tensor, windows: Sequence[int], shifted: bool) -> _Call:
    """The attention problem of one group: one head, keys are queries, ELAN's shift."""
    window = windows[group]
    shift = -(-window // 2) if shifted else 0
    return _Call(q, None, v, None, (window, window), (shift, shift), 1, 1.0, False)


def _halves(qv: Tensor, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views of the queries and of the values of each group of q0 v0 q1 v1 ..."""
    parts = qv.chunk(2 * count, 1)
    return parts[0::2], parts[1::2]


def attend_groups(
    queries: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    lse: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
    *,
    reuse: bool = False,
) -> None:
    """Every group's attention into its channels of out: writes lse, or reads it (reuse)."""
    for group, part in enumerate(out.chunk(len(windows), 1)):
        call = _group(group, queries[group], values[group], windows, shifted)
        row = None if lse is None else lse[:, group : group + 1]
        _attend(call, part, row, reuse=reuse)


def grouped_window_attention(
    qv: Tensor, windows: Sequence[int], shifted: bool
) -> tuple[Tensor, Tensor]:
    out, lse = allocate("grouped_window_attention", qv, windows, shifted)
    attend_groups(*_halves(qv, len(windows)), out, lse, windows, shifted)
    return out, lse


def apply_grouped_window_scores(
    qv: Tensor, lse: Tensor, v: Tensor, windows: Sequence[int], shifted: bool
) -> Tensor:
    out: Tensor = allocate("apply_grouped_window_scores", qv, lse, v, windows, shifted)
    queries, _ = _halves(qv, len(windows))
    values = v.chunk(len(windows), 1)
    attend_groups(queries, values, out, lse.contiguous(), windows, shifted, reuse=True)
    return out


def grouped_window_attention_backward(
    grad: Tensor, qv: Tensor, out: Tensor, lse: Tensor, windows: Sequence[int], shifted: bool
) -> Tensor:
    settings = (windows, shifted)
    dqv: Tensor = allocate("grouped_window_attention_backward", grad, qv, out, lse, *settings)
    count = len(windows)
    queries, values = _halves(qv, count)
    d_queries, d_values = _halves(dqv, count)
    lse = lse.contiguous()
    for group, g in enumerate(grad.chunk(count, 1)):
        call = _group(group, queries[group], values[group], windows, shifted)
        part = lse[:, group : group + 1]
        _differentiate(call, g, part, d_queries[group], None, d_values[group], None, shared=True)
    return dqv


def apply_grouped_window_scores_backward(
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
    settings = (windows, shifted, need_qv, need_v)
    gradients = dqv, dv = allocate(
        "apply_grouped_window_scores_backward", grad, qv, lse, v, out, *settings
    )
    count = len(windows)
    queries, _ = _halves(qv, count)
    d_queries: Sequence[OptionalTensor] = [None] * count
    if need_qv:
        d_queries, unused = _halves(dqv, count)
        for part in unused:  # the values in qv are not these
            part.zero_()
    d_values = dv.chunk(count, 1) if need_v else [None] * count
    lse = lse.contiguous()
    for group, (g, value) in enumerate(zip(grad.chunk(count, 1), v.chunk(count, 1), strict=True)):
        call = _group(group, queries[group], value, windows, shifted)
        part = lse[:, group : group + 1]
        _differentiate(call, g, part, d_queries[group], None, d_values[group], None, shared=True)
    return gradients
