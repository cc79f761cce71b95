"""The table of results and what is drawn from it."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from sr_kernels.benchmarks import plot, table

ROOT = Path(__file__).resolve().parents[2]


def test_rows_survive_the_file(tmp_path, rows):
    failed = replace(rows[0], status="wrong", reason='error, "large"\nvery', median_ms=None)
    table.add(tmp_path, [*rows[1:], failed])
    assert table.read(tmp_path) == [*rows[1:], failed]
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_measuring_again_replaces_the_row(tmp_path, row):
    other = replace(row, provider="eager")
    table.add(tmp_path, [row, other])
    table.add(tmp_path, [replace(row, median_ms=5.0)])
    assert table.read(tmp_path) == [other, replace(row, median_ms=5.0)]
    for name in table.KEY:
        changed = replace(row, **{name: 3 if name == "threads" else "another"})
        assert changed.key != row.key
    table.add(tmp_path, [replace(row, date="2000-01-02")])
    assert len(table.read(tmp_path)) == 3


def test_a_run_that_is_cut_off_leaves_the_complete_row(tmp_path, row):
    whole = replace(row, samples=12)
    table.add(tmp_path, [whole])
    again = replace(row, run="20991231T000000Z-1", median_ms=11.0)
    table.add(tmp_path, [replace(again, samples=2)], unfinished=True)
    assert table.read(tmp_path) == [whole]
    fresh = replace(again, samples=2, provider="eager")
    table.add(tmp_path, [fresh], unfinished=True)
    assert table.read(tmp_path) == [whole, fresh]
    table.add(tmp_path, [replace(again, samples=6)])
    assert table.read(tmp_path) == [fresh, replace(again, samples=6)]


def test_a_provider_that_became_wrong_keeps_no_times(tmp_path, row):
    hot, cold = replace(row, cache="hot"), replace(row, cache="cold", versions="torch 0.1")
    others = [replace(hot, provider="eager"), replace(cold, date="1999-01-01")]
    table.add(tmp_path, [hot, cold, *others])
    wrong = replace(hot, status="wrong", reason="error 1", median_ms=None)
    table.add(tmp_path, [wrong])
    assert table.read(tmp_path) == [*others, wrong]


def test_what_fails_with_one_heap_keeps_the_times_of_the_other(tmp_path, row):
    failed = replace(row, cache=table.SYSTEM_HEAP, status="failed", median_ms=None)
    for first, second in ((row, failed), (failed, row)):
        table.add(tmp_path, [first])
        table.add(tmp_path, [second])
        assert table.read(tmp_path) == [first, second]
        (tmp_path / table.FILE_NAME).unlink()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, row, monkeypatch):
    table.add(tmp_path, [row])

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(table.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        table.add(tmp_path, [replace(row, provider="eager")])
    assert table.read(tmp_path) == [row]
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_a_table_of_another_version_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("op,colour\nx,red\n")
    with pytest.raises(ValueError, match=r"lacks the columns .*'mode'.* and has \['colour'\]"):
        table.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.replace(",9.5,", ",9.5ms,"), "p20_ms is '9.5ms'; expected a number"),
        (lambda line: line.replace(",7,", ",7.5,"), "samples is '7.5'; expected an integer"),
        (lambda line: line.replace(",2,", ",,"), "threads is ''; expected an integer"),
        (lambda line: line[:60], "columns where there are"),
        (lambda line: line + ",1", "more columns where there are"),
        (lambda line: line.replace(",1x60x180x320,", ",60x180x320,"), "shape is '60x180x320'"),
        (lambda line: line.replace(",1x60x180x320,", ",1x60x180x\u00b2,"), "expected NxCxHxW"),
        (lambda line: line.replace(",10,", ",nan,"), "median_ms is nan; expected a positive"),
        (lambda line: line.replace(",10,", ",inf,"), "median_ms is inf; expected a positive"),
        (lambda line: line.replace(",10,", ",0,"), "median_ms is 0.0; expected a positive"),
        (lambda line: line.replace(",9.5,", ",,"), "p20_ms is ''; a row with a time has one"),
        (lambda line: line.replace(",11,", ",,"), "p80_ms is ''; a row with a time has one"),
        (lambda line: line.replace(",flops,", ",,"), "bound is ''; a row with a time has one"),
        (lambda line: line.replace(",0.8,", ",,"), "fraction is ''; a row with a time has one"),
        (lambda line: line.replace(",ok,", "," + "x" * 200_000 + ","), "field larger than"),
    ],
)
def test_a_damaged_line_is_named(change, message, tmp_path, row):
    table.add(tmp_path, [row, replace(row, provider="eager")])
    file = tmp_path / "results.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], change(lines[2])]) + "\n")
    with pytest.raises(ValueError, match=rf"results\.csv, line 3: .*{re.escape(message)}"):
        table.read(tmp_path)


def test_what_is_no_text_is_named(tmp_path, row):
    table.add(tmp_path, [row, replace(row, provider="eager")])
    file = tmp_path / "results.csv"
    file.write_bytes(file.read_bytes().replace(b"eager", b"\xff\xfe"))
    with pytest.raises(ValueError, match=r"results\.csv, line 3: is not text"):
        table.read(tmp_path)


def test_a_file_is_no_folder(tmp_path, row):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out: .*file is not a folder"):
            table.read(folder)
        with pytest.raises(ValueError, match=r"--out: .*file is not a folder"):
            table.add(folder, [row])


def test_new_sources_change_the_commit_and_results_do_not(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    for file in ("csrc/a.cpp", "benchmarks/run.py", "benchmarks/results/results.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (tmp_path / "benchmarks" / "results" / "results.csv").write_text("2\n")
    (tmp_path / "benchmarks" / "results" / "new.png").write_text("")
    (tmp_path / "notes").write_text("")
    assert re.fullmatch(r"[0-9a-f]{10}", table._commit_of(tmp_path))
    (tmp_path / "csrc" / "new.cpp").write_text("")
    assert re.fullmatch(r"[0-9a-f]{10}\+", table._commit_of(tmp_path))


def test_the_commit_is_known_in_a_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert re.fullmatch(r"[0-9a-f]{10}\+?", table.commit())


def test_the_last_run_counts(row):
    newer = replace(row, date="2000-01-02", run="20000102T000000Z-1", median_ms=7.0)
    assert plot.latest([newer, row]) == [newer], "by time, not by place in the file"
    other = replace(newer, weights="others")
    assert plot.latest([row, newer, other]) == [newer, other]


def test_rows_of_two_runs_are_not_mixed(tmp_path, row):
    eager = replace(row, provider="eager", median_ms=30.0)
    newer = replace(row, run="20000101T000001Z-1", median_ms=1.0)
    # On the same day and commit; the newer run has nothing to compare ours with.
    assert plot.latest([row, eager, newer]) == [row, eager]
    both = [newer, replace(eager, run=newer.run, median_ms=2.0)]
    assert plot.latest([row, eager, *both]) == both
    # In the newest run ours is wrong: its older time is not shown.
    wrong = [replace(newer, status="wrong", median_ms=None), both[1]]
    assert plot.latest([row, eager, *wrong]) == wrong
    table.add(tmp_path, [row, replace(eager, run=newer.run)])
    assert "| shift_conv_block" not in plot.readme_section(tmp_path, tmp_path)


def test_the_number_of_threads_with_the_most_rows_is_drawn(tmp_path, rows):
    more = [replace(row, threads=8, median_ms=row.median_ms / 8) for row in rows[:2]]
    table.add(tmp_path, [*more, *rows])
    text = plot.readme_section(tmp_path, tmp_path)
    assert "Abacus, 2 cores, 2 threads, " in text
    assert text.count("| shift_conv_block") == 1


def test_the_readme_says_what_was_not_measured(tmp_path, row):
    eager = replace(row, provider="eager", median_ms=30.0, memory_mb=None, other_load=0.5)
    openvino = replace(
        row, op="elan_x4", provider="openvino", median_ms=20.0, versions="torch 0.0, openvino 3"
    )
    table.add(tmp_path, [row, eager, replace(row, op="elan_x4", memory_mb=None), openvino])
    text = plot.readme_section(tmp_path, tmp_path)
    assert "| shift_conv_block 1x60x180x320 (busy machine) | 10 " in text
    assert "| 14 / - |" in text
    assert "| elan_x4 1x60x180x320 | 10 " in text
    assert "| - / 14 |" in text
    assert "2 threads, torch 0.0, openvino 3; measured 2000-01-01 at 0123456789:" in text


def test_weights_other_than_the_shipped_ones_are_named(row):
    network = replace(row, op="elan_light_x4", shape="1x3x8x8", weights="elan_light_x4")
    assert plot._label(network) == "elan_light_x4 1x3x8x8"
    assert plot._label(replace(network, weights="a.pth")) == "elan_light_x4 1x3x8x8 a.pth"
    assert plot._label(row) == "shift_conv_block 1x60x180x320"


def test_the_roofline_is_of_a_warm_cache(row):
    pytest.importorskip("matplotlib")
    assert plot._roofline([replace(row, cache="cold")], "Abacus") is None
    assert plot._roofline([replace(row, cache="hot")], "Abacus") is not None


def test_sizes_are_of_networks(row):
    pytest.importorskip("matplotlib")
    assert plot._sizes([replace(row, shape="1x3x8x8")], "Abacus") is None


def test_charts(tmp_path, rows):
    pytest.importorskip("matplotlib")
    table.add(tmp_path / "a" / "results", rows)
    files = plot.draw(tmp_path / "a" / "results")
    names = {file.name for file in files}
    assert names == {
        f"{chart}-abacus-2-cores.{suffix}"
        for chart in ("speedup", "roofline", "sizes")
        for suffix in ("png", "svg")
    }
    speedup = (tmp_path / "a" / "results" / "speedup-abacus-2-cores.svg").read_text()
    for colour in re.findall(r"#([0-9a-fA-F]{6})\b", speedup):
        assert colour[:2] == colour[2:4] == colour[4:], "not readable in black and white"
    before = {file: file.read_bytes() for file in files}
    plot.draw(tmp_path / "a" / "results")
    assert all(file.read_bytes() == content for file, content in before.items())


def test_the_readme_is_renewed_between_its_markers(tmp_path, rows):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    begin, end = plot.MARKERS
    readme.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nThe rest.\n")
    folder = tmp_path / "benchmarks" / "results"
    table.add(folder, rows)
    assert readme not in plot.draw(folder), "another checkout's"
    assert readme in plot.draw(folder, tmp_path)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nThe rest.\n")
    assert (
        "| shift_conv_block 1x60x180x320 | 10 (9.5 .. 11) | 30 eager | 3.00 | 80% flops | 14 / 60 |"
        in text
    )
    assert "![speedup](benchmarks/results/speedup-abacus-2-cores.png)" in text
    assert readme not in plot.draw(folder, tmp_path), "nothing has changed"
    other = tmp_path / "benchmarks" / "mine"
    table.add(other, rows[:2])
    assert readme not in plot.draw(other, tmp_path)


def test_the_readme_shows_the_current_table():
    """Its figures are generated (`sr-kernels bench --plot`), never typed."""
    readme, folder = ROOT / "README.md", ROOT / "benchmarks" / "results"
    if not (folder / table.FILE_NAME).exists():
        pytest.skip("this is not a checkout")
    text = readme.read_text()
    begin, end = (text.index(marker) for marker in plot.MARKERS)
    shown = text[begin + len(plot.MARKERS[0]) + 1 : end]
    assert shown == plot.readme_section(folder, ROOT)


def test_times_are_written_with_four_digits_and_no_exponent():
    times = (0.012345, 12.345, 9999.4, 9999.6, 33328.0, None)
    assert [table.digits(t) for t in times] == ["0.01235", "12.35", "9999", "10000", "33328", ""]
