"""How much a case costs at least: bytes, floating-point operations, exponentials."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The least that any implementation does for one call.

    bytes: every input read once and every output written once, weights included; nothing between.
    flops: floating-point operations of the products, a multiply-add counted as two.
    exponentials: of softmax and sigmoid.
    """

    bytes: float
    flops: float
    exponentials: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.exponentials + other.exponentials,
        )


@dataclass(frozen=True)
class Bound:
    """What holds a case back on a machine, and the seconds that it costs at least."""

    name: str
    seconds: float


def bound(work: Work, *, bytes_per_s: float, flops_per_s: float, exps_per_s: float) -> Bound:
    """The slowest of the three, as if the other two ran beside it for nothing."""
    times = {
        "bytes": work.bytes / bytes_per_s,
        "flops": work.flops / flops_per_s,
        "exponentials": work.exponentials / exps_per_s,
    }
    name = max(times, key=lambda key: times[key])
    return Bound(name, times[name])
