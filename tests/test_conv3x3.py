"""conv3x3 against its definition, and as a citizen of torch."""

import itertools

import pytest
import torch
from choices import ACTIVATIONS, FLOATS, LAYOUTS
from conv3x3_cases import check_conv, conv_inputs
from threads import threads

import sr_kernels
from sr_kernels.testing import bitwise_equal, make_tensor

# ------------------------------------------------------------------------------ the operator


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_formula(backend):
    """Output by output in plain Python."""
    h, w = 5, 4
    x, weight, bias, skip = conv_inputs((1, 2, h, w), 3, torch.float64).values()
    y = torch.empty(3, h, w, dtype=torch.float64)
    for o, i, j in itertools.product(range(3), range(h), range(w)):
        z = bias[o] + skip[0, o, i, j]
        for k, r, s in itertools.product(range(2), range(3), range(3)):
            if 0 <= i + r - 1 < h and 0 <= j + s - 1 < w:
                z = z + weight[o, k, r, s] * x[0, k, i + r - 1, j + s - 1]
        y[o, i, j] = z if z > 0 else 0.2 * z
    actual = sr_kernels.conv3x3(
        x, weight, bias, skip=skip, activation="leaky_relu", negative_slope=0.2, backend=backend
    )
    torch.testing.assert_close(actual[0], y, rtol=1e-13, atol=1e-13)


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", [52, 60])
def test_as_in_the_networks(c, dtype, layout):
    inputs = conv_inputs((2, c, 21, 18), c, dtype, layout)
    check_conv(inputs, activation="leaky_relu")
    check_conv({**inputs, "bias": None, "skip": None})


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "channels", [(1, 1), (1, 7), (3, 52), (52, 3), (8, 9), (31, 33), (16, 48), (20, 64)], ids=str
)
def test_channels_and_layouts(channels, layout, dtype):
    c_in, c_out = channels
    check_conv(conv_inputs((2, c_in, 9, 8), c_out, dtype, layout), activation="relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_channels(layout):
    check_conv(conv_inputs((1, 180, 12, 11), 180, layout=layout))


# Half tiles at either border, images of a tile or less, and more tiles than a strip takes.
@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 90), (91, 1), (4, 77), (13, 6)], ids=str
)
def test_sizes(size, layout):
    # On a handful of numbers stock's error is a matter of luck: so many images.
    check_conv(conv_inputs((40, 12, *size), 20, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations(dtype, activation, layout):
    inputs = conv_inputs((2, 12, 9, 10), 20, dtype, layout)
    check_conv(inputs, activation=activation, negative_slope=-0.3)
    check_conv({**inputs, "skip": None}, activation=activation)


@pytest.mark.asan
def test_maps_of_different_layouts():
    """Weights and skip need not have x's memory format; the result has."""
    for x_layout, other in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        inputs = conv_inputs((2, 20, 7, 9), 12, layout=x_layout)
        for name in ("weight", "skip"):
            inputs[name] = make_tensor(inputs[name].shape, seed=5, scale=0.2, layout=other)
        check_conv(inputs)


@pytest.mark.parametrize("shape", [(0, 6, 8, 8), (2, 6, 0, 8), (2, 6, 8, 0)], ids=str)
def test_empty(shape):
    y = sr_kernels.conv3x3(**conv_inputs(shape, 5), backend="cpu")
    assert y.shape == (shape[0], 5, *shape[2:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixel", [(0, 0), (5, 6), (6, 7), (12, 13)], ids=str)
def test_a_bad_pixel_reaches_its_neighbours_alone(pixel, layout):
    inputs = conv_inputs((2, 20, 13, 14), 12, layout=layout)
    clean = sr_kernels.conv3x3(**inputs, backend="cpu")
    seen = torch.zeros(clean.shape, dtype=torch.bool)
    h, w = pixel
    seen[1, :, max(0, h - 1) : h + 2, max(0, w - 1) : w + 2] = True
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs["x"][1, 3, h, w] = value
        y = sr_kernels.conv3x3(**inputs, backend="cpu")
        assert not y[seen].isfinite().any()
        if value != value:
            assert y[seen].isnan().all()
        assert bitwise_equal(y[~seen], clean[~seen])


# ------------------------------------------------------------------------------ a citizen of torch


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_determinism_and_threads(layout):
    inputs = conv_inputs((2, 52, 40, 33), 52, layout=layout)
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            results.append(sr_kernels.conv3x3(**inputs, activation="gelu", backend="cpu"))
    assert all(bitwise_equal(results[0], other) for other in results[1:])


def test_one_batch_is_two_images():
    inputs = conv_inputs((2, 12, 9, 7), 20)
    together = sr_kernels.conv3x3(**inputs, backend="cpu")
    for i in (0, 1):
        one = {**inputs, **{k: inputs[k][i : i + 1].clone() for k in ("x", "skip")}}
        assert bitwise_equal(together[i : i + 1], sr_kernels.conv3x3(**one, backend="cpu"))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, skip):
    inputs = conv_inputs((2, 12, 5, 6), 8, layout=layout, skip=skip, bias=skip)
    op = torch.ops.sr_kernels.conv3x3.default
    torch.library.opcheck(op, (*inputs.values(), 2, 0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = conv_inputs((1, 12, 8, 9), 20)
    with torch.autocast("cpu", dtype=dtype):
        y = sr_kernels.conv3x3(**inputs, backend="cpu")
    assert y.dtype == dtype
    narrow = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    assert bitwise_equal(y, sr_kernels.conv3x3(**narrow, backend="cpu"))


def test_compiles_as_one_graph():
    inputs = conv_inputs((1, 12, 8, 9), 20, layout="channels_last")

    def run(**tensors):
        return sr_kernels.conv3x3(**tensors, activation="leaky_relu")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert bitwise_equal(compiled(**inputs), run(**inputs))


def test_gradients_are_an_error_that_says_what_to_do():
    inputs = conv_inputs((1, 4, 5, 6), 3)
    inputs["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"inference.*train with torch.nn.functional.conv2d"):
        sr_kernels.conv3x3(**inputs, backend="cpu")
    y = torch.ops.sr_kernels.conv3x3(*inputs.values(), 0, 0.05)
    with pytest.raises(RuntimeError, match=r"inference.*train with torch.nn.functional.conv2d"):
        y.sum().backward()
    sr_kernels.conv3x3(**inputs, backend="reference").sum().backward()
    assert inputs["weight"].grad.abs().sum() > 0


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.rand(4, 5, 6)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.rand(1, 4, 5, 6).int()}, TypeError, "x must be float32"),
        ({"weight": torch.rand(3, 5, 3, 3)}, ValueError, r"weight must have shape \(\*, 4, 3, 3\)"),
        ({"weight": torch.rand(3, 4, 1, 1)}, ValueError, "weight must have shape"),
        ({"weight": torch.rand(3, 4, 3, 3).double()}, TypeError, "weight must have the dtype"),
        ({"bias": torch.rand(4)}, ValueError, r"bias must have shape \(3,\)"),
        ({"skip": torch.rand(1, 4, 5, 6)}, ValueError, r"skip must have shape \(1, 3, 5, 6\)"),
        ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
        ({"negative_slope": "0.1"}, TypeError, "negative_slope must be a number"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        sr_kernels.conv3x3(**{**conv_inputs((1, 4, 5, 6), 3), **changes})


def test_operator_checks_what_it_is_given_directly():
    op = torch.ops.sr_kernels.conv3x3
    x, weight, bias, skip = conv_inputs((1, 4, 5, 6), 3).values()
    for arguments, message in (
        ((x[0], weight, bias, skip, 0), "x must be"),
        ((x[:, :0], weight[:, :0], bias, skip, 0), "at least one channel"),
        ((x, weight[:, :, :2], bias, skip, 0), "weight must have shape"),
        ((x, weight.double(), bias, skip, 0), "weight must have the dtype"),
        ((x, weight, bias[:2], skip, 0), "bias must have shape"),
        ((x, weight, bias, skip[:, :2], 0), "skip must have shape"),
        ((x, weight, bias, skip.double(), 0), "skip must have the dtype"),
        ((x, weight, bias, skip, 5), "activation must be 0..4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 0.05)
