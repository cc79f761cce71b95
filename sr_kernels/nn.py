"""A module for each operator of :mod:`sr_kernels.functional`.

Parameter names are those of the public code that each module replaces, so that a state dict of
the original loads unchanged. Every module has a ``backend`` attribute (None: the process's
choice, see :mod:`sr_kernels.backends`), which may be changed at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import functional as F
from sr_kernels import reference
from sr_kernels._batch_norm import folded
from sr_kernels.backends import choose, current_backend
from sr_kernels.ops.options import ACTIVATIONS, PATTERNS
from sr_kernels.reference.shift_conv import SHIFT_OFFSETS
from sr_kernels.reference.window_attention import relative_position_index
from sr_kernels.scores import WindowScores

__all__ = [
    "GMSA",
    "LFE",
    "ChannelAttention",
    "GatedConv1x1",
    "PixelAttention",
    "PixelSpatialAttention",
    "ShiftConv2d",
    "SpatialAttention",
    "WindowAttention",
    "set_backend",
]


def set_backend(module: nn.Module, backend: str | None) -> None:
    """Set ``backend`` on every layer of this file inside ``module``, itself included."""
    for layer in module.modules():
        if isinstance(layer, _Layer):
            layer.backend = backend


class _Layer(nn.Module):
    """What the layers here share: the ``backend`` attribute."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend


def shift_weight(channels: int, pattern: str = "plus", groups: int = 5) -> Tensor:
    """The shift as a depthwise convolution's one-hot kernel (channels, 1, 3, 3), float32."""
    # Shifting a kernel-sized impulse moves it to where the kernel of the opposite move has its
    # one; flipping both axes turns that into the correlation kernel.
    impulse = torch.zeros(1, channels, 3, 3)
    impulse[:, :, 1, 1] = 1
    shifted = reference.shift(impulse, pattern=pattern, groups=groups)
    return shifted.flip(2, 3).permute(1, 0, 2, 3).contiguous()


class ShiftConv2d(_Layer):
    """Shift by channel group, then a 1x1 convolution: ``act(W shift(x) + b)``.

    Replaces ELAN's ``ShiftConv2d1``: keys ``weight`` (C_in, 1, 3, 3), the frozen one-hot kernel
    that says how channels move, and ``conv1x1.weight``, ``conv1x1.bias``. The kernels here never
    multiply by ``weight``; it is kept so that state dicts fit, and read when one is loaded: it
    sets ``pattern``, and anything but a known pattern is refused.

    Args:
        inp_channels, out_channels: numbers of channels.
        bias: whether the 1x1 convolution has one.
        activation, pattern, groups, negative_slope: see ``functional.shift_conv2d``.
    """

    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: F.Activation = None,
        pattern: F.Pattern = "plus",
        groups: int = 5,
        negative_slope: float = 0.05,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        self.activation: F.Activation = activation
        self.pattern: F.Pattern = pattern
        self.groups = groups
        self.negative_slope = negative_slope
        self.weight = nn.Parameter(shift_weight(inp_channels, pattern, groups), requires_grad=False)
        self.conv1x1 = nn.Conv2d(inp_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.shift_conv2d(
            x,
            self.conv1x1.weight,
            self.conv1x1.bias,
            activation=self.activation,
            residual=residual,
            pattern=self.pattern,
            groups=self.groups,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None and loaded.shape == self.weight.shape:
            for pattern in ("plus", "cross"):
                known = shift_weight(self.weight.shape[0], pattern, self.groups)
                if torch.equal(loaded.detach().float().cpu(), known):
                    self.pattern = pattern
                    break
            else:
                error_msgs.append(
                    f"{prefix}weight is not the one-hot kernel of a known shift pattern "
                    f"({', '.join(SHIFT_OFFSETS)}, {self.groups} groups)"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pattern={self.pattern!r}, groups={self.groups}"


class LFE(_Layer):
    """ELAN's local feature extraction: shift convolution, activation, shift convolution.

    Keys ``conv{0,1}.shift_conv.{weight,conv1x1.weight,conv1x1.bias}``, as in the public code.

    Args:
        inp_channels, out_channels: numbers of channels.
        exp_ratio: hidden channels per output channel.
        act_type: activation between the two.
        residual: add the input to the output (the public code adds it outside).
    """

    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        exp_ratio: int = 4,
        act_type: F.Activation = "relu",
        *,
        residual: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        hidden = out_channels * exp_ratio
        self.act_type: F.Activation = act_type
        self.residual = residual
        self.conv0 = nn.ModuleDict({"shift_conv": ShiftConv2d(inp_channels, hidden)})
        self.conv1 = nn.ModuleDict({"shift_conv": ShiftConv2d(hidden, out_channels)})

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv0["shift_conv"], self.conv1["shift_conv"]
        assert isinstance(first, ShiftConv2d)
        assert isinstance(second, ShiftConv2d)
        if first.pattern != second.pattern:
            raise RuntimeError(
                f"conv0 shifts by {first.pattern!r} and conv1 by {second.pattern!r}; "
                "both must have the same pattern"
            )
        return F.shift_conv_block(
            x,
            first.conv1x1.weight,
            first.conv1x1.bias,
            second.conv1x1.weight,
            second.conv1x1.bias,
            activation=self.act_type,
            residual=self.residual,
            pattern=first.pattern,
            groups=first.groups,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"act_type={self.act_type!r}, residual={self.residual}"


class _NormalisedConvolution(torch.autograd.Function):
    """A 1x1 convolution and the BatchNorm behind it, in training, on the CPU.

    The batch statistics follow from the mean and the covariance of x: with w a row of W,
    ``mean(w x + b) = w mean(x) + b`` and ``var(w x + b) = w cov(x) w^T``. So, with
    ``f = gamma / sqrt(var + eps)``, BatchNorm of the convolution is ``f w (x - mean(x)) + beta``,
    another convolution. b is without effect on it.

    The last output is x, for a residual: what flows back from there is added where dx is computed.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        """y, and in float64 the statistics of the convolution's channels and of x."""
        mean_x, covariance = torch.ops.sr_kernels.channel_moments(x)
        w = weight.flatten(1).double()
        spread = w @ covariance
        variance = (spread * w).sum(1)
        mean = w @ mean_x
        factor = gamma * torch.rsqrt(variance + eps)
        folded = (w * factor[:, None]).to(x.dtype)[:, :, None, None]
        constant = (beta - mean * factor).to(x.dtype)
        y = F.shift_conv2d(x, folded, constant, pattern="none", backend="cpu")
        return y, mean, variance, mean_x, spread, folded, x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, gamma, beta, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:-1])
        ctx.save_for_backward(x, weight, bias, gamma, beta, *output[1:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *_, other = gradients
        if grad is None:
            return other, None, None, None, None, None
        x, weight, bias, gamma, beta, mean, variance, mean_x, spread, folded = ctx.saved_tensors
        ops = torch.ops.sr_kernels
        none = (ACTIVATIONS[None], 0.0, PATTERNS["none"], 5)
        need_x = ctx.needs_input_grad[0]
        dx, of_folded, of_constant = ops.shift_conv2d_backward(
            grad, x, folded, None, *none, need_x, True, True
        )
        of_folded, of_constant = of_folded.flatten(1).double(), of_constant.double()
        w = weight.flatten(1).double()
        inverse = torch.rsqrt(variance + ctx.eps)
        factor = gamma * inverse
        of_factor = (of_folded * w).sum(1) - of_constant * mean
        of_variance = -0.5 * of_factor * gamma * inverse**3
        of_mean = -of_constant * factor
        if need_x:
            of_covariance = w.T @ (of_variance[:, None] * w)
            dx = ops.channel_moments_joint_backward(
                of_mean @ w, of_covariance, x, mean_x, dx, other
            )
        of_weight = (
            factor[:, None] * of_folded
            + of_mean[:, None] * mean_x
            + 2 * of_variance[:, None] * spread
        )
        return (
            dx if need_x else None,
            of_weight.to(weight.dtype).view_as(weight),
            None if bias is None else torch.zeros_like(bias),
            (of_factor * inverse).to(gamma.dtype),
            of_constant.to(beta.dtype),
            None,
        )


def _update_running_statistics(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, pixels: int
) -> None:
    """As BatchNorm does in training; mean and variance are the batch's."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = norm.momentum
        if share is None:  # the plain mean over all batches
            share = 1 / norm.num_batches_tracked.item()
        unbiased = variance * (pixels / (pixels - 1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


class GMSA(_Layer):
    """ELAN's group-wise multi-scale self-attention with its projections.

    ``project_out(softmax(q q^T) v)`` per group and window, with
    ``q0 v0 q1 v1 ... = project_inp(x)``; a module with ``calc_attn=False`` has v alone and
    reuses the scores of an earlier one. Keys ``project_inp.0.*`` (1x1 convolution),
    ``project_inp.1.*`` (BatchNorm), ``project_out.*``.

    Args:
        channels: C, a multiple of len(window_sizes).
        shifts: whether windows are shifted by half their side (any number above 0).
        window_sizes: side of each group's windows, pixels.
        calc_attn: compute scores (True) or reuse given ones.
        residual: add the input to the output (the public code adds it outside).
    """

    def __init__(
        self,
        channels: int,
        shifts: int = 0,
        window_sizes: Sequence[int] = (4, 8, 16),
        calc_attn: bool = True,
        *,
        residual: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        if channels % len(window_sizes):
            raise ValueError(
                f"channels is {channels}; expected a multiple of the {len(window_sizes)} windows"
            )
        self.channels = channels
        self.shifts = shifts
        self.window_sizes = tuple(window_sizes)
        self.calc_attn = calc_attn
        self.residual = residual
        projected = 2 * channels if calc_attn else channels
        self.project_inp = nn.Sequential(
            nn.Conv2d(channels, projected, 1), nn.BatchNorm2d(projected)
        )
        self.project_out = nn.Conv2d(channels, channels, 1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``project_inp(x)``, and x; BatchNorm goes into the convolution's weights where it can.

        In eval mode with its running statistics; in training mode, on the CPU backend, with the
        batch's (`_NormalisedConvolution`). Never on the reference backend, which is the stock
        layers as they stand.
        """
        convolution, norm = self.project_inp
        if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            return self.project_inp(x), x  # SyncBatchNorm, an adapter
        if self.training:
            if not self._has_own_statistics(norm, x):
                return self.project_inp(x), x
            y, mean, variance, *_, x = _NormalisedConvolution.apply(
                x, convolution.weight, convolution.bias, norm.weight, norm.bias, norm.eps
            )
            if convolution.bias is not None:
                mean = mean + convolution.bias.detach()
            _update_running_statistics(norm, mean, variance, x.numel() // x.shape[1])
            return y, x
        stock = (self.backend or current_backend()) == "reference"
        if stock or norm.running_mean is None or norm.running_var is None:
            return self.project_inp(x), x
        weight, bias = folded(convolution, norm, norm.running_mean, norm.running_var)
        return nn.functional.conv2d(x, weight, bias), x

    def _has_own_statistics(self, norm: nn.BatchNorm2d, x: Tensor) -> bool:
        """Whether `_NormalisedConvolution` serves: BatchNorm in training mode, on the CPU."""
        return (
            norm.training
            and norm.affine
            and x.dtype in (torch.float32, torch.float64)
            and x.numel() > x.shape[1]  # stock's error message for a single pixel
            and not torch.is_autocast_enabled(x.device.type)
            and choose("shift_conv2d", (x,), self.backend) == "cpu"
        )

    def forward(self, x: Tensor, scores: WindowScores | None = None) -> tuple[Tensor, WindowScores]:
        """(N, C, H, W) and, with ``calc_attn=False``, scores -> (N, C, H, W) and the scores."""
        projected, x = self._project(x)
        if self.calc_attn:
            y, scores = F.grouped_window_attention(
                projected,
                windows=self.window_sizes,
                shifted=self.shifts > 0,
                return_scores=True,
                backend=self.backend,
            )
        elif scores is None:
            raise ValueError("scores is None; a GMSA with calc_attn=False needs an earlier one's")
        else:
            y = F.apply_window_scores(scores, projected, backend=self.backend)
        out = self.project_out
        if type(out) is not nn.Conv2d:  # an adapter
            y = out(y)
            return (y + x if self.residual else y), scores
        y = F.shift_conv2d(
            y,
            out.weight,
            out.bias,
            residual=x if self.residual else None,
            pattern="none",
            backend=self.backend,
        )
        return y, scores

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, shifts={self.shifts}, window_sizes={self.window_sizes}, "
            f"calc_attn={self.calc_attn}, residual={self.residual}"
        )


class PixelAttention(_Layer):
    """PAN's ``PA``: ``x * sigmoid(conv1x1(x))``. Keys ``conv.weight``, ``conv.bias``."""

    def __init__(self, nf: int, *, bias: bool = True, backend: str | None = None) -> None:
        super().__init__(backend)
        self.conv = nn.Conv2d(nf, nf, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_attention(x, self.conv.weight, self.conv.bias, backend=self.backend)


class SpatialAttention(_Layer):
    """CBAM's spatial gate: ``x * sigmoid(conv_kxk([max_c x, mean_c x]))``. Key ``conv.weight``.

    Without the BatchNorm that some versions of CBAM put behind the convolution.
    """

    def __init__(
        self, kernel_size: int = 7, *, bias: bool = False, backend: str | None = None
    ) -> None:
        super().__init__(backend)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; expected an odd number >= 1")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.spatial_attention(x, self.conv.weight, self.conv.bias, backend=self.backend)


class PixelSpatialAttention(_Layer):
    """``spatial(pixel(x))`` in one operator. Keys ``pixel.conv.*`` and ``spatial.conv.*``."""

    def __init__(self, nf: int, kernel_size: int = 7, *, backend: str | None = None) -> None:
        super().__init__(backend)
        self.pixel = PixelAttention(nf)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        pixel, spatial = self.pixel.conv, self.spatial.conv
        return F.pixel_spatial_attention(
            x, pixel.weight, pixel.bias, spatial.weight, spatial.bias, backend=self.backend
        )


class ChannelAttention(_Layer):
    """RCAN's ``CALayer`` ("mean") and IMDN's ``CCALayer`` ("contrast"): ``x * gate(x)``.

    ``gate = sigmoid(W_up relu(W_down z + b) + b')`` with z the spatial mean, or the mean plus the
    population standard deviation. Keys ``conv_du.0.*`` and ``conv_du.2.*``.

    Args:
        channel: C.
        reduction: hidden width is C // reduction, at least 1.
        statistic: "mean" or "contrast".
        bias: whether the two convolutions have one.
    """

    def __init__(
        self,
        channel: int,
        reduction: int = 16,
        *,
        statistic: F.Statistic = "mean",
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        self.statistic: F.Statistic = statistic
        hidden = max(channel // reduction, 1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channel, hidden, 1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(hidden, channel, 1, bias=bias),
            nn.Sigmoid(),
        )

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        down, up = self.conv_du[0], self.conv_du[2]
        assert isinstance(down, nn.Conv2d)
        assert isinstance(up, nn.Conv2d)
        return down.weight, down.bias, up.weight, up.bias

    def gate(self, x: Tensor) -> Tensor:
        """The gate alone, (N, C, 1, 1), for a layer that applies it itself."""
        return F.channel_gate(x, *self._weights(), statistic=self.statistic, backend=self.backend)

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_attention(
            x, *self._weights(), statistic=self.statistic, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"statistic={self.statistic!r}"


class GatedConv1x1(_Layer):
    """A 1x1 convolution that takes a channel gate on its input: ``W (gate * x) + b (+ residual)``.

    Keys ``weight`` (C_out, C_in, 1, 1) and ``bias``, as an ``nn.Conv2d`` has them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        initial = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.weight = initial.weight
        self.bias = initial.bias

    def forward(self, x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.gated_conv1x1(
            x, gate, self.weight, self.bias, residual=residual, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class WindowAttention(_Layer):
    """Swin's attention inside windows, without its projections: q, k, v -> out.

    ``softmax(scale q k^T + bias) v`` per window and head, see ``functional.window_attention``.
    Key ``relative_position_bias_table`` ((2 wh - 1)(2 ww - 1), num_heads); Swin's buffer
    ``relative_position_index`` may be in a state dict and is checked, not stored.

    Args:
        window_size: side of a window in pixels, or (height, width).
        num_heads: heads in the channels of q, k and v.
        shift_size: cyclic shift in pixels, or (height, width); either sign.
        scale: factor of the logits; None means (channels per head) ** -0.5.
        position_bias: whether there is a bias table.
        mask: keep tokens apart that only the shift brought together.
    """

    def __init__(
        self,
        window_size: int | tuple[int, int],
        num_heads: int = 1,
        *,
        shift_size: int | tuple[int, int] = 0,
        scale: float | None = None,
        position_bias: bool = True,
        mask: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(backend)
        height, width = (window_size,) * 2 if isinstance(window_size, int) else window_size
        self.window_size = (height, width)
        self.num_heads = num_heads
        self.shift_size = shift_size
        self.scale = scale
        self.mask = mask
        self.relative_position_bias_table: nn.Parameter | None
        if position_bias:
            table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads)
            nn.init.trunc_normal_(table, std=0.02)
            self.relative_position_bias_table = nn.Parameter(table)
        else:
            self.register_parameter("relative_position_bias_table", None)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.window_attention(
            q,
            k,
            v,
            window=self.window_size,
            shift=self.shift_size,
            num_heads=self.num_heads,
            scale=self.scale,
            bias=self.relative_position_bias_table,
            mask=self.mask,
            backend=self.backend,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        index = state_dict.pop(prefix + "relative_position_index", None)
        if index is not None and not torch.equal(
            index.cpu().long(), relative_position_index(self.window_size)
        ):
            error_msgs.append(
                f"{prefix}relative_position_index is not that of window {self.window_size}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heads={self.num_heads}, "
            f"shift_size={self.shift_size}, scale={self.scale}, mask={self.mask}"
        )
