"""Registration of the 3x3 convolution. Maths: sr_kernels/functional.py. It is for inference."""

from __future__ import annotations

import torch

from sr_kernels.ops._registration import (
    empty_feature_map,
    register_autocast,
    register_fake,
    register_no_gradient,
)

Tensor = torch.Tensor
OptionalTensor = torch.Tensor | None


@register_fake("conv3x3")
def _(
    x: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    skip: OptionalTensor,
    activation: int,
    negative_slope: float,
) -> Tensor:
    return empty_feature_map(x, weight.shape[0])


register_no_gradient("conv3x3", "torch.nn.functional.conv2d")
register_autocast("conv3x3")
