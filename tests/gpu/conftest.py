"""Where the GPU tests run."""

from __future__ import annotations

import pytest
from precision import exact_float32

__all__ = ["exact_float32"]

DEVICE = BACKEND = "cuda"


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def backend() -> str:
    return BACKEND
