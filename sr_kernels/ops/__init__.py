"""Fake kernels, autograd and autocast of the compiled operators ``torch.ops.sr_kernels.*``.

Importing this package registers them; it does nothing where ``_C`` is not loaded.
"""

from importlib import import_module
from pathlib import Path

from sr_kernels import _library

if _library.CPU_LIBRARY.loaded:
    for _family in ("attention_gates", "shift_conv", "window_attention"):
        if Path(__file__).with_name(f"{_family}.py").exists():  # TEMPORARY while being written
            import_module(f"sr_kernels.ops.{_family}")
