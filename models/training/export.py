"""From a training checkpoint to a file of weights."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch

from sr_kernels._files import whole_or_nothing

from ..checkpoints import load_checkpoint
from ..elan import ELAN

__all__ = ["export_weights"]


def export_weights(
    checkpoint: str | PathLike[str], weights: str | PathLike[str], *, half: bool = True
) -> int:
    """Write the averaged weights of a training checkpoint as safetensors, DO-Convs folded.

    Args:
        checkpoint: ``last.pt`` or ``best.pt`` of a run, or any file of weights.
        weights: the file to write.
        half: store float16 (loading widens it again).

    Returns:
        The number of values stored.

    Raises:
        FileNotFoundError, CheckpointError: as :func:`sr_kernels.models.load_checkpoint`.
        ValueError: a value does not fit into half precision.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    model = load_checkpoint(checkpoint)
    tensors = {}
    for name, value in model.state_dict().items():
        small = half and value.is_floating_point()  # counts of batches stay whole
        tensors[name] = (value.half() if small else value).contiguous()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{checkpoint}: {name} does not fit into half precision")
    metadata = {
        "architecture": type(model).__name__,
        "scale": str(model.scale),
        "rgb_range": str(model.rgb_range),
    }
    if isinstance(model, ELAN):  # which no shape tells
        metadata["window_sizes"] = json.dumps(model.window_sizes)
    with whole_or_nothing(Path(weights)) as file:
        file.write(to_bytes(tensors, metadata))
    return sum(value.numel() for value in tensors.values())
