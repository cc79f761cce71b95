"""Training images: decoded once into memory, cut into random crops, turned on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..evaluate import (
    Pair,
    Pixels,
    UnreadableImage,
    Watch,
    by_stem,
    find_low,
    image_files,
    make_pair,
    match_pair,
    read_image,
    smallest_side,
    unwatched,
)
from .packed import read_packed

__all__ = ["Crops", "LeftOut", "load_pairs", "load_validation", "read_images"]
__all__ += ["texture", "to_device"]


class LeftOut:
    """Images that cannot be used: unreadable ones are named at once, all are counted."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.unreadable, self.small = 0, 0

    def name(self, error: UnreadableImage) -> None:
        self.unreadable += 1
        self._note(f"left out: {error}")

    def sum_up(self, side: int) -> str:
        """Says how many were left out; ``side``: what was too small. Returns the same in short."""
        if self.unreadable:
            self._note(f"unreadable images left out: {self.unreadable}")
        if self.small:
            self._note(f"images smaller than {side} pixels in a direction left out: {self.small}")
        return f"{self.unreadable} are unreadable, {self.small} smaller than {side}x{side} pixels"


def read_images(
    files: Sequence[Path], low_folders: list[str], scale: int, left_out: LeftOut, watch: Watch
) -> Iterator[tuple[Pixels | None, Pixels]]:
    """(LR or None, HR), 8-bit, of every image that can be read; no LR without ``low_folders``.

    Raises:
        FileNotFoundError: an LR folder is absent or without images, or an image has no LR image.
        ValueError: an LR image has the wrong size.
    """
    lows = by_stem(map(Path, low_folders)) if low_folders else None
    for number, path in enumerate(files):
        watch(number, len(files))
        try:
            high = read_image(path)
            if lows is None:
                yield None, high
                continue
            match = find_low(path, lows, scale, ", ".join(low_folders))
            low = read_image(match)
        except UnreadableImage as error:
            left_out.name(error)
            continue
        yield match_pair(low, high, scale, str(match), str(path))


def load_pairs(
    sources: list[str],
    low_folders: list[str],
    scale: int,
    patch: int,
    note: Callable[[str], None],
    watch: Watch = unwatched,
) -> list[Pair]:
    """Every image under the folders, and every crop of the packed files, as (LR, HR), 8-bit.

    Args:
        sources: folders of high-resolution images, packed files of crops (:mod:`.packed`).
        low_folders: the folders' low-resolution images; where none are given they are made as
            MATLAB's imresize does.
        scale: between them.
        patch: side of a crop in LR pixels: smaller images are left out.
        note: is told which images are left out, and how many.
        watch: is told how many of how many have been read, of the folders and of each file.

    Raises:
        FileNotFoundError: a folder is absent or without images, or an image has no LR image.
        ValueError: an LR image has the wrong size, no image is left, or a packed file cannot be
            used (:class:`.packed.PackedFileError`).
    """
    packed = [source for source in sources if Path(source).is_file()]
    folders = [source for source in sources if source not in packed]
    if low_folders and not folders:
        raise ValueError(
            f"lr_data is {low_folders}, but data names no folder: a packed file brings its own "
            "low-resolution crops"
        )
    left_out = LeftOut(note)
    pairs: list[Pair] = []

    def take(low: Pixels | None, high: Pixels) -> None:
        if min(high.shape[:2]) < patch * scale:
            left_out.small += 1
        else:
            pairs.append(make_pair(high, scale) if low is None else (low, high))

    if folders:
        files = image_files(map(Path, folders))
        for low, high in read_images(files, low_folders, scale, left_out, watch):
            take(low, high)
    for source in packed:
        crops = read_packed(Path(source), scale, needs_low=bool(low_folders))
        for number, (count, low, high) in enumerate(crops):
            watch(number, count)
            take(low, high)
    counted = left_out.sum_up(patch * scale)
    if not pairs:
        raise ValueError(
            f"no image in {', '.join(sources)} is left: {counted} (patch {patch} at x{scale})"
        )
    return pairs


def load_validation(
    folder: str,
    low_folder: str | None,
    scale: int,
    side: int | None,
    count: int | None,
    watch: Watch = unwatched,
) -> list[Pair]:
    """Images to validate with: ``count`` of them evenly spread over the folder, of each the centre
    ``side`` x ``side`` HR pixels (None: all).

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pairs`; an unreadable one is an error here.
    """
    files = image_files([Path(folder)])
    if count is not None and count < len(files):
        files = [files[i * len(files) // count] for i in range(count)]
    lows = None if low_folder is None else by_stem([Path(low_folder)])
    pairs = []
    for number, path in enumerate(files):
        watch(number, len(files))
        high = read_image(path)
        if lows is None:
            pair = make_pair(_centre(high, side), scale)
        else:
            match = find_low(path, lows, scale, str(low_folder))
            low, high = match_pair(read_image(match), high, scale, str(match), str(path))
            pair = (
                _centre(low, side and side // scale),
                _centre(high, side and side // scale * scale),
            )
        if min(pair[1].shape[:2]) < smallest_side(scale):
            raise ValueError(
                f"{path}: {pair[1].shape[1]}x{pair[1].shape[0]} pixels are too few to validate "
                f"with; expected at least {smallest_side(scale)}"
            )
        pairs.append(pair)
    return pairs


def _centre(image: Pixels, side: int | None) -> Pixels:
    if side is None:
        return image
    top, left = (max(0, (n - side) // 2) for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def texture(image: Pixels) -> float:
    """How much neighbouring pixels differ, in green, on average."""
    green = image[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green)).mean())


class Crops:
    """Random crops; of ``candidates`` drawn each time the most textured is taken, since flat ones
    teach little: nearly all of them are already right after interpolation.

    The crops of a step depend on (seed, rank, step) alone, so that a run that goes on draws what it
    would have drawn, and no two processes draw the same.
    """

    def __init__(
        self,
        pairs: list[Pair],
        scale: int,
        patch: int,
        batch: int,
        candidates: int,
        seed: int,
        rank: int = 0,
    ) -> None:
        self.pairs, self.scale, self.patch, self.batch = pairs, scale, patch, batch
        self.candidates, self.seed, self.rank = candidates, seed, rank
        # Images are drawn by the square root of their area: small sharp sets still count.
        areas = np.array([lr.shape[0] * lr.shape[1] for lr, _ in pairs], dtype=np.float64)
        self.cumulative = np.cumsum(np.sqrt(areas) / np.sqrt(areas).sum())

    def _one(self, rng: np.random.Generator) -> Pair:
        p, s = self.patch, self.scale
        best: tuple[float, Pair] | None = None
        for _ in range(self.candidates):
            number = int(np.searchsorted(self.cumulative, rng.random(), side="right"))
            lr, hr = self.pairs[min(number, len(self.pairs) - 1)]
            y = int(rng.integers(lr.shape[0] - p + 1))
            x = int(rng.integers(lr.shape[1] - p + 1))
            a = lr[y : y + p, x : x + p]
            content = texture(a)
            if best is None or content > best[0]:
                best = content, (a, hr[y * s : (y + p) * s, x * s : (x + p) * s])
        assert best is not None
        return best[1]

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(LR, HR, turns) of a step: uint8 (batch, h, w, 3), and bool (3, batch): mirrored in x, in
        y, transposed; :func:`to_device` applies them."""
        rng = np.random.default_rng((self.seed, self.rank, step))
        crops = [self._one(rng) for _ in range(self.batch)]
        turns = rng.random((3, self.batch)) < 0.5
        lr, hr = (torch.from_numpy(np.stack(side)) for side in zip(*crops, strict=True))
        return lr, hr, torch.from_numpy(turns)


def to_device(
    drawn: tuple[Tensor, Tensor, Tensor], device: torch.device, rgb_range: float, last: bool
) -> tuple[Tensor, Tensor]:
    """What :meth:`Crops.draw` gave as float32 (batch, 3, h, w) in 0..rgb_range, turned, on the
    device; ``last``: channels_last."""
    if device.type == "cuda":
        drawn = tuple(t.pin_memory() for t in drawn)  # type: ignore[assignment]
    lr, hr, turns = (t.to(device, non_blocking=True) for t in drawn)
    layout = torch.channels_last if last else torch.contiguous_format

    def turned(image: Tensor) -> Tensor:
        image = image.permute(0, 3, 1, 2)
        mirror_x, mirror_y, transpose = turns[:, :, None, None, None]
        image = torch.where(mirror_x, image.flip(3), image)
        image = torch.where(mirror_y, image.flip(2), image)
        image = torch.where(transpose, image.transpose(2, 3), image)
        return image.float().mul_(rgb_range / 255).contiguous(memory_format=layout)

    return turned(lr), turned(hr)
