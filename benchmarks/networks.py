"""The networks under test: their weights, a photograph, and their cost.

A photograph, because random pixels drive attention logits to where no picture takes them. Weights
are those that come with the package, a file of yours (``--weights``), or else random ones whose
batch statistics are taken from the photograph, which keeps every activation at unit scale.

Other people's networks, on which :func:`sr_kernels.patch` is measured, are those that its tests
define in ``tests/patch/third_party.py``: a checkout has them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sr_kernels.models import checkpoints
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sr_kernels import backends, models
from sr_kernels.nn import GMSA, PixelAttention, SpatialAttention

from .cases import THIRD_PARTY, Case
from .work import Work

__all__ = ["NETWORKS", "Network", "load", "photograph", "white"]


@dataclass(frozen=True)
class Network:
    """make: the network from its constructor.  pretrained: name of shipped weights, or None.

    theirs: other people's code, to be patched. Ours say by themselves what the other three do.
    white: its largest input value.  multiple: heights and widths are padded to one of it.
    scale: of the magnification.
    """

    make: Callable[[], nn.Module]
    pretrained: str | None = None
    theirs: bool = False
    white: float = 1.0
    multiple: int = 1
    scale: int = 4


def _third_party(name: str, **arguments: Any) -> nn.Module:
    if not THIRD_PARTY.is_file():
        raise ValueError(f"{name} is defined in a checkout only: {THIRD_PARTY} is absent")
    if str(THIRD_PARTY.parent) not in sys.path:
        sys.path.append(str(THIRD_PARTY.parent))
    network: nn.Module = getattr(importlib.import_module(THIRD_PARTY.stem), name)(**arguments)
    return network


def _theirs(name: str, white: float, multiple: int) -> Network:
    return Network(lambda: _third_party(name), theirs=True, white=white, multiple=multiple)


NETWORKS: dict[str, Network] = {
    "elan_light_x4": Network(lambda: models.elan_light(4), pretrained="elan_light_x4"),
    "elan_light_x2": Network(lambda: models.elan_light(2), scale=2),
    "elan_x4": Network(lambda: models.elan(4)),
    "mafdn_x4": Network(lambda: models.mafdn(4).fold(), pretrained="mafdn_x4"),
    "elan_light_foreign_x4": _theirs("ELAN", 255.0, 16),
    "imdn_x4": _theirs("IMDN", 1.0, 1),
    "pan_x4": _theirs("PAN", 1.0, 1),
    "dctlsa_x4": _theirs("DCTLSA", 1.0, 16),
}


def white(name: str, model: Any) -> float:
    """The largest value of the network's input."""
    return float(getattr(model, "rgb_range", NETWORKS[name].white))


def photograph(path: Path, batch: int, height: int, width: int, brightest: float) -> Tensor:
    """(batch, 3, height, width) float32, 0..brightest: the photograph resized, and flipped."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() * (brightest / 255)
    copies = [x, x.flip(2), x.flip(1), x.flip(1, 2)]
    return torch.stack([copies[i % 4] for i in range(batch)]).contiguous()


def load(case: Case, weights: Path | None, image: Path) -> tuple[Any, str]:
    """The network, in eval mode on the CPU, and what its weights are."""
    network = NETWORKS[case.op]
    if weights is not None and network.theirs:
        return _load_theirs(case.op, weights), weights.name
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
            model.train()(photograph(image, 1, 64, 64, white(case.op, model)))
    return model.eval(), "random, seed 0"


def _load_theirs(name: str, file: Path) -> nn.Module:
    """The network with the weights of a file that its authors published.

    Raises:
        ValueError: that is no such file; it says what is accepted.
    """
    state = checkpoints.read(file)
    state = state.get("params", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"weights for {name} are {file}, which does not hold names with tensors; expected a "
            'state_dict saved with torch.save, as it is or under "params"'
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "tail.weight" in state:  # FriedRiceLab's ELAN
        state = {key.replace("tail.", "tail.0."): value for key, value in state.items()}
        model = _third_party("ELAN", spelling="friedricelab")
    else:
        model = NETWORKS[name].make()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights for {name} are {file}, which does not fit: {str(error).splitlines()[0]}"
        ) from error
    return model.eval()


def _size(model: nn.Module) -> int:
    """Parameters, without those that only some checkpoints have (the mean colour's)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def work(case: Case, model: Any) -> dict[str, Work]:
    """Bytes: picture in, picture out, weights. Products counted by running a small picture
    through stock operators; exponentials by hand for our networks, where score reuse counts as
    reuse: what an ELAB's second attention could skip is not counted. Of others what they compute.
    """
    size = getattr(torch, case.storage).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    network = NETWORKS[case.op]
    multiple = getattr(model, "tile_multiple", network.multiple)
    height, width = (-(-n // multiple) * multiple for n in (case.height, case.width))
    pixels = case.batch * height * width
    counted, exponentials = _counted(model)
    if not network.theirs:
        counted -= _recomputed_flops(model)
        exponentials = _exponentials(model)
    flops, exponentials = counted * pixels, exponentials * pixels
    scale = getattr(model, "scale", network.scale)
    moved = size * (3.0 * case.pixels * (1 + scale**2) + parameters)
    forward = Work(moved, flops, exponentials)
    # As for the operators: twice the products, softmax and activations once more.
    backward = Work(2 * forward.bytes, 2 * flops, exponentials)
    return {"forward": forward, "backward": backward, "both": forward + backward}


class _Exponentials(TorchDispatchMode):
    """Counts the elements of what softmax, sigmoid and exp return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EXPONENTIAL:
            self.count += out.numel()
        return out


_EXPONENTIAL = {
    getattr(torch.ops.aten, name) for name in ("_softmax", "sigmoid", "sigmoid_", "exp", "silu")
}


def _counted(model: Any) -> tuple[float, float]:
    """A pixel's operations of convolutions and matrix products, by torch's counter, and its
    exponentials: of the network on stock operators."""
    side = 64  # a multiple of every window
    like = next(model.parameters())
    x = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
    with (
        torch.no_grad(),
        backends.use_backend("reference"),
        FlopCounterMode(display=False) as counter,
        _Exponentials() as exponentials,
    ):
        model(x)
    return counter.get_total_flops() / side**2, exponentials.count / side**2


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
