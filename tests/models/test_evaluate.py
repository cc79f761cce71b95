"""Bicubic reduction against MATLAB's files, PSNR and SSIM against published figures."""

from __future__ import annotations

import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from from_file import load
from PIL import Image
from sr_kernels.models import imresize
from sr_kernels.models.evaluate import (
    Pair,
    UnreadableImage,
    make_pair,
    psnr_y,
    read_image,
    read_pairs,
    score,
    ssim_y,
    upscale,
)

from sr_kernels import cli

HERE = Path(__file__).parent


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


# ------------------------------------------------------------------------------------------ bicubic


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reduction_is_matlabs_byte_for_byte(data: Path, scale: int) -> None:
    """Set5's low-resolution files were written by MATLAB."""
    low = data / "Set5" / "LR_bicubic" / f"X{scale}"
    for path in sorted((data / "Set5" / "HR").glob("*.png")):
        ours, _ = make_pair(read_image(path), scale)
        matlab = read_image(low / f"{path.stem}x{scale}.png")
        assert np.array_equal(ours, matlab), path.stem


def test_reduction_of_other_sizes() -> None:
    """A constant stays, a ramp stays a ramp away from the edges, sizes are rounded up."""
    flat = np.full((13, 10, 3), 77, dtype=np.uint8)
    assert np.array_equal(imresize.downscale(flat, 4), np.full((4, 3, 3), 77))
    ramp = np.broadcast_to(4 * np.arange(60, dtype=np.uint8)[:, None], (60, 8))
    inner = imresize.downscale(ramp, 3)[3:-3, 0].astype(int)
    assert np.array_equal(np.diff(inner), np.full(len(inner) - 1, 12))
    assert imresize.upscale(ramp, 2).shape == (120, 16)


# ---------------------------------------------------------------------------------------- metrics


def test_psnr_of_a_known_difference() -> None:
    a = np.full((20, 20, 3), 100, dtype=np.uint8)
    b = a + np.uint8(10)
    b[:2] = 0  # the border does not count
    assert psnr_y(a, b, 2) == pytest.approx(20 * np.log10(255 / (219 / 255 * 10)), abs=1e-6)
    assert psnr_y(a, a, 0) == np.inf


def test_ssim_by_its_formula() -> None:
    """One window only: the formula written out with a two-dimensional Gaussian."""
    a, b = picture(15, 15, 1), picture(15, 15, 2)
    k = np.exp(-np.square(np.arange(-5, 6)) / 4.5)
    w = np.outer(k, k) / k.sum() ** 2
    x, y = (16 + p[2:13, 2:13].astype(float) @ [65.481, 128.553, 24.966] / 255 for p in (a, b))
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (
        (w * (p - m) * (q - n)).sum() for p, m, q, n in ((x, mx) * 2, (y, my) * 2, (x, mx, y, my))
    )
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_y(a, b, 2) == pytest.approx(expected, abs=1e-9)
    assert ssim_y(a, a, 2) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim_y(a, b, 3)


@pytest.fixture
def authors_code() -> object:
    """IMDN and PAN as their authors wrote them down: tests/patch/third_party.py."""
    return load(HERE.parent / "patch" / "third_party.py", "third_party_networks")


@pytest.mark.parametrize(
    ("name", "psnr", "ssim"), [("IMDN", 32.210, 0.8948), ("PAN", 32.131, 0.8948)]
)
def test_published_figures(
    name: str, psnr: float, ssim: float, data: Path, set5: dict[str, Pair], authors_code: object
) -> None:
    state = torch.load(data / "weights" / f"{name.lower()}_x4.pth", "cpu", weights_only=True)
    model = getattr(authors_code, name)().eval()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model.rgb_range = 1.0
    scores = [score(upscale(model, low), high, 4) for low, high in set5.values()]
    assert np.mean(scores, axis=0)[0] == pytest.approx(psnr, abs=2e-3)
    assert np.mean(scores, axis=0)[1] == pytest.approx(ssim, abs=1e-4)


# ---------------------------------------------------------------------------------------- command


def last_row(out: str) -> tuple[float, float]:
    words = out.splitlines()[-1].split()
    assert words[0] == "mean"
    return float(words[-4]), float(words[-1])


def test_bicubic_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hr = str(data / "Set5" / "HR")
    for scale, psnr, ssim in ((2, 33.67, 0.9303), (3, 30.40, 0.8689), (4, 28.429, 0.8111)):
        assert cli.main(["evaluate", "--bicubic", "--scale", str(scale), "--data", hr]) == 0
        measured = last_row(capsys.readouterr().out)
        assert measured[0] == pytest.approx(psnr, abs=2e-3 if scale == 4 else 6e-3)
        assert measured[1] == pytest.approx(ssim, abs=6e-4)


def test_network_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = str(data / "weights" / "elan_light_x4_official_keys.pth")
    hr, lr = str(data / "Set5" / "HR"), str(data / "Set5" / "LR_bicubic" / "X4")
    table = tmp_path / "rows.csv"
    command = ["evaluate", "--weights", weights, "--data", hr, "--lr", lr, "--csv", str(table)]
    assert cli.main(command) == 0
    assert last_row(capsys.readouterr().out)[0] == pytest.approx(32.438, abs=2e-3)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["baby", "bird", "butterfly", "head", "woman", "mean"]
    assert float(rows[2]["psnr_y"]) == pytest.approx(29.210, abs=2e-3)
    assert float(rows[-1]["ssim_y"]) == pytest.approx(0.898, abs=1e-3)


def test_shipped_weights_by_name(
    set5: dict[str, Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "hr" / "bird.png", set5["bird"][1])
    assert cli.main(["evaluate", "--weights", "mafdn_x4", "--data", str(tmp_path / "hr")]) == 0
    assert last_row(capsys.readouterr().out)[0] >= 33


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--bicubic"], 2, "--scale"),
        (["--bicubic", "--scale", "2", "--data", "absent"], 1, "absent is not a folder"),
        (["--weights", "absent.pth"], 1, "absent.pth"),
        (["--weights", "mafdn_x4", "--scale", "2"], 2, "x4"),
        (["--bicubic", "--weights", "mafdn_x4"], 2, "not allowed"),
        (["--bicubic", "--scale", "2", "--csv", "absent/a.csv"], 1, "--csv absent/a.csv cannot"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "a.png", picture(40, 40))
    if "--data" not in arguments:
        arguments = [*arguments, "--data", str(tmp_path)]
    assert cli.main(["evaluate", *arguments]) == status
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- pairs


def test_pairs_by_name(tmp_path: Path) -> None:
    """im1x4 belongs to im1, and im10x4 does not."""
    for name in ("im1", "im10"):
        save(tmp_path / "hr" / f"{name}.png", picture(42, 45))
        save(tmp_path / "lr" / f"{name}x4.png", picture(10, 12))  # 45 / 4, rounded up
    pairs = dict(read_pairs(tmp_path / "hr", tmp_path / "lr", 4))
    assert [side.shape for side in pairs["im1"]] == [(10, 11, 3), (40, 44, 3)]


def test_pairs_of_the_wrong_scale(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", picture(40, 40))
    save(tmp_path / "lr" / "a.png", picture(20, 20))
    with pytest.raises(ValueError, match=r"a\.png is 20x20 .*reduced by 4; expected 10x10"):
        read_pairs(tmp_path / "hr", tmp_path / "lr", 4)


def test_images_that_cannot_be_measured(tmp_path: Path) -> None:
    hr = tmp_path / "hr"
    path = save(hr / "a.png", picture(40, 40))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty"):
        read_pairs(tmp_path / "empty", None, 2)
    save(tmp_path / "lr" / "b.png", picture(10, 10))
    with pytest.raises(FileNotFoundError, match=r"0 low-resolution images for a\.png"):
        read_pairs(hr, tmp_path / "lr", 4)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read"):
        read_pairs(hr, None, 4)
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(path)
    with pytest.raises(UnreadableImage, match="expected 8 bits"):
        read_pairs(hr, None, 4)
    save(path, picture(8, 40))
    with pytest.raises(ValueError, match=r"a\.png is 40x8 pixels; expected at least 20x20"):
        read_pairs(hr, None, 4)
    save(path, picture(19, 40))
    with pytest.raises(ValueError, match=r"a\.png is 40x19 pixels; expected at least 20x20"):
        read_pairs(hr, None, 4)
    save(path, picture(20, 20))
    assert score(*[read_pairs(hr, None, 4)[0][1][1]] * 2, 4)[1] == pytest.approx(1)
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)  # 16-bit RGB
    rows = zlib.compress(bytes(20 * (1 + 20 * 6)))
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
            for k, d in chunks
        )
    )
    with pytest.raises(UnreadableImage, match="RGB;16B; expected 8 bits"):
        read_pairs(hr, None, 4)
