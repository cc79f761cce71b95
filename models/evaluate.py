"""How the field measures a network: PSNR and SSIM of the luma against 8-bit images.

The output is rounded to 8 bits, a border as wide as the scale is left out, and luma is ITU-R
BT.601's, as MATLAB's ``rgb2ycbcr`` has it (16..235, here not rounded). Low-resolution images are
given, or made as MATLAB's ``imresize`` makes them (:mod:`.imresize`). ``sr-kernels evaluate`` is
the command.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .imresize import downscale

__all__ = [
    "UnreadableImage",
    "Watch",
    "find_low",
    "image_files",
    "luma",
    "make_pair",
    "match_pair",
    "psnr_y",
    "read_image",
    "read_pairs",
    "score",
    "ssim_y",
    "to_tensor",
    "unwatched",
    "upscale",
]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

Pixels = NDArray[np.uint8]  # (h, w, 3) RGB
Pair = tuple[Pixels, Pixels]  # (low, high) resolution

Watch = Callable[[float, float], None]
"""Is told how far something is: (done, total)."""


def unwatched(done: float, total: float) -> None:
    pass


class UnreadableImage(ValueError):
    """A file that is no image, a damaged one, or one of more than 8 bits; the message names it."""


# ----------------------------------------------------------------------------------------- images


def image_files(folders: Iterable[Path]) -> list[Path]:
    """All image files under the given folders, sorted within each.

    Raises:
        FileNotFoundError: one is not a folder, or there is no image in any.
    """
    folders = list(folders)
    files: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files.extend(sorted(found))
    if not files:
        raise FileNotFoundError(
            f"no images in {', '.join(map(str, folders))} (looked for "
            f"{', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return files


def read_image(path: Path, content: bytes | None = None) -> Pixels:
    """The image as 8-bit RGB; with ``content``, the bytes of a file, ``path`` is only its name.

    Raises:
        UnreadableImage: it cannot be read whole, or has more than 8 bits.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            # Pillow opens deep colour as 8-bit "RGB" and only its decoder's name tells.
            coding = image.tile[0][3] if image.tile else ""
            deep = next((word for word in str(coding).split("'") if ";16" in word), None)
            if deep or image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"its pixels are {deep or image.mode}; expected 8 bits per channel"
                )
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file makes a decoder raise is arbitrary
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error


def _cropped(image: Pixels, scale: int) -> Pixels:
    height, width = (n // scale * scale for n in image.shape[:2])
    return image[:height, :width]


def make_pair(image: Pixels, scale: int) -> Pair:
    """(LR, HR) from one image, which is cropped to a multiple of ``scale`` first."""
    high = _cropped(image, scale)
    return downscale(high, scale), high


def find_low(path: Path, files: dict[str, list[Path]], scale: int, folders: str) -> Path:
    """The LR image of HR image ``path`` among ``files`` (stem -> files): of the same name, or with
    x4, X4, _x4 or -x4 behind it.

    Raises:
        FileNotFoundError: there is not exactly one.
    """
    stems = [path.stem, *(f"{path.stem}{mark}{scale}" for mark in ("x", "X", "_x", "-x"))]
    found = [file for stem in stems for file in files.get(stem, [])]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{len(found)} low-resolution images for {path.name} in {folders}; expected one, named "
            f"{path.stem} or {path.stem}x{scale}"
        )
    return found[0]


def match_pair(low: Pixels, high: Pixels, scale: int, low_name: str, high_name: str) -> Pair:
    """(LR, HR) cut to the same area.

    Raises:
        ValueError: the sizes are not ``scale`` apart.
    """
    for n, m in zip(low.shape[:2], high.shape[:2], strict=True):
        if n not in (m // scale, -(-m // scale)):
            want = f"{high.shape[1] // scale}x{high.shape[0] // scale}"
            raise ValueError(
                f"{low_name} is {low.shape[1]}x{low.shape[0]} pixels, which is not {high_name} "
                f"({high.shape[1]}x{high.shape[0]}) reduced by {scale}; expected {want}"
            )
    high = _cropped(high, scale)
    return low[: high.shape[0] // scale, : high.shape[1] // scale], high


def by_stem(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """The images of the folders by name without ending."""
    files: dict[str, list[Path]] = {}
    for path in image_files(folders):
        files.setdefault(path.stem, []).append(path)
    return files


def read_pairs(
    high: Path, low: Path | None, scale: int, watch: Watch = unwatched
) -> list[tuple[str, Pair]]:
    """(name, pair) of each image in folder ``high``, its LR image from folder ``low`` if given.

    Raises:
        FileNotFoundError, UnreadableImage, ValueError: as the functions above; an image too small
            to be measured is a ValueError, too.
    """
    pairs = []
    lows = None if low is None else by_stem([low])
    files = image_files([high])
    for number, path in enumerate(files):
        watch(number, len(files))
        target = read_image(path)
        if min(_cropped(target, scale).shape[:2]) < smallest_side(scale):
            least = -(-smallest_side(scale) // scale) * scale
            raise ValueError(
                f"{path} is {target.shape[1]}x{target.shape[0]} pixels; expected at least "
                f"{least}x{least}: SSIM's window of {SSIM_WINDOW} inside a border of {scale} at "
                f"x{scale}"
            )
        if lows is None:
            pair = make_pair(target, scale)
        else:
            match = find_low(path, lows, scale, str(low))
            pair = match_pair(read_image(match), target, scale, str(match), str(path))
        pairs.append((path.stem, pair))
    return pairs


def to_tensor(images: list[Pixels], rgb_range: float = 1.0) -> Tensor:
    """uint8 (h, w, 3) arrays -> float32 (N, 3, h, w) in 0..rgb_range, channels_last."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float().mul_(rgb_range / 255)


# ---------------------------------------------------------------------------------------- metrics

SSIM_WINDOW = 11


def smallest_side(scale: int) -> int:
    """What an image needs for one window of SSIM inside a border of ``scale`` pixels."""
    return SSIM_WINDOW + 2 * scale


def luma(image: Pixels) -> NDArray[np.float64]:
    """ITU-R BT.601 luma, 16..235, of an RGB image."""
    return image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def _inner(image: Pixels, crop: int) -> NDArray[np.float64]:
    return luma(image[crop : -crop or None, crop : -crop or None])


def psnr_y(output: Pixels, target: Pixels, crop: int) -> float:
    """PSNR (dB) between the luma of two images without ``crop`` pixels at each border."""
    mse = float(np.square(_inner(output, crop) - _inner(target, crop)).mean())
    return 10 * math.log10(255**2 / mse) if mse > 0 else math.inf


def _gaussian(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Filtered with an 11 x 11 Gaussian of deviation 1.5, where it lies inside the image."""
    taps = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    taps /= taps.sum()
    for _ in range(2):  # the rows, then (transposed) the columns
        length = image.shape[0] - 10
        image = sum(t * image[k : k + length] for k, t in enumerate(taps)).T
    return image


def ssim_y(output: Pixels, target: Pixels, crop: int) -> float:
    """SSIM (Wang et al. 2004) of the luma of two images without ``crop`` pixels at each border.

    Windows of 11 x 11 pixels under a Gaussian of deviation 1.5, K = (0.01, 0.03), L = 255; the mean
    over all windows inside the image, as the authors' MATLAB code has it.

    Raises:
        ValueError: the image is smaller than a window.
    """
    x, y = _inner(output, crop), _inner(target, crop)
    if min(x.shape) < SSIM_WINDOW:
        raise ValueError(f"image is {x.shape[1]}x{x.shape[0]} inside; SSIM needs at least 11x11")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _gaussian(x), _gaussian(y)
    vx, vy = _gaussian(x * x) - mx * mx, _gaussian(y * y) - my * my
    cov = _gaussian(x * y) - mx * my
    quality = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(quality.mean())


def score(output: Pixels, target: Pixels, scale: int) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of the luma, with the field's border."""
    return psnr_y(output, target, scale), ssim_y(output, target, scale)


@torch.inference_mode()
def upscale(model: nn.Module, image: Pixels) -> Pixels:
    """The network's output for one 8-bit image, rounded to 8 bits."""
    rgb_range = float(model.rgb_range)  # type: ignore[arg-type]
    parameter = next(model.parameters())
    x = to_tensor([image], rgb_range).to(parameter.device, parameter.dtype)
    y = model(x)[0].float().mul(255 / rgb_range).round_().clamp_(0, 255)
    return y.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
