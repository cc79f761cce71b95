"""Where the GPU tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DEVICE = BACKEND = "cuda"


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def backend() -> str:
    return BACKEND


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Stock is the measure: its float32 must not be TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
