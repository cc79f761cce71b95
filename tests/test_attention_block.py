"""grouped_attention_block and the reuse of its scores against their definition, and as citizens of
torch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_block_cases import block_inputs, block_with_reuse, check_block
from choices import FLOATS, LAYOUTS
from threads import threads

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, make_tensor

# ------------------------------------------------------------------------------ the operator


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shifted", [False, True])
def test_block_is_the_formula(backend, shifted):
    """Pixel by pixel in plain Python."""

    def at(x, pixel):
        return x[:, pixel[0], pixel[1]]

    c, size, windows = 4, 8, (2, 4)
    inputs = block_inputs((1, c, size, size), torch.float64)
    x, w_in, b_in, w_out, b_out = (inputs[k] for k in ("x", "w_in", "b_in", "w_out", "b_out"))
    qv = torch.einsum("ok,khw->ohw", w_in[:, :, 0, 0], x[0]) + b_in[:, None, None]
    a = torch.zeros(c, size, size, dtype=torch.float64)
    pixels = list(itertools.product(range(size), range(size)))
    for g, window in enumerate(windows):
        q, v = qv[4 * g : 4 * g + 2], qv[4 * g + 2 : 4 * g + 4]
        shift = window // 2 if shifted else 0

        def place(pixel, shift=shift, window=window):
            return tuple((p - shift) % size // window for p in pixel)

        for i in pixels:
            keys = [j for j in pixels if place(j) == place(i)]
            scores = torch.stack([at(q, i) @ at(q, j) for j in keys]).softmax(0)
            a[2 * g : 2 * g + 2, i[0], i[1]] = sum(
                s * at(v, j) for s, j in zip(scores, keys, strict=True)
            )
    y = torch.einsum("ok,khw->ohw", w_out[:, :, 0, 0], a) + b_out[:, None, None] + x[0]
    actual = sr_kernels.grouped_attention_block(
        x, w_in, b_in, w_out, b_out, windows=windows, shifted=shifted, backend=backend
    )
    torch.testing.assert_close(actual[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shifted", [False, True])
def test_as_in_elan_light(shifted, dtype, layout):
    inputs = block_inputs((2, 60, 32, 48), dtype, layout)
    check_block(inputs, windows=(4, 8, 16), shifted=shifted, repeats=1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shifted", [False, True])
def test_as_in_elan(shifted, layout):
    inputs = block_inputs((1, 180, 16, 32), layout=layout)
    check_block(inputs, windows=(4, 8, 16), shifted=shifted)


# Nested and not, a square that is too small or too large, odd sides, one window as large as the
# image, windows of more tokens than a block of scores that are no multiple of a vector.
WINDOWS = [(1,), (4,), (2, 4), (8,), (2, 8, 16), (4, 3), (5, 5, 3), (6, 2), (11,), (32,), (1, 12)]


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_windows(windows, dtype):
    side = math.lcm(*windows)
    side *= max(1, 12 // side)  # on a handful of numbers stock's error is a matter of luck
    inputs = block_inputs((2, 5 * len(windows), side, 2 * side), dtype)
    for shifted in (False, True):
        check_block(inputs, windows=windows, shifted=shifted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", [(4, 8), (4, 3)], ids=str)
def test_layouts(windows, layout):
    side = math.lcm(*windows)
    inputs = block_inputs((2, 14, 2 * side, side), layout=layout)
    check_block(inputs, windows=windows, shifted=True)


@pytest.mark.parametrize("channels", [3, 12, 21, 33, 48, 63, 96])
def test_channels(channels):
    for layout in ("contiguous", "channels_last"):
        inputs = block_inputs((1, channels, 16, 16), layout=layout, bias=False)
        # Of groups with one channel a score is one product, which stock rounds once.
        factor = 3 if channels == 3 else 2
        check_block(inputs, windows=(4, 8, 16), shifted=True, factor=factor)


@pytest.mark.parametrize("shape", [(0, 6, 8, 8), (2, 6, 0, 8)], ids=str)
def test_empty(shape):
    inputs = block_inputs(shape)
    y, again = block_with_reuse(sr_kernels)(**inputs, windows=(4, 8), backend="cpu")
    assert y.shape == again.shape == shape


# ------------------------------------------------------------------------------ extreme scores


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [60.0, 200.0, 877.0, 47000.0])
def test_extreme_scores(largest, dtype, layout):
    """|q|^2 = 877 is in trained weights, 47,000 in untrained ones; a row is nearly one-hot."""
    inputs = block_inputs((1, 60, 16, 32), dtype, layout, logits=largest / 20)
    for shifted in (False, True):
        # At 47,000 a logit's last digit is 0.004: ours and stock's differ by a matter of luck.
        factor = 2 if largest < 1000 else 8
        check_block(inputs, windows=(4, 8, 16), shifted=shifted, factor=factor)


@pytest.mark.parametrize("spread", [40.0, 55.0, 80.0, 300.0])
def test_small_queries_beside_large_ones(spread):
    """Rows far below the window's largest logit keep their digits."""
    c = 20
    inputs = block_inputs((1, c, 16, 16), bias=False)
    inputs["w_in"] = torch.cat((torch.eye(c), torch.eye(c))).reshape(2 * c, c, 1, 1)
    x = make_tensor((1, c, 16, 16), scale=0.2)
    x[:, :, 5, 7] *= math.sqrt(spread) / x[:, :, 5, 7].norm()
    inputs["x"] = x
    for window in (4, 8, 16):
        # The errors are those of a few rows: how small stock's are is a matter of luck.
        check_block(inputs, windows=(window,), shifted=False, factor=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_pixel_stays_in_its_windows(value):
    inputs = block_inputs((1, 12, 16, 32))
    options = {"windows": (4, 8), "shifted": False, "backend": "cpu"}
    clean = block_with_reuse(sr_kernels)(**inputs, **options)
    inputs["x"][0, 2, 5, 9] = value
    for out, good in zip(block_with_reuse(sr_kernels)(**inputs, **options), clean, strict=True):
        assert out[0, :, 4:8, 8:12].isnan().all()
        out[:, :, :8, 8:16] = good[:, :, :8, 8:16]
        assert bitwise_equal(out, good)


# ------------------------------------------------------------------------------ a citizen of torch


def test_determinism_and_threads():
    inputs = block_inputs((2, 60, 32, 48), layout="channels_last")
    run = block_with_reuse(sr_kernels)
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            results.append(run(**inputs, windows=(4, 8, 16), shifted=True, backend="cpu"))
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


def test_one_batch_is_two_images():
    inputs = block_inputs((2, 12, 16, 32))
    options = {"windows": (4, 8), "shifted": True, "backend": "cpu"}
    together = block_with_reuse(sr_kernels)(**inputs, **options)
    for i in (0, 1):
        alone = block_with_reuse(sr_kernels)(
            **{**inputs, "x": inputs["x"][i : i + 1].clone()}, **options
        )
        assert all(bitwise_equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, shifted):
    inputs = block_inputs((1, 12, 8, 16), layout=layout)
    w_v, b_v = inputs.pop("w_v"), inputs.pop("b_v")
    x, _, _, w_out, b_out = inputs.values()
    op = torch.ops.sr_kernels.grouped_attention_block.default
    for return_q in (False, True):
        torch.library.opcheck(op, (*inputs.values(), [4, 8], shifted, return_q))
    _, q = op(*inputs.values(), [4, 8], shifted, True)
    op = torch.ops.sr_kernels.apply_grouped_attention_block.default
    torch.library.opcheck(op, (x, q, w_v, b_v, w_out, b_out, [4, 8], shifted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    check_block(block_inputs((1, 12, 8, 16)), windows=(4, 8), shifted=True, autocast=dtype)


def test_compiles_as_one_graph():
    inputs = block_inputs((1, 12, 8, 16))

    def run(**tensors):
        return block_with_reuse(sr_kernels)(**tensors, windows=(4, 8), shifted=True)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(bitwise_equal, compiled(**inputs), run(**inputs)))


def test_gradients_are_an_error_that_says_what_to_do():
    inputs = block_inputs((1, 12, 8, 16))
    w_v, b_v = inputs.pop("w_v"), inputs.pop("b_v")
    inputs["w_out"].requires_grad_()
    options = {"windows": (4, 8), "return_scores": True}
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        sr_kernels.grouped_attention_block(**inputs, **options, backend="cpu")
    with torch.no_grad():
        _, scores = sr_kernels.grouped_attention_block(**inputs, **options, backend="cpu")
    x, _, _, w_out, b_out = inputs.values()
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        sr_kernels.apply_grouped_attention_block(scores, x, w_v, b_v, w_out, b_out, backend="cpu")
    y = torch.ops.sr_kernels.grouped_attention_block(*inputs.values(), [4, 8], False, False)[0]
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        y.sum().backward()
    y, scores = sr_kernels.grouped_attention_block(**inputs, **options, backend="reference")
    y = sr_kernels.apply_grouped_attention_block(
        scores, y, w_v, b_v, w_out, b_out, backend="reference"
    )
    y.sum().backward()
    assert w_out.grad.abs().sum() > 0


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"x": torch.rand(1, 12, 8, 12)}, {}, ValueError, "8x8 does not divide the image"),
        ({"x": torch.rand(12, 8, 8)}, {}, ValueError, "x must have 4 dimensions"),
        ({"w_in": torch.rand(12, 12, 1, 1)}, {}, ValueError, "w_in must have shape"),
        ({"b_in": torch.rand(12)}, {}, ValueError, "b_in must have shape"),
        ({"w_out": torch.rand(24, 12, 1, 1)}, {}, ValueError, "w_out must have shape"),
        ({"b_out": torch.rand(24)}, {}, ValueError, "b_out must have shape"),
        ({"w_out": torch.rand(12, 12, 1, 1).double()}, {}, TypeError, "w_out must have the dtype"),
        ({}, {"windows": ()}, TypeError, "windows must be a non-empty tuple"),
        ({}, {"windows": (4, 4, 4, 4, 4)}, ValueError, "split into 5 equal groups"),
        ({}, {"windows": (0, 8)}, ValueError, "windows must be at least 1"),
        ({}, {"shifted": 1}, TypeError, "shifted must be True or False"),
    ],
)
def test_bad_input(changes, options, error, message):
    inputs = block_inputs((1, 12, 8, 16))
    del inputs["w_v"], inputs["b_v"]
    with pytest.raises(error, match=message):
        sr_kernels.grouped_attention_block(
            **{**inputs, **changes}, **{"windows": (4, 8), **options}
        )


def test_bad_reuse():
    inputs = block_inputs((1, 12, 8, 16))
    w_v, b_v = inputs.pop("w_v"), inputs.pop("b_v")
    x, w_in, b_in, w_out, b_out = inputs.values()
    options = {"windows": (4, 8), "return_scores": True}
    _, block = sr_kernels.grouped_attention_block(**inputs, **options, backend="cpu")
    _, stock = sr_kernels.grouped_attention_block(**inputs, **options, backend="reference")
    rest = (w_v, b_v, w_out, b_out)
    with pytest.raises(TypeError, match="scores must be WindowScores"):
        sr_kernels.apply_grouped_attention_block(x, x, *rest)
    with pytest.raises(ValueError, match="x must have shape"):
        sr_kernels.apply_grouped_attention_block(block, x[:, :, :, :8], *rest)
    with pytest.raises(ValueError, match="w_v must have shape"):
        sr_kernels.apply_grouped_attention_block(block, x, w_in, b_in, w_out, b_out)
    with pytest.raises(ValueError, match="use apply_grouped_attention_block"):
        sr_kernels.apply_window_scores(block, x)
    for scores, backend in ((block, "reference"), (stock, "cpu")):
        with pytest.raises(RuntimeError, match="cannot apply these scores"):
            sr_kernels.apply_grouped_attention_block(scores, x, *rest, backend=backend)
    expected = F.conv2d(x, w_v, b_v)
    expected = F.conv2d(reference.apply_window_scores(stock, expected), w_out, b_out) + x
    for scores in (stock, block):
        actual = sr_kernels.apply_grouped_attention_block(scores, x, *rest)
        torch.testing.assert_close(actual, expected)


def test_operators_check_what_they_are_given_directly():
    op = torch.ops.sr_kernels.grouped_attention_block
    inputs = block_inputs((1, 12, 8, 16))
    x, w_in, b_in, w_out, b_out, w_v, b_v = inputs.values()
    for arguments, message in (
        ((x, w_v, b_v, w_out, b_out, [4, 8], False, True), "w_in must have shape"),
        ((x, w_in, b_in, w_in, b_out, [4, 8], False, True), "w_out must have shape"),
        ((x, w_in, b_in, w_out, b_out, [4, 3], False, True), "does not divide the image"),
        ((x, w_in, b_in, w_out, b_out, [], False, True), "windows must not be empty"),
        ((x, w_in.double(), b_in, w_out, b_out, [4, 8], False, True), "w_in must have the dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match="q must have shape"):
        torch.ops.sr_kernels.apply_grouped_attention_block(
            x, x[:, :6], w_v, b_v, w_out, b_out, [4, 8], False
        )
