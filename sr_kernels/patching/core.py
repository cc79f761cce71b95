"""``patch``: someone else's network, its weights, our kernels."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import backends

from . import swap
from .probe import probe
from .recogniser import NotRecognised, Recogniser, candidates, recognisers

__all__ = ["PatchEntry", "PatchError", "PatchReport", "patch", "patched"]

Selection = str | type[nn.Module]

# Largest difference that `verify` accepts, relative to the largest output.
VERIFY_TOLERANCE = 1e-3
_UNKNOWN = "of no known family"


class PatchError(RuntimeError):
    """A network could not be patched as asked; it is as it was before."""


@dataclass(frozen=True)
class PatchEntry:
    """What became of one module.

    path: its name in the network, "" for the network itself.
    class_name: of its own class.
    replaced_by: the operators that run now, or None: the module is as it was.
    reason: why it was left alone; of a replaced one, what was recognised.
    resembles: name of the recogniser that took it for its own; "" for a module of no known family.
    """

    path: str
    class_name: str
    replaced_by: str | None
    reason: str
    resembles: str = ""


@dataclass
class PatchReport:
    """Every module of a network, and what became of it.

    ``str(report)`` is a table, modules of one kind in one line. ``restore()`` undoes this call of
    ``patch``, and nothing but it.
    """

    entries: list[PatchEntry] = field(default_factory=list)
    _swapped: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = field(
        default_factory=list, repr=False
    )

    @property
    def replaced(self) -> list[PatchEntry]:
        """Entries of the modules that were replaced by this call."""
        return [entry for entry in self.entries if entry.replaced_by is not None]

    @property
    def skipped(self) -> list[PatchEntry]:
        """Entries of the modules that were left alone."""
        return [entry for entry in self.entries if entry.replaced_by is None]

    def restore(self) -> None:
        """Gives every module that this call replaced its own class back; again does nothing."""
        while self._swapped:
            module, before, now = self._swapped.pop()
            if type(module) is now:
                swap.swap(module, before)

    def __str__(self) -> str:
        replaced, kept = self.replaced, [e for e in self.skipped if e.resembles]
        rest = len(self.entries) - len(replaced) - len(kept)
        lines = [f"{len(replaced)} modules replaced, {len(kept)} of known kinds left alone"]
        lines += _table(
            [(e, f"-> {e.replaced_by}") for e in replaced]
            + [(e, f"left alone: {e.reason}") for e in kept]
        )
        lines.append(f"{rest} other modules: as they were")
        return "\n".join(lines)


def _table(rows: Sequence[tuple[PatchEntry, str]]) -> list[str]:
    """One line for all modules of one class with one fate; the first path stands for them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry, fate in rows:
        groups.setdefault((entry.class_name, fate), []).append(entry.path or "(the network)")
    cells = [
        (f"{len(paths)} x {name}", paths[0] + (" ..." if len(paths) > 1 else ""), fate)
        for (name, fate), paths in groups.items()
    ]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in (0, 1)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in cells]


# ----------------------------------------------------------------------------------------- patch


def patch(
    model: nn.Module,
    *,
    verify: Tensor | tuple[Any, ...] | None = None,
    strict: bool = False,
    include: Sequence[Selection] | None = None,
    exclude: Sequence[Selection] | None = None,
) -> PatchReport:
    """Makes an existing network use the kernels of this package; its weights stay where they are.

    Every module whose class, structure and behaviour are those of a known family gets a subclass of
    its own class, which differs in ``forward``. Parameters, buffers, names, hooks, the optimizer
    and the training flag are untouched; ``state_dict``, ``deepcopy``, pickling, training, autocast,
    ``torch.compile`` and ``torch.export`` work as before. A call that the operators cannot run
    takes the module's own forward. Patching again changes nothing.

    Args:
        model: any network. Changed in place.
        verify: a sample input, or a tuple of arguments: the network runs on it before and after, in
            eval mode without gradients, and the outputs must agree to 1e-3 of the largest.
        strict: refuse if a module that resembles a known family had to be left alone, or if nothing
            was replaced.
        include: only these modules: paths (``*`` and ``?`` match), class names, or classes.
        exclude: none of these, and nothing as a whole that one of these is a part of: its other
            parts are replaced one by one.

    Returns:
        What became of each module. Its ``restore()`` takes everything back.

    Raises:
        TypeError: an argument of the wrong type.
        PatchError: ``verify`` or ``strict`` was not met. The network is as it was, as after any
            other exception.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = _selection(include, "include")
    unwanted = _selection(exclude, "exclude")
    arguments = _arguments(verify)
    report = PatchReport()
    try:
        before = None if arguments is None else _outputs(model, arguments)
        _patch_inside(model, wanted, unwanted, report)
        if arguments is not None:
            _verify(model, arguments, before, report)
        if strict:
            _be_strict(report)
    except BaseException:
        report.restore()
        raise
    return report


@contextmanager
def patched(
    model: nn.Module,
    *,
    verify: Tensor | tuple[Any, ...] | None = None,
    strict: bool = False,
    include: Sequence[Selection] | None = None,
    exclude: Sequence[Selection] | None = None,
) -> Iterator[PatchReport]:
    """:func:`patch` for the length of a ``with`` block; restored at its end. May be nested."""
    report = patch(model, verify=verify, strict=strict, include=include, exclude=exclude)
    try:
        yield report
    finally:
        report.restore()


def _selection(
    chosen: Sequence[Selection] | None, name: str
) -> Callable[[str, nn.Module], bool] | None:
    if chosen is None:
        return None
    one = isinstance(chosen, (str, type)) or not isinstance(chosen, Iterable)
    items: tuple[Any, ...] = (chosen,) if one else tuple(chosen)
    for item in items:
        if not isinstance(item, (str, type)):
            raise TypeError(
                f"{name} must hold paths, class names or classes, got {type(item).__name__}"
            )
    names = [item for item in items if isinstance(item, str)]
    classes = tuple(item for item in items if isinstance(item, type))

    def selects(path: str, module: nn.Module) -> bool:
        return isinstance(module, classes) or any(
            fnmatch.fnmatchcase(path, item) or item == swap.original_class(module).__name__
            for item in names
        )

    return selects


def _patch_inside(
    model: nn.Module,
    wanted: Callable[[str, nn.Module], bool] | None,
    unwanted: Callable[[str, nn.Module], bool] | None,
    report: PatchReport,
) -> None:
    verdicts: dict[Any, str | None] = {}
    first = [r for r in recognisers() if not r.of_parts]
    asked = _classes_asked_for(model)
    whole: list[tuple[str, str]] = []  # (path prefix, why what is inside stays)
    modules = list(model.named_modules())
    for path, module in modules:
        why = next((why for prefix, why in whole if path.startswith(prefix)), None)
        cls = swap.original_class(module)
        if why is not None:
            report.entries.append(PatchEntry(path, cls.__name__, None, why))
            continue
        inside = f"part of {path or 'the network'}, replaced as one"
        if (replacement := swap.replacement_of(module)) is not None:
            entry = PatchEntry(path, cls.__name__, None, "is patched already")
            if replacement.recogniser.of_parts:
                inside = ""
        elif cls.__module__.split(".")[0] == "sr_kernels":
            inside = "is of this package already"
            entry = PatchEntry(path, cls.__name__, None, inside)
        elif cls.__name__ in asked:
            entry = PatchEntry(path, cls.__name__, None, f"{asked[cls.__name__]} asks for its type")
            inside = ""
        elif wanted is not None and not wanted(path, module):
            entry = PatchEntry(path, cls.__name__, None, "not in include")
            inside = ""
        elif unwanted is not None and unwanted(path, module):
            entry = PatchEntry(path, cls.__name__, None, "in exclude")
            inside = ""
        elif (kept := _first_inside(path, module, unwanted)) is not None:
            # It would be replaced as one. Its other parts are looked at one by one.
            entry = PatchEntry(path, cls.__name__, None, f"holds {kept}, which is in exclude")
            inside = ""
        else:
            entry = _patch_one(path, module, report, first, verdicts)
            inside = inside if entry.replaced_by is not None else ""
        if inside:
            whole.append((f"{path}." if path else "", inside))
        report.entries.append(entry)
    last = [r for r in recognisers() if r.of_parts]
    for number, (path, module) in reversed(list(enumerate(modules))):  # from the inside
        if report.entries[number].reason == _UNKNOWN:
            report.entries[number] = _patch_one(path, module, report, last, verdicts)


def _classes_asked_for(model: nn.Module) -> dict[str, str]:
    """Names of classes that a forward in the network may compare with the exact type of an object,
    and which forward: of such a class a subclass would not do."""
    asked: dict[str, str] = {}
    for cls in {swap.original_class(module) for module in model.modules()}:
        if cls.__module__.startswith("torch."):
            continue
        members = [member for base in cls.__mro__ for member in vars(base).items()]
        todo = [function for name, function in members if "forward" in name]
        seen: set[Any] = set()
        while todo:  # forwards, and what of the same package they call
            function = inspect.unwrap(getattr(value := todo.pop(), "__func__", value))
            code = getattr(function, "__code__", None)
            if code is None or code in seen or _package(function) == "torch":
                continue
            seen.add(code)
            names = _names(code)
            found = [function.__globals__[n] for n in names if n in function.__globals__]
            if {"type", "__class__"} & names:
                inside = [vars(v).get(n) for v in found if isinstance(v, ModuleType) for n in names]
                kinds = [v.__name__ for v in (*found, *inside) if isinstance(v, type)]
                asked |= dict.fromkeys((*names, *kinds), f"{cls.__name__}.forward")
            methods = (getattr(cls, name, None) for name in names)
            todo += [v for v in methods if isinstance(v, FunctionType)]
            near = [v for v in found if isinstance(v, FunctionType)]
            todo += [v for v in near if _package(v) == _package(function)]
    return asked


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").split(".")[0]  # None: of exec


def _names(code: CodeType) -> set[str]:
    """Globals and attributes that a function and those written inside it name."""
    inside = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inside))


def _first_inside(
    path: str, module: nn.Module, selects: Callable[[str, nn.Module], bool] | None
) -> str | None:
    """Path of the first part of ``module`` that is selected."""
    if selects is None:
        return None
    parts = module.named_modules(prefix=path, remove_duplicate=False)
    return next((name for name, part in parts if selects(name, part)), None)


def _patch_one(
    path: str,
    module: nn.Module,
    report: PatchReport,
    families: Sequence[Recogniser],
    verdicts: dict[Any, str | None],
) -> PatchEntry:
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return PatchEntry(path, name, None, "is compiled TorchScript")
    if isinstance(module, torch.fx.GraphModule):
        return PatchEntry(path, name, None, "is a traced torch.fx graph")
    reasons: list[tuple[str, str]] = []
    for recogniser in families:
        try:
            candidates = list(recogniser.options(module))
            if not candidates:
                continue
            obstacle = _obstacle(module) or _cannot_run(module, recogniser)
            if obstacle:
                raise NotRecognised(obstacle)
            found = _recognise(module, recogniser, candidates, verdicts)
            swap.swap(module, swap.subclass(found))
        except NotRecognised as reason:
            reasons.append(("" if recogniser.plain else recogniser.name, str(reason)))
            continue
        except Exception as error:
            # Other people's attributes may do anything when they are read.
            why = _obstacle(module) or f"{recogniser.name} fails on it ({error!r})"
            reasons.append(("" if recogniser.plain else recogniser.name, why))
            continue
        report._swapped.append((module, found.original, type(module)))
        return PatchEntry(
            path, name, recogniser.replacement, f"recognised as {recogniser.name}", recogniser.name
        )
    if reasons:
        resembles = next((family for family, _ in reasons if family), "")
        return PatchEntry(path, name, None, "; ".join(r for _, r in reasons), resembles)
    return PatchEntry(path, name, None, _UNKNOWN)


def _recognise(
    module: nn.Module,
    recogniser: Recogniser,
    candidates: Sequence[Any],
    verdicts: dict[Any, str | None],
) -> swap.Replacement:
    """The first of the candidates that passes the probe; modules that are alike are tried once."""
    first: str | None = None
    for options in candidates:
        marks = swap.fingerprint(module, recogniser.constants(module, options))
        shapes = tuple((n, t.shape) for n, t in _state(module))
        key = (type(module), recogniser.name, options, marks, shapes)
        if key not in verdicts:
            try:
                if not recogniser.of_parts:
                    probe(module, recogniser, options)
                verdicts[key] = None
            except NotRecognised as reason:
                verdicts[key] = str(reason)
        verdict = verdicts[key]
        if verdict is None:
            return swap.Replacement(type(module), recogniser, options, marks)
        first = first or verdict
    raise NotRecognised(str(first))


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _obstacle(module: nn.Module) -> str:
    """What, whatever the family, forbids to swap this module's class; "" if nothing does."""
    cls = type(module)
    if type(cls) is not type:
        return f"its class has a metaclass of its own ({type(cls).__name__})"
    if any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1]):
        return "its class does something when it is derived from (__init_subclass__)"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    if cls.__call__ is not nn.Module.__call__:
        return "its class overrides __call__"
    for name, function in vars(cls).items():
        if name != "__init__" and _asks_its_class(function):
            return f"its {name} would not end in a subclass: super() of the object's own class"
    for path, part in module.named_modules():
        where = f"{path} inside it" if path else "it"
        if torch.nn.utils.parametrize.is_parametrized(part):
            return f"a parametrization computes the weights of {where}"
        if (kind := _exchanged(swap.original_class(part))) is not None:
            return f"someone exchanged the forward of {kind.__module__}.{kind.__name__}"
    for path, why in swap.hooked(module):
        return f"{path} inside it {why}, which would not run"
    for name, tensor in _state(module):
        if torch.nn.parameter.is_lazy(tensor):
            return f"{name} has no shape yet (a lazy module)"
        if tensor.is_meta:
            return f"{name} is on the meta device"
        if type(tensor) not in swap.PLAIN_TENSORS:
            return f"{name} is a {type(tensor).__name__}"
    return ""


def _asks_its_class(function: Any) -> bool:
    """Whether a method says ``super(self.__class__, self)`` or ``super(type(self), self)``: of an
    object of a subclass that is the method itself, for ever."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return "super" in names and ("__class__" in names or "type" in names)


def _exchanged(cls: type) -> type | None:
    """The class of torch whose ``forward`` an object of ``cls`` runs, if it is not torch's."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    home = getattr(vars(owner)["forward"], "__globals__", {}).get("__name__")
    return (
        owner
        if owner.__module__.startswith("torch.nn.modules.") and home != owner.__module__
        else None
    )


def _cannot_run(module: nn.Module, recogniser: Recogniser) -> str:
    """Why no kernel can serve this module where it lies; "" if one can."""
    floats = [p for p in module.parameters() if p.is_floating_point()]
    if not floats:
        return ""
    if len({(p.device, p.dtype) for p in floats}) > 1:
        return "its parameters are of several dtypes or on several devices"
    reasons = []
    for name in candidates(floats[0]) or ("cpu",):
        answers = [backends.can_run(name, op, (floats[0],)) for op in recogniser.operators]
        reasons.append(next((why for ok, why in answers if not ok), ""))
    return "" if "" in reasons else reasons[0]


# ---------------------------------------------------------------------------------------- verify


def _arguments(verify: Any) -> tuple[Any, ...] | None:
    if verify is None:
        return None
    if isinstance(verify, Tensor):
        return (verify,)
    if isinstance(verify, tuple):
        return verify
    raise TypeError(f"verify must be a tensor or a tuple of arguments, got {type(verify).__name__}")


def _outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Of the network in eval mode; training flags and buffers are afterwards as before."""
    training = [(part, part.training) for part in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        for part, _ in training:
            part.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            torch.random.default_generator.manual_seed(0)
            result = model(*kept)
    finally:
        for part, mode in training:
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
    leaves, _ = torch.utils._pytree.tree_flatten(result)
    tensors = [t.detach().clone() for t in leaves if isinstance(t, Tensor)]
    if not tensors:
        raise PatchError(
            "verify: the network must return a tensor, or tuples, lists and dicts that hold one, "
            f"got {type(result).__name__}. The network is as it was"
        )
    return tensors


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest output; infinite where they cannot be
    compared, and where only one of them is finite."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel() == 0 or torch.equal(old, new):
            continue
        both = torch.isnan(old) & torch.isnan(new)
        old, new = old.double().masked_fill(both, 0), new.double().masked_fill(both, 0)
        same = old == new
        gap = (old - new).abs().masked_fill(same, 0).max()
        error = float(gap / old.abs().masked_fill(same, 0).max().clamp(min=1e-12))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _verify(model: nn.Module, arguments: tuple[Any, ...], before: Any, report: PatchReport) -> None:
    difference = _difference(before, _outputs(model, arguments))
    if difference <= VERIFY_TOLERANCE:
        return
    raise PatchError(
        f"verify: the output changes by {difference:.1e} of its largest value, more than "
        f"{VERIFY_TOLERANCE:.0e} is refused; {_culprit(model, arguments, before, report)}. "
        "The network is as it was; leave modules out with exclude="
    )


def _culprit(model: nn.Module, arguments: tuple[Any, ...], before: Any, report: PatchReport) -> str:
    """Which module the difference begins with, found by halving: those that were replaced before it
    alone do not make it too large. What is replaced by its parts was replaced after them."""
    swapped = list(report._swapped)

    def differs(number: int) -> bool:
        for position, (module, own, ours) in enumerate(swapped):
            swap.swap(module, ours if position < number else own)
        return not _difference(before, _outputs(model, arguments)) <= VERIFY_TOLERANCE

    few, enough = 0, len(swapped)
    # Twice: a network that alternates between two outputs may come out right once.
    if not swapped or any(differs(0) for _ in range(2)):
        return "it does so with nothing replaced too, from one call to the next"
    while enough - few > 1:
        half = (few + enough) // 2
        few, enough = (few, half) if differs(half) else (half, enough)
    names = {id(module): path for path, module in model.named_modules()}
    path = names[id(swapped[enough - 1][0])]
    return f"it begins with {path or 'the network itself'}"


def _be_strict(report: PatchReport) -> None:
    left = [e for e in report.skipped if e.resembles]
    if left:
        listed = "; ".join(f"{e.path or '(the network)'}: {e.reason}" for e in left[:5])
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        raise PatchError(f"strict: left alone would be {listed}{more}. The network is as it was")
    if not report.replaced:
        raise PatchError("strict: nothing in this network is of a known family")
