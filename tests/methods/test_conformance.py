"""Every law of the conformance kit, on every registered method."""

from __future__ import annotations

import pytest

from ctxbench.method import POSITIONS, Dims
from ctxbench.registry import discover
from ctxbench.testing import laws_for
from ctxbench.testing.forms import coverage, forms, full

METHODS = list(discover())
PAIRS = [pair for method in METHODS for pair in laws_for(method)]


@pytest.mark.parametrize(("law", "case"), PAIRS, ids=str)
def test_law(law, case) -> None:
    law(case)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_our_methods_claim_what_the_laws_can_check(method) -> None:
    """Direction, receptive field and closed forms are optional for a plug-in, not for the methods of this package."""
    assert method.causal
    assert method.reach is not None
    for mode in method.modes:
        cost = method.cost_of(method.oracle, mode, method.causal[0], method.positions[0], method.params())
        assert cost is not None
        assert cost.peak_bytes is not None, mode


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_native_says_why_it_has_not_a_mode_that_blocked_has(method) -> None:
    native, dims, params = method.impl("native"), Dims(64, position=method.positions[0]), method.params()
    dims = dims.replace(causal=method.causal[0], num_layers=method.fewest_layers(params))
    for mode in set(method.modes) - set(native.modes or method.modes):
        assert method.impl_support(method.impl("blocked"), mode, dims, params, "cpu", "fp32")
        reason = method.impl_support(native, mode, dims, params, "cpu", "fp32").reason
        assert f"not {mode}: " in reason
        assert "blocked" in reason


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_form_is_tried_or_says_why_not(method) -> None:
    """Settings, directions and positions, times impls: the laws are asked, or there is a reason."""
    lines = coverage(method)
    assert {line.form for line in lines} >= {form.label for form in forms(method)}
    assert all(line.laws or line.reason for line in lines)
    tried = {line.form for line in lines if line.laws and line.impl == method.oracle}
    refused = {line.form for line in lines if line.impl == "all"}
    assert tried | refused >= {form.label for form in full(method, forms(method))}
    oracle = {mode for line in lines if line.impl == method.oracle and line.laws for mode in line.modes}
    assert oracle == set(method.modes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_position_is_taken_or_refused_with_its_reason(method) -> None:
    assert set(POSITIONS) - set(method.positions) == set(method.without_positions) - set(method.positions)
    assert all(len(reason.split()) > 5 for reason in method.without_positions.values())
