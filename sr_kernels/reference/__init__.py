"""Every operator in plain PyTorch: its definition, the oracle of the tests, the last fallback.

The functions have the names and arguments of :mod:`sr_kernels.functional` without ``backend``.
They run for any floating dtype on any device, are differentiable any number of times, and are
written to be read, not to be fast.
"""

from .attention_block import apply_grouped_attention_block, grouped_attention_block
from .attention_gates import (
    channel_attention,
    channel_gate,
    gated_conv1x1,
    pixel_attention,
    pixel_spatial_attention,
    spatial_attention,
)
from .conv3x3 import conv3x3
from .linear_attention import linear_attention_block
from .shift_conv import shift, shift_conv2d, shift_conv_block
from .window_attention import (
    apply_window_scores,
    grouped_window_attention,
    window_attention,
)

__all__ = [
    "apply_grouped_attention_block",
    "apply_window_scores",
    "channel_attention",
    "channel_gate",
    "conv3x3",
    "gated_conv1x1",
    "grouped_attention_block",
    "grouped_window_attention",
    "linear_attention_block",
    "pixel_attention",
    "pixel_spatial_attention",
    "shift",
    "shift_conv2d",
    "shift_conv_block",
    "spatial_attention",
    "window_attention",
]
