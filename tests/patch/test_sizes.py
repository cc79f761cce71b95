"""Calls that are too small to gain are left to stock, at once; and what is measured there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import third_party as tp
import torch
from torch import Tensor, nn

from sr_kernels import backends
from sr_kernels.patching import patch, swap


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were compared with what they were: what a declined call does not do."""
    seen: list[nn.Module] = []
    own = swap.unchanged

    def unchanged(module: nn.Module, replacement: Any) -> bool:
        seen.append(module)
        return own(module, replacement)

    monkeypatch.setattr(swap, "unchanged", unchanged)
    return seen


def test_short_calls_of_a_convolution_are_not_held_up(asked: list[nn.Module]) -> None:
    convolution = nn.Conv2d(20, 20, 3, padding=1).eval()
    assert patch(convolution).replaced
    for size, times in (((8, 8), 0), ((64, 64), 1), ((4, 1500), 1)):  # small, right, narrow
        output(convolution, torch.rand(1, 20, *size))
        assert len(asked) == times
    convolution(torch.rand(1, 20, 64, 64))  # with gradients
    assert len(asked) == 1
    convolution.requires_grad_(False)(torch.rand(1, 20, 64, 64))
    assert len(asked) == 2


def test_a_backend_by_name_runs_short_calls(asked: list[nn.Module]) -> None:
    gate = tp.PA(16).eval()
    assert patch(gate).replaced
    with backends.use_backend("cpu"):
        output(gate, torch.rand(1, 16, 5, 5))
    assert asked
    asked.clear()
    output(gate.double(), torch.rand(1, 16, 5, 5, dtype=torch.float64))  # not measured
    assert asked


def test_few_output_channels_want_a_contiguous_map(asked: list[nn.Module]) -> None:
    convolution, z = nn.Conv2d(20, 3, 3, padding=1).eval(), torch.rand(1, 20, 150, 150)
    assert patch(convolution).replaced
    output(convolution, z.contiguous(memory_format=torch.channels_last))
    assert not asked
    output(convolution, z)
    assert asked


# A module, an input that is large enough without gradients and one with (None: none is).
GATED: dict[str, tuple[nn.Module, int | None, int | None]] = {
    "mean": (tp.CALayer(32, 4), None, 64),
    "contrast": (tp.CCALayer(32, 4), 4, 4),
    "pixel": (tp.PA(32), 64, None),
    "esa": (tp.ESA(32), 91, None),
    "pixel, convolutions": (tp.PAConv(32), 64, None),
    "pixel, self-calibrated": (tp.SCPA(32), 64, None),
    "distillation": (tp.IMDModule(32), 64, 91),
    "PAN": (tp.PAN(8, 4, 1), 33, 64),
    "IMDN": (tp.IMDN(16, 2, 2), 33, 64),
}


@pytest.mark.parametrize("name", GATED)
def test_gates_and_their_blocks_run_where_they_gain(name: str, asked: list[nn.Module]) -> None:
    module, inference, training = GATED[name]
    module = copy.deepcopy(module).eval()
    assert patch(module).replaced
    for side in (4, 33, 64, 91, 96):
        for gradients, least in ((False, inference), (True, training)):
            asked.clear()
            with torch.set_grad_enabled(gradients):
                if side >= 33 or name != "esa":
                    module(torch.rand(1, 3 if name in ("PAN", "IMDN") else 32, side, side))
                    assert bool(asked) == (least is not None and side >= least)


def test_a_swin_block_of_one_window_is_left_to_itself(asked: list[nn.Module]) -> None:
    block = tp.SwinTransformerBlock(24, (32, 32), 3, 8, 4).eval()
    assert patch(block).replaced
    with torch.no_grad():
        block(torch.rand(1, 64, 24), (8, 8))
        assert not asked
        block(torch.rand(1, 1024, 24), (32, 32))
        assert asked
        asked.clear()
        attention = tp.SwinWindowAttention(24, (8, 8), 3).eval()
        assert patch(attention).replaced
        attention(torch.rand(1, 64, 24))
        assert not asked
        attention(torch.rand(9, 64, 24))
        assert asked


def test_convolutions_are_exported_for_all_sizes() -> None:
    network = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.ReLU(), tp.CALayer(20, 4)).eval()
    z, small = torch.rand(1, 20, 40, 44), torch.rand(1, 20, 5, 7)
    y = output(network, small)
    patch(network)
    sizes = [{2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}]
    with torch.no_grad():
        program = torch.export.export(network, (z,), dynamic_shapes=sizes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"sr_kernels.{op}.default" for op in ("conv3x3", "channel_attention")} <= targets
    torch.testing.assert_close(output(program.module(), small), y, rtol=1e-4, atol=1e-4)
