"""What `sr-kernels tune` does: finds the fastest configuration of each kernel on one device.

A *problem* is an operator on tensors. Running it shows which configurations it asks for
(`_configs.recorded`); for each key, one entry after another of the configuration is varied and the
fastest kept, until a round changes nothing. A configuration that the device cannot start is
skipped (where that is the default, the search begins at the smallest tiles). One whose result
differs from the first one's is a defect: it is named and not taken, and so is a problem that raises
anything else; the others are tuned all the same. The timer is an argument, so that the search
itself is tested without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

import sr_kernels
from sr_kernels.triton._configs import (
    DEFAULTS,
    Config,
    Device,
    Key,
    TunedFile,
    checked,
    forced,
    recorded,
)

Tensor = torch.Tensor
Say = Callable[[str], None]

# The values that are tried for each entry of a configuration.
CHOICES: dict[str, tuple[int, ...]] = {
    "BLOCK_P": (16, 32, 64, 128, 256),
    "BLOCK_O": (16, 32, 64, 128),
    "BLOCK_I": (16, 32, 64, 128),
    "BLOCK_R": (16, 32, 64),
    "BLOCK_Q": (16, 32, 64, 128),
    "BLOCK_K": (16, 32, 64, 128),
    "BLOCK_C": (4, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
ROUNDS = 3
# A configuration must be this much faster to be taken: noise is not an improvement.
GAIN = 0.98


@dataclass(frozen=True)
class Problem:
    """An operator on tensors: its name, and a call that returns the tensors it computes."""

    name: str
    run: Callable[[], Sequence[Tensor]]


def tune(
    problems: Sequence[Problem],
    device: Device,
    timer: Callable[[Callable[[], Any]], float],
    *,
    unfit: tuple[type[Exception], ...] = (),
    say: Say = lambda text: None,
    save: Callable[[TunedFile], None] = lambda tuned: None,
) -> tuple[TunedFile, int]:
    """The fastest configurations for the kernels of these problems, and the number of defects.

    timer: time of one call of the function it is given, in any unit.
    unfit: what is raised for a configuration that the device cannot run.
    save: is given what was found so far, after each problem that added to it.

    Defects are configurations that give another result than the first, and problems that raise
    what is not in `unfit`.
    """
    tuned, defects = TunedFile(device, triton=triton.__version__), 0

    def defect(text: str) -> None:
        nonlocal defects
        defects += 1
        say(text)

    for problem in problems:
        known = len(tuned.entries)
        try:
            _tune(problem, tuned.entries, timer, unfit, say, defect)
        except Exception as error:  # no memory, a compiler's: the problems behind it may do
            reason = (str(error).splitlines() or [""])[0]
            defect(f"{problem.name}: failed: {type(error).__name__}: {reason}")
        if len(tuned.entries) > known:
            save(tuned)
    return tuned, defects


def _tune(
    problem: Problem,
    entries: dict[Key, Config],
    timer: Callable[[Callable[[], Any]], float],
    unfit: tuple[type[Exception], ...],
    say: Say,
    defect: Say,
) -> None:
    """Adds to `entries` what this problem asks for and is not there yet."""
    found = _first_run(problem, entries, unfit)
    if found is None:
        say(f"{problem.name}: does not fit this device, even with the smallest tiles")
        return
    expected, keys, smallest = found
    for key in keys:
        if key in entries:
            continue
        start = smallest.get(key, DEFAULTS[key[0]])
        others = {**smallest, **entries}
        best, time = _search(problem, key, start, expected, others, timer, unfit, defect)
        if time == float("inf"):
            say(f"{problem.name}: {key[0]} {key[1]} {dict(key[2])}: no configuration can be used")
            continue
        entries[key] = best
        say(f"{problem.name}: {key[0]} {key[1]} {dict(key[2])}: {time:.4g} with {best}")


def _first_run(
    problem: Problem, entries: dict[Key, Config], unfit: tuple[type[Exception], ...]
) -> tuple[Sequence[Tensor], list[Key], dict[Key, Config]] | None:
    """The problem's result, the keys it asks for, and the smallest tiles for those of them whose
    default the device cannot run; None if it cannot run these either."""
    smallest: dict[Key, Config] = {}
    while True:
        with forced({**smallest, **entries}), recorded() as keys:
            try:
                return problem.run(), keys, smallest
            except unfit:
                # The kernel that did not start is the one that asked last.
                if not keys or keys[-1] in smallest or keys[-1] in entries:
                    return None
        key = keys[-1]
        smallest[key] = {
            name: value if name == "num_warps" else min(value, *CHOICES[name])
            for name, value in DEFAULTS[key[0]].items()
        }


def _search(
    problem: Problem,
    key: Key,
    start: Config,
    expected: Sequence[Tensor],
    others: dict[Key, Config],
    timer: Callable[[Callable[[], Any]], float],
    unfit: tuple[type[Exception], ...],
    defect: Say,
) -> tuple[Config, float]:
    """The fastest configuration and its time, which is infinite where none can be used."""
    unequal: list[Config] = []

    def measure(config: Config) -> float:
        if config in unequal:
            return float("inf")
        with forced({**others, key: config}):
            try:
                result = problem.run()
            except unfit:
                return float("inf")
            if not _equal(result, expected):
                unequal.append(config)
                defect(
                    f"{problem.name} gives another result with {config} than with the first "
                    "configuration: a defect of the kernel or of Triton; please report it"
                )
                return float("inf")
            return timer(problem.run)

    best = dict(start)
    time = measure(best)
    for _ in range(ROUNDS):
        before = best
        for name in best:
            for value in CHOICES[name]:
                config = checked(key[0], {**best, name: value})
                if config != best and (candidate := measure(config)) < GAIN * time:
                    best, time = config, candidate
        if best == before:
            break
    return best, time


def _equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = 1e-4 if theirs.dtype == torch.float32 else 2e-2
        difference = torch.linalg.vector_norm(ours.float() - theirs.float())
        if not difference <= tolerance * torch.linalg.vector_norm(theirs.float()) + 1e-6:
            return False
    return True


def network_problems(
    device: torch.device, dtypes: Sequence[torch.dtype], size: tuple[int, int] = (192, 320)
) -> Iterator[Problem]:
    """The operators of ELAN-light, ELAN and MAFDN at their channel counts, forward and both."""
    h, w = size
    for dtype in dtypes:
        generator = torch.Generator(device).manual_seed(0)

        def make(
            *shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator
        ) -> Tensor:
            scale = 0.5 if len(shape) < 4 or shape[2:] == (h, w) else shape[1] ** -0.5
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(dtype)

        def image(channels: int, make: Callable[..., Tensor] = make) -> Tensor:
            return make(1, channels, h, w).contiguous(memory_format=torch.channels_last)

        calls: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = []
        for c in (60, 180):
            block = (image(c), make(2 * c, c, 1, 1), make(2 * c), make(c, 2 * c, 1, 1), make(c))
            conv = (image(c), make(c, c, 1, 1), make(c))
            calls += [
                (f"shift_conv_block {c}", sr_kernels.shift_conv_block, block),
                (
                    f"shift_conv2d {c}",
                    partial(sr_kernels.shift_conv2d, activation="gelu"),
                    conv,
                ),
                (f"grouped_window_attention {c}", sr_kernels.grouped_window_attention,
                 (image(2 * c),)),
            ]  # fmt: skip
        table = make(225, 6)
        calls += [
            (
                "window_attention 60",
                lambda q, k, v, bias: sr_kernels.window_attention(
                    q, k, v, window=8, shift=4, num_heads=6, bias=bias, mask=True
                ),
                (image(60), image(60), image(60), table),
            ),
            (
                "pixel_spatial_attention 26",
                sr_kernels.pixel_spatial_attention,
                (image(26), make(26, 26, 1, 1), make(26), make(1, 2, 7, 7), make(1)),
            ),
            (
                "channel_attention 104",
                partial(sr_kernels.channel_attention, statistic="contrast"),
                (image(104), make(6, 104, 1, 1), make(6), make(104, 6, 1, 1), make(104)),
            ),
            (
                "gated_conv1x1 104",
                sr_kernels.gated_conv1x1,
                (image(104), make(1, 104, 1, 1), make(52, 104, 1, 1), make(52)),
            ),
        ]
        conv3x3 = (image(52), make(52, 52, 3, 3), make(52))
        yield Problem(f"conv3x3 52 {dtype}", partial(_forward, sr_kernels.conv3x3, conv3x3))
        for name, function, tensors in calls:
            yield Problem(f"{name} {dtype} forward", partial(_forward, function, tensors))
            yield Problem(f"{name} {dtype} both", partial(_both, function, tensors))


def _forward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad(), sr_kernels.use_backend("triton"):
        return [function(*tensors)]


def _both(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with sr_kernels.use_backend("triton"):
        out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def tune_gpu(
    index: int,
    dtypes: Sequence[torch.dtype],
    say: Say = lambda text: None,
    save: Callable[[TunedFile], None] = lambda tuned: None,
) -> tuple[TunedFile, int]:
    """`tune` on GPU ``index``: median times of repeated calls with a cold cache."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    def timer(run: Callable[[], Any]) -> float:
        return float(triton.testing.do_bench(run, return_mode="median"))

    device = torch.device("cuda", index)
    unfit = (OutOfResources, CompilationError, PTXASError)
    problems = list(network_problems(device, dtypes))
    return tune(problems, Device.of(index), timer, unfit=unfit, say=say, save=save)
