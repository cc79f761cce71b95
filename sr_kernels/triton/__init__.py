"""Every operator as Triton kernels, ``torch.ops.sr_kernels_triton.*``: no compiler at install time.

Imported by `sr_kernels.backends` when the backend is first asked for, never with the package:
``import sr_kernels`` works without Triton and does not load it. docs/triton.md says how a kernel
for this package is written.

Importing this module registers the operators. Their signatures, fake kernels, autograd and
autocast are those declared in `sr_kernels.ops`; a *launcher* here has the operator's name, takes
its arguments, allocates its outputs with the fake kernel and starts kernels on them.
"""

from __future__ import annotations

import torch

from sr_kernels.ops._registration import DECLARED, register_all
from sr_kernels.triton import (
    attention_block,
    attention_gates,
    conv3x3,
    shift_conv,
    window_attention,
)
from sr_kernels.triton._launch import INTERPRET

__all__ = ["INTERPRET", "NAMESPACE"]

NAMESPACE = "sr_kernels_triton"

_LAUNCHERS = {
    name: getattr(module, name)
    for module in (shift_conv, window_attention, attention_gates, attention_block, conv3x3)
    for name in module.OPERATORS
}
_DECLARED = {name: declared for name, declared in DECLARED.items() if not declared.not_in_triton}
if _LAUNCHERS.keys() != _DECLARED.keys():
    missing = sorted(_LAUNCHERS.keys() ^ _DECLARED.keys())
    raise ImportError(f"declared operators and Triton launchers differ: {', '.join(missing)}")

for _name, _declared in _DECLARED.items():
    torch.library.custom_op(
        f"{NAMESPACE}::{_name}",
        _LAUNCHERS[_name],
        mutates_args=(),
        schema=torch.library.infer_schema(_declared.fake, mutates_args=()),
    )
register_all(NAMESPACE)
