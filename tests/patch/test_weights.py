"""Trained networks in other people's code: the same picture on Set5 before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import third_party as tp
import torch
from sr_kernels.models.evaluate import Pair, psnr_y, to_tensor
from torch import Tensor, nn

import sr_kernels


class Case(NamedTuple):
    """build: the network.  white: of its input.  replaced: a class that must be.  published: PSNR
    of its authors' weights on Set5; None: a single picture is tried."""

    build: Callable[[], nn.Module]
    white: float
    replaced: str
    published: float | None


NETWORKS = {
    "elan_light_x4_official_keys.pth": Case(tp.ELAN, 255.0, "ELAB", 32.438),
    "elan_light_x4_frl_keys.pth": Case(
        lambda: tp.ELAN(spelling="friedricelab"), 255.0, "ListELAB", 32.438
    ),
    "imdn_x4.pth": Case(tp.IMDN, 1.0, "IMDN", 32.210),
    "pan_x4.pth": Case(tp.PAN, 1.0, "PAN", 32.131),
    "dctlsa_x4.pt": Case(tp.DCTLSA, 1.0, "LinearBlock", None),
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
    build, white, replaced, published = NETWORKS[name]
    model = load(data / "weights" / name, build)
    pictures = set5 if published else {"butterfly": set5["butterfly"]}
    inputs = {image: to_tensor([low], white) for image, (low, _) in pictures.items()}
    with torch.inference_mode():
        before = {image: model(x) for image, x in inputs.items()}
        with sr_kernels.patched(model) as report:
            assert replaced in {entry.class_name for entry in report.replaced}, str(report)
            after = {image: model(x) for image, x in inputs.items()}
        assert torch.equal(model(inputs["butterfly"]), before["butterfly"])
    reached = []
    for image, (_, high) in pictures.items():
        assert not torch.equal(after[image], before[image]), "nothing ran that differs"
        assert (after[image] - before[image]).abs().max() < 1e-3 * white, image
        reached.append(quality(after[image], high, white))
        assert reached[-1] == pytest.approx(quality(before[image], high, white), abs=1e-3), image
    if published:
        assert sum(reached) / len(reached) == pytest.approx(published, abs=1e-3)
