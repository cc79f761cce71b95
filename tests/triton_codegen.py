"""Compiles every Triton kernel without a GPU and reads what came out.

The launchers of `sr_kernels.triton` run on CPU tensors with `launch` replaced by a function that
notes kernel, arguments and constants; each note is then compiled for a target and its registers,
shared memory, spills and tensor-core instructions are read with the tools that Triton's wheel
carries. No kernel is started.

    python tests/triton_codegen.py --write      writes the table that the test holds results against

The table belongs to one version of Triton ("triton"); "spills" states what others spill.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sr_kernels.triton import (
    attention_block,
    attention_gates,
    conv3x3,
    shift_conv,
    window_attention,
)
from sr_kernels.triton._launch import compile_options

TABLE = Path(__file__).with_name("triton_codegen.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODULES = (shift_conv, window_attention, attention_gates, attention_block, conv3x3)


@dataclass(frozen=True)
class Launch:
    """One kernel start: what decides the code that is compiled for it."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int | bool], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches within the block instead of starting them, each once."""
    launches: list[Launch] = []

    def record(kernel, grid, *arguments, num_warps=4, num_stages=2, **constants):
        names = kernel.arg_names
        signature, fixed, divisible = [], dict(constants), []
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                kind = {
                    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
                }[value.dtype]  # fmt: skip
                signature.append((name, f"*{kind}"))
                divisible.append(name)
            elif value is None or (isinstance(value, int) and value == 1):
                fixed[name] = value  # as Triton specialises them
            elif isinstance(value, int):
                signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
                if value % 16 == 0:
                    divisible.append(name)
            else:
                signature.append((name, "fp32"))
        signature += [(name, "constexpr") for name in fixed]
        options = tuple(compile_options(num_warps, num_stages).items())
        fixed_items = tuple(sorted(fixed.items(), key=lambda item: item[0]))
        note = Launch(kernel, tuple(signature), fixed_items, tuple(divisible), options)
        if note not in launches:
            launches.append(note)

    homes = [sys.modules["sr_kernels.triton._launch"], *MODULES]
    before = {home: home.launch for home in homes if hasattr(home, "launch")}
    try:
        for home in before:
            home.launch = record
        yield launches
    finally:
        for home, launch in before.items():
            home.launch = launch


def compiled(launch: Launch, target: GPUTarget):
    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants}
    signature = dict(launch.signature)
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in launch.divisible},
    )
    return triton.compile(source, target=target, options=dict(launch.options))


def measure(launch: Launch, target: GPUTarget) -> dict[str, int]:
    """Registers and stack bytes a thread, shared bytes a block, tensor-core instructions."""
    binary = compiled(launch, target)
    shared = binary.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name) if has_product(launch) else ""
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1])
        + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": shared,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA)\b", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def feature(channels, h=48, w=64, dtype=torch.float16, n=2):
    x = torch.empty((n, channels, h, w), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def has_product(launch: Launch) -> bool:
    return "PRECISION" in dict(launch.constants)


def gate() -> dict[str, dict[str, dict[str, int]]]:
    """{label: {target: figures}}, of launches with one label the worst. For sm_90: every launch in
    float16, the first of each kernel in bfloat16, and in float32, whose products must be exact, the
    first of each that has a product. For sm_80: the first of each kernel, in the same dtypes."""
    figures: dict[str, dict[str, dict[str, int]]] = {}
    launches = all_launches()
    first = [first_of_each(launches), first_of_each(all_launches(torch.bfloat16))]
    exact = [n for n in first_of_each(all_launches(torch.float32)) if has_product(n)]
    for target, chosen in (
        ("sm_90", [*launches, *first[1], *exact]),
        ("sm_80", [*first[0], *first[1], *exact]),
    ):
        for launch in chosen:
            entry = figures.setdefault(label(launch), {})
            found = measure(launch, TARGETS[target])
            entry[target] = worst(found, entry.get(target, found))
    return figures


def worst(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: (min if name == "tensor_core" else max)(a[name], b[name]) for name in a}


def first_of_each(launches: list[Launch]) -> list[Launch]:
    """The first launch of each kernel."""
    return list({launch.name: launch for launch in reversed(launches)}.values())


def all_launches(dtype=torch.float16) -> list[Launch]:
    """The launches of every operator, at the channel counts of ELAN-light, ELAN and MAFDN; those of
    ELAN-light come first."""

    def weight(*size):
        return torch.empty(size, dtype=dtype)

    def x(channels):
        return feature(channels, dtype=dtype)

    yes = (True,) * 5
    relu, pattern = (1, 0.0), (0, 5)
    windows = (8, 8, 4, 4, 6, 0.3, True)
    groups = ([4, 8, 16], True)
    s, a = shift_conv, window_attention
    with recorded() as launches:
        for c in (60, 180):
            square, vector = weight(c, c, 1, 1), weight(c)
            s.shift_conv2d(x(c), square, vector, x(c), *relu, *pattern)
            s.shift_conv2d_backward(x(c), x(c), square, vector, *relu, *pattern, *yes[:3])
            block = (weight(2 * c, c, 1, 1), weight(2 * c), weight(c, 2 * c, 1, 1))
            s.shift_conv_block(x(c), *block, vector, *relu, True, *pattern)
            s.shift_conv_block_backward(x(c), x(c), *block, *relu, True, *pattern, *yes)
            lse, table = torch.empty((2, 6, 48, 64)), weight(225, 6)
            a.window_attention(x(c), x(c), x(c), table, *windows)
            a.apply_window_scores(x(c), x(c), lse, x(c), table, *windows)
            a.window_attention_backward(x(c), x(c), x(c), lse, x(c), table, *windows, *yes[:4])
            lse = torch.empty((2, 3, 48, 64))
            a.grouped_window_attention(x(2 * c), *groups)
            a.apply_grouped_window_scores(x(2 * c), lse, x(c), *groups)
            a.grouped_window_attention_backward(x(c), x(2 * c), x(c), lse, *groups)
            reuse = (x(c), x(2 * c), lse, x(c), x(c))
            a.apply_grouped_window_scores_backward(*reuse, *groups, True, True)
            projections = (weight(2 * c, c, 1, 1), weight(2 * c), square, vector)
            attention_block.grouped_attention_block(x(c), *projections, *groups, True)
        g = attention_gates
        pixel = (weight(52, 52, 1, 1), weight(52))
        spatial = (weight(1, 2, 7, 7), weight(1))
        g.pixel_spatial_attention(x(52), *pixel, *spatial)
        g.pixel_spatial_attention_backward(x(52), x(52), *pixel, *spatial, *yes)
        gate = (weight(6, 104, 1, 1), weight(6), weight(104, 6, 1, 1), weight(104), 1)
        g.channel_attention(x(104), *gate)
        g.channel_attention_backward(x(104), x(104), *gate, *yes)
        tail = (weight(2, 104, 1, 1), weight(52, 104, 1, 1))
        g.gated_conv1x1(x(104), *tail, weight(52), x(52))
        g.gated_conv1x1_backward(x(52), x(104), *tail, True, True, True, True)
        conv3x3.conv3x3(x(52), weight(52, 52, 3, 3), weight(52), x(52), 2, 0.05)
        conv3x3.conv3x3(x(180), weight(180, 180, 3, 3), weight(180), None, 0, 0.0)
    return launches


def label(launch: Launch) -> str:
    """What tells launches of one kernel apart: its constants and types."""
    constants = dict(launch.constants)
    if "WH" in constants:
        parts = [f"{constants['WH']}x{constants['WW']}"]
        parts += [f"D={constants['D']}"] if "D" in constants else []
        parts += [n for n in ("REUSE", "SHARED") if constants.get(n)]
    else:
        shown = ("EPILOGUE", "PATTERN", "C_IN", "C_OUT", "C", "HAS_GATE", "PRODUCT", "SCALE")
        shown += ("OFFSET", "SLOPE", "SIZE", "A", "B", "R")
        parts = [f"{n}={int(constants[n])}" for n in shown if n in constants]
    kinds = sorted({kind.removeprefix("*") for _, kind in launch.signature if kind[0] == "*"})
    return f"{launch.name}[{','.join(parts)}|{','.join(kinds)}]"


def written(table: dict, found: dict[str, dict[str, dict[str, int]]]) -> dict:
    """The table after a run with the installed Triton: all figures with the version that the table
    belongs to; with another one, which is one end of the supported range, its spills alone."""
    version = triton.__version__
    if version == table["triton"]:
        return {**table, "kernels": found}
    spills = {
        name: {target: row["spills"] for target, row in rows.items() if row["spills"]}
        for name, rows in found.items()
    }
    row = {name: targets for name, targets in spills.items() if targets}
    return {**table, "spills": {**table["spills"], version: row}}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {sys.argv[0]} --write")
    table = written(json.loads(TABLE.read_text()), gate())
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
