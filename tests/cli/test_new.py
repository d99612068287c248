"""``ctxbench new``: a folder that passes ``ctxbench check`` as it is written, and a document whose code works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "plugins.md"
FILES = {"README.md", "__init__.py", "cost.py", "layer.py", "params.py", "reference.py"}


@pytest.mark.parametrize("source", [None, "dense"], ids=["template", "from dense"])
def test_the_folder_passes_its_own_check(ctxbench, tmp_path: Path, source: str | None) -> None:
    made = ctxbench("new", "fresh_idea", "--out", tmp_path, *(["--from", source] if source else []))
    folder = tmp_path / "fresh_idea"
    assert made.code == 0
    assert f"ctxbench check fresh_idea --plugin {folder}" in made.out
    assert {path.name for path in folder.iterdir()} >= FILES | {"test_fresh_idea.py"}
    everything = "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    assert "my_method" not in everything
    assert "My method" not in everything
    assert f"implementations.{source}" not in everything
    checked = ctxbench("check", "fresh_idea", "--plugin", folder, "-q")
    assert checked.code == 0, checked.out


def test_its_test_file_runs_under_pytest(ctxbench, tmp_path: Path) -> None:
    ctxbench("new", "fresh_idea", "--out", tmp_path, "-q")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "causality", "--rootdir", "."],
        capture_output=True, text=True, cwd=tmp_path / "fresh_idea", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_json_names_what_was_written(ctxbench, tmp_path: Path) -> None:
    written = ctxbench("new", "fresh_idea", "--out", tmp_path, "--json").json
    assert written["path"] == str(tmp_path / "fresh_idea")
    assert set(written["files"]) == {*FILES, "test_fresh_idea.py"}


@pytest.mark.parametrize("name", ["Big", "two words", "../up", "9lives", "class", "a" * 41, "", "dash-ed"])
def test_a_malformed_name_is_refused(ctxbench, tmp_path: Path, name: str) -> None:
    result = ctxbench("new", "--out", tmp_path, "--", name)
    assert result.code == 2
    assert "malformed name" in result.err
    assert "accepted: a lower-case identifier" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_is_refused(ctxbench, tmp_path: Path) -> None:
    result = ctxbench("new", "dense", "--out", tmp_path)
    assert result.code == 2
    assert "a method 'dense' exists already" in result.err


@pytest.mark.parametrize("name", ["json", "torch"])
def test_the_name_of_a_module_is_refused(ctxbench, tmp_path: Path, name: str) -> None:
    result = ctxbench("new", name, "--out", tmp_path)
    assert result.code == 2
    assert f"there is a Python module {name!r} already" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_never_written_into(ctxbench, tmp_path: Path) -> None:
    kept = tmp_path / "fresh_idea" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    result = ctxbench("new", "fresh_idea", "--out", tmp_path)
    assert result.code == 2
    assert "exists already" in result.err
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


def test_a_source_that_does_not_exist_gets_a_suggestion(ctxbench, tmp_path: Path) -> None:
    result = ctxbench("new", "fresh_idea", "--from", "dens", "--out", tmp_path)
    assert result.code == 2
    assert "did you mean 'dense'" in result.err


def test_a_place_that_cannot_be_written_is_an_environment_error(ctxbench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = ctxbench("new", "fresh_idea", "--out", tmp_path / "file" / "below")
    assert result.code == 5
    assert "cannot write" in result.err


def blocks(language: str, document: Path = DOCUMENT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(("document", "name"), [(DOCUMENT, "gated"), (DOCUMENT.parents[1] / "README.md", "mine")])
def test_the_ten_lines_of_the_documents_are_working_plugins(
    ctxbench, tmp_path: Path, document: Path, name: str
) -> None:
    code = blocks("python", document)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    plugin = tmp_path / f"{name}.py"
    plugin.write_text(code)
    result = ctxbench("check", name, "--plugin", plugin)
    assert result.code == 0, result.out


def test_every_python_block_of_the_document_parses() -> None:
    for code in blocks("python"):
        arguments = re.match(r"\w+=", code)  # of a call; an assignment has spaces
        compile(f"dict({code})" if arguments else code, DOCUMENT.name, "exec")


def test_the_document_names_every_file_that_new_writes(ctxbench, tmp_path: Path) -> None:
    written = ctxbench("new", "mine", "--out", tmp_path, "--json").json["files"]
    assert all(f"`{name}`" in DOCUMENT.read_text() for name in written)
