"""Every law of the conformance kit, on every registered method."""

from __future__ import annotations

import pytest

from ctxbench.registry import discover
from ctxbench.testing import laws_for

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
