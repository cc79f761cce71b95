"""Shift convolution in Triton, and the 1x1 products that the gates are made of.

Formula (maths and gradients: docs/operators.md)::

    shift_conv2d       z = W S(x) + b      y = act(z) + residual
    shift_conv_block   z = W0 S(x) + b0    y = W1 S(act(z)) + b1 + x

Tile: BLOCK_P pixels of one image, numbered row by row, times BLOCK_O output channels; the input
channels stream past BLOCK_I at a time. The shift is an offset in the load of x. Feature maps are
read and written through their strides, so that both memory formats are native.

The block's hidden activations stay in registers: hidden channels are taken group by group of the
second shift, so that a tile of them has one offset, and are computed where the second product
wants them: h[r, p + off(r)] needs x at p + off(r) + off(c), another offset in the same load. Every
hidden value is computed once, unless C_out needs more than one tile.

Backward: dz = G act'(z) is written once (z recomputed); dx = S^T(W^T dz) scatters its tile by
the shift, each element stored by one program; dW and db are summed per chunk of pixels and the
chunks then added in order. For the block, h and dz of the hidden channels are temporaries.

Floor of the forward: (C_in + C_out) elements of memory traffic and 2 C_in C_out FLOP a pixel
(block: 2 C elements, 2 C R + 2 R C_out FLOP). Fraction reached: unmeasured; no GPU has run this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sr_kernels.ops._registration import empty_feature_map
from sr_kernels.triton._configs import configuration
from sr_kernels.triton._launch import (
    activate,
    activation_derivative,
    allocate,
    index_type,
    launch,
    load,
    load_map,
    pixels,
    precision,
    strides,
    sum_partials,
    tile,
    wanted,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None

OPERATORS = (
    "shift_conv2d",
    "shift_conv2d_backward",
    "shift_conv_block",
    "shift_conv_block_backward",
)

NO_SHIFT = 2  # the pattern with which the kernels are plain 1x1 convolutions

# What `conv_kernel` does with z = W S(x) + b.
CONV = tl.constexpr(0)  # out = act(z) + other
CONV_GRADIENT = tl.constexpr(1)  # out = other * act'(z)
PIXEL = tl.constexpr(2)  # out = x * sigmoid(z)
PIXEL_GRADIENT = tl.constexpr(3)  # out = other * x * s (1 - s), second = other * s, s = sigmoid(z)


@triton.jit
def offset_of_group(group, PATTERN: tl.constexpr):
    """(dy, dx) of channel group 0..4; the table is in docs/operators.md."""
    sign = tl.where(group % 2 == 0, 1, -1)
    if PATTERN == 0:
        dy = tl.where((group == 2) | (group == 3), sign, 0)
        dx = tl.where(group < 2, sign, 0)
    elif PATTERN == 1:
        dy = tl.where(group < 4, tl.where(group < 2, -1, 1), 0)
        dx = tl.where(group < 4, -sign, 0)
    else:
        dy = group * 0
        dx = group * 0
    return dy, dx


@triton.jit
def shift_of(channel, CHANNELS: tl.constexpr, PATTERN: tl.constexpr, GROUPS: tl.constexpr):
    """(dy, dx) of each channel."""
    SIZE: tl.constexpr = CHANNELS // GROUPS
    if SIZE == 0:
        group = channel * 0 + 4
    else:
        group = tl.minimum(channel // SIZE, 4)
    return offset_of_group(group, PATTERN)


@triton.jit
def hidden_block(
    block,
    CHANNELS: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels of the block-th tile of channels that all have one offset.

    Returns (channels, whether each is one of the tile, dy, dx). There are `hidden_blocks` tiles.
    """
    SIZE: tl.constexpr = 0 if PATTERN == 2 else CHANNELS // GROUPS
    PER_GROUP: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    if PER_GROUP == 0:
        group = block * 0 + 4
    else:
        group = tl.minimum(block // PER_GROUP, 4)
    first = group * SIZE
    end = tl.where(group < 4, first + SIZE, CHANNELS)
    channel = first + (block - group * PER_GROUP) * BLOCK + tl.arange(0, BLOCK)
    dy, dx = offset_of_group(group, PATTERN)
    return channel, channel < end, dy, dx


def hidden_blocks(channels: int, pattern: int, groups: int, block: int) -> int:
    size = 0 if pattern == NO_SHIFT else channels // groups
    return 4 * triton.cdiv(size, block) + triton.cdiv(channels - 4 * size, block)


@triton.jit
def conv_kernel(
    x,
    weight,
    bias,
    gate,
    other,
    out,
    second,
    H,
    W,
    x_n, x_c, x_h, x_w,
    other_n, other_c, other_h, other_w,
    out_n, out_c, out_h, out_w,
    slope,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """z = W S(x) + b for BLOCK_P pixels and BLOCK_O channels, then the epilogue.

    gate (N, C_IN) scales the weights. other is a feature map like out; second is stored as out is.
    """
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_image = p < H * W
    h = p // W
    w = p % W
    z = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for first in range(0, C_IN, BLOCK_I):
        c = first + tl.arange(0, BLOCK_I).to(INDEX)
        dy, dx = shift_of(c, C_IN, PATTERN, GROUPS)
        valid = in_image[:, None] & (c < C_IN)[None, :]
        values = load_map(
            x + n * x_n, h[:, None], w[:, None], c[None, :], dy[None, :], dx[None, :], valid,
            H, W, x_c, x_h, x_w,
        )  # fmt: skip
        weights = load(
            weight + o[None, :] * C_IN + c[:, None], (c < C_IN)[:, None] & (o < C_OUT)[None, :]
        )
        if HAS_GATE:
            factor = load(gate + n * C_IN + c, c < C_IN).to(tl.float32)
            weights = (weights * factor[:, None]).to(values.dtype)
        z = tl.dot(values, weights, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += load(bias + o, o < C_OUT).to(tl.float32)[None, :]
    mask = in_image[:, None] & (o < C_OUT)[None, :]
    where = n * out_n + o[None, :] * out_c + h[:, None] * out_h + w[:, None] * out_w
    if HAS_OTHER:
        operand = load(
            other + n * other_n + o[None, :] * other_c + h[:, None] * other_h
            + w[:, None] * other_w,
            mask,
        ).to(tl.float32)  # fmt: skip
    if EPILOGUE == CONV:
        y = activate(z, slope, ACTIVATION)
        if HAS_OTHER:
            y += operand
    elif EPILOGUE == CONV_GRADIENT:
        y = operand * activation_derivative(z, slope, ACTIVATION)
    else:
        s = tl.sigmoid(z)
        same = load(
            x + n * x_n + o[None, :] * x_c + h[:, None] * x_h + w[:, None] * x_w, mask
        ).to(tl.float32)  # fmt: skip
        if EPILOGUE == PIXEL:
            y = same * s
        else:
            y = operand * same * s * (1.0 - s)
            tl.store(second + where, operand * s, mask=mask)
    tl.store(out + where, y, mask=mask)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    out: Tensor,
    *,
    epilogue: Any = CONV,
    other: OptionalTensor = None,
    second: OptionalTensor = None,
    gate: OptionalTensor = None,
    activation: int = 0,
    slope: float = 0.0,
    pattern: int = NO_SHIFT,
    groups: int = 5,
) -> Tensor:
    """Runs `conv_kernel` over a feature map; returns ``out``."""
    c_out, c_in = weight.shape[:2]
    config = configuration("conv", x, c_in=c_in, c_out=c_out)
    block_p, block_o = config["BLOCK_P"], tile(c_out, config["BLOCK_O"])
    launch(
        conv_kernel,
        (triton.cdiv(pixels(x), block_p), triton.cdiv(c_out, block_o), x.shape[0]),
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if gate is None else gate.contiguous(),
        other,
        out,
        second,
        *x.shape[2:],
        *strides(x),
        *strides(other),
        *strides(out),
        slope,
        C_IN=c_in,
        C_OUT=c_out,
        EPILOGUE=epilogue.value,
        ACTIVATION=activation,
        PATTERN=pattern,
        GROUPS=groups,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_OTHER=other is not None,
        PRECISION=precision(),
        INDEX=index_type(x, other, out),
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_I=tile(c_in, config["BLOCK_I"]),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


@triton.jit
def input_gradient_kernel(
    dz,
    weight,
    gate,
    other,
    out,
    H,
    W,
    dz_n, dz_c, dz_h, dz_w,
    other_n, other_c, other_h, other_w,
    out_n, out_c, out_h, out_w,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dx = S^T(gate * W^T dz) + other, for BLOCK_P pixels of dz and BLOCK_I input channels.

    The element of channel c that pixel p of dz gives belongs to pixel p + off(c). A pixel that
    nothing gives to (p - off(c) lies outside) is written by the program that has it as p.
    """
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(INDEX) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_image = p < H * W
    h = (p // W)[:, None]
    w = (p % W)[:, None]
    u = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    for first in range(0, C_OUT, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O).to(INDEX)
        values = load(
            dz + n * dz_n + o[None, :] * dz_c + h * dz_h + w * dz_w,
            in_image[:, None] & (o < C_OUT)[None, :],
        )
        weights = load(
            weight + o[:, None] * C_IN + c[None, :], (o < C_OUT)[:, None] & (c < C_IN)[None, :]
        )
        u = tl.dot(values, weights, u, input_precision=PRECISION)
    if HAS_GATE:
        u *= load(gate + n * C_IN + c, c < C_IN).to(tl.float32)[None, :]
    mask = in_image[:, None] & (c < C_IN)[None, :]
    dy, dx = shift_of(c, C_IN, PATTERN, GROUPS)
    row = h + dy[None, :]
    column = w + dx[None, :]
    inside = mask & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    if HAS_OTHER:
        u += load(
            other + n * other_n + c[None, :] * other_c + row * other_h + column * other_w, inside
        ).to(tl.float32)
    tl.store(out + n * out_n + c[None, :] * out_c + row * out_h + column * out_w, u, mask=inside)
    if PATTERN != 2:
        row = h - dy[None, :]
        column = w - dx[None, :]
        unread = mask & ((row < 0) | (row >= H) | (column < 0) | (column >= W))
        rest = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
        if HAS_OTHER:
            rest += load(
                other + n * other_n + c[None, :] * other_c + h * other_h + w * other_w, unread
            ).to(tl.float32)
        tl.store(out + n * out_n + c[None, :] * out_c + h * out_h + w * out_w, rest, mask=unread)


def input_gradient(
    dz: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    gate: OptionalTensor = None,
    other: OptionalTensor = None,
    pattern: int = NO_SHIFT,
    groups: int = 5,
) -> None:
    """Writes ``out = S^T(gate * W^T dz) + other``; without a shift, other may be out."""
    c_out, c_in = weight.shape[:2]
    config = configuration("input_gradient", dz, c_in=c_in, c_out=c_out)
    block_p, block_i = config["BLOCK_P"], tile(c_in, config["BLOCK_I"])
    launch(
        input_gradient_kernel,
        (triton.cdiv(pixels(dz), block_p), triton.cdiv(c_in, block_i), dz.shape[0]),
        dz,
        weight.contiguous(),
        None if gate is None else gate.contiguous(),
        other,
        out,
        *dz.shape[2:],
        *strides(dz),
        *strides(other),
        *strides(out),
        C_IN=c_in,
        C_OUT=c_out,
        PATTERN=pattern,
        GROUPS=groups,
        HAS_GATE=gate is not None,
        HAS_OTHER=other is not None,
        PRECISION=precision(),
        INDEX=index_type(dz, other, out),
        BLOCK_P=block_p,
        BLOCK_O=tile(c_out, config["BLOCK_O"]),
        BLOCK_I=block_i,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


@triton.jit
def weight_gradient_kernel(
    dz,
    x,
    partial_w,
    partial_b,
    H,
    W,
    dz_n, dz_c, dz_h, dz_w,
    x_n, x_c, x_h, x_w,
    chunks,
    chunk_size,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dz S(x)^T and the sum of dz over one chunk of one image's pixels, in float32."""
    slot = tl.program_id(0).to(tl.int64)
    n = slot // chunks
    o = tl.program_id(1).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(2).to(INDEX) * BLOCK_I + tl.arange(0, BLOCK_I)
    dy, dx = shift_of(c, C_IN, PATTERN, GROUPS)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    total_b = tl.zeros([BLOCK_O], tl.float32)
    start = (slot % chunks) * chunk_size
    end = tl.minimum(start + chunk_size, tl.cast(H, tl.int64) * W)
    for first in range(start, end, BLOCK_P):
        p = tl.cast(first, INDEX) + tl.arange(0, BLOCK_P)
        in_chunk = p < end
        h = p // W
        w = p % W
        gradient = load(
            dz + n * dz_n + o[:, None] * dz_c + h[None, :] * dz_h + w[None, :] * dz_w,
            in_chunk[None, :] & (o < C_OUT)[:, None],
        )
        values = load_map(
            x + n * x_n, h[:, None], w[:, None], c[None, :], dy[None, :], dx[None, :],
            in_chunk[:, None] & (c < C_IN)[None, :], H, W, x_c, x_h, x_w,
        )  # fmt: skip
        total = tl.dot(gradient, values, total, input_precision=PRECISION)
        total_b += tl.sum(gradient.to(tl.float32), 1)
    tl.store(
        partial_w + slot * (C_OUT * C_IN) + o[:, None] * C_IN + c[None, :],
        total,
        mask=(o < C_OUT)[:, None] & (c < C_IN)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(partial_b + slot * C_OUT + o, total_b, mask=o < C_OUT)


def chunks_of(x: Tensor, smallest: int = 1024) -> tuple[int, int]:
    """(chunks an image, pixels a chunk) for sums over all pixels: about 256 chunks in all."""
    n = max(1, x.shape[0])
    size = max(smallest, triton.cdiv(n * pixels(x), 256 * smallest) * smallest)
    return triton.cdiv(pixels(x), size), size


def weight_gradient_partials(
    dz: Tensor, x: Tensor, *, pattern: int = NO_SHIFT, groups: int = 5
) -> tuple[Tensor, Tensor]:
    """``dz S(x)^T`` (N * chunks, C_out, C_in) and sum dz (N * chunks, C_out), image by image."""
    c_out, c_in = dz.shape[1], x.shape[1]
    config = configuration("weight_gradient", x, c_in=c_in, c_out=c_out)
    block_o, block_i = tile(c_out, config["BLOCK_O"]), tile(c_in, config["BLOCK_I"])
    chunks, size = chunks_of(x)
    slots = x.shape[0] * chunks
    partial_w = torch.empty((slots, c_out, c_in), dtype=torch.float32, device=x.device)
    partial_b = torch.empty((slots, c_out), dtype=torch.float32, device=x.device)
    launch(
        weight_gradient_kernel,
        (slots, triton.cdiv(c_out, block_o), triton.cdiv(c_in, block_i)),
        dz,
        x,
        partial_w,
        partial_b,
        *x.shape[2:],
        *strides(dz),
        *strides(x),
        chunks,
        size,
        C_IN=c_in,
        C_OUT=c_out,
        PATTERN=pattern,
        GROUPS=groups,
        PRECISION=precision(),
        INDEX=index_type(dz, x),
        BLOCK_P=config["BLOCK_P"],
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return partial_w, partial_b


def weight_gradient(
    dz: Tensor,
    x: Tensor,
    dw: OptionalTensor,
    db: OptionalTensor,
    *,
    pattern: int = NO_SHIFT,
    groups: int = 5,
) -> None:
    """Writes dw and db, those that are not None."""
    if dw is not None or db is not None:
        partial_w, partial_b = weight_gradient_partials(dz, x, pattern=pattern, groups=groups)
        if dw is not None:
            sum_partials(partial_w, dw)
        if db is not None:
            sum_partials(partial_b, db)


# ------------------------------------------------------------------ shift_conv2d


def shift_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    residual: OptionalTensor,
    activation: int,
    negative_slope: float,
    pattern: int,
    groups: int,
) -> Tensor:
    out = allocate(
        "shift_conv2d", x, weight, bias, residual, activation, negative_slope, pattern, groups
    )
    return conv(
        x, weight, bias, out, other=residual, activation=activation, slope=negative_slope,
        pattern=pattern, groups=groups,
    )  # fmt: skip


def shift_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    activation: int,
    negative_slope: float,
    pattern: int,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_x, need_weight, need_bias)
    settings = (activation, negative_slope, pattern, groups)
    gradients = allocate("shift_conv2d_backward", grad, x, weight, bias, *settings, *needs)
    dx, dw, db = wanted(gradients, needs)
    shift: dict[str, Any] = {"pattern": pattern, "groups": groups}
    dz = grad
    if activation != 0:
        dz = conv(
            x, weight, bias, empty_feature_map(x, weight.shape[0]), epilogue=CONV_GRADIENT,
            other=grad, activation=activation, slope=negative_slope, **shift,
        )  # fmt: skip
    if dx is not None:
        input_gradient(dz, weight, dx, **shift)
    weight_gradient(dz, x, dw, db, **shift)
    return gradients


# ------------------------------------------------------------------ shift_conv_block


@triton.jit
def hidden_tile(
    x, w0, b0, h, w, r, valid_r, dy, dx, in_image, H, W, x_c, x_h, x_w,
    C_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """z = W0 S(x) + b0 of hidden channels r at the pixels (h + dy, w + dx)."""
    z = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for first in range(0, C_IN, BLOCK_I):
        c = first + tl.arange(0, BLOCK_I).to(INDEX)
        c_dy, c_dx = shift_of(c, C_IN, PATTERN, GROUPS)
        values = load_map(
            x, (h + dy)[:, None], (w + dx)[:, None], c[None, :], c_dy[None, :], c_dx[None, :],
            in_image[:, None] & (c < C_IN)[None, :], H, W, x_c, x_h, x_w,
        )  # fmt: skip
        weights = load(w0 + r[None, :] * C_IN + c[:, None], (c < C_IN)[:, None] & valid_r[None, :])
        z = tl.dot(values, weights, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += load(b0 + r, valid_r).to(tl.float32)[None, :]
    return z


@triton.jit
def block_kernel(
    x,
    w0,
    b0,
    w1,
    b1,
    out,
    H,
    W,
    x_n, x_c, x_h, x_w,
    out_n, out_c, out_h, out_w,
    slope,
    C_IN: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    C_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The whole block for BLOCK_P pixels and BLOCK_O output channels; hidden tiles in registers."""
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_image = p < H * W
    h = p // W
    w = p % W
    y = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for block in range(BLOCKS):
        r, valid_r, dy, dx = hidden_block(block, C_HIDDEN, PATTERN, GROUPS, BLOCK_R)
        r = r.to(INDEX)
        z = hidden_tile(
            x + n * x_n, w0, b0, h, w, r, valid_r, dy, dx, in_image, H, W, x_c, x_h, x_w,
            C_IN, HAS_BIAS_0, PATTERN, GROUPS, PRECISION, INDEX, BLOCK_P, BLOCK_R, BLOCK_I,
        )  # fmt: skip
        weights = load(
            w1 + o[None, :] * C_HIDDEN + r[:, None], valid_r[:, None] & (o < C_OUT)[None, :]
        )
        # Outside the image there is no hidden activation, not act(b0); and in the columns of
        # channels that the tile does not have, z may be infinity times a masked weight.
        inside = (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
        exists = inside[:, None] & valid_r[None, :]
        hidden = tl.where(exists, activate(z, slope, ACTIVATION), 0.0)
        y = tl.dot(hidden.to(weights.dtype), weights, y, input_precision=PRECISION)
    if HAS_BIAS_1:
        y += load(b1 + o, o < C_OUT).to(tl.float32)[None, :]
    mask = in_image[:, None] & (o < C_OUT)[None, :]
    if RESIDUAL:
        y += load(
            x + n * x_n + o[None, :] * x_c + h[:, None] * x_h + w[:, None] * x_w, mask
        ).to(tl.float32)  # fmt: skip
    tl.store(
        out + n * out_n + o[None, :] * out_c + h[:, None] * out_h + w[:, None] * out_w,
        y,
        mask=mask,
    )


def shift_conv_block(
    x: Tensor,
    w0: Tensor,
    b0: OptionalTensor,
    w1: Tensor,
    b1: OptionalTensor,
    activation: int,
    negative_slope: float,
    residual: bool,
    pattern: int,
    groups: int,
) -> Tensor:
    out = allocate(
        "shift_conv_block", x, w0, b0, w1, b1, activation, negative_slope, residual, pattern,
        groups,
    )  # fmt: skip
    c_hidden, c_in = w0.shape[:2]
    c_out = w1.shape[0]
    config = configuration("block", x, c_in=c_in, c_hidden=c_hidden, c_out=c_out)
    block_p, block_o = config["BLOCK_P"], tile(c_out, config["BLOCK_O"])
    block_r = tile(c_hidden, config["BLOCK_R"])
    launch(
        block_kernel,
        (triton.cdiv(pixels(x), block_p), triton.cdiv(c_out, block_o), x.shape[0]),
        x,
        w0.contiguous(),
        None if b0 is None else b0.contiguous(),
        w1.contiguous(),
        None if b1 is None else b1.contiguous(),
        out,
        *x.shape[2:],
        *strides(x),
        *strides(out),
        negative_slope,
        C_IN=c_in,
        C_HIDDEN=c_hidden,
        C_OUT=c_out,
        BLOCKS=hidden_blocks(c_hidden, pattern, groups, block_r),
        ACTIVATION=activation,
        PATTERN=pattern,
        GROUPS=groups,
        HAS_BIAS_0=b0 is not None,
        HAS_BIAS_1=b1 is not None,
        RESIDUAL=residual,
        PRECISION=precision(),
        INDEX=index_type(x, out),
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_R=block_r,
        BLOCK_I=tile(c_in, config["BLOCK_I"]),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


@triton.jit
def block_hidden_kernel(
    grad,
    x,
    w0,
    b0,
    w1,
    hidden,
    dz,
    H,
    W,
    g_n, g_c, g_h, g_w,
    x_n, x_c, x_h, x_w,
    t_n, t_c, t_h, t_w,
    slope,
    C_IN: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PATTERN: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """hidden = act(z) and dz = act'(z) S^T(W1^T G) of BLOCK_P pixels and one tile of channels."""
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    h = p // W
    w = p % W
    r, valid_r, dy, dx = hidden_block(tl.program_id(1), C_HIDDEN, PATTERN, GROUPS, BLOCK_R)
    r = r.to(INDEX)
    z = hidden_tile(
        x + n * x_n, w0, b0, h, w, r, valid_r, 0, 0, in_image, H, W, x_c, x_h, x_w,
        C_IN, HAS_BIAS_0, PATTERN, GROUPS, PRECISION, INDEX, BLOCK_P, BLOCK_R, BLOCK_I,
    )  # fmt: skip
    dh = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for first in range(0, C_OUT, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O).to(INDEX)
        values = load_map(
            grad + n * g_n, h[:, None], w[:, None], o[None, :], -dy, -dx,
            in_image[:, None] & (o < C_OUT)[None, :], H, W, g_c, g_h, g_w,
        )  # fmt: skip
        weights = load(
            w1 + o[:, None] * C_HIDDEN + r[None, :], (o < C_OUT)[:, None] & valid_r[None, :]
        )
        dh = tl.dot(values, weights, dh, input_precision=PRECISION)
    where = n * t_n + r[None, :] * t_c + h[:, None] * t_h + w[:, None] * t_w
    mask = in_image[:, None] & valid_r[None, :]
    tl.store(hidden + where, activate(z, slope, ACTIVATION), mask=mask)
    tl.store(dz + where, dh * activation_derivative(z, slope, ACTIVATION), mask=mask)


def shift_conv_block_backward(
    grad: Tensor,
    x: Tensor,
    w0: Tensor,
    b0: OptionalTensor,
    w1: Tensor,
    activation: int,
    negative_slope: float,
    residual: bool,
    pattern: int,
    groups: int,
    need_x: bool,
    need_w0: bool,
    need_b0: bool,
    need_w1: bool,
    need_b1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_w0, need_b0, need_w1, need_b1)
    settings = (activation, negative_slope, residual, pattern, groups)
    gradients = allocate("shift_conv_block_backward", grad, x, w0, b0, w1, *settings, *needs)
    dx, dw0, db0, dw1, db1 = wanted(gradients, needs)
    c_hidden, c_in = w0.shape[:2]
    c_out = w1.shape[0]
    hidden, dz = empty_feature_map(x, c_hidden), empty_feature_map(x, c_hidden)
    config = configuration("block_hidden", x, c_in=c_in, c_hidden=c_hidden, c_out=c_out)
    block_p, block_r = config["BLOCK_P"], tile(c_hidden, config["BLOCK_R"])
    launch(
        block_hidden_kernel,
        (
            triton.cdiv(pixels(x), block_p),
            hidden_blocks(c_hidden, pattern, groups, block_r),
            x.shape[0],
        ),
        grad,
        x,
        w0.contiguous(),
        None if b0 is None else b0.contiguous(),
        w1.contiguous(),
        hidden,
        dz,
        *x.shape[2:],
        *strides(grad),
        *strides(x),
        *strides(hidden),
        negative_slope,
        C_IN=c_in,
        C_HIDDEN=c_hidden,
        C_OUT=c_out,
        ACTIVATION=activation,
        PATTERN=pattern,
        GROUPS=groups,
        HAS_BIAS_0=b0 is not None,
        PRECISION=precision(),
        INDEX=index_type(grad, x, hidden),
        BLOCK_P=block_p,
        BLOCK_O=tile(c_out, config["BLOCK_O"]),
        BLOCK_R=block_r,
        BLOCK_I=tile(c_in, config["BLOCK_I"]),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    shift: dict[str, Any] = {"pattern": pattern, "groups": groups}
    if dx is not None:
        input_gradient(dz, w0, dx, other=grad if residual else None, **shift)
    weight_gradient(dz, x, dw0, db0, **shift)
    weight_gradient(grad, hidden, dw1, db1, **shift)
    return gradients
