"""Registration of the attention block operators. Maths: sr_kernels/functional.py.

They are for inference: differentiating them is an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sr_kernels.ops._registration import (
    declare_autocast,
    declare_autograd,
    declare_fake,
    empty_feature_map,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None


@declare_fake("grouped_attention_block")
def _(
    x: Tensor,
    w_in: Tensor,
    b_in: OptionalTensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
    return_q: bool,
) -> tuple[Tensor, Tensor]:
    return empty_feature_map(x, x.shape[1]), x.new_empty(x.shape if return_q else 0)


@declare_fake("apply_grouped_attention_block")
def _(
    x: Tensor,
    q: Tensor,
    w_v: Tensor,
    b_v: OptionalTensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    windows: Sequence[int],
    shifted: bool,
) -> Tensor:
    return empty_feature_map(x, x.shape[1])


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _no_gradient(ctx: Any, *gradients: OptionalTensor) -> Any:
    raise RuntimeError(
        "sr_kernels::grouped_attention_block is for inference and has no gradient: train with "
        'grouped_window_attention between two convolutions, or with backend="reference"'
    )


for _name in ("grouped_attention_block", "apply_grouped_attention_block"):
    declare_autograd(_name, _no_context, _no_gradient)
    declare_autocast(_name)
