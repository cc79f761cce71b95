"""`sr-kernels evaluate`: Y-PSNR and SSIM of a network on a folder of images."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sr_kernels._files import whole_or_nothing
from sr_kernels.cli import console, network
from sr_kernels.cli.errors import Failure, UsageError

NAME = "evaluate"
SUMMARY = "measure PSNR and SSIM of a network on a folder of images"
DESCRIPTION = """\
Measure a network as the literature does: PSNR (dB) and SSIM of the luma (ITU-R BT.601) against
8-bit images, output rounded to 8 bits, a border as wide as the scale left out. SSIM is that of its
authors (11x11 Gaussian window). Low-resolution images come from --lr, or are made as MATLAB's
imresize makes them, byte for byte.
"""
EPILOG = """\
examples:
  sr-kernels evaluate --weights mafdn_x4 --data Kodak24
  sr-kernels evaluate --weights ELAN_light_x4.pth --data Set5/HR --lr Set5/LR_bicubic/X4
  sr-kernels evaluate --bicubic --scale 4 --data Set5/HR     what MATLAB's bicubic gets
  sr-kernels evaluate --weights run/best.pt --data Kodak24 --csv kodak.csv

data:
  Images are cut to a multiple of the scale. A low-resolution image (--lr) has the name of its
  original, or that with x4 (X4, _x4, -x4) behind it; a wrong size is an error.

figures:
  They can be held against published ones where the images, the low-resolution images, the border
  and the luma are the same, as they are here; figures of RGB, or with the border, are others. The
  mean is that of the decibels, as in the literature. On Set5 x4 bicubic has 28.43 dB, the published
  lightweight networks 32 to 32.5. Choose between checkpoints by other images than those that you
  report.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="weights that come with the package (mafdn_x4, ...), a file of weights, or a training "
        "checkpoint",
    )
    what.add_argument("--bicubic", action="store_true", help="bicubic interpolation instead")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="high-resolution images"
    )
    parser.add_argument("--lr", type=Path, metavar="FOLDER", help="their low-resolution images")
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4), help="needed for --bicubic; else the network's own"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to a file as well")
    network.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from sr_kernels.models.evaluate import read_pairs, score

    if arguments.csv is not None and (arguments.csv.is_dir() or not arguments.csv.parent.is_dir()):
        raise Failure(
            f"--csv {arguments.csv} cannot be written: expected a file in a folder that is there"
        )

    scale, enlarge = _enlarger(arguments)
    try:
        reading = console.Progress("reading images")
        pairs = read_pairs(arguments.data, arguments.lr, scale, reading)
        rows = []
        progress = console.Progress("evaluating")
        for name, (low, high) in pairs:
            rows.append((name, *score(enlarge(low), high, scale)))
            console.say(f"{name:24} {rows[-1][1]:7.3f} dB   SSIM {rows[-1][2]:.4f}")
            progress(len(rows), len(pairs))
    except (OSError, ValueError) as error:
        raise Failure(str(error)) from error
    mean = [sum(row[i] for row in rows) / len(rows) for i in (1, 2)]
    console.say(f"{f'mean of {len(rows)}':24} {mean[0]:7.3f} dB   SSIM {mean[1]:.4f}")
    if arguments.csv is not None:
        _write(arguments.csv, [*rows, ("mean", *mean)])
    return 0


def _enlarger(arguments: argparse.Namespace) -> tuple[int, Callable[[Any], Any]]:
    """(scale, 8-bit image -> 8-bit image)"""
    from sr_kernels.models import PRETRAINED, evaluate, imresize

    if arguments.bicubic:
        if arguments.scale is None:
            raise UsageError("--bicubic needs --scale 2, 3 or 4")
        scale: int = arguments.scale
        return scale, lambda low: imresize.upscale(low, scale)
    shipped = arguments.weights in PRETRAINED
    net = network.load(
        model=arguments.weights if shipped else None,
        scale=arguments.scale,
        weights=None if shipped else arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
    )
    return net.scale, lambda low: evaluate.upscale(net, low)


def _write(path: Path, rows: list[tuple[str, float, float]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("image", "psnr_y", "ssim_y"), *rows])
    try:
        with whole_or_nothing(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror or error}") from error
