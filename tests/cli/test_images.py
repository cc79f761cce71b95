"""Picture files: what is read, what is kept, what is refused."""

from __future__ import annotations

import functools
import io
import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms, ImageOps

from sr_kernels.cli import images
from sr_kernels.cli.images import ImageError, Picture, read_picture, write_picture

RNG = np.random.default_rng(1)


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@functools.cache  # the profile holds the second of its making
def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "1", "P"])
def test_8_bits(tmp_path: Path, mode: str, ending: str) -> None:
    stored = (
        Image.fromarray(noise(9, 13, 4)).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    )
    path = tmp_path / f"a.{ending}"
    if (ending, mode) in {("bmp", "LA"), ("bmp", "RGBA")}:
        pytest.skip("Pillow writes no such BMP with an alpha that counts")
    stored.save(path, **({"lossless": True, "exact": True} if ending == "webp" else {}))
    expected = np.asarray(Image.open(path).convert({"1": "L", "P": "RGB"}.get(mode, mode)))
    pixels = read_picture(path).pixels
    if ending == "webp" and mode in ("L", "1", "LA"):  # WebP has no grey
        pixels = pixels[..., [0, 3]] if mode == "LA" else pixels[..., :1]
    np.testing.assert_array_equal(pixels, expected.reshape(9, 13, -1))


def test_jpeg(tmp_path: Path) -> None:
    for mode, channels in (("RGB", 3), ("L", 1)):
        Image.fromarray(noise(16, 16, 3)).convert(mode).save(tmp_path / "a.jpg")
        pixels = read_picture(tmp_path / "a.jpg").pixels
        assert pixels.shape == (16, 16, channels)
        expected = np.asarray(Image.open(tmp_path / "a.jpg")).reshape(16, 16, channels)
        assert np.abs(pixels.astype(int) - expected).max() <= 2  # decoders round differently


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_go_there_and_back(tmp_path: Path, channels: int, kind: str) -> None:
    pixels = noise(9, 13, channels, dtype=np.uint16)
    write_picture(tmp_path / "a", Picture(pixels), kind, 95)
    back = read_picture(tmp_path / "a").pixels
    assert back.dtype == np.uint16
    np.testing.assert_array_equal(back, pixels)


def test_16_bits_as_the_standard_says(tmp_path: Path) -> None:
    """Samples of PNG are big-endian: held against a file made by hand, byte by byte."""
    pixels = noise(2, 3, 3, dtype=np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, 2, raw))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_orientation_is_applied_and_reset(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source, target = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    Image.fromarray(noise(8, 24, 3)).save(source, exif=exif, quality=95)
    picture = read_picture(source)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(source)).convert("RGB"))
    assert picture.pixels.shape == upright.shape
    assert np.abs(picture.pixels.astype(int) - upright).max() <= 2
    write_picture(target, picture, images.SUFFIXES[target.suffix], 95)
    with Image.open(target) as written:
        assert written.getexif().get(0x0112, 1) == 1
        assert written.size == upright.shape[1::-1]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_profile_is_kept(tmp_path: Path, kind: str) -> None:
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", icc_profile=srgb_profile())
    write_picture(tmp_path / "b", read_picture(tmp_path / "a.png"), kind, 95)
    assert Image.open(tmp_path / "b").info["icc_profile"] == srgb_profile()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_exif_is_kept(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "The Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    Image.fromarray(noise(8, 24, 3)).save(tmp_path / "a.jpg", exif=exif, dpi=(300, 300))
    picture = read_picture(tmp_path / "a.jpg")
    picture.pixels = picture.pixels.repeat(2, 0).repeat(2, 1)
    write_picture(tmp_path / "b", picture, kind, 95)
    with Image.open(tmp_path / "b") as written:
        kept = written.getexif()
        assert kept[0x010F] == "The Maker"
        assert kept.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
        assert kept.get_ifd(0x8769)[0xA002] == 48  # the width is the new one
        assert kept[0x011A] == 300


def test_no_metadata_is_made_up(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", Picture(noise(4, 4, 3)), "png", 95)
    data = (tmp_path / "a.png").read_bytes()
    assert b"eXIf" not in data
    assert b"iCCP" not in data


@pytest.mark.parametrize("profile", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_becomes_rgb(tmp_path: Path, ending: str, profile: bool) -> None:
    colours = np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 0]]], np.uint8).repeat(8, 0)
    Image.fromarray(colours.repeat(8, 1)).convert("CMYK").save(tmp_path / f"a.{ending}")
    picture = read_picture(tmp_path / f"a.{ending}")
    assert picture.pixels.shape == (8, 24, 3)
    assert any("CMYK" in note for note in picture.notes)
    red, white, black = (picture.pixels[4, x].astype(int) for x in (4, 12, 20))
    assert red[0] > 150
    assert red[1:].max() < 100
    assert white.min() > 240
    assert black.max() < 80


def test_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(noise(8, 8, 3)).quantize(4)
    image.save(tmp_path / "a.png", transparency=2)
    pixels = read_picture(tmp_path / "a.png").pixels
    assert pixels.shape[2] == 4
    np.testing.assert_array_equal(pixels[..., 3] == 0, np.asarray(image) == 2)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_first_of_several(tmp_path: Path, ending: str) -> None:
    frames = [Image.fromarray(noise(8, 8, 3)) for _ in range(3)]
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = read_picture(path)
    np.testing.assert_array_equal(picture.pixels[..., :3], np.asarray(frames[0]))
    assert any("only the first" in note for note in picture.notes)


def test_file_is_known_by_its_content(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (8, 8, 3)


# ---------------------------------------------------------------------------------------- bad files


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def encoded(ending: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, ending, **options)
    return buffer.getvalue()


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def flipped_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 64]) + data[middle + 64 :]


BAD_FILES = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"this is no picture\n", "no picture of a known kind"),
    "zeros": (lambda: bytes(1000), "no picture of a known kind"),
    "one byte": (lambda: b"\x89", "no picture of a known kind"),
    "gif": (lambda: b"GIF89a" + bytes(100), "a GIF"),
    "pdf": (lambda: b"%PDF-1.7", "a PDF"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
    "html": (lambda: b"<!DOCTYPE html><title>404</title>", "an HTML page"),
    "heif": (lambda: b"\0\0\0\x18ftypheic" + bytes(100), "a HEIF"),
    "png signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
    "png header alone": (lambda: encoded("png")[:33], "damaged or cut short"),
    "png cut in half": (lambda: cut(encoded("png"), 0.5), "damaged or cut short"),
    "png cut near its end": (lambda: cut(encoded("png"), 0.98), "damaged or cut short"),
    "png damaged": (lambda: flipped_middle(encoded("png")), "damaged or cut short"),
    "png of no width": (lambda: png(0, 4, 8, 2, b""), "damaged or cut short"),
    "png of impossible depth": (lambda: png(4, 4, 7, 2, bytes(99)), "damaged or cut short"),
    "png bomb": (lambda: png(60000, 60000, 8, 2, bytes(99)), "limit is 268 million"),
    "png with too little in it": (lambda: png(64, 64, 8, 2, bytes(99)), "damaged or cut short"),
    "jpeg marker alone": (lambda: b"\xff\xd8\xff", "damaged or cut short"),
    "jpeg header alone": (lambda: encoded("jpeg")[:100], "damaged or cut short"),
    "jpeg cut in half": (lambda: cut(encoded("jpeg"), 0.5), "damaged or cut short"),
    "jpeg cut near its end": (lambda: cut(encoded("jpeg"), 0.98), "damaged or cut short"),
    "webp header alone": (lambda: encoded("webp")[:16], "damaged or cut short"),
    "webp cut in half": (lambda: cut(encoded("webp"), 0.5), "damaged or cut short"),
    "webp damaged": (
        lambda: encoded("webp")[:12] + bytes(20) + encoded("webp")[32:],
        "damaged or cut short",
    ),
    "tiff header alone": (lambda: encoded("tiff")[:8], "damaged or cut short"),
    "tiff cut in half": (lambda: cut(encoded("tiff"), 0.5), "damaged or cut short"),
    "tiff lzw cut in half": (
        lambda: cut(encoded("tiff", compression="tiff_lzw"), 0.5),
        "damaged or cut short",
    ),
    "bmp header alone": (lambda: encoded("bmp")[:20], "damaged or cut short"),
    "bmp cut in half": (lambda: cut(encoded("bmp"), 0.5), "damaged or cut short"),
    "bmp bomb": (
        lambda: encoded("bmp")[:18] + struct.pack("<ii", 60000, 60000) + encoded("bmp")[26:],
        "million",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, words = BAD_FILES[case]
    path = tmp_path / "a.png"
    path.write_bytes(make())
    with pytest.raises(ImageError, match=words) as caught:
        read_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # no decoder speaks past us


def test_kinds_of_tiff_that_are_refused(tmp_path: Path) -> None:
    for kind, words in (("float", "type float"), ("int", "type int"), ("short", "type short")):
        path = tmp_path / f"{kind}.tif"
        pyvips.Image.black(8, 8).cast(kind).tiffsave(str(path))
        with pytest.raises(ImageError, match=words):
            read_picture(path)
    pyvips.Image.black(8, 8, bands=7).tiffsave(str(tmp_path / "seven.tif"))
    with pytest.raises(ImageError, match="7 channels"):
        read_picture(tmp_path / "seven.tif")


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(ImageError, match="not a file"):
        read_picture(tmp_path)


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_bmp(tmp_path: Path, width: int, channels: int) -> None:
    """Rows are padded to 4 bytes: every remainder."""
    pixels = noise(3, width, channels)
    write_picture(tmp_path / "a.bmp", Picture(pixels), "bmp", 95)
    with Image.open(tmp_path / "a.bmp") as written:
        assert written.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(written).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_as_pillow_sees_it(tmp_path: Path, channels: int) -> None:
    pixels = noise(5, 7, channels)
    write_picture(tmp_path / "a.png", Picture(pixels), "png", 95)
    with Image.open(tmp_path / "a.png") as written:
        assert written.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
        np.testing.assert_array_equal(np.asarray(written).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "bmp"])
def test_losses_are_told(tmp_path: Path, kind: str) -> None:
    pixels = np.full((4, 4, 4), 0, np.uint16)  # transparent black
    notes = write_picture(tmp_path / "a", Picture(pixels), kind, 100)
    assert any("16 bits" in note for note in notes)
    with Image.open(tmp_path / "a") as written:
        if kind == "webp":
            assert np.asarray(written.convert("RGBA"))[..., 3].max() == 0
        else:
            assert any("transparency" in note for note in notes)
            assert np.asarray(written.convert("RGB")).min() == 255


def test_16_bits_to_8_round_to_the_nearest() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    expected = np.rint(every.astype(np.float64) / 257).astype(np.uint8)
    np.testing.assert_array_equal(images._to_8_bits(every), expected)


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [("jpeg", 1, 65536), ("webp", 16384, 1), ("bmp", 1, 70000), ("bmp", 50000, 50000)],
)
def test_what_a_format_cannot_hold(kind: str, height: int, width: int) -> None:
    with pytest.raises(ImageError, match=r"another --format"):
        images.check_output_size(kind, height, width)


def test_whole_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):  # noqa: PT012, SIM117
            with images.whole_or_nothing(target) as file:
                file.write(b"new")
                raise error
        assert target.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [target]
    with images.whole_or_nothing(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_quality_counts(tmp_path: Path) -> None:
    pixels = noise(64, 64, 3)
    for kind in ("jpeg", "webp"):
        sizes = []
        for quality in (10, 60, 95):
            write_picture(tmp_path / "a", Picture(pixels), kind, quality)
            sizes.append((tmp_path / "a").stat().st_size)
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] / 2
    write_picture(tmp_path / "a", Picture(pixels), "webp", 100)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a")), pixels)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_interrupt_stops_the_encoder(tmp_path: Path, kind: str) -> None:
    """Ctrl-C ends the encoder's one long call; it does not wait until all is compressed."""
    pixels = noise(4000, 4000, 3)

    with open(tmp_path / "a", "x+b") as file:

        def interrupt_once_begun() -> None:
            while os.fstat(file.fileno()).st_size < 1 << 20:
                time.sleep(0.005)
            signal.raise_signal(signal.SIGINT)

        watcher = threading.Thread(target=interrupt_once_begun)
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            images._in_thread(
                lambda running: images._write_vips(file, pixels, Picture(pixels), kind, 95, running)
            )
        watcher.join()
        assert os.fstat(file.fileno()).st_size < pixels.nbytes / 2
