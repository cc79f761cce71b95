"""tools/gpu_check.py where there is no GPU: it says so; and its bookkeeping."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing():
    report = TOOL.parent.parent / "benchmarks" / "results" / "gpu_check.txt"
    before = report.read_bytes() if report.exists() else None
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no CUDA GPU; nothing was checked" in done.stderr
    assert (report.read_bytes() if report.exists() else None) == before


def test_outcomes(tool, capfd):
    def step(name, program, limit=30, missing=None):
        return tool.Step(name, (sys.executable, "-c", program), limit, missing)

    outcomes = tool.run_all(
        [
            step("tests", "pass"),
            step("memcheck", "raise SystemExit(9)"),
            step("racecheck", "import time; time.sleep(60)", limit=1),
            step("synccheck", "", missing="compute-sanitizer is not on PATH"),
        ]
    )
    assert [(name, text) for name, text, _ in outcomes] == [
        ("tests", "passed"),
        ("memcheck", "failed (status 9)"),
        ("racecheck", "failed (not done after 1 s)"),
        ("synccheck", "not run: compute-sanitizer is not on PATH"),
    ]


def test_nothing_is_tried_without_the_build(tool, capfd):
    build = tool.Step("build", (sys.executable, "-c", "raise SystemExit(1)"), 30)
    tests = tool.Step("tests", (sys.executable, "-c", "print('ran')"), 30)
    outcomes = tool.run_all([build, tests])
    assert [text for _, text, _ in outcomes] == ["failed (status 1)", "not run: the build failed"]
    assert "ran\n" not in capfd.readouterr().out


def test_all_steps_together_have_a_limit(tool, capfd):
    sleeper = tool.Step("tests", (sys.executable, "-c", "import time; time.sleep(60)"), 30)
    late = tool.Step("benchmarks", (sys.executable, "-c", "print('ran')"), 30)
    outcomes = tool.run_all([sleeper, late], total=2)
    assert [text for _, text, _ in outcomes] == [
        "failed (not done after 2 s; its limit is 30 s, but no more were left)",
        "not run: no time is left",
    ]
    out = capfd.readouterr().out
    assert "--- 2 s for tests; its limit is 30 s, but no more were left" in out
    assert "ran\n" not in out


def test_the_plan_has_every_step(tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    planned = {step.name: step for step in tool.steps(built=False)}
    expected = ["build", "tests", *tool.SANITIZERS, "triton", "network", "benchmarks"]
    assert list(planned) == expected
    assert ("SR_KERNELS_CUDA_ARCHS", "9.0a") in planned["build"].environment
    assert list(tool.SANITIZERS) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    # After the build, every step can have all of its time.
    assert sum(step.limit for step in tool.steps(built=True)) <= tool.TOTAL
    assert planned["network"].command[-6:-2] == ("--op", "elan_light_x4", "--size", "180x320")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    [triton] = [step for step in tool.steps(built=True) if step.name == "triton"]
    assert triton.missing == "triton is not installed"
