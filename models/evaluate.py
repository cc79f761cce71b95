"""Measure a network's PSNR on a folder of images.

    python -m sr_kernels.models.evaluate --weights mafdn_x4 --data HR [--lr LR]

PSNR of the luma (ITU-R BT.601, as MATLAB's ``rgb2ycbcr``) in dB against 8-bit images, output
rounded to 8 bits, a border as wide as the scale left out: the convention of the super-resolution
literature. Low-resolution images come from ``--lr`` (the file whose name starts as the
high-resolution one's) or are made by Pillow's antialiased bicubic reduction.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

__all__ = ["image_files", "luma", "make_pair", "psnr_y", "read_pairs", "to_tensor", "upscale"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

Pixels = NDArray[np.uint8]  # (h, w, 3) RGB
Pair = tuple[Pixels, Pixels]  # (low, high) resolution


def image_files(folders: Iterable[Path]) -> list[Path]:
    """All image files under the given folders, sorted within each."""
    files: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files.extend(sorted(found))
    if not files:
        raise FileNotFoundError(f"no images in {', '.join(map(str, folders))}")
    return files


def make_pair(image: Image.Image, scale: int) -> Pair:
    """(LR, HR) from one image, which is cropped to a multiple of ``scale`` first."""
    image = image.convert("RGB")
    width, height = image.width // scale, image.height // scale
    image = image.crop((0, 0, width * scale, height * scale))
    low = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(low), np.asarray(image)


def read_pairs(high: Path, low: Path | None, scale: int) -> list[tuple[str, Pair]]:
    """(name, pair) of each image in folder ``high``, its LR image from folder ``low`` if given."""
    pairs = []
    for path in image_files([high]):
        with Image.open(path) as image:
            if low is None:
                pairs.append((path.stem, make_pair(image, scale)))
                continue
            target = np.asarray(image.convert("RGB"))
        matches = [p for p in image_files([low]) if p.stem.startswith(path.stem)]
        if len(matches) != 1:
            raise FileNotFoundError(
                f"{len(matches)} files in {low} start with {path.stem!r}; expected one"
            )
        with Image.open(matches[0]) as image:
            source = np.asarray(image.convert("RGB"))
        height, width = source.shape[0] * scale, source.shape[1] * scale
        if target.shape[0] < height or target.shape[1] < width:
            raise ValueError(f"{matches[0]} is not {path} reduced by {scale}")
        pairs.append((path.stem, (source, target[:height, :width])))
    return pairs


def to_tensor(images: list[Pixels], rgb_range: float = 1.0) -> Tensor:
    """uint8 (h, w, 3) arrays -> float32 (N, 3, h, w) in 0..rgb_range, channels_last."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float().mul_(rgb_range / 255)


def luma(image: Pixels) -> NDArray[np.float64]:
    """ITU-R BT.601 luma, 16..235, of an RGB image."""
    return image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr_y(output: Pixels, target: Pixels, crop: int) -> float:
    """PSNR (dB) between the luma of two images without ``crop`` pixels at each border."""
    inner = (slice(crop, -crop or None), slice(crop, -crop or None))
    mse = float(np.square((luma(output) - luma(target))[inner]).mean())
    return 10 * math.log10(255**2 / mse) if mse > 0 else math.inf


@torch.inference_mode()
def upscale(model: nn.Module, image: Pixels) -> Pixels:
    """The network's output for one 8-bit image, rounded to 8 bits."""
    rgb_range = float(model.rgb_range)  # type: ignore[arg-type]
    parameter = next(model.parameters())
    x = to_tensor([image], rgb_range).to(parameter.device, parameter.dtype)
    y = model(x)[0].float().mul(255 / rgb_range).round_().clamp_(0, 255)
    return y.permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def main(argv: list[str] | None = None) -> int:
    from .checkpoints import load_checkpoint
    from .pretrained import PRETRAINED, load_pretrained

    parser = argparse.ArgumentParser(
        prog="python -m sr_kernels.models.evaluate", description="Y-PSNR on a folder of images."
    )
    parser.add_argument("--weights", required=True, help="a file, or the name of shipped weights")
    parser.add_argument("--data", type=Path, required=True, help="high-resolution images")
    parser.add_argument("--lr", type=Path, help="low-resolution images; else made by bicubic")
    parser.add_argument("--backend", help="cpu, cuda, triton or reference; default: the best")
    args = parser.parse_args(argv)
    try:
        load = load_pretrained if args.weights in PRETRAINED else load_checkpoint
        model = load(args.weights, backend=args.backend)
        pairs = read_pairs(args.data, args.lr, model.scale)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    scores = []
    for name, (source, target) in pairs:
        scores.append(psnr_y(upscale(model, source), target, model.scale))
        print(f"{name:24} {scores[-1]:7.3f} dB", flush=True)
    print(f"{'mean of ' + str(len(scores)):24} {sum(scores) / len(scores):7.3f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
