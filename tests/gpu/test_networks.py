"""Whole networks on a GPU: layers and plan against plain PyTorch in float64, graphs, training."""

import copy

import pytest
import torch
from sr_kernels.models import elan_light, mafdn, plan
from streams import on_a_side_stream, replay_equals_run

import sr_kernels
from sr_kernels.nn import GMSA
from sr_kernels.testing import assert_within_tolerance, bitwise_equal

pytestmark = pytest.mark.gpu
NETWORKS = pytest.mark.parametrize("build", [elan_light, mafdn])


def network(build, device, dtype=torch.float32):
    """With weights at random. An untrained ELAN's scores are of thousands, where 16 bits mean
    nothing (stock's float16 is NaN): its queries are made small."""
    torch.manual_seed(0)
    model = build(2).eval()
    for layer in model.modules():
        if isinstance(layer, GMSA):
            torch.nn.init.normal_(layer.project_inp[0].weight, std=0.02)
    return model.to(device, dtype)


def picture(model, device, dtype=torch.float32, size=(1, 3, 33, 50)):
    torch.manual_seed(1)
    return (torch.rand(size) * model.rgb_range).to(device, dtype)


def with_backend(backend, model, x):
    with sr_kernels.use_backend(backend), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("planned", [False, True])
@NETWORKS
def test_against_float64(build, planned, dtype, device, backend):
    model = network(build, device, dtype)
    x = picture(model, device, dtype)
    stock = with_backend("reference", model, x)
    oracle = with_backend("reference", copy.deepcopy(model).double(), x.double())
    ours = with_backend(backend, plan(model) if planned else model, x)
    # Rounded weights folded into others, and dozens of layers.
    assert_within_tolerance(ours, stock, oracle, factor=4.0)


@NETWORKS
def test_layouts_are_the_same_picture(build, device, backend):
    model = network(build, device)
    x = picture(model, device, size=(2, 3, 48, 32))
    expected = with_backend(backend, model, x)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(with_backend(backend, model, last), expected, rtol=1e-4, atol=1e-3)


@NETWORKS
def test_a_hundred_repeats_are_bit_equal(build, device, backend):
    planned = plan(network(build, device, torch.float16))
    x = picture(planned, device, torch.float16)
    first = with_backend(backend, planned, x)
    for _ in range(99):
        assert torch.equal(with_backend(backend, planned, x), first)


@pytest.mark.unpoisoned  # poisoning fills memory in the middle of a capture
@NETWORKS
def test_the_plan_in_a_graph(build, device, backend):
    planned = plan(network(build, device, torch.float16))
    x = picture(planned, device, torch.float16)
    replay_equals_run(lambda: [with_backend(backend, planned, x)], x)


@pytest.mark.unpoisoned
@NETWORKS
def test_the_plan_on_a_side_stream(build, device, backend):
    planned = plan(network(build, device, torch.float16))
    x = picture(planned, device, torch.float16)
    expected = with_backend(backend, planned, x)
    found = on_a_side_stream(lambda late: with_backend(backend, planned, late["x"]), {"x": x})
    assert bitwise_equal(found, expected)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@NETWORKS
def test_training_steps(build, dtype, device, backend):
    """Under autocast with a gradient scaler, as people train: the loss falls, the gradients of the
    first step are those of plain PyTorch."""
    model = network(build, device).train()
    twin = copy.deepcopy(model)
    x = picture(model, device, size=(2, 3, 32, 32))
    target = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(trained, name):
        with (
            sr_kernels.use_backend(name),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
        ):
            loss = (trained(x).float() - target).abs().mean()
        scaler.scale(loss).backward()
        return loss.item()

    step(twin, "reference")
    losses = [step(model, backend)]
    cosines = []
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None and theirs.grad.norm() > 0:
            a, b = ours.grad.double().flatten(), theirs.grad.double().flatten()
            cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert sorted(cosines)[len(cosines) // 2] > (0.9999 if dtype is None else 0.98)
    for _ in range(3):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(step(model, backend))
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@NETWORKS
def test_the_device_is_the_tensors_own(build, device, backend):
    results = []
    for place in ("cuda:0", "cuda:1"):
        planned = plan(network(build, place, torch.float16))
        with torch.cuda.device("cuda:0"):
            results.append(with_backend(backend, planned, picture(planned, place, torch.float16)))
    assert bitwise_equal(*results)
