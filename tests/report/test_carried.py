"""A run that decodes or streams says in tables what a token costs after a context; no other run has the section."""

from __future__ import annotations

import re
from pathlib import Path

from ctxbench.analysis.runs import read_run
from ctxbench.registry import Registry
from ctxbench.reports.page import render
from ctxbench.reports.report import Report

from .conftest import HOSTILE, KIB, make_row, write_run

LENGTHS = (KIB, 8 * KIB, 64 * KIB)


def page(folder: Path) -> str:
    return render(Report([read_run(folder)], Registry({}, []), "test", static=True))


def test_a_decoding_run_has_tables_of_time_state_and_peak(tmp_path) -> None:
    rows = [make_row(name, "blocked", length, mode="decode") for name in ("dense", HOSTILE[0]) for length in LENGTHS]
    text = page(write_run(tmp_path / "run", rows))
    section = text[text.index('<section id="carried"') :].partition("</section>")[0]
    assert re.findall(r"<caption>(\w+)", section) == ["Time", "State", "Peak"]
    assert section.count("<td>linear</td>") >= 2  # both states: two vectors a token
    assert "128 MiB" in section
    assert "<script>" not in section


def test_a_run_of_whole_sequences_has_none(run_folder) -> None:
    assert '<section id="carried"' not in page(run_folder("tiny"))
