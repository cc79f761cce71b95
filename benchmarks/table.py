"""The table of results: one CSV file, one row per provider and case.

A row is identified by `KEY`; measuring the same thing again on the same day and commit replaces it.
Only rows of one run (`Row.run`) are compared with each other: two runs met two states of the
machine. Rows are written after every case, the file as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import io
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from sr_kernels._files import whole_or_nothing
from sr_kernels._version import __version__
from sr_kernels.cli.env import cpu_info, cpu_name

__all__ = ["FILE_NAME", "KEY", "Row", "add", "commit", "device_name", "read"]

FILE_NAME = "results.csv"
SYSTEM_HEAP = "system heap"  # a state of the cache: see Row
# Cores that other programs may use during a measurement before reports warn.
BUSY = 0.2

# What a measurement depends on; the results themselves are written by it.
_SOURCES = (
    *("setup.py", "pyproject.toml", "csrc", "sr_kernels", "models", "benchmarks"),
    ":(exclude)benchmarks/results",
)


@dataclass(frozen=True)
class Row:
    """One provider at one case. Times in milliseconds, memory in 10^6 bytes, rates in 10^9/s.

    status: "ok"; "wrong" (its result is, so it has no time); "failed"; "unavailable"; the last
    three with a reason. cache: "warm" on a CPU, or "system heap" (warm, and freed memory is not
    kept); "hot", "cold" or "graph" (hot, launches taken away, or a graph of its own) on a GPU.
    error: largest absolute error. other_load: cores that other programs used meanwhile. bound,
    floor_ms, fraction: see `work.bound`; fraction = floor_ms / median_ms. weights: of a network.
    run: one per run, "20261121T065000Z-12345", its time in UTC and its process; runs sort by it.
    """

    op: str
    mode: str
    shape: str
    dtype: str
    provider: str
    cache: str
    threads: int
    device: str
    versions: str
    commit: str
    date: str
    run: str
    status: str = "ok"
    reason: str = ""
    weights: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    memory_mb: float | None = None
    error: float | None = None
    other_load: float | None = None
    bytes: float | None = None
    flops: float | None = None
    exponentials: float | None = None
    bound: str = ""
    floor_ms: float | None = None
    fraction: float | None = None
    copy_gbs: float | None = None
    matmul_gflops: float | None = None
    exp_gs: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        n, c, h, w = (int(part) for part in self.shape.split("x"))
        return n, c, h, w

    @property
    def case(self) -> tuple[str, ...]:
        """What rows that may be compared with each other agree in."""
        return tuple(str(getattr(self, name)) for name in _CASE)


KEY = (
    *("op", "mode", "shape", "dtype", "provider", "cache"),
    *("threads", "device", "versions", "commit", "date", "weights"),
)
_CASE = (
    *("op", "mode", "shape", "dtype", "cache"),
    *("threads", "device", "commit", "weights", "run"),
)
# Of a row without a time: what agrees in these is out of date. It failed before it had a cache.
_FAILED = tuple(name for name in KEY if name not in ("cache", "versions"))
_NUMBERS = {f.name for f in fields(Row) if "float" in str(f.type) or "int" in str(f.type)}
_WHOLE = {"threads", "samples"}
_REQUIRED = {"threads"}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def digits(value: float | None) -> str:
    """Four significant digits, and all of those in front of the point; empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"


def spread(row: Row) -> str:
    """The row's median with its 20th and 80th percentile, in ms."""
    return f"{digits(row.median_ms)} ({digits(row.p20_ms)} .. {digits(row.p80_ms)})"


def read(folder: Path) -> list[Row]:
    """All rows, in the file's order; none if there is no file.

    Raises:
        ValueError: `folder` is no folder, or the file is not such a table; it names the line.
    """
    _check(folder)
    file = folder / FILE_NAME
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        try:
            text = stream.read()
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{file}, line {line}: is not text; the file is damaged") from error
    rows = []
    names = [f.name for f in fields(Row)]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if reader.fieldnames != names:
            found = set(reader.fieldnames or ())
            raise ValueError(
                f"{file} is of another version: it lacks the columns {sorted(set(names) - found)} "
                f"and has {sorted(found - set(names))} besides; move it away or choose another "
                "folder with --out"
            )
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            # DictReader fills a short line with None, and keeps a long one's rest under None.
            columns = sum(value is not None for name, value in record.items() if name in names)
            if columns < len(names) or len(record) > len(names):
                found_columns = f"{columns} columns" if columns < len(names) else "more columns"
                raise ValueError(
                    f"{where}: {found_columns} where there are {len(names)}; the line is damaged"
                )
            values: dict[str, object] = dict(record)
            for name in _NUMBERS:
                values[name] = _number(name, record[name], where)
            row = Row(**values)  # type: ignore[arg-type]
            _check_row(row, where)
            rows.append(row)
    except csv.Error as error:
        # The reader counts a line once it has it: the one that it stumbles over is the next.
        raise ValueError(f"{file}, line {reader.line_num + 1}: {error}") from error
    return rows


def _check_row(row: Row, where: str) -> None:
    """Raises ValueError for what reports could not be made of."""
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*){3}", row.shape):
        raise ValueError(f"{where}: shape is {row.shape!r}; expected NxCxHxW")
    if row.median_ms is None:
        return
    if not 0 < row.median_ms < float("inf"):
        raise ValueError(f"{where}: median_ms is {row.median_ms}; expected a positive number")
    for name in ("p20_ms", "p80_ms", "bound", "fraction"):
        if getattr(row, name) in (None, ""):
            raise ValueError(f"{where}: {name} is ''; a row with a time has one")


def _number(name: str, text: str, where: str) -> float | int | None:
    if text == "" and name not in _REQUIRED:
        return None
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "an integer" if name in _WHOLE else "a number"
        raise ValueError(f"{where}: {name} is {text!r}; expected {kind}") from None


def _check(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            if not path.is_dir():
                raise ValueError(f"--out: {path} is not a folder")
            return


def add(folder: Path, rows: Iterable[Row], *, unfinished: bool = False) -> None:
    """Adds rows to the file; those with the same key go. Safe against a second writer.

    unfinished: more samples are to come, so that another run's row stays if it has more of them.

    A row that is not "ok" also takes away what its provider had there in other caches and with
    other versions: a provider that has become wrong keeps no times.

    Raises:
        ValueError: as `read`.
    """
    _check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = list(rows)
    runs = {row.run for row in new}
    failed = {_failed(row) for row in new if row.status != "ok"}
    with _locked(folder):
        old = [row for row in read(folder) if _failed(row) not in failed]
        if unfinished:
            samples = {row.key: row.samples or 0 for row in old if row.run not in runs}
            new = [row for row in new if samples.get(row.key, 0) <= (row.samples or 0)]
        replaced = {row.key for row in new}
        kept = [row for row in old if row.key not in replaced]
        with whole_or_nothing(folder / FILE_NAME) as file:
            stream = io.TextIOWrapper(file, newline="")
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([f.name for f in fields(Row)])
            for row in kept + new:
                writer.writerow([_text(value) for value in asdict(row).values()])
            stream.detach()


def _failed(row: Row) -> tuple[str, ...]:
    other_heap = row.cache == SYSTEM_HEAP
    return (*(str(getattr(row, name)) for name in _FAILED), str(other_heap))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time. The lock is the folder's, so that no file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@functools.cache
def commit() -> str:
    """The short hash of the checkout that runs, with "+" if sources were changed or added since;
    the package's version where there is no checkout. Asked for once: a run has one commit."""
    return _commit_of(Path(__file__).resolve().parents[1])


def _commit_of(root: Path) -> str:
    if not (root / "csrc").is_dir():
        return f"v{__version__}"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", *_SOURCES)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def device_name(device: str) -> str:
    """ "AMD EPYC, 2 cores, avx2" or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    from sr_kernels import backends

    return f"{cpu_name(cpu_info())}, {os.cpu_count()} cores, {backends.cpu_capability()}"
