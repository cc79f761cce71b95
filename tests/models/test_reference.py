"""The plain PyTorch definitions against independent formulations of the same formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sr_kernels import reference as R
from sr_kernels.nn import shift_weight
from sr_kernels.reference.window_attention import relative_position_index, shift_mask


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# -------------------------------------------------------------------------- shift convolution


@pytest.mark.parametrize("channels", [1, 4, 5, 9, 10, 31, 60])
def test_shift_is_elans_depthwise_convolution(channels: int) -> None:
    g = channels // 5
    kernel = torch.zeros(channels, 1, 3, 3, dtype=torch.float64)
    kernel[0 * g : 1 * g, 0, 1, 2] = 1
    kernel[1 * g : 2 * g, 0, 1, 0] = 1
    kernel[2 * g : 3 * g, 0, 2, 1] = 1
    kernel[3 * g : 4 * g, 0, 0, 1] = 1
    kernel[4 * g :, 0, 1, 1] = 1
    x = rand(2, channels, 5, 7)
    assert torch.equal(R.shift(x), F.conv2d(x, kernel, padding=1, groups=channels))
    assert torch.equal(shift_weight(channels).double(), kernel)


def test_cross_shift_reads_the_four_diagonals() -> None:
    x = torch.arange(5 * 9.0).reshape(1, 5, 3, 3)
    y = R.shift(x, pattern="cross")[0, :, 1, 1]
    corners = [x[0, 0, 0, 0], x[0, 1, 0, 2], x[0, 2, 2, 0], x[0, 3, 2, 2], x[0, 4, 1, 1]]
    assert y.tolist() == [float(value) for value in corners]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_shift_of_a_single_row_or_column_fills_with_zero(size: tuple[int, int]) -> None:
    y = R.shift(torch.ones(1, 5, *size))
    assert y[0, 4].eq(1).all()
    assert y.sum() == 5 * size[0] * size[1] - 2 * (size[0] + size[1])


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu", "silu"])
def test_shift_conv2d_and_block(activation: str | None) -> None:
    functions = {
        None: lambda t: t,
        "relu": torch.relu,
        "leaky_relu": lambda t: torch.where(t > 0, t, 0.2 * t),
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5)),
        "silu": lambda t: t * torch.sigmoid(t),
    }
    x, w0, b0, w1, b1 = rand(2, 10, 4, 6), rand(7, 10), rand(7), rand(10, 7), rand(10)
    one = torch.einsum("oc,nchw->nohw", w0, R.shift(x)) + b0[:, None, None]
    one = functions[activation](one)
    options = {"activation": activation, "negative_slope": 0.2}
    residual = rand(2, 7, 4, 6)
    got = R.shift_conv2d(x, w0[..., None, None], b0, residual=residual, **options)
    torch.testing.assert_close(got, one + residual)
    two = torch.einsum("oc,nchw->nohw", w1, R.shift(one)) + b1[:, None, None] + x
    got = R.shift_conv_block(x, w0[..., None, None], b0, w1[..., None, None], b1, **options)
    torch.testing.assert_close(got, two)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"pattern": "star"}, "pattern"), ({"groups": 0}, "groups"), ({"activation": "x"}, "activa")],
)
def test_shift_conv_refuses(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        R.shift_conv2d(rand(1, 5, 2, 2), rand(3, 5, 1, 1), **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- window attention


def attention_by_pixel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    scale: float,
    bias: Tensor | None,
    mask: bool,
) -> Tensor:
    """One query at a time, straight from the definition."""
    _, _, height, width = q.shape
    (wh, ww), out = window, torch.zeros_like(v)
    q, k = (t.unflatten(1, (heads, -1)) for t in (q, k))
    values = v.unflatten(1, (heads, -1))
    result = out.unflatten(1, (heads, -1))

    def source(i: int, j: int) -> tuple[int, int, bool, bool]:
        y, x = i + shift[0], j + shift[1]
        return y % height, x % width, not 0 <= y < height, not 0 <= x < width

    for i in range(height):
        for j in range(width):
            qy, qx, q_over_y, q_over_x = source(i, j)
            top, left = i // wh * wh, j // ww * ww
            logits, columns = [], []
            for a in range(top, top + wh):
                for b in range(left, left + ww):
                    ky, kx, k_over_y, k_over_x = source(a, b)
                    s = scale * (q[:, :, :, qy, qx] * k[:, :, :, ky, kx]).sum(2)
                    if bias is not None:
                        s = s + bias[(i - a + wh - 1) * (2 * ww - 1) + (j - b + ww - 1)]
                    if mask and (q_over_y, q_over_x) != (k_over_y, k_over_x):
                        s = torch.full_like(s, float("-inf"))
                    logits.append(s)
                    columns.append(values[:, :, :, ky, kx])
            weights = torch.stack(logits).softmax(0)[..., None]
            result[:, :, :, qy, qx] = (weights * torch.stack(columns)).sum(0)
    return out


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("window", "shift"),
    [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((2, 4), (1, -3)), ((1, 2), (0, 1)), ((8, 4), (-4, 1))],
)
def test_window_attention_by_pixel(
    window: tuple[int, int], shift: tuple[int, int], mask: bool
) -> None:
    heads = 2
    q, k, v = rand(2, 6, 8, 8), rand(2, 6, 8, 8), rand(2, 4, 8, 8)
    bias = rand((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    options = {"window": window, "shift": shift, "num_heads": heads, "bias": bias, "mask": mask}
    got, scores = R.window_attention(q, k, v, return_scores=True, **options)
    expected = attention_by_pixel(q, k, v, window, shift, heads, 3**-0.5, bias, mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(R.apply_window_scores(scores, v), expected)
    assert scores.scale == 3**-0.5
    other = rand(2, 2, 8, 8)
    expected = attention_by_pixel(q, k, other, window, shift, heads, 3**-0.5, bias, mask)
    torch.testing.assert_close(R.apply_window_scores(scores, other), expected)


def test_shared_queries_and_keys() -> None:
    q, v = rand(1, 6, 4, 4), rand(1, 6, 4, 4)
    _, scores = R.window_attention(q, q, v, window=2, return_scores=True)
    assert scores.k is None
    torch.testing.assert_close(
        R.apply_window_scores(scores, v), R.window_attention(q, q.clone(), v, window=2)
    )


def test_mask_is_swins_three_slice_mask() -> None:
    size, w, s = (12, 16), 4, 2
    regions = torch.zeros(size)
    count = 0
    for rows in (slice(0, -w), slice(-w, -s), slice(-s, None)):
        for columns in (slice(0, -w), slice(-w, -s), slice(-s, None)):
            regions[rows, columns] = count
            count += 1
    cut = regions.reshape(3, w, 4, w).permute(0, 2, 1, 3).reshape(3, 4, w * w)
    assert torch.equal(shift_mask(size, (w, w), (s, s)), cut[..., :, None] == cut[..., None, :])


def test_relative_position_index_is_swins() -> None:
    wh, ww = 3, 5
    grid = torch.stack(torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij"))
    flat = grid.flatten(1)
    relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
    relative[..., 0] += wh - 1
    relative[..., 1] += ww - 1
    relative[..., 0] *= 2 * ww - 1
    assert torch.equal(relative_position_index((wh, ww)), relative.sum(-1))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("windows", [(2, 4), (3, 1), (4,)])
def test_grouped_attention_by_pixel(windows: tuple[int, ...], shifted: bool) -> None:
    size = 6 if 3 in windows else 8
    qv = rand(2, 6 * len(windows), size, size)
    parts, expected = qv.split(3, 1), []
    for group, w in enumerate(windows):
        step = (w + 1) // 2 if shifted else 0  # torch.roll by -w // 2, which Python rounds down
        q, v = parts[2 * group], parts[2 * group + 1]
        expected.append(attention_by_pixel(q, q, v, (w, w), (step, step), 1, 1.0, None, False))
    got, scores = R.grouped_window_attention(
        qv, windows=windows, shifted=shifted, return_scores=True
    )
    torch.testing.assert_close(got, torch.cat(expected, 1))
    v = torch.cat(parts[1::2], 1)
    torch.testing.assert_close(R.apply_window_scores(scores, v), torch.cat(expected, 1))


def test_window_attention_refuses() -> None:
    x = rand(1, 6, 8, 8)
    with pytest.raises(ValueError, match="does not divide the image"):
        R.window_attention(x, x, x, window=3)
    with pytest.raises(ValueError, match="num_heads 4"):
        R.window_attention(x, x, x, window=4, num_heads=4)
    with pytest.raises(ValueError, match="bias has shape"):
        R.window_attention(x, x, x, window=4, bias=rand(9, 1))
    with pytest.raises(ValueError, match="window"):
        R.window_attention(x, x, x, window=0)
    with pytest.raises(ValueError, match="6 channels"):
        R.grouped_window_attention(x, windows=(2, 4))


# ----------------------------------------------------------------------------- attention gates


def test_gates_by_formula() -> None:
    x = rand(2, 6, 5, 7)
    w, b, s = rand(6, 6), rand(6), rand(1, 2, 3, 3)
    pixel = x * torch.sigmoid(torch.einsum("oc,nchw->nohw", w, x) + b[:, None, None])
    torch.testing.assert_close(R.pixel_attention(x, w[..., None, None], b), pixel)

    stacked = torch.stack([pixel.max(1).values, pixel.sum(1) / 6], 1)
    unfolded = F.unfold(stacked, 3, padding=1).unflatten(2, (5, 7))
    gate = torch.sigmoid((unfolded * s.reshape(1, 18, 1, 1)).sum(1, keepdim=True))
    torch.testing.assert_close(R.spatial_attention(pixel, s), pixel * gate)
    torch.testing.assert_close(R.pixel_spatial_attention(x, w[..., None, None], b, s), pixel * gate)


@pytest.mark.parametrize("statistic", ["mean", "contrast"])
def test_channel_gate_by_formula(statistic: str) -> None:
    x, down, b0, up, b1 = rand(2, 6, 5, 7), rand(4, 6), rand(4), rand(6, 4), rand(6)
    z = x.mean((2, 3))
    if statistic == "contrast":
        z = z + x.flatten(2).std(2, unbiased=False)
    gate = torch.sigmoid(torch.relu(z @ down.T + b0) @ up.T + b1)[..., None, None]
    weights = (down[..., None, None], b0, up[..., None, None], b1)
    torch.testing.assert_close(R.channel_gate(x, *weights, statistic=statistic), gate)
    torch.testing.assert_close(R.channel_attention(x, *weights, statistic=statistic), x * gate)
    w, residual = rand(3, 6), rand(2, 3, 5, 7)
    expected = torch.einsum("oc,nchw->nohw", w, gate * x) + residual
    got = R.gated_conv1x1(x, gate, w[..., None, None], residual=residual)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="median"):
        R.channel_gate(x, *weights, statistic="median")


def test_contrast_of_a_constant_channel_has_a_finite_gradient() -> None:
    x = rand(1, 3, 4, 4)
    x[:, 1] = 0.25
    x.requires_grad_()
    weights = (torch.ones(1, 3, 1, 1).double(), None, torch.ones(3, 1, 1, 1).double(), None)
    R.channel_gate(x, *weights, statistic="contrast").sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    # What is left at the constant channel is the mean's share, the same for every pixel.
    torch.testing.assert_close(x.grad[:, 1], x.grad[:, 1, :1, :1].expand(1, 4, 4))


@pytest.mark.parametrize("name", ["shift", "window", "grouped", "pixel", "spatial", "channel"])
def test_definitions_are_differentiable_twice(name: str) -> None:
    x = rand(1, 6, 4, 4).requires_grad_()
    w = rand(6, 6, 1, 1)
    functions = {
        "shift": lambda t: R.shift_conv_block(t, w, None, w, None, activation="silu"),
        "window": lambda t: R.window_attention(t, t, t, window=2, shift=1, mask=True),
        "grouped": lambda t: R.grouped_window_attention(t, windows=(2,), shifted=True),
        "pixel": lambda t: R.pixel_attention(t, w),
        "spatial": lambda t: R.spatial_attention(t, w.new_ones(1, 2, 3, 3)),
        "channel": lambda t: R.channel_attention(t, w, None, w, None, statistic="contrast"),
    }
    assert torch.autograd.gradcheck(functions[name], (x,))
    assert torch.autograd.gradgradcheck(functions[name], (x,))
