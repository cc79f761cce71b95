"""Loads the compiled libraries, and Triton's kernels, and remembers the true cause of an absence.

``_C`` holds every operator's schema and the CPU kernels, ``_C_cuda`` the CUDA kernels. Neither is
a Python module: both register their operators with torch when they are loaded, so that one build
serves every Python and every torch from 2.10 on. Triton is imported when it is first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class LoadResult:
    """What became of one compiled library.

    Attributes:
        name: ``"_C"`` or ``"_C_cuda"``.
        path: where the file is, or None if it was not built.
        error: None if it is loaded; otherwise a sentence that says why not.
    """

    name: str
    path: Path | None
    error: str | None

    @property
    def loaded(self) -> bool:
        return self.error is None


def _load(name: str) -> LoadResult:
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        return LoadResult(name, None, f"{path.name} was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch wraps the loader's own message, which names the missing symbol or library.
        return LoadResult(name, path, f"{path.name} does not load: {error.__cause__ or error}")
    return LoadResult(name, path, None)


CPU_LIBRARY = _load("_C")
CUDA_LIBRARY = (
    _load("_C_cuda")
    if CPU_LIBRARY.loaded
    else LoadResult("_C_cuda", None, "not tried: it needs _C, which is not loaded")
)


@functools.cache
def why_no_image(device: int | None) -> str:
    """Why ``_C_cuda`` has no code for this GPU (None: the current one), or nothing."""
    path = Path(__file__).with_name("_build.json")
    built = json.loads(path.read_text())["cuda"]["archs"] if path.exists() else ""
    if not built or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    for arch in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built):
        found, kind, ptx = (int(arch[0]), int(arch[1])), arch[2], bool(arch[3])
        if (major, minor) == found:
            return ""
        newer = (major, minor) > found
        if newer and ((kind != "a" and major == found[0]) or (kind == "" and ptx)):
            return ""
    return (
        f"_C_cuda was built for compute capability {built}, the GPU has {major}.{minor} "
        "(SR_KERNELS_CUDA_ARCHS names others when it is built)"
    )


_CPU_ISAS = ("portable", "avx2", "avx512")


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels that run here: portable, avx2 or avx512.

    None if ``_C`` is not loaded.

    Raises:
        RuntimeError: ``SR_KERNELS_CPU_ISA`` asks for one that this machine or build lacks.
    """
    if not CPU_LIBRARY.loaded:
        return None
    index = ctypes.CDLL(str(CPU_LIBRARY.path)).sr_kernels_cpu_isa()
    if index < 0:
        raise RuntimeError(
            "SR_KERNELS_CPU_ISA must be portable, avx2 or avx512, and one that this build and "
            "this processor have"
        )
    return _CPU_ISAS[index]


OLDEST_TRITON = (3, 4)


@dataclass(frozen=True)
class TritonResult:
    """What became of Triton's kernels.

    Attributes:
        version: of the installed Triton, or None.
        error: None if the kernels are loaded; otherwise a sentence that says why not.
        interpreted: whether they run in Triton's interpreter, which takes CPU tensors.
    """

    version: str | None
    error: str | None
    interpreted: bool = False

    @property
    def loaded(self) -> bool:
        return self.error is None


@functools.cache
def triton() -> TritonResult:
    """Imports Triton and `sr_kernels.triton` on the first call."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            version = importlib.import_module("triton").__version__
        except ImportError:
            return TritonResult(None, "triton is not installed")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))  # "3.4rc1" is 3.4
    if numbers < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return TritonResult(version, f"triton {version} is older than {oldest}")
    try:
        kernels = importlib.import_module("sr_kernels.triton")
    except Exception as error:
        return TritonResult(version, f"the Triton kernels do not load: {error}")
    return TritonResult(version, None, kernels.INTERPRET)


@functools.cache
def why_no_launch() -> str:
    """Why Triton cannot start a kernel on a GPU, or nothing.

    It compiles a small module in C for that, with the compiler that CC names, or gcc or clang.
    """
    if (knobs := sys.modules.get("triton.knobs")) is not None and knobs.build.impl is not None:
        return ""  # the user's own way to compile it
    named = os.environ.get("CC")
    names = ("gcc", "clang") if named is None else (named,)
    if any(shutil.which(name) for name in names):
        return ""
    found = "neither gcc nor clang is on PATH" if named is None else f"CC={named} is not there"
    return f"Triton needs a C compiler (CC, gcc or clang) at the first launch, and {found}"
