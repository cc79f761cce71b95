"""`third_party` is importable by name, as other people's code is: pickles need that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pictures import data, set5

from sr_kernels.patching import recogniser

__all__ = ["data", "set5"]

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls, which a patched network leaves to stock, run on the operators."""
    monkeypatch.setattr(recogniser, "sizes_matter", lambda: False)
