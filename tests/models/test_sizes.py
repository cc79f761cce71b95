"""Parameter counts and multiply-adds against the published figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sr_kernels.models import DOConv2d, elan, elan_light, mafdn
from torch.utils._python_dispatch import TorchDispatchMode

from sr_kernels.nn import ChannelAttention


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def total(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "scale", "expected"),
    [
        (elan_light, 2, (582_012, 620_916)),
        (elan_light, 3, (590_127, 629_031)),
        (elan_light, 4, (601_488, 640_392)),
        (elan, 4, (8_312_448, 8_487_432)),
    ],
)
def test_elan_parameters(build: Any, scale: int, expected: tuple[int, int]) -> None:
    model = build(scale)
    assert (trainable(model), total(model)) == expected


@pytest.mark.parametrize(("scale", "folded"), [(2, 579_912), (3, 586_947), (4, 596_796)])
def test_mafdn_parameters(scale: int, folded: int) -> None:
    model = mafdn(scale)
    over_parameters = sum(
        layer.D.numel() for layer in model.modules() if isinstance(layer, DOConv2d)
    )
    assert trainable(model) == folded + over_parameters
    assert total(model.fold()) == folded
    if scale == 4:
        assert folded + over_parameters == 672_612


class MultiplyAdds(TorchDispatchMode):
    """Counts convolutions (without bias) and batched matrix products, as thop counts the former."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.convolutions += out.numel() * math.prod(args[1].shape[1:])
        elif func is torch.ops.aten.bmm.default:
            self.products += out.numel() * args[0].shape[2]
        return out


def count(model: torch.nn.Module, height: int, width: int) -> MultiplyAdds:
    """Counted on the meta device: no arithmetic happens."""
    with MultiplyAdds() as counter, torch.no_grad():
        model.to("meta").eval()(torch.empty(1, 3, height, width, device="meta"))
    return counter


def test_mafdn_multiply_adds() -> None:
    model = mafdn(4, backend="reference").fold()
    convolutions = count(model, 180, 320).convolutions
    assert convolutions / 1e9 == pytest.approx(33.7506, abs=1e-4)
    # thop adds (H W + 1) C for each AdaptiveAvgPool2d; a contrast channel attention has one.
    gates = [layer for layer in model.modules() if isinstance(layer, ChannelAttention)]
    pooled = sum((180 * 320 + 1) * gate.conv_du[0].in_channels for gate in gates)
    assert (convolutions + pooled) / 1e9 == pytest.approx(33.7866, abs=1e-4)


def test_elan_light_multiply_adds() -> None:
    counter = count(elan_light(4, backend="reference"), 180, 320)
    # A v in every pair, q q^T in every first one; the reference forms q q^T again for the reuse.
    assert counter.products / 1e9 == pytest.approx(9.91 + 2 * 4.96, abs=0.02)
    # 53.46 G includes 2.39 G of the shift written as a depthwise convolution, which is none here.
    whole = counter.convolutions + counter.products
    assert whole / 1e9 == pytest.approx(53.46 - 2.39 + 4.96, abs=0.02)
