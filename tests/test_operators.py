"""The schema, and who implements it: the CPU and CUDA, every operator of it."""

import re
from pathlib import Path

import pytest
import torch

from sr_kernels import _library
from sr_kernels.ops._registration import DECLARED

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = {"CPU": "ops_cpu.cpp", "CUDA": "ops_cuda.cpp"}


def schema():
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text()))


def implemented(device):
    """What the sources register for a device: a family's operators.h has one class template, whose
    implement() the device's file calls inside its registration."""
    found = set()
    for source in sorted(CSRC.glob(f"*/{SOURCES[device]}")):
        call = re.search(
            rf"STABLE_TORCH_LIBRARY_IMPL\(sr_kernels, {device}, m\) {{\s*"
            rf"sr_kernels::(\w+)<sr_kernels::{device}>::implement\(m\);\s*}}",
            source.read_text(),
            re.IGNORECASE,
        )
        assert call, source
        family = (source.parent / "operators.h").read_text()
        assert f"struct {call[1]} {{" in family, source
        names = re.findall(r'm\.impl\(\s*"(\w+)"', family)
        assert names, source
        found |= set(names)
    return found


def test_the_sources_implement_every_operator_on_both_devices():
    assert schema() == set(DECLARED)
    for device in SOURCES:
        assert implemented(device) == schema(), device


@pytest.mark.parametrize(
    ("library", "device"),
    [("CPU_LIBRARY", "CPU"), pytest.param("CUDA_LIBRARY", "CUDA", marks=pytest.mark.gpu)],
)
def test_the_libraries_implement_every_operator(library, device):
    assert getattr(_library, library).loaded
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [n for n in sorted(schema()) if not has(f"sr_kernels::{n}", device)] == []
