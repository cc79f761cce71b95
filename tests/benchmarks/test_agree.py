"""Two runs, held against each other."""

from dataclasses import replace

import pytest
from sr_kernels.benchmarks import agree, table

from sr_kernels.cli import main


def test_intervals_that_overlap_agree(row):
    def moved(low, high):
        return replace(row, p20_ms=low, median_ms=(low + high) / 2, p80_ms=high)

    for low, high, expected in (
        *((9.0, 9.4, False), (9.0, 9.5, True), (10.0, 10.5, True), (9.0, 12.0, True)),
        *((11.0, 12.0, True), (11.1, 12.0, False)),
    ):
        assert (
            agree.overlap(row, moved(low, high)) == agree.overlap(moved(low, high), row) == expected
        )


def _two(folder, row, differing):
    """Ten rows in each table, so many of which differ; and some that the other has not."""
    many = [replace(row, shape=f"1x60x8x{n}") for n in range(1, 11)]
    later = [
        replace(r, date="2000-01-02", run="20000102T000000Z-1", commit="another") for r in many
    ]
    later[:differing] = [replace(r, p20_ms=12.0, p80_ms=13.0) for r in later[:differing]]
    wrong = replace(row, provider="eager", status="wrong", median_ms=None)
    older = replace(later[-1], run="19990102T000000Z-1", commit="older", p20_ms=50.0, p80_ms=60.0)
    table.add(folder / "a", [*many, wrong, replace(row, op="conv3x3")])
    table.add(folder / "b", [*later, wrong, older])
    return [str(folder / "a"), str(folder / "b")]


@pytest.mark.parametrize(("differing", "status"), [(0, 0), (1, 0), (2, 1)])
def test_nine_of_ten_must_agree(differing, status, row, tmp_path, capsys):
    assert main(["bench", "--agree", *_two(tmp_path, row, differing)]) == status
    captured = capsys.readouterr()
    assert f"{10 - differing} of 10 rows agree" in captured.out
    assert captured.out.count("DIFFER") == differing
    assert "1 rows are in one table only" in captured.out
    assert ("fewer than 90%" in captured.err) == bool(status)


def test_tables_with_nothing_in_common_are_refused(row, tmp_path, capsys):
    table.add(tmp_path / "a", [row])
    table.add(tmp_path / "b", [replace(row, threads=1)])
    assert main(["bench", "--agree", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "of which only 0 are the same" in capsys.readouterr().err
    table.add(tmp_path / "b", [row])  # one of two is not enough
    assert main(["bench", "--agree", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "of which only 1 are the same" in capsys.readouterr().err
    assert main(["bench", "--agree", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert f"--agree: {tmp_path / 'c'} does not exist" in capsys.readouterr().err
    (tmp_path / "c").mkdir()
    assert main(["bench", "--agree", str(tmp_path / "c"), str(tmp_path / "a")]) == 1
    assert "holds no timed row: measure first" in capsys.readouterr().err
    file = str(tmp_path / "a" / "results.csv")
    assert main(["bench", "--agree", file, str(tmp_path / "a")]) == 1
    assert f"--agree: {file} is not a folder" in capsys.readouterr().err


def test_a_run_is_not_held_against_itself(row, tmp_path, capsys):
    table.add(tmp_path / "a", [row])
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert main(["bench", "--agree", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "a twice; expected two folders" in capsys.readouterr().err


def test_what_asks_for_measuring_does_not_go_with_agree(row, tmp_path, capsys):
    folders = _two(tmp_path, row, 0)
    assert main(["bench", "--size", "8x8", "--no-memory", "--plot", "--agree", *folders]) == 2
    message = "--agree measures nothing, and goes without --size, --no-memory, --plot"
    assert message in capsys.readouterr().err
