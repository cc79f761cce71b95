"""The packed file of crops: training images in one file, for a machine that has none.

It is a ZIP archive without compression, of::

    crops.json        {"format": "sr_kernels crops", "version": 1, "crops": n, "scale": 4 or null}
    hr/0000000.webp   a crop; WebP keeps it without loss
    lr/0000000.webp   its low-resolution crop, where "scale" is a number

Without low-resolution crops a file serves every scale: they are made on loading, as MATLAB's
imresize makes them. Unpacked (``python -m zipfile -e FILE FOLDER``), the two folders are what
``data`` and ``lr_data`` take. The archive's index stands at its end and has a checksum of every
crop, so that a file that is cut off or damaged does not load. Nothing in it is ever executed.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sr_kernels._files import whole_or_nothing

from ..evaluate import Pixels, match_pair, read_image

__all__ = ["HEAD_BYTES", "Encoded", "PackedFileError", "bytes_in_file", "encoded"]
__all__ += ["read_packed", "write_packed"]

Encoded = tuple[bytes, bytes | None]  # (HR, LR or None) as WebP

FORMAT, VERSION, HEAD = "sr_kernels crops", 1, "crops.json"
HEAD_BYTES = 512
"""At most so many bytes of a file belong to no crop."""


class PackedFileError(ValueError):
    """A packed file that cannot be used or written; the message names it and says why."""


def _name(folder: str, number: int) -> str:
    return f"{folder}/{number:07}.webp"


def encoded(image: Pixels) -> bytes:
    """The pixels as lossless WebP."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "WEBP", lossless=True)
    return content.getvalue()


def bytes_in_file(crop: Encoded) -> int:
    """What a crop adds to a file: its contents, and twice for each its name and a header, of 30
    bytes before it and of 46 in the index (ZIP's specification, APPNOTE.TXT, 4.3)."""
    return sum(len(part) + 2 * len(_name("hr", 0)) + 76 for part in crop if part is not None)


def write_packed(target: Path, crops: Sequence[Encoded], scale: int | None) -> None:
    """Write the crops, whole or not at all; equal crops make equal files.

    Args:
        scale: between a crop's two images; None where there are no LR ones.

    Raises:
        PackedFileError: the file cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION, "crops": len(crops), "scale": scale}
    try:
        with whole_or_nothing(target) as file, zipfile.ZipFile(file, "w") as archive:
            # A ZipInfo has no date, and is stored as it is.
            archive.writestr(zipfile.ZipInfo(HEAD), json.dumps(head))
            for number, (high, low) in enumerate(crops):
                archive.writestr(zipfile.ZipInfo(_name("hr", number)), high)
                if low is not None:
                    archive.writestr(zipfile.ZipInfo(_name("lr", number)), low)
    except OSError as error:
        raise PackedFileError(f"{target} cannot be written: {error.strerror or error}") from error


def read_packed(
    path: Path, scale: int, needs_low: bool = False
) -> Iterator[tuple[int, Pixels | None, Pixels]]:
    """(how many there are, LR or None, HR) of each crop in the file.

    Args:
        scale: of the run; LR crops must be for it.
        needs_low: LR crops must be there.

    Raises:
        OSError: it cannot be opened.
        PackedFileError: it is no packed file, truncated, damaged, or does not fit.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                crops, has_low = _read_head(path, archive.read(HEAD), scale, needs_low)
                for number in range(crops):
                    high = _read_crop(path, archive, _name("hr", number))
                    if not has_low:
                        yield crops, None, high
                        continue
                    name = _name("lr", number)
                    low = _read_crop(path, archive, name)
                    yield crops, *match_pair(low, high, scale, name, _name("hr", number))
        except (MemoryError, PackedFileError):
            raise
        except Exception as error:  # what a damaged archive makes zipfile raise is arbitrary
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise PackedFileError(
                f"{path} is no packed file of crops, or is truncated or damaged ({reason}); "
                "expected one that `sr-kernels pack` made"
            ) from error


def _read_crop(path: Path, archive: zipfile.ZipFile, name: str) -> Pixels:
    return read_image(path / name, archive.read(name))


def _read_head(path: Path, content: bytes, scale: int, needs_low: bool) -> tuple[int, bool]:
    """(number of crops, whether they have LR crops)"""
    head: Any = json.loads(content)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"its {HEAD} does not say {FORMAT!r}")
    if head.get("version") != VERSION:
        raise PackedFileError(
            f"{path} is a packed file of version {head.get('version')!r}; this program reads "
            f"version {VERSION}"
        )
    crops, own = head.get("crops"), head.get("scale")
    if type(crops) is not int or crops < 1 or not (own is None or type(own) is int):
        raise ValueError(f"its {HEAD} says crops {crops!r}, scale {own!r}")
    if own not in (None, scale):
        raise PackedFileError(
            f"{path} holds low-resolution crops for x{own}, but the scale is {scale}; expected a "
            f"file for x{scale}, or one packed without --lr-data, which serves every scale"
        )
    if own is None and needs_low:
        raise PackedFileError(
            f"{path} holds no low-resolution crops, but lr_data is given for the other images; "
            "expected a file packed with --lr-data"
        )
    return crops, own is not None
