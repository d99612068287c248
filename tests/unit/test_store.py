"""The run folder: finished lines survive crashes, full disks and second runs; damage is said, not guessed around."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxbench import rows
from ctxbench.cell import Cell
from ctxbench.errors import EnvironmentUnusable, Exit, RunFolderError
from ctxbench.rows import Forecast, Latency, Row, row_for
from ctxbench.run.store import JOURNAL, LOCK, ROWS, RUN, Entry, Store, new_folder, read_rows, read_run
from ctxbench.run.tasks import Outcome


def row(number: int, status: str = "ok", **fields: Any) -> Row:
    return row_for(Cell(method="m", impl="i", seq_len=number), status, **fields)


def entry(number: int, process: int = 0) -> Entry:
    cell = Cell(method="m", impl="i", seq_len=number).key
    return Entry(cell=cell, kind="time", process=process, outcome=Outcome(status="ok", elapsed_s=0.5))


_TEXT = st.text(max_size=20)
_SECONDS = st.floats(0, 1e6, allow_nan=False)
_PARAMS = st.dictionaries(_TEXT, st.one_of(st.integers(0, 2**40), _SECONDS, _TEXT, st.booleans()), max_size=3)
_LATENCY = st.builds(
    Latency,
    median=_SECONDS,
    low=_SECONDS,
    high=_SECONDS,
    samples=st.lists(st.lists(_SECONDS, max_size=4), max_size=3),
    n_processes=st.integers(0, 3),
)
_ROWS = st.builds(
    Row,
    cell=_TEXT,
    status=st.sampled_from(rows.STATUSES),
    reason=_TEXT,
    method=_TEXT,
    impl=_TEXT,
    mode=_TEXT,
    device=_TEXT,
    dtype=_TEXT,
    batch_size=st.integers(1, 2**30),
    seq_len=st.integers(1, 2**40),
    d_model=st.integers(1, 2**20),
    num_heads=st.integers(1, 64),
    num_layers=st.integers(1, 64),
    d_ff=st.integers(0, 2**20),
    causal=st.booleans(),
    position=_TEXT,
    memory=st.none() | st.integers(0, 2**40),
    params=_PARAMS,
    latency_s=st.none() | _LATENCY,
    forecast=st.none() | st.builds(Forecast, latency_s=st.none() | _SECONDS),
    warnings=st.lists(_TEXT, max_size=3),
    detail=_TEXT,
)


@given(_ROWS)
def test_a_row_survives_its_line(original: Row) -> None:
    line = rows.encode(original)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert rows.decode(line) == original


def test_rows_and_children_are_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Store.open(folder) as store:
        store.write_header({"suite": "quick"})
        store.append_row(row(1))
        store.append_outcome(entry(1))
        store.append_outcome(entry(1, process=1))
    with Store.open(folder) as store:
        assert list(store.rows.values()) == [row(1)]
        assert [found.process for found in store.outcomes[row(1).cell]] == [0, 1]
        assert store.header["suite"] == "quick"
    assert read_run(folder)["schema"] == "ctxbench.run/1"
    assert read_rows(folder) == [row(1)]


def test_the_last_row_of_a_cell_counts_and_compacting_leaves_one_a_cell(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        for found in (row(1, "oom"), row(2), row(3), row(1)):
            store.append_row(found)
        assert [found.status for found in read_rows(store.folder)] == ["ok", "ok", "ok"]
        store.compact([row(2).cell, row(1).cell, row(9).cell])
        assert (store.folder / ROWS).read_bytes() == rows.encode(row(2)) + rows.encode(row(1))
        store.append_row(row(4))  # goes to the new file
    assert [found.seq_len for found in read_rows(tmp_path / "run")] == [2, 1, 4]


def test_forgetting_a_cell_drops_its_children_only(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        for number in (1, 2):
            store.append_outcome(entry(number))
        store.forget([row(1).cell])
    with Store.open(tmp_path / "run") as store:
        assert list(store.outcomes) == [row(2).cell]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 5), cut=st.integers(0, 5000), name=st.sampled_from([ROWS, JOURNAL]))
def test_after_a_cut_at_any_byte_every_whole_line_is_there_and_work_continues(
    tmp_path_factory: pytest.TempPathFactory, count: int, cut: int, name: str
) -> None:
    folder = tmp_path_factory.mktemp("cut") / "run"
    with Store.open(folder) as store:
        for number in range(1, count + 1):
            store.append_row(row(number))
            store.append_outcome(entry(number))
    path = folder / name
    content = path.read_bytes() if path.exists() else b""
    cut = min(cut, len(content))
    if path.exists():
        os.truncate(path, cut)
    whole = content[:cut].count(b"\n") + (content[cut : cut + 1] == b"\n")  # only the newline may be missing
    with Store.open(folder) as store:
        assert len(store.rows if name == ROWS else store.outcomes) == whole
        assert bool(store.notes) != _ends_whole(content, cut)
        store.append_row(row(99))
        store.append_outcome(entry(99))
    with Store.open(folder) as store:
        assert not store.notes
        assert len(store.rows if name == ROWS else store.outcomes) == whole + 1


def _ends_whole(content: bytes, cut: int) -> bool:
    return cut == 0 or content[cut - 1 : cut] == b"\n" or content[cut : cut + 1] == b"\n"


def test_a_torn_last_row_is_removed_with_a_note_and_readers_ignore_it(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        store.append_row(row(1))
    with (tmp_path / "run" / ROWS).open("ab") as file:
        file.write(rows.encode(row(2))[:40])
    assert read_rows(tmp_path / "run") == [row(1)]
    with Store.open(tmp_path / "run") as store:
        assert "incomplete and has been removed" in store.notes[0]
    assert (tmp_path / "run" / ROWS).read_bytes() == rows.encode(row(1))


def test_damage_before_the_last_row_is_refused_with_its_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ROWS).write_bytes(rows.encode(row(1)) + b"{broken\n" + rows.encode(row(2)))
    with pytest.raises(RunFolderError, match=f"line 2 of .*{ROWS} is damaged"):
        read_rows(folder)
    with pytest.raises(RunFolderError, match="--fresh"):
        Store.open(folder)


def test_rows_of_another_schema_are_refused_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    line = rows.encode(msgspec.structs.replace(row(1), schema="ctxbench.row/9"))
    (folder / ROWS).write_bytes(line)
    for attempt in (read_rows, Store.open):
        with pytest.raises(RunFolderError, match=r"'ctxbench\.row/9'\n  accepted: ctxbench\.row/1"):
            attempt(folder)
    assert (folder / ROWS).read_bytes() == line


def test_a_run_json_of_another_schema_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / RUN).write_text('{"schema": "ctxbench.run/9"}')
    with pytest.raises(RunFolderError, match=r"ctxbench\.run/9"):
        Store.open(folder)
    (folder / RUN).write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        Store.open(folder)


def test_fresh_starts_over_even_where_the_old_rows_are_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ROWS).write_text("{broken\n{broken\n")
    with Store.open(folder, fresh=True) as store:
        assert not store.rows


def test_a_second_run_in_the_folder_is_refused_with_the_process(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run"), pytest.raises(RunFolderError, match=f"process {os.getpid()}"):
        Store.open(tmp_path / "run")
    Store.open(tmp_path / "run").close()


def test_the_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from ctxbench.run.store import Store\n"
    code += "Store.open(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert (tmp_path / "run" / LOCK).read_text()
    Store.open(tmp_path / "run").close()


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"not a run folder: it holds thesis\.tex"):
        Store.open(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(RunFolderError, match="not a run folder"):
        read_rows(tmp_path)


def test_a_full_disk_is_said_clearly_and_keeps_what_is_finished(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        store.append_row(row(1))
        real = tmp_path / "run" / ROWS
        real.rename(tmp_path / "kept")
        store.close()
        real.symlink_to("/dev/full")
        with pytest.raises(EnvironmentUnusable, match=r"no space left .*\n.*every finished row is kept") as raised:
            store.append_row(row(2))
        assert raised.value.exit_code == Exit.ENVIRONMENT
        assert row(2).cell not in store.rows


def test_a_disk_that_takes_half_a_line_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(tmp_path / "run") as store:
        store.append_row(row(1))
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
        with pytest.raises(EnvironmentUnusable, match="no space left"):
            store.append_row(row(2))
        monkeypatch.undo()
        assert (tmp_path / "run" / ROWS).read_bytes() == rows.encode(row(1))
        store.append_row(row(2))
    assert len(read_rows(tmp_path / "run")) == 2


def test_a_full_disk_while_replacing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store.open(tmp_path / "run") as store:
        store.append_row(row(1, "oom"))
        store.append_row(row(1))
        before = (tmp_path / "run" / ROWS).read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentUnusable, match="no space left"):
            store.compact([row(1).cell])
        with pytest.raises(EnvironmentUnusable, match="no space left"):
            store.write_header({})
    assert (tmp_path / "run" / ROWS).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK, ROWS]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_folder_is_an_unusable_environment(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(code, os.strerror(code))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(EnvironmentUnusable, match=r"cannot write to .*\n.*--out"):
        Store.open(tmp_path / "run")


def test_a_folder_where_none_can_be_made_is_an_unusable_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnusable, match="cannot write to"):
        Store.open(tmp_path / "file" / "run")


def test_names_of_new_folders_differ_and_hold_no_odd_characters(tmp_path: Path) -> None:
    names = {new_folder(tmp_path, "../my suite.toml").name for _ in range(20)}
    assert len(names) == 20
    assert all(name.split("-", 1)[1].startswith("my-suite-") for name in names)
