"""Training images: decoded once into memory, cut into random crops, turned on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..evaluate import (
    Pair,
    Pixels,
    UnreadableImage,
    by_stem,
    find_low,
    image_files,
    make_pair,
    match_pair,
    read_image,
    smallest_side,
)

__all__ = ["Crops", "load_pairs", "load_validation", "to_device"]


def load_pairs(
    folders: list[str],
    low_folders: list[str],
    scale: int,
    patch: int,
    note: Callable[[str], None],
) -> list[Pair]:
    """Every image under the folders as (LR, HR), 8-bit.

    Args:
        folders: high-resolution images.
        low_folders: their low-resolution images; if empty these are made as MATLAB's imresize does.
        scale: between them.
        patch: side of a crop in LR pixels: smaller images are left out.
        note: is told which images are left out, and how many.

    Raises:
        FileNotFoundError: a folder is absent or without images, or an image has no LR image.
        ValueError: an LR image has the wrong size, or no image is left.
    """
    lows = by_stem(map(Path, low_folders)) if low_folders else None
    pairs: list[Pair] = []
    broken, small = 0, 0
    for path in image_files(map(Path, folders)):
        try:
            high = read_image(path)
            if lows is None:
                pair = make_pair(high, scale) if min(high.shape[:2]) >= patch * scale else None
            else:
                match = find_low(path, lows, scale, ", ".join(low_folders))
                pair = match_pair(read_image(match), high, scale, str(match), str(path))
        except UnreadableImage as error:
            broken += 1
            note(f"left out: {error}")
            continue
        if pair is None or min(pair[0].shape[:2]) < patch:
            small += 1
        else:
            pairs.append(pair)
    if broken:
        note(f"unreadable images left out: {broken}")
    if small:
        note(f"images smaller than {patch * scale} pixels in a direction left out: {small}")
    if not pairs:
        raise ValueError(
            f"no image in {', '.join(folders)} is left: {broken} are unreadable, {small} smaller "
            f"than {patch * scale}x{patch * scale} pixels (patch {patch} at x{scale})"
        )
    return pairs


def load_validation(
    folder: str, low_folder: str | None, scale: int, side: int | None, count: int | None
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
    for path in files:
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
            green = a[..., 1].astype(np.int16)
            texture = float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green)).mean())
            if best is None or texture > best[0]:
                best = texture, (a, hr[y * s : (y + p) * s, x * s : (x + p) * s])
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
