"""Draw part of a photograph thrice: bicubic, a network's, the original; for the cards of weights.

    python tools/comparison_picture.py mafdn_x4 Kodak24/kodim19.webp OUT.png --box 256 176 192 160

Left to right: MATLAB's bicubic enlargement, the network's, the original, all of the same box of the
original, with PSNR of the luma over the whole picture printed. The low-resolution picture is the
original reduced as MATLAB's imresize does it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sr_kernels.models import PRETRAINED, imresize, load_checkpoint, plan
from sr_kernels.models.evaluate import Pixels, make_pair, psnr_y, read_image, upscale

GAP = 4  # white pixels between the panels


def panels(pictures: list[Pixels], box: tuple[int, int, int, int], zoom: int) -> Image.Image:
    """The box (x, y, width, height) of each picture, side by side, every pixel ``zoom`` wide."""
    x, y, width, height = box
    parts: list[Pixels] = []
    for picture in pictures:
        if parts:
            parts.append(np.full((height * zoom, GAP, 3), 255, dtype=np.uint8))
        parts.append(picture[y : y + height, x : x + width].repeat(zoom, 0).repeat(zoom, 1))
    return Image.fromarray(np.concatenate(parts, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("weights", help="a name of weights that come with the package, or a file")
    parser.add_argument("picture", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--box", type=int, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"))
    parser.add_argument("--zoom", type=int, default=2)
    arguments = parser.parse_args()
    model = plan(load_checkpoint(PRETRAINED.get(arguments.weights, Path(arguments.weights))))
    low, high = make_pair(read_image(arguments.picture), model.scale)
    height, width = high.shape[:2]
    box = tuple(arguments.box or (width // 2 - 96, height // 2 - 80, 192, 160))
    if min(box) < 0 or box[0] + box[2] > width or box[1] + box[3] > height:
        parser.error(f"--box {' '.join(map(str, box))} is not inside {width}x{height} pixels")
    shown = [imresize.upscale(low, model.scale), upscale(model, low), high]
    for name, picture in zip(("bicubic", "network"), shown, strict=False):
        print(f"{name}: {psnr_y(picture, high, model.scale):.2f} dB")
    panels(shown, box, arguments.zoom).save(arguments.out)


if __name__ == "__main__":
    main()
