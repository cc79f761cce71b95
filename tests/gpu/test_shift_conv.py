"""The shift convolution on a GPU: the cases of the CPU's and the emulator's tests, and what only a
GPU has: streams, graphs, devices, sizes."""

import pytest
import torch
from shift_conv_cases import (
    ACTIVATIONS,
    BLOCK_SIZES,
    LAYOUTS,
    SIZES,
    block_inputs,
    check_block,
    check_conv,
    conv_inputs,
)

import sr_kernels
from sr_kernels.testing import bitwise_equal

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"backend": "cuda", "few_pixels_slack": True}


@pytest.fixture(autouse=True)
def exact_float32():
    """Stock is the measure: its float32 must not be TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def block_leaves(*size, **options):
    inputs = block_inputs(*size, device="cuda", **options)
    return [tensor.requires_grad_() for tensor in inputs.values()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny(dtype, layout):
    """What compute-sanitizer runs: every kernel once, on a few pixels."""
    for c_in, c_out in ((5, 7), (65, 66)):
        inputs = conv_inputs(1, c_in, c_out, 3, 50, dtype=dtype, layout=layout, device="cuda")
        check_conv(inputs, activation="silu", **OPTIONS)
    for channels, hidden in ((5, 70), (180, 20)):
        inputs = block_inputs(1, channels, hidden, 9, 17, dtype=dtype, layout=layout, device="cuda")
        check_block(inputs, **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conv_sizes_and_dtypes(size, dtype):
    check_conv(conv_inputs(*size, dtype=dtype, device="cuda"), activation="silu", **OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
def test_conv_layouts_activations_and_patterns(layout, activation, pattern):
    inputs = conv_inputs(2, 13, 12, 16, 21, layout=layout, device="cuda")
    check_conv(inputs, activation=activation, pattern=pattern, **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*BLOCK_SIZES, (1, 180, 360, 40, 50)], ids=str)
def test_block_sizes_and_dtypes(size, dtype):
    check_block(block_inputs(*size, dtype=dtype, device="cuda"), **OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_block_layouts_and_activations(layout, activation, residual):
    inputs = block_inputs(2, 13, 22, 16, 21, layout=layout, device="cuda")
    check_block(inputs, activation=activation, residual=residual, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = block_inputs(1, 20, 40, 16, 19, device="cuda")
    check_block(inputs, autocast=dtype, **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_repeats_are_bit_equal(dtype):
    check_block(
        block_inputs(2, 60, 120, 40, 70, dtype=dtype, device="cuda"), repeats=100, **OPTIONS
    )


def test_a_training_step_under_amp():
    x, *weights = block_leaves(4, 60, 120, 64, 64)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = sr_kernels.shift_conv_block(x, *weights, backend="cuda").float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.unpoisoned  # poisoning fills memory in the middle of a capture
def test_graph_capture_and_replay():
    inputs = block_inputs(1, 60, 120, 40, 70, dtype=torch.float16, device="cuda")
    x = inputs["x"]

    def run():
        return sr_kernels.shift_conv_block(**inputs, backend="cuda")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for scale in (1.0, -0.5):
        x.mul_(scale)
        graph.replay()
        assert bitwise_equal(out, run())


@pytest.mark.unpoisoned
def test_kernels_run_in_the_current_stream():
    """On a side stream, behind work that takes a while: a launch elsewhere would read too early."""
    inputs = block_inputs(1, 60, 120, 40, 70, device="cuda")
    expected = sr_kernels.shift_conv_block(**inputs, backend="cuda")
    torch.cuda.synchronize()
    late = torch.zeros_like(inputs["x"])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(inputs["x"])
        out = sr_kernels.shift_conv_block(**{**inputs, "x": late}, backend="cuda")
    side.synchronize()
    assert bitwise_equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_the_tensors_own():
    inputs = block_inputs(1, 20, 40, 9, 17)
    results = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device("cuda:0"):
            moved = {name: tensor.to(device) for name, tensor in inputs.items()}
            results.append(sr_kernels.shift_conv_block(**moved, backend="cuda"))
    assert results[1].device == torch.device("cuda:1")
    assert bitwise_equal(*results)


@pytest.mark.large
@pytest.mark.unpoisoned
def test_more_than_two_to_the_31_elements():
    """The last rows of 2.3e9 elements, against the same rows alone."""
    h, w, channels = 6000, 6000, 64
    inputs = block_inputs(1, channels, 64, 1, 1, dtype=torch.float16, device="cuda")
    x = torch.randn(1, channels, h, w, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    out = sr_kernels.shift_conv_block(**{**inputs, "x": x}, backend="cuda")
    part = sr_kernels.shift_conv_block(**{**inputs, "x": x[:, :, -16:]}, backend="cuda")
    assert bitwise_equal(out[:, :, -8:], part[:, :, -8:])


def test_float64_is_refused_with_the_reason():
    inputs = block_inputs(1, 5, 5, 2, 3, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        sr_kernels.shift_conv_block(**inputs, backend="cuda")
