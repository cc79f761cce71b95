"""Everything that only a GPU can tell, in one go: `make gpu-check`.

    python tools/gpu_check.py             # builds for this GPU, then the steps below
    python tools/gpu_check.py --built     # with the libraries that are in sr_kernels/ already
    python tools/gpu_check.py --built --only autotune operators_compiled    # some of the steps

Steps, what matters most first, and nothing that torch.compile needs minutes for before the last:

    build      the kernels for this GPU
    network    ELAN-light x4, 180x320, float16, against stock: layers, plan, CUDA graph
    pixels     ELAN-light x2, float16, from 180x320 to 2160x3840 (1080x1920 first): the plan
    training   ELAN-light x4, 32 x 64x64, bfloat16 autocast: a step, and its memory, against stock
    checks     side by side: `pytest -m gpu`; compute-sanitizer (memcheck, racecheck, initcheck,
               synccheck) on tiny shapes of every operator; the Triton kernels' tests
    psnr       on Set5 x4 in float16 and bfloat16 against float32; needs the pictures:
               SR_KERNELS_TEST_DATA names the folder that has Set5 (default: ../shared/data)
    attention  window_attention against SDPA and FlexAttention, float16
    operators  every operator against stock and libraries, float16
    networks   ELAN x4 and MAFDN x4, 180x320, float16, against stock
    compile    ELAN-light x4, 180x320, float16, against torch.compile
    autotune   the same against torch.compile with mode="max-autotune", which replays graphs
    operators_compiled, networks_compiled    operators and networks against all providers
    more_operators    those that the quick set goes without: the attention blocks, channel_moments

Each has a limit of its own, the last four what is left, and all together have ten minutes: what no
time is left for is named, and so is what has less than its own limit. `--only` makes up for it in
another ten minutes: what torch.compile had ready by then it finds in its cache. A step that fails
does not stop those behind it, except for the build. What became of them goes to
benchmarks/results/gpu_check.txt, with device, versions, date and commit; timings go to results.csv
there, decibels to psnr.csv. Needs no network: what is missing is named.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "results" / "gpu_check.txt"
MODULES = ("torch", "numpy", "pytest", "setuptools", "ninja", "yaml", "PIL", "safetensors")
TOTAL = 590  # seconds for all steps; 16 cores need less
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
CHECKS = "checks"


@dataclass(frozen=True)
class Step:
    """One command. limit: seconds, or None for all that are left.  missing: why it cannot run here,
    or None.  beside: steps in a row that have the same name here run side by side."""

    name: str
    command: tuple[str, ...]
    limit: int | None
    missing: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    beside: str = ""

    @property
    def group(self) -> str:
        return self.beside or self.name


def unmet() -> str | None:
    """Why there is nothing to check here, or None."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} lacks {', '.join(absent)}"
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU-only"
        return f"torch {torch.__version__} ({build} build) finds no CUDA GPU"
    return None


def uninstalled() -> str | None:
    """Installs the package in editable form, without building anything, unless this checkout's is
    importable: `sr_kernels.models` and `sr_kernels.benchmarks` are folders beside it. Why that was
    not possible, or None."""

    def found() -> bool:
        program = "import sr_kernels.benchmarks as b, sr_kernels.models; print(b.__path__[0])"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
        )
        folder = Path(done.stdout.strip() or ".").resolve()
        return done.returncode == 0 and folder == ROOT / "benchmarks"

    if found():
        return None
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "-e", str(ROOT)]
    done = subprocess.run(
        command, env={**os.environ, "SR_KERNELS_BUILD": "0"}, capture_output=True, text=True
    )
    if done.returncode == 0 and found():
        return None
    said = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"{' '.join(command)} did not install this checkout: {''.join(said)}"


def set5() -> Path | None:
    """The folder with Set5's HR and LR_bicubic/X4, where the tests look for it; None without."""
    data = Path(os.environ.get("SR_KERNELS_TEST_DATA", ROOT.parent / "shared" / "data")) / "Set5"
    return data if (data / "HR").is_dir() and (data / "LR_bicubic" / "X4").is_dir() else None


def checks() -> Iterator[Step]:
    """Tests and sanitizers: nothing is timed, so that they share the GPU."""
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # A file at a time: the tests of one that need much memory come one by one.
    spread = ("-n", "4", "--dist", "loadfile") if importlib.util.find_spec("xdist") else ()
    large = (("SR_KERNELS_TEST_LARGE", "1"),)
    yield Step("tests", (*tests, *spread, "-m", "gpu", "tests"), 130, None, large, CHECKS)
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not on PATH"
    # torch's cache would hide what is freed, as NaN-poisoning what is not written.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    for tool in SANITIZERS:
        command = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        command += (*tests, "-x", "tests/gpu", "-k", "tiny")
        yield Step(tool, command, 110, no_sanitizer, uncached, CHECKS)
    no_triton = None if importlib.util.find_spec("triton") else "triton is not installed"
    yield Step("triton", (*tests, "tests/triton_operators"), 130, no_triton, (), CHECKS)


def steps(built: bool) -> list[Step]:
    import torch
    import yaml

    python = sys.executable
    listed = yaml.safe_load((ROOT / "benchmarks" / "cases.yaml").read_text())["operators"]
    operators = tuple(name for name, entry in listed.items() if entry["quick"]["sizes"])
    others = (*(name for name in listed if name not in operators), "--size", "192x320")
    bench = (python, "-m", "sr_kernels", "bench", "--device", "cuda", "--quick")
    bench += ("--seconds", "0.3", "--dtype")
    half = (*bench, "float16", "--op")
    light = (*half, "elan_light_x4", "--size", "180x320", "--provider", "eager")
    found: list[Step] = []
    if not built:
        major, minor = torch.cuda.get_device_capability()
        arch = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
        environment = (("SR_KERNELS_BUILD_CUDA", "1"), ("SR_KERNELS_CUDA_ARCHS", arch))
        command = (python, "setup.py", "-q", "build_ext", "--inplace")
        found.append(Step("build", command, 200, environment=environment))
    found.append(Step("network", (*light, "cuda"), 45))
    sizes = ("1080x1920", "180x320", "360x640", "720x1280", "2160x3840")
    pixels = (*half, "elan_light_x2", "--size", *sizes, "--provider", "cuda_plan")
    found.append(Step("pixels", pixels, 60))
    training = (*bench, "bfloat16_autocast", "--op", "elan_light_x4", "--size", "32x64x64")
    training += ("--mode", "both", "--provider", "eager", "cuda")
    found.append(Step("training", training, 45))
    found += checks()
    pictures = set5()
    psnr = (python, "tools/psnr_change.py", "--device", "cuda", "--data", str(pictures))
    no_pictures = None if pictures else "no Set5: SR_KERNELS_TEST_DATA names no folder that has it"
    found.append(Step("psnr", psnr, 30, no_pictures))
    attention = ("window_attention", "--provider", "eager", "sdpa", "flex", "cuda")
    found.append(Step("attention", (*half, *attention), 45))
    libraries = ("eager", "conv2d", "conv2d_depthwise", "sdpa", "cuda")
    found.append(Step("operators", (*half, *operators, "--provider", *libraries), 90))
    networks = (*half, "elan_x4", "mafdn_x4", "--size", "180x320")
    found.append(Step("networks", (*networks, "--provider", "eager", "cuda"), 35))
    found.append(Step("compile", (*light, "compile", "cuda_plan"), 100))
    found.append(Step("autotune", (*light, "compile_max_autotune", "cuda_plan"), None))
    found.append(Step("operators_compiled", (*half, *operators), None))
    found.append(Step("networks_compiled", networks, None))
    found.append(Step("more_operators", (*half, *others), None))
    return found


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None
    limit: float
    short: str


def run(together: Sequence[Step], left: float) -> list[tuple[str, float]]:
    """What became of steps that run side by side, for which `left` seconds are left: "passed",
    "failed (...)" or "not run: ...", and its seconds."""
    outcomes: dict[str, tuple[str, float]] = {}
    running: list[_Running] = []
    began = time.monotonic()
    try:
        for step in together:
            if step.missing is not None:
                outcomes[step.name] = f"not run: {step.missing}", 0.0
                continue
            if left < 1:
                outcomes[step.name] = "not run: no time is left", 0.0
                continue
            try:
                running.append(_start(step, left, apart=len(together) > 1))
            except OSError as error:
                outcomes[step.name] = f"failed ({error})", 0.0
        while running:
            for one in list(running):
                status, elapsed = one.process.poll(), time.monotonic() - began
                if status is None and elapsed < one.limit:
                    continue
                running.remove(one)
                _end(one)
                if status is None:
                    text = f"failed (not done after {one.limit:.0f} s{one.short})"
                else:
                    text = "passed" if status == 0 else f"failed (status {status})"
                outcomes[one.step.name] = text, elapsed
            time.sleep(0.02)
    finally:
        for one in running:
            _end(one)
    return [outcomes[step.name] for step in together]


def _start(step: Step, left: float, apart: bool) -> _Running:
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    limit, short = left if step.limit is None else min(step.limit, left), ""
    if step.limit is not None and left < step.limit:
        short = f"; its limit is {step.limit} s, but no more were left"
        print(f"--- {left:.0f} s for {step.name}{short}", flush=True)
    output = tempfile.TemporaryFile() if apart else None  # noqa: SIM115 (closed in _end)
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **dict(step.environment)},
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,  # so that what it starts ends with it
    )
    return _Running(step, process, output, limit, short)


def _end(one: _Running) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()
    if one.output is not None:
        one.output.seek(0)
        print(f"\n--- {one.step.name} said:", flush=True)
        print(one.output.read().decode(errors="replace"), end="", flush=True)
        one.output.close()


def run_all(planned: Sequence[Step], total: float = TOTAL) -> list[tuple[str, str, float]]:
    """(name, outcome, seconds) of each. Without its build nothing else is tried."""
    outcomes: list[tuple[str, str, float]] = []
    end = time.monotonic() + total
    for _, group in itertools.groupby(planned, key=lambda step: step.group):
        together = list(group)
        if outcomes and outcomes[0][0] == "build" and outcomes[0][1] != "passed":
            results = [("not run: the build failed", 0.0)] * len(together)
        else:
            results = run(together, end - time.monotonic())
        outcomes += [(step.name, *it) for step, it in zip(together, results, strict=True)]
    return outcomes


def describe() -> str:
    import torch

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {sys.version.split()[0]}; {now:%Y-%m-%d %H:%M} UTC at {commit}"
    )


def counts_as_failed(name: str, outcome: str) -> bool:
    """What failed; and tests and sanitizers that found no time or no tool: nothing was checked."""
    essential = name in ("tests", *SANITIZERS)
    return outcome.startswith("failed") or (essential and outcome.startswith("not run"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that only a GPU can tell.")
    parser.add_argument(
        "--built", action="store_true", help="use the libraries that are in sr_kernels/ already"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help="these steps alone (with --built; 'checks' is all that run side by side); their "
        "outcomes are added to the report",
    )
    options = parser.parse_args(arguments)
    problem = unmet() or uninstalled()
    if problem is not None:
        print(f"gpu-check: {problem}; nothing was checked", file=sys.stderr)
        return 2
    planned = steps(options.built)
    if options.only:
        known = list(dict.fromkeys(n for step in planned for n in (step.group, step.name)))
        if unknown := [name for name in options.only if name not in known]:
            parser.error(f"--only: no step is called {unknown[0]!r}; there are {', '.join(known)}")
        planned = [step for step in planned if {step.name, step.group} & set(options.only)]
    outcomes = run_all(planned)
    lines = [describe(), *(f"{name:18s} {text} ({s:.0f} s)" for name, text, s in outcomes)]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with REPORT.open("a" if options.only else "w") as report:
        report.write("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return 1 if any(counts_as_failed(name, text) for name, text, _ in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
