"""Feature maps of more than 2^31 elements: offsets must not wrap. Run with SR_KERNELS_TEST_LARGE=1.

Only the last corner is filled and compared: it lies beyond 2^31 elements.
"""

import pytest
import torch

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import assert_within_tolerance, make_tensor

SIDE = 23232  # a multiple of 16; 4 channels of SIDE x SIDE are 2.16e9 elements
CORNER = 16

pytestmark = pytest.mark.large


def with_corner(seed):
    x = torch.zeros(1, 4, SIDE, SIDE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    corner = make_tensor((1, 4, CORNER, CORNER), torch.bfloat16, seed=seed)
    x[:, :, -CORNER:, -CORNER:] = corner
    return x, corner


def test_shift_conv2d():
    x, corner = with_corner(seed=0)
    weight = make_tensor((4, 4, 1, 1), torch.bfloat16, seed=1)
    out = sr_kernels.shift_conv2d(x, weight, groups=4, backend="cpu")
    inner = (..., slice(1 - CORNER, None), slice(1 - CORNER, None))  # the shift reads one pixel up
    stock = reference.shift_conv2d(corner, weight, groups=4)[inner]
    oracle = reference.shift_conv2d(corner.double(), weight.double(), groups=4)[inner]
    assert_within_tolerance(out[inner], stock, oracle)


def test_grouped_window_attention():
    qv, corner = with_corner(seed=0)
    out = sr_kernels.grouped_window_attention(qv, windows=(2, 2), backend="cpu")
    stock = reference.grouped_window_attention(corner, windows=(2, 2))
    oracle = reference.grouped_window_attention(corner.double(), windows=(2, 2))
    assert_within_tolerance(out[..., -CORNER:, -CORNER:], stock, oracle)
