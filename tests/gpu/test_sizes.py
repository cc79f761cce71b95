"""Each family's own list of sizes on a GPU, as on the CPU and on the emulated kernels."""

import attention_block_cases
import attention_gate_cases
import conv3x3_cases
import pytest
import shift_conv_cases
import torch
import window_attention_cases
from choices import ACTIVATIONS, DTYPES

from sr_kernels.testing import make_tensor

pytestmark = pytest.mark.gpu
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES)


def luck(dtype):
    """Allowances for stock's error on a handful of numbers, 0 included."""
    eps = torch.finfo(dtype).eps
    exact = dtype == torch.float32
    return {"atol": 4 * eps if exact else 0.0, "gradient_atol": 80 * eps if exact else eps}


@ALL_DTYPES
@pytest.mark.parametrize("size", shift_conv_cases.SIZES, ids=str)
def test_shift_conv2d(size, dtype, device, backend):
    for activation in ACTIVATIONS:
        inputs = shift_conv_cases.conv_inputs(*size, dtype=dtype, device=device)
        shift_conv_cases.check_conv(
            inputs,
            activation=activation,
            backend=backend,
            few_pixels_slack=True,
            atol=luck(dtype)["atol"],
        )


@ALL_DTYPES
@pytest.mark.parametrize("pattern", ["plus", "cross", "none"])
@pytest.mark.parametrize("size", [*shift_conv_cases.BLOCK_SIZES, (1, 180, 360, 40, 50)], ids=str)
def test_shift_conv_block(size, pattern, dtype, device, backend):
    inputs = shift_conv_cases.block_inputs(*size, dtype=dtype, device=device)
    options = {"few_pixels_slack": True, "atol": luck(dtype)["atol"]}
    shift_conv_cases.check_block(inputs, pattern=pattern, backend=backend, **options)


@ALL_DTYPES
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("size", window_attention_cases.SIZES, ids=str)
def test_window_attention(size, mask, dtype, device, backend):
    n, heads, d, d_v, h, w, window, shift = size
    inputs = window_attention_cases.attention_inputs(
        n, heads, d, d_v, h, w, window, dtype, device=device
    )
    window_attention_cases.check_attention(
        inputs, window=window, shift=shift, heads=heads, mask=mask, backend=backend, **luck(dtype)
    )


@ALL_DTYPES
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("channels", [48, 60, 180])
def test_grouped_window_attention_as_in_elan(channels, shifted, dtype, device, backend):
    for layout in ("contiguous", "channels_last"):
        qv = make_tensor((2, 2 * channels, 32, 48), dtype, layout=layout, scale=0.5, device=device)
        window_attention_cases.check_grouped(
            qv, windows=(4, 8, 16), shifted=shifted, backend=backend, **luck(dtype)
        )


@ALL_DTYPES
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_block_as_in_elan(shifted, dtype, device, backend):
    inputs = attention_block_cases.block_inputs((2, 60, 32, 48), dtype, device=device)
    attention_block_cases.check_block(inputs, windows=(4, 8, 16), shifted=shifted, backend=backend)


@ALL_DTYPES
@pytest.mark.parametrize("case", attention_gate_cases.CASES)
@pytest.mark.parametrize("size", attention_gate_cases.SIZES, ids=str)
def test_gates(size, case, dtype, device, backend):
    if size[0] == 0 and case.startswith("gate_"):
        pytest.skip("stock cannot differentiate the convolution of an empty batch's mean")
    inputs = attention_gate_cases.make_inputs(case, size, dtype, device=device)
    attention_gate_cases.check(case, inputs, backend=backend)


# Maps that a large GPU keeps on chip, with one block a multiprocessor, several, and many images;
# and maps that none does.
CHANNEL_SIZES = [(1, 60, 180, 320), (1, 64, 270, 478), (32, 60, 64, 64), (1, 64, 540, 958)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["channel_mean", "channel_contrast"])
@pytest.mark.parametrize("size", CHANNEL_SIZES, ids=str)
def test_channel_attention_on_chip_and_beyond(size, case, layout, dtype, device, backend):
    inputs = attention_gate_cases.make_inputs(case, size, dtype, layout, device=device)
    attention_gate_cases.check(case, inputs, backend=backend, gradients=None)


@ALL_DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 48, 52, 60, 64, 180])
def test_conv3x3_as_in_the_networks(channels, layout, dtype, device, backend):
    inputs = conv3x3_cases.conv_inputs(
        (2, channels, 37, 50), channels, dtype, layout, device=device
    )
    conv3x3_cases.check_conv(inputs, activation="leaky_relu", backend=backend)
