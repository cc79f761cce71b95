"""Runs at toy size: every case, every provider, wrong results, and a run that is cut off."""

import functools
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from sr_kernels.benchmarks import (
    cases,
    ceilings,
    measure,
    networks,
    operators,
    plot,
    providers,
    run,
    table,
    worker,
)
from sr_kernels.benchmarks.cases import Case
from torch.nn.attention.flex_attention import flex_attention

from sr_kernels import models
from sr_kernels.cli import main

OPERATORS = list(operators.OPERATORS)
TRAINED = {case.op for case in cases.select(modes=["both"])}
NETWORKS = [name for name, network in networks.NETWORKS.items() if not network.theirs]
THEIRS = [name for name, network in networks.NETWORKS.items() if network.theirs]
# Those of the other runtimes that are installed here.
RUNTIMES = [
    name
    for name in ("onnxruntime", "openvino")
    if all(importlib.util.find_spec(package) for package in (name, "onnx"))
]


@pytest.fixture(scope="module")
def limits():
    return ceilings.measure("cpu", ("float32",), toy=True)


def _measure(case, settings, limits, folder):
    measurement = run.Measurement(case, settings, folder)
    try:
        measurement.prepare().sample(settings.seconds)
        return {row.provider: row for row in measurement.rows(limits)}
    finally:
        measurement.close()


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("op", "mode"),
    [(op, mode) for op in OPERATORS for mode in cases.MODES if mode == "forward" or op in TRAINED],
)
def test_every_operator_at_toy_size(op, mode, toy_settings, limits, tmp_path):
    names = ["eager", "cpu", *OTHERS.get(op, ())]
    if mode == "forward" and op not in BLOCKS:  # compiling takes seconds
        names += ["compile", *COMPILED.get(op, ())]
    settings = replace(toy_settings, providers=tuple(names))
    rows = _measure(Case(op, 1, 24, 16, 32, mode), settings, limits, tmp_path)
    expected = set(names) | {
        f"{name}_channels_last" for name in names if name not in ("compile", "flex")
    }
    assert set(rows) == expected
    assert len({row.run for row in rows.values()}) == 1
    for row in rows.values():
        assert row.status == "ok", row
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.samples >= measure.MIN_ROUNDS
        assert row.bound in ("bytes", "flops", "exponentials")
        assert row.fraction == pytest.approx(row.floor_ms / row.median_ms)
        assert 0 <= row.error < 1e-2


OTHERS = {
    "shift_conv2d": ("conv2d", "conv2d_depthwise"),
    "shift_conv_block": ("conv2d", "conv2d_depthwise"),
    "grouped_window_attention": ("sdpa",),
    "grouped_attention_block": ("sdpa",),
    "window_attention": ("sdpa",),
}
COMPILED = {"window_attention": ("flex",)}
# Of what is compiled without them, and projections.
BLOCKS = ("grouped_attention_block", "apply_grouped_attention_block")


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_in_16_bits(op, dtype, toy_settings, limits, tmp_path):
    settings = replace(toy_settings, providers=("eager", "cpu"))
    both = {"float32": 1e9, dtype: 1e9}
    rows = _measure(
        Case(op, 1, 24, 16, 32, "both" if op in TRAINED else "forward", dtype),
        settings,
        replace(limits, flops=both),
        tmp_path,
    )
    assert {row.status for row in rows.values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", NETWORKS)
def test_every_network_of_ours_at_toy_size(op, toy_settings, limits, tmp_path):
    # Exporting ELAN's 36 attentions takes a minute, and is what exporting ELAN-light's 24 is.
    alike = op in ("elan_x4", "elan_light_x2")
    names = ("eager", "cpu") if alike else ("eager", "cpu", *RUNTIMES)
    settings = replace(toy_settings, providers=names)
    # A height that ELAN pads: an exported network must do so as well.
    rows = _measure(Case(op, 1, 0, 20, 16), settings, limits, tmp_path)
    assert set(rows) == {*names, "eager_channels_last", "cpu_channels_last", "cpu_plan"}
    for row in rows.values():
        assert (row.status, row.reason) == ("ok", "")
    if "openvino" in names:
        assert "openvino 2" in rows["openvino"].versions
    assert rows["cpu"].weights == (op if op in models.PRETRAINED else "random, seed 0")


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", THEIRS)
def test_every_patched_network_at_toy_size(op, toy_settings, limits, tmp_path):
    names = ("eager", "patched", *(RUNTIMES if op == "imdn_x4" else ()))
    settings = replace(toy_settings, providers=names)
    rows = _measure(Case(op, 1, 0, 32, 16), settings, limits, tmp_path)
    assert set(rows) == {*names, "eager_channels_last", "patched_channels_last"}
    assert {(row.status, row.reason) for row in rows.values()} == {("ok", "")}
    assert run.is_ours("patched")
    assert run.fastest_other([rows["patched"], rows["patched_channels_last"]]) is None


def test_a_network_in_which_nothing_is_patched_has_no_time(
    toy_settings, limits, tmp_path, monkeypatch
):
    import sr_kernels

    monkeypatch.setattr(sr_kernels, "patch", lambda model: sr_kernels.PatchReport())
    settings = replace(toy_settings, providers=("patched",))
    rows = _measure(Case("imdn_x4", 1, 0, 8, 8), settings, limits, tmp_path)
    assert {row.status for row in rows.values()} == {"unavailable"}
    assert "recognises nothing" in rows["patched"].reason


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", ["elan_light_x4", "mafdn_x4"])
def test_a_training_step_at_toy_size(op, toy_settings, limits, tmp_path):
    settings = replace(toy_settings, providers=("eager", "cpu"))
    rows = _measure(Case(op, 2, 0, 16, 16, "both"), settings, limits, tmp_path)
    assert {row.status for row in rows.values()} == {"ok"}


@pytest.mark.unpoisoned
def test_a_training_step_under_autocast(toy_settings, limits, tmp_path, monkeypatch):
    case = Case("mafdn_x4", 1, 0, 8, 8, "both", "bfloat16_autocast")
    this = providers.subject(case, weights=None, image=run.PHOTOGRAPH, folder=tmp_path)
    results = this.stock(None).results("both")
    assert results.pop("output").dtype == torch.bfloat16
    assert {gradient.dtype for gradient in results.values()} == {torch.float32}
    assert this.stock(torch.float32).results("both")["output"].dtype == torch.float32
    assert run.truth_of(this).oracle["output"].dtype == torch.float64
    # Where there is no float64: against float32, and by stock's own error all the same.
    monkeypatch.setitem(run.NETWORK_ORACLE_PIXELS, "both", 0)
    truth = run.truth_of(this)
    assert truth.oracle["output"].dtype == torch.float32
    assert not torch.equal(truth.oracle["output"], truth.stock["output"].float())
    settings = replace(toy_settings, providers=("eager", "cpu"))
    half = replace(limits, flops={**limits.flops, "bfloat16": 1e9})
    rows = _measure(case, settings, half, tmp_path)
    assert {(row.status, row.dtype) for row in rows.values()} == {("ok", "bfloat16_autocast")}
    with pytest.raises(ValueError, match="autocast is measured with networks only"):
        providers.subject(
            replace(case, op="channel_gate", channels=8),
            weights=None,
            image=run.PHOTOGRAPH,
            folder=tmp_path,
        )


def test_flex_attention_of_groups_computes_them(monkeypatch):
    """Uncompiled, which takes no minute."""
    monkeypatch.setattr(operators, "_flex_attention", lambda: flex_attention)
    problem = operators.OPERATORS["grouped_window_attention"](
        Case("grouped_window_attention", 2, 24, 16, 32)
    )
    expected = problem.stock(problem.inputs)(**problem.inputs)
    for name in ("flex", "sdpa"):
        found = problem.alternatives[name](problem.inputs)(**problem.inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_max_autotune_is_for_gpus_and_replays_its_own_graph(monkeypatch):
    said = []

    def fake_compile(function, **options):
        said.append(options)
        return lambda *a, **k: (said.append("called"), function(*a, **k))[1]

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: said.append("new step")
    )
    double = providers._max_autotune(lambda x, *, by: x * by)
    assert [double(3, by=2), double(4, by=2)] == [6, 8]
    options = {"dynamic": False, "mode": "max-autotune"}
    assert said == [options, *["new step", "called"] * 2]

    def names(device, mode):
        case = Case("channel_gate", 1, 8, 8, 8, mode, device=device)
        return {p.name: p.graphs for p in providers._compile_providers(case, lambda f: f)}

    assert names("cpu", "forward") == {"compile": False}
    assert names("cuda", "backward") == {"compile": False}
    for mode in ("forward", "both"):
        assert names("cuda", mode) == {"compile": False, "compile_max_autotune": True}


class _FakeClock:
    """A GPU's, on which a call takes what it returns in seconds."""

    def __init__(self, device, *, cold=False):
        self.cold = cold

    def sampler(self, call):
        return lambda repeats, warm: call() * (2 if self.cold else 1)


def _here(monkeypatch, seconds, *, graphs=False, refused=False):
    """A provider in this process, as on a GPU."""
    graphed = []

    def graph(call, calls):
        if refused:
            raise RuntimeError("not while capturing")
        graphed.append(calls)
        return lambda: calls * call() / 2  # launches are half of it

    monkeypatch.setattr(measure, "Clock", _FakeClock)
    monkeypatch.setattr(measure, "graphed", graph)
    output = torch.zeros(1)

    class Running:
        def results(self, mode):
            return {"output": output}

        def call(self, mode):
            return lambda: (output.add_(1), seconds)[1]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 250)
    provider = providers.Provider("fake", Running, graphs=graphs)
    case = Case("channel_gate", 1, 8, 8, 8, device="cuda")
    return worker.Here(provider, case, memory=True), graphed


def test_a_gpus_samples_of_a_graph_are_as_long_as_others(monkeypatch):
    station, graphed = _here(monkeypatch, 0.0005)
    ready = station.ready()
    assert ready.memory == 150
    assert ready.results["output"] == 0, "a later call wrote into what is verified"
    samplers, missing = station.samplers()
    assert not missing
    assert graphed == [20]
    assert station.calls == {"graph": 20}
    rounds = measure.Rounds({cache: samplers[cache] for cache in samplers})
    samples = rounds.sample(0.0)
    per_call = {c: samples[c][0] / station.calls.get(c, 1) for c in samples}
    assert per_call == pytest.approx({"hot": 0.0005, "cold": 0.001, "graph": 0.00025})
    # Repeats of a graph are replays of 5 ms.
    lengths = {c: samples[c][0] * rounds._repeats[c] for c in samples}
    assert all(0.02 <= length < 0.03 for length in lengths.values())


def test_a_gpus_rows_are_seconds_per_call(monkeypatch, limits, tmp_path, toy_settings):
    station, _ = _here(monkeypatch, 0.0005)
    case = Case("channel_gate", 1, 8, 8, 8)
    measurement = run.Measurement(case, replace(toy_settings, providers=("cpu",)), tmp_path)
    monkeypatch.setattr(run.Measurement, "_station", lambda self, provider: station)
    monkeypatch.setattr(run.Truth, "check", lambda self, results: 0.0)
    measurement.prepare().sample(0.0)
    rows = {row.cache: row.median_ms for row in measurement.rows(limits)}
    assert rows == pytest.approx({"hot": 0.5, "cold": 1.0, "graph": 0.25})


def test_what_replays_a_graph_of_its_own_is_not_captured(monkeypatch):
    station, graphed = _here(monkeypatch, 0.0005, graphs=True)
    ready = station.ready()
    assert (ready.memory, ready.note) == (None, "no memory: its graph's is allocated once")
    samplers, _ = station.samplers()
    assert not graphed
    assert station.calls == {}
    assert samplers["graph"](1, True) == samplers["hot"](1, True) == 0.0005


def test_a_graph_that_cannot_be_captured_says_why(monkeypatch):
    station, _ = _here(monkeypatch, 0.0005, refused=True)
    station.ready()
    samplers, missing = station.samplers()
    assert set(samplers) == {"hot", "cold"}
    assert missing == {"graph": "RuntimeError: not while capturing"}


def test_a_broken_kernel_gets_no_time(toy_settings, limits, tmp_path, monkeypatch):
    make = operators.OPERATORS["pixel_attention"]

    def broken(case):
        problem = make(case)
        honest = problem.ours

        def ours(inputs, backend):
            function = honest(inputs, backend)

            def call(**arguments):
                y = function(**arguments).clone()
                y[0, 3, 5, 7] += 1e-4  # one element of twelve thousand
                return y

            return call

        return replace(problem, ours=ours)

    monkeypatch.setitem(operators.OPERATORS, "pixel_attention", broken)
    settings = replace(toy_settings, providers=("eager", "cpu"))
    rows = _measure(Case("pixel_attention", 1, 24, 16, 32), settings, limits, tmp_path)
    for name in ("cpu", "cpu_channels_last"):
        assert rows[name].status == "wrong"
        assert "error too large" in rows[name].reason
        assert rows[name].median_ms is None
        assert rows[name].fraction is None
    assert rows["eager"].status == "ok"
    text = "\n".join(run.report(list(rows.values())))
    assert "wrong: output: error too large" in text


def test_a_wrong_gradient_gets_no_time_either(toy_settings, limits, tmp_path, monkeypatch):
    make = operators.OPERATORS["gated_conv1x1"]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g * 1.01

    def broken(case):
        problem = make(case)
        honest = problem.ours
        return replace(
            problem,
            ours=lambda inputs, backend: lambda **a: Wrong.apply(honest(inputs, backend)(**a)),
        )

    monkeypatch.setitem(operators.OPERATORS, "gated_conv1x1", broken)
    settings = replace(toy_settings, providers=("cpu",))
    rows = _measure(Case("gated_conv1x1", 1, 8, 8, 8, "both"), settings, limits, tmp_path)
    assert rows["cpu"].status == "wrong"
    assert rows["cpu"].reason.startswith("gradient")


def test_what_cannot_run_says_why(toy_settings, limits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(
        providers, "our_backends", lambda *_: iter([("cpu", "its library did not load")])
    )
    settings = replace(toy_settings, providers=("eager", "openvino", "cpu"))
    (tmp_path / "mafdn_x4-1x3x8x8.onnx").write_bytes(b"")  # as if exported before
    rows = _measure(Case("mafdn_x4", 1, 0, 8, 8), settings, limits, tmp_path)
    assert rows["openvino"].status == "unavailable"
    assert "pip install" in rows["openvino"].reason
    assert (rows["cpu"].status, rows["cpu"].reason) == ("unavailable", "its library did not load")


def test_a_crash_of_one_provider_is_not_the_runs(toy_settings, limits, tmp_path, monkeypatch):
    make = operators.OPERATORS["pixel_attention"]

    def crashing(case):
        def ours(inputs, backend):
            raise MemoryError("not enough memory")

        return replace(make(case), ours=ours)

    monkeypatch.setitem(operators.OPERATORS, "pixel_attention", crashing)
    settings = replace(toy_settings, providers=("eager", "cpu"))
    rows = _measure(Case("pixel_attention", 1, 8, 8, 8), settings, limits, tmp_path)
    assert rows["cpu"].status == "failed"
    assert rows["cpu"].reason == "MemoryError: not enough memory"
    assert rows["eager"].median_ms > 0


def _apart(case, provider, folder, memory=False):
    build = functools.partial(providers.subject, weights=None, image=run.PHOTOGRAPH, folder=folder)
    file = folder / f"{provider}.pt"
    return worker.Apart(
        *(build, case, provider), threads=1, best_format="", file=file, memory=memory, heap="kept"
    )


@pytest.mark.unpoisoned
def test_memory_is_that_of_the_call(tmp_path):
    """Stock's attention matrices of 64 KiB pixels: 4 (16 + 64 + 256) bytes a pixel, twice (before
    and after softmax); ours stays near the output."""
    case = Case("grouped_window_attention", 1, 24, 256, 256)
    grown = {}
    for name in ("eager", "cpu"):
        station = _apart(case, name, tmp_path, memory=True)
        grown[name] = station.ready().memory / case.pixels
        station.close()
        assert station._process.exitcode == 0, "it ended by itself"
    # All four windows' matrices are not alive at once; the largest pair is.
    assert 2 * 4 * 256 < grown["eager"] < 3 * 4 * (16 + 64 + 256)
    assert 4 * 24 <= grown["cpu"] < 600


@pytest.mark.unpoisoned
def test_a_provider_in_its_own_process_is_verified_and_sampled(tmp_path, limits):
    case = Case("gated_conv1x1", 1, 24, 16, 32, "both")
    settings = run.Settings(threads=1, seconds=0.0, providers=("eager", "cpu"))
    rows = _measure(case, settings, limits, tmp_path)
    assert {row.status for row in rows.values()} == {"ok"}
    assert all(row.memory_mb > 0 and 0 <= row.error < 1e-2 for row in rows.values())
    assert not list(tmp_path.iterdir())  # what they handed over is gone


@pytest.mark.unpoisoned
def test_the_heap_is_the_one_asked_for(tmp_path, limits):
    program = (
        "import functools, pathlib, sys\n"
        "from sr_kernels.benchmarks import measure, providers, run, worker\n"
        "from sr_kernels.benchmarks.cases import Case\n"
        "measure.keep_freed_memory = lambda: print('kept')\n"
        "class Pipe:\n"
        "    send = close = lambda self, *answer: print(*(a[0] for a in answer))\n"
        "    def recv(self): raise EOFError\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "make = functools.partial(\n"
        "    providers.subject, weights=None, image=run.PHOTOGRAPH, folder=folder)\n"
        "case = Case('channel_gate', 1, 8, 8, 8)\n"
        "rest = (make, case, 'cpu', 1, '', folder / 'cpu.pt', False)\n"
        "worker._serve(Pipe(), *rest, sys.argv[2])\n"
    )
    said = [
        subprocess.check_output([sys.executable, "-c", program, tmp_path, heap], text=True).split()
        for heap in worker.HEAPS
    ]
    assert said == [["kept", "ready"], ["ready"]]
    (tmp_path / "cpu.pt").unlink()
    settings = run.Settings(threads=1, seconds=0.0, providers=("eager", "cpu"), heap="system")
    rows = _measure(Case("channel_gate", 1, 8, 8, 8), settings, limits, tmp_path)
    assert {(row.cache, row.status) for row in rows.values()} == {("system heap", "ok")}
    table.add(tmp_path, rows.values())
    assert "channel_gate 1x8x8x8 system heap" in plot.readme_section(tmp_path, tmp_path)


@pytest.mark.unpoisoned
def test_what_compiles_goes_on_beside_the_others(tmp_path, monkeypatch):
    class Station:
        def close(self):
            pass

    verified = []
    monkeypatch.setattr(run.Measurement, "_station", lambda self, provider: Station())
    monkeypatch.setattr(
        run.Measurement, "_verify", lambda self, provider, station: verified.append(provider.name)
    )
    case = Case("window_attention", 1, 24, 8, 8)
    measurement = run.Measurement(case, run.Settings(threads=2), tmp_path)
    measurement._make_ready(measurement._subject.providers)
    assert (verified[0], verified[-1]) == ("flex", "compile")
    assert set(verified) == {p.name for p in measurement._subject.providers}


@pytest.mark.unpoisoned
def test_a_provider_that_dies_is_reported(tmp_path):
    case = Case("channel_gate", 1, 8, 8, 8)
    station = _apart(case, "abacus", tmp_path)
    with pytest.raises(providers.Unavailable, match="no provider 'abacus'"):
        station.ready()
    station.close()
    station = _apart(case, "cpu", tmp_path)
    with pytest.raises(worker.Failed, match="no answer within 0 s"):
        station.ready(patience=0.0)
    station.ready()
    os.kill(station._process.pid, signal.SIGKILL)
    sampler = station.samplers()[0]["warm"]
    with pytest.raises(worker.Failed, match="was killed: probably out of memory") as caught:
        sampler(1, True)
    assert caught.value.provider == "cpu"
    station.close()


@pytest.mark.unpoisoned
def test_a_provider_that_dies_while_it_is_sampled_ends_alone(tmp_path, limits):
    settings = run.Settings(threads=1, seconds=0.0, providers=("eager", "cpu"), memory=False)
    measurement = run.Measurement(Case("channel_gate", 1, 8, 8, 8), settings, tmp_path)
    try:
        measurement.prepare().sample(0.0)
        first = {row.provider: row for row in measurement.rows(limits)}
        assert {row.status for row in first.values()} == {"ok"}
        os.kill(measurement._stations["cpu"]._process.pid, signal.SIGKILL)
        measurement.sample(0.0)
        second = {row.provider: row for row in measurement.rows(limits)}
    finally:
        measurement.close()
    assert second["cpu"].status == "failed"
    assert "was killed" in second["cpu"].reason
    assert second["cpu"].median_ms is None
    # The others keep what they had and go on.
    assert second["eager"].samples == 2 * first["eager"].samples


def _named(name, **options):
    return providers.Provider(name, lambda: None, **options)


def test_compile_brings_the_formats_it_chooses_from(toy_settings):
    def wanted(asked, *names):
        settings = replace(toy_settings, providers=(asked,))
        return [name for name in names if settings.wants(_named(name))]

    formats = ["eager", "eager_channels_last"]
    assert wanted("compile", *formats, "compile", "cpu") == [*formats, "compile"]
    found = wanted("compile_max_autotune", "eager", "compile", "compile_max_autotune", "cpu")
    assert found == ["eager", "compile_max_autotune"]


def test_what_is_slow_to_compile(tmp_path):
    def slow(case):
        this = providers.subject(case, weights=None, image=run.PHOTOGRAPH, folder=tmp_path)
        return [provider.name for provider in this.providers if provider.slow]

    assert slow(Case("grouped_window_attention", 1, 24, 16, 16)) == ["flex"]
    assert slow(Case("window_attention", 1, 24, 16, 16)) == []
    assert slow(Case("mafdn_x4", 1, 0, 8, 8)) == ["compile"]
    on_a_gpu = providers._compile_providers(Case("mafdn_x4", 1, 0, 8, 8, device="cuda"), print)
    assert all(provider.slow for provider in on_a_gpu)


def test_the_quick_set_goes_without_what_is_slow_and_not_named(toy_settings, tmp_path, monkeypatch):
    quick = replace(toy_settings, slow=False)
    slow, other = _named("flex", slow=True), _named("sdpa")
    assert (quick.wants(other), quick.wants(slow)) == (True, False)
    assert replace(quick, providers=("flex",)).wants(slow)
    assert not replace(quick, providers=("sdpa",)).wants(slow)
    assert toy_settings.wants(slow)

    def refuse(self):
        raise RuntimeError("enough")

    monkeypatch.setattr(run.Measurement, "prepare", refuse)
    for settings, expected in (
        (quick, True),
        (toy_settings, False),
        (replace(quick, providers=("compile",)), False),
    ):
        said = []
        _run([Case("mafdn_x4", 1, 0, 8, 8)], settings, tmp_path, said.append)
        message = "torch.compile of whole networks takes minutes, and is left out"
        assert (message in "\n".join(said)) is expected


def _run(chosen, settings, folder, say=lambda text: None):
    return run.run(
        chosen,
        settings,
        folder,
        say=say,
        progress=lambda label: lambda done, total: None,
        toy=True,
    )


def test_rows_are_written_case_by_case(toy_settings, tmp_path, monkeypatch):
    chosen = [Case("channel_gate", 1, 8, 8, 8), Case("channel_gate", 1, 8, 16, 16)]
    prepare = run.Measurement.prepare

    def interrupted(self):
        if self.case.height == 16:
            raise KeyboardInterrupt
        return prepare(self)

    monkeypatch.setattr(run.Measurement, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(chosen, replace(toy_settings, providers=("cpu",)), tmp_path)
    assert [row.shape for row in table.read(tmp_path)] == ["1x8x8x8", "1x8x8x8"]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("group", "order"), [(2, "ababab" + "ccc"), (9, "abcabcabc")])
def test_a_group_is_visited_in_turn(tmp_path, monkeypatch, group, order):
    """What the machine does in between is in the spread; and each visit adds to the others."""
    monkeypatch.setattr(run, "GROUP", group)
    monkeypatch.setattr(run, "VISITS", 3)
    chosen = [Case("channel_gate", 1, 8, side, 8) for side in (8, 16, 32)]
    seen = []
    sample = run.Measurement.sample

    def noted(self, *arguments):
        seen.append("abc"[chosen.index(self.case)])
        sample(self, *arguments)

    monkeypatch.setattr(run.Measurement, "sample", noted)
    settings = run.Settings(threads=1, seconds=0.0, providers=("cpu",), memory=False)
    rows, failed = _run(chosen, settings, tmp_path)
    assert "".join(seen) == order
    assert not failed
    assert {row.samples for row in rows} == {3 * measure.MIN_ROUNDS}
    assert len(table.read(tmp_path)) == len(rows) == 6


def test_a_provider_that_raises_while_it_is_sampled(toy_settings, tmp_path, monkeypatch):
    """In this process, as on a GPU: the others and the case go on without it."""
    of, taken = measure.Clock.sampler, itertools.count()

    def sampler(self, call):
        inner = of(self, call)

        def sample(repeats, warm):
            if next(taken) == 12:
                raise RuntimeError("no memory any more")
            return inner(repeats, warm)

        return sample

    monkeypatch.setattr(measure.Clock, "sampler", sampler)
    chosen = [Case("channel_gate", 1, 8, side, 8) for side in (8, 16)]
    settings = replace(toy_settings, apart=False, providers=("eager", "cpu"))
    rows, failed = _run(chosen, settings, tmp_path)
    assert not failed
    broken = [row for row in rows if row.status != "ok"]
    assert [row.reason for row in broken] == ["RuntimeError: no memory any more"]
    whole = run.VISITS * toy_settings.least
    assert [row.samples for row in rows if row.status == "ok"] == [whole] * 7
    assert len(table.read(tmp_path)) == 8


def test_a_group_ends_where_memory_does(toy_settings, tmp_path, monkeypatch):
    apart, here = (
        run.Measurement(Case("channel_gate", 1, 8, 8, 8), replace(toy_settings, apart=a), tmp_path)
        for a in (True, False)
    )
    same = apart.case
    assert run._room([], same)
    assert run._room([(0, apart)], same)
    assert not run._room([(0, here)], same)
    # What there is and what the next one will need, by its pixels, are to fit together.
    room = run.GROUP_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    apart.private = int(0.3 * room)
    assert run._room([(0, apart)], replace(same, height=16))
    assert not run._room([(0, apart)], replace(same, height=24))
    # A small one says little of it: most of what it holds is the same for any size.
    small = run.Measurement(replace(same, height=1), replace(toy_settings, apart=True), tmp_path)
    small.private = int(0.1 * room)
    assert run._room([(0, small), (1, apart)], replace(same, height=15))
    apart.private = int(room)
    assert not run._room([(0, apart)], replace(same, height=1))


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_measured(tmp_path):
    command = [sys.executable, "-m", "sr_kernels", "bench", "--op", "channel_gate", "--no-memory"]
    command += ["--provider", "cpu", "--seconds", "0.1", "--channels", "8"]
    command += ["--out", str(tmp_path), "--threads", "1", "--size"]
    command += ["8x8", *(f"{n}x32" for n in range(32, 420))]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while len(table.read(tmp_path)) < 4 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert process.poll() is None, "it ended by itself"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    rows = table.read(tmp_path)
    assert len(rows) >= 4
    assert all(row.status == "ok" for row in rows)
    assert rows[0].shape == "1x8x8x8"


# ------------------------------------------------------------------------------ command line


def test_list_needs_nothing_but_the_names(capsys):
    assert main(["bench", "--list", "--op", "elan_light_x4", "--size", "180x320"]) == 0
    assert capsys.readouterr().out == "elan_light_x4 1x3x180x320 float32 forward\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--op", "conv3d"], 2, "op is 'conv3d'; available are"),
        (["--size", "tall"], 2, "--size: size is 'tall'"),
        (["--size", "\u00b2x5"], 2, "--size: size is '\u00b2x5'; expected HEIGHTxWIDTH"),
        (["--threads", "0"], 2, "--threads is 0"),
        (["--channels", "0"], 2, "--channels: 0 is not a number of channels"),
        (["--seconds", "nan"], 2, "--seconds is nan"),
        (["--provider", "cpuu", "--op", "channel_gate"], 2, "'cpuu' is none of these cases'"),
        (["--weights", "elan=x"], 2, "'elan=x' is not NETWORK=FILE"),
        (["--weights", "elan_x4=missing.pth"], 1, "missing.pth does not exist"),
        (["--image", "missing.png"], 1, "--image: missing.png cannot be read as a picture"),
        (["--image", __file__], 1, "cannot be read as a picture"),
        (["--weights", f"elan_x4={__file__}"], 1, "--weights: "),
        (["--weights", f"imdn_x4={__file__}"], 1, "test_run.py: is neither a PyTorch checkpoint"),
        (["--weights", f"imdn_x4={os.path.dirname(__file__)}"], 1, "benchmarks is not a file"),
        (["--out", "/proc/results", "--op", "elan_x4"], 1, "--out: cannot write to /proc/results"),
    ],
)
def test_wrong_arguments_are_named(arguments, status, message, capsys):
    assert main(["bench", *arguments]) == status
    assert message in capsys.readouterr().err


def test_an_empty_table_has_no_charts(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["bench", "--plot", "--out", str(tmp_path)]) == 1
    assert "holds no timed row: measure first" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(capsys):
    shipped = models.PRETRAINED["mafdn_x4"]
    assert main(["bench", "--op", "elan_x4", "--weights", f"elan_light_x4={shipped}"]) == 1
    assert "whose network is MAFDN; expected ELAN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (torch.ones(2), "does not hold names with tensors; expected a state_dict"),
        ({"params": [1]}, "does not hold names with tensors; expected a state_dict"),
        ({"a": 1}, "does not hold names with tensors; expected a state_dict"),
        ({1: torch.ones(1)}, "does not hold names with tensors; expected a state_dict"),
        ({"a": torch.ones(1)}, "which does not fit"),
    ],
)
def test_files_without_weights_of_others_are_refused(content, message, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.* {message}"):
        networks.load(Case("imdn_x4", 1, 0, 16, 16), file, run.PHOTOGRAPH)


@pytest.mark.parametrize("name", ["params", None])
def test_weights_of_others_are_loaded(name, tmp_path):
    state = networks.NETWORKS["imdn_x4"].make().state_dict()
    state = {"module." + key: torch.full_like(value, 0.25) for key, value in state.items()}
    torch.save({name: state} if name else state, tmp_path / "weights.pth")
    model, what = networks.load(
        Case("imdn_x4", 1, 0, 16, 16), tmp_path / "weights.pth", run.PHOTOGRAPH
    )
    assert what == "weights.pth"
    assert all((value == 0.25).all() for value in model.parameters())


def test_an_out_that_cannot_be_written_to_is_noticed_before_measuring(
    capsys, tmp_path, monkeypatch
):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it measured"))
    assert main(["bench", "--op", "channel_gate", "--quick", "--out", str(tmp_path)]) == 1
    assert f"--out: cannot write to {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "lost"),
    [
        (["ok", "ok"], 0),
        (["ok", "wrong"], 1),
        (["wrong", "failed"], 2),
        (["ok", "unavailable"], 0),
        (["unavailable", "unavailable"], 2),
        (["ok", "raised"], 1),
        (["raised", "wrong"], 2),
        (["absent", "ok"], 0),
        (["absent", "absent"], 2),
    ],
)
def test_cases_that_could_not_be_measured_are_counted(
    statuses, lost, row, capsys, tmp_path, monkeypatch
):
    """What became of the one provider of each of two cases, or of the case itself."""

    def measured(chosen, *_, **__):
        rows, failed = [], []
        for case, status in zip(chosen, statuses, strict=True):
            if status == "raised":
                failed.append(case)
            elif status != "absent":
                time = 1.0 if status == "ok" else None
                mine = replace(row, op=case.op, shape=case.shape, status=status, median_ms=time)
                rows.append(mine)
        return rows, failed

    monkeypatch.setattr(run, "run", measured)
    arguments = ["bench", "--op", "channel_gate", "--channels", "8", "--size", "8x8", "8x9"]
    assert main([*arguments, "--out", str(tmp_path)]) == int(lost > 0)
    err = capsys.readouterr().err
    assert (f"{lost} of 2 cases could not be measured" in err) == (lost > 0)


@pytest.mark.unpoisoned
def test_a_case_that_cannot_be_does_not_end_the_run(capsys, tmp_path):
    """10 is no multiple of the windows."""
    arguments = ["bench", "--op", "grouped_window_attention", "channel_gate", "--channels", "12"]
    arguments += ["--size", "10x10", "--provider", "cpu", "--seconds", "0", "--no-memory"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "grouped_window_attention 1x12x10x10 float32 forward: failed: ValueError" in captured.out
    assert "1 of 2 cases could not be measured" in captured.err
    assert {row.op for row in table.read(tmp_path)} == {"channel_gate"}


def test_listing_with_plot_lists(capsys):
    assert main(["bench", "--plot", "--list", "--op", "mafdn_x4", "--size", "8x8"]) == 0
    assert capsys.readouterr().out == "mafdn_x4 1x3x8x8 float32 forward\n"


def test_cuda_without_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda", "--heap", "system", "--quick"]) == 2
    assert "--heap system is of a CPU's processes" in capsys.readouterr().err
    assert main(["bench", "--device", "cuda", "--quick"]) == 1
    assert "--device cuda: torch finds no CUDA GPU" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["bench", "--quick"]) == 1
    assert "the benchmarks need PyYAML: pip install" in capsys.readouterr().err


@pytest.mark.unpoisoned
def test_a_whole_command(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["bench", "--op", "channel_gate", "--channels", "8", "--size", "8x8"]
    arguments += ["--provider", "eager", "cpu", "--seconds", "0", "--out", str(tmp_path), "--plot"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s float32" in out
    assert "cpu_channels_last" in out
    assert (tmp_path / "results.csv").is_file()
    assert len(list(tmp_path.glob("speedup-*.svg"))) == 1
    rows = {row.provider: row for row in table.read(tmp_path)}
    assert set(rows) == {"eager", "eager_channels_last", "cpu", "cpu_channels_last"}
    assert all(row.memory_mb is not None for row in rows.values())
