"""The modules: the names of the public code they replace, and the operators they call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sr_kernels import nn as K
from sr_kernels import reference as R
from sr_kernels.backends import use_backend
from sr_kernels.reference.window_attention import relative_position_index
from sr_kernels.testing import make_tensor

NAMES: list[tuple[nn.Module, dict[str, tuple[int, ...]]]] = [
    (
        K.ShiftConv2d(10, 4),
        {"weight": (10, 1, 3, 3), "conv1x1.weight": (4, 10, 1, 1), "conv1x1.bias": (4,)},
    ),
    (
        K.LFE(10, 10, 2),
        {
            "conv0.shift_conv.weight": (10, 1, 3, 3),
            "conv0.shift_conv.conv1x1.weight": (20, 10, 1, 1),
            "conv0.shift_conv.conv1x1.bias": (20,),
            "conv1.shift_conv.weight": (20, 1, 3, 3),
            "conv1.shift_conv.conv1x1.weight": (10, 20, 1, 1),
            "conv1.shift_conv.conv1x1.bias": (10,),
        },
    ),
    (K.PixelAttention(6), {"conv.weight": (6, 6, 1, 1), "conv.bias": (6,)}),
    (K.SpatialAttention(), {"conv.weight": (1, 2, 7, 7)}),
    (
        K.ChannelAttention(32, 16),
        {
            "conv_du.0.weight": (2, 32, 1, 1),
            "conv_du.0.bias": (2,),
            "conv_du.2.weight": (32, 2, 1, 1),
            "conv_du.2.bias": (32,),
        },
    ),
    (K.GatedConv1x1(6, 4), {"weight": (4, 6, 1, 1), "bias": (4,)}),
    (K.WindowAttention((4, 8), 3), {"relative_position_bias_table": (105, 3)}),
    (K.WindowAttention(4, position_bias=False), {}),
]


@pytest.mark.parametrize(("module", "names"), NAMES, ids=lambda v: type(v).__name__)
def test_names_and_shapes(module: nn.Module, names: dict[str, tuple[int, ...]]) -> None:
    state = module.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == names
    assert module.backend is None
    module.load_state_dict(state, strict=True)


def test_modules_compute_their_operators() -> None:
    x = torch.randn(2, 10, 8, 8)
    shift = K.ShiftConv2d(10, 6, activation="gelu", backend="reference")
    weights = (shift.conv1x1.weight, shift.conv1x1.bias)
    residual = torch.randn(2, 6, 8, 8)
    expected = R.shift_conv2d(x, *weights, activation="gelu", residual=residual)
    assert torch.equal(shift(x, residual), expected)

    attention = K.WindowAttention(4, 2, shift_size=2, backend="reference")
    table = attention.relative_position_bias_table
    expected = R.window_attention(x, x, x, window=4, shift=2, num_heads=2, bias=table, mask=True)
    assert torch.equal(attention(x, x, x), expected)

    both = K.PixelSpatialAttention(10, backend="reference")
    K.set_backend(both, "reference")
    assert torch.equal(both(x), both.spatial(both.pixel(x)))

    channel = K.ChannelAttention(10, 4, statistic="contrast", backend="reference")
    assert torch.equal(channel(x), x * channel.gate(x))
    gated = K.GatedConv1x1(10, 5, backend="reference")
    torch.testing.assert_close(
        gated(x, channel.gate(x)), nn.functional.conv2d(channel(x), gated.weight, gated.bias)
    )


def test_lfe_residual() -> None:
    x = torch.randn(1, 10, 4, 4)
    lfe = K.LFE(10, 10, 2, backend="reference")
    plain = lfe(x)
    lfe.residual = True
    torch.testing.assert_close(lfe(x), plain + x)


def test_gmsa_reuses_scores_and_says_when_there_are_none() -> None:
    first = K.GMSA(12, 1, (2, 4, 8), backend="reference").eval()
    second = K.GMSA(12, 1, (2, 4, 8), calc_attn=False, backend="reference").eval()
    x = torch.randn(1, 12, 8, 8)
    y, scores = first(x)
    z, same = second(y, scores)
    assert z.shape == x.shape
    assert same is scores
    with pytest.raises(ValueError, match="scores is None"):
        second(y)


def test_folding_batch_norm_changes_rounding_alone() -> None:
    module = K.GMSA(12, 0, (2, 4, 8)).eval().double()
    norm = module.project_inp[1]
    for value in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module._project(x)[0], module.project_inp(x))


def _as_stock(module: nn.Module) -> K.GMSA:
    other = copy.deepcopy(module)
    assert isinstance(other, K.GMSA)
    other._has_own_statistics = lambda norm, x: False  # type: ignore[method-assign]
    return other


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_in_training_is_stocks(
    bias: bool, dtype: torch.dtype, momentum: float | None
) -> None:
    """Outputs, gradients and running statistics, over two batches far from zero."""
    module = K.GMSA(12, 0, (2, 4, 8), backend="cpu").to(dtype)
    convolution, norm = module.project_inp
    assert isinstance(norm, nn.BatchNorm2d)
    if not bias:
        convolution.bias = None
    norm.momentum = momentum
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    stock = _as_stock(module)
    digits = 1e-12 if dtype == torch.float64 else 2e-5
    for seed in (0, 1):
        found = []
        for layer in (module, stock):
            x = make_tensor((2, 12, 8, 16), dtype, seed=seed, layout="channels_last") + 3
            x.requires_grad_()
            y, same = layer._project(x)
            assert torch.equal(same, x)
            parameters = dict(layer.project_inp.named_parameters())
            gradients = torch.autograd.grad(
                (y, same),
                [x, *parameters.values()],
                (make_tensor(y.shape, dtype, seed=9), make_tensor(x.shape, dtype, seed=8)),
            )
            found.append([y, *gradients, *layer.project_inp.buffers()])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=digits, atol=100 * digits)


def test_batch_norm_in_training_takes_the_stock_layers_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = K.GMSA(12, 0, (2, 4, 8))
    calls: list[Any] = []
    module.project_inp.register_forward_hook(lambda *arguments: calls.append(arguments))
    x = make_tensor((1, 12, 8, 8))

    def stock_runs(x: Tensor = x) -> bool:
        calls.clear()
        module._project(x)
        return bool(calls)

    assert not stock_runs()
    with torch.autocast("cpu", torch.bfloat16):
        assert stock_runs()
    module.backend = "reference"
    assert stock_runs()
    module.backend = None
    module.project_inp[1].eval()  # frozen statistics in a network that is trained
    assert stock_runs()
    module.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module._project(x[:, :, :1, :1])


@pytest.mark.parametrize("training", [True, False])
def test_other_layers_in_the_projection_are_run(training: bool) -> None:
    """Someone's adapter, or SyncBatchNorm: nothing is known of it that could be folded."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = K.GMSA(12, 0, (4,)).train(training)
    x = torch.randn(1, 12, 8, 8)
    stock, _ = module._project(x)
    module.project_inp[1].__class__ = Doubled
    torch.testing.assert_close(module._project(x)[0], 2 * stock)


@pytest.mark.parametrize("residual", [True, False])
def test_another_output_projection_is_run(residual: bool) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = K.GMSA(12, 0, (4,), residual=residual).eval()
    x = torch.randn(1, 12, 8, 8)
    left = x if residual else 0
    stock = module(x)[0] - left
    module.project_out.__class__ = Doubled
    torch.testing.assert_close(module(x)[0] - left, 2 * stock, rtol=1e-4, atol=1e-5)


def test_gmsa_residual() -> None:
    for backend in ("cpu", "reference"):
        gmsa = K.GMSA(12, 0, (2, 4, 8), backend=backend)
        x = make_tensor((2, 12, 8, 8))
        plain, _ = gmsa(x)
        gmsa.residual = True
        torch.testing.assert_close(gmsa(x)[0], plain + x)


@pytest.mark.parametrize("own", [None, "reference", "auto"])
@pytest.mark.parametrize("everywhere", [None, "reference"])
def test_reference_runs_the_stock_layers(own: str | None, everywhere: str | None) -> None:
    module = K.GMSA(12, 0, (2, 4, 8), backend=own).eval()
    calls: list[Any] = []
    module.project_inp.register_forward_hook(lambda *arguments: calls.append(arguments))
    with use_backend(everywhere), torch.no_grad():
        module(torch.randn(1, 12, 8, 8))
    assert len(calls) == ((own or everywhere) == "reference")


def test_swins_index_buffer_is_checked_and_not_kept() -> None:
    module = K.WindowAttention(4, 2)
    state: dict[str, Any] = dict(module.state_dict())
    index = relative_position_index((4, 4))
    module.load_state_dict({**state, "relative_position_index": index})
    with pytest.raises(RuntimeError, match="relative_position_index"):
        module.load_state_dict({**state, "relative_position_index": index.flip(0)})


def test_unknown_shift_kernel_is_refused() -> None:
    module = K.ShiftConv2d(10, 4)
    state = module.state_dict()
    kernel: Tensor = state["weight"].clone()
    state["weight"] = kernel.flip(0)
    with pytest.raises(RuntimeError, match="one-hot"):
        module.load_state_dict(state)


def test_lfe_with_two_patterns_is_refused() -> None:
    lfe = K.LFE(10, 10)
    lfe.conv1["shift_conv"].pattern = "cross"
    with pytest.raises(RuntimeError, match="same pattern"):
        lfe(torch.randn(1, 10, 4, 4))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: K.GMSA(10, window_sizes=(4, 8, 16)), "channels"),
        (lambda: K.SpatialAttention(4), "kernel_size"),
    ],
)
def test_bad_arguments(build: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()
