"""Weights that come with the package."""

from __future__ import annotations

from pathlib import Path

from .checkpoints import load_checkpoint
from .elan import ELAN
from .mafdn import MAFDN

__all__ = ["PRETRAINED", "load_pretrained"]

_FOLDER = Path(__file__).parent / "weights"

# A name is that of its file; weights/README.md has a card for each.
_NAMES = ("elan_light_x4", "mafdn_x4")

PRETRAINED: dict[str, Path] = {name: _FOLDER / f"{name}.safetensors" for name in _NAMES}
"""Name -> file of weights; ``weights/README.md`` says how each was made and what it measures."""


def load_pretrained(name: str, backend: str | None = None) -> ELAN | MAFDN:
    """The network with weights that come with the package, in eval mode.

    Args:
        name: a key of :data:`PRETRAINED`.
        backend: see :mod:`sr_kernels.backends`.

    Raises:
        ValueError: there are no weights of that name.
        FileNotFoundError: the installation lacks the file.
    """
    if name not in PRETRAINED:
        raise ValueError(f"name is {name!r}; available are {', '.join(sorted(PRETRAINED))}")
    return load_checkpoint(PRETRAINED[name], backend=backend)
