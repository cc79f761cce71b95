"""Registration of the attention block operators. Maths: sr_kernels/functional.py.

They are for inference: differentiating them is an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sr_kernels.ops._registration import (
    declare_autocast,
    declare_fake,
    declare_no_gradient,
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


@declare_fake("grouped_attention_block_out", not_in_triton=True)
@declare_fake("apply_grouped_attention_block_out", not_in_triton=True)
def _(*arguments: Any) -> None:
    return None


for _name in ("grouped_attention_block", "apply_grouped_attention_block"):
    declare_no_gradient(_name, "grouped_window_attention between two convolutions")
    declare_autocast(_name)
