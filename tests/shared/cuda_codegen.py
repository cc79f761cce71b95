"""What nvcc makes of the CUDA kernels, for every architecture that is built by default.

    python tests/shared/cuda_codegen.py     # writes tests/cuda_codegen.json

The table holds the registers of each kernel. A change of kernels that needs more is a decision: run
this and commit the table with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from from_file import load

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "tests" / "cuda_codegen.json"


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. spills: bytes.  shared: static, bytes.  sass: its code."""

    registers: int
    spills: int
    stack: int
    shared: int
    sass: str


def load_setup() -> ModuleType:
    return load(ROOT / "setup.py", "sr_kernels_setup")


def find_cuobjdump(nvcc: str, setup: ModuleType) -> Path | None:
    """The toolkit's, where it has both, or that of Triton's wheel."""
    toolkit, _ = setup.toolkit_of(nvcc)
    folders = [toolkit / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder / "cuobjdump"
    return None


def demangled(names: list[str]) -> dict[str, str]:
    """`sr_kernels::conv_kernel<float>(...)` as conv_kernel<float>."""
    shown = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = [
        re.sub(r"\(.*\)$", "", line).removeprefix("void ").replace("sr_kernels::", "")
        for line in shown.stdout.splitlines()
    ]
    return dict(zip(names, short, strict=True))


def compile_source(source: Path, arch: str, folder: Path, setup: ModuleType) -> dict[str, Kernel]:
    parameters = setup.build_parameters({"SR_KERNELS_BUILD_CUDA": "1", **path_environment()})
    number = arch.replace(".", "")
    flags = [flag for flag in parameters.nvcc_flags if not flag.startswith("-gencode")]
    cubin = folder / f"{source.parent.name}-{source.stem}-{number}.cubin"
    command = [parameters.nvcc, *flags, f"-gencode=arch=compute_{number},code=sm_{number}"]
    command += ["-cubin", "-Xptxas=-v", "-o", str(cubin), str(source.relative_to(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for {arch}: {done.stderr}")
    code = disassembled(cubin, parameters.nvcc, setup)
    kernels = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]

        def figure(pattern: str, text: str = part) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels[name] = Kernel(
            registers=figure(r"Used (\d+) registers"),
            spills=figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
            stack=figure(r"(\d+) bytes stack frame"),
            shared=figure(r"(\d+) bytes smem"),
            sass=code.get(name, ""),
        )
    names = demangled(list(kernels))
    return {names[name]: kernel for name, kernel in kernels.items()}


def path_environment() -> dict[str, str]:
    keep = ("PATH", "NVCC", "CUDA_HOME", "CUDA_PATH", "CXX")
    return {name: os.environ[name] for name in keep if name in os.environ}


def disassembled(cubin: Path, nvcc: str, setup: ModuleType) -> dict[str, str]:
    tool = find_cuobjdump(nvcc, setup)
    if tool is None:
        return {}
    shown = subprocess.run(
        [str(tool), "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tool.parent}:/usr/bin:/bin"},
    )
    parts = re.split(r"^\s*Function : (\S+)$", shown.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def why_not() -> str | None:
    """What is missing to compile here, or None."""
    if load_setup().find_nvcc() is None:
        return "nvcc is not found"
    return None if shutil.which("c++filt") else "c++filt (binutils) is not on PATH"


def measure(workers: int) -> dict[tuple[str, str], Kernel]:
    """(kernel, architecture) of every csrc/*/launch*.cu."""
    setup = load_setup()
    archs = [arch.removesuffix("+PTX") for arch in setup.DEFAULT_CUDA_ARCHS.split(";")]
    jobs = [(source, arch) for source in sorted(ROOT.glob("csrc/*/launch*.cu")) for arch in archs]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: compile_source(*job, Path(folder), setup), jobs)
        return {
            (name, arch): kernel
            for (_, arch), kernels in zip(jobs, found, strict=True)
            for name, kernel in kernels.items()
        }


def host_errors(workers: int) -> dict[str, str]:
    """What g++ says of each csrc/*/ops_cuda.cpp: the operators as torch sees them, which `_C_cuda`
    has besides the kernels. Checked, not compiled: empty where all is well."""
    setup = load_setup()
    parameters = setup.build_parameters({"SR_KERNELS_BUILD_CUDA": "1", **path_environment()})
    units = {
        unit.source: unit.flags
        for library in parameters.libraries
        for unit in library.units
        if Path(unit.source).name == "ops_cuda.cpp"
    }
    assert units

    def said(item: tuple[str, tuple[str, ...]]) -> str:
        command = [parameters.cxx, *parameters.cxx_flags, *item[1], "-fsyntax-only", item[0]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(units, pool.map(said, units.items()), strict=True))
    return {source: text for source, text in found.items() if text}


def toolkit_version() -> str:
    setup = load_setup()
    _, version = setup.toolkit_of(setup.find_nvcc())
    return ".".join(map(str, version))


def write_table() -> None:
    rows: dict[str, dict[str, int]] = {}
    for (name, arch), kernel in sorted(measure(2).items()):
        rows.setdefault(name, {})[arch] = kernel.registers
    table = {"nvcc": toolkit_version(), "registers": rows}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    write_table()
