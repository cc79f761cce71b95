"""`sr-kernels bench`: measures the kernels and networks against everything else that can run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sr_kernels.cli import console
from sr_kernels.cli.errors import Failure, UsageError

NAME = "bench"
SUMMARY = "measure operators and networks against stock PyTorch and other runtimes"
DESCRIPTION = """\
Measure operators and networks against stock PyTorch, torch.compile, library kernels, ONNX Runtime
and OpenVINO. A provider is verified against the definition in float64 before it gets a time; all
are timed in turn, on a CPU each in a process of its own; rows are in OUT/results.csv as soon as a
case's first samples are taken, so an interrupted run loses no row already measured. Run it on
an idle machine.

Needs the extra packages of sr_kernels[bench].
"""
EPILOG = """\
examples:
  sr-kernels bench --quick                                 7 minutes: what `make bench` runs
  sr-kernels bench --op elan_light_x4 --size 180x320       one network, all providers
  sr-kernels bench --op shift_conv_block --channels 60 --mode both --size 4x64x64
  sr-kernels bench --op elan_light_x4 --weights elan_light_x4=ELAN_light_x4.pth
  sr-kernels bench --list                                  what there is to measure
  sr-kernels bench --op imdn_x4 --heap system              as a program meets it that sets nothing
  sr-kernels bench --plot                                  charts of OUT/results.csv, no measuring
  sr-kernels bench --agree FOLDER FOLDER                   do two runs (--out FOLDER) say the same?

A row's speed-up is the time of the fastest provider that is not ours over the row's own. "of
floor" is the least time that the machine needs for the bytes, products or exponentials of the
case, whichever is slowest, by ceilings measured in the same run, over the row's time.
"""
DEFAULT_OUT = Path("benchmarks") / "results"
QUICK_SECONDS, FULL_SECONDS = 0.6, 3.0
QUICK_ROUNDS = 1
# The arguments that ask for a measurement.
_MEASURING = (
    *("op", "size", "channels", "mode", "dtype", "provider", "quick", "list"),
    *("device", "threads", "seconds", "no_memory", "heap", "weights", "image"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured (default: everything that is listed)")
    what.add_argument("--op", nargs="+", default=[], metavar="NAME", help="operators, networks")
    what.add_argument(
        "--size",
        "--shape",
        nargs="+",
        default=[],
        metavar="HxW",
        help="sizes of the feature maps, or of a network's input: 180x320, or 4x64x64 for a batch",
    )
    what.add_argument(
        "--channels", nargs="+", type=int, default=[], metavar="C", help="channels of the maps"
    )
    what.add_argument(
        "--mode",
        nargs="+",
        choices=("forward", "backward", "both"),
        default=[],
        help="forward without gradients, backward alone, or both",
    )
    what.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "float16", "bfloat16", "float16_autocast", "bfloat16_autocast"),
        default=["float32"],
        metavar="DTYPE",
        help="float32 (default), float16, bfloat16; of networks float16_autocast and "
        "bfloat16_autocast, too: float32 weights under torch.autocast",
    )
    what.add_argument(
        "--provider",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these: eager, compile, compile_max_autotune, sdpa, flex, conv2d, "
        "conv2d_depthwise, onnxruntime, openvino, cpu, cpu_plan, cuda, triton, patched; the form "
        "NAME_channels_last is meant too",
    )
    what.add_argument(
        "--quick",
        action="store_true",
        help="few cases, short samples, and what compiles for minutes (torch.compile of whole "
        "networks, FlexAttention on groups on a CPU) only with --op or --provider",
    )
    what.add_argument("--list", action="store_true", help="list the cases, and measure nothing")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    how.add_argument(
        "--threads", type=int, metavar="N", help="threads of every provider (default: all cores)"
    )
    how.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"of samples per provider (default: {FULL_SECONDS:g}, with --quick "
        f"{QUICK_SECONDS:g}); never fewer than 12 samples, or 6 with --quick and of calls that "
        "take seconds",
    )
    how.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    how.add_argument(
        "--heap",
        choices=("kept", "system"),
        default="kept",
        help="what the C library does with memory that a process frees (CPU): keep it, so that two "
        "runs meet the same, or what a program meets that sets nothing, which is often page faults "
        "in every call (default: kept)",
    )
    how.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NETWORK=FILE",
        help="weights of a network, such as elan_light_x4=ELAN_light_x4.pth",
    )
    how.add_argument("--image", type=Path, metavar="FILE", help="the photograph for networks")
    where = parser.add_argument_group("results")
    where.add_argument(
        "--agree",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="measure nothing: compare the tables of two runs (two folders given to --out), and "
        "fail unless 9 of 10 rows agree: their intervals of 20 %% to 80 %% overlap",
    )
    where.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="FOLDER",
        help=f"where results.csv and charts are (default: {DEFAULT_OUT})",
    )
    where.add_argument(
        "--plot",
        action="store_true",
        help="draw the charts of OUT/results.csv (after measuring, if anything above is given); in "
        "a checkout, also renew the figures in README.md",
    )


def run(arguments: argparse.Namespace) -> int:
    from sr_kernels.benchmarks import cases

    try:
        return _run(arguments)
    except cases.MissingExtra as error:
        raise Failure(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    from sr_kernels.benchmarks import agree, cases, plot

    untouched = _defaults()

    def given(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(arguments, name) != getattr(untouched, name)]

    if arguments.agree:
        if others := given((*_MEASURING, "out", "plot")):
            options = ", ".join("--" + name.replace("_", "-") for name in others)
            raise UsageError(f"--agree measures nothing, and goes without {options}")
        for folder in arguments.agree:
            if not folder.is_dir():
                what = "is not a folder" if folder.exists() else "does not exist"
                raise Failure(f"--agree: {folder} {what}")
        if arguments.agree[0].samefile(arguments.agree[1]):
            raise UsageError(f"--agree: {arguments.agree[0]} twice; expected two folders")
        try:
            lines, share = agree.compare(*arguments.agree)
        except (OSError, ValueError) as error:
            raise Failure(str(error)) from error
        console.say("\n".join(lines))
        if share < agree.ENOUGH:
            raise Failure(f"fewer than {agree.ENOUGH:.0%} of the rows agree")
        return 0
    if given(_MEASURING) or not arguments.plot:
        for size in arguments.size:
            try:
                cases.parse_size(size)
            except ValueError as error:
                raise UsageError(f"--size: {error}") from error
        try:
            chosen = cases.select(
                ops=arguments.op,
                sizes=arguments.size,
                channels=arguments.channels,
                modes=arguments.mode,
                dtypes=arguments.dtype,
                device=arguments.device,
                quick=arguments.quick,
            )
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        if arguments.list:
            for case in chosen:
                console.say(str(case))
            return 0
        if not chosen:
            raise UsageError("no case is left by these filters; see: sr-kernels bench --list")
        _measure(arguments, chosen)
    if arguments.plot:
        try:
            files = plot.draw(arguments.out)
        except ValueError as error:
            raise Failure(str(error)) from error
        for file in files:
            console.say(f"wrote {file}")
    return 0


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([])


def _measure(arguments: argparse.Namespace, chosen: list[Any]) -> None:
    import torch
    from PIL import Image

    from sr_kernels.benchmarks import measure, table
    from sr_kernels.benchmarks import run as runs

    if arguments.device == "cuda" and arguments.heap != "kept":
        raise UsageError("--heap system is of a CPU's processes; --device is cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: torch finds no CUDA GPU; `sr-kernels env` tells more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = cores or 1 if arguments.threads is None else arguments.threads
    if threads < 1:
        raise UsageError(f"--threads is {threads}; expected at least 1")
    seconds = arguments.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if arguments.quick else FULL_SECONDS
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"--seconds is {seconds}; expected a number of seconds, at least 0")
    for count in arguments.channels:
        if count < 1:
            raise UsageError(f"--channels: {count} is not a number of channels")
    image = arguments.image or runs.PHOTOGRAPH
    try:
        with Image.open(image):
            pass
    except OSError as error:
        raise Failure(f"--image: {image} cannot be read as a picture: {error}") from error
    try:
        table.read(arguments.out)  # before anything is measured that could not be added to it
    except (OSError, ValueError) as error:
        raise Failure(str(error)) from error
    settings = runs.Settings(
        threads=threads,
        seconds=seconds,
        memory=not arguments.no_memory,
        providers=tuple(arguments.provider),
        weights=_weights(arguments.weights, image),
        image=image,
        least=QUICK_ROUNDS if arguments.quick else measure.MIN_ROUNDS,
        slow=not arguments.quick or bool(arguments.op),
        heap=arguments.heap,
    )
    offered = sorted(_offered(chosen)) if arguments.provider else []
    for name in arguments.provider:
        if name not in offered:
            raise UsageError(
                f"--provider: {name!r} is none of these cases'; they have {', '.join(offered)}"
            )
    try:  # what could not be written is not measured
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"--out: cannot write to {arguments.out}: {error}") from error
    if not os.access(arguments.out, os.W_OK):
        raise Failure(f"--out: cannot write to {arguments.out}")
    rows, failed = runs.run(
        chosen,
        settings,
        arguments.out,
        say=console.say,
        progress=console.Progress,
    )
    timed = {_case_of(row) for row in rows if row.median_ms is not None}
    count = sum(row.median_ms is not None for row in rows)
    console.say(f"\n{count} timed rows are in {arguments.out / 'results.csv'}")
    # A provider may have nothing to do with a case; one that tried and failed is a reason.
    tried = {_case_of(row) for row in rows if row.status in ("failed", "wrong")}
    lost = [
        case for case in chosen if case in failed or not timed or _case_of(case) in tried - timed
    ]
    if lost:
        raise Failure(
            f"{len(lost)} of {len(chosen)} cases could not be measured; the reasons are above"
        )


def _case_of(item: Any) -> tuple[str, str, str, str]:
    """What a case and its rows have in common; a run has one device."""
    return item.op, item.shape, item.dtype, item.mode


def _offered(chosen: list[Any]) -> set[str]:
    from sr_kernels.benchmarks import run as runs

    found: set[str] = set()
    for case in {case.op: case for case in chosen}.values():
        try:
            found |= runs.provider_names(case)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{case}: {error}") from error
    return found


def _weights(texts: list[str], image: Path) -> dict[str, Path]:
    from sr_kernels.benchmarks.cases import Case
    from sr_kernels.benchmarks.networks import NETWORKS, load

    found = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or name not in NETWORKS:
            raise UsageError(
                f"--weights: {text!r} is not NETWORK=FILE with a network of {', '.join(NETWORKS)}"
            )
        if not Path(file).is_file():
            what = "is not a file" if Path(file).exists() else "does not exist"
            raise Failure(f"--weights: {file} {what}")
        try:
            load(Case(name, 1, 0, 16, 16), Path(file), image)
        except (OSError, ValueError) as error:
            raise Failure(f"--weights: {error}") from error
        found[name] = Path(file)
    return found
