"""One case for each operator, with which any backend on any device is tested alike.

CASES["conv"].on("cuda", "cuda").check(2, 5, 7, torch.float16, "channels_last")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from attention_block_cases import block_with_reuse
from window_attention_cases import attention_with_reuse, grouped_with_reuse

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import Comparison, check_operator, make_tensor

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Maker:
    """Tensors of one test: maps of its size and layout, weights that keep the size of what they
    are multiplied with."""

    n: int
    h: int
    w: int
    dtype: torch.dtype
    layout: str
    device: str

    def tensor(self, shape: tuple[int, ...], seed: int = 0, **options: Any) -> torch.Tensor:
        return make_tensor(shape, self.dtype, seed=seed, device=self.device, **options)

    def map(self, channels: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        shape = (self.n, channels, self.h, self.w)
        return self.tensor(shape, seed, scale=scale, layout=self.layout)

    def weight(self, c_out: int, c_in: int, seed: int, k: int = 1) -> torch.Tensor:
        return self.tensor((c_out, c_in, k, k), seed, scale=(c_in * k * k) ** -0.5)

    def vector(self, count: int, seed: int) -> torch.Tensor:
        return self.tensor((count,), seed)


def plain(name: str, module: ModuleType) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, name)
    return function


def attention_block(module: ModuleType) -> Callable[..., Any]:
    """grouped_attention_block and one that reuses its scores: the second's result."""
    both = block_with_reuse(module)
    return lambda **inputs: both(**inputs)[1]


def conv_inputs(make: Maker, c: int) -> Inputs:
    return {
        "x": make.map(c),
        "weight": make.weight(c + 5, c, 1),
        "bias": make.vector(c + 5, 2),
        "residual": make.map(c + 5, 3),
    }


def block_inputs(make: Maker, c: int) -> Inputs:
    first = {"x": make.map(c), "w0": make.weight(c + 9, c, 1), "b0": make.vector(c + 9, 2)}
    return {**first, "w1": make.weight(c, c + 9, 3), "b1": make.vector(c, 4)}


def attention_inputs(make: Maker, c: int) -> Inputs:
    channels = {"q": c, "k": c, "v": c + 4, "values": c + 4}
    maps = {name: make.map(count, seed) for seed, (name, count) in enumerate(channels.items())}
    return {**maps, "bias": make.tensor((27, 2), 5)}


def grouped_inputs(make: Maker, c: int) -> Inputs:
    return {"qv": make.map(2 * c, scale=0.5), "values": make.map(c, 1)}


def attention_block_inputs(make: Maker, c: int) -> Inputs:
    first = {"x": make.map(c), "w_in": make.weight(2 * c, c, 1), "b_in": make.vector(2 * c, 2)}
    second = {"w_out": make.weight(c, c, 3), "b_out": make.vector(c, 4)}
    return {**first, **second, "w_v": make.weight(c, c, 5), "b_v": make.vector(c, 6)}


def conv3x3_inputs(make: Maker, c: int) -> Inputs:
    weights = {"weight": make.weight(c + 5, c, 1, 3), "bias": make.vector(c + 5, 2)}
    return {"x": make.map(c), **weights, "skip": make.map(c + 5, 3)}


def pixel_inputs(make: Maker, c: int) -> Inputs:
    return {"x": make.map(c), "weight": make.weight(c, c, 1), "bias": make.vector(c, 2)}


def spatial_inputs(make: Maker, c: int) -> Inputs:
    return {"x": make.map(c), "weight": make.weight(1, 2, 1, 3), "bias": make.vector(1, 2)}


def chain_inputs(make: Maker, c: int) -> Inputs:
    pixel = {"pixel_weight": make.weight(c, c, 1), "pixel_bias": make.vector(c, 2)}
    spatial = {"spatial_weight": make.weight(1, 2, 3, 3), "spatial_bias": make.vector(1, 4)}
    return {"x": make.map(c), **pixel, **spatial}


def channel_inputs(make: Maker, c: int) -> Inputs:
    down = {"w_down": make.weight(6, c, 1), "b_down": make.vector(6, 2)}
    return {"x": make.map(c), **down, "w_up": make.weight(c, 6, 3), "b_up": make.vector(c, 4)}


def gated_inputs(make: Maker, c: int) -> Inputs:
    gate = make.tensor((make.n, c, 1, 1), 5).sigmoid()
    return {**conv_inputs(make, c), "gate": gate}


@dataclass(frozen=True)
class Case:
    """An operator: how to call it, and inputs for an image of any size, dtype and layout.

    size: a small image that it takes, (N, H, W).  channels: what its inputs have where a test does
    not say.  windows: the image must be a multiple of its windows.  inference: no gradient.
    """

    function: Callable[[ModuleType], Callable[..., Any]]
    make_inputs: Callable[[Maker, int], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int, int] = (2, 5, 7)
    channels: int = 13
    windows: bool = False
    inference: bool = False
    device: str = "cpu"
    backend: str = "cpu"

    def on(self, device: str, backend: str) -> Case:
        return replace(self, device=device, backend=backend)

    def inputs(
        self,
        n: int,
        h: int,
        w: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        channels: int | None = None,
    ) -> Inputs:
        make = Maker(n, h, w, dtype, layout, self.device)
        return self.make_inputs(make, self.channels if channels is None else channels)

    def run(self, inputs: Any, **options: Any) -> torch.Tensor:
        options = {**self.options, "backend": self.backend, **options}
        result: torch.Tensor = self.function(sr_kernels)(**inputs, **options)
        return result

    def gradient_of(self, out: torch.Tensor) -> torch.Tensor:
        """The gradient of the output that `check` takes."""
        grad = make_tensor(out.shape, torch.bfloat16, seed=1, device=self.device)
        return grad.to(out.dtype)

    def results(self, inputs: Any, grad: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The output and, where there are any, the gradients of all inputs. grad: of the output;
        None: `gradient_of` it."""
        leaves = {k: t.detach().requires_grad_(not self.inference) for k, t in inputs.items()}
        out = self.run(leaves)
        if self.inference:
            return [out]
        grad = self.gradient_of(out) if grad is None else grad
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]

    def check(
        self,
        n: int,
        h: int,
        w: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        channels: int | None = None,
        **more: Any,
    ) -> list[Comparison]:
        return self.check_inputs(self.inputs(n, h, w, dtype, layout, channels), **more)

    def check_inputs(self, inputs: Any, **more: Any) -> list[Comparison]:
        options = {**self.options, **more.pop("options", {})}
        # A few units in the last place of the few numbers of a small gradient, where stock's own
        # error is a matter of luck.
        dtype = next(iter(inputs.values())).dtype
        eps = torch.finfo(dtype).eps
        more.setdefault("atol", 4 * eps if dtype == torch.float32 else 0.0)
        more.setdefault("gradient_atol", 80 * eps if dtype == torch.float32 else eps / 2)
        if self.inference:
            more["gradients"] = None
        return check_operator(
            self.backend,
            self.function(sr_kernels),
            self.function(reference),
            inputs,
            kwargs=options,
            backend=self.backend,
            **more,
        )


def _case(name: str, make_inputs: Callable[[Maker, int], Inputs], **options: Any) -> Case:
    return Case(partial(plain, name), make_inputs, options)


CASES = {
    "conv": _case("shift_conv2d", conv_inputs, activation="gelu"),
    "block": _case("shift_conv_block", block_inputs),
    "attention": Case(
        attention_with_reuse,
        attention_inputs,
        {"window": (2, 5), "shift": (1, -2), "num_heads": 2, "mask": True},
        size=(1, 4, 10),
        channels=10,
        windows=True,
    ),
    "grouped": Case(
        grouped_with_reuse,
        grouped_inputs,
        {"windows": (2, 4), "shifted": True},
        size=(1, 4, 8),
        channels=6,
        windows=True,
    ),
    "attention_block": Case(
        attention_block,
        attention_block_inputs,
        {"windows": (2, 4), "shifted": True},
        size=(1, 4, 8),
        channels=6,
        windows=True,
        inference=True,
    ),
    "conv3x3": replace(_case("conv3x3", conv3x3_inputs, activation="silu"), inference=True),
    "pixel": _case("pixel_attention", pixel_inputs),
    "spatial": _case("spatial_attention", spatial_inputs),
    "pixel_spatial": _case("pixel_spatial_attention", chain_inputs),
    "gate_mean": _case("channel_gate", channel_inputs, statistic="mean"),
    "gate_contrast": _case("channel_gate", channel_inputs, statistic="contrast"),
    "channel_mean": _case("channel_attention", channel_inputs, statistic="mean"),
    "channel_contrast": _case("channel_attention", channel_inputs, statistic="contrast"),
    "gated_conv": _case("gated_conv1x1", gated_inputs),
}
