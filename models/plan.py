"""A network made ready for inference: :func:`plan` folds what can be folded once, and calls the
fused operators.

One class for each network that it knows, chosen in :data:`_PLANS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sr_kernels.functional as F
from sr_kernels._batch_norm import folded
from sr_kernels._checks import writes_in_place
from sr_kernels.nn import GMSA, LFE, PixelAttention, ShiftConv2d, set_backend

from .elan import ELAB, ELAN, mirror_pad
from .mafdn import MAFDB, MAFDN, NEGATIVE_SLOPE

__all__ = ["Plan", "plan"]


def plan(model: nn.Module) -> Plan:
    """A copy of ``model`` for inference: the same output but for rounding, in less time.

    The copy has weights of its own that need no gradient; it does not follow the model when that
    is trained on. Like a network it is called with (N, colors, H, W), has ``scale``, ``rgb_range``,
    ``backend``, ``tile_multiple``, ``tile_overlap`` and ``receptive_radius``, and may be moved with
    ``.to``. ``describe()`` says what was fused.

    Args:
        model: an :class:`~sr_kernels.models.ELAN` or :class:`~sr_kernels.models.MAFDN` in eval
            mode.

    Raises:
        TypeError: another network.
        ValueError: ``model`` is in training mode, or has a BatchNorm without running statistics.
    """
    for known, make in _PLANS.items():
        if type(model) is known:
            if model.training:
                raise ValueError("model is in training mode; call its eval() first")
            with torch.no_grad():
                return make(model)
    names = ", ".join(known.__name__ for known in _PLANS)
    raise TypeError(f"model is a {type(model).__name__}; plan() knows {names}")


class Plan(nn.Module):
    """What every plan has: the network's attributes, weights without gradients, no training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.name = type(model).__name__
        self.scale: int = model.scale
        self.rgb_range: float = model.rgb_range
        self.tile_multiple: int = model.tile_multiple
        self.tile_overlap: int = model.tile_overlap
        self.receptive_radius: int = model.receptive_radius
        self.backend = model.backend

    @property
    def backend(self) -> str | None:
        """The backend of every operator."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._backend = name
        set_backend(self, name)

    def describe(self) -> str:
        """What was fused, one line a part."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Plan:
        if mode:
            raise RuntimeError("a plan cannot be trained; train the model and plan it again")
        return super().train(False)

    def extra_repr(self) -> str:
        return self.describe()


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    """A copy of its own that needs no gradient; 4-dimensional ones as channels_last."""
    if tensor is None:
        return None
    own = tensor.detach().clone()
    if own.dim() == 4:
        own = own.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(own, requires_grad=False)


def _layer3x3(layer: nn.Module, x: Tensor, backend: str | None, **options: Any) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    options["negative_slope"] = NEGATIVE_SLOPE
    return F.conv3x3(x, layer.weight, layer.bias, backend=backend, **options)


# ------------------------------------------------------------------------------------------ ELAN


def _fold_batch_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that both are in eval mode; formed in float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("model has a BatchNorm without running statistics; it cannot be folded")
    statistics = norm.running_mean.double(), norm.running_var.double()
    weight, bias = folded(convolution, norm, *statistics)
    dtype = convolution.weight.dtype
    return weight.to(dtype), bias.to(dtype)


def _fold_into_shuffled(
    convolution: nn.Conv2d, colour: nn.Module, scale: int
) -> tuple[Tensor, Tensor | None]:
    """The convolution before a pixel shuffle with the 1x1 convolution behind it; in float64."""
    weight, bias = convolution.weight.double(), convolution.bias
    if not isinstance(colour, nn.Conv2d):
        return convolution.weight, bias
    mix = colour.weight.double()[:, :, 0, 0]
    planes = weight.unflatten(0, (mix.shape[1], scale * scale))
    weight = torch.einsum("oc,cpiyx->opiyx", mix, planes).flatten(0, 1)
    offset = torch.zeros_like(weight[:, 0, 0, 0])
    if bias is not None:
        offset = (mix @ bias.double().unflatten(0, (mix.shape[1], -1))).flatten()
    if colour.bias is not None:
        offset = offset + colour.bias.double().repeat_interleave(scale * scale)
    dtype = convolution.weight.dtype
    return weight.to(dtype), offset.to(dtype)


class _Pair(nn.Module):
    """A pair of feature extraction and attention."""

    def __init__(self, lfe: LFE, gmsa: GMSA) -> None:
        super().__init__()
        first, second = lfe.conv0["shift_conv"], lfe.conv1["shift_conv"]
        assert isinstance(first, ShiftConv2d)
        assert isinstance(second, ShiftConv2d)
        if (first.pattern, first.groups) != (second.pattern, second.groups):
            raise ValueError("model has a feature extraction whose two shifts differ")
        self.w0, self.b0 = _constant(first.conv1x1.weight), _constant(first.conv1x1.bias)
        self.w1, self.b1 = _constant(second.conv1x1.weight), _constant(second.conv1x1.bias)
        self.lfe: dict[str, Any] = {
            "activation": lfe.act_type,
            "residual": lfe.residual,
            "pattern": first.pattern,
            "groups": first.groups,
        }
        convolution, norm = gmsa.project_inp
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        weight, bias = _fold_batch_norm(convolution, norm)
        self.w_in, self.b_in = _constant(weight), _constant(bias)
        self.w_out = _constant(gmsa.project_out.weight)
        self.b_out = _constant(gmsa.project_out.bias)
        self.calc_attn = gmsa.calc_attn
        self.attention: dict[str, Any] = {
            "windows": gmsa.window_sizes,
            "shifted": gmsa.shifts > 0,
        }

    def extract(self, x: Tensor, backend: str | None, *, out: Tensor | None) -> Tensor:
        """The feature extraction."""
        weights: tuple[Any, ...] = (self.w0, self.b0, self.w1, self.b1)
        return F.shift_conv_block(x, *weights, **self.lfe, out=out, backend=backend)

    def attend(
        self,
        x: Tensor,
        scores: F.WindowScores | None,
        shared: bool,
        backend: str | None,
        *,
        out: Tensor | None,
        out_q: Tensor | None,
    ) -> tuple[Tensor, F.WindowScores | None]:
        """The attention; ``shared``: whether a later pair reuses this one's scores."""
        weights: tuple[Any, ...] = (self.w_in, self.b_in, self.w_out, self.b_out)
        options = {**self.attention, "backend": backend}
        if not self.calc_attn:
            assert scores is not None
            y = F.apply_grouped_attention_block(scores, x, *weights, out=out, backend=backend)
            return y, scores
        if shared:
            pair = None if out is None or out_q is None else (out, out_q)
            return F.grouped_attention_block(x, *weights, **options, return_scores=True, out=pair)
        return F.grouped_attention_block(x, *weights, **options, out=out), None


class ELANPlan(Plan):
    """ELAN on channels_last feature maps, of which at most three are alive at once.

    Those are the input and the output of an operator, and the queries that an ELAB shares; on a CPU
    the three are allocated once, and every operator writes where the one before it has read. The
    head's output, which is needed again behind the last ELAB, is computed again there: that costs
    a five-hundredth of the time and saves a fourth map.
    """

    def __init__(self, model: ELAN) -> None:
        super().__init__(model)
        head, tail = model.head[0], model.tail[0]
        assert isinstance(head, nn.Conv2d)
        assert isinstance(tail, nn.Conv2d)
        # Not into the head: its zero padding stands for the mean colour, not for black.
        self.sub_mean = copy.deepcopy(model.sub_mean).requires_grad_(False)
        self.head_weight, self.head_bias = _constant(head.weight), _constant(head.bias)
        weight, bias = _fold_into_shuffled(tail, model.add_mean, model.scale)
        self.tail_weight, self.tail_bias = _constant(weight), _constant(bias)
        blocks = []
        for block in model.body:
            assert isinstance(block, ELAB)
            pairs = zip(block.modules_lfe.values(), block.modules_gmsa.values(), strict=True)
            blocks.append(nn.ModuleList(_Pair(lfe, gmsa) for lfe, gmsa in pairs))  # type: ignore[arg-type]
        self.body = nn.ModuleList(blocks)
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, colors, H, W) -> (N, colors, sH, sW)."""
        height, width = x.shape[-2:]
        image = self.sub_mean(mirror_pad(x, self.tile_multiple))
        image = image.contiguous(memory_format=torch.channels_last)
        x = self._body(self._head(image))
        x += self._head(image)
        assert self.tail_weight is not None
        x = F.conv3x3(x, self.tail_weight, self.tail_bias, backend=self.backend)
        x = nn.functional.pixel_shuffle(x, self.scale)
        return x[:, :, : height * self.scale, : width * self.scale].contiguous()

    def _body(self, x: Tensor) -> Tensor:
        """The ELABs, in the memory of x where that saves something."""
        spare = queries = None
        if writes_in_place(x):
            spare, queries = torch.empty_like(x), x.new_empty(x.shape)
        for block in self.body:
            assert isinstance(block, nn.ModuleList)
            scores: F.WindowScores | None = None
            for pair in block:
                assert isinstance(pair, _Pair)
                shared = len(block) > 1
                if spare is None:  # each step lets go of its input before the next one begins
                    x = pair.extract(x, self.backend, out=None)
                    x, scores = pair.attend(x, scores, shared, self.backend, out=None, out_q=None)
                else:
                    pair.extract(x, self.backend, out=spare)
                    x, scores = pair.attend(
                        spare, scores, shared, self.backend, out=x, out_q=queries
                    )
            scores = None
        return x

    def _head(self, image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, self.head_weight, self.head_bias, padding=1)  # type: ignore[arg-type]

    def describe(self) -> str:
        pairs = len([module for module in self.modules() if isinstance(module, _Pair)])
        return (
            f"{self.name} x{self.scale}, for inference, feature maps channels_last\n"
            f"{pairs} feature extractions: shift_conv_block\n"
            f"{pairs} attentions: both projections, BatchNorm and the residual in "
            "grouped_attention_block\n"
            "mean colour: added in the tail's convolution"
        )


# ----------------------------------------------------------------------------------------- MAFDN


class _PlannedMAFDB(MAFDB):
    """A block without gradients: what only follows a convolution is done in it."""

    def _refined(self, r: Tensor, k: int) -> Tensor:
        return _layer3x3(self.refine[k - 1], r, self._backend, skip=r, activation="leaky_relu")

    def _distilled(self, r: Tensor, k: int) -> Tensor:
        convolution = self.distill[k]
        assert isinstance(convolution, nn.Conv2d)
        return F.shift_conv2d(
            r,
            convolution.weight,
            convolution.bias,
            activation="leaky_relu",
            negative_slope=NEGATIVE_SLOPE,
            pattern="none",
            backend=self._backend,
        )

    @property
    def _backend(self) -> str | None:
        gate = self.pixel[0]
        assert isinstance(gate, PixelAttention)
        return gate.backend


class MAFDNPlan(Plan):
    """MAFDN with its over-parameterised convolutions folded, feature maps channels_last, and what
    follows its convolutions fused with them.

    The 1x1 convolution of all blocks' outputs is summed up block by block: they are never alive
    together.
    """

    def __init__(self, model: MAFDN) -> None:
        super().__init__(model)
        self.folds = not model.folded
        self.network = copy.deepcopy(model).fold().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for block in self.network.blocks:
            block.__class__ = _PlannedMAFDB
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, colors, H, W) -> (N, colors, sH, sW)."""
        network = self.network
        x = x.contiguous(memory_format=torch.channels_last)
        h = f = _layer3x3(network.head, x, self.backend)
        weights = network.fuse.weight.split(f.shape[1], 1)
        fused, bias = None, network.fuse.bias
        for block, weight in zip(network.blocks, weights, strict=True):
            f = block(f)
            fused = F.shift_conv2d(
                f, weight, bias, residual=fused, pattern="none", backend=self.backend
            )
            bias = None
        assert fused is not None
        fused = nn.functional.leaky_relu_(fused, NEGATIVE_SLOPE)
        y = _layer3x3(network.smooth, fused, self.backend, skip=h)
        y = _layer3x3(network.tail, y, self.backend)
        return nn.functional.pixel_shuffle(y, self.scale).contiguous()

    def describe(self) -> str:
        convolutions = "folded" if self.folds else "were folded before"
        return (
            f"{self.name} x{self.scale}, for inference, feature maps channels_last\n"
            "3x3 convolutions: with skip and activation, in conv3x3\n"
            "1x1 convolutions of the branches: with their activation, in shift_conv2d\n"
            "1x1 convolution of all blocks: summed up block by block, in shift_conv2d\n"
            f"over-parameterised convolutions: {convolutions}"
        )


_PLANS: dict[type[nn.Module], Callable[[Any], Plan]] = {ELAN: ELANPlan, MAFDN: MAFDNPlan}
