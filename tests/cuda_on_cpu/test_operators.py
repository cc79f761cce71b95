"""What holds for every operator's CUDA kernels, run on the CPU: offsets and batches that pass 2^31
and a grid's dimensions."""

import dataclasses

import attention_gate_cases
import pytest
import torch
from emulated import all_emulated
from operator_cases import CASES

from sr_kernels.testing import bitwise_equal, make_tensor


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


PLACES = ["one element on", "eight bytes on", "rows of an odd length"]


def placed(tensor, channels_last, where):
    """The same map in memory where it cannot be read sixteen bytes at a time."""
    n, c, h, w = tensor.shape
    shape = [n, h, w, c] if channels_last else [n, c, h, w]
    begin = {"one element on": 1, "eight bytes on": 4}.get(where, 0)
    if begin == 0:
        shape[-1] += 1
    memory = torch.full((torch.Size(shape).numel() + 8,), float("nan"), dtype=tensor.dtype)
    found = memory[begin : begin + torch.Size(shape).numel()].view(shape)
    found = (found.permute(0, 3, 1, 2) if channels_last else found)[:, :c, :, :w]
    return found.copy_(tensor)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_maps_that_are_not_aligned(name, channels_last, where):
    """Bit-equal to the same maps aligned, of rows that are multiples of sixteen bytes."""
    case = CASES[name]
    if "activation" in case.options:  # with gelu and silu everything is done one by one
        case = dataclasses.replace(case, options={"activation": "relu"})
    size = case.size if case.windows else (2, 5, 16)
    layout = "channels_last" if channels_last else "contiguous"
    inputs = case.inputs(*size, torch.float16, layout, channels=16)
    maps = {k: t for k, t in inputs.items() if t.shape[2:] == size[1:]}
    results = []
    for chosen in (maps, {k: placed(t, channels_last, where) for k, t in maps.items()}):
        leaves = {**inputs, **chosen}
        for tensor in leaves.values():
            tensor.requires_grad_(not case.inference)
        out = case.run(leaves)
        results.append([out])
        if not case.inference:
            grad = make_tensor(out.shape, torch.float16, seed=9, layout=layout)
            grad = grad if chosen is maps else placed(grad, channels_last, where)
            results[-1] += torch.autograd.grad(out, list(leaves.values()), grad)
    assert all(map(bitwise_equal, *results))


@pytest.mark.parametrize("case", ["pixel", "spatial"])
def test_gates_of_more_images_than_a_grid_dimension_has(case):
    inputs = attention_gate_cases.make_inputs(case, (65537, 1, 1, 1), torch.float16, kernel=1)
    attention_gate_cases.check(case, inputs, gradients=None)
