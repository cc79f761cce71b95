"""The attention gates against their definition, and as citizens of torch."""

import pytest
import torch
from attention_gate_cases import CASES, SIZES, check, functions, make_inputs
from choices import FLOATS, LAYOUTS
from threads import threads

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, make_tensor

ALL = pytest.mark.parametrize("case", CASES)


def leaves_of(inputs):
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


# ------------------------------------------------------------------------------ against the oracle


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@ALL
def test_sizes_and_dtypes(case, size, dtype):
    inputs = make_inputs(case, size, dtype)
    if size[0] == 0 and CASES[case][0] == "channel_gate":
        # Stock cannot differentiate an empty mean's convolution; shapes are all there is.
        ours = functions(case)[0](**inputs, **CASES[case][1], backend="cpu")
        assert ours.shape == (0, size[1], 1, 1)
        return
    check(case, inputs)


@pytest.mark.smoke
@ALL
def test_one_small_image(case):
    check(case, make_inputs(case, (2, 10, 9, 11)))


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_layouts(case, layout, dtype):
    check(case, make_inputs(case, (2, 52, 9, 13), dtype, layout))


@ALL
def test_every_subset_of_gradients(case):
    check(case, make_inputs(case, (1, 5, 4, 6)), gradients="subsets")


@ALL
def test_without_biases(case):
    inputs = make_inputs(case, (1, 7, 5, 6))
    for name in inputs:
        if name.startswith("b") or name.endswith("bias") or name == "residual":
            inputs[name] = None
    check(case, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@ALL
def test_more_than_one_tile(case, layout):
    # A bias's few gradients, about 20, are sums of thousands of float32 terms that mostly cancel.
    check(case, make_inputs(case, (2, 5, 37, 150), layout=layout), gradient_atol=2e-5)


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_spatial_tiles_meet_without_a_seam(layout):
    # Many channels make narrow tiles, down to 320 pixels: four of them here.
    check("spatial", make_inputs("spatial", (1, 240, 50, 330), layout=layout), gradients=None)


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_of_the_chain_meet_without_a_seam(layout):
    # Two bands, of 49 and 48 rows, each of which ends in a group of fewer than eight rows.
    inputs = make_inputs("pixel_spatial", (2, 19, 97, 21), layout=layout, kernel=9)
    check("pixel_spatial", inputs, gradients=None)


@pytest.mark.parametrize("case", ["pixel", "gated_conv"])
def test_pixels_of_many_channels(case):
    # More pixels than a block's, and a last one that overlaps; panels of two and of three vectors.
    check(case, make_inputs(case, (1, 60, 9, 21), layout="channels_last"), gradients=None)


@pytest.mark.parametrize("kernel", [1, 3, 5, 11, 23])
@pytest.mark.parametrize("case", ["spatial", "pixel_spatial"])
def test_spatial_kernels_up_to_larger_than_the_image(case, kernel):
    check(case, make_inputs(case, (1, 6, 9, 12), kernel=kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_autocast(case, dtype):
    """On numbers that the narrow dtype holds: autocast casts x for ours, not for stock's maximum
    and mean, and rounding can make two channels share a maximum."""
    inputs = {k: t.to(dtype).float() for k, t in make_inputs(case, (1, 20, 6, 9)).items()}
    check(case, inputs, autocast=dtype, gradient_atol=2 * torch.finfo(dtype).eps)


@ALL
def test_expanded_gradient_and_input(case):
    """Strides of 0: what sum().backward() sends, and a broadcast feature map."""
    ours, stock, settings = functions(case)
    inputs = make_inputs(case, (2, 6, 5, 7))
    inputs["x"] = make_tensor((2, 6, 1, 1)).expand(2, 6, 5, 7)
    leaves = leaves_of(inputs)
    actual = torch.autograd.grad(ours(**leaves, **settings, backend="cpu").sum(), leaves.values())
    expected = torch.autograd.grad(stock(**leaves, **settings).sum(), leaves.values())
    for a, e in zip(actual, expected, strict=True):
        # rtol: a broadcast channel is constant, where stock's deviation is rounding noise
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@ALL
def test_nan_and_inf_pass_as_in_the_reference(case, layout, value):
    inputs = make_inputs(case, (2, 18, 12, 13), layout=layout)  # channels for whole vectors
    inputs["x"][0, 3, 4, 5] = value
    check(case, inputs, gradients=[("x",)])


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
@ALL
def test_gates_far_open_and_far_shut(case, scale):
    inputs = make_inputs(case, (1, 12, 8, 9))
    inputs["x"] = inputs["x"] * scale
    # At 1e4 the spatial gate's argument is rounded to about 1e-3 and then multiplies 1e4: what a
    # few half-open pixels make of that is luck, in stock as in ours.
    factor = 20.0 if "spatial" in case and scale > 1e3 else 2.0
    check(
        case,
        inputs,
        factor=factor,
        gradient_factor=1.5 * factor,
        gradient_atol=1e-6 * max(1.0, scale**2),
    )


@pytest.mark.parametrize("case", ["spatial", "pixel_spatial"])
def test_gradient_of_a_shared_maximum_is_shared_equally(case):
    inputs = make_inputs(case, (1, 5, 6, 7))
    if case == "spatial":
        inputs["x"] = inputs["x"].round()
        assert (inputs["x"] == inputs["x"].amax(1, keepdim=True)).sum() > 42
    else:
        inputs["pixel_weight"] = torch.zeros_like(inputs["pixel_weight"])
        inputs["pixel_bias"] = torch.zeros_like(inputs["pixel_bias"])
        inputs["x"] = inputs["x"].round()
    check(case, inputs, gradients=[("x",)])


def test_gradient_of_a_maximum_that_all_channels_share():
    inputs = leaves_of(make_inputs("spatial", (1, 8, 5, 5)))
    x = make_tensor((1, 1, 5, 5)).expand(1, 8, 5, 5).contiguous().requires_grad_()
    y = sr_kernels.spatial_attention(**{**inputs, "x": x}, backend="cpu")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for channel in range(1, 8):
        assert bitwise_equal(gradient[:, channel], gradient[:, 0])


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["gate_contrast", "channel_contrast"])
def test_constant_channels_have_no_deviation(case):
    inputs = make_inputs(case, (2, 4, 19, 23))
    inputs["x"][:, 1] = 0.5
    inputs["x"][1, 3] = 0.0
    check(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_at_constant_channels_is_that_of_the_mean(layout, dtype):
    """0.1 is not exact in binary, nor is a sum of 0.1s: its deviation must be 0 all the same."""
    leaves = leaves_of(make_inputs("gate_contrast", (1, 4, 41, 77), dtype, layout))
    with torch.no_grad():
        leaves["x"].copy_(0.1 * torch.arange(1, 5, dtype=dtype).reshape(1, 4, 1, 1))
    gate = sr_kernels.channel_gate(**leaves, statistic="contrast", backend="cpu")
    (actual,) = torch.autograd.grad(gate.sum(), leaves["x"])
    gate = reference.channel_gate(**leaves, statistic="mean")
    (expected,) = torch.autograd.grad(gate.sum(), leaves["x"])
    assert (expected != 0).all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3])
def test_statistics_of_a_large_plane(mean, layout):
    """Deviation 0.01 about a large mean, over as many pixels as a video frame has."""
    x = make_tensor((1, 2, 540, 960), scale=0.01, layout=layout) + mean
    one = torch.eye(2).reshape(2, 2, 1, 1)
    half = torch.full((2,), -mean)
    gate = sr_kernels.channel_gate(
        x, one, half, 100 * one, None, statistic="contrast", backend="cpu"
    )
    exact = reference.channel_gate(
        x.double(), one.double(), half.double(), 100 * one.double(), None, statistic="contrast"
    )
    torch.testing.assert_close(gate.double(), exact, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("count", [1, 2])
@ALL
def test_results_do_not_depend_on_threads_or_repetition(case, count):
    ours, _, settings = functions(case)
    leaves = leaves_of(make_inputs(case, (2, 11, 24, 70)))

    def run():
        out = ours(**leaves, **settings, backend="cpu")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves.values())]

    first = run()
    with threads(count):
        for _ in range(25):
            assert all(map(bitwise_equal, run(), first))


# ------------------------------------------------------------------------------ torch


def operator_arguments(case, **options):
    name, settings = CASES[case]
    inputs = make_inputs(case, (2, 5, 4, 6), **options)
    leaves = list(leaves_of(inputs).values())
    settings = [int(value == "contrast") for value in settings.values()]
    return getattr(torch.ops.sr_kernels, name).default, (*leaves, *settings)


@ALL
def test_gradcheck(case):
    ours, _, settings = functions(case)
    inputs = make_inputs(case, (2, 3, 3, 4), torch.float64, kernel=3, hidden=2)
    leaves = leaves_of(inputs)

    def function(*tensors):
        return ours(**dict(zip(leaves, tensors, strict=True)), **settings, backend="cpu")

    assert torch.autograd.gradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@ALL
def test_opcheck(case, layout):
    torch.library.opcheck(*operator_arguments(case, layout=layout))


@ALL
def test_compile_without_graph_breaks_for_any_size(case):
    torch._dynamo.reset()  # the cases share one function, whose recompiles dynamo would add up
    ours, _, settings = functions(case)
    inputs = make_inputs(case, (2, 8, 4, 4))
    inputs.pop("residual", None)
    x = inputs.pop("x")
    weights = leaves_of(inputs)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def network(x):
        return ours(x.relu(), **weights, **settings) + 1

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=count)
    for h, w in [(8, 8), (9, 13), (16, 5), (7, 7), (31, 64)]:
        x = make_tensor((2, 8, h, w))
        torch.testing.assert_close(compiled(x), network(x))
    assert graphs <= 2, f"{graphs} graphs for five sizes"


@pytest.mark.parametrize("case", ["pixel_spatial", "channel_contrast", "gated_conv"])
def test_compiled_training_step(case):
    ours, _, settings = functions(case)
    leaves = leaves_of(make_inputs(case, (1, 8, 9, 10)))

    def loss(tensors):
        return ours(**tensors, **settings).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(leaves), leaves.values())
    expected = torch.autograd.grad(loss(leaves), leaves.values())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_export_keeps_the_operators():
    class Network(torch.nn.Module):
        def forward(self, x, pixel, spatial, chain, channel, conv):
            y = sr_kernels.pixel_attention(x, *pixel)
            y = sr_kernels.spatial_attention(y, *spatial)
            y = sr_kernels.pixel_spatial_attention(y, *chain)
            y = sr_kernels.channel_attention(y, *channel, statistic="contrast")
            gate = sr_kernels.channel_gate(y, *channel)
            return sr_kernels.gated_conv1x1(y, gate, *conv)

    def weights(case):
        inputs = make_inputs(case, (1, 8, 6, 7))
        return [t for name, t in inputs.items() if name not in ("x", "gate", "residual")]

    names = ("pixel", "spatial", "pixel_spatial", "channel_contrast", "gated_conv")
    parameters = [weights(name) for name in names]
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    dynamic = [{2: height, 3: width}, *([None] * len(group) for group in parameters)]
    program = torch.export.export(
        Network(), (make_tensor((1, 8, 6, 7)), *parameters), dynamic_shapes=dynamic
    )
    for name, _ in CASES.values():
        assert f"sr_kernels.{name}" in program.graph_module.code
    x = make_tensor((1, 8, 9, 5))
    torch.testing.assert_close(program.module()(x, *parameters), Network()(x, *parameters))


@ALL
def test_second_derivative_says_what_to_do(case):
    ours, _, settings = functions(case)
    leaves = leaves_of(make_inputs(case, (1, 5, 3, 3)))
    out = ours(**leaves, **settings, backend="cpu")
    (first,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.sum().backward()


def test_threads_beyond_the_work():
    with threads(7):
        for case in CASES:
            check(case, make_inputs(case, (1, 4, 2, 3)))


# ------------------------------------------------------------------------------ bad input

X = make_tensor((1, 10, 4, 4))
W = make_tensor((10, 10, 1, 1))
B = make_tensor((10,))
K = make_tensor((1, 2, 7, 7))
DOWN, UP = make_tensor((3, 10, 1, 1)), make_tensor((10, 3, 1, 1))
GATE = make_tensor((1, 10, 1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sr_kernels.pixel_attention(X, W[:5]), ValueError, "weight"),
        (lambda: sr_kernels.pixel_attention(X, W, B[:3]), ValueError, "bias"),
        (lambda: sr_kernels.pixel_attention(X.int(), W), TypeError, "x"),
        (lambda: sr_kernels.pixel_attention(X, W.double()), TypeError, "weight"),
        (lambda: sr_kernels.spatial_attention(X, K[..., :6, :6]), ValueError, "weight"),
        (lambda: sr_kernels.spatial_attention(X, K[..., :5]), ValueError, "weight"),
        (lambda: sr_kernels.pixel_spatial_attention(X, W, B, K[:, :1]), ValueError, "spatial"),
        (lambda: sr_kernels.channel_gate(X, DOWN, None, DOWN, None), ValueError, "w_up"),
        (
            lambda: sr_kernels.channel_attention(X, DOWN, None, UP, None, statistic="median"),
            ValueError,
            "statistic",
        ),
        (lambda: sr_kernels.gated_conv1x1(X, GATE[:, :3], W), ValueError, "gate"),
        (lambda: sr_kernels.gated_conv1x1(X, GATE, W, residual=X[:, :3]), ValueError, "residual"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pixel_attention", (X[0], W, None), "x must be"),
        ("pixel_attention", (X, W[:, :4], None), "weight must have shape"),
        ("pixel_attention", (X, W, B[:4]), "bias must have shape"),
        ("pixel_attention", (X.int(), W.int(), None), "must be float32"),
        ("pixel_attention_backward", (X[:, :4], X, W, None, True, True, False), "grad must have"),
        ("spatial_attention", (X, K[..., :6, :6], None), "weight must have shape"),
        ("spatial_attention", (X, K, B), "bias must have shape"),
        ("pixel_spatial_attention", (X, W[:5], None, K, None), "pixel_weight must have shape"),
        ("pixel_spatial_attention", (X, W, None, K.double(), None), "spatial_weight must have"),
        ("channel_gate", (X, DOWN, None, UP, None, 2), "statistic must be"),
        ("channel_gate", (X[:, :, :0], DOWN, None, UP, None, 0), "at least one pixel"),
        ("channel_attention", (X, DOWN, None, DOWN, None, 0), "w_up must have shape"),
        ("gated_conv1x1", (X, GATE[:, :3], W, None, None), "gate must have shape"),
        ("gated_conv1x1", (X, GATE, W, None, X[:, :3]), "residual must have shape"),
    ],
)
def test_the_operators_themselves_check_too(name, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.sr_kernels, name)(*arguments)
