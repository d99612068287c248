"""Formulas: exact values against SymPy, growth of known forms, slopes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer, Max, Min, Mod, Piecewise, Rational, ceiling, floor, log, sqrt

from ctxbench.cost import Cost, big_o, evaluate, latex, local_slope, total
from ctxbench.cost.compiled import compiled
from ctxbench.cost.model import _exact, free_names, text
from ctxbench.cost.symbols import MEANING, B, C, L, T, bindings, d, e, f, h, param
from ctxbench.errors import CtxbenchError
from ctxbench.method import Dims, Params
from ctxbench.registry import discover

W = param("window")
LETTERS = (B, T, d, W)

leaves = st.sampled_from(LETTERS) | st.integers(-6, 12).map(Integer)


def compound(children):
    two = st.tuples(children, children)
    whole = st.integers(1, 7).map(Integer)
    return st.one_of(
        two.map(lambda p: p[0] + p[1]),
        two.map(lambda p: p[0] * p[1]),
        two.map(lambda p: p[0] - p[1]),
        two.map(lambda p: Min(*p)),
        two.map(lambda p: Max(*p)),
        st.tuples(children, st.integers(0, 3)).map(lambda p: p[0] ** p[1]),
        st.tuples(children, whole).map(lambda p: floor(p[0] / p[1])),
        st.tuples(children, whole).map(lambda p: ceiling(p[0] / p[1])),
        st.tuples(children, whole).map(lambda p: Mod(p[0], p[1])),
        st.tuples(children, children, st.integers(0, 30)).map(lambda p: Piecewise((p[0], p[2] < T), (p[1], True))),
    )


@given(
    st.recursive(leaves, compound, max_leaves=8),
    st.fixed_dictionaries({symbol.name: st.integers(1, 40) for symbol in LETTERS}),
)
def test_exact_evaluation_equals_sympys_substitution(expression, values: dict[str, int]) -> None:
    expected = sympy.sympify(expression).subs({symbol: values[symbol.name] for symbol in LETTERS})
    assert evaluate(expression, values) == int(expected)


def test_no_floating_point_is_involved() -> None:
    assert evaluate(T**7 * (T + 1) / 2, {"T": 10**9 + 7}) == (10**9 + 7) ** 7 * (10**9 + 8) // 2


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (T / 2, "not an integer"),
        (W * T, "'window', which has no value"),
        (sqrt(T), "formulas may use"),
        (log(T), "formulas may use"),
        (Piecewise((T, T > 100)), "no branch"),
    ],
    ids=["fraction", "unbound symbol", "root", "logarithm", "no branch"],
)
def test_what_has_no_integer_value_is_an_error(expression, message: str) -> None:
    with pytest.raises(CtxbenchError, match=message):
        evaluate(expression, {"T": 7})


CONDITIONS = {
    "and": sympy.And(T > 3, d < 9),
    "or": sympy.Or(T < 3, d < 9),
    "not": sympy.Not(sympy.Eq(T, 3)),
    "equal": sympy.Eq(Mod(T, 2), 1),
    "at least": T >= 7,
    "at most": T <= 7,
}


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("tokens", [2, 3, 7, 8])
def test_conditions_of_a_piecewise_form(condition, tokens: int) -> None:
    expected = 1 if condition.subs({T: tokens, d: 8}) == sympy.true else 2
    assert evaluate(Piecewise((1, condition), (2, True)), {"T": tokens, "d": 8}) == expected


@pytest.mark.parametrize(
    ("expression", "growth"),
    [
        (Integer(7), "O(1)"),
        (d * d, "O(1)"),
        (12 * d * T + d**2, "O(T)"),
        (4 * d * T**2 + 10**6 * d**2 * T, "O(T^2)"),
        (T * (T + 1) / 2, "O(T^2)"),
        (T**3 + T, "O(T^3)"),
        (T * Min(T, W), "O(T)"),
        (T * Max(T, W), "O(T^2)"),
        (T * floor(T / W) + T * Mod(T, W), "O(T^2)"),
        (Min(T, W), "O(1)"),
        (Integer(0), "O(1)"),
        (Piecewise((T**2, T < 4096), (T, True)), "O(T)"),
    ],
    ids=str,
)
def test_growth_of_known_forms(expression, growth: str) -> None:
    assert big_o(expression) == growth


@pytest.mark.parametrize(
    ("expression", "growth"),
    [
        (T * log(T), "O(T log T)"),
        (log(T), "O(log T)"),
        (T ** Rational(3, 2), "O(T^1.5)"),
        (T * sqrt(T) + T, "O(T^1.5)"),
    ],
    ids=str,
)
def test_growth_of_forms_with_roots_and_logarithms(expression, growth: str) -> None:
    assert big_o(expression) == growth


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 2**29, 10**12, 10**12 - 1])
def test_rounded_roots_and_logarithms_are_exact(tokens: int) -> None:
    assert evaluate(T * ceiling(sqrt(T)), {"T": tokens}) == tokens * (math.isqrt(tokens - 1) + 1)
    assert evaluate(floor(log(T) / log(2)), {"T": tokens}) == tokens.bit_length() - 1


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_the_slope_of_a_power_is_its_exponent(exponent: int) -> None:
    assert local_slope(5 * d * T**exponent, {"T": 1000, "d": 8}) == pytest.approx(exponent, abs=1e-9)


@given(st.integers(64, 2**17), st.sampled_from([64, 256, 1024]))
def test_the_slope_of_a_layer_is_that_of_the_textbook(tokens: int, width: int) -> None:
    """(6 d + 2 T) / (6 d + T), from 24 T d^2 + 4 T^2 d."""
    expression = 24 * T * d**2 + 4 * T**2 * d
    expected = (6 * width + 2 * tokens) / (6 * width + tokens)
    assert local_slope(expression, {"T": tokens, "d": width}) == pytest.approx(expected, abs=1e-4)


def test_the_slope_sees_through_rounding() -> None:
    assert local_slope(T * ceiling(T / W), {"T": 1000, "window": 300}) == pytest.approx(2)
    assert local_slope(floor(T / W) + Mod(T, W), {"T": 1001, "window": 256}) == pytest.approx(1.0)
    assert local_slope(Integer(0), {"T": 10}) == 0.0


def test_totals_names_and_texts() -> None:
    cost = Cost({"a": T}, {"a": T * d, "b": 2 * T * d}, num_parameters=d)
    assert total(cost.flops) == 3 * T * d
    assert total({}) == 0
    assert cost.state_bytes == 0
    assert free_names(T * W + d) == {"T", "window", "d"}
    assert text(T**2 * d + T * d) == "T*d*(T + 1)"
    assert r"\mathrm{num\_slots}" in latex(T * param("num_slots"))


def test_every_letter_is_bound_and_explained() -> None:
    values = bindings(Dims(seq_len=100, num_layers=3), Params(), itemsize=2, segment_len=512)
    assert values == {"B": 1, "T": 100, "d": 256, "h": 4, "f": 1024, "L": 3, "e": 2, "C": 100}
    assert set(values) == {symbol.name for symbol in (B, T, d, h, f, L, e, C)} == set(MEANING)


def test_slopes_are_central_differences() -> None:
    """Against the derivative of a form whose slope is not constant."""
    expression, at = T**2 + 50 * T, 200
    exact = float(Fraction(at * (2 * at + 50), at**2 + 50 * at))
    assert math.isclose(local_slope(expression, {"T": at}), exact, abs_tol=1e-4)


def test_compiled_formulas_have_the_values_of_the_walk_for_every_method() -> None:
    for entry in discover().entries.values():
        method, params = entry.method, entry.method.params()
        dims = Dims(seq_len=1, num_layers=method.fewest_layers(params), causal=(method.causal or (False,))[0])
        for impl in method.impls[:2]:
            mode = (impl.modes or method.modes)[0]
            cost = method.cost_of(impl.name, mode, dims.causal, method.positions[0], params)
            for formula in filter(None, (total(cost.flops), cost.peak_bytes) if cost else ()):
                function = compiled(formula)
                assert function is not None, (method.name, impl.name)
                for length in (1, 7, 1000, 65536):
                    values = bindings(dims.replace(seq_len=length), params, 4, method.segment_len(params))
                    assert function(values) == _exact(formula, values), (method.name, impl.name)


def test_a_branch_that_does_not_hold_is_not_computed() -> None:
    x = sympy.Symbol("x")
    formula = sympy.Piecewise((6 / x, x > 0), (-sympy.floor(x / 4), True))
    function = compiled(formula)
    assert function is not None
    assert [function({"x": value}) for value in (0, 4, -5)] == [0, Fraction(3, 2), 2]
    assert [evaluate(sympy.ceiling(x / 3) + sympy.Mod(x, 3), {"x": value}) for value in (6, 7)] == [2, 4]


def test_what_cannot_be_compiled_is_walked() -> None:
    x = sympy.Symbol("x")
    formula = sympy.floor(sympy.log(x, 2))
    assert compiled(formula) is None
    assert evaluate(formula, {"x": 1024}) == 10
