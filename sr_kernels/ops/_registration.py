"""What every operator's registration shares: fake kernels, autograd glue and autocast.

The operators themselves (schema, CPU and CUDA kernels) are registered by the compiled library.
Here each gets

* a fake kernel: shapes, dtypes and memory formats without data, for ``torch.compile``,
  ``torch.export`` and ``opcheck``;
* autograd: forward saves its inputs, backward calls the ``*_backward`` operator with one flag per
  input that wants a gradient; a second differentiation raises an error that says what to do;
* autocast: under ``torch.autocast`` all floating-point tensors of a call are cast to autocast's
  dtype, as for ``torch.nn.functional.conv2d``. float64 tensors are left alone, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Keeps the registrations alive as long as the process.
_fragment = torch.library.Library("sr_kernels", "FRAGMENT")


def operator(name: str) -> Any:
    """``torch.ops.sr_kernels.<name>``."""
    return getattr(torch.ops.sr_kernels, name)


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last if the strides ascend in the order C, W, H, N, else contiguous.

    Torch's own rule (suggest_memory_format); csrc/torch_adapter.h has the same in C++.
    """
    sizes, strides = x.shape, x.stride()
    least: int | torch.SymInt = 0
    if strides[1] == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return torch.contiguous_format
        if d == 0 and least == strides[1]:
            return torch.contiguous_format
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return torch.channels_last


def empty_feature_map(like: torch.Tensor, channels: int | torch.SymInt) -> torch.Tensor:
    """An uninitialised (N, channels, H, W) tensor in the memory format of ``like``."""
    n, _, h, w = like.shape
    return torch.empty(
        (n, channels, h, w),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format_of(like),
    )


def empty_gradient(of: torch.Tensor, needed: bool, like: torch.Tensor) -> torch.Tensor:
    """What a ``*_backward`` operator returns for ``of``: dense if a weight, shape (0,) if unwanted.

    ``like`` is the feature map whose memory format the gradient of a feature map follows.
    """
    if not needed:
        return like.new_empty(0)
    if of is like:
        return empty_feature_map(like, like.shape[1])
    return like.new_empty(of.shape)


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gradient_or_none(gradient: torch.Tensor, needed: bool) -> torch.Tensor | None:
    return gradient if needed else None


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake kernel of ``sr_kernels::name``."""
    return torch.library.register_fake(f"sr_kernels::{name}")


def register_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Autograd of ``sr_kernels::name``: backward calls its ``*_backward`` operator."""
    torch.library.register_autograd(f"sr_kernels::{name}", backward, setup_context=setup_context)


def register_no_double_backward(name: str) -> None:
    """Makes differentiating a ``*_backward`` operator an error that says what to do."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"sr_kernels::{name} has no derivative of its own: second derivatives need the "
            'plain PyTorch definition. Run the forward with backend="reference" (or inside '
            'sr_kernels.use_backend("reference")).'
        )

    torch.library.register_autograd(f"sr_kernels::{name}", raise_error)


def register_no_gradient(name: str, instead: str) -> None:
    """Makes differentiating ``sr_kernels::name``, an operator for inference, an error that says
    what to train with instead."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"sr_kernels::{name} is for inference and has no gradient: train with {instead}, or "
            'with backend="reference"'
        )

    torch.library.register_autograd(f"sr_kernels::{name}", raise_error)


def register_autocast(name: str, keep: tuple[int, ...] = ()) -> None:
    """Casts the tensors of ``sr_kernels::name`` to autocast's dtype, on CPU and CUDA.

    keep: positions of arguments that stay as they are (statistics such as log-sum-exp).
    """
    overload = operator(name).default

    def register(device: str, key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)

            def cast(position: int, argument: Any) -> Any:
                eligible = (
                    position not in keep
                    and isinstance(argument, torch.Tensor)
                    and argument.is_floating_point()
                    and argument.dtype != torch.float64
                    and argument.device.type == device
                )
                return argument.to(dtype) if eligible else argument

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*[cast(i, argument) for i, argument in enumerate(args)])

        _fragment.impl(name, cast_and_call, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")
