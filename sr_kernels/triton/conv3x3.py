"""The 3x3 convolution with what follows it in Triton, for inference.

Formula (stride 1, zero padding 1)::

    y[o, p] = act(sum over t, c of W[o, c, t] x[c, p + off(t)]  +  b[o] + skip[o, p])

Tile: BLOCK_P pixels of one image, numbered row by row, times BLOCK_O output channels. The taps and
the input channels are one axis of the product, k = t C_in + c, which streams past BLOCK_I at a
time: the tap is an offset in the load of x, as the shift is in `shift_conv.conv_kernel`, and no
unfolded copy of x exists. On that axis only the last tile is padded, so that three input channels
(27 products) take one tile of 32 and not nine of 16. The weights are read in the same order,
which is that of channels_last weights; others are copied once a call.

Floor: C_in + C_out elements of memory traffic (and C_out for skip) and 18 C_in C_out FLOP a pixel.
Fraction reached: unmeasured; no GPU has run this. The loads of nine taps meet in the cache, not in
shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sr_kernels.triton._configs import configuration
from sr_kernels.triton._launch import (
    activate,
    allocate,
    index_type,
    launch,
    load,
    load_map,
    pixels,
    precision,
    strides,
    tile,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None

OPERATORS = ("conv3x3",)


@triton.jit
def conv3x3_kernel(
    x,
    weight,
    bias,
    skip,
    out,
    H,
    W,
    x_n, x_c, x_h, x_w,
    skip_n, skip_c, skip_h, skip_w,
    out_n, out_c, out_h, out_w,
    slope,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """act(W * x + b + skip) for BLOCK_P pixels and BLOCK_O channels; weight is [o, t, c]."""
    PRODUCTS: tl.constexpr = 9 * C_IN
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_image = p < H * W
    h = p // W
    w = p % W
    z = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for first in range(0, PRODUCTS, BLOCK_I):
        k = first + tl.arange(0, BLOCK_I).to(INDEX)
        tap = k // C_IN
        values = load_map(
            x + n * x_n, h[:, None], w[:, None], (k % C_IN)[None, :],
            (tap // 3 - 1)[None, :], (tap % 3 - 1)[None, :],
            in_image[:, None] & (k < PRODUCTS)[None, :], H, W, x_c, x_h, x_w,
        )  # fmt: skip
        weights = load(
            weight + o[None, :] * PRODUCTS + k[:, None],
            (k < PRODUCTS)[:, None] & (o < C_OUT)[None, :],
        )
        z = tl.dot(values, weights, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += load(bias + o, o < C_OUT).to(tl.float32)[None, :]
    mask = in_image[:, None] & (o < C_OUT)[None, :]
    if HAS_SKIP:
        z += load(
            skip + n * skip_n + o[None, :] * skip_c + h[:, None] * skip_h + w[:, None] * skip_w,
            mask,
        ).to(tl.float32)  # fmt: skip
    tl.store(
        out + n * out_n + o[None, :] * out_c + h[:, None] * out_h + w[:, None] * out_w,
        activate(z, slope, ACTIVATION),
        mask=mask,
    )


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    skip: OptionalTensor,
    activation: int,
    negative_slope: float,
) -> Tensor:
    out: Tensor = allocate("conv3x3", x, weight, bias, skip, activation, negative_slope)
    c_out, c_in = weight.shape[:2]
    config = configuration("conv3x3", x, c_in=c_in, c_out=c_out)
    block_p, block_o = config["BLOCK_P"], tile(c_out, config["BLOCK_O"])
    launch(
        conv3x3_kernel,
        (triton.cdiv(pixels(x), block_p), triton.cdiv(c_out, block_o), x.shape[0]),
        x,
        weight.contiguous(memory_format=torch.channels_last),
        None if bias is None else bias.contiguous(),
        skip,
        out,
        *x.shape[2:],
        *strides(x),
        *strides(skip),
        *strides(out),
        negative_slope,
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        PRECISION=precision(),
        INDEX=index_type(x, skip, out),
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_I=tile(9 * c_in, config["BLOCK_I"]),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out
