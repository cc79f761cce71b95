"""Time and memory of what was verified before.

Samples of all candidates are taken in turn, in an order that rotates from round to round, so that
whatever the machine does meanwhile (other programs, a changing clock) meets all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

# Seconds per call, of this many calls in a row; if the second argument is true, after one call
# outside the sample: the caches then hold what this call needs, not its predecessor's data.
Sampler = Callable[[int, bool], float]

# A sample lasts at least this long: shorter ones would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.02
# Each time that samples are taken; fewer where one takes longer than LONG_SECONDS.
MIN_ROUNDS, MIN_LONG_ROUNDS, MAX_ROUNDS = 2, 1, 10
LONG_SECONDS = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the samples, and their 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    samples: int


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy's."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(values: list[float]) -> Timing:
    return Timing(
        percentile(values, 0.5), percentile(values, 0.2), percentile(values, 0.8), len(values)
    )


class Clock:
    """Seconds that a call takes on a device: wall time on the CPU, events on a GPU.

    cold: on a GPU, overwrite its second-level cache before each call.
    """

    def __init__(self, device: str, *, cold: bool = False) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._flush: torch.Tensor | None = None
        if self.cuda and cold:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def time(self, call: Call, repeats: int = 1) -> float:
        """Mean over `repeats` calls in a row."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        pairs = []
        # Waiting until the queue is empty would add the launch of the first call to it.
        groups = repeats if self._flush is not None else 1
        for _ in range(groups):
            if self._flush is not None:
                self._flush.zero_()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(repeats // groups):
                call()
            last.record()
            pairs.append((first, last))
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in pairs) / 1e3 / repeats

    def sampler(self, call: Call) -> Sampler:
        def sample(repeats: int, warm: bool) -> float:
            if warm:
                call()
            return self.time(call, repeats)

        return sample


GRAPH_CALLS = 20


def graph_calls(seconds: float) -> int:
    """How many calls, of so many seconds each, a CUDA graph holds: what fills a sample, at most
    GRAPH_CALLS."""
    return max(1, min(GRAPH_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))))


def graphed(call: Call, calls: int) -> Call:
    """`calls` calls as one replay of a CUDA graph, whose own launch is spread over them.

    Raises what the capture raises, and AssertionError where a replay gives another result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    captured: object = None
    # Not torch.cuda.graph: a capture that fails would leave its stream the current one.
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for _ in range(calls):
                captured = call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected)
    return graph.replay


class Rounds:
    """Samples of all in turn, as often as one comes back for more.

    samplers: by name; who has gone from there between two calls is sampled no more.
    pause: seconds of sleep before each sample, for runtimes whose threads go on spinning for a
    while after a call and would slow the next one down.
    """

    def __init__(self, samplers: Mapping[str, Sampler], *, pause: float = 0.0) -> None:
        self._samplers, self._pause = samplers, pause
        self._repeats: dict[str, int] = {}
        self._estimate: dict[str, float] = {}
        self._turn = 0

    def sample(
        self,
        seconds: float,
        *,
        least: int = MIN_ROUNDS,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, list[float]]:
        """For about `seconds` each, but at least `least` rounds; of calls longer than LONG_SECONDS
        at least MIN_LONG_ROUNDS."""
        names = list(self._samplers)
        samples: dict[str, list[float]] = {name: [] for name in names}
        with quiet():
            for name in names:
                if name not in self._estimate:
                    self._look_at(name)
            slowest = max(self._estimate[name] for name in names)
            if slowest > LONG_SECONDS:
                least = min(least, MIN_LONG_ROUNDS)
            rounds = max(least, min(MAX_ROUNDS, round(seconds / slowest)))
            for done in range(rounds):
                start = self._turn % len(names)
                self._turn += 1
                for name in names[start:] + names[:start]:
                    time.sleep(self._pause)
                    # Not for calls that are longer than that can matter.
                    warm = self._estimate[name] < 2 * SAMPLE_SECONDS
                    samples[name].append(self._samplers[name](self._repeats[name], warm))
                if progress is not None:
                    progress(done + 1, rounds)
        return samples

    def _look_at(self, name: str) -> None:
        once = wall = float("inf")
        for _ in range(3):  # one may have been disturbed
            began = time.perf_counter()
            once = min(once, max(self._samplers[name](1, True), 1e-7))
            wall = min(wall, time.perf_counter() - began)
            if wall > SAMPLE_SECONDS:
                break
        # What a sample costs besides (overwriting a GPU's cache) has its limit too.
        self._repeats[name] = max(1, min(math.ceil(SAMPLE_SECONDS / once), round(0.4 / wall)))
        self._estimate[name] = once * self._repeats[name]


class OtherLoad:
    """How many cores other programs keep busy from now on."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), self._busy(), time.process_time())

    @staticmethod
    def _busy() -> float | None:
        """CPU seconds that the machine has spent on anything, or None where that is not known."""
        try:
            numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except (OSError, ValueError, IndexError):
            return None
        user, nice, system, _, _, irq, softirq, steal = numbers[:8]
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def cores(self, workers: float = 0.0) -> float | None:
        """Their mean number since the beginning; `workers`: CPU seconds that are ours as well."""
        wall, busy, own = self._start
        now = self._busy()
        if now is None or busy is None:
            return None
        elapsed = max(time.perf_counter() - wall, 1e-9)
        return max(0.0, (now - busy - (time.process_time() - own) - workers) / elapsed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ------------------------------------------------------------------------------ memory


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only")
    return int(found[1]) * 1024


def resident() -> int:
    """Bytes of this process in memory, after what was freed has been given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps what it keeps
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def private() -> int:
    """Bytes in memory that are this process's alone; what a fork shares with its parent is not."""
    gc.collect()
    return sum(
        int(size) * 1024
        for size in re.findall(
            r"^Private_\w+:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE
        )
    )


def keep_freed_memory() -> None:
    """From here on the C library keeps what this process frees, but for blocks above 32 MB.

    A program that frees a block of that size is brought there by glibc itself, which otherwise goes
    by how the heap happens to lie: some processes give their buffers back after every call and meet
    thousands of page faults in the next, others of the same program none.
    """
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
    if not (libc.mallopt(mmap_threshold, 32 << 20) and libc.mallopt(trim_threshold, -1)):
        raise OSError("the C library's mallopt does not take the thresholds")


def reset_peak() -> None:
    """Starts the peak of this process anew, from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process had in memory since the last `reset_peak`."""
    return _status("VmHWM")
