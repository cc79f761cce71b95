"""Everything that only a GPU can tell, in one go: `make gpu-check`.

    python tools/gpu_check.py             # builds for this GPU, then tests, sanitizers, benchmarks
    python tools/gpu_check.py --built     # with the libraries that are in sr_kernels/ already

Steps: build; `pytest -m gpu`; compute-sanitizer (memcheck, racecheck, initcheck, synccheck) on tiny
shapes of every operator; the Triton kernels' tests; `sr-kernels bench --device cuda`: first
ELAN-light x4, then --quick. Each has a limit of its own, and all together have ten minutes: what no
time is left for is named, and so is what has less than its own limit. One that fails does not stop
those behind it, except for the build. What became of them goes to benchmarks/results/gpu_check.txt,
with device, versions, date and commit; timings go to the table that is there. Needs no network:
what is missing is named.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "results" / "gpu_check.txt"
MODULES = ("torch", "numpy", "pytest", "setuptools", "ninja", "yaml", "PIL", "safetensors")
TOTAL = 590  # seconds for all steps; 16 cores need less
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """One command. limit: seconds.  missing: why it cannot run here, or None."""

    name: str
    command: tuple[str, ...]
    limit: int
    missing: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


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


def steps(built: bool) -> list[Step]:
    import torch

    python = sys.executable
    major, minor = torch.cuda.get_device_capability()
    arch = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not on PATH"
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    found: list[Step] = []
    if not built:
        environment = (("SR_KERNELS_BUILD_CUDA", "1"), ("SR_KERNELS_CUDA_ARCHS", arch))
        command = (python, "setup.py", "-q", "build_ext", "--inplace")
        found.append(Step("build", command, 200, environment=environment))
    large = (("SR_KERNELS_TEST_LARGE", "1"),)
    found.append(Step("tests", (*tests, "-m", "gpu", "tests"), 150, environment=large))
    for tool in SANITIZERS:
        command = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        command += (*tests, "-x", "tests/gpu", "-k", "tiny")
        # torch's cache would hide what is freed, as NaN-poisoning what is not written.
        environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        found.append(Step(tool, command, 40, no_sanitizer, environment))
    no_triton = None if importlib.util.find_spec("triton") else "triton is not installed"
    found.append(Step("triton", (*tests, "tests/triton_operators"), 90, no_triton))
    bench = (python, "-m", "sr_kernels", "bench", "--device", "cuda", "--quick")
    network = ("--op", "elan_light_x4", "--size", "180x320", "--dtype", "float16")
    found.append(Step("network", (*bench, *network), 90))
    found.append(Step("benchmarks", (*bench, "--dtype", "float32", "float16", "bfloat16"), 100))
    return found


def run(step: Step, left: float) -> tuple[str, float]:
    """What became of a step, for which `left` seconds are left: "passed", "failed (...)" or "not
    run: ...", and its seconds."""
    if step.missing is not None:
        return f"not run: {step.missing}", 0.0
    if left < 1:
        return "not run: no time is left", 0.0
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    began, limit = time.monotonic(), min(step.limit, left)
    short = f"; its limit is {step.limit} s, but no more were left" if left < step.limit else ""
    if short:
        print(f"--- {left:.0f} s for {step.name}{short}", flush=True)
    environment = {**os.environ, **dict(step.environment)}
    try:
        status = subprocess.run(step.command, cwd=ROOT, env=environment, timeout=limit)
        outcome = "passed" if status.returncode == 0 else f"failed (status {status.returncode})"
    except subprocess.TimeoutExpired:
        outcome = f"failed (not done after {limit:.0f} s{short})"
    except OSError as error:
        outcome = f"failed ({error})"
    return outcome, time.monotonic() - began


def run_all(planned: Sequence[Step], total: float = TOTAL) -> list[tuple[str, str, float]]:
    """(name, outcome, seconds) of each. Without its build nothing else is tried."""
    outcomes: list[tuple[str, str, float]] = []
    end = time.monotonic() + total
    for step in planned:
        if outcomes and outcomes[0][0] == "build" and outcomes[0][1] != "passed":
            outcomes.append((step.name, "not run: the build failed", 0.0))
        else:
            outcomes.append((step.name, *run(step, end - time.monotonic())))
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that only a GPU can tell.")
    parser.add_argument(
        "--built", action="store_true", help="use the libraries that are in sr_kernels/ already"
    )
    options = parser.parse_args(arguments)
    problem = unmet()
    if problem is not None:
        print(f"gpu-check: {problem}; nothing was checked", file=sys.stderr)
        return 2
    outcomes = run_all(steps(options.built))
    lines = [describe(), *(f"{name:12s} {text} ({s:.0f} s)" for name, text, s in outcomes)]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return 0 if all(not text.startswith("failed") for _, text, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
