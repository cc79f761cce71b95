"""Networks as their authors published them, written here from the formulas and the public names of
their parameters: what other people's code looks like to the patcher.

Each is meant to be like the public form in what matters: class names, attributes, order of the
layers, shapes, and the arithmetic of ``forward``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------ ELAN


def one_hot_shift(channels: int, mode: str = "+", value: float = 1.0) -> nn.Parameter:
    """The frozen (C, 1, 3, 3) kernel of a shift by one pixel in four of five channel groups."""
    taps = {
        "+": [(1, 2), (1, 0), (2, 1), (0, 1)],
        "x": [(0, 0), (0, 2), (2, 0), (2, 2)],
    }[mode]
    kernel = torch.zeros(channels, 1, 3, 3)
    g = channels // 5
    for i, (row, column) in enumerate(taps):
        kernel[i * g : (i + 1) * g, 0, row, column] = value
    kernel[4 * g :, 0, 1, 1] = value
    return nn.Parameter(kernel, requires_grad=False)


class ShiftConv2d0(nn.Module):
    """The official dense form: a 3x3 convolution under a mask."""

    def __init__(self, inp_channels: int, out_channels: int) -> None:
        super().__init__()
        self.inp_channels, self.out_channels, self.n_div = inp_channels, out_channels, 5
        dense = nn.Conv2d(inp_channels, out_channels, 3, 1, 1)
        mask = one_hot_shift(inp_channels).data.squeeze(1).expand(out_channels, -1, 3, 3).clone()
        self.w, self.b = dense.weight, dense.bias
        self.m = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w * self.m, self.b, padding=1)


class ShiftConv2d1(nn.Module):
    """The official depthwise form."""

    def __init__(self, inp_channels: int, out_channels: int) -> None:
        super().__init__()
        self.inp_channels, self.out_channels, self.n_div = inp_channels, out_channels, 5
        self.weight = one_hot_shift(inp_channels)
        self.conv1x1 = nn.Conv2d(inp_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.conv2d(x, self.weight, None, padding=1, groups=self.inp_channels)
        return self.conv1x1(shifted)


class ShiftConv2d(nn.Module):
    def __init__(self, inp_channels: int, out_channels: int, dense: bool = False) -> None:
        super().__init__()
        self.conv_type = "low-training-memory" if dense else "fast-training-speed"
        kind = ShiftConv2d0 if dense else ShiftConv2d1
        self.shift_conv = kind(inp_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift_conv(x)


class ShiftConv2d1x1(nn.Conv2d):
    """FriedRiceLab's form: the convolution owns the mask."""

    def __init__(
        self, in_channels: int, out_channels: int, shift_mode: str = "+", val: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.mask = one_hot_shift(in_channels, shift_mode, val)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.mask, None, padding=1, groups=self.in_channels)
        return F.conv2d(x, self.weight, self.bias)


class ShiftConvCopy(nn.Module):
    """The shift by copying slices."""

    def __init__(self, channels: int, out_channels: int, wrap: bool = False) -> None:
        super().__init__()
        self.wrap = wrap
        self.conv = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        g = x.shape[1] // 5
        if self.wrap:
            moved = x.clone()
            for i, (step, axis) in enumerate([(-1, 3), (1, 3), (-1, 2), (1, 2)]):
                moved[:, i * g : (i + 1) * g] = torch.roll(x[:, i * g : (i + 1) * g], step, axis)
            return self.conv(moved)
        moved = torch.zeros_like(x)
        moved[:, :g, :, :-1] = x[:, :g, :, 1:]
        moved[:, g : 2 * g, :, 1:] = x[:, g : 2 * g, :, :-1]
        moved[:, 2 * g : 3 * g, :-1] = x[:, 2 * g : 3 * g, 1:]
        moved[:, 3 * g : 4 * g, 1:] = x[:, 3 * g : 4 * g, :-1]
        moved[:, 4 * g :] = x[:, 4 * g :]
        return self.conv(moved)


class LFE(nn.Module):
    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        exp_ratio: int = 4,
        act: nn.Module | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.exp_ratio, self.act_type = exp_ratio, "relu"
        self.conv0 = ShiftConv2d(inp_channels, out_channels * exp_ratio, dense)
        self.conv1 = ShiftConv2d(out_channels * exp_ratio, out_channels, dense)
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.act(self.conv0(x)))


class SequentialLFE(nn.Module):
    """FriedRiceLab's spelling."""

    def __init__(self, planes: int, r_expand: int = 2) -> None:
        super().__init__()
        self.lfe = nn.Sequential(
            ShiftConv2d1x1(planes, planes * r_expand),
            nn.ReLU(inplace=True),
            ShiftConv2d1x1(planes * r_expand, planes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lfe(x)


def to_windows(x: Tensor, wh: int, ww: int) -> Tensor:
    """(N, C, H, W) -> (N windows, wh ww, C), windows and tokens row by row."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // wh, wh, w // ww, ww)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, wh * ww, c)


def from_windows(y: Tensor, n: int, h: int, w: int, wh: int, ww: int) -> Tensor:
    y = y.reshape(n, h // wh, w // ww, wh, ww, -1)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


class GMSA(nn.Module):
    """scale, axis: of the softmax, for look-alikes."""

    def __init__(
        self,
        channels: int,
        shifts: int = 4,
        window_sizes: Sequence[int] = (4, 8, 12),
        calc_attn: bool = True,
        scale: float = 1.0,
        axis: int = -1,
        swapped: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.shifts = channels, shifts
        self.window_sizes, self.calc_attn = list(window_sizes), calc_attn
        self.scale, self.axis, self.swapped = scale, axis, swapped
        width = channels * (2 if calc_attn else 1)
        self.split_chns = [width // 3] * 3
        self.project_inp = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width))
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, prev_atns: Any = None) -> tuple[Tensor, Any]:
        n, _, h, w = x.shape
        ys, atns = [], []
        groups = torch.split(self.project_inp(x), self.split_chns, dim=1)
        for i, (part, size) in enumerate(zip(groups, self.window_sizes, strict=True)):
            if self.shifts > 0:
                part = torch.roll(part, (-size // 2, -size // 2), (2, 3))
            if prev_atns is None:
                q, v = part.chunk(2, 1)
                if self.swapped:
                    q, v = v, q
                q = to_windows(q, size, size)
                atn = (self.scale * q @ q.transpose(-2, -1)).softmax(self.axis)
                atns.append(atn)
            else:
                v, atn = part, prev_atns[i]
            y = from_windows(atn @ to_windows(v, size, size), n, h, w, size, size)
            if self.shifts > 0:
                y = torch.roll(y, (size // 2, size // 2), (2, 3))
            ys.append(y)
        y = self.project_out(torch.cat(ys, 1))
        return y, atns if prev_atns is None else prev_atns


class ELAB(nn.Module):
    def __init__(
        self,
        channels: int,
        exp_ratio: int = 2,
        shifts: int = 0,
        window_sizes: Sequence[int] = (4, 8, 16),
        shared_depth: int = 1,
    ) -> None:
        super().__init__()
        self.shared_depth = shared_depth
        pairs = range(1 + shared_depth)
        self.modules_lfe = nn.ModuleDict(
            {f"lfe_{i}": LFE(channels, channels, exp_ratio) for i in pairs}
        )
        self.modules_gmsa = nn.ModuleDict(
            {f"gmsa_{i}": GMSA(channels, shifts, window_sizes, i == 0) for i in pairs}
        )

    def forward(self, x: Tensor) -> Tensor:
        atn = None
        for i in range(1 + self.shared_depth):
            x = self.modules_lfe[f"lfe_{i}"](x) + x
            y, atn = self.modules_gmsa[f"gmsa_{i}"](x, atn)
            x = y + x
        return x


class ListELAB(nn.Module):
    """FriedRiceLab's spelling."""

    def __init__(
        self,
        planes: int,
        r_expand: int = 2,
        shifts: int = 0,
        window_sizes: Sequence[int] = (4, 8, 16),
        n_share: int = 1,
    ) -> None:
        super().__init__()
        pairs = range(1 + n_share)
        self.modules_lfe = nn.ModuleList([SequentialLFE(planes, r_expand) for _ in pairs])
        self.modules_gmsa = nn.ModuleList(
            [GMSA(planes, shifts, window_sizes, i == 0) for i in pairs]
        )

    def forward(self, x: Tensor) -> Tensor:
        atn = None
        for lfe, gmsa in zip(self.modules_lfe, self.modules_gmsa, strict=True):
            x = lfe(x) + x
            y, atn = gmsa(x, atn)
            x = y + x
        return x


class MeanShift(nn.Conv2d):
    def __init__(self, sign: int, rgb_range: float = 255.0) -> None:
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * rgb_range * torch.tensor([0.4488, 0.4371, 0.4040])
        self.requires_grad_(False)


class ELAN(nn.Module):
    """``spelling``: "official" or "friedricelab"; input 0..255."""

    def __init__(
        self,
        scale: int = 4,
        m_elan: int = 24,
        c_elan: int = 60,
        n_share: int = 1,
        window_sizes: Sequence[int] = (4, 8, 16),
        spelling: str = "official",
    ) -> None:
        super().__init__()
        self.scale, self.window_sizes = scale, list(window_sizes)
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        block = ELAB if spelling == "official" else ListELAB
        head = nn.Conv2d(3, c_elan, 3, padding=1)
        self.head = nn.Sequential(head) if spelling == "official" else head
        self.body = nn.Sequential(
            *(
                block(c_elan, 2, i % 2, window_sizes, n_share)
                for i in range(m_elan // (1 + n_share))
            )
        )
        self.tail = nn.Sequential(
            nn.Conv2d(c_elan, 3 * scale * scale, 3, padding=1), nn.PixelShuffle(scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        multiple = math.lcm(*self.window_sizes)
        x = F.pad(x, (0, -w % multiple, 0, -h % multiple), "reflect")
        x = self.head(self.sub_mean(x))
        x = self.add_mean(self.tail(self.body(x) + x))
        return x[:, :, : h * self.scale, : w * self.scale]


# ------------------------------------------------------------------------------------------ IMDN


def stdv_channels(x: Tensor) -> Tensor:
    """Population standard deviation of each channel, as IMDN spells it."""
    count = x.size(2) * x.size(3)
    mean = x.sum(3, keepdim=True).sum(2, keepdim=True) / count
    variance = (x - mean).pow(2).sum(3, keepdim=True).sum(2, keepdim=True) / count
    return variance.pow(0.5)


class CALayer(nn.Module):
    """RCAN's channel attention."""

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channel, channel // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channel // reduction, channel, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.avg_pool(x))


class ChannelAttention(nn.Module):
    """HAT's spelling of the same."""

    def __init__(self, num_feat: int, squeeze_factor: int = 16) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_feat, num_feat // squeeze_factor, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_feat // squeeze_factor, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class CCALayer(nn.Module):
    """IMDN's contrast-aware channel attention."""

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.contrast = stdv_channels
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channel, channel // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channel // reduction, channel, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.contrast(x) + self.avg_pool(x))


class StdCCA(nn.Module):
    """The other spelling of the deviation: torch.std."""

    def __init__(self, planes: int, reduction: int = 16, unbiased: bool = False) -> None:
        super().__init__()
        self.unbiased = unbiased
        self.conv = nn.Sequential(
            nn.Conv2d(planes, planes // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes // reduction, planes, 1),
        )
        self.sig = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        deviation = torch.std(x, dim=(2, 3), keepdim=True, unbiased=self.unbiased)
        return x * self.sig(self.conv(F.adaptive_avg_pool2d(x, 1) + deviation))


class IMDModule(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.distilled_channels = in_channels // 4
        self.remaining_channels = in_channels - self.distilled_channels
        self.c1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.c2 = nn.Conv2d(self.remaining_channels, in_channels, 3, padding=1)
        self.c3 = nn.Conv2d(self.remaining_channels, in_channels, 3, padding=1)
        self.c4 = nn.Conv2d(self.remaining_channels, self.distilled_channels, 3, padding=1)
        self.act = nn.LeakyReLU(0.05, inplace=True)
        self.c5 = nn.Conv2d(in_channels, in_channels, 1)
        self.cca = CCALayer(self.distilled_channels * 4)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (self.distilled_channels, self.remaining_channels)
        kept, rest = [], x
        for convolution in (self.c1, self.c2, self.c3):
            first, rest = torch.split(self.act(convolution(rest)), sizes, dim=1)
            kept.append(first)
        out = torch.cat([*kept, self.c4(rest)], dim=1)
        return self.c5(self.cca(out)) + x


class IMDN(nn.Module):
    def __init__(self, nf: int = 64, num_modules: int = 6, upscale: int = 4) -> None:
        super().__init__()
        self.fea_conv = nn.Conv2d(3, nf, 3, padding=1)
        self.number = num_modules
        for i in range(num_modules):
            setattr(self, f"IMDB{i + 1}", IMDModule(nf))
        self.c = nn.Sequential(nn.Conv2d(nf * num_modules, nf, 1), nn.LeakyReLU(0.05, inplace=True))
        self.LR_conv = nn.Conv2d(nf, nf, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(nf, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.fea_conv(x)
        outputs, y = [], first
        for i in range(self.number):
            y = getattr(self, f"IMDB{i + 1}")(y)
            outputs.append(y)
        return self.upsampler(self.LR_conv(self.c(torch.cat(outputs, dim=1))) + first)


# ------------------------------------------------------------------------------------------- PAN


class PA(nn.Module):
    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(nf, nf, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, self.sigmoid(self.conv(x)))


class PAConv(nn.Module):
    def __init__(self, nf: int, k_size: int = 3) -> None:
        super().__init__()
        self.k2 = nn.Conv2d(nf, nf, 1)
        self.sigmoid = nn.Sigmoid()
        self.k3 = nn.Conv2d(nf, nf, k_size, padding=k_size // 2, bias=False)
        self.k4 = nn.Conv2d(nf, nf, k_size, padding=k_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.sigmoid(self.k2(x))
        return self.k4(torch.mul(self.k3(x), gate))


class SCPA(nn.Module):
    def __init__(self, nf: int, reduction: int = 2) -> None:
        super().__init__()
        width = nf // reduction
        self.conv1_a = nn.Conv2d(nf, width, 1, bias=False)
        self.conv1_b = nn.Conv2d(nf, width, 1, bias=False)
        self.k1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.PAConv = PAConv(width)
        self.conv3 = nn.Conv2d(width * reduction, nf, 1, bias=False)
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.lrelu(self.k1(self.lrelu(self.conv1_a(x))))
        b = self.lrelu(self.PAConv(self.lrelu(self.conv1_b(x))))
        out = self.conv3(torch.cat([a, b], dim=1))
        out += x
        return out


class PAN(nn.Module):
    def __init__(self, nf: int = 40, unf: int = 24, nb: int = 16) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, nf, 3, 1, 1)
        self.SCPA_trunk = nn.Sequential(*(SCPA(nf) for _ in range(nb)))
        self.trunk_conv = nn.Conv2d(nf, nf, 3, 1, 1)
        self.upconv1 = nn.Conv2d(nf, unf, 3, 1, 1)
        self.att1 = PA(unf)
        self.HRconv1 = nn.Conv2d(unf, unf, 3, 1, 1)
        self.upconv2 = nn.Conv2d(unf, unf, 3, 1, 1)
        self.att2 = PA(unf)
        self.HRconv2 = nn.Conv2d(unf, unf, 3, 1, 1)
        self.conv_last = nn.Conv2d(unf, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_first(x)
        y = y + self.trunk_conv(self.SCPA_trunk(y))
        for up, attention, convolution in (
            (self.upconv1, self.att1, self.HRconv1),
            (self.upconv2, self.att2, self.HRconv2),
        ):
            y = up(F.interpolate(y, scale_factor=2, mode="nearest"))
            y = self.lrelu(convolution(self.lrelu(attention(y))))
        bilinear = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        return self.conv_last(y) + bilinear


# ------------------------------------------------------------------------------------ Swin blocks


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def window_partition(x: Tensor, side: int) -> Tensor:
    """(N, H, W, C) -> (windows, side, side, C)."""
    n, h, w, c = x.shape
    x = x.view(n, h // side, side, w // side, side, c)
    return x.transpose(2, 3).reshape(-1, side, side, c)


def window_reverse(windows: Tensor, side: int, h: int, w: int) -> Tensor:
    n = windows.shape[0] * side * side // (h * w)
    x = windows.view(n, h // side, w // side, side, side, -1)
    return x.transpose(2, 3).reshape(n, h, w, -1)


def position_index(side: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    place = place.flatten(1)
    apart = place[:, :, None] - place[:, None, :] + side - 1
    return apart[0] * (2 * side - 1) + apart[1]


def swin_mask(h: int, w: int, side: int, shift: int) -> Tensor:
    """0 where two tokens of a window belong together, else -100."""
    region = torch.zeros(1, h, w, 1)
    steps = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for i, rows in enumerate(steps):
        for j, columns in enumerate(steps):
            region[:, rows, columns] = 3 * i + j
    flat = window_partition(region, side).view(-1, side * side)
    return torch.where(flat[:, None] == flat[:, :, None], 0.0, -100.0)


class WindowAttention(nn.Module):
    """order: how q, k and v lie in the projection, for look-alikes; given: HAT's, whose index comes
    with the call."""

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        axis: int = -1,
        order: str = "qkv",
        given: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.order = order
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(rows, num_heads))
        self.given = given
        if not given:
            self.register_buffer("relative_position_index", position_index(window_size[0]))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=axis)

    def forward(self, x: Tensor, *extra: Any, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, self.relative_position_index, *extra)

    def attend(self, x: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, n, c = x.shape
        heads = self.num_heads
        if self.order == "qkv":
            parts = self.qkv(x).reshape(windows, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        else:  # each head has its own q, k, v
            parts = self.qkv(x).reshape(windows, n, heads, 3, c // heads).permute(3, 0, 2, 1, 4)
        q, k, v = parts.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.relative_position_bias_table[index.view(-1)].view(n, n, -1).permute(
            2, 0, 1
        )
        if mask is not None:
            number = mask.shape[0]
            attn = attn.view(windows // number, number, heads, n, n) + mask[:, None]
            attn = attn.view(-1, heads, n, n)
        attn = self.attn_drop(self.softmax(attn))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(windows, n, c)))


class SwinWindowAttention(WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.attend(x, self.relative_position_index, mask)


class HatWindowAttention(WindowAttention):
    def forward(  # type: ignore[override]
        self, x: Tensor, rpi: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return self.attend(x, rpi, mask)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x / keep * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor()


class SwinTransformerBlock(nn.Module):
    """residual, post_norm, back: for look-alikes. NAME: of the attribute for its image size."""

    NAME = "input_resolution"

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 8,
        shift_size: int = 0,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        residual: bool = True,
        post_norm: bool = False,
        back: int = 1,
        **attention: Any,
    ) -> None:
        super().__init__()
        setattr(self, self.NAME, input_resolution)
        self.window_size = window_size
        self.shift_size, self.residual, self.post_norm = shift_size, residual, post_norm
        self.back = back
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SwinWindowAttention(dim, (window_size, window_size), num_heads, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        mask = swin_mask(*input_resolution, window_size, shift_size) if shift_size else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        h, w = x_size
        n, _, c = x.shape
        side, shift = self.window_size, self.shift_size
        y = x if self.post_norm else self.norm1(x)
        y = y.view(n, h, w, c)
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = window_partition(y, side).view(-1, side * side, c)
        mask = self.attn_mask
        if shift and getattr(self, self.NAME) != x_size:
            mask = swin_mask(h, w, side, shift).to(x.device)
        y = window_reverse(self.attn(y, mask=mask).view(-1, side, side, c), side, h, w)
        if shift:
            y = torch.roll(y, (self.back * shift, self.back * shift), (1, 2))
        y = y.view(n, h * w, c)
        if self.post_norm:
            y = self.norm1(y)
        x = x + self.drop_path(y) if self.residual else self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HNCTBlock(SwinTransformerBlock):
    NAME = "resolution"


class CAB(nn.Module):
    def __init__(self, num_feat: int) -> None:
        super().__init__()
        self.cab = nn.Sequential(
            nn.Conv2d(num_feat, num_feat // 3, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(num_feat // 3, num_feat, 3, 1, 1),
            ChannelAttention(num_feat, num_feat // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class HAB(nn.Module):
    """HAT's hybrid attention block."""

    def __init__(self, dim: int, num_heads: int, window_size: int = 8, shift_size: int = 0) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.conv_scale = window_size, shift_size, 0.01
        self.norm1 = nn.LayerNorm(dim)
        self.attn = HatWindowAttention(dim, (window_size,) * 2, num_heads, given=True)
        self.conv_block = CAB(dim)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(
        self, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Tensor
    ) -> Tensor:
        h, w = x_size
        n, _, c = x.shape
        side, shift = self.window_size, self.shift_size
        y = self.norm1(x).view(n, h, w, c)
        conv = self.conv_block(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(n, h * w, c)
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = window_partition(y, side).view(-1, side * side, c)
        y = self.attn(y, rpi=rpi_sa, mask=attn_mask if shift else None)
        y = window_reverse(y.view(-1, side, side, c), side, h, w)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + self.drop_path(y.view(n, h * w, c)) + conv * self.conv_scale
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinLayer(nn.Module):
    """A chain of blocks on an image, as in SwinIR-light."""

    def __init__(
        self, dim: int, size: tuple[int, int], num_heads: int, side: int = 8, depth: int = 2
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, size, num_heads, side, side // 2 * (i % 2))
            for i in range(depth)
        )
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        y = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = block(y, size)
        return self.conv(y.transpose(1, 2).reshape(x.shape)) + x


# ----------------------------------------------------------------------------------------- DCTLSA


class LocalModule(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_module("pointwise_prenorm_0", nn.BatchNorm2d(channels))
        self.add_module("pointwise_conv_0", nn.Conv2d(channels, channels, 1, bias=False))
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.add_module("depthwise_conv", depthwise)
        self.add_module("pointwise_prenorm_1", nn.BatchNorm2d(channels))
        self.add_module("pointwise_conv_1", nn.Conv2d(channels, channels, 1, bias=False))


class LinearAttention(nn.Module):
    """axis: of the softmax of the keys; -2, the tokens, in DCTLSA."""

    def __init__(self, dim: int, window_size: tuple[int, int], num_heads: int, axis: int = -2):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=axis)
        self.local = LocalModule(dim)

    def forward(self, x: Tensor, h: int, w: int, mask: Tensor | None = None) -> Tensor:
        image = x.permute(0, 3, 1, 2).contiguous()
        local = (self.local(image) + image).permute(0, 2, 3, 1).contiguous()
        side, heads = self.window_size[0], self.num_heads
        qkv = window_partition(self.qkv(local), side)
        number, c = qkv.shape[0], qkv.shape[-1] // 3
        qkv = qkv.view(number, side * side, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        state = self.softmax(k).transpose(-2, -1) @ v
        y = ((q * self.scale) @ state).transpose(1, 2).reshape(number, side * side, c)
        y = self.proj(y).view(-1, side, side, c)
        return window_reverse(y, side, h, w) + local


class LinearBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, window_size: int = 16, shift_size: int = 0, axis: int = -2
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.attn = LinearAttention(dim, (window_size,) * 2, num_heads, axis)
        self.mlp = Mlp(dim, 2 * dim)
        del self.mlp.drop
        self.mlp.drop = nn.Identity()

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        h, w = x_size
        n, _, c = x.shape
        shift = self.shift_size
        y = x.view(n, h, w, c)
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = self.attn(y, h, w, mask=None)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        y = y.view(n, h * w, c)
        return y + self.mlp(y)


class TokensNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).transpose(1, 2))


class LinearLayer(nn.Module):
    """Two blocks, on an image padded to their windows."""

    def __init__(self, dim: int, num_heads: int, window_size: int = 16) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            LinearBlock(dim, num_heads, window_size, window_size // 2 * i) for i in range(2)
        )
        self.patch_embed = TokensNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        side = self.window_size
        if h % side or w % side:
            x = F.pad(x, (0, -w % side, 0, -h % side), "reflect")
        size = (x.shape[2], x.shape[3])
        y = self.patch_embed(x)
        for block in self.blocks:
            y = block(y, size)
        y = y.transpose(1, 2).view(x.shape)
        return y[:, :, :h, :w].contiguous() if y.shape[2:] != (h, w) else y


class SwinT(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.transformer_body = nn.Sequential(LinearLayer(dim, num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_body(x)


class LSAB(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.body = nn.Sequential(SwinT(dim, num_heads), SwinT(dim, num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class DCTLSA(nn.Module):
    def __init__(self, nf: int = 55, num_modules: int = 6, num_head: int = 5, upscale: int = 4):
        super().__init__()
        self.number = num_modules
        self.fea_conv = nn.Conv2d(3, nf, 3, padding=1)
        for i in range(num_modules):
            setattr(self, f"B{i + 1}", LSAB(nf, num_head))

        def fuse(count: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(nf * count, nf, 1), nn.LeakyReLU(0.05, inplace=True))

        self.c = fuse(num_modules)
        for i in range(1, num_modules):
            setattr(self, f"c{i}", fuse(i + 1))
        self.LR_conv = nn.Conv2d(nf, nf, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(nf, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.fea_conv(x)
        dense, outputs, y = first, [], first
        for i in range(self.number):
            y = getattr(self, f"B{i + 1}")(y)
            outputs.append(y)
            if i + 1 < self.number:
                dense = torch.cat([dense, y], dim=1)
                y = getattr(self, f"c{i + 1}")(dense)
        y = self.c(torch.cat(outputs, dim=1))
        return self.upsampler(self.LR_conv(y) + first)


# ------------------------------------------------------------------------------------ ESWT, EMT


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class MLP4D(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ShiftConv2d1x1(width, hidden)
        self.act = Swish()
        self.fc2 = ShiftConv2d1x1(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SABase4D(nn.Module):
    """sign: of the first roll; +1 in ESWT and EMT."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_list: Sequence[Sequence[int]] = ((24, 6), (6, 24)),
        shift_list: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.return_attns = dim, num_heads, False
        self.window_list = window_list
        self.shift_list = shift_list or ((0, 0),) * len(window_list)
        self.attn = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.BatchNorm2d(2 * dim))
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        outputs = []
        for part, (wh, ww), shift in zip(
            self.attn(x).chunk(len(self.window_list), 1),
            self.window_list,
            self.shift_list,
            strict=True,
        ):
            part = F.pad(part, (0, -w % ww, 0, -h % wh), "reflect")
            part = torch.roll(part, tuple(shift), (2, 3))
            full = part.shape[2:]
            heads = []
            for head in range(self.num_heads):
                q, v = (
                    to_windows(half.chunk(self.num_heads, 1)[head], wh, ww)
                    for half in part.chunk(2, 1)
                )
                attn = (q @ q.transpose(-2, -1)).softmax(-1)
                heads.append(from_windows(attn @ v, n, *full, wh, ww))
            y = torch.roll(torch.cat(heads, 1), (-shift[0], -shift[1]), (2, 3))
            outputs.append(y[:, :, :h, :w])
        return self.proj(torch.cat(outputs, 1))


class TransformerGroup(nn.Module):
    def __init__(self, dim: int, num_heads: int, depth: int = 2) -> None:
        super().__init__()
        shifts = ((12, 3), (3, 12))
        self.sa_list = nn.ModuleList(
            SABase4D(dim, num_heads, shift_list=shifts if i % 2 else None) for i in range(depth)
        )
        self.mlp_list = nn.ModuleList(MLP4D(dim, 2 * dim) for _ in range(depth))
        self.conv = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.sa_list, self.mlp_list, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.conv(x)


# ---------------------------------------------------------------------------- spatial attention


class SpatialGate(nn.Module):
    """CBAM's gate without the BatchNorm of its authors', as most networks have it."""

    def __init__(self, kernel_size: int = 7, mean_first: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()
        self.mean_first = mean_first

    def forward(self, x: Tensor) -> Tensor:
        statistics = [x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)]
        if self.mean_first:
            statistics.reverse()
        return x * self.sigmoid(self.conv(torch.cat(statistics, 1)))


class ChannelPool(nn.Module):
    """CBAM's two statistics of all channels, the maximum first."""

    def __init__(self, mean_first: bool = False) -> None:
        super().__init__()
        self.mean_first = mean_first

    def forward(self, x: Tensor) -> Tensor:
        statistics = [torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)]
        return torch.cat(statistics[::-1] if self.mean_first else statistics, dim=1)


class BasicConv(nn.Module):
    """CBAM's convolution with what may follow it."""

    def __init__(
        self, in_planes: int, out_planes: int, kernel_size: int, bn: bool = True, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_planes, out_planes, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_planes, eps=1e-5, momentum=0.01) if bn else None
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x if self.relu is None else self.relu(x)


class CBAMSpatialGate(nn.Module):
    """The gate as CBAM's authors wrote it: a BatchNorm between convolution and sigmoid.

    relu, mean_first: for look-alikes and variants.
    """

    def __init__(self, relu: bool = False, mean_first: bool = False) -> None:
        super().__init__()
        self.compress = ChannelPool(mean_first)
        self.spatial = BasicConv(2, 1, 7, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.spatial(self.compress(x)))


class ESA(nn.Module):
    """RFDN's enhanced spatial attention, or RLFN's with one convolution on the small map."""

    def __init__(self, n_feats: int, deep: bool = True, act: nn.Module | None = None) -> None:
        super().__init__()
        f = n_feats // 4
        self.conv1, self.conv_f = nn.Conv2d(n_feats, f, 1), nn.Conv2d(f, f, 1)
        self.conv2, self.conv3 = nn.Conv2d(f, f, 3, 2), nn.Conv2d(f, f, 3, padding=1)
        if deep:
            self.conv_max, self.conv3_ = (nn.Conv2d(f, f, 3, padding=1) for _ in range(2))
            self.relu = nn.ReLU(inplace=True) if act is None else act
        self.conv4 = nn.Conv2d(f, n_feats, 1)
        self.sigmoid = nn.Sigmoid()
        self.deep = deep

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        small = F.max_pool2d(self.conv2(first), 7, 3)
        if self.deep:
            small = self.conv3_(self.relu(self.conv3(self.relu(self.conv_max(small)))))
        else:
            small = self.conv3(small)
        small = F.interpolate(small, x.shape[2:], mode="bilinear")
        return x * self.sigmoid(self.conv4(small + self.conv_f(first)))


def with_tanh_gate(channels: int) -> nn.Module:
    """A CALayer with another gate."""
    layer = CALayer(channels, 3)
    layer.conv_du[3] = nn.Tanh()
    return layer
