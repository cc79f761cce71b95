"""The training script end to end on a few synthetic images: fit, go on, export, evaluate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sr_kernels.models import load_checkpoint, train
from sr_kernels.models.evaluate import main as evaluate
from sr_kernels.models.evaluate import make_pair, psnr_y


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        noise = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize((66, 50), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def fit(images: Path, out: Path, minutes: float) -> int:
    arguments = ["fit", "--data", str(images), "--out", str(out), "--scale", "2"]
    arguments += ["--minutes", str(minutes), "--batch", "2", "--patch", "8"]
    arguments += ["--validate", str(images), "--validate-side", "32", "--check-seconds", "0.5"]
    return train.main(arguments)


@pytest.mark.slow
def test_fit_resume_export_evaluate(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    assert fit(images, out, 0.02) == 0
    first = torch.load(out / "last.pt", weights_only=True)
    assert first["step"] > 0
    assert fit(images, out, 0.04) == 0
    second = torch.load(out / "last.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert second["seconds"] > first["seconds"]
    assert "going on from step" in capsys.readouterr().out
    assert (out / "log.txt").read_text().count("validation") >= 2
    assert list(out.glob("*.part")) == []

    assert train.main(["export", str(out / "last.pt"), str(weights)]) == 0
    model = load_checkpoint(weights)
    assert model.scale == 2
    assert weights.stat().st_size < 1.3e6
    capsys.readouterr()
    assert evaluate(["--weights", str(weights), "--data", str(images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert float(lines[-1].split()[-2]) > 20


def test_learning_rate_follows_the_clock() -> None:
    rates = [train.learning_rate(1.0, p / 100, 0.1) for p in range(101)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.0)
    assert train.learning_rate(1.0, 2.0, 0.1) == pytest.approx(0.0)


def test_crops_belong_together(images: Path) -> None:
    pairs = train.load_pairs([images], 2, 8, None)
    crops = iter(train.Crops(pairs, 2, 8, 4, 2, 1))
    lr, hr = next(crops)
    assert lr.shape == (4, 3, 8, 8)
    assert hr.shape == (4, 3, 16, 16)
    assert lr.is_contiguous(memory_format=torch.channels_last)
    smaller = torch.nn.functional.avg_pool2d(hr, 2)
    assert (smaller - lr).abs().mean() < 0.03


def test_cache_gives_the_same_pairs(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.npz"
    first = train.load_pairs([images], 2, 8, cache)
    again = train.load_pairs([images], 2, 8, cache)
    assert len(first) == len(again) == 3
    for (a, b), (c, d) in zip(first, again, strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)


def test_psnr_of_a_known_difference() -> None:
    a = np.full((20, 20, 3), 100, dtype=np.uint8)
    b = a + np.uint8(10)
    b[:2] = 0  # the border does not count
    assert psnr_y(a, b, 2) == pytest.approx(20 * np.log10(255 / (219 / 255 * 10)), abs=1e-6)
    assert psnr_y(a, a, 0) == np.inf


def test_pair_sizes() -> None:
    low, high = make_pair(Image.new("L", (19, 14)), 4)
    assert low.shape == (3, 4, 3)
    assert high.shape == (12, 16, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--data", "absent", "--out", "run"],
        ["export", "absent.pt", "weights.safetensors"],
    ],
)
def test_errors_are_sentences(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 1
    assert "absent" in capsys.readouterr().err
    assert evaluate(["--weights", "absent.pth", "--data", "absent"]) == 1
    assert "absent.pth" in capsys.readouterr().err
