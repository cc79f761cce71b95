"""The channel moments' CUDA kernels on a GPU, where no layer calls them: tests of their own."""

import channel_moments_cases as cases
import pytest
import torch
from choices import DTYPES, LAYOUTS
from streams import on_a_side_stream, replay_equals_run

from sr_kernels.testing import bitwise_equal, make_tensor

pytestmark = pytest.mark.gpu
SHAPES = [*cases.SHAPES, (4, 60, 64, 64), (1, 180, 43, 61)]


@pytest.mark.unpoisoned  # initcheck is to see what is not written
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny(device, dtype):
    """What compute-sanitizer runs."""
    x = make_tensor((2, 5, 4, 6), dtype, device=device).requires_grad_()
    mean, covariance = cases.FORWARD(x)
    (dx,) = torch.autograd.grad(mean.sum() + covariance.sum(), x)
    assert all(tensor.isfinite().all() for tensor in (mean, covariance, dx))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(device, shape, dtype, layout):
    x = make_tensor(shape, dtype, layout=layout, device=device)
    cases.check(x)
    cases.check_gradient(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(device, layout):
    cases.check_large_means(layout, device)


def results(x):
    """With gradients of a size that float16 has."""
    mean, covariance = cases.FORWARD(x)
    pixels = x.numel() // x.shape[1]
    backward = torch.ops.sr_kernels.channel_moments_backward
    return [mean, covariance, backward(mean * pixels, covariance * pixels, x, mean)]


def test_statistics_on_another_device_are_refused(device):
    x = make_tensor((2, 5, 4, 6), device=device)
    mean, covariance = cases.FORWARD(x)
    backward = torch.ops.sr_kernels.channel_moments_backward
    with pytest.raises(RuntimeError, match=r"on the device of x|same device"):
        backward(mean, covariance, x, mean.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_repeats_are_bit_equal(device, dtype):
    x = make_tensor((4, 60, 64, 64), dtype, device=device)
    first = results(x)
    for _ in range(99):
        assert all(map(bitwise_equal, first, results(x)))


@pytest.mark.unpoisoned  # poisoning fills memory in the middle of a capture
def test_graph_capture_and_replay(device):
    x = make_tensor((2, 20, 43, 61), device=device)
    replay_equals_run(lambda: results(x), x)


@pytest.mark.unpoisoned
def test_kernels_run_in_the_current_stream(device):
    x = make_tensor((2, 20, 43, 61), device=device)
    found = on_a_side_stream(lambda tensors: results(tensors["x"]), {"x": x})
    assert all(map(bitwise_equal, results(x), found))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_the_tensors_own():
    with torch.cuda.device("cuda:0"):
        found = [results(make_tensor((2, 20, 43, 61), device=f"cuda:{i}")) for i in range(2)]
    assert {tensor.device for tensor in found[1]} == {torch.device("cuda:1")}
    assert all(map(bitwise_equal, *found))


@pytest.mark.large
@pytest.mark.unpoisoned
def test_more_than_two_to_the_31_elements(device):
    """Of a map that repeats itself."""
    shape = (1, 32, 8400, 8200)
    if device == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 4 * 2 * 32 * 8400 * 8200:
            pytest.skip("needs 17 GiB of free GPU memory")
    rows = make_tensor((1, 32, 84, 8200), torch.float16, layout="channels_last", device=device)
    x = rows.new_empty((1, 8400, 8200, 32)).permute(0, 3, 1, 2).copy_(rows.repeat(1, 1, 100, 1))
    assert x.shape == shape
    near, far = results(rows), results(x)
    for actual, expected in zip(far[:2], near[:2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(far[2][:, :, -1:], near[2][:, :, -1:], rtol=0.01, atol=0.01)
