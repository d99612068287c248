"""Closed forms of BigBird's external construction. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer

from ctxbench.cost import Cost
from ctxbench.cost.symbols import T, d, param
from ctxbench.cost.terms import band_pairs, linear_parameters
from ctxbench.implementations._shared.flex_forms import band_pairs as flex_band_pairs
from ctxbench.implementations._shared.forms import block_parameters, block_terms, trained
from ctxbench.implementations._shared.window_pairs import run_pairs

g, radius = param("num_global"), param("local_radius")
n = T + g  # tokens of a layer


def etc_visible_pairs() -> Expr:
    """Pairs a head needs: the band of the sequence, its globals, and the rows of those."""
    return band_pairs(T, radius, radius) + T * g + g * n


def etc_cost(impl: str, mode: str) -> Cost:
    """One impl in one mode."""
    visible = etc_visible_pairs()
    in_blocks = run_pairs(Integer(0), T, radius, radius, 1, Integer(1)) + T * g + g * n
    in_tiles = flex_band_pairs(g, T, radius, radius) + g * n
    executed = {"blocked": in_blocks, "triton": visible, "flex": in_tiles}.get(impl, n * n)
    algorithmic, flops = block_terms(n, visible), block_terms(n, executed)
    if mode == "train":
        algorithmic, flops = trained(algorithmic), trained(flops, impl)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(5 * linear_parameters(d, d)) + g * d,
    )
