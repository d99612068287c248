"""The ten entries of the source document's table: computed as claimed, as written and true."""

from __future__ import annotations

import pytest

from ctxbench.analysis.audit import NOT_APPLICABLE, VIOLATED
from ctxbench.analysis.audit_table import Size, audit_table
from ctxbench.cost.trace import trace
from ctxbench.registry import discover

N, D, M, W = 512, 128, 256, 64
SIZE = Size(seq_len=N, d_model=D, num_heads=4, memory_size=M, window_size=W)
DOCUMENT = {  # LongContextComplexityAnalyzer.analyze_complexity, line by line
    ("standard_transformer", "memory"): N**2,
    ("standard_transformer", "compute"): N**2 * D,
    ("memory_augmented", "memory"): N * D + M * D,
    ("memory_augmented", "compute"): N * M * D + N**2 * D,
    ("recurrent_transformer", "memory"): N * D + M * D,
    ("recurrent_transformer", "compute"): N * D**2,
    ("hierarchical_attention", "memory"): N * D * 3,
    ("hierarchical_attention", "compute"): N * D * 3,
    ("longformer", "memory"): N * W,
    ("longformer", "compute"): N * W * D,
}


@pytest.fixture(scope="module")
def entries():
    return {(entry.name, entry.quantity): entry for entry in audit_table(discover(), trace, SIZE)}


def test_the_claims_are_the_documents_own_expressions(entries) -> None:
    assert {key: entry.claimed for key, entry in entries.items()} == DOCUMENT


def test_all_but_the_baseline_are_also_counted_as_written(entries) -> None:
    unwritten = {name for (name, _), entry in entries.items() if entry.as_written is None}
    assert unwritten == {"standard_transformer"}


def test_the_sketch_of_a_window_is_quadratic_where_claim_and_method_are_linear(entries) -> None:
    compute = entries["longformer", "compute"]
    assert (compute.claimed_growth, compute.written_growth, compute.true_growth) == ("O(T)", "O(T^2)", "O(T)")
    assert compute.as_written == 4 * N**2 * D + 24 * N * D**2  # both score products, four projections, an FFN of 4 d


def test_a_full_branch_makes_the_hierarchy_quadratic(entries) -> None:
    compute = entries["hierarchical_attention", "compute"]
    assert compute.verdict == VIOLATED
    assert compute.evidence.startswith("grows as O(T^2), not O(T); claims ")


def test_true_compute_of_the_baseline_has_the_linear_part_and_the_factor_of_four(entries) -> None:
    compute = entries["standard_transformer", "compute"]
    assert compute.true == 24 * N * D**2 + 4 * N**2 * D  # bidirectional
    assert compute.ratio == pytest.approx(N**2 * D / compute.true)


def test_a_bank_with_attention_over_the_whole_sequence_is_quadratic(entries) -> None:
    assert entries["memory_augmented", "compute"].true_growth == "O(T^2)"


def test_a_method_that_is_not_installed_leaves_its_entries_open() -> None:
    only = [method for method in discover() if method.name == "dense"]
    entries = audit_table(only, trace, SIZE)
    open_ = [entry for entry in entries if entry.verdict == NOT_APPLICABLE]
    assert len(entries) == 10
    assert len(open_) == 8
    assert all(entry.true is None and "not installed" in entry.evidence for entry in open_)
