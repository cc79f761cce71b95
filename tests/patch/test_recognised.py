"""Every known family is replaced, and computes what it computed; look-alikes are left alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import third_party as tp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sr_kernels
from sr_kernels.patching.swap import original_class, replacement_of

Arguments = tuple[Any, ...]
OPERATORS = torch.ops.sr_kernels


pytestmark = pytest.mark.usefixtures("of_any_size")


def a_map(channels: int, height: int = 16, width: int = 32, batch: int = 2) -> Arguments:
    return (torch.randn(batch, channels, height, width),)


def tokens(channels: int, height: int, width: int, *extra: Any) -> Arguments:
    return (torch.randn(2, height * width, channels), (height, width), *extra)


def hat_arguments(shift: int) -> Arguments:
    mask = tp.swin_mask(8, 12, 4, 2)
    return tokens(24, 8, 12, tp.position_index(4), mask)


def settled(module: nn.Module) -> nn.Module:
    """With statistics and biases that are not those of a fresh module."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


def other_biases(block: tp.LinearBlock) -> tp.LinearBlock:
    """DCTLSA's block has one in each of its projections and in none of its local convolutions."""
    channels = block.attn.dim
    block.attn.qkv = nn.Linear(channels, 3 * channels, bias=False)
    block.attn.proj = nn.Linear(channels, channels, bias=False)
    for name, layer in list(block.attn.local.named_children()):
        if isinstance(layer, nn.Conv2d):
            layer = nn.Conv2d(
                channels, channels, layer.kernel_size, padding=layer.padding, groups=layer.groups
            )
            setattr(block.attn.local, name, layer)
    return block


# name: (module, arguments, replacement of the module itself)
KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Arguments], str]] = {
    "shift dense": (lambda: tp.ShiftConv2d0(10, 7), lambda: a_map(10), "shift_conv2d"),
    "shift depthwise": (lambda: tp.ShiftConv2d1(11, 7), lambda: a_map(11), "shift_conv2d"),
    "shift wrapper": (lambda: tp.ShiftConv2d(10, 7), lambda: a_map(10), "shift_conv2d"),
    "shift mask +": (lambda: tp.ShiftConv2d1x1(10, 7), lambda: a_map(10), "shift_conv2d"),
    "shift mask x": (lambda: tp.ShiftConv2d1x1(10, 7, "x"), lambda: a_map(10), "shift_conv2d"),
    "shift copy": (lambda: tp.ShiftConvCopy(10, 7), lambda: a_map(10), "shift_conv2d"),
    "LFE": (lambda: tp.LFE(10, 10, 2), lambda: a_map(10), "shift_conv_block"),
    "LFE dense gelu": (
        lambda: tp.LFE(10, 10, 2, nn.GELU(), dense=True),
        lambda: a_map(10),
        "shift_conv_block",
    ),
    "LFE leaky": (
        lambda: tp.LFE(10, 10, 2, nn.LeakyReLU(0.3)),
        lambda: a_map(10),
        "shift_conv_block",
    ),
    "LFE sequential": (lambda: tp.SequentialLFE(10), lambda: a_map(10), "shift_conv_block"),
    "MLP4D": (lambda: tp.MLP4D(10, 20), lambda: a_map(10), "shift_conv_block"),
    "GMSA": (lambda: tp.GMSA(12, 0, (2, 4, 8)), lambda: a_map(12), "grouped_window_attention"),
    "GMSA shifted": (
        lambda: tp.GMSA(12, 1, (2, 4, 8)),
        lambda: a_map(12),
        "grouped_window_attention",
    ),
    "ELAB": (
        lambda: tp.ELAB(15, 2, 1, (2, 4, 8)),
        lambda: a_map(15),
        "shift_conv_block + grouped_attention_block",
    ),
    "ELAB deep": (
        lambda: tp.ELAB(15, 2, 0, (4, 8, 16), shared_depth=2),
        lambda: a_map(15),
        "shift_conv_block + grouped_attention_block",
    ),
    "body of ELABs": (
        lambda: nn.Sequential(*(tp.ELAB(15, 2, i % 2, (2, 4, 8)) for i in range(3))),
        lambda: a_map(15),
        "shift_conv_block + grouped_attention_block, in the memory of one block",
    ),
    "body of ELABs, no scores shared": (
        lambda: nn.Sequential(*(tp.ListELAB(15, 2, i % 2, (2, 4, 8), 0) for i in range(2))),
        lambda: a_map(15),
        "shift_conv_block + grouped_attention_block, in the memory of one block",
    ),
    "ELAB list": (
        lambda: tp.ListELAB(15, 2, 1, (2, 4, 8), n_share=0),
        lambda: a_map(15),
        "shift_conv_block + grouped_attention_block",
    ),
    "striped": (
        lambda: tp.SABase4D(12, 2, ((4, 8), (8, 2)), ((2, 4), (3, 1))),
        lambda: a_map(12),
        "window_attention",
    ),
    "striped ragged": (
        lambda: tp.SABase4D(12, 1, [[4, 8], [8, 2]]),
        lambda: a_map(12, 13, 21),
        "window_attention",
    ),
    "Swin block": (
        lambda: tp.SwinTransformerBlock(24, (8, 8), 3, 4, 0),
        lambda: tokens(24, 8, 12),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "Swin block shifted": (
        lambda: tp.SwinTransformerBlock(24, (8, 12), 3, 4, 2, drop_path=0.1),
        lambda: tokens(24, 8, 12),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "Swin block, other size": (
        lambda: tp.SwinTransformerBlock(24, (8, 8), 3, 4, 1),
        lambda: tokens(24, 12, 8),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "HNCT's block shifted": (
        lambda: tp.HNCTBlock(24, (8, 12), 3, 4, 2),
        lambda: tokens(24, 8, 12),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "HAB": (
        lambda: tp.HAB(24, 3, 4, 0),
        lambda: hat_arguments(0),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "HAB shifted": (
        lambda: tp.HAB(24, 3, 4, 2),
        lambda: hat_arguments(2),
        "window_attention + shift_conv2d + shift_conv_block",
    ),
    "window attention": (
        lambda: tp.SwinWindowAttention(24, (4, 4), 3),
        lambda: (torch.randn(6, 16, 24),),
        "window_attention",
    ),
    "HAT's window attention": (
        lambda: tp.HatWindowAttention(24, (4, 4), 3, given=True),
        lambda: (torch.randn(6, 16, 24), tp.position_index(4)),
        "window_attention",
    ),
    "DCTLSA block": (
        lambda: tp.LinearBlock(20, 5, 4, 2),
        lambda: tokens(20, 8, 12),
        "linear_attention_block + shift_conv_block",
    ),
    "DCTLSA block, not shifted, other biases": (
        lambda: other_biases(tp.LinearBlock(20, 5, 4, 0)),
        lambda: tokens(20, 8, 12),
        "linear_attention_block + shift_conv_block",
    ),
    "CALayer": (lambda: tp.CALayer(32, 4), lambda: a_map(32), "channel_attention"),
    "HAT's ChannelAttention": (
        lambda: tp.ChannelAttention(32, 4),
        lambda: a_map(32),
        "channel_attention",
    ),
    "CCALayer": (lambda: tp.CCALayer(32, 4), lambda: a_map(32), "channel_attention"),
    "CCA with torch.std": (lambda: tp.StdCCA(32, 4), lambda: a_map(32), "channel_attention"),
    "IMDModule": (
        lambda: tp.IMDModule(64),
        lambda: a_map(64),
        "channel_gate + gated_conv1x1 + conv3x3",
    ),
    "IMDN": (
        lambda: tp.IMDN(64, 2),
        lambda: (torch.rand(1, 3, 21, 23),),
        "channel_gate + gated_conv1x1 + shift_conv2d + conv3x3, channels_last",
    ),
    "PA": (lambda: tp.PA(24), lambda: a_map(24), "pixel_attention"),
    "PAConv": (lambda: tp.PAConv(20), lambda: a_map(20), "shift_conv2d + conv3x3"),
    "SCPA": (lambda: tp.SCPA(40), lambda: a_map(40), "shift_conv2d + conv3x3"),
    "PAN": (
        lambda: tp.PAN(nb=2),
        lambda: (torch.rand(1, 3, 11, 13),),
        "shift_conv2d + pixel_attention + conv3x3, channels_last",
    ),
    "convolution": (
        lambda: nn.Conv2d(13, 17, 3, padding=1, bias=False),
        lambda: a_map(13),
        "conv3x3 (inference only)",
    ),
    "ESA": (lambda: tp.ESA(20), lambda: a_map(20, 33, 40), "shift_conv2d"),
    "ESA of one": (lambda: tp.ESA(20, deep=False), lambda: a_map(20, 33, 40), "shift_conv2d"),
    "spatial gate": (lambda: tp.SpatialGate(7), lambda: a_map(9), "spatial_attention"),
    "spatial gate, mean first": (
        lambda: tp.SpatialGate(3, mean_first=True),
        lambda: a_map(9),
        "spatial_attention",
    ),
    "CBAM's own gate": (lambda: tp.CBAMSpatialGate(), lambda: a_map(9), "spatial_attention"),
    "CBAM's own gate, mean first": (
        lambda: tp.CBAMSpatialGate(mean_first=True),
        lambda: a_map(9),
        "spatial_attention",
    ),
}


class Called(TorchDispatchMode):
    """The names of this package's operators that are called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sr_kernels":
            self.names.add(func._opname.removesuffix("_out"))
        return func(*args, **(kwargs or {}))


def run(module: nn.Module, arguments: Arguments) -> Tensor:
    result = module(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("name", KNOWN)
def test_known_modules_are_replaced(name: str) -> None:
    build, make_arguments, replacement = KNOWN[name]
    module, arguments = settled(build()), make_arguments()
    with torch.no_grad():
        before = run(module, arguments)
        report = sr_kernels.patch(module)
        with Called() as called:
            after = run(module, arguments)
        assert report.entries[0].replaced_by == replacement, str(report)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert after.stride() == before.stride() or before.dim() == 3
        promised = {
            word for word in re.split(r"[^a-z0-9_]+", replacement) if hasattr(OPERATORS, word)
        }
        assert promised
        assert promised <= called.names
        report.restore()
        assert torch.equal(run(module, arguments), before)


@pytest.mark.parametrize("name", KNOWN)
def test_the_memory_format_is_that_of_the_module(name: str) -> None:
    build, make_arguments, _ = KNOWN[name]
    own = settled(build())
    ours = copy.deepcopy(own)
    sr_kernels.patch(ours)
    x, *others = make_arguments()
    maps, formats = x.dim() == 4, (torch.contiguous_format, torch.channels_last)
    for weights in formats if maps else formats[:1]:
        own.to(memory_format=weights)
        ours.to(memory_format=weights)
        last = x.contiguous(memory_format=formats[1]) if maps else x.mT.contiguous().mT
        for given in (x, last):
            for learns in (False, True):
                with torch.set_grad_enabled(learns):
                    before, after = (run(m, (given, *others)) for m in (own, ours))
                torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
                # Blocks on tokens return contiguous ones, into which stock turns them later.
                assert after.stride() == before.stride() or (not maps and after.is_contiguous())


@pytest.mark.parametrize("name", KNOWN)
def test_training_steps_agree(name: str) -> None:
    build, make_arguments, _ = KNOWN[name]
    ours = settled(build()).train()
    for part in ours.modules():
        if isinstance(part, tp.DropPath):
            part.drop_prob = 0.0
    theirs = copy.deepcopy(ours)
    sr_kernels.patch(ours)
    arguments = make_arguments()
    for module in (theirs, ours):
        run(module, arguments).square().mean().backward()
    # Relative to the largest: a bias in front of a BatchNorm has a gradient of rounding errors.
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for (key, own), (_, other) in zip(
        theirs.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert (other.grad is None) == (own.grad is None), key
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad, own.grad, rtol=1e-3, atol=1e-5 * largest)
    for own, other in zip(theirs.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, own)


# ---------------------------------------------------------------------------------- look-alikes


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def subclassed(base: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class of the same name and structure whose forward is another."""
    return type(base.__name__, (base,), {"forward": forward})


def cbam_twin(forward: Callable[..., Any]) -> nn.Module:
    return subclassed(tp.CBAMSpatialGate, forward)()


def ca(channels: int = 32) -> tp.CALayer:
    return tp.CALayer(channels, 4)


def with_gate(module: nn.Module, gate: nn.Module) -> nn.Module:
    module.conv_du[3] = gate
    return module


def swin(**options: Any) -> nn.Module:
    return tp.SwinTransformerBlock(24, (8, 8), 3, 4, 2, **options)


def without_bias(module: tp.SwinWindowAttention) -> nn.Module:
    """Like the original as long as its table is zero."""
    nn.init.zeros_(module.relative_position_bias_table)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        table = self.relative_position_bias_table
        self.relative_position_bias_table = nn.Parameter(torch.zeros_like(table))
        try:
            return tp.SwinWindowAttention.forward(self, x, mask)
        finally:
            self.relative_position_bias_table = table

    module.__class__ = subclassed(tp.SwinWindowAttention, forward)
    return module


def repeated(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(module.weight.flip(0))
    return module


# name: (module, a word of its reason)
TWINS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention with another scale": (
        lambda: tp.GMSA(12, 0, (2, 4, 8), scale=0.5),
        "something else",
    ),
    "softmax over the other axis": (lambda: tp.GMSA(12, 0, (2, 4, 8), axis=-2), "something else"),
    "q and v change places": (lambda: tp.GMSA(12, 1, (2, 4, 8), swapped=True), "something else"),
    "odd windows that do not roll back": (lambda: tp.GMSA(12, 1, (1, 3, 3)), "something else"),
    "windows of another order inside": (
        lambda: changed(tp.SABase4D(12, 2, ((4, 8), (8, 2))), window_list=((4, 8), (8, 2), (2, 2))),
        "windows and shifts",
    ),
    "a trained shift": (
        lambda: changed(tp.ShiftConv2d1(10, 7), weight=nn.Parameter(torch.randn(10, 1, 3, 3))),
        "known shift",
    ),
    "a shift that learns": (
        lambda: changed(tp.ShiftConv2d1(10, 7), weight=nn.Parameter(tp.one_hot_shift(10).data)),
        "requires a gradient",
    ),
    "shifts in another order": (lambda: repeated(tp.ShiftConv2d1(10, 7)), "known shift"),
    "a mask of two": (lambda: tp.ShiftConv2d1x1(10, 7, val=2.0), "known shift"),
    "a shift that wraps around": (lambda: tp.ShiftConvCopy(10, 7, wrap=True), "something else"),
    "a shift behind a norm": (
        lambda: changed(tp.LFE(10, 10, 2), norm=nn.BatchNorm2d(10)),
        "no known family",
    ),
    "an LFE with tanh": (lambda: tp.LFE(10, 10, 2, Tanh()), "something else"),
    "an LFE with Hardswish": (lambda: tp.LFE(10, 10, 2, nn.Hardswish()), "not a known activation"),
    "an LFE with the tanh GELU": (
        lambda: tp.LFE(10, 10, 2, nn.GELU(approximate="tanh")),
        "not a known activation",
    ),
    "an LFE that adds its input": (
        lambda: subclassed(tp.LFE, lambda self, x: x + self.conv1(self.act(self.conv0(x))))(10, 10),
        "something else",
    ),
    "an LFE run backwards": (
        lambda: subclassed(tp.LFE, lambda self, x: self.act(self.conv1(self.conv0(x))))(10, 10),
        "something else",
    ),
    "an ELAB without residuals": (
        lambda: subclassed(
            tp.ELAB,
            lambda self, x: self.modules_gmsa["gmsa_0"](self.modules_lfe["lfe_0"](x))[0],
        )(15, 2, 0, (2, 4, 8), 0),
        "something else",
    ),
    "an ELAB of unlike windows": (
        lambda: changed(
            tp.ELAB(15, 2, 0, (2, 4, 8)),
            modules_gmsa=nn.ModuleDict(
                {
                    "gmsa_0": tp.GMSA(15, 0, (2, 4, 8)),
                    "gmsa_1": tp.GMSA(15, 0, (2, 4, 4), calc_attn=False),
                }
            ),
        ),
        "windows of its attentions differ",
    ),
    "hardsigmoid for sigmoid": (lambda: with_gate(ca(), nn.Hardsigmoid()), "Hardsigmoid"),
    "a gate that is added": (
        lambda: subclassed(tp.CALayer, lambda self, x: x + self.conv_du(self.avg_pool(x)))(32, 4),
        "something else",
    ),
    "the gate alone": (
        lambda: subclassed(tp.CALayer, lambda self, x: self.conv_du(self.avg_pool(x)))(32, 4),
        "shape",
    ),
    "a maximum for the mean": (
        lambda: changed(ca(), avg_pool=nn.AdaptiveMaxPool2d(1)),
        "AdaptiveMaxPool2d",
    ),
    "a gate that no gradient passes": (
        lambda: subclassed(tp.CALayer, lambda self, x: x * self.conv_du(self.avg_pool(x)).detach())(
            32, 4
        ),
        "gradients",
    ),
    "the sample's deviation": (lambda: tp.StdCCA(32, 4, unbiased=True), "something else"),
    "a gate of random strength in training": (
        lambda: subclassed(
            tp.CALayer,
            lambda self, x: (
                x * self.conv_du(self.avg_pool(x)) * (torch.rand(1).item() if self.training else 1)
            ),
        )(32, 4),
        "in training mode",
    ),
    "a gate that writes into its input": (
        lambda: subclassed(tp.CALayer, lambda self, x: x.mul_(self.conv_du(self.avg_pool(x))))(
            32, 4
        ),
        "in place",
    ),
    "pixel attention on the input's square": (
        lambda: subclassed(tp.PA, lambda self, x: x * x * self.sigmoid(self.conv(x)))(24),
        "something else",
    ),
    "pixel attention in a tuple": (
        lambda: subclassed(tp.PA, lambda self, x: (tp.PA.forward(self, x),))(24),
        "returns something else than a Tensor: a tuple",
    ),
    "pixel attention in a dict": (
        lambda: subclassed(tp.PA, lambda self, x: {"out": tp.PA.forward(self, x)})(24),
        "a dict",
    ),
    "pixel attention of another temperature": (
        lambda: subclassed(tp.PA, lambda self, x: x * torch.sigmoid(self.conv(x) / 2))(24),
        "something else",
    ),
    "pixel attention 3x3": (
        lambda: changed(tp.PA(24), conv=nn.Conv2d(24, 24, 3, padding=1)),
        "1x1",
    ),
    "spatial gate with a BatchNorm that is not called": (
        lambda: changed(tp.SpatialGate(7), norm=nn.BatchNorm2d(1)),
        "something else",
    ),
    "CBAM's gate with a ReLU": (lambda: tp.CBAMSpatialGate(relu=True), "ReLU in it is none of"),
    "CBAM's gate with a ReLU in code": (
        lambda: cbam_twin(lambda self, x: x * self.spatial(self.compress(x)).relu().sigmoid()),
        "something else",
    ),
    "CBAM's gate, added": (
        lambda: cbam_twin(lambda self, x: x + x * self.spatial(self.compress(x)).sigmoid()),
        "something else",
    ),
    "CBAM's gate of the least": (
        lambda: cbam_twin(lambda self, x: x * self.spatial(-self.compress(-x)).sigmoid()),
        "something else",
    ),
    "CBAM's gate with the norm behind the sigmoid": (
        lambda: cbam_twin(
            lambda self, x: x * self.spatial.bn(self.spatial.conv(self.compress(x)).sigmoid())
        ),
        "something else",
    ),
    "CBAM's gate with the norm before the convolution": (
        lambda: changed(
            tp.CBAMSpatialGate(),
            spatial=nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 1, 7, padding=3)),
        ),
        "behind its convolution: BatchNorm2d",
    ),
    "CBAM's gate with a norm of each image": (
        lambda: changed(
            tp.CBAMSpatialGate(),
            spatial=nn.Sequential(nn.Conv2d(2, 1, 7, padding=3), nn.GroupNorm(1, 1)),
        ),
        "GroupNorm",
    ),
    "a body that adds its input": (
        lambda: subclassed(nn.Sequential, lambda self, x: x + nn.Sequential.forward(self, x))(
            tp.ELAB(15, 2, 0, (2, 4, 8)), tp.ELAB(15, 2, 1, (2, 4, 8))
        ),
        "no known family",
    ),
    "spatial gate of the sum": (
        lambda: subclassed(
            tp.SpatialGate,
            lambda self, x: (
                x * torch.sigmoid(self.conv(torch.cat([x.amax(1, True), x.sum(1, True)], 1)))
            ),
        )(7),
        "something else",
    ),
    "dropout on": (lambda: swin(attn_drop=0.1), "drops values"),
    "another softmax axis": (lambda: swin(axis=-2), "another axis"),
    "q, k, v head by head": (lambda: swin(order="hqkv"), "something else"),
    "norm behind the attention": (lambda: swin(post_norm=True), "something else"),
    "no residual": (lambda: swin(residual=False), "something else"),
    "rolled on instead of back": (lambda: swin(back=-1), "something else"),
    "another position index": (
        lambda: changed(
            tp.SwinWindowAttention(24, (4, 4), 3),
            relative_position_index=tp.position_index(4).t().contiguous(),
        ),
        "relative_position_index",
    ),
    "a position bias that is zero, and ignored": (
        lambda: without_bias(tp.SwinWindowAttention(24, (4, 4), 3)),
        "something else",
    ),
    "cosine attention": (
        lambda: changed(
            tp.SwinWindowAttention(24, (4, 4), 3), logit_scale=nn.Parameter(torch.ones(3, 1, 1))
        ),
        "cosine",
    ),
    "DCTLSA with the usual softmax": (
        lambda: tp.LinearBlock(20, 5, 4, 2, axis=-1),
        "something else",
    ),
    "an IMDModule with another split": (
        lambda: changed(tp.IMDModule(64), distilled_channels=8, remaining_channels=56),
        "fails",
    ),
    "ESA with another activation": (lambda: tp.ESA(16, act=nn.GELU()), "something else"),
    "ESA with a layer more": (
        lambda: changed(tp.ESA(16), norm=nn.BatchNorm2d(16)),
        "not ESA's: conv3_, conv_max, norm",
    ),
    "a convolution with other maths": (
        lambda: subclassed(nn.Conv2d, lambda self, x: 2 * nn.Conv2d.forward(self, x))(
            16, 16, 3, padding=1
        ),
        "no known family",
    ),
    "channel attention of a neighbourhood, in large images": (
        lambda: subclassed(
            tp.CALayer,
            lambda self, x: (
                x
                * self.conv_du(
                    self.avg_pool(x)
                    if max(x.shape[2:]) <= 384
                    else nn.functional.avg_pool2d(x, [min(384, side) for side in x.shape[2:]]).amax(
                        (2, 3), keepdim=True
                    )
                )
            ),
        )(32, 4),
        "something else",
    ),
    "a convolution of another weight": (
        lambda: type(
            "Conv2d",
            (nn.Conv2d,),
            {"_conv_forward": lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, w * w, b)},
        )(16, 16, 3, padding=1),
        "no known family",
    ),
    "a convolution of few channels": (
        lambda: nn.Conv2d(3, 16, 3, padding=1),
        "stock is faster for less than 12 channels",
    ),
    "a convolution of a mirrored border": (
        lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        "no known family",
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_look_alikes_are_left_alone(name: str) -> None:
    build, word = TWINS[name]
    module = build()
    kind = type(module)
    report = sr_kernels.patch(module)
    first = report.entries[0]
    assert (type(module), first.replaced_by) == (kind, None), str(report)
    assert word in first.reason, first.reason
    report.restore()


def test_there_are_enough_look_alikes() -> None:
    assert len(TWINS) >= 15


def test_scores_reach_a_caller_who_looks_at_them() -> None:
    """A GMSA in a network of someone's own may be asked for its attention matrices."""
    module = settled(tp.GMSA(12, 1, (2, 4, 8)))
    later = settled(tp.GMSA(12, 1, (2, 4, 8), calc_attn=False))
    (x,) = a_map(12)
    with torch.no_grad():
        y, maps = module(x)
        z, _ = later(x, maps)
        sr_kernels.patch(module)
        sr_kernels.patch(later)
        ours, found = module(x)
        torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
        assert len(found) == len(maps) == 3
        for one, other in zip(found, maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for given in (found, maps):  # ours, and a plain list of tensors
            torch.testing.assert_close(later(x, given)[0], z, rtol=1e-4, atol=1e-4)


def test_calls_that_the_operators_cannot_run_take_the_own_forward() -> None:
    module = tp.CALayer(32, 4).eval()
    sr_kernels.patch(module)
    x = torch.randn(32, 9, 9)
    with torch.no_grad():
        expected = x * module.conv_du(module.avg_pool(x))
        assert torch.equal(module(x), expected)  # without a batch
        with sr_kernels.use_backend("reference"):
            assert torch.equal(module(x[None]), expected[None])
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            module(x.half()[None])

        class Tracked(Tensor):
            pass

        assert torch.equal(module(x[None].as_subclass(Tracked)), expected[None])
        keyword = torch.randn(1, 32, 5, 5)
        torch.testing.assert_close(module(x=keyword), module(keyword))
    block = tp.ELAB(15, 2, 0, (2, 4, 8)).eval()
    sr_kernels.patch(block)
    with pytest.raises(RuntimeError, match="shape"):  # its own error
        block(torch.randn(1, 15, 9, 9))
    assert original_class(module) is tp.CALayer
    assert replacement_of(module) is not None


def test_small_maps_are_left_to_esa_itself() -> None:
    """They are too small for its pooling: some return them as they are."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x if min(x.shape[2:]) < 15 else tp.ESA.forward(self, x)

    module, z = subclassed(tp.ESA, forward)(16).eval(), torch.rand(1, 16, 14, 40)
    assert sr_kernels.patch(module).replaced
    assert torch.equal(module(z), z)


def test_a_mask_of_someone_else_is_obeyed() -> None:
    module = tp.HAB(24, 3, 4, 2).eval()
    own = copy.deepcopy(module)
    sr_kernels.patch(module)
    assert replacement_of(module) is not None
    x, size, index, mask = hat_arguments(2)
    other = mask.clone()
    other[0, :, 0] = -100
    with torch.inference_mode():
        masks = tp.swin_mask(8, 12, 4, 2), torch.zeros_like(mask)
        for given in masks:
            torch.testing.assert_close(
                module(x, size, index, given), own(x, size, index, given), rtol=1e-4, atol=1e-4
            )
    with torch.no_grad():
        for given in (mask, other, torch.zeros_like(mask)):
            torch.testing.assert_close(
                module(x, size, index, given), own(x, size, index, given), rtol=1e-4, atol=1e-4
            )
        mask[0, :, 0] = -100  # the same tensor, written to since
        torch.testing.assert_close(
            module(x, size, index, mask), own(x, size, index, mask), rtol=1e-4, atol=1e-4
        )


def test_shift_kernels_that_change_are_followed() -> None:
    module = tp.LFE(10, 10, 2).eval()
    own = copy.deepcopy(module)
    sr_kernels.patch(module)
    state = module.state_dict()
    for key in ("conv0.shift_conv.weight", "conv1.shift_conv.weight"):
        state[key] = state[key].flip(3)
    for net in (module, own):
        net.load_state_dict(state)
    (x,) = a_map(10)
    with torch.no_grad():
        assert torch.equal(module(x), own(x))


def test_a_gate_with_a_norm_is_left_alone_in_training(caplog: pytest.LogCaptureFixture) -> None:
    module = settled(tp.CBAMSpatialGate())
    own = copy.deepcopy(module)
    assert sr_kernels.patch(module).replaced
    (x,) = a_map(9)
    with caplog.at_level("DEBUG", "sr_kernels.patching"):
        for part in (module, own):
            part.train()
        assert torch.equal(module(x), own(x))
    assert "spatial_attention does not take this call" in caplog.text
    for kept, expected in zip(module.buffers(), own.buffers(), strict=True):
        assert torch.equal(kept, expected)
    for part in (module, own):
        part.eval()  # folded with the statistics that the step left
    with torch.no_grad(), Called() as called:
        torch.testing.assert_close(module(x), own(x), rtol=1e-5, atol=1e-5)
    assert "spatial_attention" in called.names


def test_a_network_that_holds_a_gate_is_none() -> None:
    """CBAM as a whole: channel attention with Linear layers, then the spatial gate."""
    whole = nn.ModuleDict({"channel": nn.Linear(9, 9), "spatial": tp.CBAMSpatialGate()})
    report = sr_kernels.patch(whole, strict=True)
    assert [e.path for e in report.replaced] == ["spatial"]


def test_autocast_keeps_dtypes_and_precision() -> None:
    for build in (lambda: tp.ELAB(15, 2, 1, (2, 4, 8)), lambda: ca(), lambda: tp.PA(24)):
        module = settled(build())
        channels = next(p for p in module.parameters() if p.dim() == 4).shape[1]
        own = copy.deepcopy(module)
        sr_kernels.patch(module)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, channels if channels > 1 else 15, 8, 8).to(dtype)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                ours, theirs = module(x), own(x)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=0.1)


def test_half_precision_modules() -> None:
    module = settled(tp.ELAB(15, 2, 0, (2, 4, 8))).to(torch.bfloat16)
    own = copy.deepcopy(module)
    assert sr_kernels.patch(module).replaced
    x = torch.randn(1, 15, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = module(x), own(x)
    assert ours.dtype == torch.bfloat16
    assert F.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), 0) > 0.999


def test_the_linear_attention_block_is_for_inference() -> None:
    """Where gradients are wanted its parts run."""
    module, (x, size) = settled(tp.LinearBlock(20, 5, 4, 2)), tokens(20, 8, 12)
    assert sr_kernels.patch(module).replaced
    with Called() as called:
        module(x, size).sum().backward()
    assert called.names == {"shift_conv2d", "shift_conv2d_backward", "shift_conv_block"} | {
        "shift_conv_block_backward"
    }
    assert all(p.grad is not None for p in module.parameters())
    module.requires_grad_(False)
    with Called() as called:
        module(x, size)
    assert called.names == {"linear_attention_block", "shift_conv_block"}
