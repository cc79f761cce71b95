"""MATLAB's ``imresize`` with its default kernel, byte for byte: how the field makes its LR images.

One axis after the other, rows first, each pass rounded to 8 bits as MATLAB does it. An output pixel
at position i reads around u = (i + 1/2) s - 1/2 (s input pixels to one output pixel)::

    y[i] = sum_j w_j x[mirror(j)] / sum_j w_j,   w_j = k((u - j) / m) / m,   m = max(s, 1)

with Keys' cubic kernel k (a = -1/2), stretched by m where the image shrinks (antialiasing), and an
image that is mirrored on at its edges. Weights and sums are float64.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["downscale", "imresize", "upscale"]

Pixels = NDArray[np.uint8]  # (h, w, 3) or (h, w)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981, a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


@lru_cache(maxsize=64)
def _taps(length: int, out: int, step: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(index, weight), each (out, taps): what every output pixel of an axis is a sum of."""
    stretch = max(step, 1.0)
    centre = (np.arange(out) + 0.5) * step - 0.5
    count = int(np.ceil(4 * stretch)) + 2
    index = np.floor(centre - 2 * stretch).astype(np.intp)[:, None] + np.arange(count)
    weight = _cubic((centre[:, None] - index) / stretch) / stretch
    weight /= weight.sum(1, keepdims=True)
    used = np.any(weight != 0, axis=0)
    # ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...
    period = index % (2 * length)
    index = np.minimum(period, 2 * length - 1 - period)
    return index[:, used], weight[:, used]


def _along_rows(image: Pixels, out: int, step: float) -> Pixels:
    index, weight = _taps(image.shape[0], out, step)
    total = np.zeros((out, *image.shape[1:]))
    for k in range(index.shape[1]):
        total += weight[:, k].reshape(-1, *[1] * (image.ndim - 1)) * image[index[:, k]]
    # To the nearest integer, halves up.
    return np.floor(total + 0.5).clip(0, 255).astype(np.uint8)


def imresize(image: Pixels, height: int, width: int, step: float) -> Pixels:
    """The image resized to (height, width), one output pixel for ``step`` input pixels."""
    resized = _along_rows(image, height, step)
    turned = _along_rows(np.ascontiguousarray(resized.swapaxes(0, 1)), width, step)
    return np.ascontiguousarray(turned.swapaxes(0, 1))


def downscale(image: Pixels, scale: int) -> Pixels:
    """``imresize(image, 1/scale)``: 8-bit (h, w[, 3]) -> (ceil(h/scale), ceil(w/scale)[, 3])."""
    height, width = (-(-n // scale) for n in image.shape[:2])
    return imresize(image, height, width, float(scale))


def upscale(image: Pixels, scale: int) -> Pixels:
    """``imresize(image, scale)``: what "bicubic" means in the tables of the field."""
    height, width = image.shape[:2]
    return imresize(image, height * scale, width * scale, 1 / scale)
