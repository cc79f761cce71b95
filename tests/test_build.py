"""setup.py: its decisions, and what the libraries it links promise (see docs of the stable ABI)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from from_file import load

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests run without the source tree"
)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load(ROOT / "setup.py", "sr_kernels_setup")


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    """The environment without what would change the build."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SR_KERNELS_", "MAX_JOBS"))}


@pytest.fixture(scope="module")
def built(build: ModuleType, plain: dict[str, str]) -> tuple[Any, Path]:
    """The build parameters, and the folder with up-to-date objects and `_C`."""
    parameters = build.build_parameters({**plain, "SR_KERNELS_BUILD_CUDA": "0"})
    folder = build.build_directory(parameters, plain)
    build.run_ninja(parameters, folder, plain)
    return parameters, folder


def nm(*arguments: object) -> list[list[str]]:
    shown = subprocess.run(["nm", *map(str, arguments)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in shown.stdout.splitlines() if line.strip()]
    # The pointer to the C++ runtime's exception handler is weak data, the same in every object.
    return [fields for fields in lines if fields[-1] != "DW.ref.__gxx_personality_v0"]


# ---------------------------------------------------------------------------------- parallel jobs


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [
        (8, 100 * GIB, 8),  # as many as cores
        (8, 7 * GIB, 3),  # memory holds fewer
        (8, GIB, 1),  # never none
        (8, 0, 1),
        (1, 100 * GIB, 1),
        (4, None, 4),  # the system does not say
    ],
)
def test_jobs_from_cores_and_memory(
    build: ModuleType, cores: int, memory: int | None, jobs: int
) -> None:
    assert build.parallel_jobs({}, cores, memory, 2 * GIB) == jobs


def test_max_jobs_is_respected(build: ModuleType) -> None:
    assert build.parallel_jobs({"MAX_JOBS": "7"}, 1, 0, GIB) == 7
    assert build.parallel_jobs({"MAX_JOBS": ""}, 3, None, GIB) == 3
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(build.BuildError, match=re.escape(f"MAX_JOBS is {wrong!r}")):
            build.parallel_jobs({"MAX_JOBS": wrong}, 1, None, GIB)


def test_cores_and_memory_of_this_machine(build: ModuleType) -> None:
    assert 1 <= build.available_cores() <= (os.cpu_count() or 1)
    memory = build.free_memory()
    assert memory is None or 0 <= memory < 1 << 50


# ---------------------------------------------------------------------------- the build parameters


def test_every_kernel_is_compiled_once_for_each_instruction_set(
    build: ModuleType, plain: Mapping[str, str]
) -> None:
    parameters = build.build_parameters(plain)
    core = parameters.libraries[0]
    assert core.name == "_C"
    for source in ROOT.glob("csrc/*/cpu*.cpp"):
        units = [u for u in core.units if ROOT / u.source == source]
        isas = {flag for u in units for flag in u.flags if flag.startswith("-DSR_KERNELS_ISA=")}
        assert len(units) == len(isas) == len(parameters.description["isas"])
    objects = [u.object for library in parameters.libraries for u in library.units]
    assert len(set(objects)) == len(objects)
    every_flag = " ".join([*parameters.cxx_flags, *(f for u in core.units for f in u.flags)])
    assert "fast-math" not in every_flag
    assert "march=native" not in every_flag


def test_sanitizer_builds_have_a_folder_of_their_own(
    build: ModuleType, plain: Mapping[str, str]
) -> None:
    sanitized = {**plain, "SR_KERNELS_SANITIZE": "address,undefined"}
    parameters = build.build_parameters(sanitized)
    assert "-fsanitize=address,undefined" in parameters.cxx_flags
    assert "-fno-sanitize-recover=all" in parameters.cxx_flags
    assert [library.name for library in parameters.libraries] == ["_C"]
    ordinary = build.build_parameters(plain)
    assert build.build_directory(parameters, plain) != build.build_directory(ordinary, plain)


def test_gencode_flags(build: ModuleType) -> None:
    assert build.gencode_flags("8.0;9.0a;10.0+PTX", (13, 0)) == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    )
    for wrong in ("sm_90", "9", "9.0x", "9.0+ptx"):
        with pytest.raises(build.BuildError, match=re.escape(repr(wrong))):
            build.gencode_flags(wrong, (13, 0))
    with pytest.raises(build.BuildError, match="names no architecture"):
        build.gencode_flags(" ; ", (13, 0))


def test_cuda_wish_is_validated(build: ModuleType, plain: Mapping[str, str]) -> None:
    with pytest.raises(build.BuildError, match="SR_KERNELS_BUILD_CUDA is 'yes'"):
        build.cuda_decision({**plain, "SR_KERNELS_BUILD_CUDA": "yes"})
    assert build.cuda_decision({**plain, "SR_KERNELS_BUILD_CUDA": "0"})[0] is False


def test_cuda_decision(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(cuda: str | None, nvcc: bool, wish: str = "") -> tuple[bool, str]:
        torch_found = build.Torch(tmp_path, "2.13.0", cuda)
        monkeypatch.setattr(build, "find_torch", lambda: torch_found)
        monkeypatch.setattr(build, "find_nvcc", lambda environment: "nvcc" if nvcc else None)
        return build.cuda_decision({"SR_KERNELS_BUILD_CUDA": wish} if wish else {})

    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert decide("13.0", True) == (False, "the sources hold no CUDA kernels")
    (tmp_path / "csrc" / "family").mkdir(parents=True)
    (tmp_path / "csrc" / "family" / "launch.cu").touch()
    assert decide("13.0", True)[0] is True
    assert decide("13.0", True, "0") == (
        False,
        "SR_KERNELS_BUILD_CUDA=0 when the package was built",
    )
    assert "nvcc was not found" in decide("13.0", False)[1]
    assert "CPU-only" in decide(None, True)[1]
    assert decide(None, True, "1")[0] is True
    with pytest.raises(build.BuildError, match="nvcc is not found"):
        decide(None, False, "1")


def test_old_or_absent_torch_is_an_error_that_says_what_to_do(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(build.BuildError, match=r"torch 2\.9\.1 .* too old: torch >= 2\.10"):
        build.find_torch()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="--no-build-isolation"):
        build.find_torch()


def test_torch_is_found_without_importing_it(build: ModuleType) -> None:
    found = build.find_torch()
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert found.root == Path(torch.__file__).parent


def test_ninja_file_quotes_what_ninja_and_the_shell_would_take_for_themselves(
    build: ModuleType, tmp_path: Path
) -> None:
    source = tmp_path / "a $b: c.cpp"
    source.write_text('extern "C" const char* text() { return TEXT; }\n')
    unit = build.Unit(str(source), "a b.o", "cxx", ('-DTEXT="$x y\'"',))
    library = build.Library("_quoted", (unit,), ("-Wl,-soname,quoted",))
    parameters = build.BuildParameters("g++", ("-fPIC", "-O0"), None, (), (library,))
    folder = tmp_path / "the build: $dir"
    build.run_ninja(parameters, folder, {"MAX_JOBS": "1"})
    text = f"""
import ctypes
library = ctypes.CDLL({str(folder / "_quoted.abi3.so")!r})
library.text.restype = ctypes.c_char_p
print(library.text().decode(), end="")
"""
    shown = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert shown.stdout == "$x y'"


def test_a_failed_compilation_is_an_error(build: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("not C++\n")
    library = build.Library("_wrong", (build.Unit(str(source), "w.o", "cxx"),), ())
    parameters = build.BuildParameters("g++", (), None, (), (library,))
    with pytest.raises(build.BuildError, match="compiling sr_kernels failed"):
        build.run_ninja(parameters, tmp_path / "build", {"MAX_JOBS": "1"})


# ----------------------------------------------------------------------------- the built libraries


def test_objects_of_an_instruction_set_define_no_weak_symbol(built: tuple[Any, Path]) -> None:
    """Of several weak definitions the linker keeps one: an AVX-512 one stops older machines."""
    parameters, folder = built
    units = [
        u
        for library in parameters.libraries
        for u in library.units
        if any(f.startswith("-DSR_KERNELS_ISA=") for f in u.flags)
    ]
    assert units
    for unit in units:
        symbols = nm("--defined-only", "--demangle", folder / unit.object)
        weak = [" ".join(s[2:]) for s in symbols if s[1] in "WwVvuC"]
        assert not weak, f"{unit.object} defines weak symbols: {weak}"


def test_objects_of_an_instruction_set_define_their_namespace_alone(
    built: tuple[Any, Path],
) -> None:
    parameters, folder = built
    for library in parameters.libraries:
        for unit in library.units:
            isa = [f.partition("=")[2] for f in unit.flags if f.startswith("-DSR_KERNELS_ISA=")]
            if not isa:
                continue
            symbols = nm("--defined-only", "--demangle", "--extern-only", folder / unit.object)
            foreign = [" ".join(s[2:]) for s in symbols if f"{isa[0]}::" not in " ".join(s[2:])]
            assert not foreign, f"{unit.object} defines {foreign} outside namespace {isa[0]}"


def libraries_of(built: tuple[Any, Path]) -> list[Path]:
    parameters, folder = built
    return [folder / f"{library.name}.abi3.so" for library in parameters.libraries]


def test_libraries_need_stable_symbols_only(built: tuple[Any, Path]) -> None:
    """Of torch: the C functions of its stable ABI. Of Python: nothing."""
    stable = re.compile(r"(aoti_torch|torch)_\w+")
    system = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC|LIBC)_[\w.]+")
    for library in libraries_of(built):
        for fields in nm("--dynamic", "--undefined-only", library):
            kind, symbol = fields[-2], fields[-1].replace("@@", "@")
            allowed = kind == "w" or stable.fullmatch(symbol) or system.fullmatch(symbol)
            assert allowed, f"{library.name} needs {symbol}, which no stable ABI promises"


def test_libraries_name_no_folder_and_no_python(built: tuple[Any, Path]) -> None:
    for library in libraries_of(built):
        dynamic = subprocess.run(
            ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
        assert "libtorch.so" in needed  # what brings libtorch_cuda into scope under a CUDA torch
        assert not [n for n in needed if "python" in n]


@pytest.mark.asan
def test_build_is_described_beside_the_libraries() -> None:
    import sr_kernels

    described = Path(sr_kernels.__file__).with_name("_build.json")
    description = json.loads(described.read_text())
    assert "portable" in description["isas"]
    assert description["cuda"]["reason"]
    assert (described.with_name("_C_cuda.abi3.so")).exists() == description["cuda"]["built"]


SHIFT = """
import os, torch, sr_kernels
from sr_kernels.testing import make_tensor
x, w = make_tensor((1, 60, 9, 21)), make_tensor((60, 60, 1, 1), seed=1, scale=0.1)
ours = sr_kernels.shift_conv2d(x, w, backend="cpu")
torch.testing.assert_close(ours, sr_kernels.reference.shift_conv2d(x, w))
print(sr_kernels.backends.cpu_capability())
"""


def cpu_flags() -> set[str]:
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(flags[1].split()) if flags else set()


@pytest.mark.parametrize(
    ("isa", "flag"), [("portable", None), ("avx2", "avx2"), ("avx512", "avx512bw")]
)
def test_each_instruction_set_that_this_machine_has_runs(
    plain: dict[str, str], isa: str, flag: str | None, tmp_path: Path
) -> None:
    if flag is not None and flag not in cpu_flags():
        pytest.skip(f"this processor has no {isa}")
    run = subprocess.run(
        [sys.executable, "-c", SHIFT],
        env={**plain, "SR_KERNELS_CPU_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa
