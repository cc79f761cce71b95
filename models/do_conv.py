"""Depthwise over-parameterised convolution (DO-Conv), and its exact folding.

Cao et al., "DO-Conv: Depthwise Over-parameterized Convolutional Layer", IEEE TIP 2022,
arXiv 2006.12030; parameter names as in the authors' public code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DOConv2d(nn.Module):
    """A 3x3 (or k x k) convolution whose kernel is the product of two trained tensors.

    With K = k*k taps and S >= K the depth multiplier::

        kernel[o, i, t] = sum_s (D + D_diag)[i, t, s] * W[o, i, s]        t in [0, K)
        y = conv2d(x, kernel.view(O, I, k, k), bias, padding)

    ``W`` (O, I, S) starts as an ordinary convolution's kernel and ``D`` (I, K, S) as zeros;
    ``D_diag`` (I, K, S) is a frozen tiled identity: with S = K the untrained layer is that
    convolution.
    The product adds training parameters and no inference cost: :meth:`fold` returns the one
    convolution that it is.

    Args:
        in_channels, out_channels: as for ``nn.Conv2d``.
        kernel_size: odd side k of the square kernel, in pixels.
        depth_multiplier: S; ``None`` means K.
        bias: add a bias of ``out_channels`` values.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        depth_multiplier: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; expected an odd number >= 1")
        taps = kernel_size * kernel_size
        depth = taps if depth_multiplier is None else depth_multiplier
        if depth < taps:
            raise ValueError(
                f"depth_multiplier is {depth}; expected at least kernel_size**2 = {taps}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.W = nn.Parameter(torch.empty(out_channels, in_channels, depth))
        self.D = nn.Parameter(torch.zeros(in_channels, taps, depth))
        # Column s of the identity is tap s mod K; columns beyond the last whole tile are zero.
        diagonal = torch.zeros(taps, depth)
        whole = depth // taps
        diagonal[:, : whole * taps] = torch.eye(taps).repeat(1, whole)
        self.D_diag: Tensor
        self.register_buffer("D_diag", diagonal.expand(in_channels, taps, depth).clone())
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))
        nn.init.zeros_(self.D)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size**2)
            nn.init.uniform_(self.bias, -bound, bound)

    def kernel(self) -> Tensor:
        """The convolution kernel (O, I, k, k) that the two factors multiply to."""
        # Batched over the input channel: (I, O, S) @ (I, S, K).
        product = self.W.transpose(0, 1) @ (self.D + self.D_diag).transpose(1, 2)
        k = self.kernel_size
        return product.transpose(0, 1).reshape(self.out_channels, self.in_channels, k, k)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=self.kernel_size // 2)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The ``nn.Conv2d`` with the same output; the product is formed in float64."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=self.kernel_size // 2,
            bias=self.bias is not None,
            device=self.W.device,
            dtype=self.W.dtype,
        )
        product = torch.einsum("its,ois->oit", (self.D + self.D_diag).double(), self.W.double())
        conv.weight.copy_(product.reshape(conv.weight.shape))
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"depth_multiplier={self.W.shape[2]}, bias={self.bias is not None}"
        )
