"""Registration of the 3x3 convolution. Maths: sr_kernels/functional.py. It is for inference."""

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


@declare_fake("conv3x3", not_in_triton=True)
def _(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    skip: OptionalTensor,
    activation: int,
    negative_slope: float,
) -> Tensor:
    return empty_feature_map(x, weight.shape[0])


declare_no_gradient("conv3x3", "torch.nn.functional.conv2d")
declare_autocast("conv3x3")
