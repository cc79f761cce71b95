"""Tests of the Triton kernels: in Triton's interpreter, in a process of their own, since the
variable must be set before anything imports triton (`tests/test_triton.py` starts it); or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/triton_operators
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from emulated import build_fixture, kernels_fixture
from precision import exact_float32

__all__ = ["build_fixture", "exact_float32", "kernels_fixture"]

if os.environ.get("TRITON_INTERPRET") != "1":
    if not torch.cuda.is_available():
        collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    torch.set_num_threads(1)

    _patched: set[tuple[int, ...]] = set()
    _start = interpreter.GridExecutor.__call__

    def _start_grid(self: Any, *arguments: Any, **options: Any) -> None:
        _patched.clear()
        _start(self, *arguments, **options)

    def _call_device_function(self: Any, *arguments: Any, **options: Any) -> Any:
        """The interpreter patches triton.language anew at every call of a device function; once a
        launch is enough, and takes half the time."""
        key = _modules_of(self.fn)
        if key not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(key)
        return self.rewrite()(*arguments, **options)

    @functools.cache
    def _modules_of(function: Any) -> tuple[str, ...]:
        known = [interpreter.tl, interpreter.tl.core]
        values = function.__globals__.values()
        return tuple(sorted({m.__name__ for m in known if any(v is m for v in values)}))

    interpreter.GridExecutor.__call__ = _start_grid
    interpreter.InterpretedFunction.__call__ = _call_device_function
