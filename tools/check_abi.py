"""Loads both libraries of the installed package under the torch that is there; runs one operator.

Run by `make test-abi`, outside the source tree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import sr_kernels


def main() -> int:
    package = Path(sr_kernels.__file__).parent
    if (package.parent / "csrc").exists():
        print(f"{package} is the source tree, not an installed package", file=sys.stderr)
        return 1
    built = json.loads((package / "_build.json").read_text())
    print(f"built with torch {built['torch']}, running with torch {torch.__version__}")
    for name in ("_C", "_C_cuda"):
        library = package / f"{name}.abi3.so"
        if name == "_C_cuda" and not built["cuda"]["built"]:
            print(f"{name}: not built: {built['cuda']['reason']}", file=sys.stderr)
            return 1
        torch.ops.load_library(str(library))
        print(f"{name}: loaded")
    x = torch.randn(1, 10, 6, 5)
    weight = torch.randn(10, 10, 1, 1)
    ours = sr_kernels.shift_conv2d(x, weight, backend="cpu")
    theirs = sr_kernels.reference.shift_conv2d(x, weight)
    torch.testing.assert_close(ours, theirs)
    print("shift_conv2d: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
