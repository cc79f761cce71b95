"""A recognised module's class is swapped for a subclass with another ``forward``, and back.

The subclass has nothing but ``forward``; nothing is stored on the module. What the replacement has
to know beyond the module (the recogniser, its options, and what the module looked like when it was
recognised) belongs to the class, in :data:`_REPLACEMENTS`. A subclass is made once for each
combination of these and lives as long as a module of it.

A call that the operators cannot run, or a module that has changed since, takes the class's own
forward.
"""

from __future__ import annotations

import argparse
import copyreg
import enum
import functools
import hashlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from sr_kernels import backends

if TYPE_CHECKING:
    from .recogniser import Recogniser

__all__ = ["Replacement", "original_class", "parts", "replacement_of", "swap"]


_LOG = logging.getLogger("sr_kernels.patching")


class PatchedType(type):
    """The metaclass of the subclasses: by it they are known, and pickled."""


@dataclass(frozen=True)
class Replacement:
    """What a subclass is: one class, one recogniser, and what it found.

    options: of the recogniser; hashable, and picklable if the module is.
    fingerprint: :func:`fingerprint` of the module when it was recognised.
    """

    original: type[nn.Module]
    recogniser: Recogniser
    options: Any
    fingerprint: tuple[Any, ...]


_REPLACEMENTS: weakref.WeakKeyDictionary[type, Replacement] = weakref.WeakKeyDictionary()


def replacement_of(module: nn.Module) -> Replacement | None:
    """What ``module`` is replaced by; None if it is not."""
    return _REPLACEMENTS.get(type(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has when it is not patched."""
    replacement = replacement_of(module)
    return type(module) if replacement is None else replacement.original


# -------------------------------------------------------------------------------- the subclass


def subclass(replacement: Replacement) -> type[nn.Module]:
    """The subclass of ``replacement``: the one that exists, or a new one."""
    original = replacement.original
    for known in type.__subclasses__(original):
        if _REPLACEMENTS.get(known) == replacement:
            return known
    made = cast(
        type[nn.Module],
        PatchedType(
            original.__name__,
            (original,),
            {
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "forward": _forward(replacement),
            },
        ),
    )
    _REPLACEMENTS[made] = replacement
    return made


def _forward(replacement: Replacement) -> Callable[..., Any]:
    original = replacement.original
    recogniser, options = replacement.recogniser, replacement.options
    order = positional(original.forward)
    # Someone may exchange a class's forward later, for all of its objects.
    forwards = tuple({cls: cls.forward for cls, *_ in replacement.fingerprint[0]}.items())

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args if not kwargs else order(args, kwargs)
        if (
            given is not None
            and not recogniser.declines(self, options, *given)
            and (torch.compiler.is_compiling() or all(c.forward is f for c, f in forwards))
            and unchanged(self, replacement)
        ):
            result = recogniser.forward(self, options, *given)
            if result is not NotImplemented:
                return result
        if not torch.compiler.is_compiling():
            _say_why(self, replacement, args)
        return original.forward(self, *args, **kwargs)

    return forward


def _say_why(module: nn.Module, replacement: Replacement, args: tuple[Any, ...]) -> None:
    """A call runs the module's own forward: a warning, once per reason, if the backend asked for by
    name is why; else a line in the log "sr_kernels.patching", level DEBUG."""
    named = backends.current_backend()
    if named in ("auto", "reference") and not _LOG.isEnabledFor(logging.DEBUG):
        return
    x = next((a for a in args if isinstance(a, Tensor)), None)
    why = ""
    if named not in ("auto", "reference") and x is not None and not replacement.recogniser.plain:
        answers = (
            (op, backends.can_run(named, op, (x,))) for op in replacement.recogniser.operators
        )
        why = next(
            (f"{op} on its argument: {reason}" for op, (ok, reason) in answers if not ok), ""
        )
    name = replacement.original.__name__
    if why:
        backends.warn_once(
            f"a patched {name} runs its own forward: backend {named!r} cannot run {why}"
        )
    elif _LOG.isEnabledFor(logging.DEBUG):
        if not unchanged(module, replacement):
            why = "its layers or their configuration have changed, or a hook waits inside it"
        else:
            shape = None if x is None else (tuple(x.shape), x.dtype, str(x.device))
            why = f"{replacement.recogniser.name} does not take this call (first tensor: {shape})"
        _LOG.debug("a patched %s runs its own forward: %s", name, why)


def positional(
    forward: Callable[..., Any],
) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]:
    """A function that puts a call's keyword arguments in their places; None where it cannot."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    simple = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    names = tuple(p.name for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if not simple or len(args) > len(names):
            return None
        placed = list(args)
        left = len(kwargs)
        for name in names[len(args) :]:
            if name in kwargs:
                placed.append(kwargs[name])
                left -= 1
            elif name in defaults:
                placed.append(defaults[name])
            else:
                return None
        return tuple(placed) if left == 0 else None

    return order


def _remake(
    original: type[nn.Module], name: str, options: Any, marks: tuple[Any, ...]
) -> type[nn.Module]:
    from .recogniser import by_name

    return subclass(Replacement(original, by_name(name), options, marks))


def _reduce(made: type[nn.Module]) -> tuple[Any, ...]:
    r = _REPLACEMENTS[made]
    return _remake, (r.original, r.recogniser.name, r.options, r.fingerprint)


copyreg.pickle(PatchedType, _reduce)  # type: ignore[arg-type]


def swap(module: nn.Module, to: type[nn.Module]) -> None:
    """``module.__class__ = to``, whatever the module's own ``__setattr__`` does.

    Raises:
        TypeError: Python cannot swap these two classes.
    """
    object.__setattr__(module, "__class__", to)


# --------------------------------------------------------------------------------- is it still so


# Of a module's __dict__: not its configuration.
_STATE_OF_ALL = frozenset(vars(nn.Module()))
_STATE = _STATE_OF_ALL | {
    *("_is_replica", "_former_parameters", "_compiled_call_impl", "forward"),
}
# Buffers of a norm: the probe tries others, and training writes them.
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
# Known by identity, which copies and pickles keep.
_FIXED = (type, FunctionType, MethodDescriptorType, WrapperDescriptorType, ModuleType, np.ufunc)
_ARRAY_BYTES = 4096  # numpy counts no writes: larger arrays are not read at every call


class _Same:
    """The mark of an object that says nothing of its value: equal to that of the same object only.

    Holds it weakly where that is possible. A copy or pickle of it is equal to nothing else.
    """

    __slots__ = ("__weakref__", "_get", "_hash")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        value = self._get()
        return self is other or (value is not None and value is other._get())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return _Same, (object(),)


def _mark(value: Any, holder: nn.Module | None = None) -> Any:
    """A configured value in a form that can be compared, hashed, copied and pickled: its contents
    if its type is known, else which object it is. ``holder``: the module that it belongs to."""
    if type(value) in _PLAIN or isinstance(value, _FIXED):
        return value
    if value is holder:
        return _mark
    kind = type(value)
    if kind in (tuple, list) and all(type(item) in _PLAIN for item in value):
        return value if kind is tuple else (kind, *value)
    mark = functools.partial(_mark, holder=holder)
    if isinstance(value, Tensor):
        return _tensor_mark(value)
    if isinstance(value, enum.Enum):
        return kind, mark(value.value)
    if isinstance(value, (tuple, list)):
        return kind, *map(mark, value)
    if isinstance(value, dict):
        return kind, *((mark(k), mark(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(mark, value))
    if isinstance(value, slice):
        return kind, mark(value.start), mark(value.stop), mark(value.step)
    if isinstance(value, functools.partial):
        return kind, mark(value.func), mark(value.args), mark(value.keywords)
    if isinstance(value, MethodType):
        return "method", mark(value.__func__), mark(value.__self__)
    if isinstance(value, BuiltinFunctionType):
        if isinstance(value.__self__, (type, ModuleType, NoneType)):
            return value  # such as torch.tanh; [].append is of an object
        return "builtin", value.__name__, mark(value.__self__)
    if isinstance(value, (np.generic, np.ndarray)):
        if value.dtype.hasobject or value.nbytes > _ARRAY_BYTES:
            return _Same(value)
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (SimpleNamespace, argparse.Namespace)):
        return kind, *((k, mark(v)) for k, v in vars(value).items())
    return _Same(value)


def _tensor_mark(tensor: Tensor) -> Any:
    readable = type(tensor) in PLAIN_TENSORS and tensor.layout == torch.strided
    if not readable or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        return _Same(tensor)
    return Tensor, tensor.dtype, _digest(tensor)


def _fixed(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the module itself that are configuration too, since the probe leaves their values
    as they are: buffers but for the statistics of a norm, parameters that are no floats."""
    norm = isinstance(part, nn.modules.batchnorm._NormBase)
    for name, buffer in part._buffers.items():
        if buffer is not None and not (norm and name in _STATISTICS):
            yield name, buffer
    for name, parameter in part._parameters.items():
        if parameter is not None and not parameter.is_floating_point():
            yield name, parameter


def _fixed_mark(tensor: Any) -> Any:
    """Of a tensor's values in whichever dtype, which `to` may change."""
    mark = _mark(tensor)
    return mark[2] if isinstance(mark, tuple) else mark


def fingerprint(module: nn.Module, constants: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The classes, the configuration, the names of the parameters and buffers and the fixed tensors
    of a module and all inside it, and ``constants``."""
    seen = []
    for part in parts(module):
        marks = tuple(
            (name, _mark(value, part)) for name, value in vars(part).items() if name not in _STATE
        )
        fixed = tuple((name, _fixed_mark(tensor)) for name, tensor in _fixed(part))
        seen.append((original_class(part), marks, _held(part), fixed))
    return (tuple(seen), tuple(_digest(tensor) for tensor in constants))


def _held(part: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers of the module itself that are not None: a convolution may
    gain or lose its bias."""
    groups = (part._parameters, part._buffers)
    return tuple(name for group in groups for name, tensor in group.items() if tensor is not None)


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it; a shared one each time. Faster than ``modules()``."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from parts(child)


def _matches(module: nn.Module, replacement: Replacement, *, values: bool = True) -> bool:
    """Whether ``module`` has the fingerprint of ``replacement``, but for weights that are new and
    attributes that are new and hide none of the class, and whether nothing intercepts a part or
    its tensors: quickly, since every call of a patched module asks.

    values: whether the values of tensors are looked at, too. An export has fake ones.
    """
    kinds = PLAIN_TENSORS if values else (*PLAIN_TENSORS, torch._subclasses.FakeTensor)
    wanted, digests = replacement.fingerprint
    expected = iter(wanted)
    for part in parts(module):
        cls, marks, held, fixed = next(expected, (None, (), (), ()))
        if type(part) is not cls and original_class(part) is not cls:
            return False
        own = vars(part)
        if part is not module and _intercepted(part):
            return False
        for name, mark in marks:
            value = own.get(name, parts)  # a value that nothing has
            if value is mark or (not values and isinstance(value, Tensor)):
                continue
            if _mark(value, part) != mark:
                return False
        if len(own) != len(marks) + len(_STATE_OF_ALL) and _hides(own, marks, cls):
            return False
        number = _replicated(own, held) if "_is_replica" in own else 0
        for tensors in (own["_parameters"], own["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if type(tensor) not in kinds or name not in held:
                    return False
                number += 1
        if number != len(held):
            return False
        for name, mark in fixed if values else ():
            if _fixed_mark(part._buffers.get(name, part._parameters.get(name))) != mark:
                return False
    if next(expected, None) is not None:
        return False
    if not values:
        return True
    constants = replacement.recogniser.constants(module, replacement.options)
    return all(_digest(t) == digest for t, digest in zip(constants, digests, strict=True))


def _replicated(own: dict[str, Any], held: tuple[str, ...]) -> int:
    """Number of the parameters of a replica of DataParallel, which are plain attributes."""
    names = {*held, *own.get("_former_parameters", ())}
    return sum(own.get(name) is not None for name in names)


def _hides(own: dict[str, Any], marks: Any, cls: Any) -> bool:
    """Whether an attribute that is new hides one of the class, such as a method."""
    known = {name for name, _ in marks} | _STATE
    return any(name not in known and hasattr(cls, name) for name in own)


def hooked(module: nn.Module) -> Iterator[tuple[str, str]]:
    """``(path, why)`` of each part inside ``module`` that a fused forward must not skip."""
    for path, part in module.named_modules():
        if part is not module and _intercepted(part):
            yield path, "has hooks, or a forward of its instance"


def _intercepted(part: nn.Module) -> bool:
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or (not torch.compiler.is_compiling() and "forward" in vars(part))
    )


def unchanged(module: nn.Module, replacement: Replacement) -> bool:
    """Whether ``module`` is what it was when it was recognised, and no hook waits inside it; nor a
    transform of torch.func around it, whose tensors have no memory to look at.

    While a graph is captured hooks are looked for by the code that is traced, so that the graph
    depends on them; the rest is asked once.
    """
    if _has_any_global_hook() or _transforming():
        return False
    if torch.compiler.is_compiling():
        hooks = any(_intercepted(part) for part in parts(module) if part is not module)
        return not hooks and _matches_when_captured(module, replacement)
    return _matches(module, replacement)


@backends.constant_in_graphs
def _matches_when_captured(module: nn.Module, replacement: Replacement) -> bool:
    return _matches(module, replacement, values=not torch.compiler.is_exporting())


@backends.constant_in_graphs  # Dynamo, which enters transforms, has a guard of its own
def _transforming() -> bool:
    """Whether torch.func is at work around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# ------------------------------------------------------------------------ tensors that are fixed

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_DIGESTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _digest(tensor: Tensor) -> str:
    """The tensor's values as a short string; computed again only when they were written to."""
    if type(tensor) not in PLAIN_TENSORS or tensor.is_meta:
        return "no values"
    if tensor.is_inference():
        return _hash(tensor)
    written = (tensor.data_ptr(), tensor._version)
    known = _DIGESTS.get(tensor)
    if known is None or known[0] != written:
        known = (written, _hash(tensor))
        _DIGESTS[tensor] = known
    return str(known[1])


def _hash(tensor: Tensor) -> str:
    values = tensor.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()
