"""Fake kernels, autograd and autocast of the operators, declared once for every namespace.

Importing this package registers them for the compiled operators ``torch.ops.sr_kernels.*`` where
``_C`` is loaded; `sr_kernels.triton` registers them for ``torch.ops.sr_kernels_triton.*``.
"""

from sr_kernels import _library
from sr_kernels.ops import (
    attention_block,
    attention_gates,
    channel_moments,
    conv3x3,
    linear_attention,
    shift_conv,
    window_attention,
)
from sr_kernels.ops._registration import register_all

__all__ = [
    "attention_block",
    "attention_gates",
    "channel_moments",
    "conv3x3",
    "linear_attention",
    "shift_conv",
    "window_attention",
]

if _library.CPU_LIBRARY.loaded:
    register_all("sr_kernels")
