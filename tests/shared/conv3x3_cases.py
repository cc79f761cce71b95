"""Inputs and check of the 3x3 convolution, for every device and backend."""

from __future__ import annotations

from typing import Any

import torch

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import Comparison, check_operator, make_tensor

Inputs = dict[str, "torch.Tensor | None"]


def conv_inputs(
    shape: tuple[int, ...],
    c_out: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: bool = True,
    skip: bool = True,
    device: str = "cpu",
) -> Inputs:
    n, c_in, h, w = shape

    def make(shape: tuple[int, ...], seed: int, **options: Any) -> torch.Tensor:
        return make_tensor(shape, dtype, seed=seed, device=device, **options)

    return {
        "x": make(shape, 0, layout=layout),
        "weight": make((c_out, c_in, 3, 3), 1, scale=(9 * c_in) ** -0.5),
        "bias": make((c_out,), 2) if bias else None,
        "skip": make((n, c_out, h, w), 3, layout=layout) if skip else None,
    }


def check_conv(
    inputs: Inputs, *, backend: str = "cpu", repeats: int = 0, **kwargs: Any
) -> list[Comparison]:
    x = inputs["x"]
    assert x is not None
    return check_operator(
        "conv3x3",
        sr_kernels.conv3x3,
        reference.conv3x3,
        inputs,
        kwargs=kwargs,
        backend=backend,
        gradients=None,
        repeats=repeats,
        # Stock's error in float64 is scaled from float32, and may be luck.
        atol=1e-13 if x.dtype == torch.float64 else 0.0,
    )
