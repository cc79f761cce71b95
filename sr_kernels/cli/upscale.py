"""`sr-kernels upscale`: a picture, or a folder tree of pictures."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr_kernels.cli import console, images, network, paths, signals
from sr_kernels.cli.errors import Failure, UsageError

NAME = "upscale"
SUMMARY = "upscale a picture or a folder tree"
DESCRIPTION = """\
Upscale a picture, or every picture of a folder tree.

PNG, JPEG, WebP, TIFF and BMP are read and written, with 8 bits per channel, and with 16 in PNG
and TIFF. Grey stays grey. Transparency is upscaled beside the colours. The EXIF orientation is
applied; the colour profile (ICC) and the other EXIF data are kept. CMYK becomes RGB. Of an
animation or a document of several pages the first picture is taken. A result appears whole or not
at all.
"""
EPILOG = """\
examples:
  sr-kernels upscale photo.jpg                       photo_x4.png beside it
  sr-kernels upscale photo.jpg -o large.webp         the format is that of the name
  sr-kernels upscale photos -o large --format jpeg   a tree; large/ holds the same folders
  sr-kernels upscale photo.png --weights elan.pth    weights of your own
  sr-kernels upscale photo.png --tile 128            less memory

folders:
  Names become NAME_x4.png (or another ending); where a.jpg and a.png lie side by side,
  a_jpg_x4.png and a_png_x4.png. What is already there is left as it is, so an interrupted run is
  continued by the same command; --overwrite does everything again. A picture that fails is
  reported, and the rest goes on. A run that was killed (kill -9, power) may leave a hidden file
  .sr-kernels-*.part behind: delete it.

weights:
  ELAN in every public form, and MAFDN. With the extra sr_kernels[spandrel] also everything that
  spandrel knows (SwinIR, HAT, ESRGAN, ...); where these networks have layers that there are kernels
  for, the kernels run. Nothing that a file holds is ever executed.

tiles:
  A large picture goes through the network in tiles, so that memory stays bounded; when it runs out
  all the same, the tile is halved and the run goes on. Each tile reads an overlap on every side
  and drops it, which hides the borders. Tiles of ELAN begin at multiples of its largest window, so
  its windows lie as they would in the whole picture. MAFDN's channel attention takes its
  statistics over what it sees: with tiles the result differs a little from the one without
  (--tile off).

exit status: 0 all done, 1 something failed (stderr says what), 2 wrong command line, 130 Ctrl-C.
"""


@dataclass(frozen=True)
class Options:
    """How each picture is done; tile and overlap as in `sr_kernels.inference.upscale_array`."""

    tile: Any = "auto"
    overlap: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class Written:
    """A picture done. pixels: of the result; seconds: reading, network and writing."""

    path: Path
    pixels: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="a picture, or a folder of pictures")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUTPUT",
        help="file, or folder (default: INPUT with _x4 added to its name, beside it)",
    )
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"whose weights to take (default: {network.DEFAULT_MODEL}); with --weights, what they "
        "are expected to be",
    )
    group.add_argument(
        "--scale",
        type=int,
        choices=(2, 3, 4),
        help=f"times larger (default: {network.DEFAULT_SCALE}, or what --weights are for)",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint (torch.save or safetensors); the network and the scale are recognised",
    )
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--tile",
        type=_tile,
        default="auto",
        metavar="auto|off|N",
        help="side of a tile in pixels of the input, its overlap included (default: auto, from the "
        "free memory); off: the whole picture at once",
    )
    group.add_argument(
        "--tile-overlap",
        type=_overlap,
        metavar="N",
        help="pixels of the input that a tile reads beyond what it keeps, on each side (default: "
        "what the network recommends)",
    )
    network.add_arguments(parser)
    group = parser.add_argument_group("the files written")
    group.add_argument(
        "--format",
        choices=images.FORMATS,
        help="default: that of OUTPUT's name, otherwise png",
    )
    group.add_argument(
        "--quality",
        type=_quality,
        metavar="1..100",
        help="of JPEG and WebP (default: 95); 100 makes WebP lossless",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace files that are already there"
    )


def run(arguments: argparse.Namespace) -> int:
    if not arguments.input:
        raise UsageError("INPUT is empty")
    source = Path(arguments.input)
    paths.check_input(source)
    net = network.load(
        model=arguments.model,
        scale=arguments.scale,
        weights=arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
    )
    plan = paths.make_plan(source, arguments.output, arguments.format, f"_x{net.scale}")
    kind = plan.jobs[0].kind
    if arguments.quality is not None and kind not in ("jpeg", "webp"):
        console.note(f"--quality means nothing for {kind.upper()}, which is lossless")
    options = Options(
        tile=None if arguments.tile == "off" else arguments.tile,
        overlap=arguments.tile_overlap,
        quality=95 if arguments.quality is None else arguments.quality,
    )
    check_tile(net, options)
    if plan.is_folder:
        return _run_folder(net, plan, options, arguments.overwrite)
    job = plan.jobs[0]
    if job.target.exists() and not arguments.overwrite:
        raise Failure(f"{job.target} is already there; --overwrite replaces it")
    written = upscale_file(net, job, options)
    console.say(f"done in {written.seconds:.2f} s with {describe(net)}")
    return 0


def _run_folder(net: Any, plan: paths.Plan, options: Options, overwrite: bool) -> int:
    jobs = plan.jobs
    if plan.ignored:
        console.note(f"{plan.ignored} other files in the folder are left aside")
    done: list[Written] = []
    skipped = failed = 0
    start = time.perf_counter()
    try:
        for number, job in enumerate(jobs, 1):
            if job.target.exists() and not overwrite:
                skipped += 1
                continue
            try:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                done.append(upscale_file(net, job, options, f"[{number}/{len(jobs)}] "))
            except Failure as error:
                failed += 1
                console.error(str(error))
            except OSError as error:
                failed += 1
                console.error(
                    f"the folder {job.target.parent} cannot be made: {error.strerror or error}"
                )
    except KeyboardInterrupt:
        console.note(f"{len(done)} pictures were done; the same command goes on from here")
        raise
    seconds = time.perf_counter() - start
    pixels = sum(written.pixels for written in done)
    console.say(
        f"{len(done)} of {len(jobs)} pictures written with {describe(net)} in {seconds:.1f} s"
        + (f" ({pixels / 1e6 / seconds:.2f} megapixels/s)" if done else "")
    )
    if skipped:
        console.say(f"{skipped} were already there and were left as they are (--overwrite)")
    if failed:
        console.error(f"{failed} of {len(jobs)} pictures failed (see above)")
    return 1 if failed else 0


def upscale_file(net: Any, job: paths.Job, options: Options, label: str = "") -> Written:
    """Reads, upscales and writes one picture, and says so. Raises Failure."""
    from sr_kernels import inference

    signals.check()
    scale = int(net.scale)
    show = console.Progress(f"{label}{job.source.name}")
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        signals.check()
        show(done, total)

    def check_size(height: int, width: int, pixel_bytes: int) -> None:
        images.check_output_size(job.kind, scale * height, scale * width)
        needed = height * width * pixel_bytes * (1 + scale * scale)
        free = inference.available_memory()
        if needed > free:
            raise images.ImageError(
                f"{job.source} ({width}x{height}) needs {needed / 1e9:.1f} GB of memory for itself "
                f"and its result, but {free / 1e9:.1f} GB are free; cut it into pieces first"
            )

    try:
        images.check_writable(job.target)
        picture = images.read_picture(job.source, check_size)
        for text in picture.notes:
            console.note(f"{job.source} {text}")
        result = inference.upscale_array(
            net,
            picture.pixels,
            tile=options.tile,
            overlap=options.overlap,
            progress=progress,
            notify=console.note,
        )
        before = picture.pixels.shape
        picture = dataclasses.replace(picture, pixels=result)
        for text in images.write_picture(job.target, picture, job.kind, options.quality):
            console.note(f"{job.target}: {text}")
    except images.ImageError as error:
        raise Failure(str(error)) from error
    except MemoryError as error:
        raise Failure(f"{job.source}: memory ran out; try a smaller --tile") from error
    except RuntimeError as error:
        raise Failure(f"{job.source}: {error}") from error
    seconds = time.perf_counter() - start
    height, width = result.shape[:2]
    console.say(
        f"{label}{job.source} -> {job.target}: {before[1]}x{before[0]} -> {width}x{height}, "
        f"{seconds:.2f} s ({height * width / 1e6 / seconds:.2f} megapixels/s)"
    )
    return Written(job.target, height * width, seconds)


def describe(net: Any) -> str:
    return f"{network.name_of(net)}, backend {network.describe(net)}"


def check_tile(net: Any, options: Options) -> None:
    """Raises UsageError where the network cannot have this tile and overlap."""
    from sr_kernels import inference

    try:
        inference.check_tile(net, options.tile, options.overlap)
    except ValueError as error:
        raise UsageError(f"--tile, --tile-overlap: {error}") from error


def _tile(text: str) -> int | str:
    if text in ("auto", "off"):
        return text
    return _whole(text, 1, sys.maxsize, "auto, off or a whole number of pixels above 0")


def _overlap(text: str) -> int:
    return _whole(text, 0, sys.maxsize, "a whole number of pixels, 0 or more")


def _quality(text: str) -> int:
    return _whole(text, 1, 100, "a whole number from 1 to 100")


def _whole(text: str, low: int, high: int, accepted: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {accepted}, not {text!r}")
    return value
