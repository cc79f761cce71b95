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
folded, in half precision: 1.3 MB of ELAN-light, 1.2 MB of MAFDN. `sr-kernels upscale --weights`,
`sr-kernels evaluate --weights` and `sr_kernels.models.load_checkpoint` read the file. Instead of a
checkpoint any file of weights of these networks can be given.
"""
EPILOG = """\
examples:
  sr-kernels export-weights run/best.pt elan_light_x4.safetensors
  sr-kernels export-weights run/last.pt elan_light_x4.safetensors --float32
  sr-kernels evaluate --weights elan_light_x4.safetensors --data Set5/HR
  sr-kernels upscale photo.png --weights elan_light_x4.safetensors

best.pt is the state of the best validation, last.pt that of the last step; `sr-kernels evaluate
--weights run/last.pt` measures either as it is.
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
