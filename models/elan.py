"""ELAN: efficient long-range attention network for image super-resolution.

Zhang, Zeng, Guo, Zhang, "Efficient Long-Range Attention Network for Image Super-resolution",
ECCV 2022, arXiv 2203.06697. Parameter names are the authors' (github xindongzhang/ELAN), so that
their state dicts load unchanged.

Per ELAB, with the windows shifted by half their side in every second one::

    x = lfe_j(x) + x       shift convolution C -> rC, ReLU, shift convolution rC -> C
    x = gmsa_j(x) + x      attention in windows of 4, 8 and 16 pixels, C/3 channels each;
                           j = 0 computes the scores, the others reuse them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels.nn import GMSA, LFE, set_backend

from .hub import HubMixin

__all__ = ["ELAB", "ELAN", "elan", "elan_light"]

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class MeanShift(nn.Conv2d):
    """Add ``sign * rgb_range * mean`` to RGB; a frozen 1x1 convolution, as in the public code."""

    def __init__(self, rgb_range: float, sign: int) -> None:
        super().__init__(3, 3, 1)
        assert self.bias is not None
        with torch.no_grad():
            self.weight.copy_(torch.eye(3).reshape(3, 3, 1, 1))
            self.bias.copy_(sign * rgb_range * torch.tensor(DIV2K_MEAN))
        self.requires_grad_(False)


class ELAB(nn.Module):
    """``1 + shared_depth`` pairs of feature extraction and attention with one set of scores."""

    def __init__(
        self,
        channels: int,
        exp_ratio: int,
        shifts: int,
        window_sizes: Sequence[int],
        shared_depth: int,
    ) -> None:
        super().__init__()
        pairs = range(1 + shared_depth)
        self.modules_lfe = nn.ModuleDict(
            {f"lfe_{j}": LFE(channels, channels, exp_ratio, residual=True) for j in pairs}
        )
        self.modules_gmsa = nn.ModuleDict(
            {
                f"gmsa_{j}": GMSA(channels, shifts, window_sizes, calc_attn=j == 0, residual=True)
                for j in pairs
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = None
        for lfe, gmsa in zip(self.modules_lfe.values(), self.modules_gmsa.values(), strict=True):
            x, scores = gmsa(lfe(x), scores)
        return x


def mirror_index(length: int, padded: int, device: torch.device | None = None) -> Tensor:
    """Where each of ``padded`` positions reads from when ``length`` pixels are mirrored on and on.

    The first ``2 length - 1`` positions are those of reflection padding, which cannot go further;
    from there the mirror image is mirrored again. A single pixel repeats.
    """
    # 1 for a single pixel; without a branch, which tracing would take one way for good.
    period = 2 * (length - 1) + 1 // length
    position = torch.arange(padded, device=device) % period
    return torch.minimum(position, period - position)


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """Mirror on at the right and at the bottom to a multiple of ``multiple`` pixels."""
    height, width = x.shape[-2:]
    if height < 1 or width < 1:
        raise ValueError(f"x is {height} x {width} pixels; expected at least 1 x 1")
    # Without a branch on the size: a compiled network then serves all of them.
    # Rounded up without negative numbers: ONNX divides those towards zero, tracing exports that.
    rows, columns = ((n + multiple - 1) // multiple * multiple for n in (height, width))
    x = x.index_select(2, mirror_index(height, rows, x.device))
    return x.index_select(3, mirror_index(width, columns, x.device))


class ELAN(nn.Module, HubMixin):
    """ELAN; the arguments are named as in the authors' configuration files.

    Input (N, colors, H, W) in 0..rgb_range, any H, W >= 1; output (N, colors, sH, sW) in the same
    range, not clamped. Inside, the image is mirrored on at the right and at the bottom to a
    multiple of every window.

    Args:
        scale: s, the factor of enlargement.
        m_elan: number of (LFE, GMSA) pairs, a multiple of 1 + n_share.
        c_elan: channels, a multiple of the number of windows.
        n_share: pairs of an ELAB that reuse its scores.
        r_expand: hidden channels of an LFE per channel.
        window_sizes: window sides in pixels, one per channel group.
        colors: channels of the image.
        rgb_range: value of white.
        norm: subtract the mean colour before and add it after (needs 3 colours); checkpoints of
            traiNNer-redux are without.
        backend: see :mod:`sr_kernels.backends`; "reference" runs the same weights on stock
            PyTorch. May be changed later through the attribute.

    Attributes:
        config: the arguments but for ``backend``: ``ELAN(**model.config)`` is one like it.
        tile_multiple: a tile's corner must lie on a multiple of this (LR pixels), or its windows
            are not those of the whole image.
        tile_overlap: overlap of tiles (LR pixels) that hides their seams in practice.
        receptive_radius: LR pixels to the farthest input that can reach an output.
    """

    def __init__(
        self,
        scale: int = 4,
        *,
        m_elan: int = 36,
        c_elan: int = 180,
        n_share: int = 0,
        r_expand: int = 2,
        window_sizes: Sequence[int] = (4, 8, 16),
        colors: int = 3,
        rgb_range: float = 255.0,
        norm: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale is {scale}; expected at least 1")
        if n_share < 0 or m_elan < 1 or m_elan % (1 + n_share):
            raise ValueError(
                f"m_elan is {m_elan}; expected a multiple of 1 + n_share = {1 + n_share}"
            )
        if min(window_sizes, default=0) < 1:
            raise ValueError(f"window_sizes is {list(window_sizes)}; expected sides >= 1")
        if c_elan < 1:
            raise ValueError(f"c_elan is {c_elan}; expected at least 1")
        if not 0 < rgb_range < math.inf:
            raise ValueError(f"rgb_range is {rgb_range}; expected a number > 0")
        if norm and colors != 3:
            raise ValueError(f"colors is {colors}; the mean colour (norm=True) needs 3")
        self.config: dict[str, Any] = {
            "scale": scale,
            "m_elan": m_elan,
            "c_elan": c_elan,
            "n_share": n_share,
            "r_expand": r_expand,
            "window_sizes": list(window_sizes),
            "colors": colors,
            "rgb_range": float(rgb_range),
            "norm": norm,
        }
        self.scale = scale
        self.rgb_range = float(rgb_range)
        self.window_sizes = tuple(window_sizes)
        self.tile_multiple = math.lcm(*self.window_sizes)
        self.tile_overlap = 2 * self.tile_multiple
        self.receptive_radius = m_elan * (2 + max(self.window_sizes) - 1) + 2

        self.sub_mean = MeanShift(rgb_range, -1) if norm else nn.Identity()
        self.add_mean = MeanShift(rgb_range, 1) if norm else nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(colors, c_elan, 3, padding=1))
        self.body = nn.Sequential(
            *(
                ELAB(c_elan, r_expand, i % 2, self.window_sizes, n_share)
                for i in range(m_elan // (1 + n_share))
            )
        )
        self.tail = nn.Sequential(
            nn.Conv2d(c_elan, colors * scale * scale, 3, padding=1), nn.PixelShuffle(scale)
        )
        self.backend = backend

    @property
    def backend(self) -> str | None:
        """The backend of every layer."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._backend = name
        set_backend(self, name)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.head(self.sub_mean(mirror_pad(x, self.tile_multiple)))
        x = self.tail(self.body(x) + x)
        return self.add_mean(x)[:, :, : height * self.scale, : width * self.scale]


def elan(scale: int = 4, **options: Any) -> ELAN:
    """ELAN: 36 pairs, 180 channels, no reuse (8.3 million parameters); options of :class:`ELAN`."""
    return ELAN(scale, **options)


def elan_light(scale: int = 4, **options: Any) -> ELAN:
    """ELAN-light: 24 pairs, 60 channels, each score matrix used twice (0.6 million parameters)."""
    return ELAN(scale, **{"m_elan": 24, "c_elan": 60, "n_share": 1, **options})
