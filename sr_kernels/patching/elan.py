"""ELAN and its relatives: shift convolutions, LFE, GMSA, ELAB, striped windows.

Forms as in the repositories xindongzhang/ELAN and xindongzhang/SimpleIR (conv0/act/conv1,
ShiftConv2d0 and ShiftConv2d1), Fried-Rice-Lab/FriedRiceLab (ShiftConv2d1x1 in a Sequential; ESWT,
EMT) and the-database/traiNNer-redux (both).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sr_kernels import _batch_norm
from sr_kernels import functional as F
from sr_kernels._checks import writes_in_place
from sr_kernels.nn import shift_weight
from sr_kernels.scores import WindowScores

from .recogniser import (
    NotRecognised,
    Recogniser,
    calls,
    child_names,
    in_format_of,
    is_conv,
    is_map,
    lies_last,
    maps,
    needs_gradient,
    only_map,
    owns_tensors,
    part_at,
    register,
    runs,
    state_names,
)
from .swap import original_class, replacement_of

# ---------------------------------------------------------------------------- shift convolutions


def _square(tensor: Tensor | None, kernel: int) -> bool:
    return tensor is not None and tensor.dim() == 4 and tensor.shape[2:] == (kernel, kernel)


class _Shift(NamedTuple):
    """Where a shift convolution has its parameters, and how it shifts.

    form: "depthwise" (one-hot weight, then conv1x1), "dense" (w * m), "mask" (a Conv2d with a
    one-hot mask) or "copy" (a 1x1 convolution behind a shift that is written in code).
    inner: names of the children on the way to it.
    """

    form: str
    inner: tuple[str, ...]
    pattern: F.Pattern
    groups: int


_PATTERNS: tuple[F.Pattern, ...] = ("plus", "cross")


def _shift_of_kernel(kernel: Tensor, groups: Sequence[int]) -> tuple[F.Pattern, int]:
    """Pattern and number of groups of a one-hot (C, 1, 3, 3) kernel."""
    values = kernel.detach().float().cpu()
    for number in groups:
        for pattern in _PATTERNS:
            if torch.equal(values, shift_weight(values.shape[0], pattern, number)):
                return pattern, number
    raise NotRecognised("its kernel is not the one-hot kernel of a known shift")


def _groups(module: Any) -> list[int]:
    """5, as everywhere; or what an attribute says."""
    number = getattr(module, "n_div", 5)
    return [number, 5] if type(number) is int and number >= 4 and number != 5 else [5]


def _shifts(module: nn.Module, inner: tuple[str, ...] = ()) -> list[_Shift]:
    """The shift convolutions that ``module`` may be; empty if it is none.

    Raises:
        NotRecognised: it looks like one.
    """
    names = state_names(module)
    part: Any = module
    if names == {"weight", "conv1x1"} and _square(part.weight, 3):
        if not is_conv(part.conv1x1, 1) or part.weight.shape != (part.conv1x1.in_channels, 1, 3, 3):
            raise NotRecognised(
                "its conv1x1 is not a plain 1x1 convolution of the shifted channels"
            )
        return [_Shift("depthwise", inner, *_shift_of_kernel(part.weight, _groups(part)))]
    if names in ({"w", "b", "m"}, {"w", "m"}) and _square(part.w, 3):
        mask = part.m
        if mask.shape not in (part.w.shape, (1, *part.w.shape[1:])):
            raise NotRecognised("its mask m has not the shape of its weight w")
        if not torch.equal(mask, mask[:1].expand_as(mask)):
            raise NotRecognised("its mask m differs between output channels")
        kernel = mask[0].unsqueeze(1)
        return [_Shift("dense", inner, *_shift_of_kernel(kernel, _groups(part)))]
    if isinstance(module, nn.Conv2d) and names - {"bias"} == {"weight", "mask"}:
        # Its own forward convolves twice; that it is a 1x1 convolution shows in its attributes.
        plain = (part.kernel_size, part.stride, part.padding, part.dilation, part.groups)
        if plain != ((1, 1), (1, 1), (0, 0), (1, 1), 1) or part.padding_mode != "zeros":
            raise NotRecognised("it is not a plain 1x1 convolution behind its mask")
        if part.mask.shape != (part.in_channels, 1, 3, 3):
            return []
        return [_Shift("mask", inner, *_shift_of_kernel(part.mask, _groups(part)))]
    if len(names) == 1 and "shift" in original_class(module).__name__.lower():
        (name,) = names
        child = module._modules.get(name)
        if child is None:
            return []
        if is_conv(child, 1):
            return [
                _Shift("copy", (*inner, name), pattern, number)
                for number in _groups(module)
                for pattern in _PATTERNS
            ]
        return _shifts(child, (*inner, name))
    return []


def _stored_weight(module: nn.Module, shift: _Shift) -> Tensor:
    """The weight as the module has it, of any form."""
    part = part_at(module, shift.inner)
    if shift.form == "depthwise":
        part = part.conv1x1
    return cast(Tensor, part.w if shift.form == "dense" else part.weight)


def _shift_weights(module: nn.Module, shift: _Shift) -> tuple[Tensor, Tensor | None]:
    """The 1x1 convolution's weight and bias."""
    part = part_at(module, shift.inner)
    weight = _stored_weight(module, shift)
    if shift.form == "dense":
        return (weight * part.m).sum((2, 3), keepdim=True), getattr(part, "b", None)
    return weight, (part.conv1x1 if shift.form == "depthwise" else part).bias


def _shift_constants(module: nn.Module, shift: _Shift) -> tuple[Tensor, ...]:
    part = part_at(module, shift.inner)
    name = {"depthwise": "weight", "dense": "m", "mask": "mask"}.get(shift.form)
    return () if name is None else (getattr(part, name),)


def _in_channels(module: nn.Module, shift: _Shift) -> int:
    part = part_at(module, shift.inner)
    if shift.form == "dense":
        return int(part.w.shape[1])
    return int((part.conv1x1 if shift.form == "depthwise" else part).in_channels)


def _learns_constants(module: nn.Module, shift: _Shift) -> bool:
    return any(tensor.requires_grad for tensor in _shift_constants(module, shift))


class ShiftConvolution(Recogniser):
    """ShiftConv2d in all its forms."""

    name = "shift_convolution"
    replacement = "shift_conv2d"
    operators = ("shift_conv2d",)

    def options(self, module: nn.Module) -> Iterable[_Shift]:
        found = _shifts(module)
        if any(_learns_constants(module, shift) for shift in found):
            raise NotRecognised("its shift is trained (the one-hot kernel requires a gradient)")
        return found

    def constants(self, module: nn.Module, options: _Shift) -> tuple[Tensor, ...]:
        return _shift_constants(module, options)

    def examples(self, module: nn.Module, options: _Shift) -> list[tuple[Any, ...]]:
        return maps(_in_channels(module, options), 5, 7)

    def forward(self, module: nn.Module, options: _Shift, *args: Any) -> Any:
        weight, bias = _shift_weights(module, options)
        x = only_map(self.operators, args, weight.shape[1], weight, bias)
        if x is None:
            return NotImplemented
        x = in_format_of(_stored_weight(module, options), x)
        return F.shift_conv2d(x, weight, bias, pattern=options.pattern, groups=options.groups)


# ------------------------------------------------------------------------------------------- LFE


class Act(NamedTuple):
    name: F.Activation
    slope: float = 0.05


def activations(module: Any) -> list[Act]:
    """What an activation module may be; one that is not torch's is tried out as each of them."""
    if calls(module, nn.ReLU):
        return [Act("relu")]
    if calls(module, nn.LeakyReLU):
        return [Act("leaky_relu", float(module.negative_slope))]
    if calls(module, nn.SiLU):
        return [Act("silu")]
    if calls(module, nn.GELU):
        return [Act("gelu")] if module.approximate == "none" else []
    if isinstance(module, nn.Module) and not state_names(module):
        if original_class(module).__module__.startswith("torch.nn"):
            return []
        return [Act("silu"), Act("relu"), Act("gelu")]
    return []


class _Lfe(NamedTuple):
    """inner: names of the children on the way to the three; names: the three."""

    inner: tuple[str, ...]
    names: tuple[str, str, str]
    first: _Shift
    second: _Shift
    act: Act


def _lfes(module: nn.Module) -> list[_Lfe]:
    """The pairs of shift convolutions with an activation between them that ``module`` may be."""
    inner: tuple[str, ...] = ()
    body = module
    names = child_names(module)
    if (
        len(names) == 1
        and not owns_tensors(module)
        and calls(part_at(module, (names[0],)), nn.Sequential)
    ):
        inner = (names[0],)
        body = part_at(module, inner)
        names = child_names(body)
    if len(names) != 3 or owns_tensors(module) or owns_tensors(body):
        return []
    parts = [body._modules[name] for name in names]
    convolutions = [_safe_shifts(part) for part in parts]
    order = [i for i, found in enumerate(convolutions) if found]
    if len(order) != 2:
        return []
    (middle,) = {0, 1, 2} - set(order)
    acts = activations(parts[middle])
    kind = type(parts[middle]).__name__
    if not acts:
        raise NotRecognised(f"{kind} between its shift convolutions is not a known activation")
    first, second = (convolutions[i] for i in order)
    three = (names[order[0]], names[middle], names[order[1]])
    found = []
    for one in first:
        for other in second:
            if (one.pattern, one.groups) != (other.pattern, other.groups):
                continue
            found += [
                _Lfe(
                    inner,
                    three,
                    one._replace(inner=(*inner, three[0], *one.inner)),
                    other._replace(inner=(*inner, three[2], *other.inner)),
                    act,
                )
                for act in acts
            ]
    if not found:
        raise NotRecognised("its two shifts differ")
    return found


def _safe_shifts(module: Any) -> list[_Shift]:
    try:
        return _shifts(module) if isinstance(module, nn.Module) else []
    except NotRecognised:
        return []


def _lfe_weights(module: nn.Module, lfe: _Lfe) -> tuple[Any, ...]:
    return (*_shift_weights(module, lfe.first), *_shift_weights(module, lfe.second))


def _lfe_run(
    x: Tensor, lfe: _Lfe, weights: Any, *, residual: bool, out: Tensor | None = None
) -> Tensor:
    return F.shift_conv_block(
        x,
        *weights,
        activation=lfe.act.name,
        negative_slope=lfe.act.slope,
        residual=residual,
        pattern=lfe.first.pattern,
        groups=lfe.first.groups,
        out=out,
    )


def _lfe_constants(module: nn.Module, lfe: _Lfe) -> tuple[Tensor, ...]:
    return _shift_constants(module, lfe.first) + _shift_constants(module, lfe.second)


class LocalFeatureExtraction(Recogniser):
    """ELAN's LFE; the MLP of ESWT and EMT: shift convolution, activation, shift convolution."""

    name = "local_feature_extraction"
    replacement = "shift_conv_block"
    operators = ("shift_conv_block",)

    def options(self, module: nn.Module) -> Iterable[_Lfe]:
        found = _lfes(module)
        for lfe in found:
            if _learns_constants(module, lfe.first) or _learns_constants(module, lfe.second):
                raise NotRecognised("its shift is trained (the one-hot kernel requires a gradient)")
        return found

    def constants(self, module: nn.Module, options: _Lfe) -> tuple[Tensor, ...]:
        return _lfe_constants(module, options)

    def examples(self, module: nn.Module, options: _Lfe) -> list[tuple[Any, ...]]:
        return maps(_in_channels(module, options.first), 5, 7)

    def forward(self, module: nn.Module, options: _Lfe, *args: Any) -> Any:
        weights = _lfe_weights(module, options)
        x = only_map(self.operators, args, weights[0].shape[1], *weights)
        if x is None:
            return NotImplemented
        x = in_format_of(_stored_weight(module, options.first), x)
        return _lfe_run(x, options, weights, residual=False)


# ------------------------------------------------------------------------------------------ GMSA


class _Gmsa(NamedTuple):
    """inner: names of the children on the way to it.  reuses: takes the scores of another."""

    inner: tuple[str, ...]
    windows: tuple[int, ...]
    shifted: bool
    reuses: bool


def _gmsa(module: nn.Module, inner: tuple[str, ...] = ()) -> _Gmsa | None:
    if state_names(module) != {"project_inp", "project_out"}:
        return None
    part: Any = module
    windows = getattr(part, "window_sizes", None)
    if not isinstance(windows, (tuple, list)) or not isinstance(getattr(part, "shifts", None), int):
        return None
    projection = part.project_inp
    if (
        not calls(projection, nn.Sequential)
        or len(projection) != 2
        or not is_conv(projection[0], 1)
        or not calls(projection[1], nn.BatchNorm2d)
        or not is_conv(part.project_out, 1)
    ):
        raise NotRecognised(
            "its projections are not a 1x1 convolution with BatchNorm, and a 1x1 convolution"
        )
    channels = part.project_out.in_channels
    produced = projection[0].out_channels
    if (
        projection[0].in_channels != channels
        or projection[1].num_features != produced
        or produced not in (channels, 2 * channels)
        or channels % len(windows)
        or part.project_out.out_channels != channels
    ):
        raise NotRecognised("the channels of its projections do not fit each other")
    if not all(type(w) is int and w > 0 for w in windows):
        raise NotRecognised(f"its windows are {windows!r}")
    return _Gmsa(inner, tuple(windows), part.shifts > 0, produced == channels)


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm behind it, in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return _batch_norm.folded(convolution, norm, norm.running_mean, norm.running_var)


def fixed_norm(norm: nn.BatchNorm2d) -> bool:
    """Whether a BatchNorm normalises with its running statistics in this call."""
    return not norm.training and norm.running_var is not None


def _project(convolution: Any, y: Tensor) -> Tensor:
    """``convolution(y)`` in the memory format that it has where windows were put together by stock
    operators, which are contiguous: code behind it may call view."""
    return cast(Tensor, convolution(y if lies_last(convolution.weight) else y.contiguous()))


def divides(x: Tensor, windows: Sequence[int]) -> bool:
    height, width = x.shape[-2:]
    return all(height % window == 0 and width % window == 0 for window in windows)


class AttentionMaps(Sequence[Tensor]):
    """What a replaced GMSA returns in place of its list of attention matrices.

    A later GMSA takes the scores; anyone else who indexes or iterates gets the matrices, computed
    when they are asked for: for window w, (N H/w W/w, w², w²).
    """

    def __init__(self, scores: WindowScores) -> None:
        self.scores = scores

    def __len__(self) -> int:
        return len(self.scores.windows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        from sr_kernels.reference.window_attention import _group_shift, _window_probabilities

        scores = self.scores
        side = scores.windows[index]
        q = scores.q.chunk(2 * len(self), 1)[2 * (range(len(self))[index])]
        step = _group_shift(side, scores.shifted)
        return _window_probabilities(q, q, (side, side), step, 1, 1.0, None, False).flatten(0, 3)


def _example_scores(x: Tensor, gmsa: _Gmsa) -> AttentionMaps:
    qv = torch.randn(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype)
    _, scores = F.grouped_window_attention(
        qv, windows=gmsa.windows, shifted=gmsa.shifted, return_scores=True
    )
    return AttentionMaps(scores)


class GroupedAttention(Recogniser):
    """ELAN's GMSA. Its second output, the attention matrices, is formed only if someone asks."""

    name = "grouped_attention"
    replacement = "grouped_window_attention"
    operators = ("grouped_window_attention", "apply_window_scores")

    def options(self, module: nn.Module) -> Iterable[_Gmsa]:
        found = _gmsa(module)
        return [] if found is None else [found]

    def examples(self, module: nn.Module, options: _Gmsa) -> list[tuple[Any, ...]]:
        side = math.lcm(*options.windows)
        x: Any = module
        channels = x.project_out.in_channels
        arguments = maps(channels, side, 2 * side)
        if options.reuses:
            return [(a, _example_scores(a, options)) for (a,) in arguments]
        return arguments

    def forward(self, module: nn.Module, options: _Gmsa, *args: Any) -> Any:
        part: Any = module
        convolution, norm = part.project_inp
        x, scores = args[0], args[1] if len(args) == 2 else None
        if len(args) > 2 or (scores is not None) != options.reuses:
            return NotImplemented
        if scores is not None and not isinstance(scores, AttentionMaps):
            return NotImplemented
        if not runs(self.operators, x, convolution.weight) or not is_map(
            x, convolution.weight.shape[1]
        ):
            return NotImplemented
        if not divides(x, options.windows):
            return NotImplemented
        if fixed_norm(norm) and not needs_gradient(module, x):
            x = nn.functional.conv2d(x, *folded(convolution, norm))
        else:
            x = part.project_inp(x)
        if scores is None:
            y, found = F.grouped_window_attention(
                x, windows=options.windows, shifted=options.shifted, return_scores=True
            )
            return _project(part.project_out, y), AttentionMaps(found)
        return _project(part.project_out, F.apply_window_scores(scores.scores, x)), scores


# ------------------------------------------------------------------------------------------ ELAB


class _Elab(NamedTuple):
    lfes: tuple[_Lfe, ...]
    gmsas: tuple[_Gmsa, ...]


_LISTS = {"modules_lfe", "modules_gmsa"}
# Of a block: LFE, its weights, GMSA, its module.
_Pairs = list[tuple[_Lfe, Any, _Gmsa, Any]]


class ElanBlock(Recogniser):
    """ELAN's ELAB: pairs of LFE and GMSA, all residual, with one set of scores."""

    name = "elan_block"
    replacement = "shift_conv_block + grouped_attention_block"
    operators = (
        "shift_conv_block",
        "grouped_attention_block",
        "apply_grouped_attention_block",
        "grouped_window_attention",
        "apply_window_scores",
    )

    def options(self, module: nn.Module) -> Iterable[_Elab]:
        part: Any = module
        if state_names(module) != _LISTS:
            return []
        lists = (part.modules_lfe, part.modules_gmsa)
        if not all(isinstance(held, (nn.ModuleDict, nn.ModuleList)) for held in lists):
            return []
        if len(lists[0]) != len(lists[1]) or len(lists[0]) == 0:
            raise NotRecognised("it has not as many feature extractions as attentions")
        lfes, gmsas = [], []
        for number, (lfe, gmsa) in enumerate(zip(*(held._modules for held in lists), strict=True)):
            one = _lfes(lists[0]._modules[lfe])
            other = _gmsa(lists[1]._modules[gmsa], ("modules_gmsa", gmsa))
            if not one or other is None:
                raise NotRecognised(f"its pair {number} is not a known LFE and a known GMSA")
            if other.reuses != (number > 0):
                raise NotRecognised(
                    f"the attention of its pair {number} shares no scores as ELAN's"
                )
            lfes.append([_moved(o, ("modules_lfe", lfe)) for o in one])
            gmsas.append(other)
        if len({(g.windows, g.shifted) for g in gmsas}) != 1:
            raise NotRecognised("the windows of its attentions differ")
        # One activation and one form of shift in all pairs: as many candidates as a single LFE has.
        return [_Elab(tuple(chosen), tuple(gmsas)) for chosen in zip(*lfes, strict=False)]

    def constants(self, module: nn.Module, options: _Elab) -> tuple[Tensor, ...]:
        return tuple(t for lfe in options.lfes for t in _lfe_constants(module, lfe))

    def examples(self, module: nn.Module, options: _Elab) -> list[tuple[Any, ...]]:
        side = math.lcm(*options.gmsas[0].windows)
        return maps(_in_channels(module, options.lfes[0].first), side, 2 * side)

    def forward(self, module: nn.Module, options: _Elab, *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        x, pairs = args[0], _pairs(module, options)
        if not _takes(x, options, pairs):
            return NotImplemented
        if not _learns(module, x, pairs):
            return _infer(x, [pairs])
        scores: WindowScores | None = None
        for lfe, lfe_weights, gmsa, attention in pairs:
            x = _lfe_run(x, lfe, lfe_weights, residual=True)
            x, scores = _attend_and_learn(x, gmsa, attention, scores)
        return x


class ElanBody(Recogniser):
    """A Sequential of ELABs, all of them replaced: for inference they run in the memory of one. In
    any other call they run one by one, as in every Sequential."""

    name = "elan_body"
    replacement = "shift_conv_block + grouped_attention_block, in the memory of one block"
    operators = ElanBlock.operators
    plain = True
    of_parts = True

    def options(self, module: nn.Module) -> Iterable[tuple[_Elab, ...]]:
        found = [replacement_of(block) for block in module.children()]
        if not calls(module, nn.Sequential) or len(found) < 2 or len(found) != len(module._modules):
            return []
        elabs = [f.options for f in found if f is not None and isinstance(f.recogniser, ElanBlock)]
        if len(elabs) == len(found):
            return [tuple(elabs)]
        if all(state_names(block) == _LISTS for block in module.children()):
            raise NotRecognised("its blocks run as one only if each of them is replaced")
        return []

    def constants(self, module: nn.Module, options: tuple[_Elab, ...]) -> tuple[Tensor, ...]:
        blocks = zip(module.children(), options, strict=True)
        return tuple(t for block, elab in blocks for t in ElanBlock().constants(block, elab))

    def declines(self, module: nn.Module, options: tuple[_Elab, ...], *args: Any) -> bool:
        # Asked before all blocks are compared with what they were, as each of them does again.
        return len(args) != 1 or needs_gradient(module, *args)

    def forward(self, module: nn.Module, options: tuple[_Elab, ...], *args: Any) -> Any:
        if len(args) != 1:
            return NotImplemented
        blocks = []
        for block, elab in zip(module.children(), options, strict=True):
            pairs = _pairs(block, elab)
            if not _takes(args[0], elab, pairs) or _learns(block, args[0], pairs):
                return NotImplemented
            blocks.append(pairs)
        return _infer(args[0], blocks)


def _moved(lfe: _Lfe, by: tuple[str, ...]) -> _Lfe:
    return lfe._replace(
        inner=by + lfe.inner,
        first=lfe.first._replace(inner=by + lfe.first.inner),
        second=lfe.second._replace(inner=by + lfe.second.inner),
    )


def _pairs(module: nn.Module, options: _Elab) -> _Pairs:
    return [
        (lfe, _lfe_weights(module, lfe), gmsa, part_at(module, gmsa.inner))
        for lfe, gmsa in zip(options.lfes, options.gmsas, strict=True)
    ]


def _takes(x: Any, options: _Elab, pairs: _Pairs) -> bool:
    """Whether the operators can run a block on x."""
    weights = [w for _, ws, _, _ in pairs for w in ws]
    return (
        runs(ElanBlock.operators, x, *weights)
        and is_map(x, weights[0].shape[1])
        and divides(x, options.gmsas[0].windows)
    )


def _learns(module: nn.Module, x: Tensor, pairs: _Pairs) -> bool:
    """Whether a block is to be run layer by layer: for gradients, or for a norm in training."""
    return needs_gradient(module, x) or not all(
        fixed_norm(attention.project_inp[1]) for *_, attention in pairs
    )


def _infer(x: Tensor, blocks: Sequence[_Pairs]) -> Tensor:
    """Blocks one behind the other without gradients: two operators for each pair, BatchNorm folded
    into the projection.

    Between the first and the last operator maps are channels_last, which the attention is faster
    in; those two read the memory format of x and write that of the module itself, which its last
    convolution decides, so that nothing is converted. There are three maps for all blocks: what an
    LFE writes, what an attention writes, and the queries that an ELAB shares. The result lies where
    the attentions wrote, which the last of them no longer reads.
    """
    inside = attended = queries = last = None
    *_, (*_, attention) = blocks[-1]
    form = (
        torch.channels_last if lies_last(attention.project_out.weight) else torch.contiguous_format
    )
    if writes_in_place(x):
        inside = torch.empty_like(x, memory_format=torch.channels_last)
        last = attended = torch.empty_like(x, memory_format=form)
        if last.is_contiguous():
            n, c, h, w = x.shape
            attended = last.view(n, h, w, c).permute(0, 3, 1, 2)
        if any(len(pairs) > 1 for pairs in blocks):
            queries = x.new_empty(x.shape)
    for position, pairs in enumerate(blocks, 1):
        scores: WindowScores | None = None
        for number, (lfe, lfe_weights, gmsa, attention) in enumerate(pairs, 1):
            x = _lfe_run(x, lfe, lfe_weights, residual=True, out=inside)
            out = last if (position, number) == (len(blocks), len(pairs)) else attended
            weights = (
                *folded(*attention.project_inp),
                attention.project_out.weight,
                attention.project_out.bias,
            )
            settings: Any = {"windows": gmsa.windows, "shifted": gmsa.shifted}
            if scores is not None:
                x = F.apply_grouped_attention_block(scores, x, *weights, out=out)
            elif len(pairs) > 1:
                kept = None if out is None or queries is None else (out, queries)
                x, scores = F.grouped_attention_block(
                    x, *weights, **settings, return_scores=True, out=kept
                )
            else:
                x = F.grouped_attention_block(x, *weights, **settings, out=out)
    return x.contiguous(memory_format=form)


def _attend_and_learn(
    x: Tensor, gmsa: _Gmsa, attention: Any, scores: WindowScores | None
) -> tuple[Tensor, WindowScores]:
    """The same with gradients and with BatchNorm as a layer of its own."""
    projected = attention.project_inp(x)
    if scores is None:
        y, scores = F.grouped_window_attention(
            projected, windows=gmsa.windows, shifted=gmsa.shifted, return_scores=True
        )
    else:
        y = F.apply_window_scores(scores, projected)
    return _project(attention.project_out, y) + x, scores


# ------------------------------------------------------------------------------- striped windows


class _Striped(NamedTuple):
    windows: tuple[tuple[int, int], ...]
    shifts: tuple[tuple[int, int], ...]
    heads: int


class StripedAttention(Recogniser):
    """SABase4D of ESWT and EMT (SWSA in traiNNer-redux): channel groups with rectangular windows of
    their own, rolled the other way round than Swin's; keys are queries, no scale, no bias."""

    name = "striped_attention"
    replacement = "window_attention"
    operators = ("window_attention",)

    def options(self, module: nn.Module) -> Iterable[_Striped]:
        part: Any = module
        if state_names(module) != {"attn", "proj"}:
            return []
        windows, shifts = getattr(part, "window_list", None), getattr(part, "shift_list", None)
        heads = getattr(part, "num_heads", None)
        if windows is None or shifts is None or type(heads) is not int:
            return []
        pairs = [tuple(tuple(one) for one in held) for held in (windows, shifts)]
        if (
            not pairs[0]
            or len(pairs[0]) != len(pairs[1])
            or not all(
                len(one) == 2 and all(type(v) is int for v in one) for held in pairs for one in held
            )
        ):
            raise NotRecognised(f"its windows and shifts are {windows!r} and {shifts!r}")
        if getattr(part, "return_attns", False):
            raise NotRecognised("it returns its attention matrices")
        attn, proj = part.attn, part.proj
        if (
            not calls(attn, nn.Sequential)
            or not calls(proj, nn.Sequential)
            or len(attn) not in (1, 2)
            or len(proj) != 1
            or not is_conv(attn[0], 1)
            or not is_conv(proj[0], 1)
            or (len(attn) == 2 and not calls(attn[1], nn.BatchNorm2d))
        ):
            raise NotRecognised("its projections are not 1x1 convolutions (and a BatchNorm)")
        channels = proj[0].in_channels
        if attn[0].out_channels != 2 * channels or channels % (len(pairs[0]) * heads):
            raise NotRecognised("the channels of its projections do not fit its groups and heads")
        return [_Striped(pairs[0], pairs[1], heads)]

    def examples(self, module: nn.Module, options: _Striped) -> list[tuple[Any, ...]]:
        part: Any = module
        channels = part.attn[0].in_channels
        height, width = (math.lcm(*(w[i] for w in options.windows)) for i in (0, 1))
        ragged = max(height // 2 + 1, 1), max(2 * width - 1, 1)
        return [*maps(channels, height, width), *maps(channels, *ragged)[:1]]

    def forward(self, module: nn.Module, options: _Striped, *args: Any) -> Any:
        part: Any = module
        projection = part.attn[0]
        x = only_map(self.operators, args, projection.weight.shape[1], projection.weight)
        if x is None:
            return NotImplemented
        height, width = x.shape[2:]
        if len(part.attn) == 2 and fixed_norm(part.attn[1]) and not needs_gradient(module, x):
            qv = nn.functional.conv2d(x, *folded(projection, part.attn[1]))
        else:
            qv = part.attn(x)
        outputs = []
        for group, (wh, ww), (down, right) in zip(
            qv.chunk(len(options.windows), 1), options.windows, options.shifts, strict=True
        ):
            pad = (0, -width % ww, 0, -height % wh)
            if pad != (0, 0, 0, 0) or torch.jit.is_tracing():  # a trace is for other sizes too
                group = nn.functional.pad(group, pad, "reflect")
            q, v = group.chunk(2, 1)
            y = F.window_attention(
                q,
                q,
                v,
                window=(wh, ww),
                shift=(-down, -right),
                num_heads=options.heads,
                scale=1.0,
            )
            outputs.append(y[:, :, :height, :width])
        return _project(part.proj[0], torch.cat(outputs, 1))


for _recogniser in (
    ShiftConvolution(),
    LocalFeatureExtraction(),
    GroupedAttention(),
    ElanBlock(),
    ElanBody(),
    StripedAttention(),
):
    register(_recogniser)
