"""Attention gates in Triton: pixel, spatial and channel attention, and the gated 1x1 convolution.

Formulas, s a sigmoid (gradients: docs/operators.md)::

    pixel_attention    y = x s(W x + b)
    spatial_attention  m = [max_c x, mean_c x]    y = x s(conv_k(m) + b)
    channel_gate       z_c = mean_p x (+ std_p x)    g = s(W_up relu(W_down z + b_down) + b_up)
    channel_attention  y = x g                       gated_conv1x1  y = W (g x) + b + residual

Tiles: the products are `shift_conv.conv_kernel` without a shift, with the gate in its epilogue or
folded into its weights. The spatial kernels take BLOCK_P pixels and let the channels stream past;
the k x k convolution of the two maps is a gather of 2 k^2 floats a pixel, which caches hold. The
channel kernels take BLOCK_C channels and a chunk of pixels; chunks are combined in order, and the
standard deviation by the pairwise formula of Chan, Golub and LeVeque (1979) about each channel's
first pixel, so that a constant channel's is exactly zero.

`pixel_spatial_attention` is pixel attention into a temporary and spatial attention from it.

Floors of the forwards, elements of memory traffic a pixel: 2 C; spatial 3 C (x must be read twice),
channel attention 3 C, channel gate C. Fraction reached: unmeasured; no GPU has run this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sr_kernels.ops._registration import empty_feature_map
from sr_kernels.triton._configs import configuration
from sr_kernels.triton._launch import (
    allocate,
    index_type,
    launch,
    load,
    pixels,
    power_of_two,
    strides,
    sum_partials,
    wanted,
)
from sr_kernels.triton.shift_conv import (
    PIXEL,
    PIXEL_GRADIENT,
    chunks_of,
    conv,
    input_gradient,
    weight_gradient,
    weight_gradient_partials,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None

OPERATORS = (
    "pixel_attention",
    "pixel_attention_backward",
    "spatial_attention",
    "spatial_attention_backward",
    "pixel_spatial_attention",
    "pixel_spatial_attention_backward",
    "channel_gate",
    "channel_gate_backward",
    "channel_attention",
    "channel_attention_backward",
    "gated_conv1x1",
    "gated_conv1x1_backward",
)


# ------------------------------------------------------------------ pixel attention


def pixel_attention(x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
    out = allocate("pixel_attention", x, weight, bias)
    return conv(x, weight, bias, out, epilogue=PIXEL)


def _pixel_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    dx: OptionalTensor,
    dw: OptionalTensor,
    db: OptionalTensor,
) -> None:
    """dz = G x s (1 - s), dx = G s + W^T dz; writes those gradients that are not None."""
    if dx is None and dw is None and db is None:
        return
    dz = empty_feature_map(x, x.shape[1])
    through = dx if dx is not None else torch.empty_like(dz)
    conv(x, weight, bias, dz, epilogue=PIXEL_GRADIENT, other=grad, second=through)
    if dx is not None:
        input_gradient(dz, weight, dx, other=dx)
    weight_gradient(dz, x, dw, db)


def pixel_attention_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_x, need_weight, need_bias)
    gradients = allocate("pixel_attention_backward", grad, x, weight, bias, *needs)
    _pixel_gradients(grad, x, weight, bias, *wanted(gradients, needs))
    return gradients


# ------------------------------------------------------------------ spatial attention


@triton.jit
def spatial_statistics_kernel(
    x, maps, H, W, x_n, x_c, x_h, x_w,
    C: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """maps[n, 0] = the largest channel of each pixel (NaN if there is one), maps[n, 1] the mean."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    place = (p // W) * x_h + (p % W) * x_w
    largest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    strange = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(INDEX)
        valid = in_image[:, None] & (c < C)[None, :]
        values = load(x + n * x_n + place[:, None] + c[None, :] * x_c, valid).to(tl.float32)
        total += tl.sum(values, 1)
        strange += tl.sum((values != values).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(valid, values, float("-inf")), 1))
    largest = tl.where(strange > 0, float("nan"), largest)
    area = tl.cast(H, tl.int64) * W
    tl.store(maps + n * 2 * area + p, largest, mask=in_image)
    tl.store(maps + (n * 2 + 1) * area + p, total / C, mask=in_image)


@triton.jit
def spatial_gate(
    maps, weight, bias, n, h, w, in_image, H, W, K: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """sigmoid(conv_k(maps) + b) at each pixel."""
    area = tl.cast(H, tl.int64) * W
    z = h.to(tl.float32) * 0.0
    for tap in range(K * K):
        row = h + tap // K - K // 2
        column = w + tap % K - K // 2
        inside = in_image & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        at = maps + n * 2 * area + row * W + column
        largest = tl.load(at, mask=inside, other=0.0)
        mean = tl.load(at + area, mask=inside, other=0.0)
        z += largest * tl.load(weight + tap).to(tl.float32)
        z += mean * tl.load(weight + K * K + tap).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias).to(tl.float32)
    return tl.sigmoid(z)


@triton.jit
def spatial_apply_kernel(
    x, maps, weight, bias, out, H, W,
    x_n, x_c, x_h, x_w,
    o_n, o_c, o_h, o_w,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x times the gate of its pixel."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    h = p // W
    w = p % W
    s = spatial_gate(maps, weight, bias, n, h, w, in_image, H, W, K, HAS_BIAS)
    x_place = x + n * x_n + (h * x_h + w * x_w)[:, None]
    o_place = out + n * o_n + (h * o_h + w * o_w)[:, None]
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(INDEX)
        valid = in_image[:, None] & (c < C)[None, :]
        values = load(x_place + c[None, :] * x_c, valid).to(tl.float32)
        tl.store(o_place + c[None, :] * o_c, values * s[:, None], mask=valid)


@triton.jit
def spatial_sensitivity_kernel(
    grad, x, maps, weight, bias, gates, dz, shares, H, W,
    g_n, g_c, g_h, g_w,
    x_n, x_c, x_h, x_w,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per pixel: the gate s, dz = s (1 - s) sum_c G x, and how many channels are the largest."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    h = p // W
    w = p % W
    s = spatial_gate(maps, weight, bias, n, h, w, in_image, H, W, K, HAS_BIAS)
    area = tl.cast(H, tl.int64) * W
    largest = tl.load(maps + n * 2 * area + p, mask=in_image, other=0.0)
    x_place = x + n * x_n + (h * x_h + w * x_w)[:, None]
    g_place = grad + n * g_n + (h * g_h + w * g_w)[:, None]
    total = tl.zeros([BLOCK_P], tl.float32)
    count = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(INDEX)
        valid = in_image[:, None] & (c < C)[None, :]
        values = load(x_place + c[None, :] * x_c, valid).to(tl.float32)
        gradient = load(g_place + c[None, :] * g_c, valid).to(tl.float32)
        total += tl.sum(values * gradient, 1)
        count += tl.sum((valid & (values == largest[:, None])).to(tl.float32), 1)
    at = n * area + p
    tl.store(gates + at, s, mask=in_image)
    tl.store(dz + at, s * (1.0 - s) * total, mask=in_image)
    tl.store(shares + at, count, mask=in_image)


@triton.jit
def spatial_gradient_kernel(
    grad, x, maps, weight, gates, dz, shares, dx, H, W,
    g_n, g_c, g_h, g_w,
    x_n, x_c, x_h, x_w,
    d_n, d_c, d_h, d_w,
    C: tl.constexpr,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = G s + dmean / C + dmax / shares where x is the largest."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    h = p // W
    w = p % W
    area = tl.cast(H, tl.int64) * W
    d_largest = tl.zeros([BLOCK_P], tl.float32)
    d_mean = tl.zeros([BLOCK_P], tl.float32)
    for tap in range(K * K):
        # The pixels whose gate saw this one at this tap.
        row = h - tap // K + K // 2
        column = w - tap % K + K // 2
        inside = in_image & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        sensitivity = tl.load(dz + n * area + row * W + column, mask=inside, other=0.0)
        d_largest += sensitivity * tl.load(weight + tap).to(tl.float32)
        d_mean += sensitivity * tl.load(weight + K * K + tap).to(tl.float32)
    at = n * area + p
    s = tl.load(gates + at, mask=in_image, other=0.0)
    largest = tl.load(maps + n * 2 * area + p, mask=in_image, other=0.0)
    # A pixel whose largest is NaN shares it with nobody: 0 / 0, as in the definition.
    d_largest /= tl.load(shares + at, mask=in_image, other=1.0)
    d_mean /= C
    x_place = x + n * x_n + (h * x_h + w * x_w)[:, None]
    g_place = grad + n * g_n + (h * g_h + w * g_w)[:, None]
    d_place = dx + n * d_n + (h * d_h + w * d_w)[:, None]
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(INDEX)
        valid = in_image[:, None] & (c < C)[None, :]
        values = load(x_place + c[None, :] * x_c, valid).to(tl.float32)
        gradient = load(g_place + c[None, :] * g_c, valid).to(tl.float32)
        d = gradient * s[:, None] + d_mean[:, None]
        d += tl.where(values == largest[:, None], d_largest[:, None], 0.0)
        tl.store(d_place + c[None, :] * d_c, d, mask=valid)


@triton.jit
def spatial_weight_kernel(
    maps, dz, partials, H, W, chunks, chunk_size,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[slot, tap] = sum over a chunk of dz times the map under the tap; the last, of dz."""
    TAPS: tl.constexpr = 2 * K * K
    slot = tl.program_id(0).to(tl.int64)
    tap = tl.program_id(1)
    n = slot // chunks
    area = tl.cast(H, tl.int64) * W
    start = (slot % chunks) * chunk_size
    end = tl.minimum(start + chunk_size, area)
    # Tap 2 K K is the bias: it sees a map of ones.
    plane = tl.minimum(tap // (K * K), 1)
    dy = (tap % (K * K)) // K - K // 2
    dx = tap % K - K // 2
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        p = first + tl.arange(0, BLOCK)
        valid = p < end
        sensitivity = tl.load(dz + n * area + p, mask=valid, other=0.0)
        if tap < TAPS:
            row = p // W + dy
            column = p % W + dx
            inside = valid & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            sensitivity *= tl.load(
                maps + (n * 2 + plane) * area + row * W + column, mask=inside, other=0.0
            )
        total += sensitivity
    tl.store(partials + slot * (TAPS + 1) + tap, tl.sum(total, 0))


def _over_pixels(kernel: str, x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tiles of a kernel that takes pixels of one image and all channels."""
    config = configuration(kernel, x, c=x.shape[1])
    return (triton.cdiv(pixels(x), config["BLOCK_P"]), x.shape[0]), config


def _spatial_maps(x: Tensor) -> Tensor:
    n, channels, h, w = x.shape
    maps = torch.empty((n, 2, h, w), dtype=torch.float32, device=x.device)
    grid, config = _over_pixels("spatial_statistics", x)
    launch(
        spatial_statistics_kernel, grid, x, maps, h, w, *strides(x), C=channels,
        INDEX=index_type(x), **config,
    )  # fmt: skip
    return maps


def _apply_spatial(x: Tensor, weight: Tensor, bias: OptionalTensor, out: Tensor) -> Tensor:
    grid, config = _over_pixels("spatial_apply", x)
    launch(
        spatial_apply_kernel, grid, x, _spatial_maps(x), weight.contiguous(), bias, out,
        *x.shape[2:], *strides(x), *strides(out), C=x.shape[1], K=weight.shape[-1],
        HAS_BIAS=bias is not None, INDEX=index_type(x, out), **config,
    )  # fmt: skip
    return out


def _spatial_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    dx: OptionalTensor,
    dw: OptionalTensor,
    db: OptionalTensor,
) -> None:
    """Writes those gradients that are not None."""
    n, channels, h, w = x.shape
    kernel_size = weight.shape[-1]
    weight = weight.contiguous()
    maps = _spatial_maps(x)
    gates, dz, shares = torch.empty((3, n, h, w), dtype=torch.float32, device=x.device)
    grid, config = _over_pixels("spatial_sensitivity", x)
    launch(
        spatial_sensitivity_kernel, grid, grad, x, maps, weight, bias, gates, dz, shares, h, w,
        *strides(grad), *strides(x), C=channels, K=kernel_size, HAS_BIAS=bias is not None,
        INDEX=index_type(grad, x), **config,
    )  # fmt: skip
    if dx is not None:
        grid, config = _over_pixels("spatial_gradient", x)
        launch(
            spatial_gradient_kernel, grid, grad, x, maps, weight, gates, dz, shares, dx, h, w,
            *strides(grad), *strides(x), *strides(dx), C=channels, K=kernel_size,
            INDEX=index_type(grad, x, dx), **config,
        )  # fmt: skip
    if dw is not None or db is not None:
        taps = 2 * kernel_size**2
        chunks, size = chunks_of(x)
        partials = torch.empty((n * chunks, taps + 1), dtype=torch.float32, device=x.device)
        launch(
            spatial_weight_kernel, (n * chunks, taps + 1), maps, dz, partials, h, w, chunks, size,
            K=kernel_size, BLOCK=256,
        )  # fmt: skip
        sums = partials.new_empty(taps + 1)
        sum_partials(partials, sums)
        if dw is not None:
            dw.copy_(sums[:taps].view(dw.shape))
        if db is not None:
            db.copy_(sums[taps:])


def spatial_attention(x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
    return _apply_spatial(x, weight, bias, allocate("spatial_attention", x, weight, bias))


def spatial_attention_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_x, need_weight, need_bias)
    gradients = allocate("spatial_attention_backward", grad, x, weight, bias, *needs)
    _spatial_gradients(grad, x, weight, bias, *wanted(gradients, needs))
    return gradients


def pixel_spatial_attention(
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: OptionalTensor,
    spatial_weight: Tensor,
    spatial_bias: OptionalTensor,
) -> Tensor:
    parameters = (pixel_weight, pixel_bias, spatial_weight, spatial_bias)
    out = allocate("pixel_spatial_attention", x, *parameters)
    inner = pixel_attention(x, pixel_weight, pixel_bias)
    return _apply_spatial(inner, spatial_weight, spatial_bias, out)


def pixel_spatial_attention_backward(
    grad: Tensor,
    x: Tensor,
    pixel_weight: Tensor,
    pixel_bias: OptionalTensor,
    spatial_weight: Tensor,
    spatial_bias: OptionalTensor,
    need_x: bool,
    need_pixel_weight: bool,
    need_pixel_bias: bool,
    need_spatial_weight: bool,
    need_spatial_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_pixel_weight, need_pixel_bias, need_spatial_weight, need_spatial_bias)
    parameters = (pixel_weight, pixel_bias, spatial_weight, spatial_bias)
    gradients = allocate("pixel_spatial_attention_backward", grad, x, *parameters, *needs)
    dx, d_pixel, d_pixel_bias, d_spatial, d_spatial_bias = wanted(gradients, needs)
    inner = pixel_attention(x, pixel_weight, pixel_bias)
    d_inner = torch.empty_like(inner) if any(needs[:3]) else None
    _spatial_gradients(
        grad, inner, spatial_weight, spatial_bias, d_inner, d_spatial, d_spatial_bias
    )
    if d_inner is not None:
        _pixel_gradients(d_inner, x, pixel_weight, pixel_bias, dx, d_pixel, d_pixel_bias)
    return gradients


# ------------------------------------------------------------------ channel gate and attention


@triton.jit
def channel_sums_kernel(
    x, grad, partials, H, W, chunks, chunk_size,
    x_n, x_c, x_h, x_w,
    g_n, g_c, g_h, g_w,
    C: tl.constexpr,
    PRODUCT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of one image's pixels, for BLOCK_C channels.

    PRODUCT: partials[slot, c] = sum of grad x. Otherwise partials[slot, 0..2, c] = the sum of x;
    the mean of x - x_0, x_0 the channel's first pixel; the sum of squares about that mean.
    """
    slot = tl.program_id(0).to(tl.int64)
    n = slot // chunks
    c = tl.program_id(1).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_c = c < C
    x += n * x_n
    grad += n * g_n
    start = (slot % chunks) * chunk_size
    end = tl.minimum(start + chunk_size, tl.cast(H, tl.int64) * W)
    origin = load(x + c * x_c, valid_c).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    moved = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_P):
        p = tl.cast(first, INDEX) + tl.arange(0, BLOCK_P)
        h = (p // W)[:, None]
        w = (p % W)[:, None]
        valid = (p < end)[:, None] & valid_c[None, :]
        values = load(x + c[None, :] * x_c + h * x_h + w * x_w, valid).to(tl.float32)
        if PRODUCT:
            gradient = load(grad + c[None, :] * g_c + h * g_h + w * g_w, valid).to(tl.float32)
            total += tl.sum(values * gradient, 0)
        else:
            total += tl.sum(values, 0)
            moved += tl.sum(tl.where(valid, values - origin[None, :], 0.0), 0)
    if PRODUCT:
        tl.store(partials + slot * C + c, total, mask=valid_c)
    else:
        mean = moved / (end - start).to(tl.float32)
        squares = tl.zeros([BLOCK_C], tl.float32)
        for first in range(start, end, BLOCK_P):
            p = tl.cast(first, INDEX) + tl.arange(0, BLOCK_P)
            h = (p // W)[:, None]
            w = (p % W)[:, None]
            valid = (p < end)[:, None] & valid_c[None, :]
            values = load(x + c[None, :] * x_c + h * x_h + w * x_w, valid).to(tl.float32)
            deviation = tl.where(valid, values - origin[None, :] - mean[None, :], 0.0)
            squares += tl.sum(deviation * deviation, 0)
        at = partials + slot * 3 * C + c
        tl.store(at, total, mask=valid_c)
        tl.store(at + C, mean, mask=valid_c)
        tl.store(at + 2 * C, squares, mask=valid_c)


@triton.jit
def channel_combine_kernel(
    partials, mean, deviation, z, H, W, chunks, chunk_size,
    C: tl.constexpr,
    CONTRAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, population standard deviation and the gate's statistic z of each channel, from the
    chunks in order."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = c < C
    area = tl.cast(H, tl.int64) * W
    total = tl.zeros([BLOCK], tl.float32)
    center = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        at = partials + (n * chunks + chunk) * 3 * C + c
        start = tl.cast(chunk, tl.int64) * chunk_size
        count = (tl.minimum(start + chunk_size, area) - start).to(tl.float32)
        before = start.to(tl.float32)
        total += tl.load(at, mask=valid, other=0.0)
        step = tl.load(at + C, mask=valid, other=0.0) - center
        share = count / (before + count)
        center += step * share
        squares += tl.load(at + 2 * C, mask=valid, other=0.0) + step * step * before * share
    average = total / area.to(tl.float32)
    variance = squares / area.to(tl.float32)
    # NaN is not larger: then there is no deviation, as in the definition.
    spread = tl.where(variance > 0, tl.sqrt(variance), 0.0)
    tl.store(mean + n * C + c, average, mask=valid)
    tl.store(deviation + n * C + c, spread, mask=valid)
    tl.store(z + n * C + c, average + spread if CONTRAST else average, mask=valid)


@triton.jit
def hidden_units(
    z, w_down, b_down, n, r, C: tl.constexpr, R: tl.constexpr, HAS_B_DOWN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """W_down z + b_down of image n."""
    hidden = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        valid = (r < R)[:, None] & (c < C)[None, :]
        weights = tl.load(w_down + r[:, None] * C + c[None, :], mask=valid, other=0.0)
        values = tl.load(z + n * C + c, mask=c < C, other=0.0)
        hidden += tl.sum(weights.to(tl.float32) * values[None, :], 1)
    if HAS_B_DOWN:
        hidden += tl.load(b_down + r, mask=r < R, other=0.0).to(tl.float32)
    return hidden


@triton.jit
def gate_kernel(
    z, w_down, b_down, w_up, b_up, gate,
    C: tl.constexpr,
    R: tl.constexpr,
    HAS_B_DOWN: tl.constexpr,
    HAS_B_UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gate of one image: both small products."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    hidden = hidden_units(z, w_down, b_down, n, r, C, R, HAS_B_DOWN, BLOCK_C, BLOCK_R)
    hidden = tl.where(hidden < 0, 0.0, hidden)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        valid = (c < C)[:, None] & (r < R)[None, :]
        weights = tl.load(w_up + c[:, None] * R + r[None, :], mask=valid, other=0.0)
        # Rows that do not exist hold 0, and stay out of it even where 0 * inf would be NaN.
        a = tl.sum(tl.where(valid, weights.to(tl.float32) * hidden[None, :], 0.0), 1)
        if HAS_B_UP:
            a += tl.load(b_up + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(gate + n * C + c, tl.sigmoid(a), mask=c < C)


@triton.jit
def gate_gradient_kernel(
    dgate, z, w_down, b_down, w_up, gate, da_up, hidden_out, da_down, dz,
    C: tl.constexpr,
    R: tl.constexpr,
    HAS_B_DOWN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of one image: the gradients before the sigmoid, before relu, and of z; and relu's output."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    before = hidden_units(z, w_down, b_down, n, r, C, R, HAS_B_DOWN, BLOCK_C, BLOCK_R)
    d_hidden = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        valid = (c < C)[:, None] & (r < R)[None, :]
        s = tl.load(gate + n * C + c, mask=c < C, other=0.0)
        da = tl.load(dgate + n * C + c, mask=c < C, other=0.0) * s * (1.0 - s)
        tl.store(da_up + n * C + c, da, mask=c < C)
        weights = tl.load(w_up + c[:, None] * R + r[None, :], mask=valid, other=0.0)
        d_hidden += tl.sum(weights.to(tl.float32) * da[:, None], 0)
    d_before = tl.where(before > 0, d_hidden, 0.0)
    tl.store(hidden_out + n * R + r, tl.where(before < 0, 0.0, before), mask=r < R)
    tl.store(da_down + n * R + r, d_before, mask=r < R)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        valid = (c < C)[:, None] & (r < R)[None, :]
        weights = tl.load(w_down + r[None, :] * C + c[:, None], mask=valid, other=0.0)
        tl.store(
            dz + n * C + c,
            tl.sum(weights.to(tl.float32) * d_before[None, :], 1),
            mask=c < C,
        )


@triton.jit
def outer_sum_kernel(
    a, b, out, out_a, count,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """out[i, j] = sum over n of a[n, i] b[n, j], out_a[i] = sum over n of a[n, i], n in order."""
    i = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    total_a = tl.zeros([BLOCK_A], tl.float32)
    for n in range(count):
        row = tl.load(a + n * A + i, mask=i < A, other=0.0)
        total += row[:, None] * tl.load(b + n * B + j, mask=j < B, other=0.0)[None, :]
        total_a += row
    tl.store(out + i[:, None] * B + j[None, :], total, mask=(i < A)[:, None] & (j < B)[None, :])
    if tl.program_id(1) == 0:
        tl.store(out_a + i, total_a, mask=i < A)


@triton.jit
def channel_apply_kernel(
    x, grad, factor, offset, slope, mean, out, H, W,
    x_n, x_c, x_h, x_w,
    g_n, g_c, g_h, g_w,
    o_n, o_c, o_h, o_w,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    SLOPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = factor grad + offset + slope (x - mean), each per image and channel, each optional."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_image = p < H * W
    h = (p // W)[:, None]
    w = (p % W)[:, None]
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(INDEX)
        valid = in_image[:, None] & (c < C)[None, :]
        y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        if SCALE:
            values = load(grad + n * g_n + c[None, :] * g_c + h * g_h + w * g_w, valid)
            y = values.to(tl.float32) * tl.load(factor + n * C + c, mask=c < C, other=0.0)[None, :]
        if OFFSET:
            y += tl.load(offset + n * C + c, mask=c < C, other=0.0)[None, :]
        if SLOPE:
            values = load(x + n * x_n + c[None, :] * x_c + h * x_h + w * x_w, valid)
            center = tl.load(mean + n * C + c, mask=c < C, other=0.0)
            rate = tl.load(slope + n * C + c, mask=c < C, other=0.0)
            y += tl.where(
                (rate != 0)[None, :], (values.to(tl.float32) - center[None, :]) * rate[None, :], 0.0
            )
        tl.store(out + n * o_n + c[None, :] * o_c + h * o_h + w * o_w, y, mask=valid)


def _channel_sums(x: Tensor, grad: OptionalTensor) -> tuple[Tensor, int, int]:
    """Partial sums of `channel_sums_kernel`, the chunks of an image, the pixels of a chunk."""
    n, channels, h, w = x.shape
    config = configuration("channel_statistics", x, c=channels)
    chunks, size = chunks_of(x)
    partials = torch.empty(
        (n * chunks, 1 if grad is not None else 3, channels), dtype=torch.float32, device=x.device
    )
    launch(
        channel_sums_kernel,
        (n * chunks, triton.cdiv(channels, config["BLOCK_C"])),
        x,
        x if grad is None else grad,
        partials,
        h,
        w,
        chunks,
        size,
        *strides(x),
        *strides(grad),
        C=channels,
        PRODUCT=grad is not None,
        INDEX=index_type(x, grad),
        **config,
    )
    return partials, chunks, size


class _Gate:
    """The gate of x: statistics (N, C) and gate (N, C), in float32."""

    def __init__(
        self,
        x: Tensor,
        w_down: Tensor,
        b_down: OptionalTensor,
        w_up: Tensor,
        b_up: OptionalTensor,
        statistic: int,
        gate: OptionalTensor = None,
    ) -> None:
        n, self.channels, h, w = x.shape
        self.x, self.contrast, self.hidden = x, statistic == 1, w_down.shape[0]
        self.w_down, self.w_up = w_down.contiguous(), w_up.contiguous()
        self.b_down = None if b_down is None else b_down.contiguous()
        self.b_up = None if b_up is None else b_up.contiguous()
        shape = (n, self.channels)
        self.mean, self.deviation, self.z = torch.empty(
            (3, *shape), dtype=torch.float32, device=x.device
        )
        self.gate = torch.empty_like(self.z) if gate is None else gate
        self.blocks = {
            "BLOCK_C": min(64, power_of_two(self.channels)),
            "BLOCK_R": power_of_two(self.hidden),
        }
        partials, chunks, size = _channel_sums(x, None)
        launch(
            channel_combine_kernel, (n, triton.cdiv(self.channels, 64)), partials, self.mean,
            self.deviation, self.z, h, w, chunks, size, C=self.channels, CONTRAST=self.contrast,
            BLOCK=64,
        )  # fmt: skip
        launch(
            gate_kernel, (n,), self.z, self.w_down, self.b_down, self.w_up, self.b_up, self.gate,
            C=self.channels, R=self.hidden, HAS_B_DOWN=b_down is not None,
            HAS_B_UP=b_up is not None, **self.blocks,
        )  # fmt: skip

    def apply(
        self,
        grad: Tensor,
        out: Tensor,
        *,
        scale: bool,
        offset: OptionalTensor = None,
        slope: OptionalTensor = None,
    ) -> None:
        """out = gate * grad (if scale) + offset + slope (x - mean)."""
        grid, config = _over_pixels("channel_apply", self.x)
        launch(
            channel_apply_kernel, grid, self.x, grad, self.gate, offset, slope, self.mean, out,
            *self.x.shape[2:], *strides(self.x), *strides(grad), *strides(out), C=self.channels,
            SCALE=scale, OFFSET=offset is not None, SLOPE=slope is not None,
            INDEX=index_type(self.x, grad, out), **config,
        )  # fmt: skip

    def differentiate(
        self,
        dgate: Tensor,
        grad: OptionalTensor,
        gradients: Sequence[Tensor],
        needs: tuple[bool, ...],
    ) -> None:
        """Writes the needed gradients of (x, w_down, b_down, w_up, b_up) from that of the gate.

        grad: the gradient of x * gate, of which x gets grad * gate; None for the gate alone.
        """
        n = self.x.shape[0]
        da_up, dz = torch.empty((2, n, self.channels), dtype=torch.float32, device=dgate.device)
        hidden, da_down = torch.empty((2, n, self.hidden), dtype=torch.float32, device=dgate.device)
        launch(
            gate_gradient_kernel, (n,), dgate, self.z, self.w_down, self.b_down, self.w_up,
            self.gate, da_up, hidden, da_down, dz, C=self.channels, R=self.hidden,
            HAS_B_DOWN=self.b_down is not None, **self.blocks,
        )  # fmt: skip
        need_x, *need_parameters = needs
        dx, *parameters = gradients
        for at, a, b in ((0, da_down, self.z), (2, da_up, hidden)):
            if need_parameters[at] or need_parameters[at + 1]:
                self._outer_sum(a, b, *_wanted_pair(parameters, need_parameters, at, a, b))
        if need_x:
            count = max(1, pixels(self.x))
            slope = None
            if self.contrast:
                slope = torch.where(self.deviation > 0, dz / (count * self.deviation), 0.0)
            self.apply(
                self.x if grad is None else grad, dx, scale=grad is not None, offset=dz / count,
                slope=slope,
            )  # fmt: skip

    @staticmethod
    def _outer_sum(a: Tensor, b: Tensor, out: Tensor, out_a: Tensor) -> None:
        rows, columns = a.shape[1], b.shape[1]
        block_a, block_b = min(32, power_of_two(rows)), min(32, power_of_two(columns))
        launch(
            outer_sum_kernel, (triton.cdiv(rows, block_a), triton.cdiv(columns, block_b)), a, b,
            out, out_a, a.shape[0], A=rows, B=columns, BLOCK_A=block_a, BLOCK_B=block_b,
        )  # fmt: skip


def _wanted_pair(
    parameters: Sequence[Tensor], needs: Sequence[bool], at: int, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a weight's and its bias's gradient go: scratch where nobody wants it."""
    weight = parameters[at] if needs[at] else a.new_empty((a.shape[1], b.shape[1]))
    bias = parameters[at + 1] if needs[at + 1] else a.new_empty(a.shape[1])
    return weight, bias


def channel_gate(
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
) -> Tensor:
    out: Tensor = allocate("channel_gate", x, w_down, b_down, w_up, b_up, statistic)
    _Gate(x, w_down, b_down, w_up, b_up, statistic, gate=out)
    return out


def channel_gate_backward(
    grad: Tensor,
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
    need_x: bool,
    need_w_down: bool,
    need_b_down: bool,
    need_w_up: bool,
    need_b_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_w_down, need_b_down, need_w_up, need_b_up)
    parameters = (w_down, b_down, w_up, b_up, statistic)
    gradients = allocate("channel_gate_backward", grad, x, *parameters, *needs)
    gate = _Gate(x, *parameters)
    gate.differentiate(grad.reshape(x.shape[:2]).float().contiguous(), None, gradients, needs)
    return gradients


def channel_attention(
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
) -> Tensor:
    parameters = (w_down, b_down, w_up, b_up, statistic)
    out: Tensor = allocate("channel_attention", x, *parameters)
    _Gate(x, *parameters).apply(x, out, scale=True)
    return out


def channel_attention_backward(
    grad: Tensor,
    x: Tensor,
    w_down: Tensor,
    b_down: OptionalTensor,
    w_up: Tensor,
    b_up: OptionalTensor,
    statistic: int,
    need_x: bool,
    need_w_down: bool,
    need_b_down: bool,
    need_w_up: bool,
    need_b_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_w_down, need_b_down, need_w_up, need_b_up)
    parameters = (w_down, b_down, w_up, b_up, statistic)
    gradients = allocate("channel_attention_backward", grad, x, *parameters, *needs)
    partials, chunks, _ = _channel_sums(x, grad)
    n, channels = x.shape[:2]
    dgate = torch.empty((n, channels), dtype=torch.float32, device=x.device)
    by_chunk = partials.view(n, chunks, channels).transpose(0, 1).contiguous()
    sum_partials(by_chunk, dgate)
    _Gate(x, *parameters).differentiate(dgate, grad, gradients, needs)
    return gradients


# ------------------------------------------------------------------ gated convolution


@triton.jit
def gated_weight_kernel(
    partials, gate, dw, count, chunks,
    C_IN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dW[o, c] = sum over images of gate[n, c] (G x^T)[n, o, c]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(count):
        image = tl.zeros([BLOCK], tl.float32)
        for chunk in range(chunks):
            slot = tl.cast(n, tl.int64) * chunks + chunk
            image += tl.load(partials + slot * SIZE + i, mask=i < SIZE, other=0.0)
        factor = tl.load(gate + n * C_IN + i % C_IN, mask=i < SIZE, other=0.0)
        total += image * factor.to(tl.float32)
    tl.store(dw + i, total, mask=i < SIZE)


@triton.jit
def gated_gate_kernel(
    partials, weight, dgate, chunks,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate[n, c] = sum over o of W[o, c] (G x^T)[n, o, c]."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for o in range(C_OUT):
        image = tl.zeros([BLOCK], tl.float32)
        for chunk in range(chunks):
            slot = n * chunks + chunk
            image += tl.load(
                partials + slot * (C_OUT * C_IN) + o * C_IN + c, mask=c < C_IN, other=0.0
            )
        total += image * tl.load(weight + o * C_IN + c, mask=c < C_IN, other=0.0).to(tl.float32)
    tl.store(dgate + n * C_IN + c, total, mask=c < C_IN)


def gated_conv1x1(
    x: Tensor, gate: Tensor, weight: Tensor, bias: OptionalTensor, residual: OptionalTensor
) -> Tensor:
    out = allocate("gated_conv1x1", x, gate, weight, bias, residual)
    return conv(x, weight, bias, out, other=residual, gate=gate)


def gated_conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    need_x: bool,
    need_gate: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_gate, need_weight, need_bias)
    gradients = dx, dgate, dw, db = allocate(
        "gated_conv1x1_backward", grad, x, gate, weight, *needs
    )
    c_out, c_in = weight.shape[:2]
    weight, gate = weight.contiguous(), gate.contiguous()
    if need_x:
        input_gradient(grad, weight, dx, gate=gate)
    if need_gate or need_weight or need_bias:
        partial_w, partial_b = weight_gradient_partials(grad, x)
        n, block = x.shape[0], 64
        chunks = chunks_of(x)[0]
        if need_weight:
            size = c_out * c_in
            launch(
                gated_weight_kernel, (triton.cdiv(size, block),), partial_w, gate, dw, n, chunks,
                C_IN=c_in, SIZE=size, BLOCK=block,
            )  # fmt: skip
        if need_gate:
            launch(
                gated_gate_kernel, (n, triton.cdiv(c_in, block)), partial_w, weight, dgate, chunks,
                C_IN=c_in, C_OUT=c_out, BLOCK=block,
            )  # fmt: skip
        if need_bias:
            sum_partials(partial_b, db)
    return gradients
