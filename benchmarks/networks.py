"""The networks under test: their weights, a photograph, and their cost.

A photograph, because random pixels drive attention logits to where no picture takes them. Weights
are those that come with the package, a file of yours (``--weights``), or else random ones whose
batch statistics are taken from the photograph, which keeps every activation at unit scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sr_kernels import models
from sr_kernels.nn import GMSA, PixelAttention, SpatialAttention

from .cases import Case
from .work import Work

__all__ = ["NETWORKS", "Network", "load", "photograph"]


@dataclass(frozen=True)
class Network:
    """make: the network from its constructor.  pretrained: name of shipped weights, or None."""

    make: Callable[[], nn.Module]
    pretrained: str | None = None


NETWORKS: dict[str, Network] = {
    "elan_light_x4": Network(lambda: models.elan_light(4)),
    "elan_x4": Network(lambda: models.elan(4)),
    "mafdn_x4": Network(lambda: models.mafdn(4).fold(), pretrained="mafdn_x4"),
}


def photograph(path: Path, batch: int, height: int, width: int, white: float) -> Tensor:
    """(batch, 3, height, width) float32 in 0..white: the photograph resized, and flipped copies."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() * (white / 255)
    copies = [x, x.flip(2), x.flip(1), x.flip(1, 2)]
    return torch.stack([copies[i % 4] for i in range(batch)]).contiguous()


def load(case: Case, weights: Path | None, image: Path) -> tuple[Any, str]:
    """The network, in eval mode on the CPU, and what its weights are."""
    network = NETWORKS[case.op]
    if weights is not None:
        loaded: Any = models.load_checkpoint(weights).eval()
        wanted: Any = network.make()
        for what, found, expected in (
            ("network", type(loaded).__name__, type(wanted).__name__),
            ("scale", loaded.scale, wanted.scale),
            ("number of parameters", _size(loaded), _size(wanted)),
        ):
            if found != expected:
                raise ValueError(
                    f"weights for {case.op} are {weights}, whose {what} is {found}; expected "
                    f"{expected}"
                )
        return loaded, weights.name
    if network.pretrained is not None:
        return models.load_pretrained(network.pretrained).eval(), network.pretrained
    # For benchmarks on this process's own stream of random numbers, which must not be disturbed.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = network.make()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # the plain mean over what is seen: one picture
        with torch.no_grad():
            model.train()(photograph(image, 1, 64, 64, model.rgb_range))
    return model.eval(), "random, seed 0"


def _size(model: nn.Module) -> int:
    """Parameters, without those that only some checkpoints have (the mean colour's)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def work(case: Case, model: Any) -> dict[str, Work]:
    """Bytes: picture in, picture out, weights. Products counted by running a small picture
    through stock operators; exponentials by hand.

    Score reuse counts as reuse: what an ELAB's second attention could skip is not counted.
    """
    size = getattr(torch, case.dtype).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    multiple = model.tile_multiple
    height, width = (-(-n // multiple) * multiple for n in (case.height, case.width))
    pixels = case.batch * height * width
    flops = (_flops_per_pixel(model) - _recomputed_flops(model)) * pixels
    exponentials = _exponentials(model) * pixels
    forward = Work(
        size * (3.0 * case.pixels * (1 + model.scale**2) + parameters), flops, exponentials
    )
    # As for the operators: twice the products, softmax and activations once more.
    backward = Work(2 * forward.bytes, 2 * flops, exponentials)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _flops_per_pixel(model: Any) -> float:
    """Of convolutions and matrix products, by torch's counter, on stock operators."""
    side = 64  # a multiple of every window
    backend = model.backend
    model.backend = "reference"
    try:
        like = next(model.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype))
    finally:
        model.backend = backend
    return counter.get_total_flops() / side**2


def _attentions(model: Any) -> list[GMSA]:
    return [layer for layer in model.modules() if isinstance(layer, GMSA)]


def _recomputed_flops(model: Any) -> float:
    """Per pixel: q q^T in attentions that reuse scores, which the definition computes again."""
    total = 0.0
    for layer in _attentions(model):
        if not layer.calc_attn:
            d = layer.channels // len(layer.window_sizes)
            total += 2.0 * d * sum(w * w for w in layer.window_sizes)
    return total


def _exponentials(model: Any) -> float:
    """Per pixel: softmax where scores are computed, and the sigmoids of gates."""
    total = 0.0
    for layer in _attentions(model):
        total += sum(w * w for w in layer.window_sizes) if layer.calc_attn else 0
    for layer in model.modules():
        if isinstance(layer, PixelAttention):
            total += layer.conv.out_channels
        elif isinstance(layer, SpatialAttention):
            total += 1
    return total
