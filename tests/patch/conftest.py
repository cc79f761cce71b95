"""`third_party` is importable by name, as other people's code is: pickles need that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from sr_kernels.models.evaluate import Pair, read_pairs

from sr_kernels.patching import recogniser

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of test data: $SR_KERNELS_TEST_DATA, or ../shared/data beside the repository."""
    default = HERE.parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SR_KERNELS_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is absent, and SR_KERNELS_TEST_DATA names no other")
    return folder


@pytest.fixture(scope="session")
def set5(data: Path) -> dict[str, Pair]:
    """Set5 at x4: name -> (LR, HR), 8-bit RGB."""
    return dict(read_pairs(data / "Set5" / "HR", data / "Set5" / "LR_bicubic" / "X4", 4))


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls, which a patched network leaves to stock, run on the operators."""
    monkeypatch.setattr(recogniser, "sizes_matter", lambda: False)
