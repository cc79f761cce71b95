from __future__ import annotations

import pytest
import torch
from sr_kernels.models import DOConv2d


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("extra_depth", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_is_the_same_convolution(kernel_size: int, extra_depth: int, bias: bool) -> None:
    depth = kernel_size**2 + extra_depth
    layer = DOConv2d(6, 10, kernel_size, depth_multiplier=depth, bias=bias).double()
    torch.nn.init.normal_(layer.D)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    folded = layer.fold()
    assert type(folded) is torch.nn.Conv2d
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-12, atol=1e-12)


def test_kernel_is_the_papers_formula() -> None:
    layer = DOConv2d(3, 5)
    torch.nn.init.normal_(layer.D)
    kernel = torch.einsum("its,ois->oit", layer.D + layer.D_diag, layer.W).reshape(5, 3, 3, 3)
    torch.testing.assert_close(layer.kernel(), kernel)


def test_an_untrained_layer_is_its_plain_convolution() -> None:
    layer = DOConv2d(4, 8)
    assert torch.equal(layer.kernel(), layer.W.reshape(8, 4, 3, 3))


def test_both_factors_learn_and_the_identity_does_not() -> None:
    layer = DOConv2d(3, 4)
    layer(torch.randn(1, 3, 5, 5)).square().sum().backward()
    assert layer.W.grad is not None
    assert layer.D.grad is not None
    assert layer.W.grad.abs().sum() > 0
    assert layer.D.grad.abs().sum() > 0
    assert not layer.D_diag.requires_grad
    assert "D_diag" in layer.state_dict()


@pytest.mark.parametrize("arguments", [{"kernel_size": 2}, {"depth_multiplier": 8}])
def test_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DOConv2d(3, 4, **arguments)
