"""What every operator's registration shares: fake kernels, autograd glue and autocast.

The operators themselves are defined elsewhere: ``sr_kernels::*`` by the compiled library,
``sr_kernels_triton::*`` by `sr_kernels.triton`. What both need is declared once, in the modules
beside this one, and given to a namespace by `register_all`. Each operator gets

* a fake kernel: shapes, dtypes and memory formats without data, for ``torch.compile``,
  ``torch.export`` and ``opcheck``;
* autograd: forward saves its inputs, backward calls the ``*_backward`` operator with one flag per
  input that wants a gradient; a second differentiation raises an error that says what to do;
* autocast: under ``torch.autocast`` all floating-point tensors of a call are cast to autocast's
  dtype, as for ``torch.nn.functional.conv2d``. float64 tensors are left alone, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Declaration:
    """What one operator gets in every namespace that has it.

    not_in_triton: only the compiled library has it (operators that write into the caller's memory).
    """

    fake: Callable[..., Any]
    not_in_triton: bool = False
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    autocast: bool = False
    keep: tuple[int, ...] = ()


# By the operator's name. Filled by the decorator and functions below.
DECLARED: dict[str, Declaration] = {}
# Keeps autocast's registrations alive as long as the process.
_fragments: list[torch.library.Library] = []


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last if the strides ascend in the order C, W, H, N, else contiguous.

    Torch's own rule (suggest_memory_format); csrc/torch_adapter.h has the same in C++.
    """
    sizes, strides = x.shape, x.stride()
    least: int | torch.SymInt = 0
    if x.dim() != 4 or strides[1] == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return torch.contiguous_format
        if d == 0 and least == strides[1]:
            return torch.contiguous_format
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return torch.channels_last


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x is dense in that format, and not contiguous as well, as with a single channel."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


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


def declare_fake(
    name: str, *, not_in_triton: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake kernel of operator ``name``; its signature is the operator's."""

    def declare(fake: Callable[..., Any]) -> Callable[..., Any]:
        DECLARED[name] = Declaration(fake, not_in_triton)
        return fake

    return declare


def declare_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Autograd of operator ``name``. Backward calls operators of the forward's own namespace: it
    finds them in ``ctx.operators``."""
    DECLARED[name].setup_context = setup_context
    DECLARED[name].backward = backward


def declare_no_double_backward(name: str) -> None:
    """Makes differentiating a ``*_backward`` operator an error that says what to do."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"sr_kernels::{name} has no derivative of its own: second derivatives need the "
            'plain PyTorch definition. Run the forward with backend="reference" (or inside '
            'sr_kernels.use_backend("reference")).'
        )

    DECLARED[name].backward = raise_error


def declare_no_gradient(name: str, instead: str) -> None:
    """Makes differentiating operator ``name``, which is for inference, an error that says what to
    train with instead."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"sr_kernels::{name} is for inference and has no gradient: train with {instead}, or "
            'with backend="reference"'
        )

    DECLARED[name].backward = raise_error


def declare_autocast(name: str, keep: tuple[int, ...] = ()) -> None:
    """Casts the tensors of operator ``name`` to autocast's dtype, on CPU and CUDA.

    keep: positions of arguments that stay as they are (statistics such as log-sum-exp).
    """
    DECLARED[name].autocast = True
    DECLARED[name].keep = keep


def register_all(namespace: str) -> None:
    """Gives every operator of ``torch.ops.<namespace>`` what was declared for it."""
    operators = getattr(torch.ops, namespace)
    fragment = torch.library.Library(namespace, "FRAGMENT")
    _fragments.append(fragment)
    for name, declared in DECLARED.items():
        if declared.not_in_triton and namespace != "sr_kernels":
            continue
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, declared.fake)
        if declared.backward is not None:
            torch.library.register_autograd(
                qualified,
                declared.backward,
                setup_context=_in_namespace(operators, declared.setup_context),
            )
        if declared.autocast:
            overload = getattr(operators, name).default
            for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
                fragment.impl(name, _casting(overload, device, key, declared.keep), key)


def _in_namespace(
    operators: Any, setup_context: Callable[..., None] | None
) -> Callable[..., None] | None:
    if setup_context is None:
        return None

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operators = operators
        setup_context(ctx, inputs, output)

    return setup


def _casting(overload: Any, device: str, key: str, keep: tuple[int, ...]) -> Callable[..., Any]:
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

    return cast_and_call
