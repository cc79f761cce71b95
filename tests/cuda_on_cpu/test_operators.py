"""What holds for every operator's CUDA kernels, run on the CPU: offsets and batches that pass 2^31
and a grid's dimensions."""

import attention_gate_cases
import pytest
import torch
from emulated import all_emulated
from operator_cases import CASES

import sr_kernels
from sr_kernels.testing import bitwise_equal


@pytest.fixture(autouse=True)
def on_emulated_kernels(kernels):
    with all_emulated(kernels):
        yield


def far_apart(maps, dim):
    """The maps in one memory, their ends along `dim` more than 2^31 elements apart: gigabytes of
    addresses, of which few pages are touched."""
    steps = min(t.shape[dim] for t in maps.values()) - 1
    stride = -(-(2**31 + 64) // steps)
    most = max(t.shape[dim] for t in maps.values()) - 1
    memory = torch.empty(most * stride + 2**20, dtype=torch.float16)
    start, found = 0, {}
    for name, tensor in maps.items():
        sizes = list(tensor.shape)
        strides = list(torch.empty([*sizes[:dim], 1, *sizes[dim + 1 :]]).stride())
        strides[dim] = stride
        found[name] = memory.as_strided(sizes, strides, start).copy_(tensor)
        start += 2**16
    return found


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", CASES)
def test_offsets_beyond_2_to_31(name, dim):
    case = CASES[name]
    inputs = case.inputs(2, *case.size[1:], torch.float16)
    maps = {k: t for k, t in inputs.items() if t.shape[2:] == case.size[1:]}
    near, far = (case.results({**inputs, **chosen}) for chosen in (maps, far_apart(maps, dim)))
    assert all(map(bitwise_equal, near, far))


@pytest.mark.parametrize("case", ["pixel", "spatial"])
def test_gates_of_more_images_than_a_grid_dimension_has(case):
    inputs = attention_gate_cases.make_inputs(case, (65537, 1, 1, 1), torch.float16, kernel=1)
    attention_gate_cases.check(case, inputs, gradients=None)


def test_statistics_of_more_images_than_that_are_refused():
    inputs = attention_gate_cases.make_inputs("gate_mean", (65536, 1, 1, 1))
    with pytest.raises(RuntimeError, match="too large for a CUDA grid"):
        sr_kernels.channel_gate(**inputs, backend="cpu")
