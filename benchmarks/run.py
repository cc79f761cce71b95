"""A run: every case verified, timed, and written before the next one begins."""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sr_kernels.cli.demo import PHOTOGRAPH

from . import ceilings, measure, table
from .cases import Case
from .providers import (
    COMPILE,
    MAX_AUTOTUNE,
    OURS,
    Provider,
    Subject,
    Unavailable,
    stem,
    subject,
)
from .table import BUSY, Row
from .verify import Truth
from .work import bound
from .worker import HEAPS, Apart, Failed, Here

__all__ = ["PHOTOGRAPH", "Measurement", "Settings", "run"]

# The definition in float64 writes out whole attention matrices: beyond this many pixels results are
# held against stock in the dtype under test.
ORACLE_PIXELS = {"forward": 600 * 1024, "backward": 8 * 64 * 64, "both": 8 * 64 * 64}
NETWORK_ORACLE_PIXELS = {**ORACLE_PIXELS, "forward": 400 * 640}

# Each case is visited so often for samples, and between two visits every other case of its group
# once: what a machine does differently from minute to minute is then in the spread. Of a group
# everything stays in memory meanwhile, so it ends early when that becomes this share of the
# machine's.
VISITS = 6
GROUP, GROUP_MEMORY = 20, 0.4
# Two providers of a case prepare at once, up to this many pixels.
CROWD_PIXELS = 400 * 640
# Before each sample: torch's threads spin for some milliseconds after a call, other runtimes' for
# longer.
PAUSE, FOREIGN_PAUSE = 0.01, 0.05


@dataclass(frozen=True)
class Settings:
    """seconds: of samples per provider.  memory: measure it.  providers: names, empty for all.

    least: rounds of each visit, at least.  slow: of all providers also those that take minutes to
    compile; one that is named is wanted anyway.  weights: by network.  image: the photograph.
    apart: on a CPU, each provider in a process of its own; without it memory is measured on a GPU
    only.  heap: of these processes, one of `worker.HEAPS`.
    """

    threads: int
    seconds: float = 3.0
    memory: bool = True
    providers: tuple[str, ...] = ()
    weights: Mapping[str, Path] = field(default_factory=dict)
    image: Path = PHOTOGRAPH
    apart: bool = True
    least: int = measure.MIN_ROUNDS
    slow: bool = True
    heap: str = "kept"

    def wants(self, provider: Provider) -> bool:
        name, named = stem(provider.name), set(self.providers)
        if not named:
            return self.slow or not provider.slow
        if {provider.name, name} & named:
            return True
        # It gets the memory format that stock is faster in, and that has to be found out.
        return name == "eager" and bool({COMPILE, MAX_AUTOTUNE} & named)


def run(
    cases: Sequence[Case],
    settings: Settings,
    out: Path,
    *,
    say: Callable[[str], None],
    progress: Callable[[str], Callable[[int, int], None]],
    toy: bool = False,
) -> tuple[list[Row], list[Case]]:
    """Measures all cases and adds their rows to the table in `out`, case by case.

    progress: given a label, returns what is called with (done, total).

    Returns all rows, and the cases that could not be measured at all.
    """
    torch.set_num_threads(settings.threads)
    # What is called float32 is: stock's convolutions on a GPU would otherwise round to TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began = datetime.datetime.now(datetime.timezone.utc)
    name = f"{began:%Y%m%dT%H%M%SZ}-{os.getpid()}"
    devices = sorted({case.device for case in cases})
    limits = {}
    for device in devices:
        dtypes = tuple(sorted({case.arithmetic for case in cases if case.device == device}))
        limits[device] = ceilings.measure(device, dtypes, toy=toy)
        say(_describe(device, limits[device], settings.threads))
    if not (settings.slow or settings.providers) and any(case.is_network for case in cases):
        say("torch.compile of whole networks takes minutes, and is left out: --op NETWORK has it")
    everything: dict[Case, list[Row]] = {}
    failed: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="sr_kernels-bench-") as folder:

        def visit(number: int, measurement: Measurement, index: int) -> bool:
            """Takes a part of the samples; whether that was possible."""
            case = measurement.case
            try:
                if number == 1:
                    measurement.prepare()
                label = f"{index + 1}/{len(cases)} {case}, {number} of {VISITS}"
                measurement.sample(settings.seconds / VISITS, progress(label))
            except Exception as problem:
                # Of the case itself (a size that windows do not divide, no memory for the
                # definition): the cases behind it are measured all the same.
                say(f"\n{case}: failed: {type(problem).__name__}: {_line(problem)}")
                failed.append(case)
                return False
            everything[case] = measurement.rows(limits[case.device])
            table.add(out, everything[case], unfinished=number < VISITS)
            if number == 1:
                timed = sum(row.median_ms is not None for row in everything[case])
                say(f"{label}: {timed} of {len(everything[case])} rows timed")
            return True

        rest = list(enumerate(cases))
        while rest:
            group: list[tuple[int, Measurement]] = []
            try:
                while rest and len(group) < GROUP and _room(group, rest[0][1]):
                    index, case = rest.pop(0)
                    new = Measurement(case, settings, Path(folder), run=name)
                    group.append((index, new))
                    if not visit(1, new, index):
                        group.pop()[1].close()
                for device in devices:
                    known = None if device == "cpu" else limits[device].exps  # compiles
                    again = ceilings.measure(device, (*limits[device].flops,), toy=toy, exps=known)
                    limits[device] = limits[device].best(again)
                for number in range(2, VISITS + 1):
                    for index, measurement in list(group):
                        if not visit(number, measurement, index):
                            group.remove((index, measurement))
                            measurement.close()
                for _, measurement in group:
                    say("\n".join(report(everything[measurement.case])))
            finally:
                for _, measurement in group:
                    measurement.close()
            gc.collect()
            torch.compiler.reset()  # what was compiled for these cases
    for device in devices:
        say("\n" + _describe(device, limits[device], settings.threads))
    return [row for rows in everything.values() for row in rows], failed


def _room(group: Sequence[tuple[int, Measurement]], case: Case) -> bool:
    """Whether the case may join: a pixel of it will need what one of the largest there does."""
    if not group:
        return True
    present = [measurement for _, measurement in group]
    if not present[0].apart:  # on a GPU: its memory is for one
        return False
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = max(present, key=lambda measurement: measurement.case.pixels)
    expected = largest.private * case.pixels / largest.case.pixels
    return expected + sum(one.private for one in present) < GROUP_MEMORY * installed


def _describe(device: str, limits: ceilings.Ceilings, threads: int) -> str:
    products = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in limits.flops.items()
    )
    return (
        f"{table.device_name(device)}, {threads} threads, torch {torch.__version__}: "
        f"copy {limits.copy[-1][1] / 1e9:.1f} GB/s, matrix product {products}"
        + (
            f", {limits.exps / 1e9:.2f} G exponentials/s"
            if math.isfinite(limits.exps)
            else "; exponentials could not be measured, and bound no row"
        )
    )


class Measurement:
    """One case: every provider made ready and verified once, then sampled as often as one likes.

    run: what identifies the run, in every row of it.  apart: whether providers have processes of
    their own.  private: bytes that these alone keep in memory.
    """

    def __init__(self, case: Case, settings: Settings, folder: Path, *, run: str = "") -> None:
        self.case = case
        self.private = 0
        self.apart = settings.apart and case.device == "cpu"
        self._settings, self._folder = settings, folder
        self._rows: dict[str, Row] = {}
        self._stations: dict[str, Here | Apart] = {}
        self._samplers: dict[str, dict[str, measure.Sampler]] = {}
        self._rounds: dict[str, measure.Rounds] = {}
        self._samples: dict[tuple[str, str], list[float]] = {}
        self._busy: dict[str, float] = {}
        self._run = run

    @functools.cached_property
    def _subject(self) -> Subject:
        return self._build(self.case)

    @property
    def _warm(self) -> str:
        """The one state of the cache on a CPU. This process keeps its heap as it is."""
        return HEAPS[self._settings.heap if self.apart else "kept"]

    @property
    def _build(self) -> Callable[[Case], Subject]:
        settings = self._settings
        return functools.partial(
            subject,
            weights=settings.weights.get(self.case.op),
            image=settings.image,
            folder=self._folder,
        )

    @functools.cached_property
    def _truth(self) -> Truth:
        return truth_of(self._subject)

    def prepare(self) -> Measurement:
        """Every provider that can be, verified and ready to be sampled."""
        this = self._subject
        chosen = [p for p in this.providers if self._settings.wants(p)]
        blank = Row(
            op=self.case.op,
            mode=self.case.mode,
            shape=self.case.shape,
            dtype=self.case.dtype,
            provider="",
            cache="hot" if self.case.device != "cpu" else self._warm,
            threads=self._settings.threads,
            device=table.device_name(self.case.device),
            versions="",
            commit=table.commit(),
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            run=self._run,
            weights=this.weights,
        )
        self._rows = {p.name: replace(blank, provider=p.name) for p in chosen}
        eager = [p for p in chosen if stem(p.name) == "eager"]
        self._make_ready(eager)
        if {COMPILE, MAX_AUTOTUNE} & set(self._rows):
            this.best_format = self._faster_format()
        self._make_ready([p for p in chosen if p not in eager])
        self.__dict__.pop("_truth", None)  # it may be large
        for name, station in list(self._stations.items()):
            try:
                samplers, missing = station.samplers()
            except Failed as problem:
                self._bury(problem)
                continue
            for cache, sampler in samplers.items():
                self._samplers.setdefault(cache, {})[name] = sampler
            for cache, why in missing.items():
                self._rows[f"{name} {cache}"] = replace(
                    self._rows[name], cache=cache, status="failed", reason=why, error=None
                )
        pause = 0.0
        if self.apart:
            foreign = [p for p in this.providers if p.foreign and p.name in self._stations]
            pause = FOREIGN_PAUSE if foreign else PAUSE
        for cache, samplers in self._samplers.items():
            self._rounds[cache] = measure.Rounds(samplers, pause=pause)
        return self

    def _make_ready(self, providers: Sequence[Provider]) -> None:
        crowd = min(2, self._settings.threads) if self.case.pixels <= CROWD_PIXELS else 1
        waiting: collections.deque[tuple[Provider, Here | Apart]] = collections.deque()
        try:
            # What compiles begins first and, if two prepare at once, goes on beside all others.
            for provider in sorted(providers, key=lambda p: not p.compiles):
                if provider.foreign:
                    with contextlib.suppress(Exception):  # its reader will say so
                        self._subject.export()
                waiting.append((provider, self._station(provider)))
                if len(waiting) >= crowd:
                    waiting.rotate(-1 if crowd > 1 and waiting[0][0].compiles else 0)
                    self._verify(*waiting[0])
                    waiting.popleft()
            while waiting:
                self._verify(*waiting[0])
                waiting.popleft()
        finally:
            for _, station in waiting:
                station.close()

    def _station(self, provider: Provider) -> Here | Apart:
        settings = self._settings
        if not self.apart:
            return Here(provider, self.case, memory=settings.memory)
        return Apart(
            self._build,
            self.case,
            provider.name,
            threads=settings.threads,
            best_format=self._subject.best_format,
            file=self._folder / f"{provider.name}.pt",
            memory=settings.memory,
            heap=settings.heap,
        )

    def _verify(self, provider: Provider, station: Here | Apart) -> None:
        row = replace(self._rows[provider.name], versions=_versions(provider.name))
        truth = self._truth
        try:
            ready = station.ready()
            row = replace(
                row,
                error=truth.check(ready.results),
                memory_mb=None if ready.memory is None else ready.memory / 1e6,
                reason=ready.note,
            )
        except Exception as problem:
            station.close()
            self._rows[provider.name] = _without_time(row, problem)
            return
        if provider.name in (COMPILE, MAX_AUTOTUNE) and self._subject.best_format:
            row = replace(row, reason="; ".join(filter(None, (row.reason, "in channels_last"))))
        self._rows[provider.name] = row
        self._stations[provider.name] = station
        self.private += ready.private

    def _faster_format(self) -> str:
        """Which of stock's two formats torch.compile gets: a short race."""
        times = {}
        for name, station in list(self._stations.items()):
            try:
                samplers, _ = station.samplers()
                sampler = next(iter(samplers.values()))  # a GPU's is the hot cache's
                times[name.removeprefix("eager")] = min(sampler(1, True), sampler(1, False))
            except Failed as problem:
                self._bury(problem)
        return min(times, key=lambda suffix: times[suffix], default="")

    def sample(self, seconds: float, progress: Callable[[int, int], None] | None = None) -> None:
        """Samples of all in turn, for about so many seconds of each, added to those there are."""
        for cache, rounds in self._rounds.items():
            while self._samplers[cache]:
                others = measure.OtherLoad()
                ours = -sum(station.cpu_seconds for station in self._stations.values())
                try:
                    samples = rounds.sample(seconds, least=self._settings.least, progress=progress)
                except Failed as problem:
                    self._bury(problem)
                    continue
                ours += sum(station.cpu_seconds for station in self._stations.values())
                self._busy[cache] = max(self._busy.get(cache, 0.0), others.cores(ours) or 0.0)
                for name, values in samples.items():
                    calls = self._stations[name].calls.get(cache, 1)
                    taken = self._samples.setdefault((cache, name), [])
                    taken.extend(value / calls for value in values)
                break

    def _bury(self, problem: Failed) -> None:
        self._stations.pop(problem.provider).close()
        for samplers in self._samplers.values():
            samplers.pop(problem.provider, None)
        self._rows[problem.provider] = _without_time(self._rows[problem.provider], problem)

    def rows(self, limits: ceilings.Ceilings) -> list[Row]:
        """One per provider (and state of the cache, on a GPU), of the samples up to now."""
        result = [row for row in self._rows.values() if row.status != "ok"]
        for (cache, name), values in self._samples.items():
            if self._rows[name].status == "ok":
                row = replace(self._rows[name], cache=cache, other_load=self._busy[cache])
                result.append(_timed(row, measure.summarize(values), self._subject, limits))
        order = {p.name: i for i, p in enumerate(self._subject.providers)}
        return sorted(result, key=lambda row: (row.cache, order[row.provider]))

    def close(self) -> None:
        """Ends the processes and lets go of what they needed. May be called again."""
        while self._stations:
            self._stations.popitem()[1].close()
        self._samplers.clear()


def _without_time(row: Row, problem: Exception) -> Row:
    if isinstance(problem, Unavailable):
        return replace(row, status="unavailable", reason=_line(problem))
    if isinstance(problem, AssertionError):
        return replace(row, status="wrong", reason=_line(problem))
    kind = "" if isinstance(problem, Failed) else f"{type(problem).__name__}: "
    return replace(row, status="failed", reason=kind + _line(problem))


def _line(problem: BaseException) -> str:
    """The first two lines of a message, as one, and not endless."""
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    return "; ".join(lines[:2])[:300]


def truth_of(this: Subject) -> Truth:
    """What the results of every provider of a case are held against."""
    case = this.case
    stock = _on_cpu(this.stock(None).results(case.mode))
    oracle = None
    limit = NETWORK_ORACLE_PIXELS if case.is_network else ORACLE_PIXELS
    if case.pixels <= limit[case.mode]:
        oracle = _on_cpu(this.stock(torch.float64).results(case.mode))
    elif case.autocast:  # how far its gradients differ by rounding, no part of the range says
        oracle = _on_cpu(this.stock(torch.float32).results(case.mode))
    return Truth(stock, oracle, case.arithmetic)


def _on_cpu(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu") for name, value in results.items()}


def _timed(row: Row, timing: measure.Timing, this: Subject, limits: ceilings.Ceilings) -> Row:
    case = this.case
    work = this.work[case.mode]
    rate = limits.copy[-1][1] if row.cache == "cold" else limits.bytes_per_s(work.bytes)
    flops = limits.flops[case.arithmetic]
    least = bound(work, bytes_per_s=rate, flops_per_s=flops, exps_per_s=limits.exps)
    return replace(
        row,
        median_ms=1e3 * timing.median,
        p20_ms=1e3 * timing.p20,
        p80_ms=1e3 * timing.p80,
        samples=timing.samples,
        bytes=work.bytes,
        flops=work.flops,
        exponentials=work.exponentials,
        bound=least.name,
        floor_ms=1e3 * least.seconds,
        fraction=least.seconds / timing.median,
        copy_gbs=rate / 1e9,
        matmul_gflops=flops / 1e9,
        exp_gs=limits.exps / 1e9 if math.isfinite(limits.exps) else None,
    )


def _versions(provider: str) -> str:
    """ "torch 2.13.0+cpu", and the runtime's that did the work."""
    found = f"torch {torch.__version__}"
    if provider in ("openvino", "onnxruntime"):
        try:
            found += f", {provider} {importlib.metadata.version(provider)}"
        except importlib.metadata.PackageNotFoundError:
            found += f", no {provider}"
    return found


# ------------------------------------------------------------------------------ for people


def provider_names(case: Case) -> set[str]:
    """What `Settings.providers` may ask for, without building anything large."""
    toy = replace(case, batch=1, height=16, width=48)  # window attention needs 8, ELAN's 16
    with tempfile.TemporaryDirectory() as folder:
        this = subject(toy, weights=None, image=PHOTOGRAPH, folder=Path(folder))
        names = {provider.name for provider in this.providers}
    return names | {stem(name) for name in names}


def fastest_other(rows: Sequence[Row]) -> Row | None:
    """The fastest of one case's timed rows that is not of this package."""
    timed = [r for r in rows if r.median_ms is not None and not is_ours(r.provider)]
    return min(timed, key=lambda r: r.median_ms or 0.0, default=None)


def is_ours(provider: str) -> bool:
    """Whether a row's provider is this package: "cpu", "cpu_plan", "cuda_channels_last", ..."""
    return stem(provider) in OURS


def report(rows: Sequence[Row]) -> list[str]:
    """A table of one case for the terminal."""
    if not rows:
        return []
    first = rows[0]
    weights = f", weights: {first.weights}" if first.weights else ""
    lines = [f"\n{first.op} {first.shape} {first.dtype} {first.mode}{weights}"]
    for cache in dict.fromkeys(row.cache for row in rows):
        group = [row for row in rows if row.cache == cache]
        other = fastest_other(group)
        timed = [row for row in group if row.median_ms is not None]
        if timed:
            floor = timed[0]
            if floor.other_load is not None and floor.other_load > BUSY:
                lines.append(
                    f"  not to be trusted: other programs kept {floor.other_load:.1f} cores busy"
                )
            lines.append(
                f"  {cache + ': ' if cache != 'warm' else ''}"
                f"floor {table.digits(floor.floor_ms)} ms (bound by {floor.bound})"
            )
            lines.append(
                f"  {'provider':<30}{'median ms':>10}{'p20':>9}{'p80':>9}"
                f"{'of floor':>10}{'speed-up':>10}{'memory MB':>11}{'error':>10}"
            )
        for row in sorted(group, key=lambda r: r.median_ms or float("inf")):
            if row.median_ms is None:
                lines.append(f"  {row.provider:<30}{row.status}: {row.reason}")
                continue
            ratio = ""
            if other is not None and other.median_ms is not None and is_ours(row.provider):
                ratio = f"{other.median_ms / row.median_ms:.2f}x"
            memory = "" if row.memory_mb is None else f"{row.memory_mb:.0f}"
            lines.append(
                f"  {row.provider:<30}{table.digits(row.median_ms):>10}"
                f"{table.digits(row.p20_ms):>9}{table.digits(row.p80_ms):>9}"
                f"{row.fraction:>10.0%}{ratio:>10}{memory:>11}{row.error:>10.1e}"
            )
    return lines
