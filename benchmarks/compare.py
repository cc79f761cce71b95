"""Compare two commits of this repository on this machine: which is faster, and is that noise?

    python benchmarks/compare.py BASE HEAD [--op NAME ...] [--size HxW ...] [--channels C ...]

Both are checked out beside each other and built. Three processes then take turns sample by sample:
BASE, BASE once more, and HEAD. The second BASE shows what two copies of the same program differ by
on this machine today; HEAD is called faster or slower only where the confidence interval of its
ratio lies outside of that.

Where a process happens to lie in memory can make it slower for as long as it lives. So all three
are started anew --restarts times per case, and the intervals are those of a bootstrap that draws
restarts first and pairs of samples within each: one unlucky process does not decide.

Commits are whatever git understands; `.` is the working tree as it is. Inputs, shapes and
verification are those of `sr-kernels bench`, of the working tree. Every process must have loaded
the build that it stands for. A case that fails is reported with its side, the others go on, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
# Of pairs of samples per case, and at most per restart.
MIN_PAIRS = 15
MAX_PAIRS = 60
# Differences below this are not worth a verdict, whatever their confidence.
SMALLEST = 0.01


@dataclass(frozen=True)
class Ratio:
    """time / time of BASE: median, and the 95 % confidence interval of the median."""

    median: float
    low: float
    high: float


def ratio_of(
    base: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """Of samples taken in pairs, by restart of the processes.

    The median is that of all pairs; its interval is by the bootstrap, over restarts first and over
    pairs within each, because the pairs of one restart share what its processes met.
    """
    ratios = [
        [b / a for a, b in zip(*pairs, strict=True)] for pairs in zip(base, other, strict=True)
    ]
    generator = random.Random(seed)

    def again() -> float:
        drawn = generator.choices(ratios, k=len(ratios))
        return _median(_pooled([generator.choices(own, k=len(own)) for own in drawn]))

    medians = sorted(again() for _ in range(2000))
    return Ratio(_median(_pooled(ratios)), medians[50], medians[1949])


def _pooled(restarts: Sequence[Sequence[float]]) -> list[float]:
    return [value for own in restarts for value in own]


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
    """A process with one build, which measures what it is told to.

    side: what errors call it.  site: where its build was installed; None for the package that is
    installed here.

    Raises:
        RuntimeError: it does not start, or has loaded another build than that below `site`.
    """

    def __init__(self, side: str, site: Path | None, threads: int) -> None:
        self.side = side
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        if site is None:
            import sr_kernels

            site = Path(sr_kernels.__file__).parents[1]
        else:
            environment["PYTHONPATH"] = str(site)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sr_kernels.benchmarks.compare_worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            # Python 3.10 has no PYTHONSAFEPATH: it looks for packages where it is started first.
            cwd=site,
        )
        try:
            for what, place in self._answer().items():
                if not Path(place).resolve().is_relative_to(site.resolve()):
                    raise RuntimeError(f"{side}: its {what} is {place}, which is not below {site}")
        except BaseException:
            self.close()
            raise

    def ask(self, **message: Any) -> Any:
        stdin, _ = self._pipes()
        # One that has ended is found out about in `_answer`.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        _, stdout = self._pipes()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.side}: its process ended with status {self._process.wait()}")
        try:
            answer = json.loads(line)
            failed = "error" in answer
            value = answer["error" if failed else "value"]
        except (ValueError, TypeError, KeyError):
            raise RuntimeError(
                f"{self.side}: its process answered {line.strip()[:200]!r} and {self._end()}"
            ) from None
        if failed:
            raise RuntimeError(f"{self.side}: {value}")
        return value

    def _end(self) -> str:
        try:
            return f"ended with status {self._process.wait(timeout=1)}"
        except subprocess.TimeoutExpired:
            self.close()
            return "was ended"

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(
    case: dict[str, Any], workers: Sequence[Worker], seconds: float, least: int = MIN_PAIRS
) -> list[list[float]]:
    """Samples of each worker, at least `least`, taken in turn in changing order."""
    for worker in workers:
        worker.ask(do="prepare", case=case)
    once = max(worker.ask(do="time", repeats=1) for worker in workers)
    repeats = max(1, round(0.02 / once))
    pairs = max(least, min(MAX_PAIRS, round(seconds / (once * repeats * len(workers)))))
    samples: list[list[float]] = [[] for _ in workers]
    for turn in range(pairs):
        order = [(turn + i) % len(workers) for i in range(len(workers))]
        for index in order if turn // len(workers) % 2 else reversed(order):
            samples[index].append(workers[index].ask(do="time", repeats=repeats))
    return samples


def compare_restarted(
    case: dict[str, Any],
    sides: Sequence[tuple[str, Path | None]],
    *,
    threads: int,
    seconds: float,
    restarts: int,
) -> list[list[list[float]]]:
    """Samples of each side (its name and site), by restart of its process.

    `seconds` and MIN_PAIRS are shared out among the restarts.
    """
    samples: list[list[list[float]]] = [[] for _ in sides]
    for _ in range(restarts):
        with contextlib.ExitStack() as stack:
            workers = []
            for side, site in sides:
                workers.append(Worker(side, site, threads))
                stack.callback(workers[-1].close)
            least = math.ceil(MIN_PAIRS / restarts)
            for own, new in zip(
                samples, compare(case, workers, seconds / restarts, least), strict=True
            ):
                own.append(new)
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
    parser.add_argument(
        "--restarts", type=int, default=3, help="of all processes, per case (default: 3)"
    )
    args = parser.parse_args(argv)
    for option in ("restarts", "threads"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} is {getattr(args, option)}; expected at least 1")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds is {args.seconds}; expected a positive number")

    from sr_kernels.benchmarks import cases
    from sr_kernels.benchmarks.networks import NETWORKS

    try:
        chosen = cases.select(ops=args.op, sizes=args.size, channels=args.channels, modes=args.mode)
    except (ValueError, cases.MissingExtra) as error:
        parser.error(str(error))
    theirs = sorted({c.op for c in chosen if c.op in NETWORKS and NETWORKS[c.op].theirs})
    if theirs:
        parser.error(f"--op is {', '.join(theirs)}; a checkout alone has these")
    folder = Path(tempfile.mkdtemp(prefix="sr_kernels-compare-"))
    failed = False
    try:
        sites: list[Path] = []
        for side, name in (("base", args.base), ("head", args.head)):
            print(f"building {name} ...", file=sys.stderr, flush=True)
            try:
                what, site = build(name, folder / side)
            except RuntimeError as error:
                print(f"error: {side}: {error}", file=sys.stderr)
                return 1
            sites.append(site)
            print(f"{side}: {name} ({what})", flush=True)
        sides = [("base", sites[0]), ("base, once more", sites[0]), ("head", sites[1])]
        print(
            f"\n{'case':<58}{'base ms':>9}{'head/base':>11}{'95 %':>16}{'base/base':>18}  verdict"
        )
        for case in chosen:
            try:
                base, control, head = compare_restarted(
                    vars(case).copy(),
                    sides,
                    threads=args.threads,
                    seconds=args.seconds,
                    restarts=args.restarts,
                )
            except RuntimeError as error:
                failed = True
                print(f"{case!s:<58}failed: {error}", flush=True)
                continue
            changed, same = ratio_of(base, head), ratio_of(base, control)
            print(
                f"{case!s:<58}{1e3 * _median(_pooled(base)):>9.4g}{changed.median:>11.3f}"
                f"{changed.low:>8.3f}..{changed.high:<6.3f}{same.low:>10.3f}..{same.high:<6.3f}"
                f"  {verdict(changed, same)}",
                flush=True,
            )
    except KeyboardInterrupt:
        return 130
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
