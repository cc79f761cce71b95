"""Sizes, inputs and checks of the shift convolution, for every device and backend."""

from __future__ import annotations

from typing import Any

import torch

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import check_operator, make_tensor

# (N, C_in, C_out, H, W): the networks' channel counts, odd sizes, single rows and columns, batch 0.
SIZES = [
    (1, 60, 60, 12, 40),
    (2, 1, 3, 5, 7),
    (1, 3, 31, 1, 9),
    (2, 31, 5, 6, 1),
    (1, 48, 48, 3, 97),
    (1, 52, 26, 7, 5),
    (1, 64, 64, 4, 16),
    (1, 180, 60, 2, 3),
    (1, 4, 4, 1, 1),
    (0, 10, 5, 4, 4),
]
# (N, C, hidden, H, W)
BLOCK_SIZES = [
    (1, 60, 120, 9, 40),
    (2, 3, 5, 1, 7),
    (1, 31, 62, 6, 1),
    (1, 52, 52, 35, 3),
    (1, 5, 9, 2, 200),
]

Inputs = dict[str, "torch.Tensor | None"]


def conv_inputs(
    n: int,
    c_in: int,
    c_out: int,
    h: int,
    w: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    residual: bool = True,
    device: str = "cpu",
) -> Inputs:
    # Scaled so that pre-activations have unit size: an activation sees both of its sides.
    def make(shape: tuple[int, ...], seed: int, **options: Any) -> torch.Tensor:
        return make_tensor(shape, dtype, seed=seed, device=device, **options)

    return {
        "x": make((n, c_in, h, w), 0, layout=layout),
        "weight": make((c_out, c_in, 1, 1), 1, scale=c_in**-0.5),
        "bias": make((c_out,), 2),
        "residual": make((n, c_out, h, w), 3, layout=layout) if residual else None,
    }


def block_inputs(
    n: int,
    channels: int,
    hidden: int,
    h: int,
    w: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
) -> Inputs:
    def make(shape: tuple[int, ...], seed: int, **options: Any) -> torch.Tensor:
        return make_tensor(shape, dtype, seed=seed, device=device, **options)

    return {
        "x": make((n, channels, h, w), 0, layout=layout),
        "w0": make((hidden, channels, 1, 1), 1, scale=channels**-0.5),
        "b0": make((hidden,), 2),
        "w1": make((channels, hidden, 1, 1), 3, scale=hidden**-0.5),
        "b1": make((channels,), 4),
    }


def allow_roundings(inputs: Inputs, options: dict[str, Any]) -> None:
    """Where stock's error is a matter of luck, 0 included: in float64, and, for the check that says
    `few_pixels_slack=True`, in sums over some hundred numbers of size one."""
    x = inputs["x"]
    assert x is not None
    slack, pixels = options.pop("few_pixels_slack", False), x.numel() // x.shape[1]
    if x.dtype == torch.float64:
        options.setdefault("atol", 1e-14)
        options.setdefault("gradient_atol", 1e-13)
    elif slack and pixels < (512 if x.dtype == torch.float32 else 128):
        options.setdefault("gradient_atol", 2 * max(6, pixels) ** 0.5 * torch.finfo(x.dtype).eps)


def check_conv(inputs: Inputs, **options: Any) -> None:
    allow_roundings(inputs, options)
    kwargs = {k: options.pop(k) for k in ("activation", "pattern", "groups") if k in options}
    check_operator(
        "shift_conv2d",
        sr_kernels.shift_conv2d,
        reference.shift_conv2d,
        inputs,
        kwargs=kwargs,
        **options,
    )


def check_block(inputs: Inputs, **options: Any) -> None:
    allow_roundings(inputs, options)
    kwargs = {k: options.pop(k) for k in ("activation", "pattern", "residual") if k in options}
    check_operator(
        "shift_conv_block",
        sr_kernels.shift_conv_block,
        reference.shift_conv_block,
        inputs,
        kwargs=kwargs,
        **options,
    )
