"""The emulator itself: a planted fault is caught, and the right form of the same kernel passes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
