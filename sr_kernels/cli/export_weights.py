"""`sr-kernels export-weights`: a file of weights from a training checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from sr_kernels.cli import console
from sr_kernels.cli.errors import Failure, UsageError

NAME = "export-weights"
SUMMARY = "make a file of weights from a training checkpoint"
DESCRIPTION = """\
Write the averaged weights of a training checkpoint as safetensors, over-parameterised convolutions
folded, in half precision. `sr-kernels upscale --weights` and `load_checkpoint` read the file.
"""
EPILOG = """\
example:
  sr-kernels export-weights run/best.pt elan_light_x4.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="last.pt or best.pt")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="the file to write")
    parser.add_argument("--float32", action="store_true", help="do not round to half precision")
    parser.add_argument("--overwrite", action="store_true", help="replace WEIGHTS if it exists")


def run(arguments: argparse.Namespace) -> int:
    from sr_kernels.models.training import export_weights

    if arguments.weights.suffix != ".safetensors":
        raise UsageError(f"{arguments.weights}: expected a name that ends in .safetensors")
    if arguments.weights.exists() and not arguments.overwrite:
        raise Failure(f"{arguments.weights} exists; --overwrite replaces it")
    try:
        count = export_weights(arguments.checkpoint, arguments.weights, half=not arguments.float32)
    except (OSError, ValueError) as error:
        raise Failure(str(error)) from error
    size = arguments.weights.stat().st_size
    console.say(f"{arguments.weights}: {count} values, {size / 1e6:.2f} MB")
    return 0
