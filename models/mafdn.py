"""MAFDN: multi-attention feature distillation network. A reconstruction.

Zhang et al., Int. J. Intelligent Systems 2024, doi 10.1155/2024/3255233. The authors published
neither code nor weights. **What stands here is a reconstruction that matches the published size
and cost** (x4: 597K parameters, 33.79 G multiply-adds for a 1280x720 output) from the description
in the abstract: IMDN's skeleton, blocks of several distillation branches with pixel, spatial and
channel attention, and a residual block of over-parameterised convolutions. Which attention sits
where those figures do not tell; it is an argument here.

A block, with ``act`` = leaky ReLU of slope 0.05 and n = 4 branches::

    r_0 = x,   r_k = act(do_conv3x3(r_{k-1}) + r_{k-1})                         k = 1 .. n-1
    d_k = spatial(pixel(act(conv1x1(r_k))))                                     k = 0 .. n-1
    y   = conv1x1(gate(d) * d) + x,   d = [d_0 .. d_{n-1}],   gate of contrast channel attention
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from sr_kernels import functional as F
from sr_kernels.nn import (
    ChannelAttention,
    GatedConv1x1,
    PixelAttention,
    SpatialAttention,
    set_backend,
)

from .do_conv import DOConv2d
from .hub import HubMixin

__all__ = ["MAFDB", "MAFDN", "Attention", "mafdn"]

NEGATIVE_SLOPE = 0.05

Attention = Literal["branch", "branch_channel", "block"]
"""Where a block's attention sits.

"branch": pixel and spatial attention in every branch, contrast channel attention on their
concatenation. "branch_channel": pixel, spatial and (mean) channel attention in every branch.
"block": all three on the block's fused output.
"""


class MAFDB(nn.Module):
    """Multi-attention feature distillation block; see the head of this file.

    Args:
        channels: C; a branch keeps C // 2 of them.
        branches: n.
        attention: see :data:`Attention`.
        reduction: channels per hidden channel of the channel attention.
    """

    def __init__(self, channels: int, branches: int, attention: Attention, reduction: int) -> None:
        super().__init__()
        if attention not in get_args(Attention):
            accepted = ", ".join(get_args(Attention))
            raise ValueError(f"attention is {attention!r}; accepted are {accepted}")
        self.attention: Attention = attention
        distilled = channels // 2
        gathered = branches * distilled
        gated, gates = (channels, 1) if attention == "block" else (distilled, branches)
        self.refine = nn.ModuleList(DOConv2d(channels, channels) for _ in range(branches - 1))
        self.distill = nn.ModuleList(nn.Conv2d(channels, distilled, 1) for _ in range(branches))
        self.pixel = nn.ModuleList(PixelAttention(gated) for _ in range(gates))
        self.spatial = nn.ModuleList(SpatialAttention() for _ in range(gates))
        self.channel: ChannelAttention | nn.ModuleList
        if attention == "branch_channel":
            self.channel = nn.ModuleList(
                ChannelAttention(distilled, reduction) for _ in range(branches)
            )
        else:
            width = channels if attention == "block" else gathered
            self.channel = ChannelAttention(width, reduction, statistic="contrast")
        self.fuse: GatedConv1x1 | nn.Conv2d
        if attention == "branch":
            self.fuse = GatedConv1x1(gathered, channels)
        else:
            self.fuse = nn.Conv2d(gathered, channels, 1)

    def _refined(self, r: Tensor, k: int) -> Tensor:
        return leaky_relu(self.refine[k - 1](r) + r, NEGATIVE_SLOPE)

    def _distilled(self, r: Tensor, k: int) -> Tensor:
        return leaky_relu(self.distill[k](r), NEGATIVE_SLOPE)

    def _pixel_spatial(self, x: Tensor, k: int) -> Tensor:
        pixel, spatial = self.pixel[k], self.spatial[k]
        assert isinstance(pixel, PixelAttention)
        assert isinstance(spatial, SpatialAttention)
        return F.pixel_spatial_attention(
            x,
            pixel.conv.weight,
            pixel.conv.bias,
            spatial.conv.weight,
            spatial.conv.bias,
            backend=pixel.backend,
        )

    def forward(self, x: Tensor) -> Tensor:
        r, branches = x, []
        for k in range(len(self.distill)):
            if k > 0:
                r = self._refined(r, k)
            d = self._distilled(r, k)
            if self.attention != "block":
                d = self._pixel_spatial(d, k)
            if isinstance(self.channel, nn.ModuleList):
                d = self.channel[k](d)
            branches.append(d)
        d = torch.cat(branches, 1)
        if isinstance(self.fuse, GatedConv1x1):
            assert isinstance(self.channel, ChannelAttention)
            return self.fuse(d, self.channel.gate(d), residual=x)
        y = self.fuse(d)
        if self.attention == "block":
            assert isinstance(self.channel, ChannelAttention)
            y = self.channel(self._pixel_spatial(y, 0))
        return y + x


class MAFDN(nn.Module, HubMixin):
    """MAFDN, a reconstruction that matches the published size and cost (head of this file).

    Input (N, colors, H, W) in 0..1, any H, W >= 1; output (N, colors, sH, sW) in 0..1, not
    clamped. A fresh network already enlarges bilinearly, training starts from there.

    Args:
        scale: s, the factor of enlargement.
        channels: C, an even number.
        num_blocks: number of MAFDBs.
        branches: distillation branches of a block.
        attention: see :data:`Attention`.
        reduction: channels per hidden channel of the channel attention; None takes 16, or 4
            where every branch has its own.
        colors: channels of the image, at most ``channels``.
        backend: see :mod:`sr_kernels.backends`; "reference" runs the same weights on stock
            PyTorch. May be changed later through the attribute.

    Attributes:
        config: the arguments but for ``backend``: ``MAFDN(**model.config)`` is one like it.
        rgb_range: 1.0, the value of white in input and output.
        receptive_radius: LR pixels to the farthest input that can reach an output through the
            convolutions. The channel attention besides looks at the mean and deviation over the
            whole image, so a tile's result differs slightly from the whole image's.
        tile_multiple, tile_overlap: where tiles may start, and their recommended overlap, in LR
            pixels.
    """

    def __init__(
        self,
        scale: int = 4,
        *,
        channels: int = 52,
        num_blocks: int = 6,
        branches: int = 4,
        attention: Attention = "branch",
        reduction: int | None = None,
        colors: int = 3,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale is {scale}; expected at least 1")
        if channels < 2 or channels % 2 or channels < colors:
            raise ValueError(f"channels is {channels}; expected an even number >= {max(2, colors)}")
        if num_blocks < 1 or branches < 1:
            raise ValueError(f"num_blocks is {num_blocks}, branches {branches}; both must be >= 1")
        if reduction is None:
            reduction = 4 if attention == "branch_channel" else 16
        self.config: dict[str, Any] = {
            "scale": scale,
            "channels": channels,
            "num_blocks": num_blocks,
            "branches": branches,
            "attention": attention,
            "reduction": reduction,
            "colors": colors,
        }
        self.scale = scale
        self.rgb_range = 1.0
        # Head, smoothing and tail reach 1 each; a block one a refinement, and 3 by its 7x7 gate.
        self.receptive_radius = 3 + num_blocks * (branches - 1 + 3)
        self.tile_multiple = 1
        self.tile_overlap = 16

        self.head = nn.Conv2d(colors, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            MAFDB(channels, branches, attention, reduction) for _ in range(num_blocks)
        )
        self.fuse = nn.Conv2d(channels * num_blocks, channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, colors * scale * scale, 3, padding=1)
        self._start_bilinear()
        self.backend = backend

    @torch.no_grad()
    def _start_bilinear(self) -> None:
        """Let the untrained network be bilinear interpolation, plus little.

        The first head channels pass the image through, and the tail enlarges them; everything
        else reaches the output through small weights.
        """
        s, colors = self.scale, self.head.in_channels
        assert self.head.bias is not None
        assert self.smooth.bias is not None
        assert self.tail.bias is not None
        self.head.weight[:colors] = 0
        self.head.bias[:colors] = 0
        self.smooth.weight.mul_(0.1)
        self.smooth.bias.zero_()
        self.tail.weight.mul_(0.05)
        self.tail.bias.zero_()
        self.tail.weight[:, :colors] = 0
        # Centres of the s sub-pixels relative to the LR pixel's, and their three linear weights.
        offset = (torch.arange(s) + 0.5) / s - 0.5
        taps = (1 - (offset[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp(min=0)
        kernels = torch.einsum("ia,jb->ijab", taps, taps).reshape(s * s, 3, 3)
        for c in range(colors):
            self.head.weight[c, c, 1, 1] = 1
            self.tail.weight[c * s * s : (c + 1) * s * s, c] = kernels

    @property
    def backend(self) -> str | None:
        """The backend of every layer."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._backend = name
        set_backend(self, name)

    @property
    def folded(self) -> bool:
        """Whether no over-parameterised convolution is left."""
        return not any(isinstance(layer, DOConv2d) for layer in self.modules())

    def fold(self) -> MAFDN:
        """Replace every DO-Conv by the one convolution that it is, in place; returns self.

        The output stays the same but for rounding. A folded network can still be trained, as an
        ordinary one; an optimizer must be made anew.
        """
        for layer in list(self.modules()):
            for name, child in list(layer.named_children()):
                if isinstance(child, DOConv2d):
                    setattr(layer, name, child.fold())
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        f, features = h, []
        for block in self.blocks:
            f = block(f)
            features.append(f)
        f = leaky_relu(self.fuse(torch.cat(features, 1)), NEGATIVE_SLOPE)
        return nn.functional.pixel_shuffle(self.tail(self.smooth(f) + h), self.scale)


def mafdn(scale: int = 4, **options: Any) -> MAFDN:
    """MAFDN with the published size: 52 channels, 6 blocks; options of :class:`MAFDN`."""
    return MAFDN(scale, **options)
