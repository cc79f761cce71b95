"""Upscale a picture that is held as an 8- or 16-bit array, tile by tile.

The picture stays an integer array on the host and so does the result; only the tile in hand
becomes floating point. A 24-megapixel photograph at x4 therefore needs its own bytes (72 MB), those
of the result (1.15 GB) and the working memory of one tile.

A tile reads `overlap` pixels more than it keeps, on every side that is not the picture's border,
and the pieces that are kept are laid side by side. A network whose receptive radius is not above
`overlap` gives exactly the untiled result. Where it is larger, the far pixels' influence is cut
off. A network with statistics over the whole picture (channel attention in MAFDN) takes them over
the tile instead, which changes the result slightly.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

__all__ = [
    "OutOfMemoryError",
    "available_memory",
    "bytes_per_pixel",
    "check_tile",
    "choose_tile",
    "is_out_of_memory",
    "upscale_array",
]

MIN_TILE = 32
MAX_TILE = 1024
# What one tile may take. On the host it is small: a larger tile is not faster there, since from a
# few hundred pixels a side the activations leave the caches anyway.
CPU_TILE_BYTES = 400 << 20
CUDA_TILE_BYTES = 8 << 30
DEFAULT_OVERLAP = 16
# Alpha is interpolated in strips of rows of about so many pixels of the result.
STRIP_PIXELS = 4 << 20


class OutOfMemoryError(RuntimeError):
    """Memory ran out even for the smallest tile."""


@dataclass(frozen=True)
class _Part:
    """The rectangle of the input that one tile keeps: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def grown(self, overlap: int, height: int, width: int) -> _Part:
        """What the tile reads: this rectangle with its overlap, inside the picture."""
        return _Part(
            max(0, self.top - overlap),
            min(height, self.bottom + overlap),
            max(0, self.left - overlap),
            min(width, self.right + overlap),
        )


def upscale_array(
    model: Any,
    image: np.ndarray,
    *,
    tile: int | Literal["auto"] | None = "auto",
    overlap: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Upscales `image` by `model.scale`.

    image: uint8 or uint16, (H, W) or (H, W, C), with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and
        alpha (not premultiplied). 0 is black, 255 or 65535 is white.
    model: a network with `scale` and `rgb_range` (of input and output), in eval mode, called with
        (N, 3, H, W) on the device and in the dtype of its parameters. `tile_multiple` (tiles begin
        at multiples of it), `tile_overlap` and `whole_preferred` (no tiles where the memory allows)
        are respected where it has them.
    tile: side in input pixels of the square that goes through the network at once, overlap
        included; None takes the whole picture; "auto" the largest that suits the memory at hand.
    overlap: input pixels that a tile reads beyond the part it keeps, on each inner side; None is
        the model's own recommendation.
    progress: called with (input pixels done, input pixels in all) after each tile.
    notify: called with a sentence when something noteworthy happens (a tile halved).

    Returns an array of the same dtype and number of axes and channels, (s*H, s*W[, C]).

    Grey goes through the network as three equal channels and comes back as their luma (BT.601
    weights). Alpha is interpolated bicubically, so that what was opaque stays exactly opaque;
    before the network sees the picture, visible colour is spread under fully transparent pixels,
    whose own colour means nothing and would otherwise be drawn into the visible edge.

    When memory runs out, the tile is halved and the run goes on. Raises TypeError and ValueError
    for bad arguments, OutOfMemoryError (a RuntimeError) when the smallest tile is still too large,
    and RuntimeError when the network returns NaN or infinity or a wrong shape.
    """
    pixels = _checked(image)
    height, width, channels = pixels.shape
    scale = int(model.scale)
    multiple = int(getattr(model, "tile_multiple", 1))
    device, dtype = _placement(model)
    if tile == "auto":
        needed = height * width * bytes_per_pixel(model, dtype)
        whole = getattr(model, "whole_preferred", False) and needed <= available_memory(device) // 2
        tile = None if whole else choose_tile(model, overlap=overlap)
    side, margin = _tile_and_overlap(model, tile, overlap, multiple)

    has_alpha = channels in (2, 4)
    result = np.empty((scale * height, scale * width, channels), dtype=pixels.dtype)
    if has_alpha:
        _enlarge_alpha(pixels[..., -1:], result[..., -1:], scale)

    total = height * width
    done = 0
    picture = _Part(0, height, 0, width)
    pending = deque(_cut(picture, picture, side, margin, multiple))
    while pending:
        part = pending[0]
        read = part.grown(margin, height, width)
        try:
            _run_tile(model, pixels, result, part, read, has_alpha, device, dtype)
            enough = True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            enough = False
        # The halving stands outside of the handler: the exception holds the failed tile's tensors.
        if enough:
            pending.popleft()
            done += part.area
            if progress is not None:
                progress(done, total)
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
        failed = max(read.bottom - read.top, read.right - read.left)
        smaller = _halved(failed, margin, multiple)
        if smaller is None:
            raise OutOfMemoryError(
                f"memory ran out on {device} even with a tile of {failed} pixels (overlap "
                f"{margin}); a smaller overlap, another device or another backend may need less"
            )
        if notify is not None:
            notify(f"memory ran out with a tile of {failed} pixels; going on with {smaller}")
        pending = deque(
            piece for rest in pending for piece in _cut(rest, picture, smaller, margin, multiple)
        )
    return result if image.ndim == 3 else result[..., 0]


def check_tile(model: Any, tile: int | str | None, overlap: int | None) -> None:
    """Raises TypeError or ValueError where `upscale_array` would for these arguments."""
    if tile == "auto":
        tile = choose_tile(model, overlap=overlap)
    _tile_and_overlap(model, tile, overlap, int(getattr(model, "tile_multiple", 1)))


def choose_tile(model: Any, *, overlap: int | None = None) -> int:
    """The side of the tile that `tile="auto"` takes: what half of the free memory holds (at most
    400 MB of it on the host and 8 GB on a GPU), between 32 and 1024 pixels."""
    device, dtype = _placement(model)
    multiple = int(getattr(model, "tile_multiple", 1))
    cap = CUDA_TILE_BYTES if device.type == "cuda" else CPU_TILE_BYTES
    budget = min(available_memory(device) // 2, cap)
    side = int((budget / bytes_per_pixel(model, dtype)) ** 0.5)
    side = min(MAX_TILE, max(MIN_TILE, side))
    if overlap is not None:
        side = max(side, 2 * _round_up(overlap, multiple) + multiple)
    return max(multiple, side // multiple * multiple)


def bytes_per_pixel(model: Any, dtype: torch.dtype = torch.float32) -> int:
    """Estimate of the working memory of `model` in bytes for each input pixel.

    Activations are as wide as the widest convolution, and at most about 14 of them are alive at
    once. An estimate that is too low costs a halved tile, not the run.
    """
    parameters = getattr(model, "parameters", None)
    widest = max((p.shape[0] for p in parameters() if p.dim() == 4), default=3) if parameters else 3
    alive = 14
    picture = 3 * int(model.scale) ** 2 * 4 * 3
    return int(widest) * alive * max(dtype.itemsize, 2) + picture


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a new allocation on `device` can hope for: free GPU memory, or on the host the
    smaller of MemAvailable and what the control group (container) leaves."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit, used = Path(limit_file).read_text(), Path(used_file).read_text()
            found.append(max(0, int(limit) - int(used)))  # "max" (no limit) is no number
        except (OSError, ValueError):
            continue
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=2 << 30)


# ----------------------------------------------------------------------------------------- one tile


def _run_tile(
    model: Any,
    pixels: np.ndarray,
    result: np.ndarray,
    part: _Part,
    read: _Part,
    has_alpha: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Sends the rectangle `read` of `pixels` through the network and writes `part` of it."""
    scale = int(model.scale)
    peak = float(np.iinfo(pixels.dtype).max)
    window = pixels[read.top : read.bottom, read.left : read.right].astype(np.float32)
    planes = torch.from_numpy(window).permute(2, 0, 1).unsqueeze(0)
    colour = planes[:, :-1] if has_alpha else planes
    if has_alpha:
        colour = _spread_colour(colour, planes[:, -1:] / peak)
    grey = colour.shape[1] == 1
    if grey:
        colour = colour.expand(-1, 3, -1, -1)
    x = (colour * (float(model.rgb_range) / peak)).to(device, dtype).contiguous()
    with torch.inference_mode():
        y = model(x)
        expected = (1, 3, scale * x.shape[2], scale * x.shape[3])
        if tuple(y.shape) != expected:
            raise RuntimeError(
                f"the network returned a tensor of shape {tuple(y.shape)} where {expected} was due"
            )
        y = y[
            0,
            :,
            scale * (part.top - read.top) : scale * (part.bottom - read.top),
            scale * (part.left - read.left) : scale * (part.right - read.left),
        ].float()
        if grey:
            y = (y * y.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        if not bool(torch.isfinite(y).all()):
            raise RuntimeError(
                "the network returned NaN or infinity"
                + ("" if dtype == torch.float32 else f"; {dtype} may be too narrow, try float32")
            )
        levels = (y * (peak / float(model.rgb_range))).clamp_(0.0, peak).round_().permute(1, 2, 0)
        integer = torch.uint8 if pixels.dtype == np.uint8 else torch.int32
        target = result[
            scale * part.top : scale * part.bottom, scale * part.left : scale * part.right
        ]
        target[..., : levels.shape[2]] = levels.to(integer).cpu().numpy()


def _spread_colour(colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`colour` (N, C, H, W) with the alpha-weighted mean colour of the surroundings where `alpha`
    (N, 1, H, W, 0..1) is 0: the smallest of growing squares that holds anything visible is taken.
    It looks 16 pixels far, so a tile's overlap covers it."""
    hidden = alpha == 0
    if not bool(hidden.any()):
        return colour
    weighted = colour * alpha
    for size in (3, 5, 9, 17, 33):
        weight = F.avg_pool2d(alpha, size, stride=1, padding=size // 2)
        mean = F.avg_pool2d(weighted, size, stride=1, padding=size // 2)
        # Less than the faintest visible pixel's share is rounding noise, not colour.
        reached = hidden & (weight > 0.5 / 65535 / size**2)
        colour = torch.where(reached, mean / weight.clamp_min(1e-12), colour)
        hidden = hidden & ~reached
    return colour


def _enlarge_alpha(alpha: np.ndarray, target: np.ndarray, scale: int) -> None:
    """Bicubic interpolation of `alpha` (H, W, 1) into `target`, in strips of rows."""
    height, width, _ = alpha.shape
    peak = float(np.iinfo(alpha.dtype).max)
    reach = 4  # rows on each side that the cubic kernel may look at, and more
    rows = max(1, STRIP_PIXELS // (width * scale * scale))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        read = _Part(top, bottom, 0, width).grown(reach, height, width)
        strip = torch.from_numpy(alpha[read.top : read.bottom, :, 0].astype(np.float32))
        size = (scale * strip.shape[0], scale * width)
        large = F.interpolate(strip[None, None], size=size, mode="bicubic", align_corners=False)
        large = large[0, 0, scale * (top - read.top) : scale * (bottom - read.top)]
        large = large.clamp_(0.0, peak).round_()
        target[scale * top : scale * bottom, :, 0] = large.numpy().astype(alpha.dtype)


# ------------------------------------------------------------------------------- cutting into tiles


def _cut(
    area: _Part, picture: _Part, side: int | None, overlap: int, multiple: int
) -> Iterable[_Part]:
    """Cuts `area`, a rectangle of `picture`, into parts whose tiles are at most `side` pixels wide
    and high. They begin at multiples of `multiple` from the area's corner."""
    if side is None:
        return [area]
    rows = _cut_line(area.top, area.bottom, picture.bottom, side, overlap, multiple)
    columns = _cut_line(area.left, area.right, picture.right, side, overlap, multiple)
    return [_Part(top, bottom, left, right) for top, bottom in rows for left, right in columns]


def _cut_line(
    begin: int, end: int, extent: int, side: int, overlap: int, multiple: int
) -> list[tuple[int, int]]:
    """Cuts [begin, end) of an axis of `extent` pixels into pieces as equal as `multiple` allows."""
    length = end - begin
    step = (side - 2 * overlap) // multiple * multiple
    # The whole axis needs no overlap.
    if length <= step or (length == extent and length <= side):
        return [(begin, end)]
    count = -(-length // step)
    step = _round_up(-(-length // count), multiple)
    return [(start, min(end, start + step)) for start in range(begin, end, step)]


def _halved(side: int, overlap: int, multiple: int) -> int | None:
    """The next smaller tile, or None where there is none: a tile keeps at least `multiple`."""
    smallest = 2 * overlap + multiple
    half = max(side // 2 // multiple * multiple, smallest)
    return half if half < side else None


def _tile_and_overlap(
    model: Any, tile: int | str | None, overlap: int | None, multiple: int
) -> tuple[int | None, int]:
    """Checked tile and overlap, both rounded to the multiple that the network asks for."""
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be a whole number of pixels or None, not {value!r}")
    if overlap is not None and overlap < 0:
        raise ValueError(f"overlap must not be negative, but is {overlap}")
    assert not isinstance(tile, str)  # the loop has seen to it
    if tile is None:
        return None, _round_up(
            _recommended_overlap(model) if overlap is None else overlap, multiple
        )
    if tile < 1:
        raise ValueError(f"tile must be at least 1 pixel, but is {tile}")
    if tile < multiple:
        raise ValueError(
            f"tile is {tile}, but this network needs tiles of {multiple} pixels or more"
        )
    side = tile // multiple * multiple
    if overlap is None:
        margin = min(_recommended_overlap(model), side // 4) // multiple * multiple
    else:
        margin = _round_up(overlap, multiple)
    if side < 2 * margin + multiple:
        raise ValueError(
            f"an overlap of {margin} pixels on both sides leaves nothing of a tile of {side}: the "
            f"tile must be at least {2 * margin + multiple} (2 x overlap + {multiple}), or the "
            f"overlap at most {(side - multiple) // 2 // multiple * multiple}"
        )
    return side, margin


def _recommended_overlap(model: Any) -> int:
    return int(getattr(model, "tile_overlap", DEFAULT_OVERLAP))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ------------------------------------------------------------------------------------------- checks


def _checked(image: np.ndarray) -> np.ndarray:
    """`image` as (H, W, C)."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy array, not {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"image must be uint8 or uint16, not {image.dtype}")
    if image.ndim not in (2, 3):
        raise ValueError(f"image must have the shape (H, W) or (H, W, C), not {image.shape}")
    pixels = image[..., None] if image.ndim == 2 else image
    if not 1 <= pixels.shape[2] <= 4:
        raise ValueError(f"image must have 1 to 4 channels, but its shape is {image.shape}")
    if 0 in pixels.shape:
        raise ValueError(f"image is empty: its shape is {image.shape}")
    return pixels


def _placement(model: Any) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    if parameter is None:
        return torch.device("cpu"), torch.float32
    return parameter.device, parameter.dtype


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's host allocator raises a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in text
        for phrase in ("not enough memory", "can't allocate memory", "cannot allocate memory")
    )
