"""Every operator's Triton kernels against the definition, and beside the CPU and CUDA kernels."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import operator_cases
import pytest
import torch
from choices import DTYPES
from emulated import all_emulated
from torch.utils._python_dispatch import TorchDispatchMode
from window_attention_cases import grouped_with_reuse

import sr_kernels
from sr_kernels import reference, testing
from sr_kernels.testing import bitwise_equal, check_operator

# In the interpreter on the CPU; else these are the GPU tests of the backend.
DEVICE = "cpu" if sr_kernels.backends._library.triton().interpreted else "cuda"
DECLARED = [n for n, d in sr_kernels.ops._registration.DECLARED.items() if not d.not_in_triton]
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="compares with what runs on the CPU")
make_tensor = partial(testing.make_tensor, device=DEVICE)


def weight(dtype, c_out, c_in, seed, k=1):
    return make_tensor((c_out, c_in, k, k), dtype, seed=seed, scale=(c_in * k * k) ** -0.5)


def vector(dtype, count, seed):
    return make_tensor((count,), dtype, seed=seed)


CASES = {name: case.on(DEVICE, "triton") for name, case in operator_cases.CASES.items()}
ALL = pytest.mark.parametrize("name", CASES)
TRAINED = pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].inference])
WINDOWED = ("attention", "grouped", "attention_block")


def size_of(name):
    """Small: every program of a grid costs the interpreter tens of milliseconds."""
    return CASES[name].size


def smallest_of(name):
    """For what does not depend on the size."""
    sizes = {"attention": (1, 2, 5), "grouped": (1, 4, 4), "attention_block": (1, 4, 4)}
    return sizes.get(name, (1, 3, 4))


def implementations(request):
    """All that there are of every operator: the device of the tensors, the backend's name, and what
    must surround a call. In the interpreter the CUDA kernels are emulated."""
    yield DEVICE, "triton", nullcontext()
    yield "cpu", "cpu", nullcontext()
    if DEVICE == "cpu":
        yield "cpu", "cpu", all_emulated(request.getfixturevalue("kernels"))
    else:
        yield "cuda", "cuda", nullcontext()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*((dtype, "contiguous") for dtype in DTYPES), (torch.float32, "channels_last")],
)
@ALL
def test_forward_and_backward(name, dtype, layout, request):
    """The Triton, CPU and CUDA kernels on the same inputs: each within the tolerance rule, and no
    two of them further apart than it lets one be from the definition. What is missing here skips
    the rest, once all before it have passed."""
    inputs = CASES[name].inputs(*size_of(name), dtype, layout)
    found = []
    for device, backend, surroundings in implementations(request):
        case = CASES[name].on(device, backend)
        here = {key: tensor.to(device) for key, tensor in inputs.items()}
        ok, reason = sr_kernels.backends.can_run(backend, name, tuple(here.values()))
        if not ok:
            pytest.skip(reason)
        with surroundings as started:
            bounds = [comparison.bound for comparison in case.check_inputs(here)]
            results = [result.cpu().double() for result in case.results(here)]
        assert started is None or any(started), "the emulated kernels did not run"
        bounds = bounds[-len(results) :]  # before these: of the forward without gradients
        for earlier in found:
            for ours, theirs, bound in zip(results, earlier, bounds, strict=True):
                difference = float((ours - theirs).abs().max())
                assert difference <= bound, f"{difference:.3g} apart, allowed {bound:.3g}"
        found.append(results)


@ALL
def test_strides_of_a_slice(name):
    """Feature maps, and weights and biases as well, with NaN between their elements."""
    inputs = CASES[name].inputs(*size_of(name), layout="sliced")
    for key, tensor in inputs.items():
        if tensor.is_contiguous() and tensor.numel() > 1:
            inputs[key] = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    CASES[name].check_inputs(inputs)


@pytest.mark.parametrize("size", [(1, 1, 9), (2, 6, 1), (1, 1, 1), (0, 4, 4)], ids=str)
@ALL
def test_odd_images(name, size):
    if name in WINDOWED:
        pytest.skip("windows must divide the image: see test_windows")
    if size[0] == 0 and name.startswith("gate_"):
        pytest.skip("stock cannot differentiate the convolution of an empty batch's mean")
    CASES[name].check(*size)


@ALL
def test_more_than_one_tile(name):
    if name in WINDOWED:
        pytest.skip("see test_windows")
    CASES[name].check(1, 31, 37, gradient_atol=2e-5)


def test_chunks_are_combined():
    """Three of them: the last one's mean is used by nobody."""
    CASES["gate_contrast"].check(1, 41, 51, gradient_atol=2e-5)


@TRAINED
def test_every_single_gradient(name):
    case = CASES[name]
    names = case.inputs(1, 10, 10, torch.float32, "contiguous")
    case.check(*smallest_of(name), gradients=[(one,) for one in names])


@ALL
def test_without_optional_tensors(name):
    case = CASES[name]
    inputs = case.inputs(*smallest_of(name), torch.float32, "contiguous")
    for key in inputs:
        if key.startswith("b") or key.endswith("bias") or key in ("residual", "skip"):
            inputs[key] = None
    gradients = {} if not case.inference else {"gradients": None}
    check_operator(
        name, case.function(sr_kernels), case.function(reference), inputs, kwargs=case.options,
        backend="triton", atol=1e-6, gradient_atol=1e-5, **gradients,
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
def test_shift_is_the_definition(pattern):
    """With the identity as weight the operator shifts: bit by bit."""
    x = make_tensor((2, 11, 4, 5))
    eye = torch.eye(11, device=DEVICE).reshape(11, 11, 1, 1)
    actual = sr_kernels.shift_conv2d(x, eye, pattern=pattern, backend="triton")
    assert bitwise_equal(actual, reference.shift(x, pattern=pattern))


@pytest.mark.parametrize(
    ("activation", "pattern"),
    [(None, "cross"), ("relu", "none"), ("leaky_relu", "plus"), ("silu", "cross")],
)
@pytest.mark.parametrize("name", ["conv", "block"])
def test_activations_and_patterns(name, pattern, activation):
    CASES[name].check(1, 4, 5, options={"activation": activation, "pattern": pattern})


@pytest.mark.parametrize("groups", [4, 100])
@pytest.mark.parametrize("name", ["conv", "block"])
def test_groups(name, groups):
    CASES[name].check(1, 4, 5, options={"groups": groups})


@pytest.mark.parametrize(("channels", "hidden", "c_out"), [(1, 5, 1), (60, 120, 60), (67, 150, 67)])
def test_channels_beyond_a_tile(channels, hidden, c_out):
    t = torch.float32
    inputs = {
        "x": make_tensor((1, channels, 4, 5)),
        "w0": weight(t, hidden, channels, 1),
        "b0": vector(t, hidden, 2),
        "w1": weight(t, c_out, hidden, 3),
        "b1": vector(t, c_out, 4),
    }
    check_operator(
        "block", sr_kernels.shift_conv_block, reference.shift_conv_block, inputs,
        backend="triton", gradient_atol=1e-5,
    )  # fmt: skip


# (N, heads, d, d_v, H, W, window, shift)
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 20, 20, 12, 12, (12, 12), (8, 8)),  # three tiles of queries, three of keys
        (1, 2, 3, 5, 9, 9, (9, 9), (-1, -4)),  # 81 tokens: a tile and a rest
        (1, 1, 1, 3, 12, 1, (6, 1), (-2, 0)),
        (2, 2, 5, 5, 2, 3, (1, 1), (1, 1)),
        (1, 1, 33, 17, 8, 6, (8, 6), (9, -14)),
        (0, 2, 5, 5, 4, 4, (2, 2), (1, 1)),
    ],
    ids=str,
)
def test_windows(size):
    n, heads, d, d_v, h, w, window, shift = size
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    inputs = {
        "q": make_tensor((n, heads * d, h, w)),
        "k": make_tensor((n, heads * d, h, w), seed=1),
        "v": make_tensor((n, heads * d_v, h, w), seed=2),
        "bias": make_tensor((rows, heads), seed=3),
    }
    check_operator(
        "window_attention", sr_kernels.window_attention, reference.window_attention, inputs,
        kwargs={"window": window, "shift": shift, "num_heads": heads, "mask": True},
        backend="triton", gradient_atol=1e-5,
    )  # fmt: skip


def test_keys_that_a_bias_of_minus_infinity_excludes():
    """144 tokens, and a query sees no key of five rows above its own or more: of the first tile of
    64 keys the last queries see none."""
    bias = make_tensor((23, 23, 1), seed=3)
    bias[11 + 5 :] = -torch.inf
    inputs = {name: make_tensor((1, 3, 12, 12), seed=i) for i, name in enumerate("qkv")}
    check_operator(
        "window_attention", sr_kernels.window_attention, reference.window_attention,
        {**inputs, "bias": bias.flatten(0, 1)}, kwargs={"window": 12}, backend="triton",
        gradient_atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_of_an_empty_batch(name):
    case = CASES[name]
    inputs = case.inputs(0, *size_of(name)[1:])
    out, *gradients = case.results(inputs)
    assert out.shape[0] == 0
    assert len(gradients) == (0 if case.inference else len(inputs))
    for tensor, gradient in zip(inputs.values(), gradients, strict=False):
        assert bitwise_equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("mask", [False, True])
def test_shared_keys(mask):
    q = make_tensor((1, 10, 4, 10))
    inputs = {"q": q, "k": q, "v": make_tensor((1, 14, 4, 10), seed=2)}
    check_operator(
        "shared keys", sr_kernels.window_attention, reference.window_attention, inputs,
        kwargs={"window": (2, 5), "shift": (1, 2), "num_heads": 2, "mask": mask},
        backend="triton", gradients=[("q",), ("v",), ("q", "v")], gradient_atol=1e-5,
    )  # fmt: skip


def test_three_reuses_accumulate_gradients():
    options = {"depth": 3, "windows": (2, 4)}
    CASES["grouped"].check(1, 4, 4, options=options, gradient_atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "dtype"),
    # Stock's scores overflow in float16 at 47,000; ours are float32.
    [(877.0, dtype) for dtype in DTYPES] + [(47000.0, torch.float32), (47000.0, torch.bfloat16)],
)
def test_extreme_scores(norm, dtype):
    """|q|^2 = 877 is in trained weights, 47,000 in untrained ones. Reuse must not lose the digits
    that the log-sum-exp has lost."""
    qv = make_tensor((1, 12, 4, 4), torch.float64)
    qv[:, :6] *= (norm / qv[:, :6].square().sum(1, keepdim=True).mean()).sqrt()
    inputs = {"qv": qv.to(dtype), "values": make_tensor((1, 6, 4, 4), dtype, seed=1)}
    check_operator(
        "extreme", grouped_with_reuse(sr_kernels), grouped_with_reuse(reference), inputs,
        kwargs={"windows": (4,)}, backend="triton", gradients=None,
    )  # fmt: skip


def test_reuse_recovers_the_digits_that_the_log_sum_exp_has_lost():
    """A row's weights sum to one. With 16 equal keys lse is 47,000 + log 16, which float32 rounds
    to a multiple of 2^-8."""
    qv = make_tensor((1, 12, 4, 4))
    qv[:, :6] = qv[:, :6, :1, :1]
    qv[:, :6] *= (47000 / qv[:, :6].square().sum(1, keepdim=True)).sqrt()
    _, scores = sr_kernels.grouped_window_attention(
        qv, windows=(4,), return_scores=True, backend="triton"
    )
    ones = torch.ones(1, 6, 4, 4, device=DEVICE)
    out = sr_kernels.apply_window_scores(scores, ones, backend="triton")
    torch.testing.assert_close(out, ones, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [n for n in CASES if n not in WINDOWED])
def test_nan_and_inf_pass_as_in_the_definition(name, value):
    case = CASES[name]
    inputs = case.inputs(2, 5, 7, torch.float32, "contiguous")
    inputs["x"][0, 3, 2, 4] = value
    ours = case.function(sr_kernels)(**inputs, **case.options, backend="triton")
    # In float64: with AVX-512, stock's GELU of infinity is a NaN in float32.
    double = {k: v if v is None else v.double() for k, v in inputs.items()}
    definition = case.function(reference)(**double, **case.options)
    assert torch.equal(ours.isnan(), definition.isnan())
    assert torch.equal(ours.isinf(), definition.isinf())


def test_a_nan_stays_in_its_window():
    qv = make_tensor((1, 6, 8, 8))
    clean = sr_kernels.grouped_window_attention(qv, windows=(4,), backend="triton")
    qv[0, 2, 5, 6] = float("nan")
    out = sr_kernels.grouped_window_attention(qv, windows=(4,), backend="triton")
    assert not out[:, :, 4:, 4:].isfinite().any()
    out[:, :, 4:, 4:] = clean[:, :, 4:, 4:]
    assert bitwise_equal(out, clean)


@pytest.mark.parametrize("name", ["spatial", "pixel_spatial"])
def test_channels_that_share_the_maximum(name):
    """Their gradients are equal parts of it: whole numbers, of which many are."""
    case = CASES[name]
    inputs = case.inputs(1, 3, 4, torch.float32, "contiguous")
    inputs["x"] = inputs["x"].clamp(-1, 1).round()
    if name == "pixel_spatial":  # equal channels, so that the product's are equal too
        inputs["x"] = inputs["x"][:, :1].expand(1, 13, 3, 4).contiguous()
        inputs["pixel_weight"][:] = inputs["pixel_weight"][:1]
        inputs["pixel_bias"][:] = 0.5
    check_operator(
        name, case.function(sr_kernels), case.function(reference), inputs, backend="triton",
        gradients=[("x",)], gradient_atol=1e-5,
    )  # fmt: skip


@on_cpu
def test_a_constant_channel_has_no_deviation():
    inputs = CASES["channel_contrast"].inputs(1, 5, 7)
    inputs["x"][:, 4] = 0.1
    leaves = {key: tensor.requires_grad_() for key, tensor in inputs.items()}

    def gradient(module, **backend):
        out = module.channel_attention(**leaves, statistic="contrast", **backend)
        return torch.autograd.grad(out.sum(), leaves["x"])[0]

    ours = gradient(sr_kernels, backend="triton")
    theirs = gradient(sr_kernels, backend="cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "attention", "spatial", "channel_contrast"])
def test_the_same_bits_every_time(name):
    CASES[name].check(*size_of(name), repeats=2)


def test_expanded_gradient():
    """Strides of 0: what sum().backward() sends."""
    x = make_tensor((1, 13, 3, 4), requires_grad=True)
    w = weight(torch.float32, 13, 13, 1).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        out = sr_kernels.shift_conv2d(x, w, backend=backend)
        results.append(torch.autograd.grad(out.sum(), (x, w)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.unpoisoned
def test_offsets_beyond_2_to_31():
    """A stride that fits 32 bits, and whose multiples do not: 6 GiB of addresses, of which four
    pages are touched."""
    stride = 2**30 + 16
    memory = torch.empty(3 * stride + 16, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((1, 4, 2, 3), (0, stride, 3, 1))
    x.copy_(make_tensor((1, 4, 2, 3), torch.float16))
    eye = torch.eye(4, dtype=torch.float16, device=DEVICE).reshape(4, 4, 1, 1)
    out = sr_kernels.shift_conv2d(x, eye, pattern="none", backend="triton")
    assert torch.equal(out, x)


def test_an_attention_block_without_shift_or_scores():
    x, w_in, b_in, w_out, b_out, _, _ = CASES["attention_block"].inputs(1, 4, 4).values()
    inputs = {"x": x, "w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}
    check_operator(
        "block", sr_kernels.grouped_attention_block, reference.grouped_attention_block, inputs,
        kwargs={"windows": (2, 4)}, backend="triton", gradients=None,
    )  # fmt: skip
    y, _ = sr_kernels.grouped_attention_block(
        **inputs, windows=(2, 4), return_scores=True, backend="triton"
    )
    alone = sr_kernels.grouped_attention_block(**inputs, windows=(2, 4), backend="triton")
    assert bitwise_equal(alone, y)


@pytest.mark.parametrize("channels", [(1, 3), (3, 52), (67, 5)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_channels_of_conv3x3(channels, activation):
    c_in, c_out = channels
    inputs = {
        "x": make_tensor((1, c_in, 4, 5), layout="channels_last"),
        "weight": make_tensor((c_out, c_in, 3, 3), seed=1, scale=(9 * c_in) ** -0.5),
        "bias": vector(torch.float32, c_out, 2),
    }
    check_operator(
        "conv3x3", sr_kernels.conv3x3, reference.conv3x3, inputs,
        kwargs={"activation": activation}, backend="triton", gradients=None, atol=1e-6,
    )  # fmt: skip


def test_outputs_in_memory_that_is_given():
    x = make_tensor((1, 6, 4, 8))
    given, queries = torch.empty_like(x), torch.empty_like(x)
    w0, w1, w_in = (weight(torch.float32, *size, 1) for size in ((7, 6), (6, 7), (12, 6)))
    w = weight(torch.float32, 6, 6, 2)

    def results(**options):
        first = options.get("out")
        yield sr_kernels.shift_conv_block(x, w0, None, w1, None, backend="triton", **options)
        pair = {} if first is None else {"out": (first, queries)}
        y, scores = sr_kernels.grouped_attention_block(
            x, w_in, None, w, None, windows=(2, 4), return_scores=True, backend="triton", **pair
        )
        yield y
        yield sr_kernels.apply_grouped_attention_block(
            scores, x, w, None, w, None, backend="triton", **options
        )

    for expected, actual in zip(list(results()), results(out=given), strict=True):
        assert actual is given
        assert bitwise_equal(given, expected)


@on_cpu
def test_scores_of_a_block_belong_to_their_backend():
    x = make_tensor((1, 6, 4, 4))
    w_in, w = weight(torch.float32, 12, 6, 1), weight(torch.float32, 6, 6, 2)
    _, scores = sr_kernels.grouped_attention_block(
        x, w_in, None, w, None, windows=(2, 4), return_scores=True, backend="cpu"
    )
    with pytest.raises(RuntimeError, match="'triton' cannot apply these scores"):
        sr_kernels.apply_grouped_attention_block(scores, x, w, None, w, None, backend="triton")


# ------------------------------------------------------------------------------ torch


def operator_arguments():
    """Arguments of every forward operator, by its name."""

    def tensors(name, *size, layout="contiguous"):
        return tuple(CASES[name].inputs(*size, layout=layout).values())

    conv, block = tensors("conv", 1, 3, 4), tensors("block", 1, 3, 4, layout="channels_last")
    q, k, v, _, bias = tensors("attention", 1, 2, 5)
    qv, values = tensors("grouped", 1, 4, 4, layout="channels_last")
    window = (2, 5, 1, 1, 2, 0.7, True)
    ops = torch.ops.sr_kernels_triton
    with torch.no_grad():
        sr_kernels.shift_conv2d(*conv[:3], backend="triton")  # registers the operators
        lse = ops.window_attention(q, k, v, bias, *window)[1]
        grouped_lse = ops.grouped_window_attention(qv, [2, 4], True)[1]
    channel = tensors("gate_mean", 1, 3, 4)
    conv3x3 = tensors("conv3x3", 1, 3, 4, layout="channels_last")
    a, w_in, b_in, w_out, b_out, w_v, b_v = tensors(
        "attention_block", 1, 4, 4, layout="channels_last"
    )
    groups = ([2, 4], True)
    x, w, b, residual, gate = tensors("gated_conv", 1, 3, 4)
    return {
        "shift_conv2d": (*conv, 1, 0.05, 0, 5),
        "shift_conv_block": (*block, 1, 0.05, True, 0, 5),
        "window_attention": (q, k, v, bias, *window),
        "apply_window_scores": (q, k, lse, v, bias, *window),
        "grouped_window_attention": (qv, [2, 4], True),
        "apply_grouped_window_scores": (qv, grouped_lse, values, [2, 4], True),
        "pixel_attention": tensors("pixel", 1, 3, 4),
        "spatial_attention": tensors("spatial", 1, 3, 4),
        "pixel_spatial_attention": tensors("pixel_spatial", 1, 3, 4),
        "channel_gate": (*channel, 1),
        "channel_attention": (*channel, 1),
        "gated_conv1x1": (x, gate, w, b, residual),
        "conv3x3": (*conv3x3, 2, 0.05),
        "grouped_attention_block": (a, w_in, b_in, w_out, b_out, *groups, True),
        "apply_grouped_attention_block": (
            a, a.contiguous(), w_v, b_v, w_out, b_out, *groups,
        ),
    }  # fmt: skip


INFERENCE = ("conv3x3", "grouped_attention_block", "apply_grouped_attention_block")
OPERATORS = (
    *("shift_conv2d", "shift_conv_block", "window_attention", "apply_window_scores"),
    *("grouped_window_attention", "apply_grouped_window_scores", "pixel_attention"),
    *("spatial_attention", "pixel_spatial_attention", "channel_gate", "channel_attention"),
    *("gated_conv1x1", *INFERENCE),
)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    arguments = operator_arguments()[name]
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.shape[1:2] != (2,):
            argument.requires_grad_(name not in INFERENCE)
    # The log-sum-exp is no leaf that gets a gradient.
    if name.startswith("apply") and name not in INFERENCE:
        at = 2 if name == "apply_window_scores" else 1
        arguments[at].requires_grad_(False)
    operator = getattr(torch.ops.sr_kernels_triton, name).default
    torch.library.opcheck(operator, arguments)


class Collect(TorchDispatchMode):
    """The calls of this package's Triton operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "sr_kernels_triton":
            self.calls[function] = arguments
        return function(*arguments, **(options or {}))


def test_opcheck_of_the_backward_operators():
    seen = set()
    for name, case in CASES.items():
        if case.inference:
            continue
        leaves = case.inputs(*smallest_of(name), torch.float32, "channels_last")
        for leaf in leaves.values():
            leaf.requires_grad_()
        with Collect() as collected:
            out = case.function(sr_kernels)(**leaves, **case.options, backend="triton")
            torch.autograd.grad(out.square().sum(), list(leaves.values()))
        for function, arguments in collected.calls.items():
            if function.__name__.split(".")[0].endswith("_backward") and function not in seen:
                torch.library.opcheck(
                    function, arguments, test_utils=("test_schema", "test_faketensor")
                )
                seen.add(function)
    names = {function.__name__.split(".")[0] for function in seen}
    assert names == {name for name in DECLARED if name.endswith("_backward")}


@on_cpu
def test_schemas_are_those_of_the_compiled_operators():
    sr_kernels.backends.can_run("triton", "shift_conv2d", (torch.ones(1),))
    for name in DECLARED:
        ours = getattr(torch.ops.sr_kernels_triton, name).default._schema
        theirs = getattr(torch.ops.sr_kernels, name).default._schema
        kinds = [
            [(a.name, str(a.type).replace("SymInt", "int")) for a in schema.arguments]
            for schema in (ours, theirs)
        ]
        assert kinds[0] == kinds[1], name
        assert len(ours.returns) == len(theirs.returns)


@ALL
def test_compile_fullgraph_and_train(name):
    case = CASES[name]
    leaves = case.inputs(*smallest_of(name), torch.float32, "channels_last")
    for leaf in leaves.values():
        leaf.requires_grad_(not case.inference)

    def run(**tensors):
        return case.function(sr_kernels)(**tensors, **case.options, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        out = function(**leaves)
        results.append([out])
        if not case.inference:
            results[-1] += torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(map(bitwise_equal, *results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ALL
def test_autocast(name, dtype):
    """On numbers that the narrow dtype holds: stock does not cast what it takes a maximum of. Our
    gradients are rounded to it (in bfloat16 the interpreter cuts them off), stock's may be not."""
    inputs = CASES[name].inputs(*smallest_of(name), dtype)
    leaves = {key: tensor.float() for key, tensor in inputs.items()}
    CASES[name].check_inputs(leaves, autocast=dtype, gradient_atol=8 * torch.finfo(dtype).eps)


def test_the_backward_uses_the_backend_of_its_forward(monkeypatch):
    x = make_tensor((1, 13, 3, 4), requires_grad=True)
    y = sr_kernels.pixel_attention(x, weight(torch.float32, 13, 13, 1), backend="triton")
    from sr_kernels.triton import _launch, attention_gates, shift_conv

    started = []

    def note(kernel, *arguments, **options):
        started.append(kernel.__name__)
        _launch.launch(kernel, *arguments, **options)

    for module in (shift_conv, attention_gates):
        monkeypatch.setattr(module, "launch", note)
    y.sum().backward()
    assert "input_gradient_kernel" in started


def test_second_derivative_says_what_to_do():
    x = make_tensor((1, 5, 2, 3), requires_grad=True)
    out = sr_kernels.shift_conv2d(x, weight(torch.float32, 5, 5, 1), backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.sum().backward()


@pytest.mark.unpoisoned
def test_an_image_of_2_to_31_pixels_is_an_error():
    x = make_tensor((1, 1, 1, 1), torch.float16).expand(1, 1, 1, 2**31)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 pixels.* 1 x 2147483648"):
        sr_kernels.shift_conv2d(x, weight(torch.float16, 1, 1, 1), backend="triton")


def test_a_batch_beyond_the_grid_is_an_error():
    x = make_tensor((1, 5, 1, 1)).expand(65536, 5, 1, 1)
    with pytest.raises(RuntimeError, match="65535 images or heads at once, and these are 65536"):
        sr_kernels.shift_conv2d(x, weight(torch.float32, 5, 5, 1), backend="triton")


def test_what_triton_does_not_take():
    x = make_tensor((1, 5, 2, 3), torch.float64)
    with pytest.raises(RuntimeError, match=r"float64 is not supported \(triton has float32"):
        sr_kernels.shift_conv2d(x, x.new_ones(5, 5, 1, 1), backend="triton")


@on_cpu
def test_auto_does_not_take_the_interpreter_for_cpu_tensors():
    assert sr_kernels.backends.choose("shift_conv2d", (make_tensor((1, 5, 2, 3)),)) == "cpu"
    rows = {name: rest for name, *rest in sr_kernels.backends.report()}
    assert rows["triton"][0]
    assert "interpreted" in rows["triton"][1]


@on_cpu
def test_a_small_elan():
    """A whole network, forward and backward, as a user would run it."""
    from sr_kernels.models import ELAN

    torch.manual_seed(0)
    model = ELAN(scale=2, m_elan=2, c_elan=12, n_share=1, window_sizes=(2, 4)).eval()
    x = torch.rand(1, 3, 8, 8) * 255
    results = []
    for backend in ("triton", "cpu"):
        with sr_kernels.use_backend(backend):
            out = model(x)
        leaves = [p for p in model.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.mean(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@on_cpu
@pytest.mark.parametrize("name", ["elan", "mafdn"])
def test_plans(name):
    """A network made ready for inference, every operator of it in Triton, against the network."""
    from sr_kernels import models

    torch.manual_seed(0)
    if name == "elan":
        model = models.elan(2, m_elan=2, c_elan=12, n_share=1, window_sizes=(2, 4), rgb_range=1.0)
        used = {"shift_conv_block", "grouped_attention_block", "apply_grouped_attention_block"}
    else:
        model = models.mafdn(2, channels=12, num_blocks=1, reduction=3)
        used = {"pixel_spatial_attention", "channel_gate", "gated_conv1x1", "shift_conv2d"}
    model = model.eval()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        model.backend = "reference"
        expected = model(x)
        planned = models.plan(model)
        planned.backend = "triton"
        with Collect() as collected:
            actual = planned(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert {f.__name__.split(".")[0] for f in collected.calls} == {*used, "conv3x3"}


def test_every_forward_operator_is_tested():
    assert {name for name in DECLARED if not name.endswith("_backward")} == set(OPERATORS)
