"""What the tests of the networks share."""

from __future__ import annotations

from pictures import data, set5

__all__ = ["data", "set5"]
