"""`sr-kernels tune`: measures tile shapes of the Triton kernels on this machine's GPU."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from sr_kernels.cli import console
from sr_kernels.cli.errors import Failure
from sr_kernels.cli.network import DTYPES

NAME = "tune"
SUMMARY = "find the fastest tiles of the Triton kernels on this GPU"
DESCRIPTION = """\
Measure tile shapes, warps and pipeline stages of the Triton kernels on this machine's GPU, at the
channel counts and windows of the networks, and write the fastest to a file that the kernels read
from then on. Without such a file they use a default, or the file of a similar GPU. The file does
not depend on the size of pictures. It is written after each operator: an interrupted run keeps
what it has found. Run it on an idle GPU.
"""
EPILOG = """\
examples:
  sr-kernels tune                              float16, into the cache folder of this user
  sr-kernels tune --dtype float16 float32
  sr-kernels tune --output configs/            then set SR_KERNELS_TRITON_CONFIGS=configs/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=["float16"], help="default: float16"
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="GPU N (default: 0)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (default: the user's cache)"
    )


def run(arguments: argparse.Namespace) -> int:
    from sr_kernels import _library

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise Failure(
            "tune measures kernels on a GPU, and torch finds none here. Nothing needs to be done: "
            "without a file the Triton kernels use their default tiles"
        )
    if not 0 <= arguments.device < count:
        raise Failure(f"--device {arguments.device}: there are GPUs 0 to {count - 1}")
    kernels = _library.triton()
    if not kernels.loaded:
        raise Failure(f"the Triton kernels cannot run: {kernels.error}")
    if kernels.interpreted:
        raise Failure("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it")
    from sr_kernels.triton import _configs, tuning

    # What can fail on the way to the file fails before the measuring, not after it.
    folder = arguments.output or _configs.cache_folder()
    path = folder / _configs.file_name(_configs.Device.of(arguments.device).name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot write to {folder}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise Failure(f"cannot write to {folder}")
    before = {}
    if path.exists():  # what was tuned before for other dtypes or sizes stays
        try:
            before = _configs.TunedFile.read(path).entries
        except ValueError as error:
            raise Failure(f"{error}. Move it away, or name another folder: --output") from error
    dtypes = [DTYPES[name] for name in arguments.dtype]
    written = False

    def save(tuned: _configs.TunedFile) -> None:
        nonlocal written
        replace(tuned, entries={**before, **tuned.entries}).write(path)
        written = True

    try:
        _, defects = tuning.tune_gpu(arguments.device, dtypes, say=console.say, save=save)
    finally:  # Ctrl-C too
        if written:
            console.say(f"wrote {path}")
    if defects:
        raise Failure(f"{defects} configurations or operators had to be left out; see above")
    if not written:
        raise Failure("nothing could be tuned; the reasons are above")
    return 0
