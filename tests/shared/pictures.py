"""Where the test images and the reference weights are: outside the repository, if anywhere. Two
fixtures for the conftest.py of a folder that needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sr_kernels.models.evaluate import Pair, read_pairs

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of test data: $SR_KERNELS_TEST_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("SR_KERNELS_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is absent, and SR_KERNELS_TEST_DATA names no other")
    return folder


@pytest.fixture(scope="session")
def set5(data: Path) -> dict[str, Pair]:
    """Set5 at x4: name -> (LR, HR), 8-bit RGB."""
    return dict(read_pairs(data / "Set5" / "HR", data / "Set5" / "LR_bicubic" / "X4", 4))
