"""Hand-written kernels for lightweight image super-resolution, as ordinary PyTorch operators.

Shift convolution, windowed (grouped) self-attention with score reuse, attention gates, and the
3x3 convolution for inference. Functions in :mod:`sr_kernels.functional` (re-exported here),
modules in :mod:`sr_kernels.nn`, networks in :mod:`sr_kernels.models`.
"""

import sr_kernels.ops  # noqa: F401  (registers fake kernels, autograd and autocast)
from sr_kernels._version import __version__
from sr_kernels.backends import FallbackWarning, use_backend
from sr_kernels.export import export_onnx
from sr_kernels.functional import (
    WindowScores,
    apply_grouped_attention_block,
    apply_window_scores,
    channel_attention,
    channel_gate,
    conv3x3,
    gated_conv1x1,
    grouped_attention_block,
    grouped_window_attention,
    linear_attention_block,
    pixel_attention,
    pixel_spatial_attention,
    shift_conv2d,
    shift_conv_block,
    spatial_attention,
    window_attention,
)
from sr_kernels.patching import PatchError, PatchReport, patch, patched

__all__ = [
    "FallbackWarning",
    "PatchError",
    "PatchReport",
    "WindowScores",
    "__version__",
    "apply_grouped_attention_block",
    "apply_window_scores",
    "channel_attention",
    "channel_gate",
    "conv3x3",
    "export_onnx",
    "gated_conv1x1",
    "grouped_attention_block",
    "grouped_window_attention",
    "linear_attention_block",
    "patch",
    "patched",
    "pixel_attention",
    "pixel_spatial_attention",
    "shift_conv2d",
    "shift_conv_block",
    "spatial_attention",
    "use_backend",
    "window_attention",
]
