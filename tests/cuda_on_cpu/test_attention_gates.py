"""The attention gates' CUDA kernels, run on the CPU, against the definition in float64."""

import pytest
import torch
from attention_gate_cases import CASES, LAYOUTS, SIZES, check, functions, make_inputs
from emulated import emulated, run_sanitized

from sr_kernels.testing import bitwise_equal

OPERATORS = [
    name + suffix
    for name in dict.fromkeys(name for name, _ in CASES.values())
    for suffix in ("", "_backward")
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("attention_gates")
    module.set_schedule("shuffled", 0)
    with emulated(module, OPERATORS):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [size for size in SIZES if size[0] > 0], ids=str)
@ALL
def test_sizes_and_dtypes(case, size, dtype):
    check(case, make_inputs(case, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_layouts(case, layout, dtype):
    check(case, make_inputs(case, (2, 13, 9, 17), dtype, layout))


@ALL
def test_every_subset_of_gradients(case):
    check(case, make_inputs(case, (2, 5, 4, 6)), gradients="subsets")


@ALL
def test_without_what_is_optional(case):
    inputs = make_inputs(case, (2, 10, 9, 11))
    optional = [name for name in inputs if name.startswith("b_") or "bias" in name]
    check(case, {**inputs, **dict.fromkeys([*optional, *(["residual"] * ("residual" in inputs))])})


@pytest.mark.parametrize("kernel", [1, 3, 9])
@pytest.mark.parametrize("case", ["spatial", "pixel_spatial"])
def test_kernel_sizes(case, kernel):
    check(case, make_inputs(case, (2, 6, 5, 8), kernel=kernel))


@pytest.mark.parametrize("case", ["gate_contrast", "channel_contrast"])
def test_contrast_far_from_zero_and_constant_channels(case):
    inputs = make_inputs(case, (2, 9, 70, 90))  # several chunks of pixels
    with torch.no_grad():
        inputs["x"].mul_(0.01).add_(5.0)[:, 3] = 2.5
    # Logits of up to 8: a unit in the last place of one is 5e-7 of a gradient of 74, in stock too,
    # whose own error here is smaller by luck.
    check(case, inputs, gradient_atol=4e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [16, 20])
def test_channels_scaled_by_runs(c, dtype, layout):
    """Runs of 16 bytes and of 8; images of several blocks, the last of them not full."""
    size = (2, c, 13, 8 if c == 20 else 48)
    check("channel_contrast", make_inputs("channel_contrast", size, dtype, layout))


def test_a_maximum_that_several_channels_share():
    inputs = make_inputs("spatial", (1, 6, 4, 5))
    inputs["x"] = inputs["x"].round()
    check("spatial", inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@ALL
def test_nan_and_inf_pass_as_in_the_reference(case, value):
    inputs = make_inputs(case, (1, 10, 9, 18))
    inputs["x"][0, 3, 2, 2] = value
    ours, stock, settings = functions(case)
    ours, stock = ours(**inputs, **settings, backend="cpu"), stock(**inputs, **settings)
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours.isinf(), stock.isinf())


@ALL
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(on_emulated_kernels, case):
    inputs = make_inputs(case, (2, 20, 18, 33), torch.float16)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    results = []
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        on_emulated_kernels.set_schedule(order, seed)
        out = functions(case)[0](**leaves, **CASES[case][1], backend="cpu")
        gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
        results.append([out, *gradients])
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


def test_an_image_beyond_the_grid_is_refused(on_emulated_kernels):
    x = torch.zeros(1).expand(1, 1, 1, 2**30).numpy()
    one = torch.ones(1, 1, 1, 1).numpy()
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        on_emulated_kernels.pixel_attention(0, x, one, None, x)


def test_under_the_sanitizers(build):
    run_sanitized(build, "attention_gates", __file__, "(float16 and misaligned) or optional or nan")
