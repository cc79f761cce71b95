"""Error metrics, input generators and the tolerance rule: for this package's tests and for yours.

The rule by which an implementation ("ours") counts as right, with an oracle (the plain PyTorch
definition in float64, from the same rounded inputs) and a stock run (the same definition in the
dtype under test)::

    err(ours) <= factor * err(stock) + 2 max |r + 0.3 - 0.3 - r|,    r = oracle in the tested dtype

with factor 2 for outputs and 3 for gradients: never more than a small multiple of the error that
PyTorch itself makes. The second term is the rounding of the result alone, for cases where stock's
error happens to be almost nothing. The same bound holds for the root mean square of the error, and
a matching one for the cosine. Where stock is exactly right in every element, ours must be too.

Non-finite values are compared by class (NaN, +inf, -inf, finite): ours must have, element by
element, the class of the oracle rounded to the dtype, or stock's.

The one-call form for an operator is `check_operator`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sr_kernels.ops._registration import is_channels_last, memory_format_of

_deterministic: Any = torch.utils.deterministic  # a module whose attributes are properties

__all__ = [
    "Comparison",
    "ErrorMetrics",
    "assert_gradients_alive",
    "assert_within_tolerance",
    "bitwise_equal",
    "check_operator",
    "error_metrics",
    "guarded",
    "make_tensor",
    "non_empty_subsets",
    "poisoned_empty",
    "rounding_error",
]

LAYOUTS = ("contiguous", "channels_last", "sliced", "misaligned")
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


# ---------------------------------------------------------------------------------- error metrics


@dataclass(frozen=True)
class ErrorMetrics:
    """How far a tensor is from its oracle, over the elements where both are finite.

    max_abs: max |a - o|.  rms: root mean square of a - o.  relative_l2: ||a - o|| / ||o|| (inf
    where o = 0 and a != 0).  cosine: <a, o> / (||a|| ||o||) (1 where both are 0, 0 where one is).
    worst: index of the largest error, or None for an empty tensor.
    """

    max_abs: float
    rms: float
    relative_l2: float
    cosine: float
    worst: tuple[int, ...] | None


def error_metrics(actual: torch.Tensor, oracle: torch.Tensor) -> ErrorMetrics:
    """The error of `actual` against `oracle`, computed in float64; shapes must be equal."""
    if actual.shape != oracle.shape:
        raise ValueError(
            f"actual has shape {tuple(actual.shape)}, but oracle has {tuple(oracle.shape)}"
        )
    a, o = _double(actual), _double(oracle)
    if a.numel() == 0:
        return ErrorMetrics(0.0, 0.0, 0.0, 1.0, None)
    count = a.numel()
    if not (_all_finite(a) and _all_finite(o)):
        finite = torch.isfinite(a) & torch.isfinite(o)
        a, o = torch.where(finite, a, 0.0), torch.where(finite, o, 0.0)
        count = int(finite.sum()) or 1
    difference = (a - o).abs_()
    position = int(difference.argmax())
    norm_d, norm_a, norm_o = _norm(difference), _norm(a), _norm(o)
    if norm_o > 0:
        relative = norm_d / norm_o
    else:
        relative = 0.0 if norm_d == 0 else math.inf
    if norm_a > 0 and norm_o > 0:
        cosine = float(((a / norm_a) * (o / norm_o)).sum())
    else:
        cosine = 1.0 if norm_a == norm_o else 0.0
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), a.shape))
    rms = norm_d / math.sqrt(count)
    return ErrorMetrics(_item(difference, worst), rms, relative, cosine, worst)


def rounding_error(oracle: torch.Tensor, dtype: torch.dtype) -> float:
    """max |r + 0.3 - 0.3 - r| over finite r = oracle in `dtype`: what rounding alone may do.

    At least half a unit in the last place of the largest r: with a handful of elements the maximum
    is zero by luck.
    """
    r = oracle.detach().to("cpu", dtype)
    r = r[torch.isfinite(r)]
    if r.numel() == 0:
        return 0.0
    error = _double(((r + 0.3) - 0.3) - r).abs()
    return max(float(error.max()), torch.finfo(dtype).eps / 4 * float(_double(r).abs().max()))


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, dtype and values to the last bit; NaN equals NaN, 0.0 does not equal -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


# ------------------------------------------------------------------------------ the tolerance rule


@dataclass(frozen=True)
class Comparison:
    """One tensor held against the rule: its error, stock's, and the bound on the first."""

    what: str
    ours: ErrorMetrics
    stock: ErrorMetrics
    rounding: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.what}: error {self.ours.max_abs:.3g}, allowed {self.bound:.3g} "
            f"(stock's {self.stock.max_abs:.3g}, rounding {self.rounding:.3g}); "
            f"rms {self.ours.rms:.3g} (stock {self.stock.rms:.3g}), "
            f"relative L2 {self.ours.relative_l2:.3g} (stock {self.stock.relative_l2:.3g}), "
            f"cosine {self.ours.cosine:.9f} (stock {self.stock.cosine:.9f})"
        )


def assert_within_tolerance(
    actual: torch.Tensor,
    stock: torch.Tensor,
    oracle: torch.Tensor,
    *,
    factor: float = OUTPUT_FACTOR,
    atol: float = 0.0,
    what: str = "output",
    stock_error: ErrorMetrics | None = None,
) -> Comparison:
    """Holds `actual` against the tolerance rule (see the module) and returns the figures.

    actual, stock: the implementation's and PyTorch's result, same shape and dtype.
    oracle: the definition's result in float64 (or at least in a wider dtype than `actual`).
    atol: added to the bound. For results that cancel to exactly zero in stock's order of summation
        and not in another; a test that uses it says why.
    stock_error: used instead of stock's measured error. Needed where stock and oracle are the same
        computation, as they are in float64 (see `check_operator`).

    Raises AssertionError saying which part of the rule failed, by how much and at which element.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(
            f"{what}: shape {tuple(actual.shape)}, but it must be {tuple(oracle.shape)}"
        )
    if actual.dtype != stock.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, but it must be {stock.dtype}")
    _assert_same_classes(actual, stock, oracle, what)

    ours = error_metrics(actual, oracle)
    measured = error_metrics(stock, oracle)
    allowance = stock_error if stock_error is not None else measured
    rounding = rounding_error(oracle, actual.dtype)
    slack = 2 * rounding + atol
    exact = stock_error is None and measured.max_abs == 0
    bound = atol if exact else factor * allowance.max_abs + slack
    comparison = Comparison(what, ours, allowance, rounding, bound)

    def fail(reason: str) -> None:
        place = ""
        if ours.worst is not None:
            place = (
                f"\n  worst at {ours.worst}: ours {_item(actual, ours.worst)!r}, stock "
                f"{_item(stock, ours.worst)!r}, oracle {_item(oracle, ours.worst)!r}"
            )
        raise AssertionError(f"{reason}\n  {comparison}{place}")

    if ours.max_abs > bound:
        fail(f"{what}: " + ("stock is exact here, ours is not" if exact else "error too large"))
    if ours.rms > factor * allowance.rms + slack:
        fail(f"{what}: root mean square of the error too large")
    # 1 - cos is about half the square of the relative L2, which scales with the factor.
    norm = _norm(torch.nan_to_num(_double(oracle), nan=0.0, posinf=0.0, neginf=0.0))
    relative_slack = slack * math.sqrt(max(1, actual.numel())) / norm if norm > 0 else math.inf
    allowed = factor**2 * max(0.0, 1 - allowance.cosine) + relative_slack**2 + 1e-13
    # A cosine means nothing for a result that is zero up to rounding.
    if allowance.relative_l2 < 0.1 and relative_slack < 0.1 and 1 - ours.cosine > allowed:
        fail(f"{what}: direction is wrong (1 - cosine {1 - ours.cosine:.3g} > {allowed:.3g})")
    return comparison


def assert_gradients_alive(
    actual: torch.Tensor, expected: torch.Tensor, *, what: str = "gradient"
) -> None:
    """No channel, row, column or sample of `actual` is all zero where `expected`'s is not.

    A kernel that forgets one channel of many passes any bound on the largest error when that
    channel's gradient is small; it does not pass this. Every dimension is looked at. What is zero
    up to the rounding of a float32 sum (float64's in float64), or below the smallest number of the
    dtype, is not asked for.
    """
    if actual.numel() == 0:
        return
    values = _double(expected).abs()
    epsilon = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    limits = torch.finfo(actual.dtype)
    smallest = max(8 * epsilon * float(values.max()), 4 * limits.tiny * limits.eps)
    for dim in range(actual.dim()):
        others = [d for d in range(actual.dim()) if d != dim]
        ours, theirs = actual.detach().cpu() != 0, values > smallest
        if others:
            ours, theirs = ours.sum(others) > 0, theirs.sum(others) > 0
        dead = (~ours & theirs).nonzero().flatten().tolist()
        if dead:
            raise AssertionError(
                f"{what}: all zero at index {_short(dead)} of dimension {dim} of "
                f"{tuple(actual.shape)}, where it must not be"
            )


def _assert_same_classes(
    actual: torch.Tensor, stock: torch.Tensor, oracle: torch.Tensor, what: str
) -> None:
    def classes(tensor: torch.Tensor) -> torch.Tensor:
        t = tensor.detach().cpu()
        return torch.isnan(t) * 1 + torch.isposinf(t) * 2 + torch.isneginf(t) * 3

    rounded = oracle.detach().to(actual.dtype)
    if all(_all_finite(t.detach()) for t in (actual, stock, rounded)):
        return
    ours, theirs, truth = classes(actual), classes(stock), classes(rounded)
    wrong = ((ours != theirs) & (ours != truth)).nonzero()
    if len(wrong):
        first = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {actual.numel()} elements are NaN or infinite where they "
            f"must not be, or finite where they must not be; first at {first}: ours "
            f"{_item(actual, first)!r}, stock {_item(stock, first)!r}, oracle "
            f"{_item(oracle, first)!r}"
        )


# --------------------------------------------------------------------------------- test inputs


def make_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> torch.Tensor:
    """A normal random tensor (standard deviation `scale`), the same for every layout and device.

    layout:
        "contiguous"     the ordinary one
        "channels_last"  (N, C, H, W) stored as N, H, W, C
        "sliced"         every second element of each row, cut out of a larger tensor in every
                         dimension: no stride is the usual one, and NaN lies between the elements
        "misaligned"     contiguous, but starting one element after an aligned address

    What surrounds "sliced" and "misaligned" elements is NaN, so that a read beside them shows.
    The values depend on shape, seed, scale and dtype only.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    generator = torch.Generator().manual_seed(seed)
    size = tuple(shape)
    values = (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    values = values.to(device)
    if layout == "channels_last":
        if len(size) != 4:
            raise ValueError(f"layout 'channels_last' needs 4 dimensions, shape is {size}")
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        outer = [n + 2 for n in size]
        if outer:
            outer[-1] = 2 * size[-1] + 3
        buffer = torch.full(outer, math.nan, dtype=dtype, device=device)
        view = buffer
        for dim, n in enumerate(size):
            step = 2 if dim == len(size) - 1 else 1
            view = view[(slice(None),) * dim + (slice(1, 1 + step * n, step),)]
        values = view.copy_(values)
    elif layout == "misaligned":
        buffer = torch.full((values.numel() + 2,), math.nan, dtype=dtype, device=device)
        values = buffer[1 : 1 + values.numel()].view(size).copy_(values)
    return values.requires_grad_(requires_grad)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills the memory of every `torch.empty` (and empty_like, new_empty, ... also from C++) with
    NaN, or with the largest integer, so that an element that is never written shows.

    torch does this in its deterministic mode, which is switched on meanwhile (as `warn_only`).
    """
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


GUARD_BYTE = 0xA5


@contextmanager
def guarded(*tensors: torch.Tensor, band: int = 256) -> Iterator[tuple[torch.Tensor, ...]]:
    """Copies of `tensors` between two guard bands of `band` bytes each, for code that writes into
    memory it is given; on leaving, every guard byte must be as it was.

        with guarded(torch.empty(5, 7)) as (out,):
            kernel(out)

    The copies are contiguous. The first byte after the data is already guarded. Raises
    AssertionError naming the tensor and the offset of the first byte that was overwritten.
    """
    buffers: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    sizes: list[int] = []
    lead = -(-max(1, band) // 64) * 64  # the data itself stays aligned
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        buffer = torch.full(
            (lead + size + lead,), GUARD_BYTE, dtype=torch.uint8, device=tensor.device
        )
        inner = buffer[lead : lead + size].view(tensor.dtype).view(tensor.shape)
        with torch.no_grad():
            inner.copy_(tensor)
        buffers.append(buffer)
        copies.append(inner)
        sizes.append(size)
    yield tuple(copies)
    for index, (buffer, size) in enumerate(zip(buffers, sizes, strict=True)):
        flat = buffer.cpu()
        for side, part, start in (
            ("before", flat[:lead], -lead),
            ("after", flat[lead + size :], size),
        ):
            written = (part != GUARD_BYTE).nonzero().flatten()
            if len(written):
                offset = start + int(written[-1 if side == "before" else 0])
                raise AssertionError(
                    f"tensor {index}: memory {side} its {size} bytes was written "
                    f"(nearest byte at offset {offset}, {len(written)} bytes in all)"
                )


# ------------------------------------------------------------------------------- whole operators


def non_empty_subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset of `names`, small ones first."""
    pool = list(names)
    return [s for n in range(1, len(pool) + 1) for s in itertools.combinations(pool, n)]


def check_operator(
    name: str,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor | None],
    *,
    kwargs: Mapping[str, Any] | None = None,
    backend: str | None = "cpu",
    gradients: str | Iterable[Sequence[str]] | None = "together",
    factor: float = OUTPUT_FACTOR,
    gradient_factor: float = GRADIENT_FACTOR,
    atol: float = 0.0,
    gradient_atol: float = 0.0,
    autocast: torch.dtype | None = None,
    memory_format: bool = True,
    repeats: int = 0,
    poison: bool = True,
    seed: int = 1,
) -> list[Comparison]:
    """Holds a public function against its reference twin: forward, and backward for each asked
    subset of inputs that require a gradient.

        check_operator(
            "shift_conv2d", sr_kernels.shift_conv2d, sr_kernels.reference.shift_conv2d,
            {"x": make_tensor((2, 60, 9, 7)), "weight": make_tensor((60, 60, 1, 1), seed=1),
             "bias": make_tensor((60,), seed=2)},
            kwargs={"activation": "relu"}, gradients="subsets",
        )

    name: begins every message.
    function: called as function(**inputs, **kwargs, backend=backend); `backend=None` leaves that
        keyword out.
    reference: called as reference(**inputs, **kwargs), twice: in float64 (the oracle) and on the
        inputs as they are (stock).
    inputs: tensors by argument name, in the dtype, layout and device under test; None for an
        argument left out. One tensor under two names stays one tensor (q is k).
    gradients: "together" (all floating inputs at once), "subsets" (every non-empty subset),
        a list of tuples of names, or None for the forward alone.
    factor, gradient_factor, atol, gradient_atol: of the tolerance rule, see
        `assert_within_tolerance`.
    autocast: runs function and stock under torch.autocast with this dtype; results may come in it
        also where stock's are promoted to a wider one.
    memory_format: also demands that 4-dimensional outputs have the first input's memory format,
        where that is contiguous or channels_last.
    repeats: that many further runs must give the same bits, gradients included.
    poison: runs function inside `poisoned_empty`.

    Results may be a tensor or a tuple; what is not a floating tensor in it is not compared.
    The forward is also run under torch.no_grad. Inputs must come back unchanged.

    In float64 stock is the oracle itself; its error is then taken from a float32 run, scaled by the
    ratio of the two machine epsilons.

    Returns the comparisons; raises AssertionError for the first that fails.
    """
    options = dict(kwargs or {})
    tensors = {k: t for k, t in inputs.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise ValueError("inputs holds no tensor")
    floating = [k for k, t in tensors.items() if t.is_floating_point()]
    asked = _gradient_sets(gradients, floating)
    first = next(iter(tensors.values()))
    ours_options = options if backend is None else {**options, "backend": backend}
    before = {k: t.detach().clone() for k, t in tensors.items()}
    wanted = sorted({n for names in asked for n in names}, key=floating.index)

    def mixed() -> Any:
        if autocast is None:
            return nullcontext()
        return torch.autocast(first.device.type, dtype=autocast)

    # Stock and oracle: once, with every gradient that any subset asks for.
    oracle = _run(reference, inputs, options, wanted, seed, cast=torch.float64)
    with mixed():
        stock = _run(reference, inputs, options, wanted, seed)
    stock_errors: dict[str, ErrorMetrics] = {}
    if first.dtype == torch.float64:
        narrow = _run(reference, inputs, options, wanted, seed, cast=torch.float32)
        rounded = _aliased(inputs, torch.float32)
        truth = _run(reference, rounded, options, wanted, seed, cast=torch.float64)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        for key, value in narrow.items():
            e = error_metrics(value, truth[key])
            # 1 - cosine goes with the square of the error: nothing that float64 could show.
            stock_errors[key] = ErrorMetrics(
                e.max_abs * ratio, e.rms * ratio, e.relative_l2 * ratio, 1.0, e.worst
            )

    results: list[Comparison] = []

    def assert_inputs_unchanged() -> None:
        for key, tensor in tensors.items():
            if not bitwise_equal(tensor, before[key]):
                raise AssertionError(f"{name}: the input {key} was modified")

    def compare(run: dict[str, torch.Tensor], label: str) -> None:
        for key, value in run.items():
            gradient = key.startswith("gradient")
            what = f"{name}: {label}, {key}"
            theirs = stock[key].to(value.dtype) if value.dtype == autocast else stock[key]
            results.append(
                assert_within_tolerance(
                    value,
                    theirs,
                    oracle[key],
                    factor=gradient_factor if gradient else factor,
                    atol=gradient_atol if gradient else atol,
                    what=what,
                    stock_error=stock_errors.get(key),
                )
            )
            if gradient:
                # Where stock's own gradient underflows, ours may.
                alive = torch.where(theirs != 0, oracle[key], 0.0)
                assert_gradients_alive(value, alive, what=what)
            elif memory_format and value.dim() == 4 and first.dim() == 4:
                _assert_memory_format(value, first, what)

    with poisoned_empty() if poison else nullcontext():
        with torch.no_grad(), mixed():
            plain = _run(function, inputs, ours_options, (), seed)
        assert_inputs_unchanged()
        missing = {k for k in oracle if not k.startswith("gradient")} ^ set(plain)
        if missing:
            raise AssertionError(f"{name}: one of function and reference lacks {sorted(missing)}")
        compare(plain, "no_grad")
        for names in asked:
            label = "gradient of " + "+".join(names)
            with mixed():
                run = _run(function, inputs, ours_options, names, seed)
            compare(run, label)
            for repeat in range(repeats):
                with mixed():
                    again = _run(function, inputs, ours_options, names, seed)
                for key in run:
                    if not bitwise_equal(run[key], again[key]):
                        raise AssertionError(
                            f"{name}: {label}, {key}: run {repeat + 2} differs from run 1"
                        )
        if not asked:
            for repeat in range(repeats):
                with torch.no_grad(), mixed():
                    again = _run(function, inputs, ours_options, (), seed)
                for key in plain:
                    if not bitwise_equal(plain[key], again[key]):
                        raise AssertionError(f"{name}: {key}: run {repeat + 2} differs from run 1")
    assert_inputs_unchanged()
    return results


def _gradient_sets(
    gradients: str | Iterable[Sequence[str]] | None, floating: list[str]
) -> list[tuple[str, ...]]:
    if gradients is None:
        return []
    if isinstance(gradients, str):
        if gradients == "together":
            return [tuple(floating)]
        if gradients == "subsets":
            return non_empty_subsets(floating)
        raise ValueError(f"gradients is {gradients!r}: it must be 'together', 'subsets' or a list")
    sets = [tuple(names) for names in gradients]
    for names in sets:
        unknown = [n for n in names if n not in floating]
        if unknown or not names:
            raise ValueError(f"gradients names {list(names)}: choose among {floating}")
    return sets


def _aliased(
    inputs: Mapping[str, torch.Tensor | None], cast: torch.dtype | None = None
) -> dict[str, torch.Tensor | None]:
    """Leaves that share the inputs' memory (or are casts of them): one per distinct tensor."""
    leaves: dict[int, torch.Tensor] = {}
    result: dict[str, torch.Tensor | None] = {}
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            result[key] = value
            continue
        if id(value) not in leaves:
            leaf = value.detach()
            if cast is not None and leaf.is_floating_point():
                leaf = leaf.to(cast)
            leaves[id(value)] = leaf
        result[key] = leaves[id(value)]
    return result


def _run(
    function: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor | None],
    options: Mapping[str, Any],
    names: Sequence[str],
    seed: int,
    *,
    cast: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs by "output", or "output 0", ...; gradients by "gradient x"."""
    arguments = _aliased(inputs, cast)
    for key in names:
        leaf = arguments[key]
        assert leaf is not None
        leaf.requires_grad_(True)
    result = function(**arguments, **options)
    parts = result if isinstance(result, (tuple, list)) else (result,)
    outputs = {
        ("output" if len(parts) == 1 else f"output {i}"): part
        for i, part in enumerate(parts)
        if isinstance(part, torch.Tensor) and part.is_floating_point()
    }
    found = {key: value.detach() for key, value in outputs.items()}
    if names:
        weights = []
        for i, value in enumerate(outputs.values()):
            # The same rounded numbers for every dtype: what the narrowest of them can hold.
            g = make_tensor(value.shape, torch.bfloat16, seed=seed + i, device=value.device)
            weights.append(g.to(value.dtype).contiguous(memory_format=memory_format_of(value)))
        leaves = [arguments[key] for key in names]
        grads = torch.autograd.grad(
            list(outputs.values()),
            leaves,  # type: ignore[arg-type]
            weights,
            allow_unused=False,
        )
        for key, grad in zip(names, grads, strict=True):
            found[f"gradient {key}"] = grad.detach()
    return found


def _assert_memory_format(value: torch.Tensor, first: torch.Tensor, what: str) -> None:
    if is_channels_last(first) and not value.is_contiguous(memory_format=torch.channels_last):
        raise AssertionError(
            f"{what}: strides {value.stride()}, but the input is channels_last: the output must be"
        )
    if first.is_contiguous() and not value.is_contiguous():
        raise AssertionError(
            f"{what}: strides {value.stride()}, but the input is contiguous: the output must be"
        )


# ---------------------------------------------------------------------------------------- helpers


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _all_finite(tensor: torch.Tensor) -> bool:
    # Without a temporary tensor, unlike isfinite: a large one costs more than the search itself.
    return not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _norm(tensor: torch.Tensor) -> float:
    largest = max(abs(float(end)) for end in torch.aminmax(tensor)) if tensor.numel() else 0.0
    if largest == 0:
        return 0.0
    if 1e-140 < largest < 1e140:
        return float(torch.linalg.vector_norm(tensor))
    # Scaled before squaring: gradients of tiny magnitude must not underflow.
    return float(torch.linalg.vector_norm(tensor / largest)) * largest


def _item(tensor: torch.Tensor, index: tuple[int, ...]) -> float:
    return float(tensor.detach()[index])


def _short(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown}, ... ({len(values)} in all)"
