"""The table of results: one CSV file, one row per provider and case.

A row is identified by `KEY`; measuring the same thing again on the same day and commit replaces it.
Rows are written after every case, the file as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from sr_kernels._version import __version__

__all__ = ["FILE_NAME", "KEY", "Row", "add", "commit", "device_name", "read"]

FILE_NAME = "results.csv"


@dataclass(frozen=True)
class Row:
    """One provider at one case. Times in milliseconds, memory in 10^6 bytes, rates in 10^9/s.

    status: "ok"; "wrong" (its result is, so it has no time); "failed"; "unavailable"; the last
    three with a reason.  cache: "warm" on a CPU; "hot", "cold" or "graph" (hot, launches taken
    away) on a GPU.  error: largest absolute error.  other_load: cores that other programs used
    meanwhile.  bound, floor_ms, fraction: see `work.bound`;
    fraction = floor_ms / median_ms.  weights: of a network.
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
        names = ("op", "mode", "shape", "dtype", "cache", "threads", "device", "commit", "date")
        return tuple(str(getattr(self, name)) for name in names)


KEY = (
    *("op", "mode", "shape", "dtype", "provider", "cache"),
    *("threads", "device", "versions", "commit", "date"),
)
_NUMBERS = {f.name for f in fields(Row) if "float" in str(f.type) or "int" in str(f.type)}
_WHOLE = {"threads", "samples"}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(folder: Path) -> list[Row]:
    """All rows, in the file's order; none if there is no file."""
    file = folder / FILE_NAME
    if not file.exists():
        return []
    rows = []
    names = [f.name for f in fields(Row)]
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != names:
            found = set(reader.fieldnames or ())
            raise ValueError(
                f"{file} is of another version: it lacks the columns {sorted(set(names) - found)} "
                f"and has {sorted(found - set(names))} besides; move it away or choose another "
                "folder with --out"
            )
        for record in reader:
            values: dict[str, object] = dict(record)
            for name in _NUMBERS:
                text = record[name]
                values[name] = None if text == "" else (int if name in _WHOLE else float)(text)
            rows.append(Row(**values))  # type: ignore[arg-type]
    return rows


def add(folder: Path, rows: Iterable[Row]) -> None:
    """Adds rows to the file; those with the same key go. Safe against a second writer."""
    folder.mkdir(parents=True, exist_ok=True)
    new = list(rows)
    replaced = {row.key for row in new}
    with _locked(folder):
        kept = [row for row in read(folder) if row.key not in replaced]
        handle, name = tempfile.mkstemp(dir=folder, prefix=FILE_NAME, suffix=".partial")
        try:
            with os.fdopen(handle, "w", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow([f.name for f in fields(Row)])
                for row in kept + new:
                    writer.writerow([_text(value) for value in asdict(row).values()])
            os.chmod(name, 0o644)
            os.replace(name, folder / FILE_NAME)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time. The lock is the folder's, so that no file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def commit() -> str:
    """The short hash of the checkout that runs, with "+" if sources were changed since; the
    package's version where there is no checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "csrc").is_dir():
        return f"v{__version__}"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        sources = ("setup.py", "csrc", "sr_kernels", "models", "benchmarks/*.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def device_name(device: str) -> str:
    """ "AMD EPYC, 2 cores, avx2" or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    from sr_kernels import backends

    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {backends.cpu_capability()}"
