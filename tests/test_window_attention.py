"""window_attention, grouped_window_attention and the reuse of their scores against their
definition, and as citizens of torch."""

import itertools
import math
import weakref

import pytest
import torch
from choices import FLOATS, LAYOUTS
from threads import threads
from window_attention_cases import (
    SIZES,
    allow_float64_rounding,
    attention_inputs,
    attention_with_reuse,
    check_attention,
    check_grouped,
    grouped_with_reuse,
)

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, check_operator, make_tensor

# ------------------------------------------------------------------------------ the operators


@pytest.mark.smoke
@pytest.mark.asan
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (-1, 1)])
def test_attention_is_the_formula(shift, mask):
    """Pixel by pixel in plain Python: rolled positions, sides of the image, bias, softmax."""
    heads, d, (height, width), (wh, ww) = 2, 3, (4, 6), (2, 3)
    inputs = attention_inputs(1, heads, d, d, height, width, (wh, ww), torch.float64)
    q, k, v, bias = (tensor.tolist() for tensor in inputs.values())
    expected = torch.zeros(1, heads * d, height, width, dtype=torch.float64)
    pixels = list(itertools.product(range(height), range(width)))

    def place(pixel):
        """Window, position in it, and the side of the image, after torch.roll by -shift."""
        rolled = [(pixel[i] - shift[i]) % (height, width)[i] for i in (0, 1)]
        side = [(rolled[i] + shift[i]) // (height, width)[i] for i in (0, 1)]
        return (rolled[0] // wh, rolled[1] // ww), (rolled[0] % wh, rolled[1] % ww), side

    for head, i in itertools.product(range(heads), pixels):
        window_i, (ih, iw), side_i = place(i)
        channels = range(head * d, (head + 1) * d)
        scores = {}
        for j in pixels:
            window_j, (jh, jw), side_j = place(j)
            if window_i != window_j or (mask and side_i != side_j):
                continue
            row = (ih - jh + wh - 1) * (2 * ww - 1) + iw - jw + ww - 1
            products = sum(q[0][c][i[0]][i[1]] * k[0][c][j[0]][j[1]] for c in channels)
            scores[j] = products * d**-0.5 + bias[row][head]
        total = sum(math.exp(score) for score in scores.values())
        for c in channels:
            expected[0, c, i[0], i[1]] = sum(
                math.exp(score) / total * v[0][c][j[0]][j[1]] for j, score in scores.items()
            )
    for backend in ("cpu", "reference"):
        actual = sr_kernels.window_attention(
            **inputs, window=(wh, ww), shift=shift, num_heads=heads, mask=mask, backend=backend
        )
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_sizes_and_dtypes(size, dtype):
    *sizes, window, shift = size
    inputs = attention_inputs(*sizes, window, dtype)
    check_attention(inputs, window=window, shift=shift, heads=size[1], mask=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize(("mask", "shift"), [(False, (0, 0)), (False, (2, 3)), (True, (-2, 1))])
def test_attention_layouts_keys_and_masks(layout, shared_keys, mask, shift):
    inputs = attention_inputs(2, 2, 5, 7, 8, 12, (4, 6), layout=layout, bias=not shared_keys)
    if shared_keys:
        inputs["k"] = inputs["q"]
    wanted = [("q", "v")] if shared_keys else "together"
    check_attention(inputs, window=(4, 6), shift=shift, heads=2, mask=mask, gradients=wanted)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 3, 4, 6, 8, 10, 15, 16, 18])
def test_head_widths_in_channels_last(width, dtype):
    """Heads are gathered in squares that they fill: bit for bit the values of planes."""
    inputs = attention_inputs(2, 3, width, width, 8, 12, (4, 6), dtype)
    options = {"window": (4, 6), "shift": (2, 3), "num_heads": 3, "mask": True, "backend": "cpu"}
    planes = sr_kernels.window_attention(**inputs, **options)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    pixels = sr_kernels.window_attention(**inputs, **options)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert bitwise_equal(pixels, planes)


def test_mixed_layouts():
    q = make_tensor((1, 6, 4, 8), layout="channels_last", seed=0)
    k = make_tensor((1, 6, 4, 8), layout="sliced", seed=1)
    v = make_tensor((1, 9, 4, 8), layout="misaligned", seed=2)
    inputs = {"q": q, "k": k, "v": v}
    check_attention(inputs, window=(4, 4), heads=3, shift=(1, 1), memory_format=False)
    out = sr_kernels.window_attention(**inputs, window=4, num_heads=3, backend="cpu")
    assert out.is_contiguous()  # the memory format of v
    inputs["v"] = v.contiguous(memory_format=torch.channels_last)
    out = sr_kernels.window_attention(**inputs, window=4, num_heads=3, backend="cpu")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


@pytest.mark.parametrize("score_scale", [1.0, 0.37, -2.0, 0.0])
def test_attention_scale(score_scale):
    inputs = attention_inputs(1, 1, 4, 4, 6, 6, (3, 3), bias=False)
    if score_scale == 0:  # the gradients of q and k are exactly zero
        check_attention(inputs, window=(3, 3), score_scale=score_scale, gradients=[("v",)])
    else:
        check_attention(inputs, window=(3, 3), score_scale=score_scale)


@pytest.mark.smoke
def test_attention_every_subset_of_gradients():
    inputs = attention_inputs(1, 2, 3, 4, 4, 6, (2, 3))
    check_attention(inputs, window=(2, 3), shift=(1, 1), heads=2, mask=True, gradients="subsets")
    inputs = {**attention_inputs(1, 2, 3, 4, 4, 6, (2, 3)), "bias": None}
    check_attention(inputs, window=(2, 3), shift=(1, 1), heads=2, gradients="subsets")
    inputs = {**inputs, "k": inputs["q"]}
    check_attention(inputs, window=(2, 3), heads=2, gradients=[("q",), ("v",), ("q", "v")])


def test_mask_is_that_of_swin():
    """Swin's own construction: number the regions by slices, compare within windows."""
    size, window, shift = 16, 8, 3
    regions = torch.zeros(1, 1, size, size)
    slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate(itertools.product(slices, slices)):
        regions[:, :, rows, columns] = number

    def partition(x):
        x = x.reshape(x.shape[1], size // window, window, size // window, window)
        return x.permute(1, 3, 2, 4, 0).reshape(-1, window * window, x.shape[0])

    numbers = partition(regions)
    hidden = (numbers - numbers.mT) != 0
    q, k, v = (make_tensor((1, 4, size, size), torch.float64, seed=i) for i in range(3))
    qw, kw, vw = (partition(torch.roll(x, (-shift, -shift), (2, 3))) for x in (q, k, v))
    scores = (qw @ kw.mT / 2).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ vw
    out = out.reshape(size // window, size // window, window, window, 4)
    out = out.permute(4, 0, 2, 1, 3).reshape(1, 4, size, size)
    expected = torch.roll(out, (shift, shift), (2, 3))
    for backend in ("cpu", "reference"):
        actual = sr_kernels.window_attention(
            q, k, v, window=window, shift=shift, mask=True, backend=backend
        )
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_windows_of_one_pixel_return_the_values():
    q, k, v = (make_tensor((2, 6, 3, 5), seed=i) for i in range(3))
    out = sr_kernels.window_attention(q, k, v, window=1, num_heads=3, backend="cpu")
    assert bitwise_equal(out, v)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shifted", [False, True])
def test_grouped_as_in_elan(shifted, dtype):
    qv = make_tensor((1, 120, 16, 16), dtype, scale=0.5)
    check_grouped(qv, windows=(4, 8, 16), shifted=shifted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", [(2, 4, 6), (3,), (1, 12), (5, 5, 3, 3), (4, 3)], ids=str)
def test_grouped_layouts_and_windows(layout, windows):
    side = math.lcm(*windows)
    qv = make_tensor((2, 14 * len(windows), 2 * side, side), layout=layout, scale=0.5)
    check_grouped(qv, windows=windows, shifted=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_bands_of_groups_cover_all_windows(threads):
    """channels_last groups take turns band by band; each window's bits are those of planes."""
    qv = make_tensor((2, 48, 60, 24), scale=0.5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out, scores = sr_kernels.grouped_window_attention(
            qv, windows=(3, 4, 6, 12), shifted=True, return_scores=True, backend="cpu"
        )
        last, last_scores = sr_kernels.grouped_window_attention(
            qv.contiguous(memory_format=torch.channels_last),
            windows=(3, 4, 6, 12),
            shifted=True,
            return_scores=True,
            backend="cpu",
        )
    finally:
        torch.set_num_threads(before)
    assert bitwise_equal(last.contiguous(), out)
    assert bitwise_equal(last_scores.lse, scores.lse)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shared_keys", [False, True])
def test_reuse_accumulates_gradients(depth, shared_keys):
    inputs = attention_inputs(1, 2, 5, 5, 8, 8, (4, 4))
    inputs["values"] = make_tensor((1, 10, 8, 8), seed=4)
    wanted = [("q", "k", "v", "bias", "values")]
    if shared_keys:
        inputs["k"] = inputs["q"]
        wanted = [("q", "v", "bias", "values")]
    kwargs = {"window": 4, "shift": 2, "num_heads": 2, "mask": True, "depth": depth}
    check_operator(
        "reuse",
        attention_with_reuse(sr_kernels),
        attention_with_reuse(reference),
        inputs,
        kwargs=kwargs,
        gradients=wanted,
    )


@pytest.mark.asan
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_reuse_accumulates_gradients(depth, dtype):
    inputs = {
        "qv": make_tensor((1, 24, 8, 8), dtype),
        "values": make_tensor((1, 12, 8, 8), dtype, seed=1),
    }
    options = {}
    allow_float64_rounding(inputs, options)
    if dtype in (torch.float16, torch.bfloat16):
        options["gradients"] = None  # each use rounds its gradient before they add up
    check_operator(
        "grouped reuse",
        grouped_with_reuse(sr_kernels),
        grouped_with_reuse(reference),
        inputs,
        kwargs={"windows": (2, 4), "shifted": True, "depth": depth},
        **options,
    )


def spread_logits(qv, norm):
    """qv, of three groups of 20 + 20 channels, with |q| from 0 to norm in every window."""
    queries = qv.unflatten(1, (3, 2, 20))[:, :, 0]
    h, w = qv.shape[2:]
    length = torch.linspace(0, norm, h * w, dtype=qv.dtype).reshape(w, h).T
    queries *= length / queries.norm(dim=2, keepdim=True)
    return qv


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [4, 18, 60])
def test_joint_gradient_is_the_sum_of_two(norm, dtype, layout):
    """Of a layer and of a reuse of its scores, whose |q| go from 0 to norm in every window."""
    ops = torch.ops.sr_kernels
    settings = ([4, 8, 16], True)

    def joint_and_sum(qv, v, grad, reuse_grad):
        out, lse = ops.grouped_window_attention(qv, *settings)
        reuse_out = ops.apply_grouped_window_scores(qv, lse, v, *settings)
        joint = ops.grouped_window_attention_joint_backward(
            grad, qv, out, lse, reuse_grad, v, reuse_out, *settings
        )
        own = ops.grouped_window_attention_backward(grad, qv, out, lse, *settings)
        other, _ = ops.apply_grouped_window_scores_backward(
            reuse_grad, qv, lse, v, reuse_out, *settings, True, False
        )
        return joint, own + other

    qv = spread_logits(make_tensor((1, 120, 16, 32), layout=layout), norm)
    others = (make_tensor((1, 60, 16, 32), layout=layout, seed=seed) for seed in (1, 2, 3))
    inputs = [tensor.to(dtype) for tensor in (qv, *others)]
    joint, separate = joint_and_sum(*inputs)
    joint64, exact = joint_and_sum(*(tensor.double() for tensor in inputs))
    scale = exact.abs().max().item()
    torch.testing.assert_close(joint64, exact, rtol=0, atol=1e-12 * scale)
    assert joint.stride() == qv.stride()

    def error(actual):
        return (actual.double() - exact).abs().max().item()

    assert error(joint) <= 3 * error(separate) + torch.finfo(dtype).eps * scale


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of our operators that run inside, in order."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "sr_kernels":
            self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def test_the_first_reuse_leaves_its_gradient_to_the_layer_of_the_scores():
    leaves = {
        dtype: [
            make_tensor(shape, dtype, seed=seed, requires_grad=True)
            for seed, shape in enumerate([(1, 24, 8, 8), (1, 12, 8, 8), (1, 12, 8, 8)])
        ]
        for dtype in (torch.float32, torch.float64)
    }

    def outputs(qv, first, second, backend):
        options = {"windows": (4, 8), "shifted": True, "return_scores": True}
        out, scores = sr_kernels.grouped_window_attention(qv, **options, backend=backend)
        return [
            out,
            *(sr_kernels.apply_window_scores(scores, v, backend=backend) for v in (first, second)),
        ]

    ours = outputs(*leaves[torch.float32], "cpu")
    exact = outputs(*leaves[torch.float64], "reference")
    backward, reuse = "grouped_window_attention_backward", "apply_grouped_window_scores_backward"
    joint = "grouped_window_attention_joint_backward"
    qv, first, second = range(3)
    # Which outputs, which gradients and what must run. One graph for all: nothing that one leaves
    # may reach the next.
    for used, wanted, names in (
        ((0, 1, 2), (qv, first, second), [reuse, reuse, joint]),
        ((1,), (first,), [reuse]),
        ((0,), (qv,), [backward]),
        ((0, 2), (qv, second), [reuse, backward]),
        ((1,), (qv,), [reuse, joint]),
        ((0, 1), (qv, first), [reuse, joint]),
        ((0, 1), (qv, first), [reuse, joint]),
    ):
        found = []
        for results, dtype in ((ours, torch.float32), (exact, torch.float64)):
            loss = sum((results[i] * (i + 1)).square().sum() for i in used)
            inputs = [leaves[dtype][i] for i in wanted]
            with Calls() as calls:
                found.append(torch.autograd.grad(loss, inputs, retain_graph=True))
            assert sorted(calls.names) == (sorted(names) if results is ours else [])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["qv", "values", None])
def test_what_a_reuse_leaves_keeps_no_graph_alive(wanted):
    leaves = {
        "qv": make_tensor((1, 24, 8, 8), requires_grad=True),
        "values": make_tensor((1, 12, 8, 8), seed=1, requires_grad=True),
    }
    out, scores = sr_kernels.grouped_window_attention(
        2 * leaves["qv"], windows=(4, 8), return_scores=True, backend="cpu"
    )
    loss = sr_kernels.apply_window_scores(scores, out * leaves["values"], backend="cpu").sum()
    left = weakref.ref(scores.joint.left)
    if wanted is not None:
        torch.autograd.grad(loss, leaves[wanted])
    assert left() is not None
    del out, scores, loss
    assert left() is None


@pytest.mark.parametrize("grouped", [False, True])
def test_reuse_with_the_same_values_is_the_forward(grouped):
    if grouped:
        qv = make_tensor((1, 24, 8, 8))
        out, scores = sr_kernels.grouped_window_attention(
            qv, windows=(2, 4), return_scores=True, backend="cpu"
        )
        v = torch.cat(qv.chunk(4, 1)[1::2], 1)
    else:
        q, v = make_tensor((1, 12, 8, 8)), make_tensor((1, 12, 8, 8), seed=1)
        out, scores = sr_kernels.window_attention(
            q, q, v, window=4, num_heads=2, return_scores=True, backend="cpu"
        )
    assert bitwise_equal(sr_kernels.apply_window_scores(scores, v, backend="cpu"), out)


def test_log_sum_exp_belongs_to_the_pixel_of_its_query():
    qv = make_tensor((2, 12, 8, 12), requires_grad=True)
    _, scores = sr_kernels.grouped_window_attention(
        qv, windows=(4, 2), shifted=True, return_scores=True, backend="cpu"
    )
    assert scores.lse.shape == (2, 2, 8, 12)
    assert not scores.lse.requires_grad
    for group, window in enumerate((4, 2)):
        q = qv[:, 6 * group : 6 * group + 3].double()
        rolled = torch.roll(q, (-window // 2, -window // 2), (2, 3))
        tokens = rolled.unfold(2, window, window).unfold(3, window, window).flatten(4)
        products = torch.einsum("ncabi,ncabj->nabij", tokens, tokens).logsumexp(-1)
        lse = products.unflatten(-1, (window, window)).transpose(2, 3).reshape(2, 8, 12)
        expected = torch.roll(lse, (window // 2, window // 2), (1, 2))
        torch.testing.assert_close(scores.lse[:, group].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = attention_inputs(1, 2, 5, 5, 8, 8, (4, 4))
    check_attention(inputs, window=(4, 4), shift=(2, 2), heads=2, mask=True, autocast=dtype)
    check_grouped(make_tensor((1, 24, 8, 8), scale=0.5), windows=(2, 4), autocast=dtype)
    inputs = {"qv": make_tensor((1, 24, 8, 8), scale=0.5), "values": make_tensor((1, 12, 8, 8))}
    with torch.autocast("cpu", dtype):
        ours = grouped_with_reuse(sr_kernels)(**inputs, windows=(2, 4), depth=2, backend="cpu")
    assert ours.dtype == dtype
    oracle = grouped_with_reuse(reference)(**inputs, windows=(2, 4), depth=2)
    torch.testing.assert_close(ours.float(), oracle, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------ extreme scores


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", [877.0, 47000.0])
def test_extreme_scores(norm, dtype):
    """|q|^2 = 877 is in trained weights, 47,000 in untrained ones; a row is nearly one-hot."""
    d = 20
    qv = make_tensor((1, 2 * d, 16, 16), dtype)
    qv[:, :d] *= math.sqrt(norm / d)
    for window in (4, 8, 16):
        check_grouped(qv, windows=(window,), shifted=True, gradients=None)
        ours, oracle = qv.clone().requires_grad_(), qv.double().clone().requires_grad_()
        out = sr_kernels.grouped_window_attention(ours, windows=(window,), backend="cpu")
        assert out.isfinite().all()
        out.sum().backward()
        # Not against stock: in 16 bits its scores themselves overflow.
        reference.grouped_window_attention(oracle, windows=(window,)).sum().backward()
        assert ours.grad.isfinite().all()
        torch.testing.assert_close(ours.grad[:, d:], oracle.grad[:, d:].to(dtype))


def test_extreme_scores_with_close_rivals():
    """Rows whose largest scores are large and near one another: neither one-hot nor flat."""
    d = 20
    direction = make_tensor((1, d, 1, 1)) * math.sqrt(877 / d)
    qv = torch.cat((direction + make_tensor((1, d, 8, 8), scale=0.01, seed=1),
                    make_tensor((1, d, 8, 8), seed=2)), 1)  # fmt: skip
    check_grouped(qv, windows=(8,))
    check_operator(
        "reuse",
        grouped_with_reuse(sr_kernels),
        grouped_with_reuse(reference),
        {"qv": qv, "values": make_tensor((1, d, 8, 8), seed=3)},
        kwargs={"windows": (8,), "depth": 2},
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("mask", [False, True])
def test_nan_and_inf_pass_as_in_the_reference(value, place, mask):
    inputs = attention_inputs(1, 2, 3, 3, 8, 8, (4, 4))
    inputs[place][(0, 4, 3, 5) if place != "bias" else (7, 1)] = value
    options = {"window": 4, "shift": 1, "num_heads": 2, "mask": mask}
    ours = sr_kernels.window_attention(**inputs, **options, backend="cpu")
    stock = reference.window_attention(**inputs, **options)
    if (place, value) != ("bias", float("-inf")):  # which hides a key and nothing more
        assert not stock.isfinite().all()
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours.isposinf(), stock.isposinf())
    assert torch.equal(ours.isneginf(), stock.isneginf())
    finite = stock.isfinite()
    torch.testing.assert_close(ours[finite], stock[finite])


def test_a_bad_pixel_stays_in_its_window():
    qv = make_tensor((1, 12, 8, 8))
    clean = sr_kernels.grouped_window_attention(qv, windows=(4,), backend="cpu")
    qv[0, 2, 5, 6] = float("nan")
    out = sr_kernels.grouped_window_attention(qv, windows=(4,), backend="cpu")
    assert not out[:, :, 4:, 4:].isfinite().any()
    out[:, :, 4:, 4:] = clean[:, :, 4:, 4:]
    assert bitwise_equal(out, clean)


# ------------------------------------------------------------------------------ determinism


def all_gradients():
    inputs = attention_inputs(2, 2, 5, 5, 8, 16, (8, 8))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    q, k, v, bias = leaves
    qv = make_tensor((2, 24, 8, 16), requires_grad=True)
    options = {"return_scores": True, "backend": "cpu"}
    out, scores = sr_kernels.window_attention(
        q, k, v, window=8, shift=4, num_heads=2, bias=bias, mask=True, **options
    )
    again = sr_kernels.apply_window_scores(scores, out, backend="cpu")
    grouped, grouped_scores = sr_kernels.grouped_window_attention(qv, windows=(4, 8), **options)
    last = sr_kernels.apply_window_scores(grouped_scores, grouped, backend="cpu")
    loss = again.square().sum() + last.square().sum()
    return [again.detach(), last.detach(), *torch.autograd.grad(loss, [*leaves, qv])]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("count", [1, 2])
def test_bits_do_not_depend_on_threads_or_repetition(count):
    with threads(2):
        first = all_gradients()
    with threads(count):
        for _ in range(100 if count == 2 else 3):
            assert all(map(bitwise_equal, all_gradients(), first))


# ------------------------------------------------------------------------------ torch


def test_gradcheck():
    inputs = attention_inputs(1, 2, 1, 2, 2, 4, (2, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def attention(q, k, v, bias):
        out, scores = sr_kernels.window_attention(
            q, k, v, window=2, shift=(1, -1), num_heads=2, bias=bias, mask=True,
            return_scores=True, backend="cpu",
        )  # fmt: skip
        return sr_kernels.apply_window_scores(scores, out, backend="cpu")

    assert torch.autograd.gradcheck(attention, leaves)
    q, _, v, bias = leaves
    assert torch.autograd.gradcheck(lambda q, v, bias: attention(q, q, v, bias), (q, v, bias))


@pytest.mark.parametrize("depth", [1, 2])
def test_gradcheck_of_grouped_reuse(depth):
    qv = make_tensor((1, 4, 2, 4), torch.float64, requires_grad=True)
    values = make_tensor((1, 2, 2, 4), torch.float64, seed=1, requires_grad=True)

    def run(qv, values):
        return grouped_with_reuse(sr_kernels)(
            qv, values, windows=(1, 2), shifted=True, depth=depth, backend="cpu"
        )

    assert torch.autograd.gradcheck(run, (qv, values))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    ops = torch.ops.sr_kernels
    inputs = attention_inputs(2, 2, 3, 4, 4, 6, (2, 3), layout=layout)
    q, k, v, bias = (tensor.requires_grad_() for tensor in inputs.values())
    settings = (2, 3, 1, 1, 2, 0.7, True)
    lse = ops.window_attention(q, k, v, bias, *settings)[1]
    torch.library.opcheck(ops.window_attention.default, (q, k, v, bias, *settings))
    torch.library.opcheck(ops.window_attention.default, (q, None, v, None, *settings))
    torch.library.opcheck(ops.apply_window_scores.default, (q, k, lse, v, bias, *settings))
    qv = make_tensor((2, 16, 4, 8), layout=layout, requires_grad=True)
    values = make_tensor((2, 8, 4, 8), layout=layout, requires_grad=True)
    torch.library.opcheck(ops.grouped_window_attention.default, (qv, [2, 4], True))
    lse = ops.grouped_window_attention(qv, [2, 4], True)[1]
    torch.library.opcheck(ops.apply_grouped_window_scores.default, (qv, lse, values, [2, 4], True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_the_backwards(layout):
    ops = torch.ops.sr_kernels
    parts = ("test_schema", "test_faketensor")
    q, k, v, bias = attention_inputs(2, 2, 3, 4, 4, 6, (2, 3), layout=layout).values()
    settings = (2, 3, 1, 1, 2, 0.7, True)
    out, lse = ops.window_attention(q, k, v, bias, *settings)
    for needs in itertools.product([False, True], repeat=4):
        arguments = (out, q, k, lse, v, bias, *settings, *needs)
        torch.library.opcheck(ops.window_attention_backward.default, arguments, test_utils=parts)
    qv = make_tensor((2, 16, 4, 8), layout=layout)
    out, lse = ops.grouped_window_attention(qv, [2, 4], True)
    torch.library.opcheck(
        ops.grouped_window_attention_backward.default,
        (out, qv, out, lse, [2, 4], True),
        test_utils=parts,
    )
    torch.library.opcheck(
        ops.grouped_window_attention_joint_backward.default,
        (out, qv, out, lse, out, out, out, [2, 4], True),
        test_utils=parts,
    )
    for needs in itertools.product([False, True], repeat=2):
        torch.library.opcheck(
            ops.apply_grouped_window_scores_backward.default,
            (out, qv, lse, out, out, [2, 4], True, *needs),
            test_utils=parts,
        )


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [4, 18, 30])
def test_windows_whose_logits_spread(norm, dtype, layout):
    """|q| from 0 to norm in every window: one shift for its softmax, one a row, searched maxima."""
    qv = spread_logits(make_tensor((1, 120, 16, 32), dtype=dtype, layout=layout), norm)
    check_grouped(qv, windows=(4, 8, 16), shifted=True)


def network(qv, bias):
    """Both families, each with a reuse."""
    out, scores = sr_kernels.grouped_window_attention(qv, windows=(2, 4), return_scores=True)
    out = sr_kernels.apply_window_scores(scores, out)
    out, scores = sr_kernels.window_attention(
        out, out, out, window=4, shift=2, num_heads=2, bias=bias, mask=True, return_scores=True
    )
    return sr_kernels.apply_window_scores(scores, out)


def test_compile_without_graph_breaks_for_any_size():
    bias = make_tensor((49, 2), seed=5, requires_grad=True)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=count)
    for h, w in [(8, 8), (4, 16), (16, 12), (12, 20), (20, 4)]:
        qv = make_tensor((2, 16, h, w))
        torch.testing.assert_close(compiled(qv, bias), network(qv, bias))
    assert graphs <= 2, f"{graphs} graphs for five sizes"


def test_compiled_training_step():
    leaves = [make_tensor((1, 16, 8, 8), requires_grad=True)]
    leaves.append(make_tensor((49, 2), seed=5, requires_grad=True))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(network(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):  # compiled, uses of scores do not join
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_export_keeps_the_operators():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(make_tensor((49, 2), seed=5))

        def forward(self, qv):
            return network(qv, self.bias)

    module = Network()
    sizes = {2: 4 * torch.export.Dim("rows", min=2), 3: 4 * torch.export.Dim("columns", min=2)}
    qv = make_tensor((1, 16, 8, 12))
    program = torch.export.export(module, (qv,), dynamic_shapes=[sizes])
    for name in ("grouped_window_attention", "apply_grouped_window_scores", "window_attention"):
        assert f"sr_kernels.{name}" in program.graph_module.code
    other = make_tensor((1, 16, 16, 8))
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("grouped", [False, True])
def test_second_derivative_says_what_to_do(grouped):
    x = make_tensor((1, 8, 4, 4), requires_grad=True)
    if grouped:
        out = sr_kernels.grouped_window_attention(x, windows=(2, 4), backend="cpu")
    else:
        out = sr_kernels.window_attention(x, x, x, window=2, backend="cpu")
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.sum().backward()


def test_more_threads_than_windows():
    with threads(7):
        check_attention(attention_inputs(1, 1, 13, 13, 8, 8, (8, 4)), window=(8, 4))


# ------------------------------------------------------------------------------ bad input

X = make_tensor((1, 12, 8, 8))


def attend(q=X, k=X, v=X, **options):
    return sr_kernels.window_attention(q, k, v, **{"window": 4, **options})


def attend_in_groups(qv=X, **options):
    return sr_kernels.grouped_window_attention(qv, **{"windows": (2, 4), **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attend(q=[1.0]), TypeError, "q must be a torch.Tensor"),
        (lambda: attend(q=X[0]), ValueError, "q must have 4 dimensions"),
        (lambda: attend(k=None), TypeError, "k must be a torch.Tensor"),
        (lambda: attend(k=X[:, :6]), ValueError, "k must have"),
        (lambda: attend(v=X[:, :, :4]), ValueError, "v must have"),
        (lambda: attend(v=X.double()), TypeError, "v must have the dtype"),
        (lambda: attend(v=X.to("meta")), ValueError, "on the device of q"),
        (lambda: attend(q=X.int()), TypeError, "q must be float32"),
        (lambda: attend(num_heads=5), ValueError, "num_heads"),
        (lambda: attend(num_heads=0), ValueError, "num_heads must be at least 1"),
        (lambda: attend(num_heads=2.0), TypeError, "num_heads must be an integer"),
        (lambda: attend(window=3), ValueError, "window 3x3 does not divide"),
        (lambda: attend(window=(4, 16)), ValueError, "window 4x16 does not divide"),
        (lambda: attend(window=0), ValueError, "window must be at least 1"),
        (lambda: attend(window=-4), ValueError, "window must be at least 1"),
        (lambda: attend(window=4.0), TypeError, "window must be an integer"),
        (lambda: attend(window=(4, 4, 4)), ValueError, "window must be an integer or"),
        (lambda: attend(shift="a"), TypeError, "shift must be an integer"),
        (lambda: attend(mask=1), TypeError, "mask must be True or False"),
        (lambda: attend(scale="a"), TypeError, "scale must be a number"),
        (lambda: attend(bias=X), ValueError, "bias must have shape"),
        (lambda: attend(bias=torch.zeros(48, 1)), ValueError, "bias must have shape"),
        (lambda: attend(bias=torch.zeros(49, 1).half()), TypeError, "bias must have the dtype"),
        (lambda: attend(return_scores=1), TypeError, "return_scores must be True or False"),
        (lambda: attend(backend="gpu"), ValueError, "backend must be one"),
        (lambda: attend(backend="cuda"), RuntimeError, "cannot run"),
        (lambda: attend_in_groups(qv=X[:, :11]), ValueError, "qv must have an even number"),
        (lambda: attend_in_groups(windows=(2, 4, 8, 2)), ValueError, "equal groups"),
        (lambda: attend_in_groups(windows=(2, 3)), ValueError, "window 3x3 does not divide"),
        (lambda: attend_in_groups(windows=(2, 0)), ValueError, "windows must be at least 1"),
        (lambda: attend_in_groups(windows=()), TypeError, "windows must be a non-empty"),
        (lambda: attend_in_groups(windows=4), TypeError, "windows must be a non-empty"),
        (lambda: attend_in_groups(shifted=2), TypeError, "shifted must be True or False"),
        (lambda: sr_kernels.apply_window_scores(X, X), TypeError, "scores must be WindowScores"),
        (
            lambda: sr_kernels.apply_window_scores(attend(return_scores=True)[1], X[:, :, :4]),
            ValueError,
            "v must have",
        ),
        (
            lambda: sr_kernels.apply_window_scores(attend_in_groups(return_scores=True)[1], X),
            ValueError,
            "v must have shape",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


LSE = torch.zeros(1, 1, 8, 8)
ATTENTION = torch.ops.sr_kernels.window_attention
APPLY = torch.ops.sr_kernels.apply_window_scores
GROUPED = torch.ops.sr_kernels.grouped_window_attention
BACKWARD = torch.ops.sr_kernels.window_attention_backward
GROUPED_BACKWARD = torch.ops.sr_kernels.grouped_window_attention_backward
JOINT = torch.ops.sr_kernels.grouped_window_attention_joint_backward
HALF = X[:, :6]


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        (ATTENTION, (X[0], None, X, None, 4, 4, 0, 0, 1, 1.0, False), "q must be"),
        (ATTENTION, (X, X[:, :6], X, None, 4, 4, 0, 0, 1, 1.0, False), "k must have shape"),
        (ATTENTION, (X, None, X[:, :, :4], None, 4, 4, 0, 0, 1, 1.0, False), "v must have shape"),
        (ATTENTION, (X, None, X, None, 3, 4, 0, 0, 1, 1.0, False), "does not divide"),
        (ATTENTION, (X, None, X, None, 0, 4, 0, 0, 1, 1.0, False), "window must be positive"),
        (ATTENTION, (X, None, X, None, 4, 4, 0, 0, 5, 1.0, False), "num_heads"),
        (ATTENTION, (X, None, X, None, 4, 4, 0, 0, 0, 1.0, False), "num_heads must be positive"),
        (ATTENTION, (X, None, X, X, 4, 4, 0, 0, 1, 1.0, False), "bias must have shape"),
        (ATTENTION, (X, None, X.double(), None, 4, 4, 0, 0, 1, 1.0, False), "v must have the dty"),
        (APPLY, (X, None, LSE[..., 1:], X, None, 4, 4, 0, 0, 1, 1.0, False), "lse must have shape"),
        (APPLY, (X, None, LSE.half(), X, None, 4, 4, 0, 0, 1, 1.0, False), "lse must be float32"),
        (GROUPED, (X, [], False), "windows must not be empty"),
        (GROUPED, (X, [2, 3], False), "does not divide"),
        (GROUPED, (X, [2, 4, 4, 4, 4], False), "positive multiple of"),
        (GROUPED_BACKWARD, (X, X, X, LSE, [4], False), "grad must have shape"),
        (GROUPED_BACKWARD, (X[:, :6], X, X, LSE, [4], False), "out must have shape"),
        (JOINT, (HALF, X, HALF, LSE, X, HALF, HALF, [4], False), "reuse_grad must have shape"),
        (JOINT, (HALF, X, HALF, LSE, HALF, X, HALF, [4], False), "reuse_v must have shape"),
        (JOINT, (HALF, X, HALF, LSE, HALF, HALF, HALF.double(), [4], False), "reuse_out must have"),
        (
            BACKWARD,
            (X, X, None, LSE, X, None, 4, 4, 0, 0, 1, 1.0, False, True, True, True, False),
            "need_k is set",
        ),
    ],
)
def test_the_operator_itself_checks_too(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments)


def test_scores_of_the_reference_follow_the_choice_of_backend():
    """They hold no log-sum-exp: free to choose, the reference applies them; by name, an error."""
    qv, v = make_tensor((1, 12, 8, 8)), make_tensor((1, 6, 8, 8), seed=1)
    _, scores = sr_kernels.grouped_window_attention(
        qv, windows=(4, 8), return_scores=True, backend="reference"
    )
    assert scores.lse is None
    free = sr_kernels.apply_window_scores(scores, v)
    assert torch.equal(sr_kernels.apply_window_scores(scores, v, backend="auto"), free)
    with pytest.raises(RuntimeError, match="hold no log-sum-exp"):
        sr_kernels.apply_window_scores(scores, v, backend="cpu")
    with (
        sr_kernels.use_backend("cpu"),
        pytest.raises(RuntimeError, match="hold no log-sum-exp"),
    ):
        sr_kernels.apply_window_scores(scores, v)


def test_no_pixels_give_a_zero_bias_gradient():
    q = torch.zeros(1, 4, 0, 8, requires_grad=True)
    bias = make_tensor((49, 2)).requires_grad_()
    out = sr_kernels.window_attention(q, q, q, window=4, num_heads=2, bias=bias, backend="cpu")
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert torch.equal(gradient, torch.zeros_like(bias))


@pytest.mark.parametrize("shifted", [False, True])
def test_a_window_of_large_logits_leaves_its_neighbours_alone(shifted):
    """Windows of a row are gathered together; one whose |q|^2 is too large is done by itself."""
    ops = torch.ops.sr_kernels
    settings = ([4], shifted)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 16, 8, 64, generator=generator)
    grad = torch.randn(1, 8, 8, 64, generator=generator)
    large = small.clone()
    start = 8 + (2 if shifted else 0)  # the third window of the row
    inside = (..., slice(start - 8, start - 4), slice(start, start + 4))
    large[:, :8][inside] *= 30
    results = []
    for qv in (small, large):
        out, lse = ops.grouped_window_attention(qv, *settings)
        results.append(ops.grouped_window_attention_backward(grad, qv, out, lse, *settings))
    before, after = results
    qv = large.double().requires_grad_()
    with sr_kernels.use_backend("reference"):
        y = sr_kernels.grouped_window_attention(qv, windows=(4,), shifted=shifted)
    (oracle,) = torch.autograd.grad(y, qv, grad.double())
    torch.testing.assert_close(after[inside].double(), oracle[inside], rtol=1e-4, atol=1e-3)
    before[inside] = after[inside] = 0
    assert torch.equal(before, after)
