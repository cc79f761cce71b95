"""Does a replacement compute what the module computes? Tried on a copy, never on the module."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import _library, backends

from . import recogniser as recogniser_module
from .recogniser import NotRecognised, Recogniser
from .swap import fingerprint, original_class, swap

__all__ = ["probe"]

# Both sides compute in float64: rounding to float32 inside a module passes, other maths does not.
TOLERANCE = 1e-6


def probe(module: nn.Module, recogniser: Recogniser, options: Any) -> None:
    """Compares the module's own forward with the replacement's.

    On a copy in float64 on the CPU, with other weights, so that what is zero or one only because
    the module is fresh does not hide a difference; in eval mode, and in training mode with the
    gradients and the running statistics. The module, torch's random numbers and gradients are as
    before afterwards.

    Raises:
        NotRecognised: they differ, or one of them fails.
    """
    with _quiet():
        torch.default_generator.manual_seed(20220306)
        twin = _twin(module, recogniser, options)
        for example in recogniser.examples(twin, options):
            with torch.no_grad():
                own = _run(twin.eval(), None, options, example)
                ours = _run(twin, recogniser, options, example)
            if ours is NotImplemented:
                raise NotRecognised("the operators cannot run its example")
            _compare(own, ours, "in eval mode")
        for training in (False, True):
            _compare_gradients(twin, recogniser, options, example, training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Random numbers, gradient mode, autocast and the choice of backend: none of it leaks."""
    python_state = random.getstate()
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        backends.use_backend("auto" if _library.CPU_LIBRARY.loaded else "reference"),
    ):
        recogniser_module.probing = True
        try:
            yield
        finally:
            recogniser_module.probing = False
            random.setstate(python_state)


def _twin(module: nn.Module, recogniser: Recogniser, options: Any) -> nn.Module:
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        raise NotRecognised(f"it cannot be copied to be tried out ({_line(error)})") from error
    for part in twin.modules():
        swap(part, original_class(part))
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(part, name).clear()
        part._backward_pre_hooks.clear()
    twin.to(device="cpu", dtype=torch.float64).requires_grad_(False)
    fixed = {id(tensor) for tensor in recogniser.constants(twin, options)}
    with torch.no_grad():
        for part in twin.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_var is not None:
                assert part.running_mean is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
            for parameter in part.parameters(recurse=False):
                if id(parameter) not in fixed and parameter.is_floating_point():
                    spread = parameter.square().mean().sqrt().clamp(0.02, 0.3)
                    parameter.copy_(parameter.clamp(-2, 2) + spread * torch.randn_like(parameter))
                    parameter.requires_grad_()
    return twin


def _run(
    twin: nn.Module,
    recogniser: Recogniser | None,
    options: Any,
    example: tuple[Any, ...],
    when: str = "",
) -> Any:
    """What the twin's own forward returns (``recogniser`` None), or the replacement."""
    kept = [a.detach().clone() if isinstance(a, Tensor) else None for a in example]
    # In-place operators of the module must find tensors that are not leaves.
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in example]
    stored = _attributes(twin)
    try:
        if recogniser is None:
            result = type(twin).forward(twin, *arguments)
        else:
            result = recogniser.forward(twin, options, *arguments)
    except Exception as error:
        whose = "its own forward" if recogniser is None else "the replacement"
        raise NotRecognised(f"{when}{whose} fails when tried out ({_line(error)})") from error
    if recogniser is None and _attributes(twin) != stored:
        raise NotRecognised("its forward stores something on the module")
    for given, before in zip(arguments, kept, strict=True):
        if before is not None and not torch.equal(given, before):
            raise NotRecognised("its forward changes its input in place")
    return result


def _attributes(twin: nn.Module) -> list[Any]:
    """What the module and its parts hold, apart from the values of their tensors."""
    tensors = [
        {name: id(value) for name, value in vars(part).items() if isinstance(value, Tensor)}
        for part in twin.modules()
    ]
    return [fingerprint(twin, ()), tensors]


def _form(value: Any) -> Any:
    """How a result is put together, without its tensors. A list is any sequence but a tuple."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, Mapping):
        return (dict, *((key, _form(item)) for key, item in value.items()))
    if isinstance(value, tuple):
        return (type(value), *map(_form, value))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return (list, *map(_form, value))
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _compare(own: Any, ours: Any, when: str) -> None:
    if _form(own) != _form(ours):
        raise NotRecognised(f"{when} it returns something else than {_what(ours)}: {_what(own)}")
    for expected, found in zip(_tensors(own), _tensors(ours), strict=True):
        if expected.shape != found.shape:
            raise NotRecognised(
                f"{when} it returns shape {tuple(expected.shape)}, not {tuple(found.shape)}"
            )
        if expected.numel() == 0:
            continue
        scale = max(float(expected.detach().abs().max()), 1e-3)
        error = float((expected - found).detach().abs().max()) / scale
        if not error <= TOLERANCE:
            raise NotRecognised(f"{when} it computes something else (by {error:.1e})")


def _what(value: Any) -> str:
    return f"a {type(value).__name__}"


def _compare_gradients(
    twin: nn.Module, recogniser: Recogniser, options: Any, example: tuple[Any, ...], training: bool
) -> None:
    """Outputs, gradients and running statistics of one step; nothing to compare where the module
    cannot be trained as it is, or where the recogniser leaves this to the module."""
    when = "in training mode" if training else "with gradients"
    sides = []
    for who in (None, recogniser):
        own = copy.deepcopy(twin).train(training)
        arguments = tuple(
            a.detach().clone().requires_grad_(i == 0) if isinstance(a, Tensor) else a
            for i, a in enumerate(example)
        )
        torch.default_generator.manual_seed(1)
        out = _run(own, who, options, arguments, f"{when} ")
        if out is NotImplemented:
            return
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        leaves += [p for p in own.parameters() if p.requires_grad]
        outputs = [t for t in _tensors(out) if t.requires_grad]
        try:
            gradients = torch.autograd.grad(
                outputs,
                leaves,
                # Not randn_like, whose numbers go by the memory format, which may differ.
                [torch.randn(t.shape, dtype=t.dtype) for t in outputs],
                allow_unused=True,
            )
        except (RuntimeError, AttributeError) as error:
            if who is None:
                return
            raise NotRecognised(f"the replacement has no gradient ({_line(error)})") from error
        dense = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for gradient, leaf in zip(gradients, leaves, strict=True)
        ]
        sides.append((out, dense, [b.double() for b in own.buffers()]))
    theirs, mine = sides
    _compare(theirs[0], mine[0], when)
    _compare(theirs[1], mine[1], f"{when}, in its gradients,")
    _compare(theirs[2], mine[2], f"{when}, in its buffers,")


def _line(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__
