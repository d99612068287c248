"""Closed forms of shifted sparse attention. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Min, Rational, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, h, param
from ctxbench.cost.terms import largest, linear_parameters, projections, triangle
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    kernels,
    position_parameters,
    rotated,
    slab_pairs,
)
from ctxbench.implementations.longlora.params import LongLoRAParams, exact_fraction
from ctxbench.implementations.longlora.peaks import peak
from ctxbench.method import ROPE


def cost(impl: str, mode: str, causal: bool, position: str, params: LongLoRAParams) -> Cost:
    """One impl in one mode."""
    group = group_expression(params)
    algorithmic = {
        "projections": L * projections(T),
        "attention": L * _over_heads(triangles(0, group), _shifted(group, params.wrap)),
        "ffn": block_ffn(T),
    }
    flops = dict(algorithmic)
    if impl == "reference":  # whole squares of whole groups
        square = group**2 * ceiling(T / group)
        flops["attention"] = L * _over_heads(square, square)
    biased = position in ("t5", "alibi")
    if impl == "flex" or (impl == "blocked" and biased):  # tiles and slabs have the same rows
        plain, shifted = triangles(0, group, slab_pairs), _shifted(group, params.wrap, slab_pairs)
        flops["attention"] = L * _over_heads(plain, shifted)
    if mode == "train":
        core = core_backward(impl, position)
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        flops = {term: forward * (1 + core if term == "attention" else 3) for term, forward in flops.items()}
    rotates = position in ROPE
    turns = rotates and impl == "triton"  # the kernels turn queries as they read them
    most = None if impl == "flex" or biased else peak(kernels(impl), mode, group, turns)
    if most is not None and rotates and not turns:
        most = rotated(most, mode)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(4 * linear_parameters(d, d)) + position_parameters(position),
        peak_bytes=most,
        depth=L,
    )


def group_expression(params: LongLoRAParams) -> Expr:
    """Tokens of a group."""
    if params.group:
        return param("group")
    fraction = exact_fraction(params)
    return 2 * ceiling(T * Rational(fraction.numerator, 2 * fraction.denominator))


def triangles(head: Expr | int, group: Expr, causal: Callable[[Expr | int], Expr] = triangle) -> Expr:
    """Pairs of causal groups after a first one of ``head`` tokens; ``causal`` counts those of one group."""
    rest = T - sympify(head)
    whole = floor(rest / group)
    return causal(head) + whole * causal(group) + causal(rest - whole * group)


def _shifted(group: Expr, wrap: bool, causal: Callable[[Expr | int], Expr] = triangle) -> Expr:
    """Pairs of a shifted head; in a circle the first tokens also see the last, shorter group."""
    head = Min(T, group / 2)
    pairs = triangles(head, group, causal)
    if wrap:
        pairs += head * largest(0, T + group / 2 - group * ceiling(T / group))
    return pairs


def _over_heads(plain: Expr, shifted: Expr) -> Expr:
    """FLOPs of scores and values; the larger half of the heads is plain."""
    return 4 * B * d / h * (ceiling(h / 2) * plain + floor(h / 2) * shifted)
