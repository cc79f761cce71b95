"""Packed files of crops: what goes in comes out, and a file that is not whole is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sr_kernels.models.evaluate import Pair
from sr_kernels.models.imresize import downscale
from sr_kernels.models.training import PackedFileError, Trainer, pack, packing
from sr_kernels.models.training.data import load_pairs
from sr_kernels.models.training.packing import GRID
from trainer_checks import quiet, same, tiny, write_image

from sr_kernels import cli


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, size in enumerate([(50, 66), (61, 48), (48, 48)]):
        write_image(tmp_path / "images" / f"{number}.png", *size, number)
    return tmp_path / "images"


@pytest.fixture
def packed(images: Path, tmp_path: Path) -> Path:
    pack([str(images)], [], tmp_path / "crops.zip", note=quiet)
    return tmp_path / "crops.zip"


def write_noise(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def equal(a: list[Pair], b: list[Pair]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def load(path: Path, scale: int = 2) -> list[Pair]:
    return load_pairs([str(path)], [], scale, 4, quiet)


# ------------------------------------------------------------------------------- what is in a file


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_whole_images_come_back(scale: int, images: Path, packed: Path) -> None:
    """Images smaller than a square: the same pairs in the same order, at every scale."""
    assert equal(load(packed, scale), load(images, scale))


def test_training_on_either_is_the_same(images: Path, packed: Path, tmp_path: Path) -> None:
    states = []
    for source in (images, packed):
        keys = {"data": [str(source)], "out": str(tmp_path / f"on_{source.name}"), "steps": 3}
        trainer = Trainer(tiny(tmp_path, "elan_light", **keys), torch.device("cpu"), note=quiet)
        trainer.run()
        states.append(trainer.state())
    for key in ("model", "ema", "optimizer", "loss"):
        assert same(states[0][key], states[1][key]), key


def test_folders_and_files_together(images: Path, packed: Path) -> None:
    told: list[tuple[float, float]] = []
    both = load_pairs(
        [str(packed), str(images)], [], 2, 4, quiet, lambda *numbers: told.append(numbers)
    )
    assert equal(both, [*load(images), *load(packed)])
    assert told == [(0, 3), (1, 3), (2, 3)] * 2
    notes: list[str] = []
    assert len(load_pairs([str(packed)], [], 2, 25, notes.append)) == 1
    assert notes == ["images smaller than 50 pixels in a direction left out: 2"]


def test_squares_lie_side_by_side_on_the_grid(tmp_path: Path) -> None:
    """Noise, in which a crop is at one place alone."""
    pixels = write_noise(tmp_path / "a" / "a.png", 131, 170)
    done = pack([str(tmp_path / "a")], [], tmp_path / "a.zip", side=48, note=quiet)
    assert (done.crops, done.images, done.pixels) == (6, 1, 6 * 48 * 48)
    corners = []
    for _, high in load(tmp_path / "a.zip"):
        assert high.shape == (48, 48, 3)
        [[y], [x]] = np.nonzero((pixels[:84, :123] == high[0, 0]).all(-1))
        assert np.array_equal(pixels[y : y + 48, x : x + 48], high)
        corners.append((int(y), int(x)))
    assert corners == [(y, x) for y in (12, 60) for x in (12, 60, 108)]
    assert all(n % GRID == 0 for corner in corners for n in corner)


@pytest.mark.parametrize(
    ("limit", "expected"), [(15_000, [(0, 0), (1, 0)]), (21_000, [(0, 0), (1, 0), (1, 1)])]
)
def test_every_image_before_any_twice(
    limit: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Two images of four squares each: two of one colour, two of noise. All noise of the second has
    more texture than the first's. There is room for two squares, or three."""
    noises = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (48, 96, 3), dtype=np.uint8)
        noise[:, :48] //= 3 - 2 * number
        noise[:, 48:] //= 4 - 2 * number
        noises.append([noise[:, :48], noise[:, 48:]])
        pixels = np.concatenate([np.full_like(noise, 50), noise])
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{number}.png")
    done = pack([str(tmp_path / "a")], [], tmp_path / "a.zip", side=48, limit=limit, note=quiet)
    assert (done.crops, done.images) == (len(expected), 2)
    for (_, high), (image, square) in zip(load(tmp_path / "a.zip"), expected, strict=True):
        assert np.array_equal(high, noises[image][square])


def test_larger_images_have_their_turn_more_often(tmp_path: Path) -> None:
    """Nine times the area, three times as often."""
    write_noise(tmp_path / "a" / "0.png", 48, 48)
    large = write_noise(tmp_path / "a" / "1.png", 144, 144) // 2  # which has less texture
    Image.fromarray(large).save(tmp_path / "a" / "1.png")
    from_large = []
    for squares in (1, 2, 4):
        limit = squares * 7000 + 900
        pack([str(tmp_path / "a")], [], tmp_path / "a.zip", side=48, limit=limit, note=quiet)
        from_large.append([int(high.max()) < 128 for _, high in load(tmp_path / "a.zip")])
    assert from_large == [[True], [True, True], [False, True, True, True]]


@pytest.mark.parametrize("low", [False, True])
def test_the_file_is_full_and_not_larger(low: bool, tmp_path: Path) -> None:
    for number in range(3):
        pixels = write_noise(tmp_path / "a" / f"{number}.png", 288, 288, number)
        (tmp_path / "low").mkdir(exist_ok=True)
        Image.fromarray(downscale(pixels, 4)).save(tmp_path / "low" / f"{number}.png")
    limit, written = 250_000, []
    done = pack(
        [str(tmp_path / "a")],
        [str(tmp_path / "low")] if low else [],
        tmp_path / "a.zip",
        scale=4 if low else None,
        side=48,
        limit=limit,
        note=quiet,
        writing=lambda *numbers: written.append(numbers[0] / numbers[1]),
    )
    assert limit - 9000 < (tmp_path / "a.zip").stat().st_size <= limit
    assert done.images == 3
    assert written == sorted(written)
    assert 0.9 < written[-1] <= 1
    assert len(load(tmp_path / "a.zip", 4)) == done.crops == len(written)


@pytest.mark.parametrize("ratio", [4, 1])
def test_few_large_images_among_small_ones(
    ratio: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large one fills what they leave, also where not everything is kept in memory."""
    monkeypatch.setattr(packing, "_RATIO", ratio)
    for number in range(30):
        write_noise(tmp_path / "a" / f"{number}.png", 24, 24, number)
    write_noise(tmp_path / "a" / "large.png", 480, 480)
    limit = 250_000
    done = pack([str(tmp_path / "a")], [], tmp_path / "a.zip", side=48, limit=limit, note=quiet)
    assert done.images == 31
    assert limit - 9000 < (tmp_path / "a.zip").stat().st_size <= limit


def test_equal_images_make_equal_files(images: Path, packed: Path, tmp_path: Path) -> None:
    pack([str(images)], [], tmp_path / "again.zip", note=quiet)
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_low_resolution_crops_of_another_degradation(tmp_path: Path) -> None:
    for number in range(2):
        pixels = write_noise(tmp_path / "a" / f"{number}.png", 100, 123, number)
        (tmp_path / "low").mkdir(exist_ok=True)
        Image.fromarray(downscale(pixels, 3) // 2).save(tmp_path / "low" / f"{number}x3.png")
    folders = [str(tmp_path / "a")], [str(tmp_path / "low")]
    pack(*folders, tmp_path / "whole.zip", scale=3, note=quiet)
    assert equal(load(tmp_path / "whole.zip", 3), load_pairs(*folders, 3, 4, quiet))
    pack(*folders, tmp_path / "crops.zip", scale=3, side=36, note=quiet)
    whole = load_pairs(*folders, 3, 4, quiet)
    crops = load(tmp_path / "crops.zip", 3)
    assert len(crops) == 2 * 2 * 3
    for number, (low, high) in enumerate(crops):
        source_low, source_high = whole[number // 6]
        [[y], [x]] = np.nonzero((source_high[:64, :87] == high[0, 0]).all(-1))
        assert np.array_equal(high, source_high[y : y + 36, x : x + 36])
        assert np.array_equal(low, source_low[y // 3 : y // 3 + 12, x // 3 : x // 3 + 12])
    # Unpacked it is two folders of images again.
    with zipfile.ZipFile(tmp_path / "crops.zip") as archive:
        archive.extractall(tmp_path / "out")
    unpacked = load_pairs([str(tmp_path / "out/hr")], [str(tmp_path / "out/lr")], 3, 4, quiet)
    assert equal(unpacked, crops)
    with pytest.raises(PackedFileError, match=r"crops for x3, but the scale is 4; expected a file"):
        load(tmp_path / "crops.zip", 4)


def test_given_low_resolution_images_and_a_file_without(
    images: Path, packed: Path, tmp_path: Path
) -> None:
    for path in images.iterdir():
        write_noise(
            tmp_path / "low" / path.name, *(-(-n // 2) for n in Image.open(path).size[::-1])
        )
    low = [str(tmp_path / "low")]
    with pytest.raises(PackedFileError, match=r"crops\.zip holds no low-resolution crops, but lr"):
        load_pairs([str(images), str(packed)], low, 2, 4, quiet)
    with pytest.raises(ValueError, match=r"lr_data is .*, but data names no folder"):
        load_pairs([str(packed)], low, 2, 4, quiet)


# ---------------------------------------------------------------------------- what cannot be packed


def test_images_that_cannot_be_packed(images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    write_image(images / "tiny.png", 5, 40)
    notes: list[str] = []
    assert pack([str(images)], [], tmp_path / "a.zip", note=notes.append).images == 2
    assert "1.png cannot be read" in notes[0]
    assert notes[1] == "unreadable images left out: 1"
    assert "smaller than 12 pixels in a direction left out: 1" in notes[2]
    for path in ("0.png", "2.png"):
        (images / path).unlink()
    with pytest.raises(ValueError, match=r"is left: 1 are unreadable, 1 smaller than 12x12"):
        pack([str(images)], [], tmp_path / "b.zip", note=quiet)
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        pack(["absent"], [], tmp_path / "b.zip", note=quiet)
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"side": 50}, "side is 50; expected a multiple of 12"),
        ({"scale": 2}, "scale is 2, low_folders .*; expected both or neither"),
        ({"limit": 600}, "not one crop of 288x288 pixels fits into a file of 600 bytes"),
    ],
)
def test_arguments(keys: dict[str, Any], words: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        pack([str(images)], [], tmp_path / "a.zip", note=quiet, **keys)


def test_full_disk_leaves_the_old_file(images: Path, packed: Path) -> None:
    """No file may grow beyond 4 KB, as if the disk were full."""
    before = packed.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(PackedFileError, match=r"crops\.zip cannot be written: File too large"):
            pack([str(images)], [], packed, note=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert packed.read_bytes() == before
    assert sorted(path.name for path in packed.parent.iterdir()) == ["crops.zip", "images"]


# -------------------------------------------------------------------------------- damaged files


def test_truncated_files(packed: Path) -> None:
    content = packed.read_bytes()
    for length in (0, 1, 30, 500, len(content) // 2, len(content) - 60, len(content) - 1):
        packed.write_bytes(content[:length])
        with pytest.raises(PackedFileError, match=r"crops\.zip is no packed file of crops"):
            load(packed)


def test_a_changed_byte_is_noticed_or_without_effect(packed: Path) -> None:
    """Anywhere in the file: either an error with its name, or the same crops as before."""
    content, expected = packed.read_bytes(), load(packed)
    refused: list[str] = []
    positions = np.random.default_rng(0).permutation(len(content))[:150]
    tail = range(len(content) - 300, len(content))  # the index
    for position in (*positions, *tail):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        packed.write_bytes(damaged)
        try:
            assert equal(load(packed), expected), position
        except PackedFileError as error:
            refused.append(str(error))
    assert len(refused) > 250
    assert all(str(packed) in message for message in refused)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def archive_of(head: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        if head is not None:
            archive.writestr("crops.json", json.dumps(head))
        archive.writestr("code.pkl", pickle.dumps(Code()))
    return content.getvalue()


HEAD = {"format": "sr_kernels crops", "version": 1, "crops": 1, "scale": None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "is no packed file of crops"),
        (pickle.dumps(Code()), "is no packed file of crops"),
        (archive_of(None), "no item named 'crops.json'"),
        (archive_of([]), "its crops.json does not say 'sr_kernels crops'"),
        (archive_of(HEAD | {"format": "other"}), "its crops.json does not say"),
        (archive_of(HEAD | {"version": 2}), "of version 2; this program reads version 1"),
        (archive_of(HEAD | {"crops": -1}), "says crops -1, scale None"),
        (archive_of(HEAD | {"crops": True}), "says crops True"),
        (archive_of(HEAD | {"scale": "2"}), "scale '2'"),
        (archive_of(HEAD), "no item named 'hr/0000000.webp'"),
    ],
)
def test_other_files(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(PackedFileError) as caught:
        load(tmp_path / "a.zip")
    assert str(tmp_path / "a.zip") in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_crop_that_is_no_image(packed: Path) -> None:
    """With a checksum that is right."""
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("crops.json", json.dumps(HEAD))
        archive.writestr("hr/0000000.webp", b"text")
    with pytest.raises(PackedFileError, match=r"crops\.zip/hr/0000000\.webp cannot be read as an"):
        load(packed)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_pack_and_train(images: Path, tmp_path: Path, said: Any) -> None:
    (images / "broken.png").write_text("no picture")
    crops, out = tmp_path / "crops.zip", tmp_path / "run"
    status, done, notes = said("pack", images, "--output", crops, "--side", 24)
    assert status == 0
    assert "crops.zip: 12 crops of 3 images, 0.0 megapixels, 0.0 MiB" in done
    assert "broken.png cannot be read" in notes
    status, _, error = said("pack", images, "-o", crops)
    assert (status, "--overwrite replaces it" in error) == (1, True)
    assert said("pack", images, "-o", crops, "--overwrite")[0] == 0
    line = ["train", "mafdn_x2_short", "--data", crops, "--out", out, "--steps", 1, "--patch", 8]
    line += ["--batch", 1, "--set", "options={channels: 8, num_blocks: 1, branches: 2}"]
    status, done, _ = said(*line)
    assert status == 0
    assert "training on 3 images" in done
    crops.write_bytes(crops.read_bytes()[:-7])
    status, _, error = said(*line[:3], crops, "--out", tmp_path / "other", *line[6:])
    assert (status, "is truncated or damaged" in error) == (1, True)


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["-o", "crops.tar"], 2, "crops.tar: expected a name that ends in .zip"),
        (["-o", "a.zip", "--side", "50"], 2, "--side 50: expected a multiple of 12"),
        (["-o", "a.zip", "--size", "0"], 2, "--size 0.0: expected a number > 0"),
        (["-o", "a.zip", "--size", "nan"], 2, "--size nan: expected a number > 0"),
        (["-o", "a.zip", "--scale", "4"], 2, "--lr-data and --scale go together"),
        (["-o", "absent/a.zip"], 1, "absent/a.zip cannot be written: expected a file in a folder"),
        (["-o", "a.zip", "--size", "1e-4"], 1, "not one crop of 288x288 pixels fits"),
        ([], 2, "-o"),
    ],
)
def test_command_says_what_is_wrong(
    more: list[str],
    status: int,
    words: str,
    images: Path,
    tmp_path: Path,
    said: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    actual, _, error = said("pack", images, *more)
    assert actual == status
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
