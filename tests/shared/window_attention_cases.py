"""Sizes, inputs and checks of window attention: for the operators and the emulated CUDA kernels."""

from functools import partial

import torch

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import check_operator, make_tensor

# (N, heads, d, d_v, H, W, window, shift): the networks' head dimensions, rectangular windows that
# are no multiple of a vector, windows of one pixel, one row, one column and the whole image,
# shifts of either sign and beyond the image, batch 0.
SIZES = [
    (1, 6, 10, 10, 16, 24, (8, 8), (4, 4)),
    (2, 1, 20, 20, 8, 8, (4, 4), (2, 2)),
    (1, 1, 20, 20, 16, 32, (16, 16), (8, 8)),
    (1, 2, 30, 30, 6, 10, (2, 5), (1, 2)),
    (1, 3, 8, 15, 9, 9, (3, 9), (-1, -4)),
    (1, 2, 15, 8, 5, 7, (5, 7), (2, -3)),
    (2, 1, 16, 1, 1, 12, (1, 4), (0, 1)),
    (1, 1, 1, 3, 12, 1, (6, 1), (-2, 0)),
    (1, 2, 32, 64, 4, 4, (1, 1), (1, 1)),
    (1, 1, 60, 31, 8, 12, (8, 6), (9, -14)),
    (1, 2, 64, 60, 8, 12, (2, 3), (0, 0)),
    (0, 2, 5, 5, 4, 4, (2, 2), (1, 1)),
]


def table_rows(window):
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def attention_inputs(
    n,
    heads,
    d,
    d_v,
    h,
    w,
    window,
    dtype=torch.float32,
    layout="contiguous",
    bias=True,
    scale=1.0,
    device="cpu",
):
    make = partial(make_tensor, dtype=dtype, device=device)
    return {
        "q": make((n, heads * d, h, w), layout=layout, seed=0, scale=scale),
        "k": make((n, heads * d, h, w), layout=layout, seed=1, scale=scale),
        "v": make((n, heads * d_v, h, w), layout=layout, seed=2),
        "bias": make((table_rows(window), heads), seed=3) if bias else None,
    }


def allow_float64_rounding(inputs, options):
    """In float64 stock's error on a handful of numbers is a matter of luck, 0 included."""
    if next(iter(inputs.values())).dtype == torch.float64:
        options.setdefault("atol", 1e-14)
        options.setdefault("gradient_atol", 1e-13)


def check_attention(inputs, *, window, shift=(0, 0), heads=1, mask=False, **options):
    allow_float64_rounding(inputs, options)
    kwargs = {"window": window, "shift": shift, "num_heads": heads, "mask": mask}
    if "score_scale" in options:
        kwargs["scale"] = options.pop("score_scale")
    return check_operator(
        "window_attention",
        sr_kernels.window_attention,
        reference.window_attention,
        inputs,
        kwargs=kwargs,
        **options,
    )


def check_grouped(qv, *, windows=(2, 4, 6), shifted=False, **options):
    inputs = {"qv": qv}
    allow_float64_rounding(inputs, options)
    return check_operator(
        "grouped_window_attention",
        sr_kernels.grouped_window_attention,
        reference.grouped_window_attention,
        inputs,
        kwargs={"windows": windows, "shifted": shifted},
        **options,
    )


def attention_with_reuse(module):
    """window_attention and `depth` layers that reuse its scores, each with values of its own."""

    def run(q, k, v, bias, values, *, depth=1, **options):
        backend = {"backend": options["backend"]} if "backend" in options else {}
        out, scores = module.window_attention(q, k, v, bias=bias, return_scores=True, **options)
        return _reused(module, out, scores, values, depth, backend)

    return run


def grouped_with_reuse(module):
    """grouped_window_attention, likewise."""

    def run(qv, values, *, depth=1, **options):
        backend = {"backend": options["backend"]} if "backend" in options else {}
        out, scores = module.grouped_window_attention(qv, return_scores=True, **options)
        return _reused(module, out, scores, values, depth, backend)

    return run


def _reused(module, out, scores, values, depth, backend):
    for _ in range(depth):
        out = module.apply_window_scores(scores, out * values, **backend)
    return out
