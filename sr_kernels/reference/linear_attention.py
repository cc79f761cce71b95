"""DCTLSA's attention with its local branch: the definition, and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .window_attention import _check_divides, _from_windows, _pair, _to_windows


def linear_attention_block(
    x: Tensor,
    w0: Tensor,
    b0: Tensor | None,
    w_depth: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    num_heads: int = 1,
    scale: float | None = None,
) -> Tensor:
    """In the image rolled by -shift, and rolled back after::

        u = x + W1 depthwise(W0 x + b0) + b1
        q, k, v = W_qkv u + b_qkv
        y = u + W_out (scale q (softmax_tokens(k)^T v)) + b_out     in each window, per head

    Args:
        x: (N, C, H, W).
        w0, b0, w1, b1: (C, C, 1, 1) and (C,).
        w_depth: (C, 1, 3, 3), zero padding 1.
        w_qkv, b_qkv: (3C, C, 1, 1) and (3C,): q, k and v, heads in order inside each.
        w_out, b_out: (C, C, 1, 1) and (C,).
        window, shift: see :func:`window_attention`; the convolutions do not see across the seam.
        scale: None means (C / num_heads) ** -0.5.
    """
    window, shift = _pair(window, "window"), _pair(shift, "shift")
    _check_divides(x, window, "window")
    channels = x.shape[1]
    if scale is None:
        scale = float(channels // num_heads) ** -0.5
    x = torch.roll(x, (-shift[0], -shift[1]), (2, 3))
    between = conv2d(conv2d(x, w0, b0), w_depth, padding=1, groups=channels)
    u = conv2d(between, w1, b1) + x
    q, k, v = (
        _to_windows(part, window, (0, 0), num_heads) for part in conv2d(u, w_qkv, b_qkv).chunk(3, 1)
    )
    attended = (scale * q) @ (k.softmax(-2).transpose(-2, -1) @ v)
    y = conv2d(_from_windows(attended, window, (0, 0)), w_out, b_out) + u
    return torch.roll(y, shift, (2, 3))
