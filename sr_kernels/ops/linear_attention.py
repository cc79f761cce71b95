"""Registration of the linear attention block. Maths: sr_kernels/functional.py. It is for inference,
on the CPU."""

from __future__ import annotations

import torch

from sr_kernels.ops._registration import (
    declare_autocast,
    declare_fake,
    declare_no_gradient,
    empty_feature_map,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None


@declare_fake("linear_attention_block", not_in_triton=True)
def _(
    x: Tensor,
    w0: Tensor,
    b0: OptionalTensor,
    w_depth: Tensor,
    w1: Tensor,
    b1: OptionalTensor,
    w_qkv: Tensor,
    b_qkv: OptionalTensor,
    w_out: Tensor,
    b_out: OptionalTensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    return empty_feature_map(x, x.shape[1])


declare_no_gradient("linear_attention_block", "its parts in torch")
declare_autocast("linear_attention_block")
