"""A run: every case verified, timed, and written before the next one begins."""

from __future__ import annotations

import datetime
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

from . import ceilings, measure, probe, table
from .cases import Case
from .providers import OURS, Provider, Running, Subject, Unavailable, stem, subject
from .table import Row
from .verify import Truth
from .work import bound

__all__ = ["PHOTOGRAPH", "Settings", "measure_case", "run"]

# The definition in float64 writes out whole attention matrices: beyond this many pixels results are
# held against stock in the dtype under test.
ORACLE_PIXELS = {"forward": 600 * 1024, "backward": 8 * 64 * 64, "both": 8 * 64 * 64}
NETWORK_ORACLE_PIXELS = {**ORACLE_PIXELS, "forward": 400 * 640}

# Cores that other programs may use during a measurement before the report warns.
BUSY = 0.2


@dataclass(frozen=True)
class Settings:
    """seconds: of samples per provider.  memory: measure it.  providers: names, empty for all.

    weights: by network.  image: the photograph.
    """

    threads: int
    seconds: float = 3.0
    memory: bool = True
    providers: tuple[str, ...] = ()
    weights: Mapping[str, Path] = field(default_factory=dict)
    image: Path = PHOTOGRAPH

    def wants(self, provider: str) -> bool:
        asked = {provider, stem(provider)} & set(self.providers)
        return not self.providers or bool(asked)


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
        dtypes = tuple(sorted({case.dtype for case in cases if case.device == device}))
        limits[device] = ceilings.measure(device, dtypes, toy=toy)
        say(_describe(device, limits[device], settings.threads))
    everything: list[Row] = []
    failed: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="sr_kernels-bench-") as folder:
        for index, case in enumerate(cases):
            label = f"{index + 1}/{len(cases)} {case}"
            try:
                rows = measure_case(
                    case,
                    settings,
                    limits[case.device],
                    Path(folder),
                    run=name,
                    progress=progress(label),
                )
            except Exception as problem:
                # Of the case itself (a size that windows do not divide, no memory for the
                # definition): the cases behind it are measured all the same.
                say(f"\n{case}: failed: {type(problem).__name__}: {_line(problem)}")
                failed.append(case)
                continue
            table.add(out, rows)
            everything.extend(rows)
            say("\n".join(report(rows)))
            gc.collect()
            torch.compiler.reset()  # what was compiled for this case
    return everything, failed


def _describe(device: str, limits: ceilings.Ceilings, threads: int) -> str:
    products = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in limits.flops.items()
    )
    return (
        f"{table.device_name(device)}, {threads} threads, torch {torch.__version__}: "
        f"copy {limits.copy[-1][1] / 1e9:.1f} GB/s, matrix product {products}"
        + (f", {limits.exps / 1e9:.2f} G exponentials/s" if math.isfinite(limits.exps) else "")
    )


def measure_case(
    case: Case,
    settings: Settings,
    limits: ceilings.Ceilings,
    folder: Path,
    *,
    run: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """The rows of one case, one per provider (and state of the cache, on a GPU).

    run: what identifies the run, in every row of it.
    """
    weights = settings.weights.get(case.op)
    this = subject(case, weights=weights, image=settings.image, folder=folder)
    chosen = [p for p in this.providers if settings.wants(p.name)]
    blank = Row(
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        dtype=case.dtype,
        provider="",
        cache="hot" if case.device != "cpu" else "warm",
        threads=settings.threads,
        device=table.device_name(case.device),
        versions="",
        commit=table.commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        run=run,
        weights=this.weights,
    )
    truth = truth_of(this)
    rows: dict[str, Row] = {}
    ready: dict[str, Running] = {}
    if any(p.name == "compile" for p in chosen):
        this.best_format = _faster_format(this)
    for provider in chosen:
        row = replace(blank, provider=provider.name, versions=_versions(provider.name))
        memory = None
        try:
            if settings.memory and case.device == "cpu":
                memory, why = _memory(provider, this, settings, folder)
                row = replace(row, reason=why)
            running, error = _verified(provider, case, truth)
        except Unavailable as problem:
            rows[provider.name] = replace(row, status="unavailable", reason=_line(problem))
            continue
        except AssertionError as problem:
            rows[provider.name] = replace(row, status="wrong", reason=_line(problem))
            continue
        except Exception as problem:
            reason = f"{type(problem).__name__}: {_line(problem)}"
            rows[provider.name] = replace(row, status="failed", reason=reason)
            continue
        ready[provider.name] = running
        if provider.name == "compile" and this.best_format:
            row = replace(row, reason="in channels_last")
        rows[provider.name] = replace(row, error=error, memory_mb=memory)
    del truth
    foreign = any(p.foreign for p in chosen if p.name in ready)
    result = [row for row in rows.values() if row.status != "ok"]
    variants, uncaptured = _variants(ready, case)
    for name, why in uncaptured.items():
        result.append(replace(rows[name], cache="graph", status="failed", reason=why, error=None))
    for cache, calls in variants.items():
        clock = measure.Clock(case.device, cold=cache == "cold")
        others = measure.OtherLoad()
        timings = measure.interleaved(
            calls,
            clock,
            seconds=settings.seconds,
            pause=0.05 if foreign else 0.0,
            progress=progress,
        )
        busy = others.cores()
        for name, timing in timings.items():
            if cache == "graph":
                timing = timing.divided(measure.GRAPH_CALLS)
            row = replace(rows[name], cache=cache, other_load=busy)
            result.append(_timed(row, timing, this, limits))
    if case.device != "cpu" and settings.memory:
        peaks = {name: _gpu_memory(running, case) for name, running in ready.items()}
        result = [replace(row, memory_mb=peaks.get(row.provider)) for row in result]
    order = {p.name: i for i, p in enumerate(chosen)}
    return sorted(result, key=lambda row: (row.cache, order[row.provider]))


def _line(problem: BaseException) -> str:
    """The first two lines of a message, as one, and not endless."""
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    return "; ".join(lines[:2])[:300]


def truth_of(this: Subject) -> Truth:
    """What the results of every provider of a case are held against."""
    case = this.case
    dtype = getattr(torch, case.dtype)
    stock = _on_cpu(this.stock(dtype).results(case.mode))
    oracle = None
    limit = NETWORK_ORACLE_PIXELS if case.is_network else ORACLE_PIXELS
    if case.pixels <= limit[case.mode]:
        oracle = _on_cpu(this.stock(torch.float64).results(case.mode))
    return Truth(stock, oracle, case.dtype)


def _on_cpu(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu") for name, value in results.items()}


def _verified(provider: Provider, case: Case, truth: Truth) -> tuple[Running, float]:
    running = provider.build()
    return running, truth.check(running.results(case.mode))


def _memory(
    provider: Provider, this: Subject, settings: Settings, folder: Path
) -> tuple[float | None, str]:
    """Megabytes, or None and why; raises what says that the provider is not to be run here."""
    case = this.case
    try:
        grown = probe.growth(
            case,
            provider.name,
            threads=settings.threads,
            weights=settings.weights.get(case.op),
            image=settings.image,
            folder=folder,
            best_format=this.best_format,
        )
    except probe.ProbeFailed as problem:
        if problem.killed:
            raise
        return None, f"memory: {_line(problem)}"
    return grown / 1e6, ""


def _faster_format(this: Subject) -> str:
    """Which of stock's two formats torch.compile gets: a short race."""
    case = this.case
    clock = measure.Clock(case.device)
    times = {}
    for provider in this.providers:
        if stem(provider.name) != "eager":
            continue
        call = provider.build().call(case.mode)
        call()
        suffix = provider.name.removeprefix("eager")
        times[suffix] = min(clock.time(call) for _ in range(2))
    return min(times, key=lambda suffix: times[suffix])


def _variants(
    ready: dict[str, Running], case: Case
) -> tuple[dict[str, dict[str, Callable[[], object]]], dict[str, str]]:
    """By state of the cache, what is timed; and by provider, why it has no CUDA graph."""
    calls = {name: running.call(case.mode) for name, running in ready.items()}
    if not calls:
        return {}, {}
    if case.device == "cpu":
        return {"warm": calls}, {}
    graphs, failed = {}, {}
    if case.mode != "backward":  # it goes through a graph of autograd's that was made outside
        for name, call in calls.items():
            try:
                graphs[name] = measure.graphed(call)
            except Exception as problem:
                failed[name] = f"{type(problem).__name__}: {_line(problem)}"
    variants = {"hot": calls, "cold": calls, **({"graph": graphs} if graphs else {})}
    return variants, failed


def _timed(row: Row, timing: measure.Timing, this: Subject, limits: ceilings.Ceilings) -> Row:
    case = this.case
    work = this.work[case.mode]
    rate = limits.copy[-1][1] if row.cache == "cold" else limits.bytes_per_s(work.bytes)
    flops = limits.flops[case.dtype]
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


def _gpu_memory(running: Running, case: Case) -> float:
    """Megabytes: peak of torch's allocator during one call, over what was allocated before it."""
    call = running.call(case.mode)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


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
                f"  {cache + ' cache: ' if cache != 'warm' else ''}floor {floor.floor_ms:.4g} ms "
                f"(bound by {floor.bound})"
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
                f"  {row.provider:<30}{row.median_ms:>10.4g}{row.p20_ms:>9.4g}{row.p80_ms:>9.4g}"
                f"{row.fraction:>10.0%}{ratio:>10}{memory:>11}{row.error:>10.1e}"
            )
    return lines
