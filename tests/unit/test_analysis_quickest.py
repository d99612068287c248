"""Which impl stands for its method."""

from __future__ import annotations

from ctxbench.analysis.quickest import quickest

FAR = {1024: 1.0, 2048: 2.0, 4096: 4.0}


def test_the_fastest_at_the_longest_length_stands_for_its_method():
    assert quickest({"slow": {1024: 1.0, 2048: 9.0}, "fast": {1024: 2.0, 2048: 4.0}}) == "fast"


def test_an_impl_that_a_budget_cut_off_stands_where_it_was_clearly_faster_not_much_before():
    assert quickest({"slow": FAR, "fast": {1024: 0.8, 2048: 1.6}}) == "fast"
    assert quickest({"slow": FAR, "fast": {1024: 0.8, 2048: 1.9}}) == "slow"
    assert quickest({"slow": FAR, "fast": {1024: 0.5}}) == "slow"


def test_impls_without_a_common_length_are_judged_by_reach():
    assert quickest({"short": {2048: 0.1}, "long": {4096: 9.0}}) == "long"
