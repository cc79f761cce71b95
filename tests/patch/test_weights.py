"""Trained networks in other people's code: the same picture on Set5 before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import third_party as tp
import torch
from sr_kernels.models.evaluate import Pair, psnr_y, to_tensor
from torch import Tensor, nn

import sr_kernels

# file: (network, white, PSNR of its authors' weights on Set5, image that is tried)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], float, dict[str, float]]] = {
    "elan_light_x4_official_keys.pth": (tp.ELAN, 255.0, {"butterfly": 29.210, "woman": 30.962}),
    "elan_light_x4_frl_keys.pth": (
        lambda: tp.ELAN(spelling="friedricelab"),
        255.0,
        {"butterfly": 29.210},
    ),
    "imdn_x4.pth": (tp.IMDN, 1.0, {}),
    "pan_x4.pth": (tp.PAN, 1.0, {}),
    "dctlsa_x4.pt": (tp.DCTLSA, 1.0, {}),
}


def load(path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("params", state)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    model = build()
    if "tail.weight" in state:  # FriedRiceLab's tail is a Sequential of its own making
        state = {name.replace("tail.", "tail.0."): value for name, value in state.items()}
    model.load_state_dict(state)
    return model.eval()


def quality(y: Tensor, high: object, white: float) -> float:
    pixels = (y * (255 / white)).round().clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()
    return float(psnr_y(pixels, high, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_same_picture(name: str, data: Path, set5: dict[str, Pair]) -> None:
    build, white, published = NETWORKS[name]
    model = load(data / "weights" / name, build)
    for image in published or ["butterfly"]:
        low, high = set5[image]
        x = to_tensor([low], white)
        with torch.inference_mode():
            before = model(x)
            with sr_kernels.patched(model) as report:
                assert report.replaced
                after = model(x)
            assert torch.equal(model(x), before)
        assert (after - before).abs().max() < 1e-3 * white
        assert quality(after, high, white) == pytest.approx(quality(before, high, white), abs=1e-3)
        if published:
            assert quality(after, high, white) == pytest.approx(published[image], abs=2e-3)


@pytest.mark.parametrize(("name", "published"), [("imdn_x4.pth", 32.210), ("pan_x4.pth", 32.131)])
def test_quality_on_all_of_set5(
    name: str, published: float, data: Path, set5: dict[str, Pair]
) -> None:
    build, white, _ = NETWORKS[name]
    model = load(data / "weights" / name, build)

    def each() -> list[float]:
        with torch.inference_mode():
            return [
                quality(model(to_tensor([low], white)), high, white) for low, high in set5.values()
            ]

    before = each()
    with sr_kernels.patched(model):
        after = each()
    assert after == pytest.approx(before, abs=1e-3)
    assert sum(after) / 5 == pytest.approx(published, abs=1e-3)
