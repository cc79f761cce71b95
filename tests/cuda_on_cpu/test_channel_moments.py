"""The channel moments' CUDA kernels, run on the CPU, against the definition in float64."""

import pytest
import torch
from channel_moments_cases import (
    FORWARD,
    SHAPES,
    check,
    check_gradient,
    check_large_means,
    definition,
)
from choices import DTYPES, LAYOUTS
from emulated import emulated, run_sanitized

from sr_kernels.testing import bitwise_equal, make_tensor


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("channel_moments")
    module.set_schedule("shuffled", 0)
    with emulated(module, ["channel_moments", "channel_moments_backward"]):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_and_dtypes(shape, dtype):
    x = make_tensor(shape, dtype)
    check(x)
    check_gradient(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """More channels than a tile; two slices of tiles, the last tile not full."""
    x = make_tensor((2, 68, 13, 24), dtype, layout=layout)
    check(x)
    assert check_gradient(x).stride() == torch.empty_like(x).stride() or layout == "sliced"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout):
    check_large_means(layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pixel", [(0, 0), (8, 2)])  # of the first tile, and of another
def test_nan_and_inf_stay_in_their_channel(value, pixel):
    x = make_tensor((1, 6, 9, 18))
    x[(0, 3, *pixel)] = value
    for actual, expected in zip(FORWARD(x), definition(x), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(on_emulated_kernels, dtype):
    x = make_tensor((1, 20, 30, 33), dtype).requires_grad_()
    results = []
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        on_emulated_kernels.set_schedule(order, seed)
        mean, covariance = FORWARD(x)
        (dx,) = torch.autograd.grad((covariance**2).sum() + (mean**2).sum(), x)
        results.append((mean.detach(), covariance.detach(), dx))
    assert torch.equal(results[0][1], results[0][1].T)
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dim", range(4))
def test_offsets_beyond_2_to_31(dim):
    """Gigabytes of addresses, of which few pages are touched."""
    near = make_tensor((2, 3, 4, 5), torch.float16)
    strides = list(near.stride())
    steps = near.shape[dim] - 1
    strides[dim] = -(-(2**31 + 64) // steps)
    memory = torch.empty(steps * strides[dim] + 2**10, dtype=torch.float16)
    far = memory.as_strided(near.shape, strides).copy_(near)
    results = []
    for x in (near, far):
        mean, covariance = FORWARD(x)
        backward = torch.ops.sr_kernels.channel_moments_backward
        results.append((mean, covariance, backward(mean, covariance, x, mean)))
    assert all(map(bitwise_equal, *results))


def test_an_image_beyond_the_grid_is_refused(on_emulated_kernels):
    x = torch.zeros(1).expand(1, 1, 1, 2**30).numpy()
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        on_emulated_kernels.channel_moments(0, x, None, None)


# Bytes a block: more is a decision. Two blocks fit a multiprocessor of sm_80.
SHARED_BYTES = {"channel_products_kernel": 37376, "channel_moments_gradient_kernel": 53504}


def test_shared_memory_is_within_the_table(on_emulated_kernels):
    assert on_emulated_kernels.shared_bytes() == SHARED_BYTES


def test_under_the_sanitizers(build):
    selected = ("layouts torch.float16", "sizes torch.float32")
    run_sanitized(build, "channel_moments", __file__, *selected)
