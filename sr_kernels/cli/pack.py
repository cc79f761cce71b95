"""`sr-kernels pack`: training crops of many images in one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from sr_kernels.cli import console
from sr_kernels.cli.errors import Failure, UsageError

NAME = "pack"
SUMMARY = "pack crops of training images into one file"
DESCRIPTION = """\
Put crops of the images in the folders into one file, to train on a machine that has no images:
`sr-kernels train --data crops.zip`. The images are divided into squares; the most textured one of
each comes first, then the second of each, and so on, until the file is full; larger images have
their turn more often. The crops are kept without loss, as WebP in a ZIP archive.

The file serves x2, x3 and x4: low-resolution crops are made when it is read, as MATLAB's imresize
makes them. Where they come from elsewhere, --lr-data packs them, too, for the scale that they have.
"""
EPILOG = """\
examples:
  sr-kernels pack images/ textures/ -o crops.zip                at most 55 MiB
  sr-kernels pack DIV2K/HR -o crops.zip --size 500 --side 480
  sr-kernels pack HR/ --lr-data LR_real/X4 --scale 4 -o real_x4.zip
  python -m zipfile -e crops.zip crops/                         to look at them: crops/hr
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="FOLDER", help="training images")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write, .zip"
    )
    parser.add_argument(
        "--lr-data", nargs="+", metavar="FOLDER", help="their low-resolution images, if not bicubic"
    )
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4), help="between the two; needed for --lr-data alone"
    )
    parser.add_argument(
        "--size",
        type=float,
        default=55.0,
        metavar="MIB",
        help="largest size of the file (default: %(default)g MiB)",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=288,
        metavar="PIXELS",
        help="of a square, a multiple of 12, at least the patch to be trained with times the scale "
        "(default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(arguments: argparse.Namespace) -> int:
    from sr_kernels.models.training import pack
    from sr_kernels.models.training.packing import GRID

    target, side = arguments.output, arguments.side
    if target.suffix != ".zip":
        raise UsageError(f"--output {target}: expected a name that ends in .zip")
    if side < GRID or side % GRID:
        raise UsageError(f"--side {side}: expected a multiple of {GRID}")
    if not 0 < arguments.size * 2**20 < float("inf"):
        raise UsageError(f"--size {arguments.size}: expected a number > 0")
    if bool(arguments.lr_data) != (arguments.scale is not None):
        raise UsageError("--lr-data and --scale go together: expected both or neither")
    if target.exists() and not arguments.overwrite:
        raise Failure(f"{target} exists; --overwrite replaces it")
    if target.is_dir() or not target.parent.is_dir():
        raise Failure(f"{target} cannot be written: expected a file in a folder that is there")
    try:
        packed = pack(
            arguments.data,
            arguments.lr_data or [],
            target,
            scale=arguments.scale,
            limit=int(arguments.size * 2**20),
            side=side,
            note=console.note,
            reading=console.Progress("reading images"),
            writing=console.Progress("packing"),
        )
    except (OSError, ValueError) as error:
        raise Failure(str(error)) from error
    console.say(
        f"{target}: {packed.crops} crops of {packed.images} images, {packed.pixels / 1e6:.1f} "
        f"megapixels, {target.stat().st_size / 2**20:.1f} MiB"
    )
    return 0
