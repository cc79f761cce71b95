"""ELAN and MAFDN in the registry of BasicSR and of the trainers that are made like it."""

from __future__ import annotations

import importlib.util
from typing import Any

from .elan import ELAN, elan, elan_light
from .mafdn import MAFDN, mafdn

__all__ = ["register_basicsr"]


def register_basicsr(registry: Any = None) -> list[str]:
    """Let option files name our networks: ``ELAN``, ``MAFDN``, ``elan``, ``elan_light``, ``mafdn``.

    As in ``network_g: {type: elan_light, scale: 4, rgb_range: 1.0}``; BasicSR's pictures are in
    0..1, ELAN's own default is 255. What these trainers save, ``load_checkpoint`` reads.

    Args:
        registry: where they are registered; None is ``ARCH_REGISTRY`` of an installed basicsr, and
            nothing where there is none. Others (neosr's, traiNNer-redux's) are given: anything with
            ``register(obj)``, which takes the name from ``obj.__name__``, and ``name in registry``.

    Returns:
        The names that were added: a name that is taken stays what it was, so a second call adds
        none.

    Raises:
        ImportError: basicsr is installed but cannot be imported.
        TypeError: ``registry`` is not one.
    """
    if registry is None:
        if importlib.util.find_spec("basicsr") is None:
            return []
        from basicsr.utils.registry import ARCH_REGISTRY

        registry = ARCH_REGISTRY
    if not callable(getattr(registry, "register", None)) or not hasattr(registry, "__contains__"):
        raise TypeError(
            f"registry is a {type(registry).__name__}; expected one like BasicSR's ARCH_REGISTRY, "
            "with register(obj) and `name in registry`"
        )
    added = []
    for network in (ELAN, MAFDN, elan, elan_light, mafdn):
        if network.__name__ not in registry:
            registry.register(network)
            added.append(network.__name__)
    return added
