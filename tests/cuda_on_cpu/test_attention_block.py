"""The attention block's CUDA launches, run on the CPU, against the definition in float64."""

import pytest
from attention_block_cases import block_inputs, check_block
from choices import DTYPES, LAYOUTS
from emulated import emulated, run_sanitized


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    module = kernels("attention_block")
    module.set_schedule("shuffled", 0)
    with emulated(module, ["grouped_attention_block", "apply_grouped_attention_block"]):
        yield module
    module.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_as_in_elan(shifted, dtype):
    check_block(block_inputs((1, 60, 16, 16), dtype), windows=(4, 8, 16), shifted=shifted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_layouts_and_biases(layout, bias, dtype):
    inputs = block_inputs((2, 9, 6, 12), dtype, layout, bias=bias)
    check_block(inputs, windows=(2, 3, 6), shifted=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [66, 99])
def test_wide_blocks(channels, dtype):
    """More input channels than a piece of the projection; groups beyond the fused kernel's 32."""
    check_block(
        block_inputs((1, channels, 4, 8), dtype, logits=0.3), windows=(2, 4, 4), shifted=True
    )


def test_shared_memory_is_within_the_table(on_emulated_kernels):
    assert on_emulated_kernels.shared_bytes() <= 64512  # a block of attention_block_kernel


def test_under_the_sanitizers(build):
    run_sanitized(build, "attention_block", __file__, "layouts torch.float16")
