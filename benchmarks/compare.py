"""Compare two commits of this repository on this machine: which is faster, and is that noise?

    python benchmarks/compare.py BASE HEAD [--op NAME ...] [--size HxW] [--channels C]

Both are checked out beside each other and built. Three processes then take turns sample by sample:
BASE, BASE once more, and HEAD. The second BASE shows what two copies of the same program differ by
on this machine today; HEAD is called faster or slower only where the confidence interval of its
ratio lies outside of that. Commits are whatever git understands; `.` is the working tree as it is.
Inputs, shapes and verification are those of `sr-kernels bench`, of the working tree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OPS = ("shift_conv_block", "grouped_window_attention", "window_attention")
MIN_PAIRS = 15
# Differences below this are not worth a verdict, whatever their confidence.
SMALLEST = 0.01


@dataclass(frozen=True)
class Ratio:
    """time / time of BASE: median, and the 95 % confidence interval of the median."""

    median: float
    low: float
    high: float


def ratio_of(base: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """Of samples taken in pairs; the interval by the bootstrap over pairs."""
    ratios = [b / a for a, b in zip(base, other, strict=True)]
    generator = random.Random(seed)
    medians = sorted(_median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(_median(ratios), medians[50], medians[1949])


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def verdict(head: Ratio, control: Ratio) -> str:
    """ "faster", "slower" or "no difference", given what BASE against itself gave."""
    noise = max(SMALLEST, abs(control.low - 1), abs(control.high - 1))
    if head.high < 1 - noise:
        return "faster"
    if head.low > 1 + noise:
        return "slower"
    return "no difference"


# ------------------------------------------------------------------------------ building


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return done.stdout.strip()


def build(name: str, folder: Path) -> tuple[str, Path]:
    """Builds a commit below `folder`; returns what it is, and where it was installed."""
    site = folder / "site"
    if name == ".":
        what, source = "working tree", ROOT
    else:
        what = _run("git", "rev-parse", "--short=10", f"{name}^{{commit}}", cwd=ROOT)
        source = folder / "source"
        source.mkdir(parents=True)
        archive = folder / "source.tar"
        _run("git", "archive", "--output", str(archive), what, cwd=ROOT)
        _run("tar", "-xf", str(archive), "-C", str(source))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run(*pip, "--no-build-isolation", "--no-deps", "--target", str(site), ".", cwd=source)
    # The harness is the working tree's for both: a commit is measured, not its way of measuring.
    target = site / "sr_kernels" / "benchmarks"
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", target, ignore=ignored)
    return what, site


# ------------------------------------------------------------------------------ measuring


class Worker:
    """A process with one build, which measures what it is told to."""

    def __init__(self, site: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sr_kernels.benchmarks.compare_worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **message: Any) -> Any:
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(case: dict[str, Any], workers: Sequence[Worker], seconds: float) -> list[list[float]]:
    """Samples of each worker, taken in turn in changing order."""
    for worker in workers:
        worker.ask(do="prepare", case=case)
    once = max(worker.ask(do="time", repeats=1) for worker in workers)
    repeats = max(1, round(0.02 / once))
    pairs = max(MIN_PAIRS, min(60, round(seconds / (once * repeats * len(workers)))))
    samples: list[list[float]] = [[] for _ in workers]
    for turn in range(pairs):
        order = [(turn + i) % len(workers) for i in range(len(workers))]
        for index in order if turn // len(workers) % 2 else reversed(order):
            samples[index].append(workers[index].ask(do="time", repeats=repeats))
    return samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD")
    parser.add_argument("--op", nargs="+", default=list(DEFAULT_OPS), metavar="NAME")
    parser.add_argument("--size", nargs="+", default=["64x64"], metavar="HxW")
    parser.add_argument("--channels", nargs="+", type=int, default=[60], metavar="C")
    parser.add_argument(
        "--mode", nargs="+", choices=("forward", "backward", "both"), default=["forward"]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of samples per case (default: 5)"
    )
    args = parser.parse_args(argv)

    from sr_kernels.benchmarks import cases

    try:
        chosen = cases.select(ops=args.op, sizes=args.size, channels=args.channels, modes=args.mode)
    except (ValueError, cases.MissingExtra) as error:
        parser.error(str(error))
    folder = Path(tempfile.mkdtemp(prefix="sr_kernels-compare-"))
    workers: list[Worker] = []
    try:
        sites = []
        for side, name in (("base", args.base), ("head", args.head)):
            print(f"building {name} ...", file=sys.stderr, flush=True)
            what, site = build(name, folder / side)
            sites.append(site)
            print(f"{side}: {name} ({what})", flush=True)
        workers = [Worker(site, args.threads) for site in (sites[0], sites[0], sites[1])]
        print(
            f"\n{'case':<58}{'base ms':>9}{'head/base':>11}{'95 %':>16}{'base/base':>18}  verdict"
        )
        for case in chosen:
            base, control, head = compare(vars(case).copy(), workers, args.seconds)
            changed, same = ratio_of(base, head), ratio_of(base, control)
            print(
                f"{case!s:<58}{1e3 * _median(base):>9.4g}{changed.median:>11.3f}"
                f"{changed.low:>8.3f}..{changed.high:<6.3f}{same.low:>10.3f}..{same.high:<6.3f}"
                f"  {verdict(changed, same)}",
                flush=True,
            )
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for worker in workers:
            worker.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
