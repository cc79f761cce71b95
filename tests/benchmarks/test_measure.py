"""Clock, order of samples, memory, and the ceilings."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from sr_kernels.benchmarks import ceilings, measure
from sr_kernels.benchmarks.ceilings import Ceilings


def test_percentiles_are_numpys():
    timing = measure.summarize([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (timing.median, timing.samples) == (3.0, 5)
    assert timing.p20 == pytest.approx(1.8)
    assert timing.p80 == pytest.approx(4.2)


def test_long_calls_get_fewer_rounds():
    def rounds(seconds):
        return len(measure.Rounds({"a": lambda repeats, warm: seconds}).sample(0.0)["a"])

    assert [rounds(s) for s in (0.1, 1.9, 2.1, 60.0)] == [2, 2, 1, 1]
    few = measure.Rounds({"a": lambda repeats, warm: 0.1}).sample(0.0, least=1)
    assert len(few["a"]) == 1


def test_the_order_rotates():
    order = []

    def sampler(name):
        def sample(repeats, warm):
            order.append(name)
            return 0.1

        return sample

    rounds = measure.Rounds({name: sampler(name) for name in "abc"})
    for seconds in (0.3, 0.2):  # the second goes on where the first was
        samples = rounds.sample(seconds)
        assert {len(values) for values in samples.values()} == {round(10 * seconds)}
    in_rounds = ["".join(order[-15:][i : i + 3]) for i in range(0, 15, 3)]
    assert in_rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_times_are_seconds_per_call():
    clock = measure.Clock("cpu")
    rounds = measure.Rounds(
        {
            "slow": clock.sampler(lambda: time.sleep(0.004)),
            "fast": clock.sampler(lambda: time.sleep(0.001)),
        }
    )
    samples = rounds.sample(0.1)
    timings = {name: measure.summarize(values) for name, values in samples.items()}
    assert 0.004 <= timings["slow"].median < 0.02
    assert 0.001 <= timings["fast"].median < timings["slow"].median


def test_a_sample_has_its_warm_call_outside():
    calls = []
    sampler = measure.Clock("cpu").sampler(lambda: calls.append(time.sleep(0.01)))
    assert 0.01 <= sampler(3, True) < 0.02
    assert len(calls) == 4
    sampler(3, False)
    assert len(calls) == 7


def test_peak_memory_is_measured_anew():
    megabyte = 1 << 20
    before = measure.resident()
    measure.reset_peak()
    torch.ones(64 * megabyte, dtype=torch.uint8)
    assert 60 * megabyte < measure.peak() - before < 90 * megabyte
    measure.reset_peak()
    assert measure.peak() - before < 20 * megabyte


def test_private_memory_leaves_out_what_is_shared(tmp_path):
    megabyte = 1 << 20
    file = tmp_path / "shared"
    file.write_bytes(bytes(64 * megabyte))
    hold = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "sum(m[::4096]); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(file)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        before, resident = measure.private(), measure.resident()
        shared = torch.from_file(str(file), shared=True, size=64 * megabyte, dtype=torch.uint8)
        own = torch.ones(32 * megabyte, dtype=torch.uint8)
        assert shared.sum() == 0
        assert own.sum() == own.numel()
        assert measure.resident() - resident > 90 * megabyte
        assert 30 * megabyte < measure.private() - before < 50 * megabyte
        other.communicate()


def test_freed_memory_is_kept():
    """Maps are made and freed: without page faults, after the first time.

    The process that does not ask is told by its environment to return every map. Left alone, glibc
    keeps them or not by what happens to lie behind them on the heap.
    """
    program = (
        "import resource, sys, torch\n"
        "from sr_kernels.benchmarks import measure\n"
        "if sys.argv[1] == 'keep': measure.keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4):\n"
        "    before = faults(); [torch.ones(1 << 21) for _ in range(6)]\n"  # 6 maps of 8 MB
        "print(faults() - before)\n"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    faults = [
        int(subprocess.check_output([sys.executable, "-c", program, word], env=environment))
        for word in ("keep", "leave")
    ]
    assert faults[0] < 500 < faults[1]


def test_other_load_does_not_count_ourselves():
    load = measure.OtherLoad()
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
    busy = load.cores()
    assert busy is not None
    others = measure.OtherLoad()
    time.sleep(0.5)
    # What the machine does besides, and not the half second that we have burnt.
    assert busy < (others.cores() or 0.0) + 0.6


def test_ceilings_are_plausible_and_choose_the_rate_of_the_size():
    measured = ceilings.measure("cpu", ("bfloat16",), toy=True)
    assert set(measured.flops) == {"float32", "bfloat16"}
    assert all(rate > 1e6 for rate in measured.flops.values())
    assert measured.exps > 1e5
    assert measured.copy[0][1] > 1e8
    some = Ceilings(((100, 50.0), (1000, 20.0)), {"float32": 1.0}, 1.0)
    assert [some.bytes_per_s(n) for n in (1, 100, 101, 5000)] == [50.0, 50.0, 20.0, 20.0]
    other = Ceilings(((100, 40.0), (1000, 30.0)), {"float32": 2.0}, 0.5)
    best = Ceilings(((100, 50.0), (1000, 30.0)), {"float32": 2.0}, 1.0)
    assert some.best(other) == other.best(some) == best


def test_exponentials_of_a_gpu_are_measured_by_a_chain():
    """With the clock of the CPU: what a GPU adds is the compilation."""
    calls = []

    def counted(x):
        calls.append(x.numel())
        return ceilings.chain(x)

    x = torch.rand(1 << 10)
    rate = ceilings.exponentials_per_s(x, counted, measure.Clock("cpu"))
    assert calls == [1 << 10] * 11
    start = time.perf_counter()
    for _ in range(ceilings.CHAIN):
        torch.exp(x)
    # Several times faster or slower on a busy machine, but neither per call nor per number.
    assert 0.02 < rate * (time.perf_counter() - start) / (ceilings.CHAIN * x.numel()) < 50
    expected = x.double()
    for _ in range(ceilings.CHAIN):
        expected = (-expected).exp()
    torch.testing.assert_close(ceilings.chain(x).double(), expected, rtol=1e-5, atol=0)


def test_exponentials_that_are_known_are_not_measured_again(monkeypatch):
    monkeypatch.setattr(torch, "exp", None)
    assert ceilings.measure("cpu", (), toy=True, exps=5.0).exps == 5.0


@pytest.mark.parametrize(
    ("seconds", "calls"), [(1e-9, 20), (5e-4, 20), (3e-3, 7), (0.02, 1), (3.0, 1)]
)
def test_a_graph_holds_what_fills_a_sample(seconds, calls):
    assert measure.graph_calls(seconds) == calls


def test_exponentials_that_cannot_be_compiled_bound_nothing():
    def broken(x):
        raise RuntimeError("no Triton")

    assert ceilings.exponentials_per_s(torch.rand(4), broken, measure.Clock("cpu")) == math.inf
