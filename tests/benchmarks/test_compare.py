"""The comparison of two commits: its statistics, and its processes on the build under test."""

import random
from typing import ClassVar

import pytest
from sr_kernels.benchmarks import cases, compare
from sr_kernels.benchmarks.compare import Ratio


def _samples(scale, noise, seed, restarts=3, count=15):
    generator = random.Random(seed)
    return [
        [scale * (1 + noise * generator.random()) for _ in range(count)] for _ in range(restarts)
    ]


def test_a_difference_outside_the_noise_is_found():
    base, control = _samples(1.0, 0.02, 1), _samples(1.0, 0.02, 2)
    same = compare.ratio_of(base, control)
    assert same.low <= same.median <= same.high
    assert compare.verdict(compare.ratio_of(base, _samples(0.9, 0.02, 3)), same) == "faster"
    assert compare.verdict(compare.ratio_of(base, _samples(1.1, 0.02, 3)), same) == "slower"
    assert compare.verdict(compare.ratio_of(base, _samples(1.0, 0.02, 4)), same) == "no difference"


def test_one_unlucky_process_does_not_decide():
    """One of three restarts is 10 % slower, all its pairs agree: that is no difference."""
    base, control = _samples(1.0, 0.002, 1), _samples(1.0, 0.002, 2)
    head = [*_samples(1.0, 0.002, 3, restarts=1), *_samples(1.1, 0.002, 4, restarts=1)]
    head += _samples(1.1, 0.002, 5, restarts=1)
    changed = compare.ratio_of(base, head)
    assert changed.low < 1.01
    assert changed.high > 1.09
    assert compare.verdict(changed, compare.ratio_of(base, control)) == "no difference"


def test_a_noisy_machine_gives_no_verdict():
    """BASE against itself differs by a fifth: 10 % mean nothing then."""
    control = Ratio(1.1, 0.98, 1.2)
    assert compare.verdict(Ratio(0.9, 0.89, 0.91), control) == "no difference"
    assert compare.verdict(Ratio(0.7, 0.69, 0.71), control) == "faster"


def test_differences_below_one_percent_are_none():
    assert compare.verdict(Ratio(0.995, 0.994, 0.996), Ratio(1, 1, 1)) == "no difference"


@pytest.mark.slow
@pytest.mark.unpoisoned
def test_workers_take_turns():
    [case] = cases.select(ops=["channel_gate"], sizes=["16x16"], channels=[8])
    workers = [compare.Worker(side, None, threads=1) for side in ("base", "head")]
    try:
        samples = compare.compare(vars(case).copy(), workers, seconds=0.1)
        assert [len(s) for s in samples] == [compare.MIN_PAIRS] * 2
        assert all(value > 0 for s in samples for value in s)
        with pytest.raises(RuntimeError, match=r"base: .*conv3d"):
            workers[0].ask(do="prepare", case={**vars(case), "op": "conv3d"})
    finally:
        for worker in workers:
            worker.close()
    with pytest.raises(RuntimeError, match="base: its process ended with status -9"):
        workers[0].ask(do="time", repeats=1)


@pytest.mark.slow
def test_a_worker_with_another_build_is_refused(tmp_path):
    """The site is empty, so that the installed package is found instead."""
    with pytest.raises(RuntimeError, match=r"head: its package is .*sr_kernels.*, which is not"):
        compare.Worker("head", tmp_path, threads=1)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('Segmentation fault'); raise SystemExit(3)", "answered 'Segm.*ended with status 3"),
        ("print('{}', flush=True); input()", r"answered '\{\}' and was ended"),
        ("raise SystemExit(4)", "its process ended with status 4"),
        ('print(\'{"error": "no _C"}\')', "head: no _C"),
    ],
)
def test_a_worker_that_does_not_start_is_an_error(program, message, tmp_path):
    package = tmp_path / "sr_kernels" / "benchmarks"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "compare_worker.py").write_text(program)
    with pytest.raises(RuntimeError, match=f"head: .*{message}|^{message}"):
        compare.Worker("head", tmp_path, threads=1)


class _Worker:
    """Takes 0.1 s for everything; "head" cannot do gates."""

    started: ClassVar[list[str]] = []

    def __init__(self, side, site, threads):
        self.side = side
        self.started.append(side)

    def ask(self, *, do, case=None, repeats=1):
        if case and self.side == "head" and case["op"] == "channel_gate":
            raise RuntimeError("head: no gates")
        return 0.1

    def close(self):
        self.started.append("closed")


def test_a_case_that_fails_does_not_end_the_others(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare, "Worker", _Worker)
    monkeypatch.setattr(compare, "build", lambda name, folder: (name, tmp_path))
    monkeypatch.setattr(_Worker, "started", [])
    arguments = ["main", ".", "--size", "8x8", "--channels", "8", "--restarts", "2", "--op"]
    assert compare.main([*arguments, "channel_gate", "shift_conv_block"]) == 1
    text = capsys.readouterr().out
    assert "failed: head: no gates" in text
    assert "shift_conv_block" in text
    assert text.count("no difference") == 1
    # Once for the case that failed, twice for the other one.
    assert _Worker.started.count("base") == _Worker.started.count("head") == 3
    assert _Worker.started.count("closed") == 9
    assert compare.main([*arguments, "shift_conv_block"]) == 0


def test_a_build_that_fails_is_named(capsys):
    assert compare.main(["nonesuch", "."]) == 1
    assert "error: base: git rev-parse" in capsys.readouterr().err


def test_an_unknown_commit_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"git rev-parse .*nonesuch"):
        compare.build("nonesuch", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "imdn_x4"], "--op is imdn_x4"),
        (["--seconds", "nan"], "--seconds is nan; expected a positive number"),
        (["--seconds", "-1"], "--seconds is -1.0; expected a positive number"),
    ],
)
def test_what_it_refuses_before_it_builds(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(["HEAD", "HEAD", *arguments])
    assert message in capsys.readouterr().err
