"""The claims section: contradictions are open and first, and a page without any says so."""

from __future__ import annotations

import dataclasses
import re

import pytest
from msgspec.structs import replace

from ctxbench.analysis.runs import Run, read_run
from ctxbench.registry import Registry
from ctxbench.reports.page import render
from ctxbench.reports.report import Report
from ctxbench.reports.sections import audit
from ctxbench.rows import Flops, Gate


@pytest.fixture
def run(run_folder) -> Run:
    return read_run(run_folder("tiny"))


def context(*runs: Run) -> dict:
    return audit.context(Report(list(runs), Registry({}, []), "test"))


def contradicted(run: Run) -> Run:
    """The same run, with one FLOP too many in the first row."""
    first = run.rows[0]
    assert first.flops is not None
    flops = Flops(formula=first.flops.formula, counted=(first.flops.counted or 0) + 1)
    return dataclasses.replace(run, rows=(replace(first, flops=flops), *run.rows[1:]))


def section(*runs: Run) -> str:
    page = render(Report(list(runs), Registry({}, []), "test"))
    start = page.index('<section id="audit"')
    return page[start : page.index("</section>", start)]


def test_a_run_without_contradictions_says_so_and_opens_nothing(run) -> None:
    seen = context(run)
    said = r"Of \d+ claims that the rows can answer, \d+ hold and none is contradicted\."
    assert re.fullmatch(said, seen["sentence"])
    assert seen["wrong"] == []
    assert all(any(line[1:]) for line in seen["lines"])  # an impl without numbers is counted, not an empty line
    assert "<details><summary>" in section(run)


def test_a_contradiction_stands_first_with_numbers_and_evidence(run) -> None:
    wrong = contradicted(run)
    seen = context(wrong)
    assert seen["sentence"].endswith("and 1 is contradicted.")
    ((subject, term, claimed, counted, evidence),) = seen["wrong"]
    row = wrong.rows[0]
    assert (subject, term) == (f"{row.method}, {row.impl}, {row.mode}", "FLOPs")
    assert (claimed, counted) == (f"{row.flops.formula:,} FLOP", f"{row.flops.counted:,} FLOP")
    assert "cells agree; the farthest" in evidence
    text = section(wrong)
    assert text.index("Claims that the rows contradict") < text.index("<details open>")


def test_every_impl_and_mode_has_one_mark_a_term(run) -> None:
    seen = context(run)
    assert len(seen["lines"]) == len({(row.method, row.impl, row.mode) for row in run.rows})
    assert all(len(line) == len(seen["head"]) for line in seen["lines"])
    flops = seen["head"].index("FLOPs")
    assert {line[flops] for line in seen["lines"]} == {audit.MARKS["holds"]}


def test_two_runs_are_audited_apart_and_named(run) -> None:
    other = dataclasses.replace(run, folder=run.folder.parent / "other")
    subjects = [line[0] for line in context(run, other)["lines"]]
    assert len(subjects) == 2 * len(context(run)["lines"])
    assert sum(subject.endswith(", other") for subject in subjects) == len(subjects) / 2


def test_a_declared_defect_is_neither_a_contradiction_nor_a_check_mark(run) -> None:
    gate = Gate(ok=True, probes={"causality": "failed"}, message="fails as declared: causality")
    seen = context(dataclasses.replace(run, rows=tuple(replace(row, gate=gate) for row in run.rows)))
    assert seen["wrong"] == []
    assert {line[seen["head"].index("causality")] for line in seen["lines"]} == {"defect"}


def test_rows_without_numbers_leave_a_sentence(run) -> None:
    bare = dict.fromkeys(("latency_s", "flops", "peak_bytes", "state_bytes", "num_parameters", "gate"))
    empty = dataclasses.replace(run, rows=tuple(replace(row, **bare) for row in run.rows))
    assert context(empty)["sentence"] == "The rows hold no numbers that could be held against a claim."


def test_hostile_names_are_escaped(run_folder) -> None:
    text = section(read_run(run_folder("hostile")))
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "<img" not in text
