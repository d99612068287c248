"""What is generated from the registry is what the registry says now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GENERATE = Path(__file__).parents[2] / "docs" / "generate.py"


def test_the_method_table_and_page_are_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(GENERATE), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


def test_text_cannot_break_a_table():
    cell = runpy.run_path(str(GENERATE))["cell"]
    assert cell("a|b\nc") == r"a\|b c"
