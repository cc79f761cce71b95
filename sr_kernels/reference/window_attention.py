"""Windowed self-attention in plain PyTorch: the definition, and the test oracle.

Sources: Swin Transformer (Liu et al., ICCV 2021) for shifted windows, relative position bias and
mask; ELAN (Zhang et al., ECCV 2022) for grouped windows and the reuse of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sr_kernels.scores import WindowScores


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}; expected an int or (height, width)")
    return int(value[0]), int(value[1])


def _check_divides(x: Tensor, window: tuple[int, int], name: str) -> None:
    height, width = x.shape[2:]
    if window[0] < 1 or window[1] < 1:
        raise ValueError(f"{name} is {window}; expected at least 1 in both directions")
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"{name} {window} does not divide the image, height {height} and width {width}; "
            "pad the image to a multiple of the window"
        )


def _to_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int], heads: int) -> Tensor:
    """(N, heads * d, H, W) -> (N, H / wh, W / ww, heads, wh * ww, d), rolled by -shift first."""
    n, channels, height, width = x.shape
    wh, ww = window
    x = torch.roll(x, (-shift[0], -shift[1]), (2, 3))
    x = x.reshape(n, heads, channels // heads, height // wh, wh, width // ww, ww)
    return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5)


def _from_windows(y: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The inverse of :func:`_to_windows`."""
    n, rows, columns, heads, _, d = y.shape
    wh, ww = window
    y = y.unflatten(4, (wh, ww)).permute(0, 3, 6, 1, 4, 2, 5)
    y = y.reshape(n, heads * d, rows * wh, columns * ww)
    return torch.roll(y, shift, (2, 3))


def relative_position_index(window: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair (query, key) of a window: int64 (wh ww, wh ww).

    ``(dh + wh - 1) * (2 ww - 1) + (dw + ww - 1)`` with (dh, dw) = position of the query minus
    position of the key, tokens in row-major order.
    """
    wh, ww = window
    row = torch.arange(wh, device=device).repeat_interleave(ww)
    column = torch.arange(ww, device=device).repeat(wh)
    dh = row[:, None] - row[None, :]
    dw = column[:, None] - column[None, :]
    return (dh + wh - 1) * (2 * ww - 1) + (dw + ww - 1)


def shift_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Which tokens may see each other: bool (H / wh, W / ww, wh ww, wh ww), True for a seen key.

    After the roll, row i holds row i + shift of the image; rows with another value of
    ``(i + shift) // H`` came from the other side of the image, and likewise columns. Tokens see
    each other if both agree. For 0 < shift < window this is Swin's three-slice mask.
    """
    sides = []
    for length, step in zip(size, shift, strict=True):
        position = torch.arange(length, device=device) + step
        sides.append(torch.div(position, length, rounding_mode="floor"))
    rows = sides[0].reshape(-1, 1, window[0], 1)
    columns = sides[1].reshape(1, -1, 1, window[1])
    shape = (rows.shape[0], columns.shape[1], *window)
    rows, columns = rows.expand(shape).flatten(2), columns.expand(shape).flatten(2)
    same_rows = rows[..., :, None] == rows[..., None, :]
    same_columns = columns[..., :, None] == columns[..., None, :]
    return same_rows & same_columns


def _window_probabilities(
    q: Tensor,
    k: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    scale: float,
    bias: Tensor | None,
    mask: bool,
) -> Tensor:
    """A = softmax(scale q k^T + bias): (N, H / wh, W / ww, heads, wh ww, wh ww)."""
    query = _to_windows(q, window, shift, heads)
    key = _to_windows(k, window, shift, heads)
    scores = scale * query @ key.transpose(-2, -1)
    if bias is not None:
        expected = ((2 * window[0] - 1) * (2 * window[1] - 1), heads)
        if tuple(bias.shape) != expected:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {expected}")
        index = relative_position_index(window, bias.device)
        scores = scores + bias[index].permute(2, 0, 1)
    if mask and shift != (0, 0):
        seen = shift_mask((q.shape[2], q.shape[3]), window, shift, q.device)
        scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    return scores.softmax(-1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    num_heads: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, WindowScores]:
    """``softmax(scale q k^T + bias) v`` inside each window, per head.

    Args:
        q, k: (N, num_heads * d, H, W).
        v: (N, num_heads * d_v, H, W).
        window: side of a window in pixels, or (height, width); must divide H and W.
        shift: the image is rolled by -shift before it is cut into windows, and back after.
        scale: factor of the logits; None means d ** -0.5.
        bias: Swin's table ((2 wh - 1)(2 ww - 1), num_heads), see
            :func:`relative_position_index`.
        mask: keep tokens apart that only the roll brought together (:func:`shift_mask`);
            False wraps around.
        return_scores: return ``(out, WindowScores)``.

    Returns:
        (N, num_heads * d_v, H, W).
    """
    window, shift = _pair(window, "window"), _pair(shift, "shift")
    _check_divides(q, window, "window")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if num_heads < 1 or x.shape[1] % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide {name}'s {x.shape[1]} channels"
            )
    if scale is None:
        scale = (q.shape[1] // num_heads) ** -0.5
    probabilities = _window_probabilities(q, k, window, shift, num_heads, scale, bias, mask)
    out = _from_windows(probabilities @ _to_windows(v, window, shift, num_heads), window, shift)
    if not return_scores:
        return out
    scores = WindowScores(
        kind="window",
        q=q,
        k=None if k is q else k,
        bias=bias,
        window=window,
        shift=shift,
        num_heads=num_heads,
        scale=scale,
        mask=mask,
    )
    return out, scores


def _group_shift(window: int, shifted: bool) -> tuple[int, int]:
    """ELAN rolls by ``-w // 2``, a floor division: half a window, rounded up."""
    step = -(-window // 2) if shifted else 0
    return step, step


def grouped_window_attention(
    qv: Tensor,
    *,
    windows: tuple[int, ...] = (4, 8, 16),
    shifted: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, WindowScores]:
    """ELAN's group-wise multi-scale self-attention: ``softmax(q q^T) v``, a window size a group.

    One head a group, keys are queries; no scale, no bias, no mask. With ``shifted`` each group
    is rolled by half its window, rounded up, and wraps around.

    Args:
        qv: (N, 2C, H, W), channels in the order q0 v0 q1 v1 ..., each C / len(windows) wide.
        windows: side of each group's windows; every one must divide H and W.

    Returns:
        (N, C, H, W), groups in order; or ``(out, WindowScores)``.
    """
    windows = tuple(windows)
    if not windows or qv.shape[1] % (2 * len(windows)):
        raise ValueError(
            f"qv has {qv.shape[1]} channels; expected a multiple of 2 * len(windows) = "
            f"{2 * len(windows)}"
        )
    scores = WindowScores(kind="grouped", q=qv, windows=windows, shifted=shifted)
    v = torch.cat(qv.chunk(2 * len(windows), 1)[1::2], 1)
    out = apply_window_scores(scores, v)
    return (out, scores) if return_scores else out


def apply_window_scores(scores: WindowScores, v: Tensor) -> Tensor:
    """``A v`` with the attention matrix A that an earlier layer made.

    Args:
        scores: from :func:`window_attention` or :func:`grouped_window_attention`.
        v: "window": (N, num_heads * d_v, H, W); "grouped": (N, C, H, W).
    """
    if scores.kind == "window":
        probabilities = _window_probabilities(
            scores.q,
            scores.q if scores.k is None else scores.k,
            scores.window,
            scores.shift,
            scores.num_heads,
            scores.scale,
            scores.bias,
            scores.mask,
        )
        values = _to_windows(v, scores.window, scores.shift, scores.num_heads)
        return _from_windows(probabilities @ values, scores.window, scores.shift)
    if scores.kind != "grouped":
        raise ValueError(f"scores.kind is {scores.kind!r}; accepted are 'window' and 'grouped'")
    count = len(scores.windows)
    if v.shape[1] % count:
        raise ValueError(f"v has {v.shape[1]} channels; expected a multiple of {count}")
    outputs = []
    queries = scores.q.chunk(2 * count, 1)[0::2]
    for side, q, values in zip(scores.windows, queries, v.chunk(count, 1), strict=True):
        window, step = (side, side), _group_shift(side, scores.shifted)
        _check_divides(q, window, "window")
        probabilities = _window_probabilities(q, q, window, step, 1, 1.0, None, False)
        y = probabilities @ _to_windows(values, window, step, 1)
        outputs.append(_from_windows(y, window, step))
    return torch.cat(outputs, 1)
