"""The weights that a run begins with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import load_checkpoint
from ..do_conv import DOConv2d
from ..elan import ELAN
from ..mafdn import MAFDN
from ..pretrained import PRETRAINED
from .config import Config, ConfigError

__all__ = ["fresh_network", "take_weights"]


def fresh_network(config: Config) -> ELAN | MAFDN:
    """The network with random weights; branches and tail scaled as the configuration says."""
    torch.manual_seed(config.seed)
    model = config.build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            last = "project_out" in name or "conv1.shift_conv.conv1x1" in name
            if last and name.endswith("weight"):  # what a residual branch ends with
                weight.mul_(config.residual_init)
            if name.startswith("tail."):
                weight.mul_(config.tail_init)
    return model


def take_weights(model: ELAN | MAFDN, source: str) -> tuple[list[str], list[str]]:
    """Take over every tensor of the same name and shape from weights for another scale, say.

    Weights for another value of white are converted. Folded convolutions become the factor W of an
    over-parameterised one.

    Args:
        model: is changed in place.
        source: a name of :data:`PRETRAINED`, a file of weights, or a training checkpoint.

    Returns:
        (names taken, names that stay fresh).

    Raises:
        ConfigError: there is no such file, it is of another network, or of another width.
        CheckpointError: the file cannot be used.
    """
    try:
        other = load_checkpoint(PRETRAINED.get(source, Path(source)))
    except FileNotFoundError as error:
        raise ConfigError(
            f"init_from is {source!r}, which is neither a file nor one of {', '.join(PRETRAINED)}"
        ) from error
    if type(other) is not type(model):
        raise ConfigError(
            f"init_from is {source!r}, weights of {type(other).__name__}; expected weights of "
            f"{type(model).__name__}"
        )
    given = other.state_dict()
    _unfold(model, given)
    if isinstance(other, ELAN):
        ratio = other.rgb_range / model.rgb_range
        given["head.0.weight"] = given["head.0.weight"] * ratio
        for name in ("tail.0.weight", "tail.0.bias"):
            given[name] = given[name] / ratio
    own = model.state_dict()
    # The mean colour is no weight: it belongs to the value of white.
    named = [name for name in own if not name.startswith(("sub_mean.", "add_mean."))]
    taken = [name for name in named if name in given and given[name].shape == own[name].shape]
    head = next(name for name in named if name.startswith("head."))
    if head not in taken:
        raise ConfigError(
            f"init_from is {source!r}, a network of {len(given[head])} channels; expected "
            f"{len(own[head])}"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(given[name])
    return taken, [name for name in named if name not in taken]


def _unfold(model: ELAN | MAFDN, given: dict[str, Tensor]) -> None:
    """Where the model has a DO-Conv and the weights a convolution: kernel = W, D = 0."""
    for name, layer in model.named_modules():
        weight = given.get(f"{name}.weight")
        if not isinstance(layer, DOConv2d) or weight is None or weight[0, 0].numel() == 0:
            continue
        if weight.flatten(2).shape == layer.W.shape:
            given[f"{name}.W"] = weight.flatten(2)
            given[f"{name}.D"] = torch.zeros_like(layer.D)
            given[f"{name}.D_diag"] = layer.D_diag.detach().clone()
