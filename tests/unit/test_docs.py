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


def test_every_column_status_and_warning_of_the_report_is_explained():
    from ctxbench.reports.tables import BRIEF, MORE
    from ctxbench.rows import STATUSES
    from ctxbench.text import Warn

    text = (GENERATE.parent / "measuring.md").read_text()
    table = text[text.index("### Table") : text.index("### Warnings")]
    columns = [title for name, title in {**BRIEF, **MORE}.items() if name not in ("method", "impl", "status")]
    assert [title for title in columns if title not in table] == []
    assert [name for name in STATUSES if f"`{name}`" not in text] == []
    assert [kind.code for kind in Warn if f"`{kind.code}`" not in text[text.index("### Warnings") :]] == []
