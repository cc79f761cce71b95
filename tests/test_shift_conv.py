"""shift_conv2d and shift_conv_block against their definition, and as citizens of torch."""

import itertools

import pytest
import torch
from choices import ACTIVATIONS, FLOATS, LAYOUTS
from shift_conv_cases import (
    BLOCK_SIZES,
    SIZES,
    block_inputs,
    check_block,
    check_conv,
    conv_inputs,
)
from threads import threads

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, make_tensor

# ------------------------------------------------------------------------------ the operators


@pytest.mark.smoke
@pytest.mark.asan
@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
def test_shift_is_the_definition(pattern):
    """With the identity as weight the operator shifts: compared to indexing, bit by bit."""
    x = make_tensor((2, 11, 4, 5))
    weight = torch.eye(11).reshape(11, 11, 1, 1)
    moved = {
        "plus": [(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)],
        "cross": [(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)],
        "none": [(0, 0)] * 5,
    }[pattern]
    expected = torch.zeros_like(x)
    for channel, row, column in itertools.product(range(11), range(4), range(5)):
        dy, dx = moved[min(channel // 2, 4)]  # 11 // 5 = 2 channels a group, 3 stay
        if 0 <= row + dy < 4 and 0 <= column + dx < 5:
            expected[:, channel, row, column] = x[:, channel, row + dy, column + dx]
    for backend in ("cpu", "reference"):
        actual = sr_kernels.shift_conv2d(x, weight, pattern=pattern, backend=backend)
        assert bitwise_equal(actual, expected), backend


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conv_sizes_and_dtypes(size, dtype):
    check_conv(conv_inputs(*size, dtype=dtype), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
def test_conv_layouts_activations_and_patterns(layout, activation, pattern):
    inputs = conv_inputs(2, 13, 12, 6, 21, layout=layout)
    check_conv(inputs, activation=activation, pattern=pattern)


@pytest.mark.parametrize("groups", [4, 5, 6, 9, 100])
def test_conv_groups(groups):
    check_conv(conv_inputs(1, 18, 7, 5, 6), groups=groups)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(60, 60), (55, 165), (20, 32), (9, 8)], ids=str)
def test_conv_in_place(channels, dtype):
    """1x1 convolutions of channels_last maps, whole ones and parts whose rows lie further apart."""
    for residual, activation in ((True, "leaky_relu"), (False, None)):
        inputs = conv_inputs(
            2, *channels, 7, 45, dtype=dtype, layout="channels_last", residual=residual
        )
        check_conv(inputs, gradients=None, pattern="none", activation=activation)
        for name in ("x", "residual") if residual else ("x",):
            inputs[name] = inputs[name][:, :, 1:, 2:-3]
        check_conv(inputs, gradients=None, pattern="none", activation=activation)


@pytest.mark.smoke
def test_conv_every_subset_of_gradients():
    check_conv(conv_inputs(1, 10, 6, 5, 7), activation="gelu", gradients="subsets")
    check_conv({**conv_inputs(1, 10, 6, 5, 7, residual=False), "bias": None}, gradients="subsets")


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
def test_block_sizes_and_dtypes(size, dtype):
    check_block(block_inputs(*size, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_block_layouts_and_activations(layout, activation, residual):
    inputs = block_inputs(2, 13, 22, 6, 21, layout=layout)
    check_block(inputs, activation=activation, residual=residual)


@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
def test_block_every_subset_of_gradients(pattern):
    check_block(block_inputs(1, 10, 12, 5, 7), pattern=pattern, gradients="subsets")


def test_block_wider_than_one_tile_and_taller_than_one_band():
    check_block(block_inputs(1, 10, 20, 70, 210))


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 8, 17, 64, 95, 1100])
def test_row_ends(width, dtype, layout):
    """Rows of whole vectors and of vectors and a rest, one tile and several."""
    size = (1, 11, 14, 3, width)
    # In float64 the oracle is stock itself, whose sums of 3300 products are off by up to 1e-12
    # (ours by a tenth of that, held against long double).
    slack = {"gradient_atol": 2e-12 if dtype == torch.float64 else 0.0}
    check_conv(conv_inputs(*size, dtype=dtype, layout=layout), activation="leaky_relu", **slack)
    check_conv(conv_inputs(*size, dtype=dtype, layout=layout), pattern="none", **slack)
    check_block(block_inputs(1, 11, 23, 3, width, dtype=dtype, layout=layout), **slack)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (2, 130), (3, 65), (35, 7)], ids=str)
@pytest.mark.parametrize(("channels", "hidden"), [(60, 120), (32, 80), (55, 110)])
def test_block_pixel_by_pixel(channels, hidden, size, dtype):
    """channels_last maps whose channels fill vectors: whole ones, or with an overlap at the end."""
    # Stock is lucky in some of these: half of what 80 products in one sum lose.
    atol = 8 * torch.finfo(dtype).eps
    inputs = block_inputs(1, channels, hidden, *size, dtype=dtype, layout="channels_last")
    for options in (
        {"pattern": "plus", "activation": "relu", "residual": True},
        {"pattern": "cross", "activation": "leaky_relu", "residual": False},
        {"pattern": "none", "activation": None, "residual": True},
        {"pattern": "none", "activation": "gelu", "residual": True},
        {"pattern": "plus", "activation": "silu", "residual": False},
    ):
        check_block(inputs, gradients=None, atol=atol, **options)


@pytest.mark.asan
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_in_place_of_a_part_of_a_map(activation):
    """Nothing moves, and the rows of x are further apart than their pixels fill."""
    inputs = block_inputs(2, 60, 120, 5, 43, layout="channels_last")
    inputs["x"] = inputs["x"][:, :, 1:, 2:-3]
    check_block(inputs, gradients=None, pattern="none", activation=activation)


@pytest.mark.parametrize(
    ("channels", "layout"), [(10, "contiguous"), (10, "channels_last"), (32, "channels_last")]
)
def test_block_adds_a_large_residual_last(channels, layout):
    """One rounding at its magnitude; a sum that begins with it has one for every product."""
    inputs = block_inputs(1, channels, 40, 9, 67, layout=layout)
    inputs["x"] = inputs["x"] * 64
    inputs["w0"] = inputs["w0"] / 64
    y = sr_kernels.shift_conv_block(**inputs, residual=True)
    oracle = reference.shift_conv_block(
        **{name: value.double() for name, value in inputs.items()}, residual=True
    )
    half_ulp = torch.finfo(torch.float32).eps / 2
    assert ((y.double() - oracle).abs() <= 1.25 * half_ulp * oracle.abs() + 2e-6).all()


def test_none_is_a_1x1_convolution():
    inputs = conv_inputs(2, 31, 20, 7, 19, residual=False)
    ours = sr_kernels.shift_conv2d(**inputs, pattern="none", backend="cpu")
    stock = torch.nn.functional.conv2d(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_passes_unchanged(dtype, layout):
    """With the identity as weight: each value is converted to float32 and back. One
    channel where there are NaN and infinity: in other channels they would become 0 * NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    inputs = {"x": x, "weight": torch.ones(1, 1, 1, 1, dtype=dtype)}
    if layout == "channels_last":  # 16 channels, which go through the transposes
        x = (
            x.nan_to_num(0, 0, 0)
            .reshape(1, 16, 64, 64)
            .contiguous(memory_format=torch.channels_last)
        )
        inputs = {"x": x, "weight": torch.eye(16, dtype=dtype).reshape(16, 16, 1, 1)}
    out = sr_kernels.shift_conv2d(**inputs, pattern="none", backend="cpu")
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(0, 7, -7), x.nan_to_num(0, 7, -7))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_to_16_bits_as_torch_does(dtype, layout):
    """Products of two 16-bit values are exact in float32: one rounding, to nearest even."""
    x = make_tensor((1, 1, 64, 500), dtype, seed=0, scale=30)
    x = x.expand(1, 16, 64, 500)
    x = x.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    weight = torch.diag(make_tensor((16,), dtype, seed=1, scale=4)).reshape(16, 16, 1, 1)
    out = sr_kernels.shift_conv2d(x, weight, pattern="none", backend="cpu")
    factor = weight[:, :, 0, 0].diagonal().reshape(1, 16, 1, 1).float()
    assert torch.equal(out, (x.float() * factor).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Stock rounds the hidden activations to 16 bits; ours keeps them, and may only be better."""
    check_conv(conv_inputs(1, 20, 20, 6, 9, residual=False), activation="relu", autocast=dtype)
    check_block(block_inputs(1, 20, 40, 6, 9), autocast=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_nan_and_inf_pass_as_in_the_reference(value, activation):
    x = make_tensor((1, 10, 6, 6))
    x[0, 3, 2, 2] = value
    inputs = {**conv_inputs(1, 10, 5, 6, 6), "x": x}
    ours = sr_kernels.shift_conv2d(**inputs, activation=activation, backend="cpu")
    stock = reference.shift_conv2d(**inputs, activation=activation)
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours.isinf(), stock.isinf())


# ------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_do_not_depend_on_threads_or_repetition(count):
    inputs = block_inputs(2, 20, 40, 24, 70)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def gradients():
        out = sr_kernels.shift_conv_block(**leaves, backend="cpu")
        return torch.autograd.grad(out.square().sum(), leaves.values())

    first = gradients()
    with threads(count):
        for _ in range(20):
            assert all(map(bitwise_equal, gradients(), first))


# ------------------------------------------------------------------------------ torch


def test_gradcheck():
    leaves = [t.requires_grad_() for t in conv_inputs(1, 6, 4, 3, 4, torch.float64).values()]

    def conv(x, weight, bias, residual):
        return sr_kernels.shift_conv2d(
            x, weight, bias, residual=residual, activation="gelu", backend="cpu"
        )

    assert torch.autograd.gradcheck(conv, leaves)
    leaves = [t.requires_grad_() for t in block_inputs(1, 6, 7, 3, 4, torch.float64).values()]

    def block(*tensors):
        return sr_kernels.shift_conv_block(*tensors, activation="silu", backend="cpu")

    assert torch.autograd.gradcheck(block, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    conv = [t.requires_grad_() for t in conv_inputs(2, 10, 6, 5, 7, layout=layout).values()]
    torch.library.opcheck(torch.ops.sr_kernels.shift_conv2d.default, (*conv, 1, 0.05, 0, 5))
    block = [t.requires_grad_() for t in block_inputs(2, 10, 12, 5, 7, layout=layout).values()]
    torch.library.opcheck(
        torch.ops.sr_kernels.shift_conv_block.default, (*block, 1, 0.05, True, 0, 5)
    )


def test_compile_without_graph_breaks_for_any_size():
    inputs = block_inputs(1, 10, 20, 8, 8)
    weights = [inputs[name].requires_grad_() for name in ("w0", "b0", "w1", "b1")]
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def network(x):
        y = sr_kernels.shift_conv_block(x, *weights)
        return sr_kernels.shift_conv2d(y, weights[0], weights[1], activation="leaky_relu")

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=count)
    for h, w in [(8, 8), (9, 13), (16, 5), (7, 7), (31, 64)]:
        x = make_tensor((2, 10, h, w))
        torch.testing.assert_close(compiled(x), network(x))
    assert graphs <= 2, f"{graphs} graphs for five sizes"


def test_compiled_training_step():
    inputs = block_inputs(1, 10, 20, 8, 9)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    compiled = torch.compile(sr_kernels.shift_conv_block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(sr_kernels.shift_conv_block(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_export_keeps_the_operator():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(
                [tensor for name, tensor in block_inputs(1, 10, 20, 1, 1).items() if name != "x"]
            )

        def forward(self, x):
            return sr_kernels.shift_conv_block(x, *self.weights)

    network = Network()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    x = make_tensor((1, 10, 8, 9))
    program = torch.export.export(network, (x,), dynamic_shapes=[{2: height, 3: width}])
    assert "sr_kernels.shift_conv_block" in program.graph_module.code
    other = make_tensor((1, 10, 5, 12))
    torch.testing.assert_close(program.module()(other), network(other))


def test_second_derivative_says_what_to_do():
    inputs = [tensor.requires_grad_() for tensor in block_inputs(1, 5, 5, 3, 3).values()]
    out = sr_kernels.shift_conv_block(*inputs, backend="cpu")
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.sum().backward()


def test_threads_beyond_the_work():
    with threads(7):
        check_block(block_inputs(1, 5, 5, 2, 3))


# ------------------------------------------------------------------------------ bad input

X = make_tensor((1, 10, 4, 4))
W = make_tensor((5, 10, 1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sr_kernels.shift_conv2d([1.0], W), TypeError, "x must be a torch.Tensor"),
        (lambda: sr_kernels.shift_conv2d(X[0], W), ValueError, r"x must have 4 dimensions"),
        (lambda: sr_kernels.shift_conv2d(X[:, :0], W), ValueError, "at least one channel"),
        (lambda: sr_kernels.shift_conv2d(X.int(), W), TypeError, "x must be float32"),
        (lambda: sr_kernels.shift_conv2d(X.to_sparse(), W), TypeError, "x must be a dense"),
        (lambda: sr_kernels.shift_conv2d(X, W[:, :9]), ValueError, r"weight must have shape"),
        (lambda: sr_kernels.shift_conv2d(X, W[:, :, 0, 0]), ValueError, "weight must have shape"),
        (lambda: sr_kernels.shift_conv2d(X, W[:0]), ValueError, "weight must have shape"),
        (lambda: sr_kernels.shift_conv2d(X, W.double()), TypeError, "weight must have the dtype"),
        (lambda: sr_kernels.shift_conv2d(X, W.to("meta")), ValueError, "on the device of x"),
        (lambda: sr_kernels.shift_conv2d(X, W, torch.zeros(4)), ValueError, "bias must have shape"),
        (lambda: sr_kernels.shift_conv2d(X, W, 1.0), TypeError, "bias must be a torch.Tensor"),
        (lambda: sr_kernels.shift_conv2d(X, W, residual=X), ValueError, "residual must have shape"),
        (lambda: sr_kernels.shift_conv2d(X, W, activation="tanh"), ValueError, "activation"),
        (lambda: sr_kernels.shift_conv2d(X, W, pattern="x"), ValueError, "pattern must be one of"),
        (lambda: sr_kernels.shift_conv2d(X, W, groups=3), ValueError, "groups must be at least 4"),
        (lambda: sr_kernels.shift_conv2d(X, W, groups=5.0), TypeError, "groups must be an integer"),
        (lambda: sr_kernels.shift_conv2d(X, W, negative_slope="a"), TypeError, "negative_slope"),
        (lambda: sr_kernels.shift_conv2d(X, W, backend="gpu"), ValueError, "backend must be one"),
        (lambda: sr_kernels.shift_conv2d(X, W, backend="cuda"), RuntimeError, "cannot run"),
        (lambda: sr_kernels.shift_conv_block(X, W, None, W, None), ValueError, "w1 must have"),
        (
            lambda: sr_kernels.shift_conv_block(X, W, None, W[:, :5], None),
            ValueError,
            "residual=True needs",
        ),
        (
            lambda: sr_kernels.shift_conv_block(X, W, None, W[:, :5], None, residual=1),
            TypeError,
            "residual must be True or False",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], W, None, None, 0, 0.05, 0, 5), "x must be"),
        ((X, W[:, :4], None, None, 0, 0.05, 0, 5), "weight must have shape"),
        ((X, W, None, None, 9, 0.05, 0, 5), "activation must be"),
        ((X, W, None, None, 0, 0.05, 3, 5), "pattern must be"),
        ((X, W, None, None, 0, 0.05, 0, 0), "groups must be"),
        ((X, W, None, X, 0, 0.05, 0, 5), "residual must have shape"),
        ((X.int(), W.int(), None, None, 0, 0.05, 0, 5), "must be float32"),
        ((X, W.double(), None, None, 0, 0.05, 0, 5), "weight must have the dtype"),
    ],
)
def test_the_operator_itself_checks_too(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sr_kernels.shift_conv2d(*arguments)
