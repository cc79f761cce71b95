"""channel_moments against numpy's definition, and as a citizen of torch."""

import pytest
import torch

from sr_kernels.testing import bitwise_equal, make_tensor

FORWARD = torch.ops.sr_kernels.channel_moments
LAYOUTS = ("contiguous", "channels_last", "sliced", "misaligned")
# One pixel, one row, one column, less than a vector, more than a tile, the network's.
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 1, 5),
    (2, 31, 7, 1),
    (1, 60, 1, 700),
    (4, 60, 64, 64),
    (3, 13, 17, 19),
]


def definition(x):
    rows = x.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    return mean, centred @ centred.T / rows.shape[1]


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(shape, dtype, layout):
    x = make_tensor(shape, dtype=dtype, layout=layout)
    # What is summed in the compute type, and what the sums are.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for actual, expected in zip(FORWARD(x), definition(x), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout):
    """Variances of 1 under means of 1000: E[x x] - E[x] E[x] in float32 would leave one digit."""
    x = make_tensor((2, 20, 40, 40), layout=layout)
    x += torch.linspace(-1000, 1000, 20)[:, None, None]
    mean, covariance = FORWARD(x)
    expected_mean, expected = definition(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=2e-6)


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape, dtype, layout):
    x = make_tensor(shape, dtype=dtype, layout=layout).requires_grad_()
    c = shape[1]
    weights = (make_tensor((c,), torch.float64, seed=1), make_tensor((c, c), torch.float64, seed=2))
    gradients = []
    for function in (FORWARD, definition):
        outputs = function(x)
        loss = sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, x)[0] * x.numel())
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    scale = max(1.0, gradients[1].abs().max().item())
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance * scale)
    assert gradients[0].stride() == torch.empty_like(x).stride() or layout == "sliced"


def test_each_output_has_a_gradient_of_its_own():
    x = make_tensor((2, 5, 4, 6), torch.float64).requires_grad_()
    for part in (0, 1):
        torch.autograd.gradcheck(lambda x, part=part: FORWARD(x)[part], x)
    (gradient,) = torch.autograd.grad(FORWARD(x)[0].sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 48))


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_determinism_and_threads(layout):
    x = make_tensor((4, 60, 40, 33), layout=layout).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            mean, covariance = FORWARD(x)
            (dx,) = torch.autograd.grad((covariance**2).sum(), x)
            results.append((mean.detach(), covariance.detach(), dx))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


def test_bad_arguments_are_named():
    x = make_tensor((2, 6, 5, 7))
    mean, covariance = FORWARD(x)
    backward = torch.ops.sr_kernels.channel_moments_backward
    for call, message in (
        (lambda: FORWARD(x[0]), "x must be"),
        (lambda: FORWARD(x[:0]), "at least one channel and one pixel"),
        (lambda: backward(mean[1:], covariance, x, mean), "mean_grad must have shape"),
        (lambda: backward(mean, covariance[1:], x, mean), "covariance_grad must have shape"),
        (lambda: backward(mean, covariance, x, mean.float()), "must be float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
