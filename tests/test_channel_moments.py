"""channel_moments against numpy's definition, and as a citizen of torch."""

import math

import channel_moments_cases as cases
import pytest
import torch
from channel_moments_cases import (
    FORWARD,
    check,
    check_gradient,
    check_large_means,
    definition,
)
from choices import LAYOUTS
from threads import threads

from sr_kernels.testing import bitwise_equal, make_tensor

JOINT = torch.ops.sr_kernels.channel_moments_joint_backward
# The network's as well, and a row of several tiles.
SHAPES = [*cases.SHAPES, (1, 60, 1, 700), (4, 60, 64, 64)]


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(shape, dtype, layout):
    check(make_tensor(shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout):
    check_large_means(layout)


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape, dtype, layout):
    x = make_tensor(shape, dtype=dtype, layout=layout)
    gradient = check_gradient(x)
    assert gradient.stride() == torch.empty_like(x).stride() or layout == "sliced"


def test_each_output_has_a_gradient_of_its_own():
    x = make_tensor((2, 5, 4, 6), torch.float64).requires_grad_()
    for part in (0, 1):
        torch.autograd.gradcheck(lambda x, part=part: FORWARD(x)[part], x)
    (gradient,) = torch.autograd.grad(FORWARD(x)[0].sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 48))


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_other_ways_are_added(shape, dtype, layout):
    x = make_tensor(shape, dtype, layout=layout)
    others = [make_tensor(shape, dtype, layout=which, seed=5) for which in (layout, "contiguous")]
    mean, covariance = FORWARD(x)
    moments = (mean * x.numel(), covariance * x.numel(), x, mean)
    alone = torch.ops.sr_kernels.channel_moments_backward(*moments)
    for count in (1, 2):
        both = JOINT(*moments, others[0], others[1] if count == 2 else None)
        assert both.dtype == dtype
        assert both.stride() == alone.stride()
        expected = alone.double() + sum(other.double() for other in others[:count])
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(both.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = make_tensor((2, 6, 5, 7), layout=layout).requires_grad_()
    torch.library.opcheck(FORWARD.default, (x,))
    x = x.detach()
    mean, covariance = FORWARD(x)
    torch.library.opcheck(
        torch.ops.sr_kernels.channel_moments_backward.default,
        (mean, covariance, x, mean),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        JOINT.default,
        (mean, covariance, x, mean, x, x),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_determinism_and_threads(layout):
    x = make_tensor((4, 60, 40, 33), layout=layout).requires_grad_()
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            mean, covariance = FORWARD(x)
            (dx,) = torch.autograd.grad((covariance**2).sum(), x)
            results.append((mean.detach(), covariance.detach(), dx))
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 299])  # of the first tile, and of another
def test_nan_and_inf_stay_in_their_channel(value, column):
    x = make_tensor((1, 6, 2, 300))
    x[0, 3, 1, column] = value
    for actual, expected in zip(FORWARD(x), definition(x), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert torch.equal(actual.isnan(), expected.isnan())


def test_bad_arguments_are_named():
    x = make_tensor((2, 6, 5, 7))
    mean, covariance = FORWARD(x)
    backward = torch.ops.sr_kernels.channel_moments_backward
    moments = (mean, covariance, x, mean)
    for call, message in (
        (lambda: FORWARD(x[0]), "x must be"),
        (lambda: FORWARD(x[:0]), "at least one channel and one pixel"),
        (lambda: backward(mean[1:], covariance, x, mean), "mean_grad must have shape"),
        (lambda: backward(mean, covariance[1:], x, mean), "covariance_grad must have shape"),
        (lambda: backward(mean, covariance, x, mean.float()), "must be float64"),
        (lambda: JOINT(*moments, x[:1], None), "other_grad must have shape"),
        (lambda: JOINT(*moments, x.double(), None), "other_grad must have the dtype of x"),
        (lambda: JOINT(*moments, x, x[:1]), "another_grad must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
