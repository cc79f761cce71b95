"""The operators as functions: the package's public face, and what the modules in ``nn`` call.

Every feature map is ``(N, C, H, W)``, contiguous or channels_last (or any strides), float32,
float64, float16 or bfloat16; the result has the dtype and memory format of the first argument.
float16 and bfloat16 are computed in float32 inside. Every function but the attention blocks and
``conv3x3``, which are for inference, is differentiable with respect to every tensor it takes, once
(for second derivatives use ``backend="reference"``). All take ``backend``: ``"auto"`` (or None),
``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; see :mod:`sr_kernels.backends`.

Errors, in all of them: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape,
size, device or option, ``RuntimeError`` for a backend asked for by name that cannot run the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sr_kernels import _checks, _joint_scores, backends, reference
from sr_kernels.ops.options import ACTIVATIONS, PATTERNS, STATISTICS
from sr_kernels.scores import WindowScores

__all__ = [
    "WindowScores",
    "apply_grouped_attention_block",
    "apply_window_scores",
    "channel_attention",
    "channel_gate",
    "conv3x3",
    "gated_conv1x1",
    "grouped_attention_block",
    "grouped_window_attention",
    "linear_attention_block",
    "pixel_attention",
    "pixel_spatial_attention",
    "shift_conv2d",
    "shift_conv_block",
    "spatial_attention",
    "window_attention",
]

Activation = Literal["relu", "leaky_relu", "gelu", "silu"] | None
Pattern = Literal["plus", "cross", "none"]
Statistic = Literal["mean", "contrast"]


def _activation_options(activation: Activation, negative_slope: float) -> tuple[int, float]:
    _checks.one_of(activation, tuple(ACTIVATIONS), "activation")
    if not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    return ACTIVATIONS[activation], float(negative_slope)


def _shift_options(
    activation: Activation, negative_slope: float, pattern: Pattern, groups: int
) -> tuple[int, float, int, int]:
    options = _activation_options(activation, negative_slope)
    _checks.one_of(pattern, tuple(PATTERNS), "pattern")
    _checks.integer(groups, "groups", minimum=4)
    return *options, PATTERNS[pattern], groups


def shift_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    pattern: Pattern = "plus",
    groups: int = 5,
    negative_slope: float = 0.05,
    backend: str | None = None,
) -> Tensor:
    """Shift convolution: ``y = act(W shift(x) + b) (+ residual)``.

    The shift moves whole channel groups by one pixel and fills with zero; it is an index in the
    kernel, not a copy. With ``g = C_in // groups``, ``shift(x)[c, h, w] = x[c, h + dy, w + dx]``::

        channels    [0, g)    [g, 2g)   [2g, 3g)  [3g, 4g)  the rest
        plus        (0, +1)   (0, -1)   (+1, 0)   (-1, 0)   (0, 0)       (dy, dx)
        cross       (-1, -1)  (-1, +1)  (+1, -1)  (+1, +1)  (0, 0)
        none        (0, 0)    (0, 0)    (0, 0)    (0, 0)    (0, 0)

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 1, 1), the 1x1 convolution's.
        bias: (C_out,) or None.
        activation: None, "relu", "leaky_relu", "gelu" (exact, with erf) or "silu".
        residual: (N, C_out, H, W) added after the activation, or None.
        pattern: "plus" (ELAN), "cross" (diagonals) or "none": nothing moves, and this is the plain
            1x1 convolution with its activation and residual in one pass.
        groups: number of channel groups, at least 4; the first four move.
        negative_slope: of leaky_relu.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C_out, H, W).

    Source: ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    _checks.feature_map(x, "x")
    _checks.conv1x1_weight(weight, x.shape[1], "weight", x)
    _checks.optional(bias, (weight.shape[0],), "bias", x)
    options = _shift_options(activation, negative_slope, pattern, groups)
    if residual is not None:
        _checks.feature_map(residual, "residual")
        n, _, h, w = x.shape
        _checks.shaped(residual, (n, weight.shape[0], h, w), "residual", x)
    chosen = backends.choose("shift_conv2d", (x,), backend)
    if chosen == "reference":
        return reference.shift_conv2d(
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            pattern=pattern,
            groups=groups,
            negative_slope=negative_slope,
        )
    return backends.operators(chosen).shift_conv2d(x, weight, bias, residual, *options)


def shift_conv_block(
    x: Tensor,
    w0: Tensor,
    b0: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    *,
    activation: Activation = "relu",
    residual: bool = True,
    pattern: Pattern = "plus",
    groups: int = 5,
    negative_slope: float = 0.05,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """ELAN's local feature extraction: ``y = W1 shift(act(W0 shift(x) + b0)) + b1 (+ x)``.

    The hidden activations never leave the chip (CPU: the cache of one core); the backward pass
    recomputes them from x.

    Args:
        x: (N, C, H, W).
        w0: (C_hidden, C, 1, 1).
        b0: (C_hidden,) or None.
        w1: (C_out, C_hidden, 1, 1).
        b1: (C_out,) or None.
        activation: between the two; as in :func:`shift_conv2d`.
        residual: add x; needs C_out = C.
        pattern, groups, negative_slope: as in :func:`shift_conv2d`, for both shifts.
        out: (N, C_out, H, W), contiguous or channels_last, for the result; for inference.
            A network that hands two maps back and forth saves the memory and the page faults of new
            ones. Must share no memory with x.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C_out, H, W).

    Source: ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    _checks.feature_map(x, "x")
    _checks.conv1x1_weight(w0, x.shape[1], "w0", x)
    _checks.optional(b0, (w0.shape[0],), "b0", x)
    _checks.conv1x1_weight(w1, w0.shape[0], "w1", x)
    _checks.optional(b1, (w1.shape[0],), "b1", x)
    options = _shift_options(activation, negative_slope, pattern, groups)
    _checks.boolean(residual, "residual")
    if residual and w1.shape[0] != x.shape[1]:
        raise ValueError(
            "residual=True needs as many output channels as input channels, got w1 with "
            f"{w1.shape[0]} and x with {x.shape[1]}"
        )
    if out is not None:
        _checks.output(out, x, w1.shape[0])
        _require_inference(
            "shift_conv_block with out=", "shift_conv_block without it", x, w0, b0, w1, b1, out
        )
    chosen = backends.choose("shift_conv_block", (x,), backend)
    if chosen == "reference":
        y = reference.shift_conv_block(
            x,
            w0,
            b0,
            w1,
            b1,
            activation=activation,
            residual=residual,
            pattern=pattern,
            groups=groups,
            negative_slope=negative_slope,
        )
        return y if out is None else out.copy_(y)
    activation_code, slope, pattern_code, groups = options
    arguments = (x, w0, b0, w1, b1, activation_code, slope, residual, pattern_code, groups)
    return _run("shift_conv_block", chosen, arguments, out)


def _run(op: str, backend: str, arguments: tuple[Any, ...], out: Tensor | None) -> Tensor:
    """The operator's result, in ``out`` if that is a tensor."""
    if out is None:
        return getattr(backends.operators(backend), op)(*arguments)
    if backend != "cpu":  # allocators of GPUs keep what was freed: there is nothing to save
        return out.copy_(getattr(backends.operators(backend), op)(*arguments))
    getattr(torch.ops.sr_kernels, f"{op}_out")(*arguments, out)
    return out


def _window_tensors(
    q: Tensor, k: Tensor | None, v: Tensor, num_heads: int, window: tuple[int, int]
) -> int:
    """Checks q, k, v against each other; returns the head dimension of q and k."""
    _checks.feature_map(q, "q")
    _checks.feature_map(v, "v")
    _checks.like(v, q, "v", "q")
    for tensor, name in ((q, "q"), (v, "v")):
        if tensor.shape[1] % num_heads != 0:
            raise ValueError(
                f"{name} must have a multiple of num_heads={num_heads} channels, got "
                f"{tensor.shape[1]}"
            )
    if q.shape[0] != v.shape[0] or q.shape[2:] != v.shape[2:]:
        raise ValueError(
            "v must have the batch size and image size of q, got v "
            f"{tuple(v.shape)} and q {tuple(q.shape)}"
        )
    if k is not None:
        _checks.feature_map(k, "k")
        _checks.like(k, q, "k", "q")
        if k.shape != q.shape:
            raise ValueError(
                f"k must have the shape of q, got k {tuple(k.shape)} and q {tuple(q.shape)}"
            )
    _checks.divisible(q, window, "window")
    return q.shape[1] // num_heads


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = ...,
    num_heads: int = ...,
    scale: float | None = ...,
    bias: Tensor | None = ...,
    mask: bool = ...,
    return_scores: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = ...,
    num_heads: int = ...,
    scale: float | None = ...,
    bias: Tensor | None = ...,
    mask: bool = ...,
    return_scores: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, WindowScores]: ...
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, WindowScores]:
    """Multi-head self-attention inside (shifted) windows.

    For every window and head, with tokens i, j of the window in row-major order::

        s[i, j] = scale * q_i . k_j + bias[index(i, j), head]      (-inf where mask excludes j)
        out_i   = sum_j softmax_j(s[i, j]) v_j

    Roll, window partition, head split and mask are index arithmetic; no rolled copy and no score
    matrix is written to memory. Passing the same tensor as q and k is recognised and cheaper.

    Args:
        q, k: (N, num_heads * d, H, W), d the head dimension of the scores.
        v: (N, num_heads * d_v, H, W).
        window: window size in pixels, one integer or (height, width); must divide (H, W).
        shift: windows are cut from ``torch.roll(x, (-shift_h, -shift_w))`` and the result is
            rolled back; one integer or (height, width), either sign.
        num_heads: heads split the channels, head 0 first.
        scale: factor of q . k; None: ``d ** -0.5``.
        bias: relative position bias table ((2 wh - 1) * (2 ww - 1), num_heads) as in Swin:
            ``index = (dh + wh - 1) * (2 ww - 1) + dw + ww - 1`` with (dh, dw) = position of i
            minus position of j; or None.
        mask: True: tokens that only the roll brought together do not see each other (Swin's
            shift mask, excluded exactly rather than by adding -100); False: windows wrap around
            the image (ELAN).
        return_scores: also return the :class:`WindowScores` for :func:`apply_window_scores`.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, num_heads * d_v, H, W), or that and the scores.

    Source: Swin Transformer, Liu et al., ICCV 2021, arXiv 2103.14030.
    """
    window_size = _checks.integer_pair(window, "window", minimum=1)
    shift_size = _checks.integer_pair(shift, "shift")
    _checks.integer(num_heads, "num_heads", minimum=1)
    _checks.boolean(mask, "mask")
    _checks.boolean(return_scores, "return_scores")
    _checks.tensor(k, "k")
    shared_k = None if k is q else k
    head_dim = _window_tensors(q, shared_k, v, num_heads, window_size)
    if bias is not None:
        table = ((2 * window_size[0] - 1) * (2 * window_size[1] - 1), num_heads)
        _checks.shaped(bias, table, "bias", q)
    if scale is None:
        scale = float(head_dim) ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    widest = max(q.shape[1], v.shape[1]) // num_heads
    chosen = backends.choose("window_attention", (q, v), backend, head_channels=widest)
    if chosen == "reference":
        result = reference.window_attention(
            q,
            k,
            v,
            window=window_size,
            shift=shift_size,
            num_heads=num_heads,
            scale=scale,
            bias=bias,
            mask=mask,
            return_scores=return_scores,
        )
        return result
    out, lse = backends.operators(chosen).window_attention(
        q, shared_k, v, bias, *window_size, *shift_size, num_heads, float(scale), mask
    )
    if not return_scores:
        return out
    return out, WindowScores(
        kind="window",
        q=q,
        k=shared_k,
        lse=lse,
        bias=bias,
        window=window_size,
        shift=shift_size,
        num_heads=num_heads,
        scale=float(scale),
        mask=mask,
    )


def _grouped_windows(
    windows: Sequence[int], channels: int, name: str, like: Tensor
) -> tuple[int, ...]:
    """Checks the window sizes of a grouped attention over ``channels`` value channels."""
    if not isinstance(windows, (tuple, list)) or len(windows) == 0:
        raise TypeError(f"windows must be a non-empty tuple of integers, got {windows!r}")
    sizes = tuple(_checks.integer(size, "windows", minimum=1) for size in windows)
    if channels % len(sizes) != 0:
        raise ValueError(
            f"{name} must split into {len(sizes)} equal groups (one per window), got "
            f"{like.shape[1]} channels"
        )
    for size in sizes:
        _checks.divisible(like, (size, size), "windows: window")
    return sizes


@overload
def grouped_window_attention(
    qv: Tensor,
    *,
    windows: Sequence[int] = ...,
    shifted: bool = ...,
    return_scores: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def grouped_window_attention(
    qv: Tensor,
    *,
    windows: Sequence[int] = ...,
    shifted: bool = ...,
    return_scores: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, WindowScores]: ...
def grouped_window_attention(
    qv: Tensor,
    *,
    windows: Sequence[int] = (4, 8, 16),
    shifted: bool = False,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, WindowScores]:
    """ELAN's group-wise multi-scale self-attention (GMSA), its core between the projections.

    Channel group g attends inside windows of windows[g] x windows[g] pixels, keys = queries::

        out_g = softmax(q_g q_g^T) v_g

    with no scale, bias or mask; all groups run in one call.

    Args:
        qv: (N, 2C, H, W) in the order q0 v0 q1 v1 ..., each C / len(windows) channels; H and W
            must be divisible by every window.
        windows: window size in pixels of each group.
        shifted: cut the windows half a window further down and right
            (``torch.roll(x, -w // 2)`` before and the inverse roll after; cyclic, no mask).
        return_scores: also return the :class:`WindowScores` for :func:`apply_window_scores`.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W), or that and the scores.

    For an odd window ELAN's public code rolls back by one pixel less than it rolled; here the
    second roll always inverts the first.

    Source: ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    _checks.feature_map(qv, "qv")
    _checks.boolean(shifted, "shifted")
    _checks.boolean(return_scores, "return_scores")
    if qv.shape[1] % 2 != 0:
        raise ValueError(f"qv must have an even number of channels (2C), got {qv.shape[1]}")
    sizes = _grouped_windows(windows, qv.shape[1] // 2, "half of qv's channels", qv)
    widest = qv.shape[1] // 2 // len(sizes)
    chosen = backends.choose("grouped_window_attention", (qv,), backend, head_channels=widest)
    if chosen == "reference":
        return reference.grouped_window_attention(
            qv, windows=sizes, shifted=shifted, return_scores=return_scores
        )
    joint = None
    if return_scores and chosen == "cpu" and _joint_scores.can_join(qv):
        out, lse, joint = _joint_scores.attend(qv, list(sizes), shifted)
    else:
        out, lse = backends.operators(chosen).grouped_window_attention(qv, list(sizes), shifted)
    if not return_scores:
        return out
    return out, WindowScores(
        kind="grouped", q=qv, lse=lse, windows=sizes, shifted=shifted, joint=joint
    )


def apply_window_scores(scores: WindowScores, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention with scores that an earlier call computed: ``out = softmax(s) v``.

    The scores are q, k and the log-sum-exp of each row, not a matrix: softmax tiles are
    recomputed on chip. Gradients flow to v and through the scores to q, k and bias; several uses
    accumulate.

    Args:
        scores: from :func:`window_attention` or :func:`grouped_window_attention`.
        v: (N, num_heads * d_v, H, W), or (N, C, H, W) for grouped scores; the batch and image
            size of q.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        The shape of v.

    Source: the shared attention of ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    if not isinstance(scores, WindowScores):
        raise TypeError(f"scores must be WindowScores, got {type(scores).__name__}")
    if scores.kind == "block":
        raise ValueError(
            "scores come from grouped_attention_block; use apply_grouped_attention_block"
        )
    q = scores.q
    if scores.kind == "grouped":
        _checks.feature_map(v, "v")
        _checks.like(v, q, "v", "scores.q")
        n, channels, h, w = q.shape
        if v.shape != (n, channels // 2, h, w):
            raise ValueError(
                f"v must have shape {(n, channels // 2, h, w)} to match the scores, got "
                f"{tuple(v.shape)}"
            )
    else:
        _window_tensors(q, scores.k, v, scores.num_heads, scores.window)
    if scores.kind == "grouped":
        widest = v.shape[1] // len(scores.windows)
    else:
        widest = max(q.shape[1], v.shape[1]) // scores.num_heads
    chosen = backends.choose("apply_window_scores", (q, v), backend, head_channels=widest)
    free_to_choose = (backend or backends.current_backend()) == "auto"
    if chosen == "reference" or (scores.lse is None and free_to_choose):
        return reference.apply_window_scores(scores, v)
    if scores.lse is None:
        raise RuntimeError(
            f"backend {chosen!r} cannot apply these scores: they come from the reference "
            "implementation and hold no log-sum-exp"
        )
    if scores.kind == "grouped":
        arguments = (q, scores.lse, v, list(scores.windows), scores.shifted)
        joint = scores.joint
        if chosen == "cpu" and joint is not None and _joint_scores.can_join(joint.token):
            return _joint_scores.reuse(joint, *arguments)
        return backends.operators(chosen).apply_grouped_window_scores(*arguments)
    return backends.operators(chosen).apply_window_scores(
        q,
        scores.k,
        scores.lse,
        v,
        scores.bias,
        *scores.window,
        *scores.shift,
        scores.num_heads,
        scores.scale,
        scores.mask,
    )


def _block_weights(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    rows: int,
    name: str,
) -> None:
    _checks.conv1x1_weight(w_in, x.shape[1], f"w_{name}", x, c_out=rows)
    _checks.optional(b_in, (rows,), f"b_{name}", x)
    _checks.conv1x1_weight(w_out, x.shape[1], "w_out", x, c_out=x.shape[1])
    _checks.optional(b_out, (x.shape[1],), "b_out", x)


def _require_inference(op: str, instead: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} is for inference and has no gradient, but an argument requires one: call it "
            f"under torch.inference_mode() or torch.no_grad(), train with {instead}, or use "
            'backend="reference"'
        )


_TRAINABLE_BLOCK = "grouped_window_attention between two convolutions"


@overload
def grouped_attention_block(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    windows: Sequence[int] = ...,
    shifted: bool = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def grouped_attention_block(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    windows: Sequence[int] = ...,
    shifted: bool = ...,
    return_scores: Literal[True],
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, WindowScores]: ...
def grouped_attention_block(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    windows: Sequence[int] = (4, 8, 16),
    shifted: bool = False,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, WindowScores]:
    """ELAN's attention with its projections and its residual, for inference::

        q0 v0 q1 v1 ... = W_in x + b_in
        a_g = softmax(q_g q_g^T) v_g        as grouped_window_attention
        y = W_out a + b_out + x

    ``W_in`` and ``b_in`` are those of a 1x1 convolution into which a BatchNorm behind it has been
    folded. No gradient: a call that would need one raises ``RuntimeError`` (the reference backend
    has one).

    Args:
        x: (N, C, H, W), C divisible by len(windows), H and W by every window.
        w_in: (2C, C, 1, 1), rows in the order q0 v0 q1 v1 ..., each C / len(windows).
        b_in: (2C,) or None.
        w_out: (C, C, 1, 1).
        b_out: (C,) or None.
        windows, shifted: as in :func:`grouped_window_attention`.
        return_scores: also return the :class:`WindowScores` for
            :func:`apply_grouped_attention_block`.
        out: as in :func:`shift_conv_block`; with ``return_scores`` a pair, of that and a contiguous
            (N, C, H, W) tensor for what the scores keep.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W), or that and the scores.

    Source: ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    _checks.feature_map(x, "x")
    _checks.boolean(shifted, "shifted")
    _checks.boolean(return_scores, "return_scores")
    sizes = _grouped_windows(windows, x.shape[1], "x's channels", x)
    _block_weights(x, w_in, b_in, w_out, b_out, 2 * x.shape[1], "in")
    y, q = _block_outputs(out, return_scores, x)
    widest = x.shape[1] // len(sizes)
    chosen = backends.choose("grouped_attention_block", (x,), backend, head_channels=widest)
    if chosen == "reference":
        found = reference.grouped_attention_block(
            x,
            w_in,
            b_in,
            w_out,
            b_out,
            windows=sizes,
            shifted=shifted,
            return_scores=return_scores,
        )
        if y is None:
            return found
        return y.copy_(found) if isinstance(found, Tensor) else (y.copy_(found[0]), found[1])
    _require_inference("grouped_attention_block", _TRAINABLE_BLOCK, x, w_in, b_in, w_out, b_out)
    arguments = (x, w_in, b_in, w_out, b_out, list(sizes), shifted)
    if y is not None and chosen == "cpu":
        torch.ops.sr_kernels.grouped_attention_block_out(*arguments, y, q)
    else:
        new, q = backends.operators(chosen).grouped_attention_block(*arguments, return_scores)
        y = new if y is None else y.copy_(new)
    if not return_scores:
        return y
    assert q is not None
    return y, WindowScores(kind="block", q=q, windows=sizes, shifted=shifted, backend=chosen)


def _block_outputs(
    out: Tensor | tuple[Tensor, Tensor] | None, return_scores: bool, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The checked parts of grouped_attention_block's ``out``."""
    if out is None:
        return None, None
    pair = isinstance(out, tuple)
    if pair != return_scores or (pair and len(out) != 2):
        wanted = "a pair of tensors" if return_scores else "one tensor"
        raise ValueError(f"with return_scores={return_scores}, out must be {wanted}")
    y, q = out if isinstance(out, tuple) else (out, None)
    _checks.output(y, x, x.shape[1])
    if q is not None:
        _checks.shaped(q, tuple(x.shape), "out[1]", x)
        if not q.is_contiguous():
            raise ValueError("out[1] must be contiguous")
    return y, q


def apply_grouped_attention_block(
    scores: WindowScores,
    x: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`grouped_attention_block` with the scores of an earlier one: only v is projected.

    Args:
        scores: from :func:`grouped_attention_block`, on the same backend.
        x: (N, C, H, W), shaped as the earlier one's.
        w_v: (C, C, 1, 1), groups in order.
        b_v: (C,) or None.
        w_out, b_out: as in :func:`grouped_attention_block`.
        out: as in :func:`shift_conv_block`.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W).

    Source: the shared attention of ELAN, Zhang et al., ECCV 2022, arXiv 2203.06697.
    """
    if not isinstance(scores, WindowScores):
        raise TypeError(f"scores must be WindowScores, got {type(scores).__name__}")
    if scores.kind == "window":
        raise ValueError("scores come from window_attention; use apply_window_scores")
    _checks.feature_map(x, "x")
    q = scores.q
    _checks.like(x, q, "x", "scores.q")
    n, channels, h, w = q.shape
    wanted = (n, channels if scores.kind == "block" else channels // 2, h, w)
    if x.shape != wanted:
        raise ValueError(
            f"x must have shape {tuple(wanted)} to match the scores, got {tuple(x.shape)}"
        )
    _block_weights(x, w_v, b_v, w_out, b_out, x.shape[1], "v")
    if out is not None:
        _checks.output(out, x, x.shape[1])
    widest = x.shape[1] // len(scores.windows)
    chosen = backends.choose("apply_grouped_attention_block", (x,), backend, head_channels=widest)
    free_to_choose = (backend or backends.current_backend()) == "auto"
    if scores.kind == "grouped" and (chosen == "reference" or free_to_choose):
        y = reference.apply_grouped_attention_block(scores, x, w_v, b_v, w_out, b_out)
        return y if out is None else out.copy_(y)
    if scores.kind == "grouped" or chosen != scores.backend:
        raise RuntimeError(
            f"backend {chosen!r} cannot apply these scores: they come from another backend's "
            "grouped_attention_block, or from grouped_window_attention"
        )
    weights = (w_v, b_v, w_out, b_out)
    _require_inference("apply_grouped_attention_block", _TRAINABLE_BLOCK, x, *weights)
    arguments = (x, q, *weights, list(scores.windows), scores.shifted)
    return _run("apply_grouped_attention_block", chosen, arguments, out)


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
    backend: str | None = None,
) -> Tensor:
    """DCTLSA's attention, which is linear in the tokens, with its local branch, for inference::

        u = x + W1 depthwise(W0 x + b0) + b1
        q, k, v = W_qkv u + b_qkv
        y = u + W_out (scale q (softmax_tokens(k)^T v)) + b_out     in each window, per head

    The image is rolled by -shift first, and back after; the depthwise 3x3 convolution has zeros
    around the rolled image. ``W0`` and ``W1`` are those of 1x1 convolutions into which the
    BatchNorms in front of them have been folded. One pass from x to y; there is a kernel for the
    CPU alone. No gradient: a call that would need one raises ``RuntimeError`` (the reference
    backend has one).

    Args:
        x: (N, C, H, W).
        w0, w1: (C, C, 1, 1).
        b0, b1: (C,) or None.
        w_depth: (C, 1, 3, 3).
        w_qkv: (3C, C, 1, 1): q, k and v, in each the heads in order.
        b_qkv: (3C,) or None.
        w_out: (C, C, 1, 1).
        b_out: (C,) or None.
        window, shift: as in :func:`window_attention`.
        num_heads: must divide C.
        scale: of q; None: ``(C / num_heads) ** -0.5``.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W).

    Source: the layers of DCTLSA (an image super-resolution network), in the public code of its
    authors; attention that multiplies keys and values first is of Shen et al., WACV 2021, arXiv
    1812.01243.
    """
    _checks.feature_map(x, "x")
    channels = x.shape[1]
    window_size = _checks.integer_pair(window, "window", minimum=1)
    shift_size = _checks.integer_pair(shift, "shift")
    _checks.integer(num_heads, "num_heads", minimum=1)
    if channels % num_heads:
        raise ValueError(
            f"x must have a multiple of num_heads={num_heads} channels, got {channels}"
        )
    for weight, bias, name, rows in (
        (w0, b0, "0", channels),
        (w1, b1, "1", channels),
        (w_qkv, b_qkv, "_qkv", 3 * channels),
        (w_out, b_out, "_out", channels),
    ):
        _checks.conv1x1_weight(weight, channels, f"w{name}", x, c_out=rows)
        _checks.optional(bias, (rows,), f"b{name}", x)
    _checks.shaped(w_depth, (channels, 1, 3, 3), "w_depth", x)
    _checks.divisible(x, window_size, "window")
    if scale is None:
        scale = float(channels // num_heads) ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    weights = (w0, b0, w_depth, w1, b1, w_qkv, b_qkv, w_out, b_out)
    chosen = backends.choose("linear_attention_block", (x,), backend)
    if chosen == "reference":
        return reference.linear_attention_block(
            x, *weights, window=window_size, shift=shift_size, num_heads=num_heads, scale=scale
        )
    _require_inference("linear_attention_block", "its parts in torch", x, *weights)
    return backends.operators(chosen).linear_attention_block(
        x, *weights, *window_size, *shift_size, num_heads, float(scale)
    )


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    activation: Activation = None,
    negative_slope: float = 0.05,
    backend: str | None = None,
) -> Tensor:
    """A 3x3 convolution with what follows it, for inference: ``y = act(W * x + b + skip)``.

    Stride 1, zero padding 1. The CUDA and Triton kernels are the formula; on a GPU ``auto`` takes
    torch's own convolution. The CPU kernel takes 4 multiplications where the formula has 9 (2x2
    outputs at a time, Winograd's F(2x2, 3x3)); its rounding error is that of the plain convolution,
    or less. It multiplies sums and differences of up to four pixels. A NaN reaches the same outputs
    as in the plain convolution; where an infinity reaches, outputs may be NaN instead of infinite,
    and finite values above a quarter of the largest one of their dtype may overflow.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).
        bias: (C_out,) or None.
        skip: (N, C_out, H, W), added before the activation, or None.
        activation: None, "relu", "leaky_relu", "gelu" (exact, with erf) or "silu".
        negative_slope: of leaky_relu.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C_out, H, W).

    Source: the algorithm is of Lavin and Gray, CVPR 2016, arXiv 1509.09308.
    """
    _checks.feature_map(x, "x")
    n, channels, h, w = x.shape
    _checks.shaped(
        weight, (None, channels, 3, 3), "weight", x, " (out channels, in channels, 3, 3)"
    )
    _checks.optional(bias, (weight.shape[0],), "bias", x)
    _checks.optional(skip, (n, weight.shape[0], h, w), "skip", x)
    options = _activation_options(activation, negative_slope)
    chosen = backends.choose("conv3x3", (x,), backend)
    if chosen == "reference":
        return reference.conv3x3(
            x, weight, bias, skip=skip, activation=activation, negative_slope=negative_slope
        )
    _require_inference("conv3x3", "torch.nn.functional.conv2d", x, weight, bias, skip)
    return backends.operators(chosen).conv3x3(x, weight, bias, skip, *options)


def pixel_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Pixel attention: ``y = x * sigmoid(W x + b)``, one gate for every channel and pixel.

    Args:
        x: (N, C, H, W).
        weight: (C, C, 1, 1).
        bias: (C,) or None.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W).

    Source: PAN, Zhao et al., ECCV Workshops 2020, arXiv 2010.01073.
    """
    _checks.feature_map(x, "x")
    _checks.conv1x1_weight(weight, x.shape[1], "weight", x, c_out=x.shape[1])
    _checks.optional(bias, (x.shape[1],), "bias", x)
    chosen = backends.choose("pixel_attention", (x,), backend)
    if chosen == "reference":
        return reference.pixel_attention(x, weight, bias)
    return backends.operators(chosen).pixel_attention(x, weight, bias)


def _spatial_weight(weight: Tensor, bias: Tensor | None, x: Tensor, prefix: str = "") -> None:
    _checks.shaped(weight, (1, 2, None, None), f"{prefix}weight", x)
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"{prefix}weight must have an odd square kernel (1, 2, k, k), got {tuple(weight.shape)}"
        )
    _checks.optional(bias, (1,), f"{prefix}bias", x)


def spatial_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Spatial attention: ``y = x * sigmoid(conv_kxk([max_c x, mean_c x]) + b)``.

    Args:
        x: (N, C, H, W).
        weight: (1, 2, k, k), k odd, zero padding k // 2; the maximum's kernel comes first.
        bias: (1,) or None.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W). Channels that share the maximum share its gradient equally.

    Source: CBAM, Woo et al., ECCV 2018, arXiv 1807.06521.
    """
    _checks.feature_map(x, "x")
    _spatial_weight(weight, bias, x)
    chosen = backends.choose("spatial_attention", (x,), backend)
    if chosen == "reference":
        return reference.spatial_attention(x, weight, bias)
    return backends.operators(chosen).spatial_attention(x, weight, bias)


def pixel_spatial_attention(
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: Tensor | None,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``spatial_attention(pixel_attention(x))`` in one go.

    Args:
        x: (N, C, H, W).
        pixel_weight: (C, C, 1, 1).
        pixel_bias: (C,) or None.
        spatial_weight: (1, 2, k, k), k odd.
        spatial_bias: (1,) or None.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W).

    Source: :func:`pixel_attention` and :func:`spatial_attention`.
    """
    _checks.feature_map(x, "x")
    _checks.conv1x1_weight(pixel_weight, x.shape[1], "pixel_weight", x, c_out=x.shape[1])
    _checks.optional(pixel_bias, (x.shape[1],), "pixel_bias", x)
    _spatial_weight(spatial_weight, spatial_bias, x, "spatial_")
    arguments = (x, pixel_weight, pixel_bias, spatial_weight, spatial_bias)
    chosen = backends.choose("pixel_spatial_attention", (x,), backend)
    if chosen == "reference":
        return reference.pixel_spatial_attention(*arguments)
    return backends.operators(chosen).pixel_spatial_attention(*arguments)


def _gate_weights(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    statistic: Statistic,
) -> int:
    _checks.feature_map(x, "x")
    _checks.conv1x1_weight(w_down, x.shape[1], "w_down", x)
    _checks.optional(b_down, (w_down.shape[0],), "b_down", x)
    _checks.conv1x1_weight(w_up, w_down.shape[0], "w_up", x, c_out=x.shape[1])
    _checks.optional(b_up, (x.shape[1],), "b_up", x)
    _checks.one_of(statistic, tuple(STATISTICS), "statistic")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f"x must have at least one pixel: a mean over none is undefined, got {tuple(x.shape)}"
        )
    return STATISTICS[statistic]


def channel_gate(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    statistic: Statistic = "mean",
    backend: str | None = None,
) -> Tensor:
    """The gate of channel attention: ``sigmoid(W_up relu(W_down z + b_down) + b_up)``.

    z is a statistic of each channel over the image: ``mean``, or with "contrast" mean plus
    population standard deviation (no epsilon; the derivative of the deviation of a constant
    channel, infinite in IMDN's public code, is defined as zero).

    Args:
        x: (N, C, H, W) with H * W > 0.
        w_down: (R, C, 1, 1).
        b_down: (R,) or None.
        w_up: (C, R, 1, 1).
        b_up: (C,) or None.
        statistic: "mean" (RCAN) or "contrast" (IMDN).
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, 1, 1).

    Sources: RCAN, Zhang et al., ECCV 2018, arXiv 1807.02758; IMDN, Hui et al., ACM MM 2019,
    arXiv 1909.11856.
    """
    code = _gate_weights(x, w_down, b_down, w_up, b_up, statistic)
    chosen = backends.choose("channel_gate", (x,), backend)
    if chosen == "reference":
        return reference.channel_gate(x, w_down, b_down, w_up, b_up, statistic=statistic)
    return backends.operators(chosen).channel_gate(x, w_down, b_down, w_up, b_up, code)


def channel_attention(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    statistic: Statistic = "mean",
    backend: str | None = None,
) -> Tensor:
    """Channel attention: ``y = x * channel_gate(x)``.

    Args:
        x, w_down, b_down, w_up, b_up, statistic: as in :func:`channel_gate`.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C, H, W).

    Sources: as in :func:`channel_gate`.
    """
    code = _gate_weights(x, w_down, b_down, w_up, b_up, statistic)
    chosen = backends.choose("channel_attention", (x,), backend)
    if chosen == "reference":
        return reference.channel_attention(x, w_down, b_down, w_up, b_up, statistic=statistic)
    return backends.operators(chosen).channel_attention(x, w_down, b_down, w_up, b_up, code)


def gated_conv1x1(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A 1x1 convolution with a channel gate on its input: ``y = W (gate * x) + b (+ residual)``.

    The gate is folded into the weights, so that the gated feature map is never written.

    Args:
        x: (N, C_in, H, W).
        gate: (N, C_in, 1, 1), such as :func:`channel_gate` returns.
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,) or None.
        residual: (N, C_out, H, W) or None.
        backend: see :mod:`sr_kernels.backends`.

    Returns:
        (N, C_out, H, W).

    Source: the fusing convolution behind contrast-aware channel attention in IMDN, Hui et al.,
    ACM MM 2019, arXiv 1909.11856.
    """
    _checks.feature_map(x, "x")
    n, channels, h, w = x.shape
    _checks.tensor(gate, "gate")
    _checks.shaped(gate, (n, channels, 1, 1), "gate", x)
    _checks.conv1x1_weight(weight, channels, "weight", x)
    _checks.optional(bias, (weight.shape[0],), "bias", x)
    if residual is not None:
        _checks.shaped(residual, (n, weight.shape[0], h, w), "residual", x)
    chosen = backends.choose("gated_conv1x1", (x,), backend)
    if chosen == "reference":
        return reference.gated_conv1x1(x, gate, weight, bias, residual=residual)
    return backends.operators(chosen).gated_conv1x1(x, gate, weight, bias, residual)
