"""Window attention's CUDA kernels, run on the CPU, against the definition in float64."""

import pytest
import torch
from choices import DTYPES, LAYOUTS
from emulated import emulated, run_sanitized
from window_attention_cases import (
    SIZES,
    attention_inputs,
    attention_with_reuse,
    check_attention,
    check_grouped,
    grouped_with_reuse,
)

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal, check_operator, make_tensor

OPERATORS = [
    "window_attention",
    "apply_window_scores",
    "window_attention_backward",
    "grouped_window_attention",
    "grouped_window_attention_backward",
    "apply_grouped_window_scores",
    "apply_grouped_window_scores_backward",
]
# Heads of more than 64 channels, windows of more tokens than a block has rows, and one whose bias
# gradient does not fit in shared memory.
LARGE = [
    (1, 1, 128, 100, 10, 14, (10, 7), (3, 0)),
    (1, 1, 48, 31, 9, 8, (9, 8), (4, 0)),
    (1, 1, 3, 3, 2, 90, (2, 90), (0, 7)),
    (1, 1, 4, 4, 5, 300, (1, 300), (2, 9)),
]


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("window_attention")
    module.set_schedule("shuffled", 0)
    with emulated(module, OPERATORS):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [size for size in SIZES if size[0] > 0] + LARGE, ids=str)
def test_sizes_and_dtypes(size, dtype):
    window, shift = size[6:]
    inputs = attention_inputs(*size[:6], window, dtype)
    check_attention(inputs, window=window, shift=shift, heads=size[1], mask=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize(("mask", "shift"), [(False, (0, 0)), (False, (2, 3)), (True, (-2, 1))])
def test_layouts_keys_and_masks(layout, shared_keys, mask, shift, dtype):
    inputs = attention_inputs(2, 2, 5, 4, 8, 12, (4, 6), dtype, layout, bias=not shared_keys)
    if shared_keys:
        inputs["k"] = inputs["q"]
    check_attention(inputs, window=(4, 6), shift=shift, heads=2, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shifted", [False, True])
def test_grouped_as_in_elan(shifted, layout, dtype):
    check_grouped(
        make_tensor((1, 120, 16, 16), dtype, layout=layout), windows=(4, 8, 16), shifted=shifted
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("windows", [(2, 4, 6), (3,), (1, 12), (6, 6, 3, 3, 2)], ids=str)
def test_grouped_windows(windows, dtype):
    qv = make_tensor((2, 2 * len(windows) * 3, 12, 12), dtype)
    check_grouped(qv, windows=windows, shifted=True)


@pytest.mark.parametrize("score_scale", [0.37, -2.0, 0.0])
def test_scale(score_scale):
    inputs = attention_inputs(1, 1, 6, 6, 4, 8, (4, 4))
    # Stock's error on two windows is a matter of luck: a few units in the last place are allowed.
    atol = 4 * torch.finfo(torch.float32).eps
    check_attention(inputs, window=(4, 4), score_scale=score_scale, atol=atol)


def test_every_subset_of_gradients():
    inputs = attention_inputs(1, 2, 3, 4, 4, 6, (2, 3))
    check_attention(inputs, window=(2, 3), shift=(1, 1), heads=2, mask=True, gradients="subsets")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("shared_keys", [False, True])
def test_reuse_accumulates_gradients(depth, shared_keys, dtype):
    inputs = attention_inputs(1, 2, 5, 4, 8, 8, (4, 4), dtype)
    inputs["values"] = make_tensor((1, 8, 8, 8), dtype, seed=9)
    if shared_keys:
        inputs["k"] = inputs["q"]
    check_operator(
        "apply_window_scores",
        attention_with_reuse(sr_kernels),
        attention_with_reuse(reference),
        inputs,
        kwargs={"window": 4, "shift": 1, "num_heads": 2, "mask": True, "depth": depth},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_grouped_reuse_accumulates_gradients(depth, dtype):
    qv = make_tensor((1, 18, 12, 12), dtype)
    check_operator(
        "apply_grouped_window_scores",
        grouped_with_reuse(sr_kernels),
        grouped_with_reuse(reference),
        {"qv": qv, "values": make_tensor((1, 9, 12, 12), dtype, seed=5)},
        kwargs={"windows": (2, 4, 12), "shifted": True, "depth": depth},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [877.0, 1e4])
def test_extreme_logits(logits, dtype):
    """|q|^2 of trained networks, and beyond."""
    d = 20
    qv = make_tensor((1, 6 * d, 16, 16), dtype)
    for group in range(3):
        qv[:, 2 * group * d : (2 * group + 1) * d] *= (logits / d) ** 0.5
    check_operator(
        "grouped_window_attention",
        grouped_with_reuse(sr_kernels),
        grouped_with_reuse(reference),
        {"qv": qv, "values": make_tensor((1, 3 * d, 16, 16), dtype, seed=5)},
        kwargs={"windows": (4, 8, 16), "shifted": True, "depth": 1},
        gradients=None,
    )
    check_grouped(qv, windows=(4, 8, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "v"])
@pytest.mark.parametrize("window", [4, 16])
def test_nan_and_inf_pass_as_in_the_reference(value, where, window):
    inputs = attention_inputs(1, 1, 5, 5, 16, 16, (window, window))
    inputs[where][0, 3, 2, 2] = value
    options = {"window": window, "shift": 1, "mask": True}
    ours = sr_kernels.window_attention(**inputs, **options, backend="cpu")
    stock = reference.window_attention(**inputs, **options)
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours.isinf(), stock.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(on_emulated_kernels, dtype):
    inputs = attention_inputs(2, 2, 5, 5, 16, 16, (8, 8), dtype)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    qv = make_tensor((1, 24, 16, 16), dtype).requires_grad_()
    results = []
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        on_emulated_kernels.set_schedule(order, seed)
        out = sr_kernels.window_attention(
            *leaves[:3], bias=leaves[3], window=8, shift=3, num_heads=2, mask=True, backend="cpu"
        )
        grouped = sr_kernels.grouped_window_attention(qv, shifted=True, backend="cpu")
        loss = out.float().square().sum() + grouped.float().square().sum()
        results.append([out, grouped, *torch.autograd.grad(loss, [*leaves, qv])])
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


# Bytes a block without a bias: more is a decision.
SHARED_BYTES = {
    "window_attention_kernel<float, 32>": 39936,
    "window_attention_kernel<float, 64>": 64512,
    "window_attention_kernel<float, 128>": 56832,
    "window_attention_kernel<__half, 32>": 36864,
    "window_attention_kernel<__half, 64>": 30720,
    "window_attention_kernel<__half, 128>": 55296,
    "window_gradient_kernel<float, 32>": 46080,
    "window_gradient_kernel<float, 64>": 78848,
    "window_gradient_kernel<float, 128>": 72192,
    "window_gradient_kernel<__half, 32>": 67584,
    "window_gradient_kernel<__half, 64>": 50176,
    "window_gradient_kernel<__half, 128>": 78848,
}


def test_shared_memory_is_within_the_table(on_emulated_kernels):
    found = on_emulated_kernels.shared_bytes()
    assert set(found) == set(SHARED_BYTES)
    for kernel, most in SHARED_BYTES.items():
        assert found[kernel] <= most, kernel


def test_a_head_that_is_too_wide_is_refused():
    x = make_tensor((1, 129, 2, 2))
    with pytest.raises(RuntimeError, match="heads of at most 128 channels"):
        sr_kernels.window_attention(x, x, x, window=2, backend="cpu")


def test_an_image_beyond_the_grid_is_refused(on_emulated_kernels):
    x = torch.zeros(1).expand(1, 1, 1, 2**35).numpy()
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        on_emulated_kernels.window_attention(0, x, None, x, None, 1, 1, 0, 0, 1, 1.0, False, x, x)


def test_under_the_sanitizers(build):
    selected = ("sliced torch.float16", "subset", "scale")
    run_sanitized(build, "window_attention", __file__, *selected)
