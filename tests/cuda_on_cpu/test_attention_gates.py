"""The attention gates' CUDA kernels, run on the CPU, against the definition in float64."""

from contextlib import contextmanager

import pytest
import torch
from attention_gate_cases import CASES, SIZES, check, functions, make_inputs
from choices import DTYPES, LAYOUTS
from emulated import emulated, run_sanitized

from sr_kernels.testing import bitwise_equal

OPERATORS = [
    name + suffix
    for name in dict.fromkeys(name for name, _ in CASES.values())
    for suffix in ("", "_backward")
]
ALL = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("attention_gates")
    module.set_schedule("shuffled", 0)
    with emulated(module, OPERATORS):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
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


@pytest.mark.parametrize("case", ["spatial", "pixel_spatial"])
def test_gradients_from_several_slices(case):
    """Of 2048 pixels the spatial gate's, of 256 a product's."""
    check(case, make_inputs(case, (1, 5, 70, 70)))


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


# ------------------------------------------------------------------ channel attention on chip

CHANNEL = pytest.mark.parametrize("case", ["channel_mean", "channel_contrast"])
KIB = 1024
# What the emulator has at first: multiprocessors, shared memory of each, no error.
A_GPU = (4, 228 * KIB, 0)
# Error codes of the CUDA runtime.
COOPERATIVE_LAUNCH_TOO_LARGE, NOT_SUPPORTED, ILLEGAL_ADDRESS = 720, 801, 700


@pytest.fixture
def devices(on_emulated_kernels):
    yield on_emulated_kernels.set_device
    on_emulated_kernels.set_device(*A_GPU)


@contextmanager
def launches(kernels, *, single, cooperative):
    before = kernels.launches()
    yield
    after = kernels.launches()
    assert (after[0] - before[0], after[1] - before[1]) == (single, cooperative)


# One block an image and several, the last not full; more of a multiprocessor; more runs of channels
# than threads; runs of channels and of pixels, or neither.
ON_CHIP = [
    ((1, 10, 5, 9), 4),
    ((2, 20, 18, 33), 4),
    ((2, 20, 16, 40), 3),
    ((3, 9, 13, 31), 1),
    ((1, 301, 4, 20), 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "multiprocessors"), ON_CHIP, ids=str)
@CHANNEL
def test_one_launch(on_emulated_kernels, devices, case, size, multiprocessors, dtype, layout):
    devices(multiprocessors, *A_GPU[1:])
    inputs = make_inputs(case, size, dtype, layout)
    with launches(on_emulated_kernels, single=0, cooperative=1):
        check(case, inputs, gradients=None)


@CHANNEL
def test_more_blocks_than_a_warp_has_lanes(on_emulated_kernels, devices, case):
    devices(34, *A_GPU[1:])
    with launches(on_emulated_kernels, single=0, cooperative=1):
        check(case, make_inputs(case, (1, 64, 32, 34)), gradients=None)


TWO_LAUNCHES = {
    "none": (0, 228 * KIB, 0),
    "too small": (2, 30 * KIB, 0),
    "refused": (*A_GPU[:2], COOPERATIVE_LAUNCH_TOO_LARGE),
    "not supported": (*A_GPU[:2], NOT_SUPPORTED),
}


@pytest.mark.parametrize("device", TWO_LAUNCHES.values(), ids=TWO_LAUNCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@CHANNEL
def test_two_launches(on_emulated_kernels, devices, case, dtype, layout, device):
    """Without cooperative launches, where the map is larger than all shared memory, and where the
    driver refuses the launch."""
    devices(*device)
    inputs = make_inputs(case, (2, 20, 24, 40), dtype, layout)
    with launches(on_emulated_kernels, single=2, cooperative=0):
        check(case, inputs, gradients=None)


def test_an_error_that_is_no_refusal_is_raised(on_emulated_kernels, devices):
    devices(*A_GPU[:2], ILLEGAL_ADDRESS)
    inputs = make_inputs("channel_mean", (2, 20, 24, 40))
    with (
        launches(on_emulated_kernels, single=0, cooperative=0),
        pytest.raises(RuntimeError, match="an error of the emulated driver"),
    ):
        functions("channel_mean")[0](**inputs, backend="cpu")


def test_a_call_asks_the_device_once(on_emulated_kernels):
    inputs = make_inputs("channel_mean", (2, 20, 24, 40))
    before = on_emulated_kernels.questions()
    functions("channel_mean")[0](**inputs, backend="cpu")
    assert on_emulated_kernels.questions() == before + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@CHANNEL
def test_one_launch_has_the_same_bits_in_any_order(on_emulated_kernels, case, layout, dtype):
    inputs = make_inputs(case, (2, 20, 18, 33), dtype, layout)
    run, _, settings = functions(case)
    results = []
    for seed in range(10):
        order = ("forward", "reversed")[seed] if seed < 2 else "shuffled"
        on_emulated_kernels.set_schedule(order, seed)
        with launches(on_emulated_kernels, single=0, cooperative=1):
            results.append(run(**inputs, **settings, backend="cpu"))
    assert all(bitwise_equal(results[0], other) for other in results[1:])


# A GPU like an H100 or an A100, up to four blocks a multiprocessor; batch, pixels, channels and
# bytes an element; then blocks an image, and pixels and bytes of each.
H100, A100 = (132, 228 * KIB), (108, 164 * KIB)
DEALT = [
    (H100, (1, 320 * 180, 60, 2), (129, 448, 58160)),  # one block a multiprocessor
    (H100, (1, 320 * 180, 60, 4), (258, 224, 58160)),  # two
    (H100, (1, 480 * 270, 64, 2), (254, 512, 69952)),
    (A100, (1, 480 * 270, 64, 2), (214, 608, 82240)),
    (H100, (32, 64 * 64, 60, 2), (8, 512, 65840)),
    (H100, (1, 1, 1, 4), (1, 2048, 12368)),
    (H100, (132 * 4, 9, 30, 4), (1, 96, 15808)),
    # What is not kept on chip.
    (H100, (1, 1280 * 720, 64, 2), (0, 0, 0)),
    (H100, (1, 480 * 270, 64, 4), (0, 0, 0)),
    (H100, (1, 2**60, 65535, 4), (0, 0, 0)),
    (H100, (132 * 4 + 1, 9, 30, 4), (0, 0, 0)),
    (H100, (0, 320 * 180, 60, 2), (0, 0, 0)),
    (H100, (1, 0, 60, 2), (0, 0, 0)),
    (H100, (1, 100, 25000, 2), (0, 0, 0)),
    ((0, 228 * KIB), (1, 320 * 180, 60, 2), (0, 0, 0)),  # no cooperative launches
]


@pytest.mark.parametrize(("device", "sizes", "expected"), DEALT, ids=str)
def test_how_images_are_dealt_to_blocks(on_emulated_kernels, device, sizes, expected):
    *image, element_bytes = sizes
    found = on_emulated_kernels.on_chip_shares(*image, 16, element_bytes, *device)
    assert found == expected


# Bytes of the largest block, forward and with the backward, in float32 and in 16 bits: more is a
# decision. Two blocks of each fit a multiprocessor of sm_80, four in 16 bits.
SHARED_BYTES = {
    "pixel": ((53248, 53248), (34816, 34816)),
    "spatial": ((0, 32), (0, 32)),
    "pixel_spatial": ((53248, 53248), (34816, 34816)),
    "gate_mean": ((4096, 4096), (4096, 4096)),
    "gate_contrast": ((4096, 4096), (4096, 4096)),
    "channel_mean": ((4096, 4096), (4096, 4096)),
    "channel_contrast": ((4096, 4096), (4096, 4096)),
    "gated_conv": ((53248, 53248), (34816, 34816)),
}


@ALL
def test_shared_memory_is_within_the_table(on_emulated_kernels, devices, case):
    devices(0, 228 * KIB)  # two launches: test_how_images_are_dealt_to_blocks has the other
    run, _, settings = functions(case)
    for dtype, most in zip((torch.float32, torch.float16), SHARED_BYTES[case], strict=True):
        inputs = make_inputs(case, (1, 60, 5, 7), dtype)
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        on_emulated_kernels.shared_bytes()
        out = run(**inputs, **settings, backend="cpu")
        forward = on_emulated_kernels.shared_bytes()
        torch.autograd.grad(out.float().square().sum(), leaves)
        found = (forward, max(forward, on_emulated_kernels.shared_bytes()))
        assert found == most, dtype


def test_an_image_beyond_the_grid_is_refused(on_emulated_kernels):
    x = torch.zeros(1).expand(1, 1, 1, 2**30).numpy()
    one = torch.ones(1, 1, 1, 1).numpy()
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        on_emulated_kernels.pixel_attention(0, x, one, None, x)


def test_under_the_sanitizers(build):
    selected = ("layouts misaligned torch.float16", "one_launch misaligned torch.float16")
    run_sanitized(build, "attention_gates", __file__, *selected, "optional", "nan")
