"""Whether a provider computes the right thing, before it gets a time.

The rule is that of :mod:`sr_kernels.testing`: the error against the definition in float64 may be a
multiple of the error that stock PyTorch makes in the dtype under test. The multiple is larger than
in this package's tests, which hold its kernels to 2 and 3: the compilers and runtimes here sum in
orders of their own and are not wrong for that. Where float64 would need too much memory or time,
results are held against stock PyTorch itself, in parts of the range of its output.

Gradients get a second chance. Those of ReLU, of a maximum and of a clipped root jump, and an input
that rounding alone moves across such a point changes its share of a gradient by as much as the
share itself: correct kernels that sum in different orders differ there, and stock, one sample of
this, may happen to have met none. One of n active units that flips changes a gradient by about
1 / sqrt(n) of its length: 1e-3 for the million of a training case. So a gradient whose largest
error is too large is right all the same if its error's length (root mean square) is at most FACTOR
times stock's and FLIPS of the gradient's own. What a broken kernel does is longer than that: a
factor of 1.01 is 1e-2 of the length, one wrong row of 64 or channel of 60 is 0.13, one wrong pixel
of a 64x64 map 1.6e-2.

And a gradient of which stock gets nothing right in the dtype under test (its error is as long as
the gradient) is noise: that of a bias in front of a BatchNorm is zero, and what is left of it is
how the roundings of a long sum happen to cancel. It may be wrong by what stock is anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sr_kernels.testing import assert_within_tolerance, error_metrics

FACTOR = 10.0
FLIPS = 2e-3  # of the length of a gradient: see above
# Of the largest value of stock's output, where there is no oracle in float64.
NETWORK_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Truth:
    """What results are held against: by name ("output", "gradient x"), stock's and the oracle's.

    oracle None: held against stock alone.
    """

    stock: Mapping[str, Tensor]
    oracle: Mapping[str, Tensor] | None
    dtype: str

    def check(self, results: Mapping[str, Tensor]) -> float:
        """The largest error over all results; raises AssertionError if one is wrong."""
        if set(results) != set(self.stock):
            raise AssertionError(f"results are {sorted(results)}, not {sorted(self.stock)}")
        worst = 0.0
        for name, stock in self.stock.items():
            actual = results[name].detach().to("cpu")
            if self.oracle is None:
                worst = max(worst, self._against_stock(name, actual, stock))
                continue
            oracle = self.oracle[name]
            try:
                assert_within_tolerance(actual, stock, oracle, factor=FACTOR, what=name)
            except AssertionError:
                flips = _differs_by_flips(name, actual, stock, oracle)
                if not flips and not self._is_noise(name, actual, stock, oracle):
                    raise
            worst = max(worst, error_metrics(actual, oracle).max_abs)
        return worst

    def _is_noise(self, name: str, actual: Tensor, stock: Tensor, oracle: Tensor) -> bool:
        """Whether stock knows nothing of a gradient, and the error is none that it never makes."""
        assert self.oracle is not None
        if not _is_gradient(name, actual, stock) or error_metrics(stock, oracle).relative_l2 < 1:
            return False
        worst = max(
            error_metrics(other, self.oracle[key]).max_abs
            for key, other in self.stock.items()
            if key.startswith("gradient")
        )
        return error_metrics(actual, oracle).max_abs <= worst

    def _against_stock(self, name: str, actual: Tensor, stock: Tensor) -> float:
        if actual.shape != stock.shape or actual.dtype != stock.dtype:
            raise AssertionError(
                f"{name}: {tuple(actual.shape)} {actual.dtype}, but it must be "
                f"{tuple(stock.shape)} {stock.dtype}"
            )
        if not bool(actual.isfinite().all()):
            raise AssertionError(f"{name}: has elements that are not finite")
        error = error_metrics(actual, stock.double()).max_abs
        bound = NETWORK_TOLERANCE[self.dtype] * float(stock.abs().max())
        if error > bound and not _differs_by_flips(name, actual, stock, stock):
            raise AssertionError(f"{name}: differs from stock by {error:.3g}, allowed {bound:.3g}")
        return error


def _differs_by_flips(name: str, actual: Tensor, stock: Tensor, oracle: Tensor) -> bool:
    """Whether a gradient's error is no longer than a few flipped units make it."""
    if not _is_gradient(name, actual, stock):
        return False
    length = float(oracle.double().square().mean().sqrt())
    allowed = FACTOR * error_metrics(stock, oracle.double()).rms + FLIPS * length
    return error_metrics(actual, oracle.double()).rms <= allowed


def _is_gradient(name: str, actual: Tensor, stock: Tensor) -> bool:
    """Whether it may be one: of stock's shape and dtype, and finite."""
    if actual.shape != stock.shape or actual.dtype != stock.dtype:
        return False
    return name.startswith("gradient") and bool(actual.isfinite().all())
