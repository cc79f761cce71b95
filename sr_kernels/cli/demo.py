"""`sr-kernels demo`: upscales the photograph that comes with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from sr_kernels.cli import console, network, paths, upscale
from sr_kernels.cli.errors import Failure

NAME = "demo"
SUMMARY = "upscale a small photograph that comes with the package"
DESCRIPTION = """\
Upscale a small photograph that comes with the package, with the weights that come with it, and say
what was written, by which kernels, and how long it took.
"""
EPILOG = """\
example:
  sr-kernels demo                write ./demo_x4.png
  sr-kernels demo -o cat.webp    under another name
"""
PHOTOGRAPH = Path(__file__).parent / "assets" / "cat.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", metavar="OUTPUT", help="the file to write (default: demo_x4.png)"
    )
    network.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if not PHOTOGRAPH.is_file():
        raise Failure(f"the photograph {PHOTOGRAPH} is missing; install the package again")
    net = network.load(
        model=None,
        scale=None,
        weights=None,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
    )
    output = arguments.output or f"demo_x{net.scale}.png"
    job = paths.make_plan(PHOTOGRAPH, output, None, f"_x{net.scale}").jobs[0]
    written = upscale.upscale_file(net, job, upscale.Options())
    console.say(f"done in {written.seconds:.2f} s with {upscale.describe(net)}")
    console.say(
        f"Look at {job.target} beside {PHOTOGRAPH}, then try your own: sr-kernels upscale PHOTO.jpg"
    )
    return 0
