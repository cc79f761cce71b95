"""Whether a provider computes the right thing, before it gets a time.

The rule is that of :mod:`sr_kernels.testing`: the error against the definition in float64 may be a
multiple of the error that stock PyTorch makes in the dtype under test. The multiple is larger than
in this package's tests, which hold its kernels to 2 and 3: the compilers and runtimes here sum in
orders of their own and are not wrong for that. Where float64 would need too much memory or time,
networks are held against stock PyTorch itself, in parts of the range of its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sr_kernels.testing import assert_within_tolerance, error_metrics

FACTOR = 10.0
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
            comparison = assert_within_tolerance(
                actual, stock, self.oracle[name], factor=FACTOR, what=name
            )
            worst = max(worst, comparison.ours.max_abs)
        return worst

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
        if error > bound:
            raise AssertionError(f"{name}: differs from stock by {error:.3g}, allowed {bound:.3g}")
        return error
