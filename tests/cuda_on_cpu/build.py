"""Compiles the CUDA kernels with g++ for `cuda_on_cpu.h` and imports them.

    kernels = load("shift_conv")          # bind_shift_conv.cpp
    python tests/cuda_on_cpu/build.py shift_conv --sanitize    # builds, prints the library's path

A library is kept in build/cuda_on_cpu under a hash of all that it is made from.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
FLAGS += ("-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-unused-function")
SANITIZER_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")


def cuda_includes() -> Path | None:
    """The folder of cuda_fp16.h: the toolkit's, as nvcc names it, or that of Triton's wheel."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    folders = []
    if nvcc is not None:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        listing = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        folders += re.findall(r'-I"?([^"\s]+)"?', listing)
        folders += [f"{top}/include" for top in re.findall(r"^#\$ TOP=(.+)$", listing, re.M)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "include"))
    return next((Path(f) for f in folders if (Path(f) / "cuda_fp16.h").exists()), None)


def why_not() -> str | None:
    """What is missing to build here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if cuda_includes() is None:
        return "CUDA's headers are not found (no nvcc on PATH, no Triton wheel)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


class Fault(NamedTuple):
    """A change in a header of csrc: `right`, which it has once, becomes `wrong`."""

    name: str
    header: str
    right: str
    wrong: str

    def write(self, folder: Path) -> None:
        text = (ROOT / "csrc" / self.header).read_text()
        assert text.count(self.right) == 1, f"{self.header} has no longer: {self.right}"
        target = folder / self.header
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace(self.right, self.wrong))


def build(name: str, *, sanitize: bool = False, planted: Fault | None = None) -> Path:
    """The library of `name`: compiled unless one of the same sources is there."""
    import pybind11

    source = next(p for p in (HERE / f"bind_{name}.cpp", HERE / f"{name}.cpp") if p.exists())
    includes = cuda_includes()
    assert includes is not None, why_not()
    flags = [*FLAGS, *(SANITIZER_FLAGS if sanitize else ())]
    if re.search(r"^flags\b.*\bfma\b", Path("/proc/cpuinfo").read_text(), re.M):
        flags += ["-mfma", "-ffp-contract=fast"]  # multiply and add with one rounding, as nvcc does
    flags += ["-I", str(ROOT / "csrc"), "-I", str(HERE), "-isystem", str(includes)]
    flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    digest = hashlib.sha256(" ".join(flags).encode() + repr(planted).encode())
    read = {source, *HERE.glob("*.h"), *ROOT.glob("csrc/common/*")}
    read |= {p for p in ROOT.glob("csrc/*/*") if p.suffix in (".cuh", ".h", ".cu")}
    for path in sorted(read):
        digest.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-sanitized" if sanitize else ""
    if planted is not None:
        kind += f"-{planted.name}"
        flags = ["-I", str(folder / f"{name}{kind}"), *flags, "-O0"]  # before csrc; soon compiled
    # A stem for each kind and content; the module inside has the name alone.
    target = folder / f"{name}{kind}-{digest.hexdigest()[:16]}.so"
    with open(folder / f".{name}{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in folder.glob(f"{name}{kind}-????????????????.so"):
                old.unlink()
            if planted is not None:
                planted.write(folder / f"{name}{kind}")
            partial = target.with_suffix(".partial")
            subprocess.run(["g++", *flags, "-o", str(partial), str(source)], check=True)
            partial.rename(target)
    return target


def sanitizer_runtimes() -> str:
    """LD_PRELOAD for a Python that loads a sanitized library."""
    return " ".join(
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )


def load(name: str, *, sanitize: bool = False, planted: Fault | None = None) -> ModuleType:
    path = build(name, sanitize=sanitize, planted=planted)
    # pybind11 knows modules by their full names, and has each once.
    full_name = name if planted is None else f"{planted.name}.{name}"
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--sanitize", action="store_true")
    arguments = parser.parse_args()
    print(build(arguments.name, sanitize=arguments.sanitize))
