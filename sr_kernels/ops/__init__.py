"""Fake kernels, autograd and autocast of the compiled operators ``torch.ops.sr_kernels.*``.

Importing this package registers them; it does nothing where ``_C`` is not loaded.
"""

from sr_kernels import _library

if _library.CPU_LIBRARY.loaded:
    from sr_kernels.ops import (
        attention_block,
        attention_gates,
        conv3x3,
        shift_conv,
        window_attention,
    )

    __all__ = ["attention_block", "attention_gates", "conv3x3", "shift_conv", "window_attention"]
