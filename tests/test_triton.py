"""The Triton backend: its kernels interpreted and compiled, the choice, tuning, installation."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from from_file import load

import sr_kernels
from sr_kernels import _library, backends
from sr_kernels.testing import make_tensor

ROOT = Path(__file__).resolve().parents[1]
X = make_tensor((1, 10, 6, 6))
W = make_tensor((10, 10, 1, 1), seed=1)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def codegen():
    yield load(ROOT / "tests" / "triton_codegen.py")
    del sys.modules["triton_codegen"]


# ------------------------------------------------------------------------------ the kernels


@pytest.mark.slow
def test_all_operators_in_the_interpreter():
    """tests/triton_operators in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    began = time.monotonic()
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "triton_operators")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        timeout=1200,
    )
    print(f"tests/triton_operators took {time.monotonic() - began:.0f} s")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@interpreted
@pytest.mark.slow
def test_compiled_code_of_every_kernel(codegen):
    """No spills but those that the table states for another Triton than its own; products on tensor
    cores; with the table's own, registers and shared memory not above it."""
    table = json.loads(codegen.TABLE.read_text())
    found = codegen.gate()
    assert found.keys() == table["kernels"].keys(), (
        "new table: python tests/triton_codegen.py --write"
    )
    version = codegen.triton.__version__
    stated = table["spills"].get(version, {})
    for label, targets in found.items():
        assert targets.keys() == table["kernels"][label].keys(), label
        for target, figures in targets.items():
            allowed = table["kernels"][label][target]
            where = f"{label} for {target}: {figures}, table {allowed}"
            if allowed["tensor_core"] > 0:
                assert figures["tensor_core"] > 0, where
            if version == table["triton"] or version in table["spills"]:
                assert figures["spills"] <= stated.get(label, {}).get(target, 0), where
            if version == table["triton"]:
                assert figures["registers"] <= allowed["registers"], where
                assert figures["shared"] <= allowed["shared"], where


@interpreted
def test_the_table_holds_every_kernel(codegen):
    """float16 and bfloat16 products on tensor cores, float32 products ("ieee") not, for both
    architectures; and no kernel of the modules is left out of it."""
    import ast

    kernels = json.loads(codegen.TABLE.read_text())["kernels"]
    started = set()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for launch in codegen.first_of_each(codegen.all_launches(dtype)):
            started.add(launch.name)
            product = codegen.has_product(launch)
            if dtype == torch.float32 and not product:
                continue
            for target in ("sm_90", "sm_80"):
                figures = kernels[codegen.label(launch)][target]
                on_tensor_cores = figures["tensor_core"] > 0
                assert on_tensor_cores == (product and dtype != torch.float32), (launch, target)
                assert figures["spills"] == 0, (launch, target)
    # ELAN's 180 channels: 30 a head of six, 60 a group of three.
    found = {
        (launch.name, name, value)
        for launch in codegen.all_launches()
        for name, value in launch.constants
        if isinstance(value, int)
    }
    for name in ("attention", "statistics", "gradient"):
        assert {(f"{name}_kernel", "D", 30), (f"{name}_kernel", "D", 60)} <= found
    for name in ("conv", "input_gradient", "weight_gradient", "block", "block_hidden", "conv3x3"):
        assert (f"{name}_kernel", "C_IN", 180) in found
    for module in codegen.MODULES:
        tree = ast.parse(Path(module.__file__).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for name in names if name.endswith("_kernel")} <= started, module.__name__


@interpreted
@pytest.mark.slow
def test_every_kernel_compiles_for_amd(codegen):
    """To a code object for gfx942, float16 products on matrix cores; never run on one."""
    from triton.backends.amd import compiler

    if hasattr(compiler.HIPBackend, "path_to_rocm_lld"):  # later ones bring their linker
        try:
            compiler.HIPBackend.path_to_rocm_lld()
        except Exception as error:
            pytest.skip(f"this Triton links by an installation of ROCm: {error}")
    for launch in codegen.first_of_each(codegen.all_launches()):
        binary = codegen.compiled(launch, codegen.TARGETS["gfx942"])
        assert binary.asm["hsaco"][:4] == b"\x7fELF", launch.name
        assert binary.metadata.shared <= 65536, launch.name
        assert ("v_mfma" in binary.asm["amdgcn"]) == codegen.has_product(launch), launch.name


# ------------------------------------------------------------------------------ the choice


def test_importing_the_package_does_not_import_triton():
    program = "import sys, sr_kernels; print('triton' in sys.modules)"
    assert run_python(program).stdout.strip() == "False"


def test_works_without_triton():
    """As if it were not installed: everything else runs, and the reason is said."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.metadata as m; found = m.version\n"
        "def version(name):\n"
        "    if name == 'triton': raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
        "import torch, sr_kernels\n"
        "x, w = torch.ones(1, 5, 2, 2), torch.ones(1, 5, 1, 1)\n"
        "sr_kernels.shift_conv2d(x, w)\n"
        "print(sr_kernels.backends.can_run('triton', 'shift_conv2d', (x,)))"
    )
    result = run_python(program)
    assert result.stdout.strip() == "(False, 'triton is not installed')", result.stderr


@interpreted
def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        sr_kernels.shift_conv2d(X, W, backend="triton")
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        backends.choose("shift_conv2d", (X.to("meta"),), "triton")


def test_an_interpreter_switched_on_too_late_is_an_error():
    program = (
        "import os, triton, torch; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import sr_kernels; print(sr_kernels.backends.can_run('triton', 'x', (torch.ones(1),)))"
    )
    environment = {"TRITON_INTERPRET": "0"}
    assert "set it before Python starts" in run_python(program, **environment).stdout


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(_library.importlib.metadata, "version", lambda name: "3.3.1")
    result = _library.triton.__wrapped__()
    assert result.error == "triton 3.3.1 is older than 3.4"
    monkeypatch.setattr(_library.importlib.metadata, "version", lambda name: "3.4rc1")
    assert _library.triton.__wrapped__().loaded


class GpuTensor:
    """What `choose` looks at, of a tensor on a GPU that is not here."""

    is_cuda, dtype, device = True, torch.float16, torch.device("cuda")


def test_gpu_tensors_get_triton_before_the_reference(monkeypatch):
    monkeypatch.setattr(_library, "triton", lambda: _library.TritonResult("3.6.0", None))
    assert backends.choose("shift_conv2d", (GpuTensor(),)) == "triton"
    missing = _library.TritonResult(None, "triton is not installed")
    monkeypatch.setattr(_library, "triton", lambda: missing)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(sr_kernels.FallbackWarning, match="; triton is not installed"):
        assert backends.choose("shift_conv2d", (GpuTensor(),)) == "reference"


@pytest.mark.parametrize(
    ("named", "found"), [(None, "neither gcc nor clang"), ("no-cc", "CC=no-cc")]
)
def test_gpu_tensors_without_a_c_compiler(monkeypatch, tmp_path, named, found):
    """Triton's first launch would raise: `auto` falls back and says why."""
    monkeypatch.setattr(_library, "triton", lambda: _library.TritonResult("3.6.0", None))
    monkeypatch.setattr(_library, "why_no_launch", _library.why_no_launch.__wrapped__)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("CC", raising=False)
    if named is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", named)
    message = r"Triton needs a C compiler \(CC, gcc or clang\) at the first launch, and "
    with pytest.warns(sr_kernels.FallbackWarning, match=message + found):
        assert backends.choose("shift_conv2d", (GpuTensor(),)) == "reference"
    with pytest.raises(RuntimeError, match=message):
        backends.choose("shift_conv2d", (GpuTensor(),), "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = {name: rest for name, *rest in backends.report()}
    assert not rows["triton"][0]
    assert found in rows["triton"][1]

    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert backends.choose("shift_conv2d", (GpuTensor(),)) == "triton"


def test_gpu_tensors_get_torchs_own_conv3x3(monkeypatch, recwarn):
    """No kernel of ours has been measured against it. By name the Triton kernel runs."""
    monkeypatch.setattr(_library, "triton", lambda: _library.TritonResult("3.6.0", None))
    assert backends.choose("conv3x3", (GpuTensor(),)) == "reference"
    assert not recwarn.list
    assert backends.choose("conv3x3", (GpuTensor(),), "triton") == "triton"


def test_tf32_where_torch_allows_it():
    pytest.importorskip("triton")
    from sr_kernels.triton._launch import precision

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for allowed, expected in (("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")):
            switch.fp32_precision = allowed
            assert precision() == expected
    finally:
        switch.fp32_precision = before


# ------------------------------------------------------------------------------ configurations


@pytest.fixture
def configs(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from sr_kernels.triton import _configs

    monkeypatch.setenv("SR_KERNELS_TRITON_CONFIGS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _configs.tuned_for.cache_clear()
    yield _configs
    _configs.tuned_for.cache_clear()


def tuned_file(configs, name, capability, shared_memory, block):
    device = configs.Device(name, capability, shared_memory)
    key = configs.make_key("conv", "float16", {"c_in": 60, "c_out": 60})
    return configs.TunedFile(device, {key: {**configs.DEFAULTS["conv"], "BLOCK_P": block}}, "3.6.0")


def test_a_file_is_read_as_it_was_written(configs, tmp_path):
    written = tuned_file(configs, "GPU A", (9, 0), 1000, 128)
    path = tmp_path / configs.file_name("GPU A")
    written.write(path)
    assert path.name == "GPU_A.json"
    assert configs.TunedFile.read(path) == written
    assert [file.name for file in tmp_path.iterdir()] == ["GPU_A.json"]


def test_this_devices_file_without_a_warning(configs, tmp_path, recwarn):
    for name, block in (("GPU A", 128), ("GPU B", 32)):
        tuned = tuned_file(configs, name, (9, 0), 1000, block)
        tuned.write(tmp_path / configs.file_name(name))
    found = configs.tuned_for(configs.Device("GPU B", (9, 0), 1000))
    assert next(iter(found.entries.values()))["BLOCK_P"] == 32
    assert not recwarn.list


def test_the_nearest_device_with_one_warning(configs, tmp_path):
    for name, capability, shared in (("Far", (7, 5), 500), ("Near", (9, 0), 900),
                                     ("Larger", (10, 0), 2000)):  # fmt: skip
        tuned = tuned_file(configs, name, capability, shared, 64)
        tuned.write(tmp_path / configs.file_name(name))
    here = configs.Device("Here", (10, 0), 1000)
    message = "no tuned configurations for Here: .* of Near"
    with pytest.warns(configs.TuningWarning, match=message):
        found = configs.tuned_for(here)
    assert found.device.name == "Near"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.tuned_for(here) is found


def test_no_file_of_another_vendor(configs, tmp_path, monkeypatch, recwarn):
    """gfx90a and sm_90 both call themselves 9.0."""
    tuned = tuned_file(configs, "GPU A", (9, 0), 1000, 128)
    tuned.write(tmp_path / configs.file_name("GPU A"))
    assert configs.tuned_for(configs.Device("Other", (9, 0), 1000, "amd")) is None
    assert not recwarn.list

    class Properties:
        name, major, minor, shared_memory_per_block_optin = "Other", 9, 0, 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    for hip, vendor in ((None, "nvidia"), ("6.4", "amd")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert configs.Device.of.__wrapped__(0).vendor == vendor


def test_a_wrong_file_is_not_used_and_named(configs, tmp_path):
    tuned_file(configs, "Here", (9, 0), 1000, 32).write(tmp_path / configs.file_name("Here"))
    (tmp_path / "Another.json").write_text("{")
    with pytest.warns(configs.TuningWarning, match="Another.json.*; it is not used"):
        found = configs.tuned_for(configs.Device("Here", (9, 0), 1000))
    assert next(iter(found.entries.values()))["BLOCK_P"] == 32


def test_a_folder_that_is_not_there_is_named(configs, tmp_path, monkeypatch):
    monkeypatch.setenv("SR_KERNELS_TRITON_CONFIGS", str(tmp_path / "typo"))
    with pytest.warns(configs.TuningWarning, match="SR_KERNELS_TRITON_CONFIGS is .*typo.*no such"):
        assert configs.tuned_for(configs.Device("Here", (9, 0), 1000)) is None


def test_a_file_that_cannot_be_finished_changes_nothing(configs, tmp_path, monkeypatch):
    path = tmp_path / "GPU_A.json"
    tuned_file(configs, "GPU A", (9, 0), 1000, 128).write(path)
    before = path.read_text()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        tuned_file(configs, "GPU A", (9, 0), 1000, 64).write(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["GPU_A.json"]


def test_no_file_is_no_warning(configs, recwarn):
    assert configs.tuned_for(configs.Device("Here", (10, 0), 1000)) is None
    assert not recwarn.list


def test_the_nearest_sizes(configs):
    tuned = tuned_file(configs, "GPU A", (9, 0), 1000, 128)
    for c_in, block in ((180, 32), (16, 256)):
        key = configs.make_key("conv", "float16", {"c_in": c_in, "c_out": 60})
        tuned.entries[key] = {**configs.DEFAULTS["conv"], "BLOCK_P": block}

    def nearest(dtype="float16", **sizes):
        return configs.nearest_entry(tuned, configs.make_key("conv", dtype, sizes))

    assert nearest(c_in=60, c_out=60)["BLOCK_P"] == 128
    assert nearest(c_in=150, c_out=64)["BLOCK_P"] == 32
    assert nearest(c_in=8, c_out=60)["BLOCK_P"] == 256
    assert nearest("float32", c_in=60, c_out=60) is None
    assert nearest(c=60) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "not a file of tuned configurations"),
        ({"entries": [{}]}, "KeyError"),
        ({"device": None, "capability": []}, "IndexError"),
        ({"entry": {"sizes": []}}, "AttributeError"),
        ({"entry": {"sizes": {"c_in": 0, "c_out": 60}}}, "sizes are .*positive integers"),
        ({"entry": {"config": []}}, "AttributeError"),
        ({"entry": {"config": {"BLOCK_P": 64}}}, "config of conv has"),
        ({"tiles": {"BLOCK_P": 48}}, "BLOCK_P of conv is 48: it must be a power of two from 16 on"),
        ({"tiles": {"BLOCK_I": 8}}, "BLOCK_I of conv is 8: it must be a power of two from 16 on"),
        ({"tiles": {"num_stages": 0}}, "num_stages of conv is 0"),
    ],
)
def test_a_wrong_file_is_named(configs, tmp_path, change, message):
    path = tmp_path / "wrong.json"
    tuned_file(configs, "GPU A", (9, 0), 1000, 128).write(path)
    if change == "not json":
        path.write_text("{")
    else:
        data = json.loads(path.read_text())
        [entry] = data["entries"]
        entry["config"].update(change.get("tiles", {}))
        entry.update(change.get("entry", {}))
        data.update({k: v for k, v in change.items() if k in data})
        path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        configs.TunedFile.read(path)
    assert str(path) in str(error.value)


def test_tiles_of_products_are_of_16_at_least(configs):
    """What a matrix product takes. Others may be smaller: channels of a sum, warps."""
    for kernel, config in configs.DEFAULTS.items():
        for name in config.keys() - {"num_stages"}:
            if name in ("BLOCK_C", "num_warps"):
                configs.checked(kernel, {**config, name: 1})
            else:
                with pytest.raises(ValueError, match=f"{name} of {kernel} is 8"):
                    configs.checked(kernel, {**config, name: 8})


def test_cpu_tensors_have_the_default(configs, tmp_path):
    tuned_file(configs, "GPU A", (9, 0), 1000, 128).write(tmp_path / "GPU_A.json")
    x = torch.empty(1, 60, 2, 2, dtype=torch.float16)
    assert configs.configuration("conv", x, c_in=60, c_out=60) == configs.DEFAULTS["conv"]


# ------------------------------------------------------------------------------ tuning


def problem_of(configs, tuning, result=lambda config: 1.0):
    """A problem that asks for one configuration, and a list of those it ran with."""
    used = []
    x = torch.empty(1, 60, 2, 2, dtype=torch.float16)

    def run():
        used.append(configs.configuration("conv", x, c_in=60, c_out=60))
        return [torch.tensor(result(used[-1]))]

    return tuning.Problem("fake", run), used


def test_tune_finds_the_fastest(configs):
    from sr_kernels.triton import tuning

    best = {"BLOCK_P": 128, "BLOCK_O": 32, "BLOCK_I": 16, "num_warps": 8, "num_stages": 3}
    problem, used = problem_of(configs, tuning)

    def timer(run):
        run()
        return 1.0 + sum(abs(used[-1][name] - value) / value for name, value in best.items())

    device = configs.Device("Fake", (9, 0), 1000)
    said = []
    tuned, defects = tuning.tune([problem, problem], device, timer, say=said.append)
    assert tuned.entries == {configs.make_key("conv", "float16", {"c_in": 60, "c_out": 60}): best}
    assert (len(said), defects) == (1, 0)
    assert (
        configs.configuration("conv", torch.empty(1, 60, 2, 2), c_in=60, c_out=60)
        == (configs.DEFAULTS["conv"])
    )


def test_tune_keeps_the_default_where_nothing_is_clearly_faster(configs):
    from sr_kernels.triton import tuning

    problem, used = problem_of(configs, tuning)

    def timer(run):
        run()
        return 1.0 if used[-1] == configs.DEFAULTS["conv"] else 0.99

    tuned, defects = tuning.tune([problem], configs.Device("Fake", (9, 0), 1000), timer)
    assert (list(tuned.entries.values()), defects) == ([configs.DEFAULTS["conv"]], 0)


class TooLarge(Exception):
    pass


def fitting(most):
    def run(config):
        if config["BLOCK_P"] > most:
            raise TooLarge
        return 1.0

    return run


def test_tune_skips_what_does_not_fit(configs):
    from sr_kernels.triton import tuning

    device = configs.Device("Fake", (9, 0), 1000)
    problem, used = problem_of(configs, tuning, fitting(64))
    tuned, defects = tuning.tune(
        [problem], device, lambda run: -used[-1]["BLOCK_P"], unfit=(TooLarge,)
    )
    assert (next(iter(tuned.entries.values()))["BLOCK_P"], defects) == (64, 0)


def test_tune_leaves_out_what_is_wrong_and_says_so(configs):
    """The fastest are wrong: from 128 on. A second round, which comes after a gain, is silent."""
    from sr_kernels.triton import tuning

    times = {16: 1.0, 32: 0.5, 64: 1.0, 128: 0.1, 256: 0.1}
    problem, used = problem_of(configs, tuning, lambda config: float(config["BLOCK_P"] >= 128))
    said = []
    tuned, defects = tuning.tune(
        [problem],
        configs.Device("Fake", (9, 0), 1000),
        lambda run: times[used[-1]["BLOCK_P"]],
        say=said.append,
    )
    assert next(iter(tuned.entries.values()))["BLOCK_P"] == 32
    wrong = [text for text in said if "fake gives another result with" in text]
    assert len(wrong) == defects == 2, "128 and 256, each once"


def test_tune_does_not_take_what_never_gives_the_same(configs):
    from sr_kernels.triton import tuning

    results = iter(range(1000))
    problem, _ = problem_of(configs, tuning, lambda config: float(next(results)))
    tuned, defects = tuning.tune([problem], configs.Device("Fake", (9, 0), 1000), lambda run: 1.0)
    assert tuned.entries == {}
    assert defects > 0


def test_tune_keeps_what_was_found_before_an_error_and_before_ctrl_c(configs):
    from sr_kernels.triton import tuning

    def raises(error):
        def run():
            raise error

        return tuning.Problem(type(error).__name__, run)

    def other():
        configs.configuration("block", torch.empty(1, 60, 2, 2), c=60)
        return [torch.tensor(1.0)]

    device = configs.Device("Fake", (9, 0), 1000)
    problem, _ = problem_of(configs, tuning)
    memory = raises(torch.OutOfMemoryError("CUDA out of memory.\nTried"))
    said, saved = [], []
    problems = [memory, problem, problem, tuning.Problem("other", other)]
    _, defects = tuning.tune(
        problems,
        device,
        lambda run: 1.0,
        say=said.append,
        save=lambda tuned: saved.append([key[0] for key in tuned.entries]),
    )
    assert (saved, defects) == ([["conv"], ["conv", "block"]], 1)
    assert "OutOfMemoryError: failed: OutOfMemoryError: CUDA out of memory." in said
    saved.clear()
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(
            [problem, raises(KeyboardInterrupt())],
            device,
            lambda run: 1.0,
            save=lambda tuned: saved.append([key[0] for key in tuned.entries]),
        )
    assert saved == [["conv"]]


def test_tune_where_a_default_does_not_fit(configs):
    """From the smallest tiles; what does not fit with these either does not stop the others."""
    from sr_kernels.triton import tuning

    def never():
        configs.configuration("block", torch.empty(1, 60, 2, 2), c=60)
        raise TooLarge

    device = configs.Device("Fake", (9, 0), 1000)
    problem, used = problem_of(configs, tuning, fitting(32))
    said = []
    tuned, defects = tuning.tune(
        [tuning.Problem("huge", never), problem],
        device,
        lambda run: 1 / used[-1]["BLOCK_P"],
        unfit=(TooLarge,),
        say=said.append,
    )
    key = configs.make_key("conv", "float16", {"c_in": 60, "c_out": 60})
    assert {k: config["BLOCK_P"] for k, config in tuned.entries.items()} == {key: 32}
    assert defects == 0
    assert said[0] == "huge: does not fit this device, even with the smallest tiles"


@interpreted
def test_the_problems_of_tuning_ask_for_every_kernel(configs, codegen, monkeypatch):
    """Run with their kernels noted instead of started, at a small size, on the CPU."""
    from sr_kernels.triton import tuning

    monkeypatch.setattr(_library, "triton", lambda: _library.TritonResult("3.6.0", None, True))
    problems = tuning.network_problems(torch.device("cpu"), [torch.float16], size=(16, 16))
    with codegen.recorded(), configs.recorded() as keys:
        for problem in problems:
            problem.run()
    # The pairs of ELAN's groups are tuned as window attention is.
    assert {key[0] for key in keys} == set(configs.DEFAULTS)


def test_tune_without_a_gpu_says_so(capsys, monkeypatch):
    from sr_kernels.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    assert "tune measures kernels on a GPU, and torch finds none here" in capsys.readouterr().err


@pytest.fixture
def tune(configs, tmp_path, monkeypatch):
    """`sr-kernels tune` on a GPU that is not here: its exit status, and how often it measured.
    `end`, if given, says after what was found how many defects there were, or raises."""
    from sr_kernels.cli import main
    from sr_kernels.triton import tuning

    device = configs.Device("GPU A", (9, 0), 1000)
    measured = []

    ends = []

    def measure(index, dtypes, say, save):
        measured.append(dtypes)
        tuned = configs.TunedFile(device, triton="3.6.0")
        for dtype in dtypes:
            key = configs.make_key("conv", str(dtype).removeprefix("torch."), {"c_in": 60})
            tuned.entries[key] = {**configs.DEFAULTS["conv"], "BLOCK_P": 16 * 2 ** len(measured)}
            save(tuned)
        return tuned, ends[-1]()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_library, "triton", lambda: _library.TritonResult("3.6.0", None))
    monkeypatch.setattr(configs.Device, "of", lambda index: device)
    monkeypatch.setattr(tuning, "tune_gpu", measure)

    def run(*arguments, end=lambda: 0):
        ends.append(end)
        return main(["tune", "--output", str(tmp_path / "new"), *arguments]), len(measured)

    return run


def test_tune_writes_its_file_and_keeps_what_was_there(configs, tune, tmp_path, capsys):
    path = tmp_path / "new" / "GPU_A.json"
    assert tune("--dtype", "float16", "float32") == (0, 1)
    assert f"wrote {path}" in capsys.readouterr().out
    assert tune("--dtype", "float16") == (0, 2)
    found = configs.TunedFile.read(path).entries
    assert {key[1]: config["BLOCK_P"] for key, config in found.items()} == {
        "float16": 64,
        "float32": 32,
    }


def test_tune_that_is_interrupted_has_written_what_it_found(configs, tune, tmp_path, capsys):
    def ctrl_c():
        raise KeyboardInterrupt

    path = tmp_path / "new" / "GPU_A.json"
    assert tune("--dtype", "float32") == (0, 1)
    assert tune("--dtype", "float16", end=ctrl_c) == (130, 2)
    assert capsys.readouterr().out.count(f"wrote {path}") == 2
    assert [key[1] for key in configs.TunedFile.read(path).entries] == ["float16", "float32"]


def test_tune_with_defects_fails_and_writes_the_others(configs, tune, tmp_path, capsys):
    assert tune(end=lambda: 2) == (1, 1)
    assert "2 configurations or operators had to be left out" in capsys.readouterr().err
    assert len(configs.TunedFile.read(tmp_path / "new" / "GPU_A.json").entries) == 1


def test_tune_reads_the_file_before_it_measures(tune, tmp_path, capsys):
    path = tmp_path / "new" / "GPU_A.json"
    path.parent.mkdir()
    path.write_text('{"device": "GPU A"}')
    assert tune() == (1, 0)
    message = " ".join(capsys.readouterr().err.split())
    assert f"{path}: not a file of tuned configurations" in message
    assert "--output" in message
    assert path.read_text() == '{"device": "GPU A"}'


def test_tune_into_what_is_no_folder(tune, tmp_path, capsys):
    (tmp_path / "new").write_text("")
    assert tune() == (1, 0)
    assert f"cannot write to {tmp_path / 'new'}" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------ installation


PURE_PROGRAM = """
import sys; sys.path.insert(0, SITE)
import torch, sr_kernels
from sr_kernels import models

assert sr_kernels.__file__.startswith(SITE), sr_kernels.__file__
x, w = torch.ones(1, 5, 2, 2), torch.ones(5, 5, 1, 1)
a = sr_kernels.shift_conv2d(x, w, backend="triton")
b = sr_kernels.shift_conv2d(x, w, backend="reference")
torch.testing.assert_close(a, b)

network = models.elan(2, m_elan=2, c_elan=12, n_share=0, window_sizes=(2, 4), rgb_range=1.0).eval()
network.backend = "reference"
planned = models.plan(network)
planned.backend = "triton"
x = torch.rand(1, 3, 8, 8)
torch.testing.assert_close(planned(x), network(x).detach(), rtol=1e-4, atol=1e-5)


class CALayer(torch.nn.Module):  # RCAN's, which patch knows
    def __init__(self):
        super().__init__()
        self.avg_pool = torch.nn.AdaptiveAvgPool2d(1)
        convolutions = torch.nn.Conv2d(8, 2, 1), torch.nn.Conv2d(2, 8, 1)
        self.conv_du = torch.nn.Sequential(
            convolutions[0], torch.nn.ReLU(inplace=True), convolutions[1], torch.nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.conv_du(self.avg_pool(x))


print(sr_kernels.patch(torch.nn.Sequential(CALayer())))
from sr_kernels.cli import main; main(["env"])
"""


@pytest.mark.slow
def test_a_pure_installation_has_reference_and_triton(tmp_path):
    """SR_KERNELS_BUILD=0: no compiler, no library; `sr-kernels env` says what there is, a plan runs
    on Triton, and patch leaves modules as they are and says why."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--no-index", "--target", str(site), str(ROOT)]
    subprocess.run(command, env={**os.environ, "SR_KERNELS_BUILD": "0"}, check=True)
    program = tmp_path / "program.py"
    program.write_text(f"SITE = {str(site)!r}\n{PURE_PROGRAM}")
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if "CALayer" in line]
    assert line.endswith("left alone: _C.abi3.so was not built")
    assert "none: a pure Python installation (SR_KERNELS_BUILD=0)" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    found = {line[0]: line[1] for line in lines if len(line) > 1 and line[1] in ("yes:", "no:")}
    assert found == {"cuda": "no:", "triton": "yes:", "cpu": "no:", "reference": "yes:"}
