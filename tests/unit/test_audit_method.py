"""The audit of a method: wrong declarations are caught by the term that is meant for them, right ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from ctxbench.analysis.audit import (
    FLOPS_GROWTH,
    HOLDS,
    NOT_APPLICABLE,
    NOT_CLAIMED,
    PEAK_GROWTH,
    VERDICTS,
    VIOLATED,
    judge_growth,
    slope_at_end,
    violated,
)  # fmt: skip
from ctxbench.analysis.audit_method import TERMS, audit_method
from ctxbench.cost.trace import trace
from ctxbench.registry import discover, import_plugin
from ctxbench.testing import LAWS, check_method

claims = import_plugin(str(Path(__file__).parents[1] / "plugins" / "claims.py"))


def audit(method) -> dict[str, object]:
    return {verdict.term: verdict for verdict in audit_method(method, check_method(method).findings, trace)}


def test_there_are_more_pairs_than_a_coincidence_explains() -> None:
    assert len(claims.PAIRS) >= 12


@pytest.mark.parametrize("flaw", claims.PAIRS)
def test_a_wrong_declaration_is_caught_and_its_right_twin_is_not(flaw: str) -> None:
    wrong, twin, term = claims.PAIRS[flaw]
    caught, passed = audit(wrong), audit(twin)
    assert caught[term].verdict == VIOLATED
    assert caught[term].evidence
    assert [verdict.term for verdict in violated(passed.values())] == []
    assert passed[term].verdict == HOLDS or (term in ("growth of peak memory", "growth of FLOPs"))


def test_a_hidden_square_is_shown_with_the_bytes_and_the_slope() -> None:
    verdict = audit(claims.PAIRS["hidden T x T temporary"][0])[PEAK_GROWTH]
    assert verdict.claimed == "O(T), T^1.00 at most"
    assert float(verdict.seen.removeprefix("T^")) == pytest.approx(1.9, abs=0.15)
    assert "at 4k" in verdict.evidence
    assert "at 8k" in verdict.evidence


def test_numbers_stand_beside_their_formula() -> None:
    verdicts = audit(claims.right["mixer"])
    flops = 2 * 8192 * 128 * 128
    assert verdicts["FLOPs"].claimed.endswith(f"{flops:,} at 8k")
    assert verdicts["FLOPs"].seen == f"{flops:,}"
    assert verdicts["parameters"].seen == f"{128 * 128 + 128:,}"


def test_a_formula_that_is_right_at_tiny_sizes_alone_is_caught() -> None:
    """A branch that no tiny case reaches: the traced count at 8k is compared too."""
    from sympy import Piecewise

    from ctxbench.cost.symbols import T

    def late(cost, mode):
        return {term: value + Piecewise((0, T < 1000), (1, True)) for term, value in cost.flops.items()}

    method = claims.mixer(claims.flawed.Mixer, cost=claims.changed(claims.mixer_cost, flops=late))
    assert check_method(method).failures == []
    verdict = audit(method)["FLOPs"]
    assert verdict.verdict == VIOLATED
    assert "at 8k" in verdict.evidence


def test_a_formula_without_an_integer_value_is_a_verdict() -> None:
    from ctxbench.cost.symbols import T

    halves = claims.changed(claims.mixer_cost, flops=lambda cost, mode: {"map": T / 3})
    verdict = audit(claims.mixer(claims.flawed.Mixer, cost=halves))[FLOPS_GROWTH]
    assert verdict.verdict == VIOLATED
    assert "not an integer" in verdict.evidence


def test_what_is_not_declared_is_not_claimed() -> None:
    verdicts = audit(claims.mixer(claims.flawed.Mixer, cost=None, reach=None))
    assert {verdicts[term].verdict for term in ("FLOPs", "receptive field", FLOPS_GROWTH, PEAK_GROWTH)} == {NOT_CLAIMED}
    assert all(verdict.evidence for verdict in verdicts.values())


def test_a_method_that_cannot_be_built_is_a_verdict_and_no_traceback() -> None:
    def build(*_):
        raise ValueError("planted in build")

    verdicts = audit(claims.mixer(claims.flawed.Mixer, build=build))
    assert verdicts["shapes"].verdict == VIOLATED
    assert "planted in build" in verdicts["shapes"].evidence
    assert verdicts[FLOPS_GROWTH].verdict == NOT_APPLICABLE
    assert "planted in build" in verdicts[FLOPS_GROWTH].evidence


def test_a_description_that_raises_is_a_verdict_too() -> None:
    def support(*_):
        raise ValueError("planted in support")

    method = claims.mixer(claims.flawed.Mixer, support=support)
    (verdict,) = audit_method(method, check_method(method).findings, trace)
    assert verdict.verdict == VIOLATED
    assert "planted in support" in verdict.evidence


def test_every_law_answers_for_one_term() -> None:
    named = [law for laws in TERMS.values() for law in laws]
    assert len(named) == len(set(named))
    assert set(named) <= set(LAWS)


@pytest.mark.parametrize("name", ["dense", "longformer"])
def test_built_in_methods_grow_as_they_declare(name: str) -> None:
    method = discover()[name]
    for impl in ("reference", "blocked"):
        verdicts = {verdict.term: verdict.verdict for verdict in audit_method(method, [], trace, impl)}
        assert verdicts == {FLOPS_GROWTH: HOLDS, PEAK_GROWTH: HOLDS}


def test_verdicts_are_plain_json() -> None:
    verdict = audit(claims.right["mixer"])["FLOPs"]
    assert json.loads(msgspec.json.encode(verdict))["verdict"] in VERDICTS


@pytest.mark.parametrize(
    ("seen", "declared", "limit", "verdict"),
    [
        ([1, 2, 4], [10, 20, 40], 1.0, HOLDS),
        ([1, 4, 16], [10, 20, 40], 1.0, VIOLATED),
        ([1, 2, 4], [10, 40, 160], 2.0, HOLDS),
        ([1, 4, 16], [10, 40, 160], 1.0, HOLDS),  # a ramp that the formula has too
        ([0, 0, 4], [10, 20, 40], 1.0, NOT_APPLICABLE),
    ],
    ids=["as declared", "a square", "slower than declared", "a ramp before the limit", "too few counts"],
)
def test_growth_is_judged_at_the_longest_lengths(seen, declared, limit, verdict: str) -> None:
    assert judge_growth([1024, 2048, 4096], seen, declared, limit)[0] == verdict


def test_the_slope_is_that_of_the_two_longest_lengths_in_any_order() -> None:
    assert slope_at_end([4096, 1024, 2048], [64, 1, 8]) == pytest.approx(3.0)
