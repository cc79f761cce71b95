"""Trained networks on Set5 x4: the published numbers, and kernels against stock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sr_kernels.models import PRETRAINED, load_checkpoint, load_pretrained, plan
from sr_kernels.models.evaluate import Pair, psnr_y, to_tensor, upscale

OFFICIAL = "elan_light_x4_official_keys.pth"
FRIEDRICELAB = "elan_light_x4_frl_keys.pth"


def mean_psnr(model: torch.nn.Module, set5: dict[str, Pair]) -> float:
    return float(np.mean([psnr_y(upscale(model, low), high, 4) for low, high in set5.values()]))


@pytest.mark.parametrize("name", [OFFICIAL, FRIEDRICELAB])
def test_elan_light(name: str, data: Path, set5: dict[str, Pair]) -> None:
    model = load_checkpoint(data / "weights" / name)
    assert (model.scale, model.rgb_range) == (4, 255.0)
    assert mean_psnr(model, set5) == pytest.approx(32.438, abs=1e-3)


def test_elan_light_each_image_and_the_stock_twin(data: Path, set5: dict[str, Pair]) -> None:
    published = {
        "baby": 33.862,
        "bird": 35.177,
        "butterfly": 29.210,
        "head": 32.977,
        "woman": 30.962,
    }
    model = load_checkpoint(data / "weights" / OFFICIAL)
    for name, (low, high) in set5.items():
        x = to_tensor([low], 255.0)
        with torch.inference_mode():
            model.backend = None
            ours = model(x)
            model.backend = "reference"
            stock = model(x)
        assert (ours - stock).abs().max() < 2e-3, name
        rounded = ours.round().clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()
        assert psnr_y(rounded, high, 4) == pytest.approx(published[name], abs=2e-3), name


def test_shipped_mafdn(set5: dict[str, Pair]) -> None:
    model = load_pretrained("mafdn_x4")
    assert (model.scale, model.rgb_range, model.folded) == (4, 1.0, True)
    assert mean_psnr(model, set5) == pytest.approx(31.331, abs=2e-3)
    low = set5["butterfly"][0]
    x = to_tensor([low])
    with torch.inference_mode():
        ours = model(x)
        model.backend = "reference"
        assert (ours - model(x)).abs().max() * 255 < 2e-3


def test_shipped_elan_light(set5: dict[str, Pair]) -> None:
    model = load_pretrained("elan_light_x4")
    assert (model.scale, model.rgb_range) == (4, 1.0)
    assert mean_psnr(model, set5) == pytest.approx(31.283, abs=2e-3)
    assert mean_psnr(plan(model), set5) == pytest.approx(31.283, abs=2e-3)


def test_every_shipped_file_is_there() -> None:
    for name, path in PRETRAINED.items():
        assert path.is_file(), name
