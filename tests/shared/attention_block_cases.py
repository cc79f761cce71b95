"""Inputs and checks of the attention block: for the operators and the emulated CUDA kernels."""

import math
from functools import partial

import torch

import sr_kernels
from sr_kernels import reference, testing
from sr_kernels.testing import check_operator


def block_inputs(
    shape, dtype=torch.float32, layout="contiguous", logits=1.0, bias=True, device="cpu"
):
    """Inputs whose largest logits are about ``logits`` times the channels of a group."""
    make_tensor = partial(testing.make_tensor, device=device)
    c = shape[1]

    def weight(rows, seed, scale=1.0):
        return make_tensor((rows, c, 1, 1), dtype, seed=seed, scale=scale * c**-0.5)

    return {
        "x": make_tensor(shape, dtype, layout=layout, seed=0),
        "w_in": weight(2 * c, 1, math.sqrt(logits)),
        "b_in": make_tensor((2 * c,), dtype, seed=2, scale=0.1) if bias else None,
        "w_out": weight(c, 3),
        "b_out": make_tensor((c,), dtype, seed=4, scale=0.1) if bias else None,
        "w_v": weight(c, 5),
        "b_v": make_tensor((c,), dtype, seed=6, scale=0.1) if bias else None,
    }


def block_with_reuse(module):
    """A block and one that reuses its scores."""

    def run(x, w_in, b_in, w_out, b_out, w_v, b_v, **options):
        backend = {"backend": options["backend"]} if "backend" in options else {}
        y, scores = module.grouped_attention_block(
            x, w_in, b_in, w_out, b_out, return_scores=True, **options
        )
        return y, module.apply_grouped_attention_block(scores, y, w_v, b_v, w_out, b_out, **backend)

    return run


def check_block(inputs, *, windows, shifted, **options):
    if inputs["x"].dtype == torch.float64:
        # In float64 stock's error is scaled from float32, and may be luck.
        options.setdefault("atol", 1e-13)
    return check_operator(
        "grouped_attention_block",
        block_with_reuse(sr_kernels),
        block_with_reuse(reference),
        inputs,
        kwargs={"windows": windows, "shifted": shifted},
        gradients=None,
        **options,
    )
