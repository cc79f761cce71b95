"""The CUDA kernels as nvcc compiles them: no spills, no more registers than were agreed to, tensor
cores and wide accesses where they are meant. Needs no GPU."""

import json
import re

import cuda_codegen
import pytest


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_codegen.TABLE.read_text())


@pytest.fixture(scope="module")
def kernels():
    missing = cuda_codegen.why_not()
    if missing is not None:
        pytest.skip(missing)
    return cuda_codegen.measure(workers=2)


def test_the_operators_of_the_cuda_library_compile():
    """A CPU-only torch builds no `_C_cuda`: a call that does not fit its kernel would go unseen."""
    missing = cuda_codegen.why_not()
    if missing is not None:
        pytest.skip(missing)
    assert cuda_codegen.host_errors(workers=2) == {}


def test_nothing_is_spilled_and_no_shared_memory_is_static(kernels):
    assert kernels
    for key, kernel in kernels.items():
        assert kernel.registers > 0, key
        assert (kernel.spills, kernel.stack) == (0, 0), key
        assert kernel.shared == 0, f"{key}: shared memory comes from shared_array"


def test_registers_are_within_the_table(kernels, table):
    version = cuda_codegen.toolkit_version()
    if version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {version}")
    found = {name for name, _ in kernels}
    assert found == set(table["registers"]), "run tests/shared/cuda_codegen.py, commit its table"
    for (name, arch), kernel in kernels.items():
        most = table["registers"][name][arch]
        assert kernel.registers <= most, f"{name}, sm_{arch}: {kernel.registers} > {most}"


# Of how many blocks of 256 threads a multiprocessor's 65,536 registers are to be enough.
BLOCKS = {
    "conv3x3_kernel<__half>": 2,
    "conv_kernel<__half>": 2,
    "block_kernel<__half, 1>": 2,
    "block_input_gradient_kernel<__half, 1>": 2,
    "block_weight_gradient_kernel<__half, 1>": 2,
    "weight_gradient_kernel<__half>": 2,
    "weight_gradient_kernel<float>": 2,
    "gated_conv_kernel<__half>": 2,
    "channel_products_kernel<float>": 2,
    "channel_moments_gradient_kernel<float>": 2,
    "channel_attention_kernel<__half>": 4,  # of a batch, as many images fit on chip
    "channel_attention_kernel<float>": 4,
}


def test_blocks_share_a_multiprocessor_where_that_is_meant(kernels):
    assert {name for name, _ in kernels} >= set(BLOCKS)
    for (name, arch), kernel in kernels.items():
        if name in BLOCKS:
            assert kernel.registers <= 65536 // 256 // BLOCKS[name], (name, arch)


def test_tensor_cores_where_they_are_meant(kernels):
    """16-bit products: HMMA from ldmatrix. float32: FFMA, never a matrix instruction (TF32)."""
    seen = 0
    for (name, arch), kernel in kernels.items():
        if not kernel.sass:
            pytest.skip("no cuobjdump and nvdisasm here, neither the toolkit's nor Triton's")
        matrix = len(re.findall(r"\bHMMA\.", kernel.sass))
        if "<float" in name:
            assert matrix == 0, (name, arch)
        elif name.split("<")[0] in PRODUCTS:
            seen += 1
            assert matrix > 0, (name, arch)
            assert "LDSM" in kernel.sass, (name, arch)
    assert seen > 0


# Kernels that are products of matrices.
PRODUCTS = {
    "conv3x3_kernel",
    "conv_kernel",
    "block_kernel",
    "block_input_gradient_kernel",
    "block_weight_gradient_kernel",
    "weight_gradient_kernel",
    "window_attention_kernel",
    "window_statistics_kernel",
    "window_gradient_kernel",
    "pixel_gate_kernel",
    "gated_conv_kernel",
    "attention_block_kernel",
}


# Those that load tiles into shared memory, and those that store them by runs of 16 bytes.
TILES = PRODUCTS | {"channel_attention_kernel"}
RUNS = TILES - {
    "block_weight_gradient_kernel",
    "weight_gradient_kernel",
    "window_statistics_kernel",
}


def test_tiles_move_sixteen_bytes_at_a_time(kernels):
    """LDGSTS.E.BYPASS.128 is a cp.async of 16 bytes. Loads and stores beside it are for maps and
    weights that are not aligned."""
    seen = 0
    for (name, arch), kernel in kernels.items():
        if not kernel.sass or name.split("<")[0] not in TILES:
            continue
        seen += 1
        assert re.search(r"\bLDGSTS\.E[.\w]*\.128", kernel.sass), (name, arch)
        if name.split("<")[0] in RUNS:
            assert re.search(r"\bSTG\.E[.\w]*\.128", kernel.sass), (name, arch)
    assert seen > 0


@pytest.mark.parametrize("kernel", sorted(TILES))
def test_shared_memory_is_addressed_as_such(kernels, kernel):
    """An access through a generic pointer costs an address check: a sign that it was lost somewhere
    that the memory is shared. The barrier of a grid (LD.E.STRONG.GPU) has one by intention."""
    for (name, arch), compiled in kernels.items():
        if name.split("<")[0] == kernel and compiled.sass:
            generic = re.findall(r"\b(?:LD|ST)\.E(?!\.STRONG)[.\w]*\b", compiled.sass)
            assert not generic, (name, arch, generic[:3])
