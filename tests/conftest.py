"""What every test gets: fixed seeds, poisoned `torch.empty`, and markers that know the machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Test processes that run side by side share the cores: threads that wait for one another while a
# core is another's take a hundred times as long. Read by OpenMP when torch is imported, here and in
# the processes that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# A shell starts what it runs in the background with SIGINT ignored, and programs hand that on: what
# a test interrupts would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

import sr_kernels
from sr_kernels.testing import poisoned_empty


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: runs with an ordinary torch.empty")
    # A sanitizer run that quietly tested an ordinary build would prove nothing.
    expected = os.environ.get("SR_KERNELS_EXPECT_SANITIZERS")
    if expected:
        built = json.loads(Path(sr_kernels.__file__).with_name("_build.json").read_text())
        if built["sanitizers"] != expected:
            raise pytest.UsageError(
                f"{sr_kernels.__file__} was built with sanitizers {built['sanitizers']!r}, "
                f"but {expected!r} is to be tested"
            )


def pytest_make_parametrize_id(val: object) -> str | None:
    """float16, where pytest would say dtype1: `-k float16` then finds what it names."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    no_large = pytest.mark.skip(reason="needs much memory: set SR_KERNELS_TEST_LARGE=1")
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        if "large" in item.keywords and os.environ.get("SR_KERNELS_TEST_LARGE") != "1":
            item.add_marker(no_large)


@pytest.fixture(autouse=True)
def seeded_and_poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """An output element that a kernel forgets is NaN in every test, not a plausible leftover."""
    torch.manual_seed(0)
    if "unpoisoned" in request.keywords:
        yield
        return
    with poisoned_empty():
        yield
