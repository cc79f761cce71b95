"""Do two runs say the same? Rows of two tables, held against each other.

    sr-kernels bench --quick --out first && sr-kernels bench --quick --out second
    sr-kernels bench --agree first second

Two rows agree where their intervals from the 20th to the 80th percentile overlap: each run's own
statement of how much its time varies then covers the other's. Only rows that have a time in both
tables are compared; of what a table has from several runs, the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import table
from .table import Row, spread

__all__ = ["ENOUGH", "compare"]

ENOUGH = 0.9  # of the rows

_SAME = (
    *("op", "mode", "shape", "dtype", "provider", "cache"),
    *("threads", "device", "versions", "weights"),
)


def _timed(folder: Path) -> dict[tuple[str, ...], Row]:
    rows = [row for row in table.read(folder) if row.median_ms is not None]
    if not rows:
        raise ValueError(f"{folder / table.FILE_NAME} holds no timed row: measure first")
    rows.sort(key=lambda row: row.run)
    return {tuple(str(getattr(row, name)) for name in _SAME): row for row in rows}


def overlap(a: Row, b: Row) -> bool:
    """Whether the intervals [p20, p80] of two timed rows have a point in common."""
    ends = (a.p20_ms, a.p80_ms, b.p20_ms, b.p80_ms)
    low_a, high_a, low_b, high_b = (0.0 if end is None else end for end in ends)
    return low_a <= high_b and low_b <= high_a


def compare(first: Path, second: Path) -> tuple[list[str], float]:
    """A line per row that both tables have, and the share of them that agree.

    Raises:
        ValueError: a table has no timed row, more than a tenth of the rows are in one table only;
            or as `table.read`.
    """
    one, other = _timed(first), _timed(second)
    pairs = [(row, other[key]) for key, row in one.items() if key in other]
    if len(pairs) < ENOUGH * max(len(one), len(other)):
        raise ValueError(
            f"{first} has {len(one)} timed rows and {second} {len(other)}, of which only "
            f"{len(pairs)} are the same: measure the same in both"
        )
    agreeing = sum(overlap(a, b) for a, b in pairs)
    lines = [_line(a, b) for a, b in pairs]
    alone = len(one) + len(other) - 2 * len(pairs)
    lines.append(
        f"{agreeing} of {len(pairs)} rows agree ({agreeing / len(pairs):.0%}): their intervals of "
        f"the 20th to the 80th percentile overlap; {alone} rows are in one table only"
    )
    return lines, agreeing / len(pairs)


def _line(a: Row, b: Row) -> str:
    name = f"{a.op} {a.shape} {a.dtype} {a.mode} {a.provider}"
    name += "" if a.cache == "warm" else f" {a.cache}"
    ratio = (b.median_ms or 0.0) / (a.median_ms or 1.0)
    verdict = "agree" if overlap(a, b) else "DIFFER"
    times = f"{spread(a) + ' ms':>34}{spread(b) + ' ms':>34}"
    return f"{name:<72}{times}{ratio:>8.3f}  {verdict}{_busy((a, b))}"


def _busy(rows: Sequence[Row]) -> str:
    load = max(row.other_load or 0.0 for row in rows)
    return f"  (busy machine: {load:.1f} cores)" if load > table.BUSY else ""
