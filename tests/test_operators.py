"""The schema, and who implements it: the CPU every operator of it, CUDA all but a few."""

import re
from pathlib import Path

import pytest
import torch

from sr_kernels import _library, backends
from sr_kernels.ops._registration import DECLARED

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = {"CPU": "ops_cpu.cpp", "CUDA": "ops_cuda.cpp"}


def schema():
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text()))


def expected_of(device):
    return schema() if device == "CPU" else schema() - backends._ONLY_ON_CPU


def implemented(device):
    """What the sources register for a device: a family's operators.h has one class template, whose
    implement() (and for_cpu's) the device's file calls inside its registration."""
    found = set()
    for source in sorted(CSRC.glob(f"*/{SOURCES[device]}")):
        call = re.search(
            rf"STABLE_TORCH_LIBRARY_IMPL\(sr_kernels, {device}, m\) {{\s*"
            rf"sr_kernels::(\w+)<sr_kernels::{device}>::implement\(m\);\s*"
            rf"(sr_kernels::\1<sr_kernels::{device}>::implement_for_cpu\(m\);\s*)?}}",
            source.read_text(),
            re.IGNORECASE,
        )
        assert call, source
        family = (source.parent / "operators.h").read_text()
        assert f"struct {call[1]} {{" in family, source
        everywhere, _, for_cpu = family.partition("implement_for_cpu(")
        for part in (everywhere, for_cpu if call[2] else ""):
            found |= set(re.findall(r'm\.impl\(\s*"(\w+)"', part))
        assert bool(call[2]) == (bool(for_cpu) and device == "CPU"), source
    return found


def test_the_sources_implement_every_operator():
    assert schema() == set(DECLARED)
    for device in SOURCES:
        assert implemented(device) == expected_of(device), device


@pytest.mark.parametrize(
    ("library", "device"),
    [("CPU_LIBRARY", "CPU"), pytest.param("CUDA_LIBRARY", "CUDA", marks=pytest.mark.gpu)],
)
def test_the_libraries_implement_every_operator(library, device):
    assert getattr(_library, library).loaded
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [n for n in sorted(expected_of(device)) if not has(f"sr_kernels::{n}", device)] == []
