"""linear_attention_block against its definition, and as a citizen of torch."""

import itertools
import math

import pytest
import torch

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, check_operator, make_tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "misaligned")


def make_inputs(shape, dtype=torch.float32, layout="contiguous", bias=True, logits=1.0):
    c = shape[1]

    def weight(rows, seed, scale=1.0):
        return make_tensor((rows, c, 1, 1), dtype, seed=seed, scale=scale * c**-0.5)

    def vector(count, seed):
        return make_tensor((count,), dtype, seed=seed, scale=0.3) if bias else None

    return {
        "x": make_tensor(shape, dtype, layout=layout, seed=0),
        "w0": weight(c, 1),
        "b0": vector(c, 2),
        "w_depth": make_tensor((c, 1, 3, 3), dtype, seed=3, scale=1 / 3),
        "w1": weight(c, 4),
        "b1": vector(c, 5),
        "w_qkv": weight(3 * c, 6, logits),
        "b_qkv": vector(3 * c, 7),
        "w_out": weight(c, 8),
        "b_out": vector(c, 9),
    }


def check(inputs, **options):
    more = {k: options.pop(k) for k in ("factor", "autocast") if k in options}
    return check_operator(
        "linear_attention_block",
        sr_kernels.linear_attention_block,
        reference.linear_attention_block,
        inputs,
        kwargs=options,
        backend="cpu",
        gradients=None,
        # Stock's error in float64 is scaled from float32, and may be luck.
        atol=1e-13 if inputs["x"].dtype == torch.float64 else 0.0,
        **more,
    )


# ------------------------------------------------------------------------------ the operator


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shift", [(0, 0), (1, -1)])
def test_is_the_formula(shift, backend):
    """Pixel by pixel in plain Python."""
    c, heads, height, width, window = 4, 2, 4, 6, (2, 3)
    inputs = make_inputs((1, c, height, width), torch.float64)
    x, w0, b0, depth, w1, b1, w_qkv, b_qkv, w_out, b_out = (
        t[0] if name == "x" else t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t
        for name, t in inputs.items()
    )
    pixels = list(itertools.product(range(height), range(width)))

    def source(i, j):  # of a pixel of the rolled image
        return x[:, (i + shift[0]) % height, (j + shift[1]) % width]

    u = {}
    for i, j in pixels:
        between = torch.zeros(c, dtype=torch.float64)
        for r, s in itertools.product(range(3), range(3)):
            if 0 <= i + r - 1 < height and 0 <= j + s - 1 < width:
                between += depth[:, 0, r, s] * (w0 @ source(i + r - 1, j + s - 1) + b0)
        u[i, j] = source(i, j) + w1 @ between + b1
    q, k, v = (
        {p: part @ u[p] + b for p in pixels}
        for part, b in zip(w_qkv.chunk(3), b_qkv.chunk(3), strict=True)
    )
    y = torch.zeros(c, height, width, dtype=torch.float64)
    for i, j in pixels:
        keys = [p for p in pixels if p[0] // 2 == i // 2 and p[1] // 3 == j // 3]
        weights = torch.stack([k[p] for p in keys]).softmax(0)
        values = torch.stack([v[p] for p in keys])
        a = torch.zeros(c, dtype=torch.float64)
        for first in range(0, c, c // heads):
            of_head = slice(first, first + c // heads)
            a[of_head] = 0.7 * q[i, j][of_head] @ (weights[:, of_head].T @ values[:, of_head])
        y[:, (i + shift[0]) % height, (j + shift[1]) % width] = u[i, j] + w_out @ a + b_out
    actual = sr_kernels.linear_attention_block(
        **inputs, window=window, shift=shift, num_heads=heads, scale=0.7, backend=backend
    )
    torch.testing.assert_close(actual[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [0, 8])
def test_as_in_dctlsa(shift, dtype, layout):
    inputs = make_inputs((2, 55, 32, 48), dtype, layout)
    check(inputs, window=16, shift=shift, num_heads=5)


# One window, one row or column of windows, windows of one pixel, and no multiple of a vector.
@pytest.mark.asan
@pytest.mark.parametrize("window", [(1, 1), (1, 12), (6, 1), (3, 4), (2, 5), (12, 20)], ids=str)
def test_windows_and_shifts(window):
    # On a handful of numbers stock's error is a matter of luck: so many images.
    inputs = make_inputs((6, 20, 12, 60 if window[1] == 5 else 48 if window != (12, 20) else 20))
    for shift in ((0, 0), (1, 0), (-2, 7), (11, -19)):
        check(inputs, window=window, shift=shift, num_heads=4)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "channels", [(1, 1), (3, 3), (7, 1), (8, 2), (15, 5), (33, 3), (64, 1), (96, 8)], ids=str
)
def test_channels_heads_and_layouts(channels, layout, dtype):
    c, heads = channels
    inputs = make_inputs((4, c, 8, 16), dtype, layout)
    check(inputs, window=8, shift=3, num_heads=heads)


def test_without_biases():
    for layout in ("contiguous", "channels_last"):
        check(make_inputs((2, 20, 8, 16), layout=layout, bias=False), window=4, num_heads=5)


@pytest.mark.parametrize("shape", [(0, 6, 8, 8), (2, 6, 0, 8), (2, 6, 8, 0)], ids=str)
def test_empty(shape):
    y = sr_kernels.linear_attention_block(**make_inputs(shape), window=4, backend="cpu")
    assert y.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [20.0, 300.0])
def test_large_keys(logits, dtype):
    """A key's exponentials span more than the dtype: only its largest tokens count."""
    inputs = make_inputs((2, 20, 16, 32), dtype, logits=logits)
    check(inputs, window=8, shift=4, num_heads=5)


def test_a_bias_of_the_keys_changes_nothing():
    """A softmax does not see what is added to all of its values."""
    inputs = make_inputs((1, 20, 16, 16), torch.float64)
    options = {"window": 8, "num_heads": 5, "backend": "cpu"}
    before = sr_kernels.linear_attention_block(**inputs, **options)
    inputs["b_qkv"][20:40] += 100
    assert bitwise_equal(sr_kernels.linear_attention_block(**inputs, **options), before)
    expected = reference.linear_attention_block(**inputs, window=8, num_heads=5)
    torch.testing.assert_close(before, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_pixel_stays_in_its_windows(value, layout):
    """And in those whose local branch sees it."""
    inputs = make_inputs((2, 12, 24, 24), layout=layout)
    options = {"window": 8, "num_heads": 3, "backend": "cpu"}
    clean = sr_kernels.linear_attention_block(**inputs, **options)
    inputs["x"][1, 5, 7, 4] = value
    y = sr_kernels.linear_attention_block(**inputs, **options)
    assert y[1, :, :16, :8].isnan().all()
    y[1, :, :16, :8] = clean[1, :, :16, :8]
    assert bitwise_equal(y, clean)


# ------------------------------------------------------------------------------ a citizen of torch


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_determinism_and_threads(layout):
    inputs = make_inputs((2, 55, 32, 48), layout=layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(
                sr_kernels.linear_attention_block(**inputs, window=16, num_heads=5, backend="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(bitwise_equal(results[0], other) for other in results[1:])


def test_one_batch_is_two_images():
    inputs = make_inputs((2, 12, 8, 16))
    options = {"window": 4, "shift": 2, "num_heads": 2, "backend": "cpu"}
    together = sr_kernels.linear_attention_block(**inputs, **options)
    for i in (0, 1):
        one = {**inputs, "x": inputs["x"][i : i + 1].clone()}
        assert bitwise_equal(
            together[i : i + 1], sr_kernels.linear_attention_block(**one, **options)
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, bias):
    inputs = make_inputs((2, 12, 8, 12), layout=layout, bias=bias)
    op = torch.ops.sr_kernels.linear_attention_block.default
    torch.library.opcheck(op, (*inputs.values(), 4, 6, 1, -2, 3, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    check(make_inputs((1, 20, 8, 16)), window=8, num_heads=5, autocast=dtype)


def test_compiles_as_one_graph():
    inputs = make_inputs((1, 12, 8, 16), layout="channels_last")

    def run(**tensors):
        return sr_kernels.linear_attention_block(**tensors, window=4, shift=2, num_heads=2)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert bitwise_equal(compiled(**inputs), run(**inputs))


def test_gradients_are_an_error_that_says_what_to_do():
    inputs = make_inputs((1, 4, 4, 4))
    inputs["w_out"].requires_grad_()
    with pytest.raises(RuntimeError, match="inference and has no gradient"):
        sr_kernels.linear_attention_block(**inputs, window=4, backend="cpu")
    y = torch.ops.sr_kernels.linear_attention_block(*inputs.values(), 4, 4, 0, 0, 1, 0.5)
    with pytest.raises(RuntimeError, match="inference and has no gradient"):
        y.sum().backward()
    sr_kernels.linear_attention_block(**inputs, window=4, backend="reference").sum().backward()
    assert inputs["w_out"].grad.abs().sum() > 0


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"x": torch.rand(12, 8, 8)}, {}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.rand(1, 12, 8, 10)}, {}, ValueError, "window 4x4 does not divide the image"),
        ({"w0": torch.rand(12, 6, 1, 1)}, {}, ValueError, "w0 must have shape"),
        ({"b0": torch.rand(6)}, {}, ValueError, "b0 must have shape"),
        ({"w_depth": torch.rand(12, 12, 3, 3)}, {}, ValueError, "w_depth must have shape"),
        ({"w1": torch.rand(6, 12, 1, 1)}, {}, ValueError, "w1 must have shape"),
        ({"b1": torch.rand(12).double()}, {}, TypeError, "b1 must have the dtype"),
        ({"w_qkv": torch.rand(24, 12, 1, 1)}, {}, ValueError, "w_qkv must have shape"),
        ({"b_qkv": torch.rand(12)}, {}, ValueError, "b_qkv must have shape"),
        ({"w_out": torch.rand(12, 12, 3, 3)}, {}, ValueError, "w_out must have shape"),
        ({"b_out": torch.rand(36)}, {}, ValueError, "b_out must have shape"),
        ({}, {"num_heads": 5}, ValueError, "a multiple of num_heads=5 channels, got 12"),
        ({}, {"window": 0}, ValueError, "window must be at least 1"),
        ({}, {"shift": 0.5}, TypeError, "shift must be an integer"),
        ({}, {"scale": "1"}, TypeError, "scale must be a number"),
    ],
)
def test_bad_input(changes, options, error, message):
    inputs = {**make_inputs((1, 12, 8, 16)), **changes}
    with pytest.raises(error, match=message):
        sr_kernels.linear_attention_block(**inputs, **{"window": 4, **options})


def test_operator_checks_what_it_is_given_directly():
    op = torch.ops.sr_kernels.linear_attention_block
    inputs = make_inputs((1, 12, 8, 16))
    sizes = {"window": (4, 4), "heads": 2}
    for changes, message in (
        ({"x": inputs["x"][0]}, "x must be"),
        ({"w0": inputs["w_qkv"]}, "w0 must have shape"),
        ({"b0": inputs["b_qkv"]}, "b0 must have shape"),
        ({"w_depth": inputs["w0"]}, "w_depth must have shape"),
        ({"w_qkv": inputs["w0"]}, "w_qkv must have shape"),
        ({"w1": inputs["w1"].double()}, "w1 must have the dtype"),
        ({"window": (4, 5)}, "does not divide the image"),
        ({"window": (0, 4)}, "window must be positive"),
        ({"heads": 5}, "num_heads = 5"),
        ({"heads": 0}, "num_heads must be positive"),
    ):
        given = {**inputs, **sizes, **changes}
        tensors = [given[name] for name in inputs]
        with pytest.raises(RuntimeError, match=message):
            op(*tensors, *given["window"], 0, 0, given["heads"], 0.5)


def test_a_gpu_runs_the_definition():
    for backend, kind in (("cuda", "CUDA"), ("triton", "Triton")):
        assert sr_kernels.backends.can_run(
            backend, "linear_attention_block", (torch.ones(1, 4, 2, 2),)
        ) == (False, f"linear_attention_block has no {kind} kernel")
