"""The CUDA kernels' libraries for the CPU, built once for all tests."""

from __future__ import annotations

from emulated import build_fixture, kernels_fixture

__all__ = ["build_fixture", "kernels_fixture"]
