"""The table of results and what is drawn from it."""

import re
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


def test_the_commit_is_known_in_a_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert re.fullmatch(r"[0-9a-f]{10}\+?", table.commit())


def test_the_last_run_counts(row):
    newer = replace(row, date="2000-01-02", median_ms=7.0)
    gone = replace(row, provider="eager")
    # A provider that the newer run did not have is not compared across runs.
    assert plot.latest([row, gone, newer]) == [newer]


def test_charts(tmp_path, rows):
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
    readme = tmp_path / "README.md"
    begin, end = plot.MARKERS
    readme.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nThe rest.\n")
    folder = tmp_path / "benchmarks" / "results"
    table.add(folder, rows)
    assert readme in plot.draw(folder)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nThe rest.\n")
    assert (
        "| shift_conv_block 1x60x180x320 | 10 (9.5 .. 11) | 30 eager | 3.00 | 80% flops | 14 / 60 |"
        in text
    )
    assert "![speedup](benchmarks/results/speedup-abacus-2-cores.png)" in text
    assert readme not in plot.draw(folder), "nothing has changed"


def test_the_readme_shows_the_current_table():
    """Its figures are generated (`sr-kernels bench --plot`), never typed."""
    readme, folder = ROOT / "README.md", ROOT / "benchmarks" / "results"
    if not (folder / table.FILE_NAME).exists():
        pytest.skip("this is not a checkout")
    text = readme.read_text()
    begin, end = (text.index(marker) for marker in plot.MARKERS)
    shown = text[begin + len(plot.MARKERS[0]) + 1 : end]
    assert shown == plot.readme_section(folder, ROOT)
