"""Which crops of which images go into a packed file of a given size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..evaluate import Pixels, Watch, image_files, unwatched
from .data import LeftOut, read_images, texture
from .packed import HEAD_BYTES, Encoded, bytes_in_file, encoded, write_packed

__all__ = ["GRID", "Packed", "pack"]

GRID = 12  # crops lie on multiples of it, which 2, 3 and 4 divide
_RATIO = 4  # lossless WebP rarely makes a photograph smaller than by this


@dataclass(frozen=True)
class _Crop:
    image: int
    number: int  # within the image, in the order of rows
    turn: float  # when it is taken
    texture: float
    high: Pixels
    low: Pixels | None


@dataclass(frozen=True)
class Packed:
    """What went into a file: crops, of so many images, and their HR pixels."""

    crops: int
    images: int
    pixels: int


def pack(
    folders: list[str],
    low_folders: list[str],
    target: Path,
    *,
    scale: int | None = None,
    limit: int = 55 << 20,
    side: int = 288,
    note: Callable[[str], None] = print,
    reading: Watch = unwatched,
    writing: Watch = unwatched,
) -> Packed:
    """Write crops of the images under the folders into one file, as :mod:`.packed` describes it.

    Every image is divided into squares side by side, one smaller than a square is taken whole. The
    most textured square of each image comes first, then the second of each, and so on, until the
    file is full; a larger image has its turn more often, by the square root of its area, as
    :class:`.data.Crops` draws from it. In the file they stand in the order of the images.

    Args:
        folders: high-resolution images.
        low_folders: their low-resolution images; if empty the file has none.
        target: the file to write.
        scale: between the two; None without ``low_folders``.
        limit: largest size of the file in bytes.
        side: of a square in HR pixels, a multiple of 12.
        note: is told which images are left out, and how many.
        reading, writing: are told how far the images are read, and the file is filled.

    Raises:
        FileNotFoundError: a folder is absent or without images, or an image has no LR image.
        ValueError: an LR image has the wrong size, no image is left, an argument is not accepted,
            not one crop fits, or the file cannot be written (:class:`.packed.PackedFileError`).
    """
    if (scale is None) == bool(low_folders):
        raise ValueError(f"scale is {scale}, low_folders {low_folders}; expected both or neither")
    if side < GRID or side % GRID:
        raise ValueError(f"side is {side}; expected a multiple of {GRID}")
    files = image_files(map(Path, folders))
    left_out = LeftOut(note)
    crops: list[_Crop] = []
    values = 0
    by = scale or 1
    for image, (low, high) in enumerate(read_images(files, low_folders, by, left_out, reading)):
        if min(high.shape[:2]) < GRID:
            left_out.small += 1
        else:
            squares = _squares(image, low, high, by, side)
            crops += squares
            values += sum(crop.high.size for crop in squares)
        if values > 2 * _RATIO * limit:
            crops = _first(crops, _RATIO * limit)  # more could not fit
            values = sum(crop.high.size for crop in crops)
    counted = left_out.sum_up(GRID)
    if not crops:
        raise ValueError(f"no image in {', '.join(folders)} is left: {counted}")

    crops = _first(crops, _RATIO * limit)
    chosen: list[tuple[_Crop, Encoded]] = []
    size = HEAD_BYTES
    for crop in crops:
        content = encoded(crop.high), None if crop.low is None else encoded(crop.low)
        size += bytes_in_file(content)
        if size > limit:
            break
        chosen.append((crop, content))
        writing(max(size / limit, len(chosen) / len(crops)), 1)
    if not chosen:
        raise ValueError(
            f"not one crop of {side}x{side} pixels fits into a file of {limit} bytes; expected a "
            "larger file, or a smaller side"
        )
    chosen.sort(key=lambda item: (item[0].image, item[0].number))
    write_packed(target, [content for _, content in chosen], scale)
    return Packed(
        crops=len(chosen),
        images=len({crop.image for crop, _ in chosen}),
        pixels=sum(math.prod(crop.high.shape[:2]) for crop, _ in chosen),
    )


def _first(crops: list[_Crop], limit: int) -> list[_Crop]:
    """Those whose turn comes first, of so many values in all; at least one."""
    kept: list[_Crop] = []
    for crop in sorted(crops, key=lambda crop: (crop.turn, -crop.texture)):
        if kept and limit < 0:
            break
        kept.append(crop)
        limit -= crop.high.size
    return kept


def _starts(length: int, side: int) -> list[int]:
    """Where squares begin that lie side by side in the middle."""
    count = max(1, length // side)
    first = max(0, length - count * side) // 2 // GRID * GRID
    return [first + k * side for k in range(count)]


def _squares(image: int, low: Pixels | None, high: Pixels, scale: int, side: int) -> list[_Crop]:
    """All squares of the image; copies, so that the image need not stay in memory."""
    corners = [(y, x) for y in _starts(high.shape[0], side) for x in _starts(high.shape[1], side)]

    def cut(pixels: Pixels, number: int, by: int) -> Pixels:
        y, x = corners[number]
        return pixels[y // by : (y + side) // by, x // by : (x + side) // by].copy()

    squares = [(texture(cut(high, number, 1)), number) for number in range(len(corners))]
    best = sorted(squares, key=lambda square: -square[0])
    return [
        _Crop(
            image,
            number,
            (rank + 1) / math.sqrt(math.prod(high.shape[:2])),
            content,
            cut(high, number, 1),
            None if low is None else cut(low, number, scale),
        )
        for rank, (content, number) in enumerate(best)
    ]
