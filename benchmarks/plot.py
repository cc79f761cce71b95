"""Charts of the table, and the figures in the README: drawn from `results.csv`, never typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sr_kernels._files import whole_or_nothing

from . import table
from .cases import MissingExtra
from .networks import NETWORKS
from .run import fastest_other, is_ours
from .table import BUSY, Row, digits, spread

__all__ = ["MARKERS", "draw", "latest", "readme_section"]

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")

# Told apart without colour: shade, marker and dash differ. Shades are of one hue.
_SHADES = ("#111111", "#888888", "#cccccc", "#444444", "#aaaaaa", "#666666", "#e0e0e0")
_SIGNS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES: tuple[Any, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (8, 2)),
    (0, (1, 4)),
    (0, (8, 2, 1, 2, 1, 2)),
    (0, (3, 5)),
    (0, (12, 2, 2, 2)),
    (0, (2, 1, 2, 4)),
)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of everything that was measured more than once, the rows of one run.

    That is the newest run with a row of ours and another provider's time; where there is none, the
    newest of all, whose rows then stand in no comparison. Rows of two runs are never mixed.
    """
    everything = list(rows)
    newest: dict[tuple[str, ...], tuple[bool, str, str]] = {}
    for group in _cases(everything):
        rank = _rank(group)
        newest[_same(group[0])] = max(rank, newest.get(_same(group[0]), rank))
    chosen = {(same, *rank[1:]) for same, rank in newest.items()}
    return [row for row in everything if (_same(row), row.run, row.commit) in chosen]


def _rank(group: Sequence[Row]) -> tuple[bool, str, str]:
    # A row of ours that is wrong counts: an older time must not stand in for it.
    ours = any(is_ours(row.provider) and row.status != "unavailable" for row in group)
    return ours and fastest_other(group) is not None, group[0].run, group[0].commit


def _same(row: Row) -> tuple[str, ...]:
    names = ("op", "mode", "shape", "dtype", "cache", "threads", "device", "weights")
    return tuple(str(getattr(row, name)) for name in names)


def _cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by case, in the file's order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return list(groups.values())


def _best(rows: Sequence[Row]) -> Row | None:
    """The fastest of our rows of one case."""
    ours = [row for row in rows if row.median_ms is not None and is_ours(row.provider)]
    return min(ours, key=lambda row: row.median_ms or 0.0, default=None)


def draw(folder: Path, root: Path | None = None) -> list[Path]:
    """Draws speedup, roofline and sizes, each as PNG and SVG, for each device in the table.

    Of each device with the number of threads that the most rows have: numbers of threads are not
    mixed, and a few rows with more threads do not push out a whole table.

    Where `folder` is benchmarks/results of the checkout `root` (default: the one that this file is
    in), and the README there holds the markers, renews what is between them. Returns the files.

    Raises:
        ValueError: no row in the table has a time; or as `table.read`.
        MissingExtra: matplotlib is not installed.
    """
    root = (ROOT if root is None else root).resolve()
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # The same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "sr_kernels"
    matplotlib.rcParams["font.size"] = 9
    rows = [row for row in latest(table.read(folder)) if row.median_ms is not None]
    if not rows:
        raise ValueError(f"{folder / table.FILE_NAME} holds no timed row: measure first")
    written: list[Path] = []
    devices = list(dict.fromkeys(row.device for row in rows))
    for device in devices:
        own = [row for row in rows if row.device == device]
        name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
        while "--" in name:
            name = name.replace("--", "-")
        for title, chart in (("speedup", _speedup), ("roofline", _roofline), ("sizes", _sizes)):
            figure = chart(own, device)
            if figure is None:
                continue
            for suffix in ("png", "svg"):
                file = folder / f"{title}-{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                with whole_or_nothing(file) as stream:
                    figure.savefig(
                        stream, format=suffix, dpi=110, bbox_inches="tight", metadata=metadata
                    )
                written.append(file)
            plt.close(figure)
    readme = root / "README.md"
    if folder.resolve() == root / "benchmarks" / "results" and readme.is_file():
        text = readme.read_text()
        renewed = _replaced(text, readme_section(folder, root))
        if renewed != text:
            with whole_or_nothing(readme) as stream:
                stream.write(renewed.encode())
            written.append(readme)
    return written


def _label(row: Row) -> str:
    """The case, without what is usual: forward, float32, a warm cache, the shipped weights."""
    mode = "" if row.mode == "forward" else f" {row.mode}"
    dtype = "" if row.dtype == "float32" else f" {row.dtype}"
    cache = "" if row.cache in ("warm", "hot") else f" {row.cache}"
    return f"{row.op} {row.shape}{mode}{dtype}{cache}{_weights(row)}"


def _weights(row: Row) -> str:
    """ " weights", unless an operator has none or they are those that come with the package."""
    return f" {row.weights}" if row.weights not in ("", row.op) else ""


def _threads(rows: Sequence[Row]) -> int:
    """The number of threads that the most rows have; of equals, the larger."""
    counts = Counter(row.threads for row in rows)
    return max(counts, key=lambda threads: (counts[threads], threads))


def _speedup(rows: Sequence[Row], device: str) -> Any:
    import matplotlib.pyplot as plt

    threads = _threads(rows)
    bars = []
    for group in _cases(row for row in rows if row.threads == threads):
        best, other = _best(group), fastest_other(group)
        if best is None or other is None or not best.median_ms or not other.median_ms:
            continue
        bars.append((_label(best), other.median_ms / best.median_ms, other.provider))
    if not bars:
        return None
    bars.reverse()
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.24 * len(bars)))
    positions = range(len(bars))
    axes.barh(positions, [bar[1] for bar in bars], color="#bbbbbb", edgecolor="black")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(positions, [bar[0] for bar in bars], fontsize=7)
    for position, (_, ratio, provider) in zip(positions, bars, strict=True):
        axes.text(ratio, position, f" {ratio:.2f}x {provider}", va="center", fontsize=6.5)
    axes.set_xlim(0, 1.45 * max(bar[1] for bar in bars))
    axes.set_xlabel("times the speed of the fastest other provider (named)")
    axes.set_title(f"{device}, {threads} threads", fontsize=9)
    return figure


def _roofline(rows: Sequence[Row], device: str) -> Any:
    import matplotlib.pyplot as plt

    threads = _threads(rows)
    # The model's bytes come from memory once: a cold cache or a graph is another experiment.
    chosen = [
        row
        for row in rows
        if row.threads == threads and row.dtype == "float32" and row.cache in ("warm", "hot")
    ]
    points = [best for group in _cases(chosen) if (best := _best(group)) is not None]
    points = [row for row in points if row.flops and row.bytes]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    flops = max(row.matmul_gflops or 0 for row in points)
    # Memory's rate: that of the largest case.
    copy = max(points, key=lambda row: row.bytes or 0).copy_gbs or 1.0
    intensities = [(row.flops or 0) / (row.bytes or 1) for row in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = flops / copy
    axes.plot([low, ridge, max(high, ridge)], [low * copy, flops, flops], color="black")
    axes.annotate(f"{copy:.0f} GB/s (copy)", (low * 1.1, low * 1.25 * copy), fontsize=7)
    axes.annotate(f"{flops:.0f} GFLOP/s (matrix product)", (ridge, flops * 1.08), fontsize=7)
    ops = list(dict.fromkeys(row.op for row in points))
    for index, op in enumerate(ops):
        own = [row for row in points if row.op == op]
        axes.scatter(
            [(row.flops or 0) / (row.bytes or 1) for row in own],
            [(row.flops or 0) / (row.median_ms or 1) / 1e6 for row in own],
            marker=_SIGNS[index % len(_SIGNS)],
            facecolor=_SHADES[(index // 2) % len(_SHADES)] if index % 2 else "white",
            edgecolor="black",
            label=op,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("floating-point operations per byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"{device}, {threads} threads, float32; softmax and sigmoid come on top", fontsize=9
    )
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _sizes(rows: Sequence[Row], device: str) -> Any:
    """Latency and memory of networks against the size of the image."""
    import matplotlib.pyplot as plt

    threads = _threads(rows)
    chosen = [
        row
        for row in rows
        if row.threads == threads
        and row.mode == "forward"
        and row.dtype == "float32"
        and row.cache in ("warm", "hot")
        and row.op in NETWORKS
    ]
    networks = list(dict.fromkeys(row.op + _weights(row) for row in chosen))
    if not networks:
        return None
    figure, grid = plt.subplots(
        2, len(networks), figsize=(4.2 * len(networks), 6.4), squeeze=False, sharex="col"
    )
    columns: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("milliseconds", lambda row: row.median_ms),
        ("peak memory growth, MB", lambda row: row.memory_mb),
    )
    providers = list(dict.fromkeys(row.provider for row in chosen))
    for column, network in enumerate(networks):
        for line, (unit, value) in enumerate(columns):
            axes = grid[line][column]
            for index, provider in enumerate(providers):
                own = [
                    row
                    for row in chosen
                    if row.op + _weights(row) == network and row.provider == provider
                ]
                points = sorted(
                    (r.size[0] * r.size[2] * r.size[3], v) for r in own if (v := value(r))
                )
                if not points:
                    continue
                axes.plot(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    color="black" if is_ours(provider) else "#777777",
                    linewidth=1.8 if is_ours(provider) else 1,
                    linestyle=_DASHES[index % len(_DASHES)],
                    marker=_SIGNS[index % len(_SIGNS)],
                    markersize=4,
                    label=provider,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel(unit)
            if line == 0:
                axes.set_title(network, fontsize=9)
                axes.legend(fontsize=6)
            else:
                axes.set_xlabel("pixels of the input")
    figure.suptitle(f"{device}, {threads} threads, float32", fontsize=9)
    return figure


# ------------------------------------------------------------------------------ README


def _replaced(text: str, section: str) -> str:
    """The text with what is between the markers replaced; unchanged where there are none."""
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        return text
    return text[: begin + len(MARKERS[0])] + "\n" + section + text[end:]


def _readme_table(groups: Sequence[Sequence[Row]]) -> list[str]:
    """One line for each case that has times of ours and of another; an operator's lie together."""
    lines = [
        "| case | ours, ms (20 % .. 80 %) | fastest other, ms | speed-up | of the floor "
        "| memory, MB: ours / other |",
        "|---|---|---|---|---|---|",
    ]
    ops = list(dict.fromkeys(group[0].op for group in groups))
    for group in sorted(groups, key=lambda group: ops.index(group[0].op)):
        best, other = _best(group), fastest_other(group)
        if best is None or other is None or not best.median_ms or not other.median_ms:
            continue
        memory = " / ".join(
            "-" if row.memory_mb is None else f"{row.memory_mb:.0f}" for row in (best, other)
        )
        busy = any((row.other_load or 0.0) > BUSY for row in (best, other))
        lines.append(
            f"| {_label(best)}{' (busy machine)' if busy else ''} "
            f"| {spread(best)} | {digits(other.median_ms)} {other.provider} "
            f"| {other.median_ms / best.median_ms:.2f} | {best.fraction:.0%} {best.bound} "
            f"| {memory} |"
        )
    return lines


def readme_section(folder: Path, root: Path) -> str:
    """Markdown: for each device tables of networks and of operators, ours against the fastest other
    provider, with where and when that was measured; and the charts there are. "-": memory was not
    measured."""
    rows = [row for row in latest(table.read(folder)) if row.median_ms is not None]
    lines = []
    place = folder.resolve().relative_to(root.resolve())
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        threads = _threads(own)
        own = [row for row in own if row.threads == threads]
        groups = _cases(own)
        runs = sorted({(group[0].date, group[0].commit) for group in groups})
        versions = sorted(
            {version for row in own for version in row.versions.split(", ")},
            key=lambda version: (not version.startswith("torch "), version),
        )
        lines += [
            f"{device}, {threads} threads, {', '.join(versions)}; measured "
            + ", ".join(f"{date} at {commit}" for date, commit in runs)
            + ":",
            "",
        ]
        order = list(NETWORKS)
        networks = [group for group in groups if group[0].op in NETWORKS]
        networks.sort(key=lambda group: order.index(group[0].op))
        operators = [group for group in groups if group[0].op not in NETWORKS]
        lines += [*_readme_table(networks), ""]
        if operators:
            lines += ["<details><summary>Operators one by one</summary>", ""]
            lines += [*_readme_table(operators), "", "</details>", ""]
    charts = sorted(path.name for path in folder.glob("*.png"))
    lines += [f"![{name.partition('-')[0]}]({place.as_posix()}/{name})" for name in charts]
    return "\n".join(lines) + "\n"
