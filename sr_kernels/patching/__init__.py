"""Other people's networks on the kernels of this package: same weights, same picture.

:func:`patch` and :func:`patched` are also ``sr_kernels.patch`` and ``sr_kernels.patched``.
docs/patching.md says what is recognised, docs/recognisers.md how to add to it.
"""

from . import convolution, elan, gates, swin  # noqa: F401  (they register their recognisers)
from .core import PatchEntry, PatchError, PatchReport, patch, patched
from .recogniser import NotRecognised, Recogniser, recognisers, register, runs

__all__ = [
    "NotRecognised",
    "PatchEntry",
    "PatchError",
    "PatchReport",
    "Recogniser",
    "patch",
    "patched",
    "recognisers",
    "register",
    "runs",
]
