"""The comparison of two commits: its statistics, and its processes on the build under test."""

import random

import pytest
from sr_kernels.benchmarks import cases, compare
from sr_kernels.benchmarks.compare import Ratio


def _samples(scale, noise, seed, count=40):
    generator = random.Random(seed)
    return [scale * (1 + noise * generator.random()) for _ in range(count)]


def test_a_difference_outside_the_noise_is_found():
    base, control = _samples(1.0, 0.02, 1), _samples(1.0, 0.02, 2)
    same = compare.ratio_of(base, control)
    assert same.low <= same.median <= same.high
    assert compare.verdict(compare.ratio_of(base, _samples(0.9, 0.02, 3)), same) == "faster"
    assert compare.verdict(compare.ratio_of(base, _samples(1.1, 0.02, 3)), same) == "slower"
    assert compare.verdict(compare.ratio_of(base, _samples(1.0, 0.02, 4)), same) == "no difference"


def test_a_noisy_machine_gives_no_verdict():
    """BASE against itself differs by a fifth: 10 % mean nothing then."""
    control = Ratio(1.1, 0.98, 1.2)
    assert compare.verdict(Ratio(0.9, 0.89, 0.91), control) == "no difference"
    assert compare.verdict(Ratio(0.7, 0.69, 0.71), control) == "faster"


def test_differences_below_one_percent_are_none():
    assert compare.verdict(Ratio(0.995, 0.994, 0.996), Ratio(1, 1, 1)) == "no difference"


@pytest.mark.slow
@pytest.mark.unpoisoned
def test_workers_take_turns(tmp_path):
    [case] = cases.select(ops=["channel_gate"], sizes=["16x16"], channels=[8])
    workers = [compare.Worker(tmp_path, threads=1) for _ in range(2)]
    try:
        samples = compare.compare(vars(case).copy(), workers, seconds=0.1)
        assert [len(s) for s in samples] == [compare.MIN_PAIRS] * 2
        assert all(value > 0 for s in samples for value in s)
        with pytest.raises(RuntimeError, match="conv3d"):
            workers[0].ask(do="prepare", case={**vars(case), "op": "conv3d"})
    finally:
        for worker in workers:
            worker.close()
    with pytest.raises(RuntimeError, match="a worker ended with status -9"):
        workers[0].ask(do="time", repeats=1)


def test_an_unknown_commit_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"git rev-parse .*nonesuch"):
        compare.build("nonesuch", tmp_path)
