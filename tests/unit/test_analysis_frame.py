"""Rows as a frame, and its split into views."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxbench.analysis.frame import fastest, to_frame, views
from ctxbench.analysis.printable import printable
from ctxbench.analysis.runs import Run
from ctxbench.cell import Cell
from ctxbench.rows import Flops, Latency, row_for


def row(method="dense", impl="blocked", seq_len=1024, seconds=1.0, status="ok", **cell):
    latency = Latency(median=seconds, low=seconds, high=seconds, samples=[[seconds]], n_processes=1)
    measured = {"latency_s": latency} if status == "ok" else {}
    return row_for(Cell(method=method, impl=impl, seq_len=seq_len, **cell), status, **measured)


def frame(*rows):
    return to_frame([Run(Path("run"), rows)])


def test_absent_numbers_stay_absent_and_counts_stay_exact():
    large = 2**53 + 1  # a float cannot hold it
    with_flops = row_for(Cell(method="dense", impl="blocked", seq_len=1024), "ok", flops=Flops(formula=large))
    table = frame(with_flops, row(seq_len=2048, status="oom"))
    assert table["flops_formula"].iloc[0] == large
    assert table["flops_formula"].isna().iloc[1]
    assert table["latency_s"].isna().all()


def test_rows_that_differ_in_length_method_and_impl_are_one_view():
    table = frame(row(seq_len=1024), row(seq_len=2048), row(impl="reference"), row(method="rmt", num_layers=2))
    assert [view.label for view in views(table)] == [""]


def test_a_mode_that_varies_within_a_method_makes_a_view_each_the_fullest_first():
    table = frame(row(), row(mode="train", status="oom"), row(seq_len=2048))
    assert [view.label for view in views(table)] == ["mode forward", "mode train"]
    assert [len(view.frame) for view in views(table)] == [2, 1]


def test_a_method_without_a_memory_size_is_in_the_view_of_every_memory_size():
    table = frame(row(), *(row(method="bank", memory=size, params={"slots": size}) for size in (128, 256)))
    found = {view.label: sorted(view.frame["series"]) for view in views(table)}
    both = ["bank / blocked", "dense / blocked"]
    assert found == {"memory 128 tokens": both, "memory 256 tokens": both}
    assert len(views(table, across_memory=True)) == 1


def test_parameters_beyond_the_memory_size_name_the_series():
    table = frame(*(row(method="sparse", memory=128, params={"window": 128, "heads": n}) for n in (1, 2)))
    assert list(table["series"]) == ["sparse / blocked (heads=1)", "sparse / blocked (heads=2)"]


def test_the_fastest_impl_is_judged_at_the_longest_measured_length():
    table = frame(
        row(impl="reference", seconds=1), row(impl="blocked", seconds=2),
        row(impl="reference", seq_len=2048, seconds=9), row(impl="blocked", seq_len=2048, seconds=4),
        row(method="none", status="oom"),
    )  # fmt: skip
    assert fastest(table) == {"dense": "dense / blocked", "none": "none / blocked"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("a\u202eb", "ab"), ("a\x00\x1bb", "ab"), ("\u05e2\u05d1", "\u05e2\u05d1"), ("\ud800x", "x")],
    ids=["plain", "override", "control", "hebrew", "surrogate"],
)
def test_only_characters_that_act_are_dropped(text, shown):
    assert printable(text) == shown
