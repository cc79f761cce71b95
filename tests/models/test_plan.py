"""plan(): the same output as the network's, on folded weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sr_kernels.models import elan, elan_light, load_checkpoint, mafdn, plan
from sr_kernels.models.do_conv import DOConv2d
from sr_kernels.models.elan import ELAN
from sr_kernels.models.evaluate import Pair, psnr_y, to_tensor, upscale
from torch import Tensor, nn

from sr_kernels.nn import ShiftConv2d

OFFICIAL = "elan_light_x4_official_keys.pth"


def tiny_elan(scale: int = 2, **options: Any) -> ELAN:
    """A small ELAN, none of whose parameters and statistics is what it was initialised to."""
    torch.manual_seed(7)
    model = elan(scale, **{"m_elan": 4, "c_elan": 12, "n_share": 1, "rgb_range": 1.0, **options})
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return model.eval()


def tiny_mafdn(scale: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    model = mafdn(scale, **{"channels": 12, "num_blocks": 2, "reduction": 3, **options})
    for layer in model.modules():
        if isinstance(layer, DOConv2d):
            nn.init.normal_(layer.D, std=0.1)
    return model.eval()


def assert_same(model: nn.Module, x: Tensor) -> None:
    before = x.clone()
    with torch.inference_mode():
        expected, actual = model(x), plan(model)(x)
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)


@pytest.mark.parametrize("build", [tiny_elan, tiny_mafdn])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (16, 32), (21, 30), (40, 33)])
def test_every_size(build: Any, size: tuple[int, int]) -> None:
    assert_same(build().double(), torch.rand(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1},
        {"scale": 3, "n_share": 0},
        {"n_share": 3},
        {"norm": False, "colors": 1},
        {"rgb_range": 255.0},
        {"window_sizes": (4, 6), "c_elan": 10},
        {"window_sizes": (8,), "c_elan": 5, "r_expand": 3},
        {"c_elan": 60},
    ],
    ids=str,
)
def test_configurations_of_elan(options: dict[str, Any]) -> None:
    model = tiny_elan(**options).double()
    colors = model.head[0].in_channels  # type: ignore[union-attr]
    white = model.rgb_range
    assert_same(model, torch.rand(1, int(colors), 20, 17, dtype=torch.float64) * white)


@pytest.mark.parametrize("attention", ["branch", "block", "branch_channel"])
def test_configurations_of_mafdn(attention: str) -> None:
    assert_same(
        tiny_mafdn(attention=attention).double(), torch.rand(1, 3, 9, 11, dtype=torch.float64)
    )


def test_mean_colour_that_is_more_than_a_mean() -> None:
    """Checkpoints may bring any 1x1 convolution: the fold takes it as it is."""
    model = tiny_elan().double()
    for shift in (model.sub_mean, model.add_mean):
        nn.init.normal_(shift.weight)  # type: ignore[arg-type]
    assert_same(model, torch.rand(1, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("pattern", ["plus", "cross"])
def test_shift_pattern(pattern: str) -> None:
    model = tiny_elan().double()
    for layer in model.modules():
        if isinstance(layer, ShiftConv2d):
            layer.pattern = pattern  # type: ignore[assignment]
    assert_same(model, torch.rand(1, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_and_layouts(layout: torch.memory_format) -> None:
    model = tiny_elan()
    x = torch.rand(2, 3, 19, 33).contiguous(memory_format=layout)
    with torch.inference_mode():
        torch.testing.assert_close(plan(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_elan, tiny_mafdn])
def test_backends(build: Any) -> None:
    model = build(backend="reference").double()
    planned = plan(model)
    assert planned.backend == "reference"
    x = torch.rand(1, 3, 17, 20, dtype=torch.float64)
    stock = planned(x)
    planned.backend = "cpu"
    torch.testing.assert_close(planned(x), stock, rtol=1e-10, atol=1e-10)
    planned.backend = "triton-like"
    with pytest.raises(ValueError, match="backend"):
        planned(x)


@pytest.mark.parametrize("build", [tiny_elan, tiny_mafdn])
def test_is_a_copy_for_inference(build: Any) -> None:
    model = build()
    state = copy.deepcopy(model.state_dict())
    planned = plan(model)
    for name in ("scale", "rgb_range", "tile_multiple", "tile_overlap", "receptive_radius"):
        assert getattr(planned, name) == getattr(model, name)
    assert not planned.training
    assert not any(p.requires_grad for p in planned.parameters())
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    expected = planned(x)
    assert not expected.requires_grad
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(planned(x), expected)
    assert torch.equal(copy.deepcopy(planned)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(planned))(x), expected)
    assert planned.to(torch.float64)(x.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="cannot be trained"):
        planned.train()


def test_describes_itself() -> None:
    text = repr(plan(tiny_elan()))
    assert "ELAN x2" in text
    assert "grouped_attention_block" in text
    assert "4 feature extractions" in text
    assert "folded" in plan(tiny_mafdn()).describe()
    assert "before" in plan(tiny_mafdn().fold()).describe()  # type: ignore[operator]


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match=r"Conv2d.*ELAN, MAFDN"):
        plan(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="training mode"):
        plan(tiny_elan().train())
    model = tiny_elan()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match="running statistics"):
        plan(model)
    model = tiny_elan()
    next(layer for layer in model.modules() if isinstance(layer, ShiftConv2d)).pattern = "cross"
    with pytest.raises(ValueError, match="two shifts differ"):
        plan(model)


def test_untrained_network_of_the_published_size() -> None:
    """Random weights and statistics: logits of tens of thousands."""
    torch.manual_seed(0)
    model = elan_light(4).eval()
    x = torch.rand(1, 3, 24, 40) * 255
    planned, stock = plan(model), copy.deepcopy(model)
    stock.backend = "reference"
    with torch.inference_mode():
        actual, theirs, oracle = planned(x), stock(x), stock.double()(x.double())
    assert actual.isfinite().all()
    # 24 layers of nearly one-hot attention multiply an error: stock's is a measure, not a bound.
    assert (actual - oracle).norm() < 4 * (theirs - oracle).norm()


def test_elan_light_on_set5(data: Path, set5: dict[str, Pair]) -> None:
    model = load_checkpoint(data / "weights" / OFFICIAL).eval()
    planned = plan(model)
    figures = []
    for name, (low, high) in set5.items():
        figures.append(psnr_y(upscale(planned, low), high, 4))
        x = to_tensor([low], 255.0)
        with torch.inference_mode():
            assert (planned(x) - model(x)).abs().max() < 2e-3, name
    assert float(np.mean(figures)) == pytest.approx(32.438, abs=1e-3)
