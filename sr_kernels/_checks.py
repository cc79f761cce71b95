"""Argument checks of the public functions. Every message names the argument, what it was and what
is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sr_kernels.ops._registration import memory_format_of

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def tensor(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def feature_map(value: Any, name: str) -> torch.Tensor:
    """A floating-point (N, C, H, W) tensor with at least one channel."""
    tensor(value, name)
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {_shape(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got shape {_shape(value)}")
    return value


def like(value: torch.Tensor, reference: torch.Tensor, name: str, reference_name: str) -> None:
    """Same device, and same dtype unless autocast is about to make them the same."""
    if value.device != reference.device:
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), "
            f"got {value.device}"
        )
    if value.dtype != reference.dtype and not torch.is_autocast_enabled(reference.device.type):
        raise TypeError(
            f"{name} must have the dtype of {reference_name} ({reference.dtype}), got {value.dtype}"
        )


def shaped(
    value: Any, shape: Sequence[int | None], name: str, reference: torch.Tensor, why: str = ""
) -> torch.Tensor:
    """A tensor of this shape (None: any positive size) with the device and dtype of x."""
    tensor(value, name)
    matches = value.dim() == len(shape) and all(
        size == wanted if wanted is not None else size > 0
        for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not matches:
        text = ", ".join("*" if size is None else str(size) for size in shape)
        text += "," if len(shape) == 1 else ""
        raise ValueError(f"{name} must have shape ({text}){why}, got {_shape(value)}")
    like(value, reference, name, "x")
    return value


def optional(
    value: Any, shape: Sequence[int | None], name: str, reference: torch.Tensor
) -> torch.Tensor | None:
    return None if value is None else shaped(value, shape, name, reference)


def conv1x1_weight(
    value: Any, c_in: int | None, name: str, reference: torch.Tensor, c_out: int | None = None
) -> torch.Tensor:
    return shaped(value, (c_out, c_in, 1, 1), name, reference, " (out channels, in channels, 1, 1)")


def one_of(value: Any, accepted: Sequence[Any], name: str) -> None:
    if value not in accepted:
        options = ", ".join(repr(option) for option in accepted)
        raise ValueError(f"{name} must be one of {options}; got {value!r}")


def integer(value: Any, name: str, minimum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value  # type: ignore[return-value]


def integer_pair(value: Any, name: str, minimum: int | None = None) -> tuple[int, int]:
    """An integer for both axes, or (height, width)."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or (height, width), got {value!r}")
        return integer(value[0], name, minimum), integer(value[1], name, minimum)
    both = integer(value, name, minimum)
    return both, both


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return value


def divisible(x: torch.Tensor, window: tuple[int, int], name: str) -> None:
    height, width = x.shape[-2:]
    if height % window[0] != 0 or width % window[1] != 0:
        raise ValueError(
            f"{name} {window[0]}x{window[1]} does not divide the image: H x W is "
            f"{height}x{width}; pad the input to multiples of the window first"
        )


def writes_in_place(x: torch.Tensor) -> bool:
    """Whether inference on x is to write into given memory: not on a GPU, whose allocator keeps
    what is freed; not under autocast, whose operators choose their dtype; not in a graph, which is
    best without writes."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def output(out: torch.Tensor, x: torch.Tensor, channels: int, name: str = "out") -> None:
    """What an operator may write its result into, instead of into a new tensor."""
    feature_map(out, name)
    like(out, x, name, "x")
    n, _, h, w = x.shape
    if out.shape != (n, channels, h, w):
        raise ValueError(f"{name} must have shape {(n, channels, h, w)}, got {_shape(out)}")
    if not out.is_contiguous(memory_format=memory_format_of(out)):
        raise ValueError(f"{name} must be contiguous or channels_last, got strides {out.stride()}")
    if torch.compiler.is_compiling() or not x.numel():
        return
    if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise ValueError(f"{name} must not share its memory with x, which is read meanwhile")
