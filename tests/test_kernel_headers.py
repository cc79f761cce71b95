"""The head of a CUDA kernel's file says what it computes and what that must cost."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
KERNEL = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\(")
FILES = [p for p in sorted(CSRC.rglob("*.cu*")) if "__global__" in p.read_text()]
# In this order; the formula is a line of its own.
DEMANDED = {
    "its formula": r"^//   .*=",
    "its tile": r"\bTile: ",
    "its floor": r"\bFloor\b",
    "bytes": r"\bbytes\b",
    "FLOP": r"\bFLOP\b",
    "exponentials": r"\bexponentials?\b",
    "the measured fraction": r"Measured(?: |\n// )fraction:(?: |\n// )\w",
}


def missing(text):
    """What the comment at the head of a file does not say; kernels that it does not name."""
    head = text.partition("#pragma once")[0]
    lacks = [kernel for kernel in KERNEL.findall(text) if kernel not in head]
    at = 0
    for what, pattern in DEMANDED.items():
        found = re.compile(pattern, re.MULTILINE).search(head, at)
        if found is None:
            lacks.append(what)
        elif what in ("its formula", "its tile", "its floor"):
            at = found.start()
    return lacks


def test_there_are_kernels():
    assert {path.parent.name for path in FILES} == {p.parent.name for p in CSRC.glob("*/launch.cu")}
    bare = "#pragma once\n__global__ void __launch_bounds__(256) some_kernel(int n) {}"
    assert missing(bare) == ["some_kernel", *DEMANDED]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_says_what_it_computes_and_costs(path):
    assert missing(path.read_text()) == []
