"""Runs the package's operators on the emulated CUDA kernels (tests/cuda_on_cpu).

    with emulated(kernels("shift_conv"), ["shift_conv2d", "shift_conv2d_backward"]):
        sr_kernels.shift_conv2d(x, weight, backend="cpu")

While the block lasts, the operators' CPU implementations are these: everything above them (checks,
autograd, autocast) is the package's own. `all_emulated(kernels)` is that for every operator; the
fixtures `build` and `kernels` are for the conftest.py of a folder that needs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from from_file import load

TESTS = Path(__file__).resolve().parent.parent
# As ScalarKind in csrc/common/platform.h.
KINDS = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
# Who computes what: bind_<family>.cpp, forwards; these bring their backwards.
FAMILIES = {
    "shift_conv": ("shift_conv2d", "shift_conv_block"),
    "window_attention": (
        "window_attention",
        "apply_window_scores",
        "grouped_window_attention",
        "apply_grouped_window_scores",
    ),
    "attention_block": ("grouped_attention_block", "apply_grouped_attention_block"),
    "conv3x3": ("conv3x3",),
    "channel_moments": ("channel_moments",),
    "attention_gates": (
        "pixel_attention",
        "spatial_attention",
        "pixel_spatial_attention",
        "channel_gate",
        "channel_attention",
        "gated_conv1x1",
    ),
}


def load_build() -> ModuleType:
    return load(TESTS / "cuda_on_cpu" / "build.py", "cuda_on_cpu_build")


@cache
def load_kernels(name: str) -> ModuleType:
    sanitize = os.environ.get("SR_KERNELS_CUDA_ON_CPU_SANITIZE") == "1"
    module = load_build().load(name, sanitize=sanitize)
    assert isinstance(module, ModuleType)
    return module


@pytest.fixture(scope="session", name="build")
def build_fixture() -> ModuleType:
    """build.py; skips, with the reason, where it cannot build."""
    module = load_build()
    missing = module.why_not()
    if missing is not None:
        pytest.skip(missing)
    return module


@pytest.fixture(scope="session", name="kernels")
def kernels_fixture(build: ModuleType) -> Callable[[str], ModuleType]:
    """`kernels(name)` is bind_<name>.cpp as a module."""
    return load_kernels


def as_array(value: Any) -> Any:
    """A tensor as the numpy array of the same memory; what is no tensor, as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.view(torch.uint16) if value.element_size() == 2 else value).numpy()


def as_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def implementation(kernels: ModuleType, name: str, started: list[str]) -> Callable[..., Any]:
    """`name` as its schema has it, computed by kernels.<name>(kind, arguments, outputs); noted in
    `started`.

    Outputs are allocated as the operator's fake kernel says; what is empty is passed as None, and
    the `need_*` flags, which that expresses, are left out.
    """
    operator = getattr(torch.ops.sr_kernels, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def run(*arguments: Any) -> Any:
        started.append(name)
        shapes = operator(*map(as_meta, arguments))
        single = isinstance(shapes, torch.Tensor)
        outputs = [
            torch.empty_strided(s.shape, s.stride(), dtype=s.dtype)
            for s in ([shapes] if single else shapes)
        ]
        dtypes = [a.dtype for a in arguments if isinstance(a, torch.Tensor)]
        kind = next(KINDS[dtype] for dtype in dtypes if dtype in KINDS)  # float64: statistics
        passed = [as_array(a) for a, n in zip(arguments, names, strict=True) if n[:5] != "need_"]
        results = [as_array(out) if out.numel() > 0 else None for out in outputs]
        getattr(kernels, name)(kind, *passed, *results)
        return outputs[0] if single else tuple(outputs)

    return run


def run_sanitized(build: ModuleType, name: str, file: str, *select: str) -> None:
    """Runs tests of `file` with the kernels under the sanitizers: those that have all the words of
    one of `select` in their names. None of these may be without a test that passes."""
    if "SR_KERNELS_CUDA_ON_CPU_SANITIZE" in os.environ:
        pytest.skip("is what it runs")
    build.build(name, sanitize=True)  # a compiler under the sanitizer would take minutes
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rp", "-p", "no:cacheprovider"]
    expression = " or ".join(f"({' and '.join(words.split())})" for words in select)
    result = subprocess.run(
        [*command, file, "-k", expression],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={
            **os.environ,
            "LD_PRELOAD": build.sanitizer_runtimes(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "SR_KERNELS_CUDA_ON_CPU_SANITIZE": "1",
        },
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = re.findall(r"^PASSED .*?::(.+)$", result.stdout, re.M)
    for words in select:
        assert any(all(w in test for w in words.split()) for test in passed), f"no test: {words}"


@contextmanager
def emulated(kernels: ModuleType, names: Sequence[str]) -> Iterator[list[str]]:
    """Yields a list that grows by the name of each operator that runs."""
    library = torch.library.Library("sr_kernels", "IMPL")
    started: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant
        for name in names:
            run = implementation(kernels, name, started)
            library.impl(name, run, "CPU", allow_override=True)
    try:
        yield started
    finally:
        library._destroy()


@contextmanager
def all_emulated(kernels: Callable[[str], ModuleType]) -> Iterator[list[list[str]]]:
    """Every operator; yields each family's list."""
    with ExitStack() as stack:
        started = []
        for family, forwards in FAMILIES.items():
            module = kernels(family)
            names = [n for f in forwards for n in (f, f"{f}_backward") if hasattr(module, n)]
            assert set(forwards) <= set(names)
            started.append(stack.enter_context(emulated(module, names)))
        yield started
