"""Loads the compiled libraries and remembers, with its true cause, why one is absent.

``_C`` holds every operator's schema and the CPU kernels, ``_C_cuda`` the CUDA kernels. Neither is
a Python module: both register their operators with torch when they are loaded, so that one build
serves every Python and every torch from 2.10 on.
"""

from __future__ import annotations

import ctypes
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
