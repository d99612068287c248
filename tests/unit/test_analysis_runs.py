"""Reading run folders, whole and damaged."""

from __future__ import annotations

import json

import pytest

from ctxbench.analysis.runs import read_run, read_runs
from ctxbench.cell import Cell
from ctxbench.errors import Exit, RunFolderError
from ctxbench.rows import encode, row_for

ROWS = [row_for(Cell(method="dense", impl="blocked", seq_len=length), "ok") for length in (1024, 2048)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(encode, ROWS)))
    (tmp_path / "run.json").write_text(json.dumps({"suite": "quick"}))
    return tmp_path


def test_a_whole_run_is_read_without_warnings(folder):
    run = read_run(folder)
    assert list(run.rows) == ROWS
    assert run.info == {"suite": "quick"}
    assert run.warnings == ()


def test_a_truncated_last_line_is_left_out_with_a_warning(folder):
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(encode(ROWS[0])[:100])
    run = read_run(folder)
    assert len(run.rows) == 2
    assert "truncated" in run.warnings[0]


def test_the_last_row_of_a_cell_counts(folder):
    again = row_for(Cell(method="dense", impl="blocked", seq_len=1024), "oom", "too large")
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(encode(again))
    assert [row.status for row in read_run(folder).rows] == ["ok", "oom"]


def test_damage_before_the_last_line_names_the_line(folder):
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(lines[0][:50] + b"\n" + lines[1])
    with pytest.raises(RunFolderError, match="line 1 is damaged"):
        read_run(folder)


def test_another_schema_is_refused_with_both_names(folder):
    text = (folder / "rows.jsonl").read_text().replace("ctxbench.row/1", "ctxbench.row/9")
    (folder / "rows.jsonl").write_text(text)
    with pytest.raises(RunFolderError, match=r"'ctxbench.row/9'\n  accepted: 'ctxbench.row/1'"):
        read_run(folder)


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["empty", "blank-lines"])
def test_a_run_without_rows_says_how_to_continue(folder, content):
    (folder / "rows.jsonl").write_text(content)
    with pytest.raises(RunFolderError, match=r"(?s)no rows.*--resume"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "found"), [("absent", "no such path"), ("", "a folder without rows.jsonl"), ("file", "a file")]
)
def test_what_is_not_a_run_folder_is_named(tmp_path, name, found):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=found) as error:
        read_run(tmp_path / name)
    assert error.value.exit_code == Exit.USAGE


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["missing", "malformed", "list"])
def test_a_run_without_a_usable_description_is_read_with_a_warning(folder, content):
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_text(content)
    run = read_run(folder)
    assert len(run.rows) == 2
    assert "environment of this run is unknown" in run.warnings[0]


def test_a_folder_named_twice_is_read_once(folder):
    assert len(read_runs([folder, folder / ".", folder])) == 1
