"""The 3x3 convolution's CUDA kernels, run on the CPU, against the definition in float64."""

import pytest
import torch
from choices import ACTIVATIONS, DTYPES, LAYOUTS
from conv3x3_cases import check_conv, conv_inputs
from emulated import emulated, run_sanitized

import sr_kernels
from sr_kernels.testing import bitwise_equal, make_tensor


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("conv3x3")
    module.set_schedule("shuffled", 0)
    with emulated(module, ["conv3x3"]):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [52, 60, 64])
def test_as_in_the_networks(c, dtype, layout):
    inputs = conv_inputs((1, c, 17, 18), c, dtype, layout)
    check_conv(inputs, activation="leaky_relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(3, 52), (13, 5), (8, 66), (1, 1)], ids=str)
def test_channels_and_layouts(channels, dtype, layout):
    c_in, c_out = channels
    check_conv(conv_inputs((2, c_in, 5, 9), c_out, dtype, layout), activation="relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_slices_of_channels_on_both_sides(dtype, layout):
    check_conv(conv_inputs((1, 180, 6, 11), 130, dtype, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (16, 16), (15, 17), (1, 33), (33, 1)], ids=str
)
def test_at_the_edges_of_a_tile(size, dtype):
    # On a handful of numbers stock's error is a matter of luck: so many channels.
    check_conv(conv_inputs((2, 20, *size), 24, dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "width"), [(24, 24), (20, 20)])
def test_runs_that_leave_a_tile_half_full(c, width, dtype, layout):
    """Runs of 16 bytes and of 8, of pixels or of channels."""
    check_conv(conv_inputs((2, c, 3, width), c, dtype, layout), activation="leaky_relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activations(activation, layout):
    for dtype in (torch.float32, torch.float16):
        inputs = conv_inputs((1, 12, 9, 10), 20, dtype, layout)
        check_conv(inputs, activation=activation, negative_slope=-0.3)
    check_conv({**inputs, "bias": None, "skip": None}, activation=activation)


def test_maps_of_different_layouts():
    for x_layout, other in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        inputs = conv_inputs((2, 20, 7, 9), 12, torch.float16, x_layout)
        for name in ("weight", "skip"):
            shape = inputs[name].shape
            inputs[name] = make_tensor(shape, torch.float16, seed=5, scale=0.2, layout=other)
        check_conv(inputs)


@pytest.mark.parametrize("shape", [(0, 6, 8, 8), (2, 6, 0, 8)], ids=str)
def test_empty(shape):
    y = sr_kernels.conv3x3(**conv_inputs(shape, 5), backend="cpu")
    assert y.shape == (shape[0], 5, *shape[2:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixel", [(0, 0), (5, 16), (17, 18)], ids=str)
def test_a_bad_pixel_reaches_its_neighbours_alone(pixel, layout):
    inputs = conv_inputs((2, 20, 18, 19), 12, torch.float16, layout)
    clean = sr_kernels.conv3x3(**inputs, backend="cpu")
    seen = torch.zeros(clean.shape, dtype=torch.bool)
    h, w = pixel
    seen[1, :, max(0, h - 1) : h + 2, max(0, w - 1) : w + 2] = True
    inputs["x"][1, 3, h, w] = float("nan")
    y = sr_kernels.conv3x3(**inputs, backend="cpu")
    assert y[seen].isnan().all()
    assert bitwise_equal(y[~seen], clean[~seen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(on_emulated_kernels, dtype):
    inputs = conv_inputs((2, 70, 9, 17), 20, dtype)
    results = []
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        on_emulated_kernels.set_schedule(order, seed)
        results.append(sr_kernels.conv3x3(**inputs, backend="cpu"))
    assert all(bitwise_equal(results[0], other) for other in results[1:])


# Bytes a block: more is a decision. Two blocks in 16 bits fit a multiprocessor of sm_80.
SHARED_BYTES = {"conv3x3_kernel<float>": 69632, "conv3x3_kernel<__half>": 74304}


def test_shared_memory_is_within_the_table(on_emulated_kernels):
    found = on_emulated_kernels.shared_bytes()
    assert set(found) == set(SHARED_BYTES)
    for kernel, most in SHARED_BYTES.items():
        assert found[kernel] <= most, kernel


@pytest.mark.parametrize("shape", [(1, 1, 1, 2**30), (2**31, 1, 1, 1)], ids=str)
def test_what_is_beyond_the_grid_is_refused(on_emulated_kernels, shape):
    x = torch.zeros(1).expand(shape).numpy()
    weight = torch.ones(1, 1, 3, 3).numpy()
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        on_emulated_kernels.conv3x3(0, x, weight, None, None, 0, 0.0, x)


def test_under_the_sanitizers(build):
    selected = ("channels_and_layouts torch.float16", "edges torch.float32", "several")
    run_sanitized(build, "conv3x3", __file__, *selected, "activations")
