"""What the machine can do: copy, multiply, exponentiate. Measured in the run that uses them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .measure import Clock

MEGABYTE = 1 << 20
# Sizes of the copied tensor: a map that fits into a cache moves faster than memory does.
COPIES = (MEGABYTE // 2, 2 * MEGABYTE, 8 * MEGABYTE, 32 * MEGABYTE, 128 * MEGABYTE)


@dataclass(frozen=True)
class Ceilings:
    """copy: (bytes read and written, bytes per second), rising in size.  flops: per second, by
    dtype.  exps: exponentials per second, float32, in the cache or a GPU's registers; infinite
    where they could not be measured, which leaves them out of every bound."""

    copy: tuple[tuple[int, float], ...]
    flops: dict[str, float]
    exps: float

    def bytes_per_s(self, count: float) -> float:
        """Of a copy that moves `count` bytes: the rate of the smallest copy not smaller, or of the
        largest. Memory's rate for anything larger than the caches."""
        for size, rate in self.copy:
            if count <= size:
                return rate
        return self.copy[-1][1]

    def best(self, again: Ceilings) -> Ceilings:
        """The higher of two measurements of the same machine, in everything."""
        return Ceilings(
            tuple(max(a, b) for a, b in zip(self.copy, again.copy, strict=True)),
            {dtype: max(rate, again.flops[dtype]) for dtype, rate in self.flops.items()},
            max(self.exps, again.exps),
        )


def measure(
    device: str, dtypes: tuple[str, ...], *, toy: bool = False, exps: float | None = None
) -> Ceilings:
    """Takes a few seconds, with the number of threads that torch has now.

    exps: exponentials per second, where they are known already.
    """
    clock = Clock(device)
    generator = torch.Generator().manual_seed(0)

    def best(function: Callable[[], object], repeats: int) -> float:
        function()
        return min(clock.time(function) for _ in range(repeats))

    copy = []
    for size in COPIES[:1] if toy else COPIES:
        source = torch.zeros(size, dtype=torch.uint8, device=device).view(torch.float32)
        target = torch.empty_like(source).zero_()
        inner = max(1, 16 * MEGABYTE // size)

        def run(source: Tensor = source, target: Tensor = target, n: int = inner) -> None:
            for _ in range(n):
                target.copy_(source)

        copy.append((2 * size, 2 * size * inner / best(run, 5)))
    # Larger copies never count as faster than smaller ones: that would be noise.
    for i in range(len(copy) - 2, -1, -1):
        copy[i] = (copy[i][0], max(copy[i][1], copy[i + 1][1]))
    flops = {}
    for dtype in sorted({"float32", *dtypes}):
        n = 128 if toy else (4096 if device != "cpu" or dtype == "float32" else 1024)
        a, b = (
            torch.rand(n, n, generator=generator).to(device, getattr(torch, dtype))
            for _ in range(2)
        )
        start = time.perf_counter()
        seconds = best(lambda a=a, b=b: torch.mm(a, b), 1)  # type: ignore[misc]
        repeats = 0 if time.perf_counter() - start > 4 else 4
        for _ in range(repeats):
            seconds = min(seconds, clock.time(lambda a=a, b=b: torch.mm(a, b)))  # type: ignore[misc]
        flops[dtype] = 2.0 * n**3 / seconds
    if exps is not None:
        return Ceilings(tuple(copy), flops, exps)
    if torch.device(device).type == "cuda":
        x = torch.rand(1 << 22, generator=generator).to(device)
        return Ceilings(tuple(copy), flops, exponentials_per_s(x, torch.compile(chain), clock))
    # In the cache, and enough for all threads.
    count = (1 << 12) if toy else (1 << 16) * torch.get_num_threads()
    x = torch.rand(count, generator=generator).to(device)
    y = torch.empty_like(x)

    def exponentials() -> None:
        for _ in range(16):
            torch.exp(x, out=y)

    return Ceilings(tuple(copy), flops, 16 * count / best(exponentials, 10))


CHAIN = 64


def chain(x: Tensor) -> Tensor:
    """exp(-exp(-...)), CHAIN deep: stays between 0 and 1. Compiled it is one kernel, which moves 8
    bytes for CHAIN exponentials; a call of torch.exp by itself would wait for a GPU's memory."""
    for _ in range(CHAIN):
        x = torch.exp(-x)
    return x


def exponentials_per_s(x: Tensor, function: Callable[[Tensor], Tensor], clock: Clock) -> float:
    """Of `function`, which is `chain`, compiled; infinite where it cannot be compiled."""
    try:
        function(x)
    except Exception:  # no Triton, or none for this GPU: `run` says that they were not measured
        return math.inf
    return CHAIN * x.numel() / min(clock.time(lambda: function(x)) for _ in range(10))
