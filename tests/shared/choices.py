"""What tests of every family go through."""

import torch

from sr_kernels import testing

LAYOUTS = testing.LAYOUTS
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = tuple(dtype for dtype in FLOATS if dtype != torch.float64)  # of the kernels for GPUs
ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "silu")
