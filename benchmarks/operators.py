"""The operators under test: inputs, stock definition, library alternatives and cost of each.

An alternative is what a user of stock PyTorch would write instead, with the library's best kernel
for the hot part; rolls, partitions and casts that it needs are part of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

import sr_kernels
from sr_kernels import backends, reference
from sr_kernels.nn import shift_weight
from sr_kernels.ops._registration import memory_format_of
from sr_kernels.reference.window_attention import (
    _from_windows,
    _to_windows,
    relative_position_index,
    shift_mask,
)
from sr_kernels.testing import make_tensor

from .cases import Case
from .work import Work

__all__ = ["OPERATORS", "Problem", "Unavailable"]

WINDOWS = (4, 8, 16)
SWIN_WINDOW, SWIN_HEADS = 8, 6

Inputs = Mapping[str, Tensor]
Function = Callable[..., Any]
Builder = Callable[[Inputs], Function]
"""Prepares what a user would prepare once (masks, kernels), and returns what is called each time
with the inputs as keyword arguments."""


class Unavailable(Exception):
    """A provider that cannot run a case here; the message says why."""


def plain(function: Function, **options: Any) -> Builder:
    """A function that needs no preparation."""
    return lambda inputs: partial(function, **options)


def public(function: Function, **options: Any) -> Callable[[Inputs, str], Function]:
    """A function of :mod:`sr_kernels`, with its backend."""
    return lambda inputs, backend: partial(function, backend=backend, **options)


@dataclass
class Problem:
    """One operator at one shape.

    inputs: contiguous tensors by argument name; those in `maps` take the memory format under test.
    wrt: inputs that get a gradient.
    stock: the definition in plain PyTorch.  ours: this package's, for the backend of that name.
    alternatives: by provider name.  slow: of these, what compiles several kernels, which
    takes a CPU long.  work: by mode.
    """

    inputs: dict[str, Tensor]
    stock: Builder
    ours: Callable[[Inputs, str], Function]
    work: dict[str, Work]
    maps: tuple[str, ...] = ("x",)
    alternatives: dict[str, Builder] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    wrt: tuple[str, ...] | None = None

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple(self.inputs) if self.wrt is None else self.wrt


class _Maker:
    """Random inputs of a case, and the cost of moving them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self._seed = 0

    def map(self, channels: int, scale: float = 1.0) -> Tensor:
        case = self.case
        return self._tensor((case.batch, channels, case.height, case.width), scale)

    def conv(self, c_out: int, c_in: int) -> Tensor:
        return self._tensor((c_out, c_in, 1, 1), c_in**-0.5)

    def vector(self, count: int, scale: float = 0.1) -> Tensor:
        return self._tensor((count,), scale)

    def tensor(self, shape: tuple[int, ...], scale: float) -> Tensor:
        return self._tensor(shape, scale)

    def _tensor(self, shape: tuple[int, ...], scale: float) -> Tensor:
        self._seed += 1
        return make_tensor(shape, self.dtype, seed=self._seed, scale=scale, device=self.case.device)


def _work(
    case: Case,
    inputs: Inputs,
    output_channels: float,
    flops: float,
    exponentials: float = 0.0,
    *,
    gradients: tuple[str, ...] | None = None,
    backward_flops: float | None = None,
    backward_exponentials: float | None = None,
) -> dict[str, Work]:
    """Forward: inputs and output once. Backward: inputs, the output's gradient and the inputs'
    gradients once; products of the weights' and of the inputs' gradient, twice the forward's
    unless said otherwise; activations and softmax are recomputed once."""
    size = getattr(torch, case.dtype).itemsize
    read = float(sum(t.numel() for t in inputs.values()))
    output = output_channels * case.pixels
    names = tuple(inputs) if gradients is None else gradients
    written = float(sum(inputs[name].numel() for name in names))
    forward = Work(size * (read + output), flops, exponentials)
    backward = Work(
        size * (read + output + written),
        2 * flops if backward_flops is None else backward_flops,
        exponentials if backward_exponentials is None else backward_exponentials,
    )
    return {"forward": forward, "backward": backward, "both": forward + backward}


# ------------------------------------------------------------------------------ shift convolutions


def _depthwise(channels: int, dtype: torch.dtype, device: str) -> Function:
    """The shift as ELAN's public code has it: a depthwise convolution with a one-hot kernel."""
    kernel = shift_weight(channels).to(device, dtype)
    return lambda x: tf.conv2d(x, kernel, padding=1, groups=channels)


def _dense(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Shift and 1x1 convolution as the one 3x3 convolution that they are: weight -> its kernel.

    Without a gradient the kernel is made here, once, as a user would.
    """
    shift = shift_weight(weight.shape[1]).to(weight).permute(1, 0, 2, 3)
    if weight.requires_grad:
        return lambda weight: weight * shift
    kernel = weight * shift
    return lambda weight: kernel


def _shift_conv2d(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    c_out = 2 * c
    inputs = {"x": make.map(c), "weight": make.conv(c_out, c), "bias": make.vector(c_out)}

    def depthwise(inputs: Inputs) -> Function:
        move = _depthwise(c, make.dtype, case.device)
        return lambda x, weight, bias: tf.relu(tf.conv2d(move(x), weight, bias))

    def conv2d(inputs: Inputs) -> Function:
        dense = _dense(inputs["weight"])

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return tf.relu(tf.conv2d(x, dense(weight), bias, padding=1))

        return run

    options: dict[str, Any] = {"activation": "relu"}
    return Problem(
        inputs,
        plain(reference.shift_conv2d, **options),
        public(sr_kernels.shift_conv2d, **options),
        _work(case, inputs, c_out, 2.0 * c * c_out * case.pixels),
        alternatives={"conv2d_depthwise": depthwise, "conv2d": conv2d},
    )


def _shift_conv_block(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    hidden = 2 * c
    inputs = {
        "x": make.map(c),
        "w0": make.conv(hidden, c),
        "b0": make.vector(hidden),
        "w1": make.conv(c, hidden),
        "b1": make.vector(c),
    }

    def depthwise(inputs: Inputs) -> Function:
        first = _depthwise(c, make.dtype, case.device)
        second = _depthwise(hidden, make.dtype, case.device)

        def run(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
            inner = tf.relu(tf.conv2d(first(x), w0, b0))
            return tf.conv2d(second(inner), w1, b1) + x

        return run

    def conv2d(inputs: Inputs) -> Function:
        first, second = _dense(inputs["w0"]), _dense(inputs["w1"])

        def run(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
            inner = tf.relu(tf.conv2d(x, first(w0), b0, padding=1))
            return tf.conv2d(inner, second(w1), b1, padding=1) + x

        return run

    return Problem(
        inputs,
        plain(reference.shift_conv_block),
        public(sr_kernels.shift_conv_block),
        _work(case, inputs, c, 4.0 * c * hidden * case.pixels),
        alternatives={"conv2d_depthwise": depthwise, "conv2d": conv2d},
    )


# ------------------------------------------------------------------------------ window attention


def _flex_attention() -> Function:
    """Compiled: otherwise it writes out the scores, and warns that it is not meant for that."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Unavailable(f"this torch has no FlexAttention: {error}") from error
    compiled: Function = torch.compile(flex_attention, dynamic=False)
    return compiled


def _attention_work(
    case: Case,
    inputs: Inputs,
    windows: tuple[tuple[int, int], ...],
    *,
    backward_products: int = 5,
) -> dict[str, Work]:
    """windows: (tokens, channels) of each group or head, q and v alike.

    A product of T tokens with d channels costs 2 T d operations per pixel: q k^T and P v forward;
    q k^T, dO v^T, dS k, dS^T q and P^T dO backward, where with keys that are the queries two are
    one, (dS + dS^T) q. That q q^T is symmetric and could be halved is not taken off.
    """
    products = 2.0 * case.pixels * sum(tokens * d for tokens, d in windows)
    exponentials = float(case.pixels * sum(tokens for tokens, _ in windows))
    channels = sum(d for _, d in windows)
    return _work(
        case,
        inputs,
        channels,
        2 * products,
        exponentials,
        backward_flops=backward_products * products,
    )


def _reuse_work(case: Case, inputs: Inputs, name: str) -> dict[str, Work]:
    """With the probabilities at hand only P v is left, backward P^T dO, for the map of that name.
    They come from somewhere: counted is the least, reading q, though not what it takes to make them
    from it."""
    q = Work(getattr(torch, case.dtype).itemsize * float(inputs[name].numel()), 0)
    flops = 2.0 * case.pixels * sum(tokens * d for tokens, d in _groups(case.channels))
    work = _work(case, inputs, case.channels, flops, gradients=(name,), backward_flops=flops)
    return {mode: cost + q for mode, cost in work.items()}


def _groups(channels: int) -> tuple[tuple[int, int], ...]:
    return tuple((w * w, channels // len(WINDOWS)) for w in WINDOWS)


def _query_scale(channels: int) -> float:
    """Of queries with which logits q.q are around 4: neither uniform nor one-hot."""
    return 2 * (channels / len(WINDOWS)) ** -0.5


def _partitioned(attention: Function) -> Function:
    """Grouped attention of qv by a library's kernel on windows that were cut out."""

    def run(qv: Tensor) -> Tensor:
        outputs = []
        for window, group in zip(WINDOWS, qv.chunk(len(WINDOWS), 1), strict=True):
            size, shift = (window, window), (window // 2, window // 2)
            q, v = (_to_windows(half, size, shift, 1) for half in group.chunk(2, 1))
            shape = q.shape
            q, v = q.flatten(0, 2), v.flatten(0, 2)
            y = attention(q, q, v, scale=1.0)
            outputs.append(_from_windows(y.reshape(shape), size, shift))
        return torch.cat(outputs, 1)

    return run


def _grouped_window_attention(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    inputs = {"qv": make.map(2 * c, scale=_query_scale(c))}

    def flex(inputs: Inputs) -> Function:
        compiled = _flex_attention()

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            q = q.contiguous()
            result: Tensor = compiled(q, q, v.contiguous(), scale=scale)
            return result

        return _partitioned(attention)

    options: dict[str, Any] = {"windows": WINDOWS, "shifted": True}
    return Problem(
        inputs,
        plain(reference.grouped_window_attention, **options),
        public(sr_kernels.grouped_window_attention, **options),
        _attention_work(case, inputs, _groups(c), backward_products=4),
        maps=("qv",),
        alternatives={
            "sdpa": lambda inputs: _partitioned(tf.scaled_dot_product_attention),
            "flex": flex,
        },
        slow=("flex",),
    )


def _kept(qv: Tensor) -> Function:
    """ELAN's public code: the attention matrices are kept, and multiplied with another v."""
    probabilities = []
    for window, group in zip(WINDOWS, qv.chunk(len(WINDOWS), 1), strict=True):
        q = _to_windows(group.chunk(2, 1)[0], (window, window), (window // 2,) * 2, 1)
        probabilities.append((q @ q.transpose(-2, -1)).softmax(-1))

    def run(v: Tensor) -> Tensor:
        outputs = []
        groups = zip(WINDOWS, probabilities, v.chunk(len(WINDOWS), 1), strict=True)
        for window, matrix, group in groups:
            size, shift = (window, window), (window // 2, window // 2)
            outputs.append(_from_windows(matrix @ _to_windows(group, size, shift, 1), size, shift))
        return torch.cat(outputs, 1)

    return run


def _grouped_window_reuse(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    qv = make.map(2 * c, scale=_query_scale(c))
    inputs = {"v": make.map(c)}

    def ours(inputs: Inputs, backend: str) -> Function:
        like = inputs["v"].detach()
        _, scores = sr_kernels.grouped_window_attention(
            qv.to(like).contiguous(memory_format=memory_format_of(like)),
            windows=WINDOWS,
            shifted=True,
            return_scores=True,
            backend=backend,
        )
        return lambda v: sr_kernels.apply_window_scores(scores, v, backend=backend)

    return Problem(
        inputs,
        lambda inputs: _kept(qv.to(inputs["v"])),
        ours,
        _reuse_work(case, inputs, "v"),
        maps=("v",),
        wrt=("v",),
    )


def _window_attention(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    window, shift, heads = (SWIN_WINDOW,) * 2, (SWIN_WINDOW // 2,) * 2, SWIN_HEADS
    tokens, head_dim = SWIN_WINDOW**2, c // SWIN_HEADS
    scale = head_dim**-0.5
    table = make.tensor(((2 * SWIN_WINDOW - 1) ** 2, heads), 0.5)
    inputs = {"q": make.map(c), "k": make.map(c), "v": make.map(c), "bias": table}
    n_windows = case.pixels // tokens

    def masks(device: torch.device) -> Tensor:
        """(windows, 1, tokens, tokens), True for a seen key; windows of the whole batch."""
        seen = shift_mask((case.height, case.width), window, shift, device)
        return seen.flatten(0, 1)[:, None].repeat(case.batch, 1, 1, 1)

    def sdpa(inputs: Inputs) -> Function:
        device = inputs["q"].device
        index = relative_position_index(window, device)
        mask = torch.zeros(n_windows, 1, tokens, tokens, device=device, dtype=make.dtype)
        mask.masked_fill_(~masks(device), -math.inf)

        def add(bias: Tensor) -> Tensor:
            return bias[index].permute(2, 0, 1)[None] + mask

        # Without a gradient, a user adds mask and bias once.
        prepared = None if inputs["bias"].requires_grad else add(inputs["bias"])

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            parts = [_to_windows(t, window, shift, heads) for t in (q, k, v)]
            shape = parts[0].shape
            added = add(bias) if prepared is None else prepared
            queries, keys, values = (part.flatten(0, 2) for part in parts)
            y = tf.scaled_dot_product_attention(queries, keys, values, attn_mask=added, scale=scale)
            return _from_windows(y.reshape(shape), window, shift)

        return run

    def flex(inputs: Inputs) -> Function:
        device = inputs["q"].device
        index = relative_position_index(window, device)
        seen = masks(device)[:, 0]
        compiled = _flex_attention()

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            def score_mod(
                score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor
            ) -> Tensor:
                value = score + bias[index[query, key], h]
                return torch.where(seen[b, query, key], value, -math.inf)

            parts = [_to_windows(t, window, shift, heads) for t in (q, k, v)]
            shape = parts[0].shape
            queries, keys, values = (part.flatten(0, 2).contiguous() for part in parts)
            y = compiled(queries, keys, values, score_mod=score_mod, scale=scale)
            return _from_windows(y.reshape(shape), window, shift)

        return run

    options: dict[str, Any] = {
        "window": SWIN_WINDOW,
        "shift": SWIN_WINDOW // 2,
        "num_heads": heads,
        "mask": True,
    }
    return Problem(
        inputs,
        plain(reference.window_attention, **options),
        public(sr_kernels.window_attention, **options),
        _attention_work(case, inputs, ((tokens, head_dim),) * heads),
        maps=("q", "k", "v"),
        alternatives={"sdpa": sdpa, "flex": flex},
    )


# ------------------------------------------------------------------------------ attention blocks


def _with_projections(work: dict[str, Work], case: Case, rows: int) -> dict[str, Work]:
    """And the 1x1 convolutions to `rows` channels and from C to C, without a gradient."""
    flops = 2.0 * case.channels * (rows + case.channels) * case.pixels
    return {"forward": work["forward"] + Work(0, flops)}


def _grouped_attention_block(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    inputs = {
        "x": make.map(c),
        "w_in": _projection(make, c),
        "b_in": make.vector(2 * c),
        "w_out": make.conv(c, c),
        "b_out": make.vector(c),
    }

    def sdpa(inputs: Inputs) -> Function:
        attention = _partitioned(tf.scaled_dot_product_attention)

        def run(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
            return tf.conv2d(attention(tf.conv2d(x, w_in, b_in)), w_out, b_out) + x

        return run

    options: dict[str, Any] = {"windows": WINDOWS, "shifted": True}
    return Problem(
        inputs,
        plain(reference.grouped_attention_block, **options),
        public(sr_kernels.grouped_attention_block, **options),
        _with_projections(_attention_work(case, inputs, _groups(c)), case, 2 * c),
        alternatives={"sdpa": sdpa},
    )


def _projection(make: _Maker, c: int) -> Tensor:
    """Of a map of unit scale to qv."""
    return make.tensor((2 * c, c, 1, 1), _query_scale(c) * c**-0.5)


def _apply_grouped_attention_block(case: Case) -> Problem:
    """With the scores of an earlier block, which are there already."""
    make, c = _Maker(case), case.channels
    earlier = (make.map(c), _projection(make, c), make.vector(2 * c))
    inputs = {
        "x": make.map(c),
        "w_v": make.conv(c, c),
        "b_v": make.vector(c),
        "w_out": make.conv(c, c),
        "b_out": make.vector(c),
    }

    def stock(inputs: Inputs) -> Function:
        x, w_in, b_in = (tensor.to(inputs["x"]) for tensor in earlier)
        kept = _kept(tf.conv2d(x, w_in, b_in))

        def run(x: Tensor, w_v: Tensor, b_v: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
            return tf.conv2d(kept(tf.conv2d(x, w_v, b_v)), w_out, b_out) + x

        return run

    def ours(inputs: Inputs, backend: str) -> Function:
        x, w_in, b_in = (tensor.to(inputs["x"]) for tensor in earlier)
        _, scores = sr_kernels.grouped_attention_block(
            x.contiguous(memory_format=memory_format_of(inputs["x"])),
            w_in,
            b_in,
            inputs["w_out"],
            inputs["b_out"],
            windows=WINDOWS,
            shifted=True,
            return_scores=True,
            backend=backend,
        )
        return partial(sr_kernels.apply_grouped_attention_block, scores, backend=backend)

    return Problem(
        inputs,
        stock,
        ours,
        _with_projections(_reuse_work(case, inputs, "x"), case, c),
    )


# ------------------------------------------------------------------------------ 3x3 convolution


def _conv3x3(case: Case) -> Problem:
    """As MAFDN refines: with a skip and leaky ReLU. The work is the formula's; a kernel that takes
    fewer multiplications may beat its floor."""
    make, c = _Maker(case), case.channels
    inputs = {
        "x": make.map(c),
        "weight": make.tensor((c, c, 3, 3), (9 * c) ** -0.5),
        "bias": make.vector(c),
        "skip": make.map(c),
    }
    options: dict[str, Any] = {"activation": "leaky_relu"}
    return Problem(
        inputs,
        plain(reference.conv3x3, **options),
        public(sr_kernels.conv3x3, **options),
        _work(case, inputs, c, 18.0 * c * c * case.pixels),
        maps=("x", "skip"),
    )


# ------------------------------------------------------------------------------ gates


def _pixel_attention(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    inputs = {"x": make.map(c), "weight": make.conv(c, c), "bias": make.vector(c)}
    return Problem(
        inputs,
        plain(reference.pixel_attention),
        public(sr_kernels.pixel_attention),
        _work(case, inputs, c, 2.0 * c * c * case.pixels, c * case.pixels),
    )


def _spatial_attention(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    inputs = {"x": make.map(c), "weight": make.tensor((1, 2, 7, 7), 0.1), "bias": make.vector(1)}
    return Problem(
        inputs,
        plain(reference.spatial_attention),
        public(sr_kernels.spatial_attention),
        _work(case, inputs, c, (2.0 * 98 + 3 * c) * case.pixels, case.pixels),
    )


def _pixel_spatial_attention(case: Case) -> Problem:
    make, c = _Maker(case), case.channels
    inputs = {
        "x": make.map(c),
        "pixel_weight": make.conv(c, c),
        "pixel_bias": make.vector(c),
        "spatial_weight": make.tensor((1, 2, 7, 7), 0.1),
        "spatial_bias": make.vector(1),
    }
    flops = (2.0 * c * c + 2 * 98 + 4 * c) * case.pixels
    return Problem(
        inputs,
        plain(reference.pixel_spatial_attention),
        public(sr_kernels.pixel_spatial_attention),
        _work(case, inputs, c, flops, (c + 1) * case.pixels),
    )


def _gate_inputs(make: _Maker, c: int) -> dict[str, Tensor]:
    hidden = max(1, c // 16)
    return {
        "x": make.map(c),
        "w_down": make.conv(hidden, c),
        "b_down": make.vector(hidden),
        "w_up": make.conv(c, hidden),
        "b_up": make.vector(c),
    }


def _channel_gate(case: Case) -> Problem:
    """With IMDN's statistic, mean plus standard deviation; its result is a number per channel."""
    make, c = _Maker(case), case.channels
    inputs = _gate_inputs(make, c)
    options: dict[str, Any] = {"statistic": "contrast"}
    return Problem(
        inputs,
        plain(reference.channel_gate, **options),
        public(sr_kernels.channel_gate, **options),
        _work(case, inputs, 0, 4.0 * c * case.pixels),
    )


def _channel_attention(case: Case) -> Problem:
    """With RCAN's statistic, the mean."""
    make, c = _Maker(case), case.channels
    inputs = _gate_inputs(make, c)
    return Problem(
        inputs,
        plain(reference.channel_attention),
        public(sr_kernels.channel_attention),
        _work(case, inputs, c, 2.0 * c * case.pixels),
    )


def _gated_conv1x1(case: Case) -> Problem:
    """As IMDN and MAFDN fuse their branches: 2 C channels in, C out, with a residual."""
    make, c = _Maker(case), case.channels
    c_in = 2 * c
    gate = make.tensor((case.batch, c_in, 1, 1), 1.0).sigmoid()
    inputs = {
        "x": make.map(c_in),
        "gate": gate,
        "weight": make.conv(c, c_in),
        "bias": make.vector(c),
        "residual": make.map(c),
    }
    return Problem(
        inputs,
        plain(reference.gated_conv1x1),
        public(sr_kernels.gated_conv1x1),
        _work(case, inputs, c, 2.0 * c_in * c * case.pixels),
        maps=("x", "residual"),
    )


# ------------------------------------------------------------------------------ training


def _channel_moments(case: Case) -> Problem:
    """The mean and, beside it, the covariance of the channels, of which the symmetry is not taken
    off; in the dtype of x."""
    make, c = _Maker(case), case.channels
    inputs = {"x": make.map(c)}

    def stock(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1)
        mean = rows.mean(1, keepdim=True)
        centred = (rows - mean) * rows.shape[1] ** -0.5
        return torch.cat([mean, centred @ centred.T], 1)

    def ours(inputs: Inputs, backend: str) -> Function:
        operator = backends.operators(backend).channel_moments

        def run(x: Tensor) -> Tensor:
            mean, covariance = operator(x)
            return torch.cat([mean[:, None], covariance], 1).to(x.dtype)

        return run

    products = 2.0 * c * c * case.pixels
    work = _work(
        case,
        inputs,
        c * (c + 1) / case.pixels,
        products + c * case.pixels,
        backward_flops=products,
    )
    return Problem(inputs, plain(stock), ours, work)


OPERATORS: dict[str, Callable[[Case], Problem]] = {
    "shift_conv2d": _shift_conv2d,
    "shift_conv_block": _shift_conv_block,
    "grouped_window_attention": _grouped_window_attention,
    "grouped_window_reuse": _grouped_window_reuse,
    "window_attention": _window_attention,
    "grouped_attention_block": _grouped_attention_block,
    "apply_grouped_attention_block": _apply_grouped_attention_block,
    "conv3x3": _conv3x3,
    "pixel_attention": _pixel_attention,
    "spatial_attention": _spatial_attention,
    "pixel_spatial_attention": _pixel_spatial_attention,
    "channel_gate": _channel_gate,
    "channel_attention": _channel_attention,
    "gated_conv1x1": _gated_conv1x1,
    "channel_moments": _channel_moments,
}
