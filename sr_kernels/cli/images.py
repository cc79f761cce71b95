"""Read and write picture files as 8- or 16-bit arrays.

libvips (pyvips) does it: it keeps 16 bits per channel, which Pillow cannot for colour, writes from
the array as it stands, without a second copy, and can be stopped in the middle. BMP, which it does
not know, is read by Pillow and written here.

What a file is, is told by its first bytes, never by its name.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from sr_kernels._files import temporary_name, whole_or_nothing

_T = TypeVar("_T")

# 268 megapixels: more than any camera's picture, and a file that claims more is likelier an attack
# (a decompression bomb) than a picture.
MAX_INPUT_PIXELS = 1 << 28

SUFFIXES = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".bmp": "bmp",
}
# Longest side that the format can hold.
MAX_SIDE = {"png": (1 << 31) - 1, "jpeg": 65535, "webp": 16383, "tiff": 1 << 31, "bmp": 65535}
FORMATS = tuple(MAX_SIDE)
DEFAULT_SUFFIX = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp"}

# Names by which users meet what is not supported.
_OTHER_MAGIC = (
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF"),
    (b"8BPS", "a Photoshop document"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"<svg", "an SVG drawing"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
)


class ImageError(Exception):
    """A picture cannot be read or written; the message is a sentence for the user."""


@dataclass
class Picture:
    """A decoded picture.

    pixels: (H, W, C) uint8 or uint16; C is 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha.
    metadata: libvips' (type, name, value) triples of the EXIF block and the ICC profile.
    resolution: pixels per millimetre.
    notes: what the user should know of how it was read.
    """

    pixels: np.ndarray
    metadata: list[tuple[Any, str, Any]] = field(default_factory=list)
    resolution: float | None = None
    notes: list[str] = field(default_factory=list)


def vips() -> Any:
    """pyvips, imported late: `sr-kernels env` must work and say so where it is missing."""
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise ImageError(
            f"picture files need libvips, which cannot be loaded ({error}); "
            "install it with: pip install 'pyvips[binary]'"
        ) from error
    # Nothing is used twice, so the cache of results would only hold memory.
    pyvips.cache_set_max(0)
    return pyvips


def _reason(error: Any) -> str:
    """libvips' first line of explanation, in brackets, or nothing where it gives none."""
    lines = [line.strip() for line in str(error.detail or "").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("unable to call")]
    return f" ({lines[0]})" if lines else ""


def _in_thread(work: Callable[[list[Any]], _T]) -> _T:
    """What `work` returns or raises; it runs in a thread of its own, so that Ctrl-C is heard.

    The interpreter handles signals in the main thread, between its own instructions. libvips is one
    call of many seconds there; and it calls back into Python to log, where an exception is lost.

    work: is given an empty list; a libvips image that it puts there is stopped by an interruption.
    """
    running: list[Any] = []
    results: list[_T] = []
    failures: list[BaseException] = []
    finished = threading.Event()

    def run() -> None:
        try:
            results.append(work(running))
        except BaseException as error:
            failures.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="libvips").start()
    try:
        # Not join(): one that a signal interrupts may take the thread for ended.
        while not finished.wait(0.1):
            pass
    except BaseException:
        for image in running:
            image.set_kill(True)
        finished.wait()
        raise
    finally:
        running.clear()
    if failures:
        raise failures.pop()
    return results.pop()


def sniff(head: bytes) -> str | None:
    """The format that a file's first bytes announce, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:2] == b"BM":
        return "bmp"
    return None


def read_picture(path: Path, check_size: Callable[[int, int, int], None] | None = None) -> Picture:
    """The picture in the file `path`, turned upright as its EXIF orientation says.

    check_size: called with (height, width, bytes per pixel) before anything is decoded; may raise.
    Raises ImageError where the file is no supported picture, is damaged or is cut short.
    """
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    if not path.is_file():
        raise ImageError(f"{path} is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise ImageError(f"{path} is empty (0 bytes)")
    kind = sniff(data[:16])
    if kind is None:
        what = next((name for magic, name in _OTHER_MAGIC if data.startswith(magic)), None)
        if what is None and data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
            what = "a HEIF or AVIF picture"
        raise ImageError(
            f"{path} is {what or 'no picture of a known kind'}; "
            "what can be read is PNG, JPEG, WebP, TIFF and BMP"
        )
    if kind == "bmp":
        return _read_bmp(path, data, check_size)
    return _in_thread(lambda running: _read_vips(path, data, kind, check_size))


def _check_pixels(
    path: Path,
    height: int,
    width: int,
    pixel_bytes: int,
    check_size: Callable[[int, int, int], None] | None,
) -> None:
    if height * width > MAX_INPUT_PIXELS:
        raise ImageError(
            f"{path} says it has {width}x{height} = {height * width / 1e6:.0f} million pixels; "
            f"the limit is {MAX_INPUT_PIXELS / 1e6:.0f} million (cut it into pieces first)"
        )
    if check_size is not None:
        check_size(height, width, pixel_bytes)


def _read_vips(
    path: Path, data: bytes, kind: str, check_size: Callable[[int, int, int], None] | None
) -> Picture:
    pyvips = vips()
    load = getattr(pyvips.Image, f"{kind}load_buffer")
    try:
        image = load(data, access="sequential", fail_on="error")
        fields = set(image.get_fields())
        sample_bytes = 2 if image.format == "ushort" else 1
        _check_pixels(path, image.height, image.width, sample_bytes * image.bands, check_size)
        picture = Picture(np.empty(0))
        pages = image.get("n-pages") if "n-pages" in fields else 1
        if kind == "png" and b"acTL" in data[: data.find(b"IDAT") + 1]:
            pages = 2
        if pages > 1:
            what = "pages" if kind == "tiff" else "frames"
            picture.notes.append(f"has several {what}; only the first is upscaled")
        image = _to_grey_or_rgb(path, image, picture.notes)
        pixels = image.numpy()
    except pyvips.Error as error:
        raise ImageError(f"{path} is damaged or cut short{_reason(error)}") from error
    pixels = pixels.reshape(image.height, image.width, image.bands)
    orientation = image.get("orientation") if "orientation" in fields else 1
    picture.pixels = _upright(pixels, orientation)
    picture.resolution = image.xres if image.xres != 1.0 else None  # 1: unknown
    for name in image.get_fields():
        exif = name == "exif-data" or (name.startswith("exif-ifd") and "Orientation" not in name)
        if (exif and "exif-data" in fields) or name == "icc-profile-data":
            picture.metadata.append((image.get_typeof(name), name, image.get(name)))
    return picture


def _to_grey_or_rgb(path: Path, image: Any, notes: list[str]) -> Any:
    """`image` as grey or RGB, with or without alpha, in 8 or 16 bits."""
    if image.interpretation == "cmyk":
        notes.append("is CMYK; converted to RGB")
        has_profile = image.get_typeof("icc-profile-data") != 0
        if has_profile:
            image = image.icc_transform("srgb", embedded=True, intent="relative")
        else:
            image = image.colourspace("srgb")
    elif image.interpretation in ("lab", "labs"):
        notes.append("is CIELAB; converted to RGB")
        image = image.colourspace("srgb")
    if image.format not in ("uchar", "ushort"):
        raise ImageError(
            f"{path} has samples of the type {image.format}; what can be read is 8 and 16 bits "
            "without sign"
        )
    known = ("b-w", "grey16", "srgb", "rgb", "rgb16")
    if image.interpretation not in known or not 1 <= image.bands <= 4:
        raise ImageError(
            f"{path} has {image.bands} channels of the kind {image.interpretation}; what can be "
            "read is grey and RGB, with or without alpha, and CMYK"
        )
    return image


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`pixels` turned and mirrored as EXIF orientation 1..8 says; other values mean nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _read_bmp(
    path: Path, data: bytes, check_size: Callable[[int, int, int], None] | None
) -> Picture:
    import io
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow's own limit on pixels; ours stands in its place, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=("BMP",))
        _check_pixels(path, image.height, image.width, len(image.getbands()), check_size)
        if image.mode == "P":
            image = image.convert("RGB")
        elif image.mode == "1":
            image = image.convert("L")
        if image.mode not in ("L", "RGB", "RGBA"):
            raise ImageError(f"{path} is a BMP of the kind {image.mode}, which cannot be read")
        pixels = np.asarray(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} says it has more than {MAX_INPUT_PIXELS / 1e6:.0f} million pixels ({error})"
        ) from error
    except Exception as error:  # a damaged header can make a decoder raise almost anything
        raise ImageError(f"{path} is damaged or cut short ({error})") from error
    pixels = pixels.reshape(image.height, image.width, -1)
    return Picture(np.ascontiguousarray(pixels))


# ------------------------------------------------------------------------------------------ writing


def check_output_size(kind: str, height: int, width: int) -> None:
    """Raises ImageError where the format `kind` cannot hold the result."""
    if max(height, width) > MAX_SIDE[kind]:
        raise ImageError(
            f"the result would be {width}x{height}, but {kind.upper()} holds at most "
            f"{MAX_SIDE[kind]} pixels a side; choose another --format (png, tiff)"
        )
    if kind == "bmp" and 3 * height * (width + 1) > (1 << 32) - 1024:
        raise ImageError(
            f"the result would be {width}x{height}, more than the 4 GB that a BMP can hold; "
            "choose another --format (png, tiff)"
        )


def write_picture(path: Path, picture: Picture, kind: str, quality: int) -> list[str]:
    """Writes `picture` to `path` in the format `kind`, whole or not at all.

    quality: 1..100, for JPEG and WebP (100 makes WebP lossless).
    Returns what the user should know: a loss that the format forced. Raises ImageError.
    """
    pixels = picture.pixels
    notes = []
    check_output_size(kind, *pixels.shape[:2])
    if kind not in ("png", "tiff") and pixels.dtype == np.uint16:
        notes.append(f"16 bits reduced to 8, since {kind.upper()} holds no more")
        pixels = _to_8_bits(pixels)
    if kind in ("jpeg", "bmp") and pixels.shape[2] in (2, 4):
        notes.append(f"transparency laid on white, since {kind.upper()} has none")
        pixels = _on_white(pixels)
    try:
        with whole_or_nothing(path) as file:
            if kind == "bmp":
                _write_bmp(file, pixels)
            else:
                _in_thread(
                    lambda running: _write_vips(file, pixels, picture, kind, quality, running)
                )
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from error
    return notes


def check_writable(path: Path) -> None:
    """Raises ImageError where no file can be made beside `path`: before the work, not after it."""
    if path.is_dir():
        raise ImageError(f"the output {path} is a folder")
    probe = temporary_name(path)
    try:
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise ImageError(
            f"nothing can be written to the folder {path.parent}: {error.strerror or error}"
        ) from error


def _write_vips(
    file: IO[bytes],
    pixels: np.ndarray,
    picture: Picture,
    kind: str,
    quality: int,
    running: list[Any],
) -> None:
    """Encodes into `file`; the libvips image that is at work is put into `running`."""
    pyvips = vips()
    height, width, bands = pixels.shape
    deep = pixels.dtype == np.uint16
    image = pyvips.Image.new_from_memory(
        np.ascontiguousarray(pixels), width, height, bands, "ushort" if deep else "uchar"
    )
    interpretation = ("grey16" if deep else "b-w") if bands < 3 else ("rgb16" if deep else "srgb")
    resolution = picture.resolution or 72 / 25.4
    image = image.copy(interpretation=interpretation, xres=resolution, yres=resolution)
    for gtype, name, value in picture.metadata:
        image.set_type(gtype, name, value)
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    kept = {name for _, name, _ in picture.metadata}
    keep = [
        flag for flag, name in (("icc", "icc-profile-data"), ("exif", "exif-data")) if name in kept
    ]
    options: dict[str, Any] = {"keep": ":".join(keep) or "none"}
    if kind == "png":
        # On photographs, a higher level with the filter chosen row by row takes much longer for
        # little, and no filter at all makes files far larger.
        options.update(compression=3, filter="paeth", bitdepth=16 if deep else 8)
    elif kind == "jpeg":
        options.update(Q=quality, optimize_coding=True)
    elif kind == "webp":
        options.update(Q=quality, lossless=quality == 100)
    elif kind == "tiff":
        # Classic TIFF ends at 4 GB.
        options.update(compression="deflate", predictor="horizontal")
        options.update(bigtiff=pixels.nbytes > 3 << 30)
    else:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, not {kind!r}")
    target = pyvips.Target.new_to_descriptor(file.fileno())
    running.append(image)
    try:
        getattr(image, f"{kind}save_target")(target, **options)
    except pyvips.Error as error:
        raise OSError(f"the encoder stopped{_reason(error)}") from error


def _write_bmp(file: IO[bytes], pixels: np.ndarray) -> None:
    """An uncompressed BMP: rows from the bottom up, blue first, each padded to 4 bytes."""
    height, width, bands = pixels.shape
    palette = b"" if bands == 3 else bytes(v for i in range(256) for v in (i, i, i, 0))
    stride = -(-width * bands // 4) * 4
    start = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + stride * height, 0, 0, start)
    dots = round(72 / 0.0254)
    header += struct.pack(
        "<IiiHHIIiiII",
        *(40, width, height, 1, 8 * bands, 0, stride * height, dots, dots, len(palette) // 4, 0),
    )
    file.write(header + palette)
    padding = bytes(stride - width * bands)
    for row in range(height - 1, -1, -1):
        file.write(pixels[row, :, ::-1].tobytes() + padding)


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    result = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), 256):  # in strips: the arithmetic needs 32 bits
        strip = pixels[row : row + 256].astype(np.uint32)
        result[row : row + 256] = (strip + 128) // 257
    return result


def _on_white(pixels: np.ndarray) -> np.ndarray:
    result = np.empty((*pixels.shape[:2], pixels.shape[2] - 1), np.uint8)
    for row in range(0, len(pixels), 256):
        strip = pixels[row : row + 256].astype(np.uint32)
        colour, alpha = strip[..., :-1], strip[..., -1:]
        result[row : row + 256] = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return result
