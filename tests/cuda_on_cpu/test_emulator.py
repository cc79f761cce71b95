"""The emulator itself: a planted fault is caught, and the right form of the same kernel passes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_kernels import reference

HERE = Path(__file__).resolve().parent
N = 64
# (number in planted.cpp, what the error says)
FAULTS = {
    # Which of two threads comes first hangs on the order: the reader, the writer.
    "no __syncthreads": (1, "race: shared byte|read before it is written"),
    "shared past the end": (2, "out-of-bounds shared read"),
    "global past the end": (3, "out-of-bounds global read of 4 bytes, at byte 256 of an array"),
    "global before the beginning": (4, "out-of-bounds global write of 4 bytes, at byte -4 of"),
    "unwritten shared memory": (5, "read before it is written"),
    "barrier in a branch": (6, "not all threads reach the same barrier: of 64"),
    "early return": (7, "32 have returned, 32 wait at __syncthreads"),
    "overwritten while read": (8, "race: shared byte"),
    "no __syncwarp": (9, "race: shared byte|read before it is written"),
    "misaligned vector": (10, "misaligned shared read of 8 bytes"),
    "misaligned global vector": (15, "misaligned global read of 8 bytes"),
    "copy from a misaligned address": (16, "misaligned global asynchronous copy of 16 bytes"),
    "copy to a misaligned address": (17, "misaligned shared asynchronous copy of 16 bytes"),
    "no wait for a copy": (11, "while an asynchronous copy fills it"),
    "copy on its way at the end": (12, "asynchronous copies of it are on their way"),
    "divergent shuffle": (13, "is at __shfl_.*others? lanes? of its warp at __shfl_"),
}
ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]


@pytest.fixture
def planted(kernels):
    module = kernels("planted")
    yield module
    module.set_schedule("forward", 0)


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(N).astype(np.float32)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_the_right_kernel_passes_in_every_order(planted, values, order, seed):
    planted.set_schedule(order, seed)
    out = np.full(N, np.nan, np.float32)
    planted.reverse(values, out, 0)
    assert np.array_equal(out, values[::-1])


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(planted, values, fault, order, seed):
    planted.set_schedule(order, seed)
    number, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        planted.reverse(values, np.zeros(N, np.float32), number)
    out = np.full(N, np.nan, np.float32)
    planted.reverse(values, out, 0)  # an error leaves nothing behind
    assert np.array_equal(out, values[::-1])


# (number in planted.cpp, what the error says). Which of two blocks comes first hangs on the order.
GRID_FAULTS = {
    "no sync_grid": (1, "race: global (read|write) of 4 bytes, at byte .* where block . is too"),
    "a block returns": (2, "deadlock: of 3 blocks 1 have returned, the others wait at sync_grid"),
    "half a block returns": (3, "of 64, 32 have returned, 32 wait at sync_grid"),
    "an ordinary launch": (4, "is at a sync_grid, but the launch is not cooperative"),
    "too many blocks": (5, "a cooperative launch of 3 blocks: the GPU has room for 2"),
    "overwritten while read": (6, "race: global (read|write) of 4 bytes"),
}


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("fault", [None, *GRID_FAULTS])
def test_blocks_that_wait_for_each_other(planted, order, seed, fault):
    values = np.random.default_rng(0).standard_normal((3, N)).astype(np.float32)
    expected = (values[0] + values[1] + values[2]) - values[:, ::-1]
    planted.set_schedule(order, seed)

    def run(number):
        out = np.full((3, N), np.nan, np.float32)
        planted.grid_sum(values, np.full((3, N), np.nan, np.float32), out, number)
        return out

    if fault is not None:
        number, message = GRID_FAULTS[fault]
        planted.set_device(1 if fault == "too many blocks" else 4, 228 * 1024)
        with pytest.raises(RuntimeError, match=message):
            run(number)
        planted.set_device(4, 228 * 1024)
    assert np.array_equal(run(0), expected)  # an error leaves nothing behind


def test_the_order_of_threads_shows_a_missing_barrier_in_unwatched_memory(planted, values):
    def total(order, with_barrier):
        planted.set_schedule(order, 3)
        out = np.zeros(1, np.float32)
        planted.unwatched_sum(values, out, np.zeros(N, np.float32), with_barrier)
        return out[0]

    right = {total(order, True) for order in ("forward", "reversed", "shuffled")}
    wrong = {total(order, False) for order in ("forward", "reversed", "shuffled")}
    assert len(right) == 1
    assert np.isclose(right.pop(), values.sum(dtype=np.float64), rtol=1e-5)
    assert len(wrong) > 1


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [False, True])
def test_matrix_products_and_a_wrong_fragment_index(planted, dtype, form, wrong):
    planted.set_schedule("shuffled", 0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    c = np.full((16, 16), np.nan, np.float32)
    bits = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b)]
    planted.product(*bits, c, dtype == torch.bfloat16, form, wrong)
    right = np.allclose(c, (a.double() @ b.double()).numpy(), atol=1e-5)
    assert right != wrong


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_reductions_and_votes(planted, values, order, seed):
    planted.set_schedule(order, seed)
    out = np.full((4, N), np.nan, np.float32)
    planted.reductions(values, out)
    warps = values.reshape(2, 32)
    assert np.allclose(out[0], values.sum(dtype=np.float64), atol=1e-5)
    assert np.array_equal(out[1].reshape(2, 32), np.repeat(warps.max(1, keepdims=True), 32, 1))
    assert np.array_equal(out[2].reshape(2, 32), np.roll(warps, -1, 1))
    assert np.array_equal(out[3], (values > 0).astype(np.float32))


@pytest.mark.parametrize(
    ("y", "threads", "shared", "message"),
    [
        (65536, 64, 0, "grid"),
        (0, 64, 0, "grid"),
        (1, 33, 0, "multiple of 32"),
        (1, 2048, 0, "1024"),
        (1, 64, 101377, "101377 bytes of shared memory"),
    ],
)
def test_a_launch_that_a_gpu_would_refuse(planted, y, threads, shared, message):
    with pytest.raises(RuntimeError, match=message):
        planted.refused(y, threads, shared)


# A kernel of the package, a line of it, what stands there instead, what the error says.
REAL_FAULTS = {
    "no-wait": (
        "conv3x3",
        "conv3x3/forward.cuh",
        "copy_async_wait<1>();",
        "copy_async_wait<2>();",
        "is read while an asynchronous copy fills it",
    ),
    "whole-run-loaded": (
        "window_attention",
        "window_attention/window_tile.cuh",
        "if (kRun > 1 && (count >= kRun || count <= 0)) {",
        "if (kRun > 1) {",
        "out-of-bounds global asynchronous copy of 16 bytes",
    ),
    "whole-run-stored": (
        "window_attention",
        "window_attention/window_tile.cuh",
        "if (kRun > 1 && c + kRun <= channels) {",
        "if (kRun > 1) {",
        "out-of-bounds global write of 16 bytes",
    ),
}


def convolution(kernels):
    x = torch.randn(1, 16, 5, 9).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 16, 3, 3).half() / 12
    packed = weight.permute(2, 3, 1, 0).reshape(1, 9, 16, 64).contiguous()
    y = torch.empty(1, 64, 5, 9, dtype=torch.float16)
    kernels.conv3x3(*(t.view(torch.uint16).numpy() for t in (x, packed, y)))
    return y, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)


def attention(kernels):
    """Twelve of the sixteen channels of channels_last maps: a run of 16 bytes, one of 8, and then
    another's channels; of the last pixel, the end."""
    q, v, out = torch.randn(3, 1, 4, 8, 16).half().permute(0, 1, 4, 2, 3)[:, :, :12]
    kernels.window_attention(
        *(t.view(torch.uint16).numpy() for t in (q, v)), 4, out.view(torch.uint16).numpy()
    )
    return out, reference.window_attention(q.double(), q.double(), v.double(), window=4, scale=1.0)


@pytest.mark.parametrize("fault", [None, *REAL_FAULTS])
def test_a_fault_in_one_of_the_kernels_is_caught(build, fault):
    torch.manual_seed(0)
    runs = {"conv3x3": convolution, "window_attention": attention}
    if fault is None:
        kernels = build.load("two_kernels")
        for run in runs.values():
            ours, expected = run(kernels)
            assert (ours - expected).abs().max() < 2e-3
        return
    kernel, *change, message = REAL_FAULTS[fault]
    kernels = build.load("two_kernels", planted=build.Fault(fault, *change))
    with pytest.raises(RuntimeError, match=message):
        runs[kernel](kernels)


def run_script(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=HERE,
    )


RAW = """
import numpy as np, build
planted = build.load("planted")
planted.reverse(np.zeros(64, np.float32), np.zeros(64, np.float32), 14)
"""
HEAP = """
import sys, numpy as np, build
planted = build.load("planted", sanitize=True)
values = np.ones(64, np.float32)
for order in ("forward", "shuffled"):
    planted.set_schedule(order, 0)
    planted.reverse(values, np.zeros(64, np.float32), 0)
    try:
        planted.reverse(values, np.zeros(64, np.float32), 1)
        raise AssertionError("the planted fault was not caught")
    except RuntimeError as error:
        assert "shared byte" in str(error)
print("clean", flush=True)
planted.unwatched_sum(values, np.zeros(1, np.float32), np.zeros(int(sys.argv[1]), np.float32), True)
print("passed")
"""


def test_shared_memory_cannot_be_touched_round_the_checks(planted):
    assert run_script(RAW).returncode == -11  # SIGSEGV


@pytest.mark.parametrize("floats", [64, 63])
def test_address_sanitizer_sees_raw_pointers(build, floats):
    build.build("planted", sanitize=True)  # here: a compiler under the sanitizer takes a minute
    environment = {"LD_PRELOAD": build.sanitizer_runtimes(), "ASAN_OPTIONS": "detect_leaks=0"}
    result = run_script(HEAP, floats, **environment)
    assert "clean" in result.stdout, result.stderr
    assert ("passed" in result.stdout) == (floats == 64)
    assert ("heap-buffer-overflow" in result.stderr) == (floats == 63)
