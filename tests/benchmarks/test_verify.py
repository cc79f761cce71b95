"""What counts as right: a flipped unit does in a gradient, a broken kernel nowhere."""

import pytest
import torch
from sr_kernels.benchmarks.verify import Truth

SHAPE = (4, 60, 64, 64)


@pytest.fixture(scope="module")
def gradient():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _check(change, gradient, name="gradient x", oracle=True):
    """Stock is right but for rounding; the result is stock's, changed."""
    stock = {name: gradient.float()}
    actual = stock[name].clone()
    change(actual)
    truth = Truth(stock, {name: gradient} if oracle else None, "float32")
    return truth.check({name: actual})


def _flip(actual):
    """One hidden unit of 120, and with it one pixel's gradient by about a tenth of its length."""
    actual[1, :, 10, 20] += 0.1


@pytest.mark.parametrize("oracle", [True, False])
def test_a_flipped_unit_is_no_error_of_a_gradient(gradient, oracle):
    error = _check(_flip, gradient, oracle=oracle)
    assert error == pytest.approx(0.1, rel=1e-3)  # as it is, in the table


def test_outputs_have_no_such_excuse(gradient):
    with pytest.raises(AssertionError, match="output: error too large"):
        _check(_flip, gradient, name="output")


def _scaled(actual):
    actual *= 1.01


def _channel(actual):
    actual[:, 7] = 0


def _row(actual):
    actual[:, :, 63] = 0


def _pixel(actual):
    actual[3, :, 63, 63] = 0


def _nan(actual):
    actual[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize("oracle", [True, False])
@pytest.mark.parametrize("broken", [_scaled, _channel, _row, _pixel, _nan])
def test_a_broken_gradient_is_refused(broken, oracle, gradient):
    with pytest.raises(AssertionError, match="gradient x"):
        _check(broken, gradient, oracle=oracle)


def test_a_gradient_that_is_zero_must_be():
    zero = torch.zeros(8, 8, dtype=torch.float64)
    with pytest.raises(AssertionError, match="stock is exact here"):
        _check(lambda actual: actual.add_(1e-3), zero)


def test_another_shape_or_dtype_is_refused(gradient):
    stock, oracle = {"gradient x": gradient.float()}, {"gradient x": gradient}
    for wrong in (gradient.float()[:2], gradient):
        with pytest.raises(AssertionError, match="gradient x: "):
            Truth(stock, oracle, "float32").check({"gradient x": wrong})


def test_a_gradient_of_which_stock_knows_nothing_is_noise(gradient):
    """Zero, but for how roundings cancel; held to the largest error that stock makes elsewhere."""
    oracle = {"gradient bias": torch.zeros(60, dtype=torch.float64), "gradient x": gradient}
    known = {"gradient bias": torch.full((60,), 1e-4), "gradient x": gradient.float()}
    known["gradient x"][0, 0, 0, 0] += 0.05

    def check(bias, stock=known):
        return Truth(stock, oracle, "float32").check({**known, "gradient bias": bias})

    assert check(torch.full((60,), -0.04)) == pytest.approx(0.05, rel=1e-3)
    wrong = {
        "more than stock ever is": torch.full((60,), 0.06),
        "not finite": torch.full((60,), torch.nan),
    }
    for bias in wrong.values():
        with pytest.raises(AssertionError, match="gradient bias"):
            check(bias)
    # Where stock is right, nothing is noise.
    oracle["gradient bias"] = torch.full((60,), 0.1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="gradient bias"):
        check(torch.full((60,), 0.12), {**known, "gradient bias": torch.full((60,), 0.1001)})
