"""ELAN and MAFDN as modules: sizes, padding, backends, gradients, layouts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sr_kernels.models import DOConv2d, elan, elan_light, mafdn
from sr_kernels.models.elan import mirror_index
from sr_kernels.models.mafdn import MAFDN, Attention
from torch import Tensor, nn


def tiny_elan(scale: int = 2, **options: Any) -> nn.Module:
    """A small ELAN whose BatchNorm statistics fit its activations, as after training."""
    torch.manual_seed(7)
    options = {"m_elan": 4, "c_elan": 15, "n_share": 1, "rgb_range": 1.0, **options}
    model = elan(scale, **options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.eval()


def tiny_mafdn(scale: int = 2, **options: Any) -> MAFDN:
    torch.manual_seed(7)
    model = mafdn(scale, **{"channels": 12, "num_blocks": 2, "reduction": 3, **options})
    for layer in model.modules():
        if isinstance(layer, DOConv2d):
            nn.init.normal_(layer.D, std=0.1)
    return model.eval()


BUILDERS = [tiny_elan, tiny_mafdn]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (3, 2), (8, 9), (16, 16), (21, 30)])
def test_every_size_from_one_pixel(build: Any, size: tuple[int, int]) -> None:
    model = build()
    with torch.no_grad():
        y = model(torch.rand(2, 3, *size))
    assert y.shape == (2, 3, 2 * size[0], 2 * size[1])
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("build", [elan_light, mafdn])
def test_published_networks_run(build: Any, scale: int) -> None:
    model = build(scale).eval()
    assert model.scale == scale
    assert model.rgb_range == (255.0 if build is elan_light else 1.0)
    with torch.no_grad():
        y = model(torch.rand(1, 3, 5, 7))
    assert y.shape == (1, 3, 5 * scale, 7 * scale)


@pytest.mark.parametrize("length", [9, 12, 16])
def test_mirror_index_is_reflection_padding(length: int) -> None:
    x = torch.arange(float(length)).reshape(1, 1, 1, length)
    padded = F.pad(x, (0, 16 - length, 0, 0), "reflect") if length < 16 else x
    assert torch.equal(x[..., mirror_index(length, 16)], padded)


def test_mirror_index_goes_on_where_reflection_padding_cannot() -> None:
    assert mirror_index(3, 8).tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert mirror_index(1, 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_agree_with_the_stock_twin(build: Any, layout: torch.memory_format) -> None:
    model = build().double()
    x = torch.rand(2, 3, 19, 33, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        ours = model(x)
        model.backend = "reference"
        torch.testing.assert_close(ours, model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", BUILDERS)
def test_gradients_agree_with_the_stock_twin(build: Any) -> None:
    ours, stock = build().double().train(), build(backend="reference").double().train()
    x = torch.rand(1, 3, 16, 20, dtype=torch.float64)
    target = torch.rand(1, 3, 32, 40, dtype=torch.float64)
    for model in (ours, stock):
        (model(x) - target).square().mean().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        if p.requires_grad:
            assert q.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=name)
            # In training BatchNorm subtracts the mean, and with it the bias before it.
            assert name.endswith("project_inp.0.bias") or bool(q.grad.abs().sum() > 0), name


@pytest.mark.parametrize("build", BUILDERS)
def test_backend_reaches_every_layer(build: Any) -> None:
    model = build(backend="reference")
    layers = [m for m in model.modules() if hasattr(m, "backend")]
    assert len(layers) > 5
    assert {layer.backend for layer in layers} == {"reference"}
    model.backend = None
    assert {layer.backend for layer in layers} == {None}
    model.backend = "triton-like"
    with pytest.raises(ValueError, match="backend"):
        model(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("build", BUILDERS)
def test_copies_and_pickles(build: Any) -> None:
    model = build()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_two_compiled_graphs_serve_every_size(build: Any) -> None:
    model, graphs = build(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in ((20, 30), (16, 33), (7, 5), (48, 32)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) <= 2  # PyTorch's convolution guards on a small or a large input


def test_tiles_on_whole_windows_with_enough_context_give_the_same() -> None:
    """Attention sees its window alone: a crop on window corners differs only near its border."""
    model = tiny_elan(m_elan=1, n_share=0)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        whole, part = model(x), model(x[:, :, 16:, 16:])
    # The first windows of the crop see its border; the tail's 3x3 reaches one pixel farther.
    torch.testing.assert_close(part[:, :, 34:, 34:], whole[:, :, 66:, 66:])


# ---------------------------------------------------------------------------------------- ELAN


def attention_by_hand(qv: Tensor, windows: tuple[int, ...], shifted: bool) -> Tensor:
    """The formula, window by window: an independent check of the attention's core."""
    outputs = []
    for part, w in zip(qv.chunk(len(windows), 1), windows, strict=True):
        q, v = part.chunk(2, 1)
        n, d, height, width = q.shape
        y = torch.empty_like(q)
        offset = w // 2 if shifted else 0
        for top in range(0, height, w):
            for left in range(0, width, w):
                rows = (torch.arange(top, top + w) + offset) % height
                columns = (torch.arange(left, left + w) + offset) % width
                a = q[:, :, rows][..., columns].reshape(n, d, w * w)
                b = v[:, :, rows][..., columns].reshape(n, d, w * w)
                weights = (a.transpose(1, 2) @ a).softmax(-1)
                cut = (b @ weights.transpose(1, 2)).reshape(n, d, w, w)
                y[:, :, rows[:, None], columns[None, :]] = cut
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("shifted", [False, True])
def test_elan_pair_by_hand(shifted: bool) -> None:
    model = tiny_elan(m_elan=2, n_share=0)
    block = model.body[1 if shifted else 0].double()
    lfe, gmsa = block.modules_lfe["lfe_0"], block.modules_gmsa["gmsa_0"]
    x = torch.rand(1, 15, 32, 16, dtype=torch.float64)
    h = x
    for conv, act in ((lfe.conv0["shift_conv"], F.relu), (lfe.conv1["shift_conv"], lambda t: t)):
        moved = F.conv2d(h, conv.weight.double(), padding=1, groups=h.shape[1])
        h = act(F.conv2d(moved, conv.conv1x1.weight, conv.conv1x1.bias))
    h = h + x
    y = gmsa.project_out(attention_by_hand(gmsa.project_inp(h), (4, 8, 16), shifted)) + h
    with torch.no_grad():
        torch.testing.assert_close(block(x), y, rtol=1e-9, atol=1e-9)


def test_batch_norm_uses_running_statistics_in_eval_and_batch_statistics_in_training() -> None:
    model = tiny_elan()
    x = torch.rand(2, 3, 16, 16)
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    with torch.no_grad():
        model(x)
        assert torch.equal(norm.running_mean, before)
        model.train()(x)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": 0}, "scale"),
        ({"m_elan": 5, "n_share": 1}, "m_elan"),
        ({"m_elan": 0}, "m_elan"),
        ({"c_elan": 16}, "channels"),
        ({"colors": 1}, "colors"),
    ],
)
def test_elan_refuses(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        elan(**options)


def test_elan_refuses_an_empty_image() -> None:
    with pytest.raises(ValueError, match="0 x 16"):
        tiny_elan()(torch.empty(1, 3, 0, 16))


# --------------------------------------------------------------------------------------- MAFDN


def test_fresh_mafdn_enlarges_bilinearly() -> None:
    model = mafdn(4).eval()
    x = torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        difference = model(x) - F.interpolate(x, scale_factor=4, mode="bilinear")
    assert difference[:, :, 4:-4, 4:-4].abs().max() < 0.15


@pytest.mark.parametrize("attention", ["branch", "branch_channel", "block"])
def test_folding_keeps_the_output(attention: Attention) -> None:
    model = tiny_mafdn(attention=attention)
    x = torch.rand(1, 3, 20, 17)
    assert not model.folded
    with torch.no_grad():
        before = model(x)
        assert model.fold() is model
        assert model.folded
        assert (model(x) - before).abs().max() < 1e-4


def test_published_mafdn_folds_within_1e_4() -> None:
    model = mafdn(4).eval()
    for layer in model.modules():
        if isinstance(layer, DOConv2d):
            nn.init.normal_(layer.D, std=0.1)
    x = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        before = model(x)
        assert (model.fold()(x) - before).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": 0}, "scale"),
        ({"channels": 51}, "channels"),
        ({"channels": 2}, "channels"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"branches": 0}, "branches"),
        ({"attention": "everywhere"}, "attention"),
    ],
)
def test_mafdn_refuses(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mafdn(**options)
