"""The CUDA kernels' libraries for the CPU, built once for all tests of this folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_on_cpu_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load_kernels(name: str) -> ModuleType:
    sanitize = os.environ.get("SR_KERNELS_CUDA_ON_CPU_SANITIZE") == "1"
    module = load_build().load(name, sanitize=sanitize)
    assert isinstance(module, ModuleType)
    return module


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """build.py; skips, with the reason, where it cannot build."""
    module = load_build()
    missing = module.why_not()
    if missing is not None:
        pytest.skip(missing)
    return module


@pytest.fixture(scope="session")
def kernels(build: ModuleType) -> Callable[[str], ModuleType]:
    """`kernels(name)` is bind_<name>.cpp as a module."""
    return load_kernels
