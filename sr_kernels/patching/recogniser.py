"""What a recogniser is, the list of them, and what their forwards ask before they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import backends

from .swap import original_class, parts

__all__ = ["NotRecognised", "Recogniser", "by_name", "recognisers", "register"]


class NotRecognised(Exception):
    """A module resembles a family but is not of it; the message says why, for the report."""


class Recogniser:
    """One family of modules, and what replaces their forward.

    Derive from it, fill in the methods and :func:`register` an instance; docs/recognisers.md shows
    how. A recogniser keeps no state. Whatever it claims is verified: a module is replaced only
    if ``forward`` gives what the module's own forward gives, on ``examples``, with other weights,
    in float64, in eval and in training mode, gradients included.

    Attributes:
        name: unique; pickles of patched modules hold it.
        replacement: what the report prints.
        operators: names of the operators that ``forward`` calls.
        plain: of a layer that stock runs well too. One that is left alone is neither listed in the
            report's table nor minded by ``strict``.
        of_parts: of a container that is recognised by what its parts were replaced by. It is asked
            when all parts have been looked at, and is not tried out: they were. They stay replaced.
        least: numbers of values in the first argument, without gradients and with them, below which
            torch's own operators are faster (CPU, float32); such calls are left to the module.
    """

    name: str = ""
    replacement: str = ""
    operators: tuple[str, ...] = ()
    plain: bool = False
    of_parts: bool = False
    least: tuple[float, float] = (0, 0)

    def options(self, module: nn.Module) -> Iterable[Any]:
        """What ``module`` may be, most likely first; the first that passes the probe is taken.

        Each is hashable and can be pickled. Nothing (an empty list): not of this family. Judge by
        structure here: children, parameters, shapes. Must not call the module.

        Raises:
            NotRecognised: of the family by its looks, but something differs.
        """
        raise NotImplementedError

    def constants(self, module: nn.Module, options: Any) -> tuple[Tensor, ...]:
        """Tensors of the module whose values the options express, such as a frozen mask.

        The probe leaves them as they are, and a module in which they change is no longer replaced.
        """
        return ()

    def examples(self, module: nn.Module, options: Any) -> Sequence[tuple[Any, ...]]:
        """Arguments to compare on, float64 on the CPU; random ones from torch's own generator."""
        raise NotImplementedError

    def declines(self, module: nn.Module, options: Any, *args: Any) -> bool:
        """Whether a call is left to the module because stock is faster: asked first, since what
        is short feels every question. False: ask ``forward``."""
        return is_less(self.least, module, *args)

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        """What the module's own forward returns, or NotImplemented: this call is left to it.

        args: as the caller gave them; keyword arguments in their places.
        """
        raise NotImplementedError


_RECOGNISERS: dict[str, Recogniser] = {}


def register(recogniser: Recogniser) -> Recogniser:
    """Adds a recogniser, in front of those that are there; one of the same name is replaced.

    Raises:
        TypeError: not an instance of :class:`Recogniser`.
        ValueError: without a name or a replacement.
    """
    if not isinstance(recogniser, Recogniser):
        raise TypeError(
            f"recogniser must be an instance of a class derived from Recogniser, got {recogniser!r}"
        )
    if not recogniser.name or not recogniser.replacement:
        raise ValueError(
            f"recogniser must have a name and a replacement, got name={recogniser.name!r}, "
            f"replacement={recogniser.replacement!r}"
        )
    _RECOGNISERS[recogniser.name] = recogniser
    return recogniser


def recognisers() -> list[Recogniser]:
    """All of them, in the order in which they are asked: the last registered first."""
    return list(_RECOGNISERS.values())[::-1]


def by_name(name: str) -> Recogniser:
    """The recogniser of this name.

    Raises:
        LookupError: there is none; a pickle asks for a recogniser that was not registered here.
    """
    if name not in _RECOGNISERS:
        raise LookupError(
            f"no recogniser {name!r} is registered; register it before unpickling a module that it "
            f"patched (known: {', '.join(_RECOGNISERS)})"
        )
    return _RECOGNISERS[name]


# ------------------------------------------------------------------------------------- structure


def calls(child: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``child`` is ``kind.forward`` and nothing else: a ``kind``, or a subclass
    that does not override it."""
    return isinstance(child, kind) and original_class(child).forward is kind.forward


def state_names(module: nn.Module) -> set[str]:
    """Names of the parameters, buffers and children of ``module`` itself, without empty ones."""
    groups = (module._parameters, module._buffers, module._modules)
    return {name for group in groups for name, value in group.items() if value is not None}


def child_names(module: nn.Module) -> list[str]:
    """Names of the children, in order."""
    return [name for name, child in module._modules.items() if child is not None]


def owns_tensors(module: nn.Module) -> bool:
    """Whether ``module`` itself, not its children, has parameters or buffers."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in tensors)


def part_at(module: nn.Module, path: tuple[str, ...]) -> Any:
    """The module that these names lead to."""
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def is_conv(child: Any, kernel: int, *, padding: int | None = None, groups: int = 1) -> bool:
    """Whether ``child`` is a plain Conv2d, kernel x kernel, stride 1, zero padding that keeps the
    size (or ``padding``)."""
    if not calls(child, nn.Conv2d):
        return False
    kind: Any = original_class(child)
    if kind._conv_forward is not nn.Conv2d._conv_forward:
        return False
    wanted = kernel // 2 if padding is None else padding
    return bool(
        child.kernel_size == (kernel, kernel)
        and child.stride == (1, 1)
        and (child.padding in ((wanted, wanted), "same" if wanted == kernel // 2 else None))
        and child.dilation == (1, 1)
        and child.groups == groups
        and (child.padding_mode == "zeros" or wanted == 0)
        and child.weight.shape[0] == child.out_channels
        and child.weight.shape[1] * groups == child.in_channels
    )


def lies_last(weight: Tensor) -> bool:
    """Whether a convolution's weight is channels_last: torch then returns that format, whatever the
    map has. ``is_contiguous`` does not tell, since a 1x1 kernel is contiguous in both."""
    return weight.stride(1) == 1 < weight.stride(3)


def in_format_of(weight: Tensor, x: Tensor) -> Tensor:
    """x in the memory format that torch's convolution of it with ``weight`` would return."""
    return x.contiguous(memory_format=torch.channels_last) if lies_last(weight) else x


# -------------------------------------------------------------------------------- examples


def maps(channels: int, height: int, width: int) -> list[tuple[Any, ...]]:
    """Two feature maps, an ordinary one and one of large values."""
    return [
        (torch.randn(2, channels, height, width, dtype=torch.float64),),
        (5 * torch.randn(1, channels, width, height, dtype=torch.float64),),
    ]


def is_map(x: Tensor, channels: int) -> bool:
    """(N, channels, H, W) with at least one pixel."""
    return x.dim() == 4 and x.shape[1] == channels and x.shape[2] > 0 and x.shape[3] > 0


# ------------------------------------------------------------------------------- before a call


def only_map(
    operators: Sequence[str], args: Sequence[Any], channels: int, *weights: Tensor | None
) -> Tensor | None:
    """The call's one argument, if it is a feature map of ``channels`` that :func:`runs` takes."""
    if len(args) != 1 or not runs(operators, args[0], *weights) or not is_map(args[0], channels):
        return None
    x: Tensor = args[0]
    return x


def runs(operators: Sequence[str], x: Any, *weights: Tensor | None) -> bool:
    """Whether these operators can run on ``x`` with ``weights`` as the module's own layers would.

    Not in an ONNX export and not under transforms that only torch's own operators know, and not
    where they would return another dtype: with autocast, x must have autocast's dtype already.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point():
        return False
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) if device in ("cpu", "cuda") else False
    if autocast and x.dtype != torch.get_autocast_dtype(device):
        return False
    for weight in weights:
        if weight is None:
            continue
        if weight.device != x.device or (weight.dtype != x.dtype and not autocast):
            return False
    if torch.onnx.is_in_onnx_export() or (not torch.compiler.is_compiling() and _transformed(x)):
        return False
    return any(
        all(backends.can_run(name, op, (x,))[0] for op in operators) for name in candidates(x)
    )


def candidates(x: Tensor) -> tuple[str, ...]:
    """The backends whose kernels a call on ``x`` may take, as `backends.choose` has them."""
    wanted = backends.current_backend()
    if wanted == "auto":
        return ("cuda", "triton") if x.is_cuda else ("cpu",)
    # The probe runs the definitions where there are no kernels for the CPU.
    return () if wanted == "reference" and not probing else (wanted,)


probing = False


def sizes_matter() -> bool:
    """Whether a call may be left to stock because it is small: not in the probe, not in an export,
    which is for other sizes too, and not if a backend was asked for by name."""
    auto = backends.current_backend() == "auto"
    return auto and not probing and not torch.compiler.is_exporting()


def is_less(least: tuple[float, float], module: nn.Module, *args: Any) -> bool:
    """Whether the first argument has fewer values than ``Recogniser.least``, which was measured on
    a CPU in float32."""
    x = args[0] if args else None
    if least == (0, 0) or not isinstance(x, Tensor):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return sizes_matter() and x.numel() < least[needs_gradient(module, x)]


def _transformed(x: Tensor) -> bool:
    """Whether something else than plain torch looks at ``x``: vmap, dual numbers, a tensor subclass
    of someone."""
    return bool(
        torch._C._functorch.is_functorch_wrapped_tensor(x)
        or torch.autograd.forward_ad._current_level >= 0
        or type(x) not in _TENSORS
    )


_TENSORS = (Tensor, nn.Parameter, torch._subclasses.FakeTensor)


def needs_gradient(module: nn.Module, *tensors: Any) -> bool:
    """Whether autograd would record this call."""
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    return any(
        parameter is not None and parameter.requires_grad
        for part in parts(module)
        # DataParallel's replicas have plain attributes in the place of parameters.
        for parameter in (
            *part._parameters.values(),
            *vars(part).get("_former_parameters", {}).values(),
        )
    )
