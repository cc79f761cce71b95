"""tools/gpu_check.py where there is no GPU: it says so; its bookkeeping; and that every command of
its plan is one."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from from_file import load
from PIL import Image
from sr_kernels.benchmarks.cases import read

from sr_kernels.cli import main

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TOOL = TOOLS / "gpu_check.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load(TOOL)


@pytest.fixture
def planned(tool, monkeypatch):
    """What would run on a GPU, with the library built there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return {step.name: step for step in tool.steps(built=False)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing():
    report = TOOL.parent.parent / "benchmarks" / "results" / "gpu_check.txt"
    before = report.read_bytes() if report.exists() else None
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no CUDA GPU; nothing was checked" in done.stderr
    assert (report.read_bytes() if report.exists() else None) == before


def test_a_checkout_that_is_not_installed_is_installed_without_a_build(tool, monkeypatch):
    assert tool.uninstalled() is None  # the tests' environment has it
    said, found = [], iter((False, True))
    real = subprocess.run

    def run(command, **options):
        if "pip" not in command:
            done = real(command, **options)
            return done if next(found) else subprocess.CompletedProcess(command, 1, "", "")
        said.append((command[-2:], options["env"]["SR_KERNELS_BUILD"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert tool.uninstalled() is None
    assert said == [(["-e", str(TOOL.parent.parent)], "0")]
    found = iter((False, False))
    assert "did not install this checkout" in tool.uninstalled()


def test_checks_that_were_not_made_are_no_success(tool):
    assert tool.counts_as_failed("network", "failed (status 1)")
    assert tool.counts_as_failed("memcheck", "not run: compute-sanitizer is not on PATH")
    assert not tool.counts_as_failed("psnr", "not run: no Set5")
    assert not tool.counts_as_failed("tests", "passed")


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


def test_steps_side_by_side(tool, capfd, tmp_path):
    """Two that wait for each other's file, and one that is ended with what it started."""

    def meets(mine, other):
        code = f"import pathlib, time; pathlib.Path({str(tmp_path / mine)!r}).touch()\n"
        code += f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)\n"
        return sys.executable, "-c", code + f"print('{mine} has met', flush=True)"

    child = (
        "import pathlib, subprocess, sys\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(one.pid))\n"
        "one.wait()"
    )
    outcomes = tool.run_all(
        [
            tool.Step("first", meets("a", "b"), 60, beside="checks"),
            tool.Step("second", meets("b", "a"), 60, beside="checks"),
            tool.Step("absent", (), 60, "there is none", beside="checks"),
            tool.Step("third", (sys.executable, "-c", child), 4, beside="checks"),
            tool.Step("behind", (sys.executable, "-c", "print('behind')"), 60),
        ]
    )
    assert [(name, text) for name, text, _ in outcomes] == [
        ("first", "passed"),
        ("second", "passed"),
        ("absent", "not run: there is none"),
        ("third", "failed (not done after 4 s)"),
        ("behind", "passed"),
    ]
    out = capfd.readouterr().out
    assert "--- first said:\na has met\n" in out
    assert out.index("b has met") < out.index("=== behind")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < deadline, "what a step started goes on"
        time.sleep(0.05)


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


def test_a_step_without_a_limit_has_what_is_left(tool, capfd):
    rest = tool.Step("rest", (sys.executable, "-c", "import time; time.sleep(60)"), None)
    [(_, text, _)] = tool.run_all([rest], total=2)
    assert text == "failed (not done after 2 s)"


def test_the_plan_has_every_step(tool, planned, monkeypatch):
    expected = ["build", "network", "pixels", "training"]
    expected += ["tests", *tool.SANITIZERS, "triton", "psnr", "attention", "operators"]
    expected += ["networks", "compile", "autotune", "operators_compiled", "networks_compiled"]
    expected.append("more_operators")
    assert list(planned) == expected
    assert ("SR_KERNELS_CUDA_ARCHS", "9.0a") in planned["build"].environment
    assert list(tool.SANITIZERS) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    [triton] = [step for step in tool.steps(built=True) if step.name == "triton"]
    assert triton.missing == "triton is not installed"


def test_after_the_build_every_step_can_have_all_of_its_time(tool, planned):
    """Those without a limit of their own have what is left of ten minutes, and come last."""
    groups = {}
    for step in planned.values():
        if step.name != "build":
            groups.setdefault(step.group, []).append(step.limit)
    limits = [None if None in group else max(group) for group in groups.values()]
    assert limits[-4:] == [None] * 4
    assert sum(limits[:-4]) < tool.TOTAL <= 590


def test_every_benchmark_of_the_plan_selects_what_it_is_for(planned, capsys):
    listed = {}
    for step in planned.values():
        if "bench" in step.command:
            words = list(step.command[step.command.index("bench") :])
            assert main([*words, "--list"]) == 0, step.name
            listed[step.name] = capsys.readouterr().out.splitlines()
    light = ["elan_light_x4 1x3x180x320 float16 forward"]
    assert listed["network"] == listed["compile"] == listed["autotune"] == light
    heights = (1080, 180, 360, 720, 2160)
    pixels = [f"elan_light_x2 1x3x{h}x{h * 16 // 9} float16 forward" for h in heights]
    assert listed["pixels"] == pixels
    assert listed["training"] == ["elan_light_x4 32x3x64x64 bfloat16_autocast both"]
    assert listed["attention"] == ["window_attention 1x60x184x320 float16 forward"]
    large = [name for name in listed["operators"] if name.endswith("forward")]
    more = [name.split()[0] for name in listed["more_operators"]]
    assert more == ["grouped_attention_block", "apply_grouped_attention_block", "channel_moments"]
    quick = [name.split()[0] for name in large]
    assert quick == [name for name in read()["operators"] if name not in more]
    assert listed["operators_compiled"] == listed["operators"]
    networks = ["elan_x4 1x3x180x320 float16 forward", "mafdn_x4 1x3x180x320 float16 forward"]
    assert listed["networks"] == listed["networks_compiled"] == networks


def test_nothing_before_the_last_steps_waits_for_torch_compile(planned):
    def compiles(step):
        if "bench" not in step.command:
            return False
        named = step.command[step.command.index("--provider") :] if _asks(step) else ("compile",)
        return any(name.startswith("compile") for name in named)

    last = list(planned)[-5:]
    assert [name for name, step in planned.items() if compiles(step)] == last
    assert last[0] == "compile"
    assert "compile_max_autotune" in planned["autotune"].command
    # Whole networks are compiled where they are named only.
    assert "--op" in planned["networks_compiled"].command


def _asks(step):
    return "--provider" in step.command


def test_pictures_are_where_the_tests_have_them(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("SR_KERNELS_TEST_DATA", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    [psnr] = [step for step in tool.steps(built=True) if step.name == "psnr"]
    assert psnr.missing.startswith("no Set5")
    for folder in ("HR", "LR_bicubic/X4"):
        (tmp_path / "Set5" / folder).mkdir(parents=True)
    [psnr] = [step for step in tool.steps(built=True) if step.name == "psnr"]
    assert psnr.missing is None
    assert psnr.command[-1] == str(tmp_path / "Set5")
    assert (TOOL.parent.parent / psnr.command[1]).is_file()


def test_some_of_the_steps_are_added_to_the_report(tool, monkeypatch, tmp_path, capsys):
    def step(name, beside=""):
        return tool.Step(name, (sys.executable, "-c", ""), 30, None, (), beside)

    every = [step("network"), step("tests", "checks"), step("memcheck", "checks"), step("psnr")]
    monkeypatch.setattr(tool, "unmet", lambda: None)
    monkeypatch.setattr(tool, "steps", lambda built: every)
    monkeypatch.setattr(tool, "describe", lambda: "an abacus")
    monkeypatch.setattr(tool, "REPORT", tmp_path / "results" / "report.txt")

    def reported():
        return [line.split()[0] for line in tool.REPORT.read_text().splitlines()]

    assert tool.main([]) == 0
    assert reported() == ["an", "network", "tests", "memcheck", "psnr"]
    assert tool.main(["--only", "psnr", "checks"]) == 0
    assert reported()[5:] == ["an", "tests", "memcheck", "psnr"]
    assert tool.main(["--only", "memcheck"]) == 0
    assert reported()[9:] == ["an", "memcheck"]
    with pytest.raises(SystemExit):
        tool.main(["--only", "sums"])
    assert "no step is called 'sums'; there are network, checks" in capsys.readouterr().err
    assert tool.main([]) == 0
    assert len(reported()) == 5


@pytest.mark.unpoisoned
def test_psnr_of_16_bits_is_that_of_float32(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    tool = load(TOOLS / "psnr_change.py")
    rng = np.random.default_rng(0)
    for folder, side, suffix in (("HR", 48, ""), ("LR_bicubic/X4", 12, "x4")):
        (tmp_path / folder).mkdir(parents=True)
        pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        image.save(tmp_path / folder / f"picture{suffix}.png")
    out = tmp_path / "psnr.csv"
    command = ["--data", str(tmp_path), "--out", str(out), "--networks", "mafdn_x4"]
    assert tool.main(command) == 0
    header, *rows = out.read_text().splitlines()
    assert header.split(",") == list(tool.COLUMNS)
    assert [row.split(",")[:3] for row in rows] == [["mafdn_x4", d, "1"] for d in tool.DTYPES]
    decibels = [float(row.split(",")[3]) for row in rows]
    assert all(abs(d - decibels[0]) <= tool.LIMIT for d in decibels)
    mean = tool.mean_psnr
    wrong = {"float32": 0.0, "float16": 0.0, "bfloat16": -0.02}
    monkeypatch.setattr(tool, "mean_psnr", lambda *a: mean(*a[:3], "float32") + wrong[a[3]])
    assert tool.main(command) == 1
    assert "largest change 0.0200 dB" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 7
