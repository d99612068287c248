"""Allocator peaks of shifted sparse attention: what is alive together at the worst moment. Derivation in README.md.

A row is ``B T d`` elements. ``group`` is the tokens of a group, as an expression.
"""

from __future__ import annotations

from sympy import Expr, Min, ceiling, floor

from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.forms import rotation_tables, stack_peak

ROW = tensor(B, T, d)
PLAIN, SHIFTED = ceiling(h / 2), floor(h / 2)  # heads


def peak(impl: str, mode: str, group: Expr, turns: bool = False) -> Expr:
    """Bytes of one impl in one mode, without what rotations add, but where attention ``turns`` its queries."""
    if impl == "blocked":
        return _blocked_train(group) if mode == "train" else stack_peak(T, _blocked_mixing(group))
    if impl == "triton":
        tables = int(turns) * rotation_tables(T)
        return _triton_train(tables) if mode == "train" else stack_peak(T, _triton_mixing() + tables)
    return _reference_train(group) if mode == "train" else stack_peak(T, _reference_mixing(group))


def _some(count: Expr) -> Expr:
    """1 where there are any, else 0."""
    return Min(count, 1)


def _copies(group: Expr) -> tuple[Expr, Expr]:
    """Queries, keys and values of whole groups, plain and shifted, where stacking several batch rows copies them."""
    head = Min(T, group / 2)
    whole, shifted = floor(T / group) * group, floor((T - head) / group) * group
    many = 3 * _some(B - 1) * tensor(B, d) / h
    return many * PLAIN * whole * _some(T - whole), many * SHIFTED * shifted


def _blocked_mixing(group: Expr) -> Expr:
    """Norm, q, k, v; then both halves and all heads, or one half, its pieces, and both halves of what it copied."""
    _, shifted = _copies(group)
    half = ROW * SHIFTED / h
    return 4 * ROW + largest(2 * ROW, ROW + half + shifted)


def _triton_mixing() -> Expr:
    """Norm, q, k, v; then the plain half, with its log-sum-exps or with the shifted half and both together."""
    return 4 * ROW + largest(ROW * PLAIN / h + 4 * B * PLAIN * T, 2 * ROW * _some(SHIFTED))


def _blocked_train(group: Expr) -> Expr:
    """The top layer's backward pass, in its feed-forward network or in the attention of its plain heads."""
    statistics = 2 * e * B * T
    core = 4 * B * h * T
    kept = core + 7 * ROW + statistics + sum(_copies(group))  # norm q k v, pieces, all heads, output
    kept += when_ffn(2 * ROW + 2 * tensor(B, T, f) + statistics)
    in_ffn = when_ffn(kept + tensor(B, T, f) + e * (d * f + d))
    # norm q k v, output, gradients of the output, of q, k, v as wholes, and of those and the output of one half
    in_attention = 9 * ROW + (ROW + 3 * ROW) * PLAIN / h + core / 2 + statistics + e * (d * d + d)
    in_attention += when_ffn(ROW + e * (2 * d * f + f + 3 * d)) + _copies(group)[0]
    return (L - 1) * kept + largest(in_ffn, in_attention)


def _triton_train(tables: Expr) -> Expr:
    """As of the blocked impl, but nothing is copied, and both halves are kept beside their concatenation."""
    statistics = 2 * e * B * T
    kept = tables + 4 * B * h * T + 6 * ROW + ROW * _some(SHIFTED) + statistics
    kept += when_ffn(2 * ROW + 2 * tensor(B, T, f) + statistics)
    in_ffn = when_ffn(kept + tensor(B, T, f) + e * (d * f + d))
    # Norm q k v, output and its gradient; output and gradients of q, k, v of the plain half, then these as wholes.
    in_attention = 6 * ROW + 4 * ROW * PLAIN / h + 3 * ROW * _some(SHIFTED) + 4 * B * PLAIN * T
    in_attention += statistics + e * (d * d + d)
    in_attention += when_ffn(ROW + e * (2 * d * f + f + 3 * d))
    if tables != 0:  # turned queries of a half go with the launch that read them
        in_attention += tables - ROW * SHIFTED / h
    return (L - 1) * kept + largest(in_ffn, in_attention)


def _square(group: Expr) -> Expr:
    """Pairs of whole groups, the last one filled up."""
    return group**2 * ceiling(T / group)


def _reference_mixing(group: Expr) -> Expr:
    """Masked scores of half of the heads with the mask, beside the scores and its complement, or weights and output."""
    square = _square(group)
    return 2 * tensor(B, PLAIN) * square + square + 6 * ROW + largest(square, ROW * PLAIN / h)


def _reference_train(group: Expr) -> Expr:
    """The top layer's backward pass, in its feed-forward network or through the softmax of its shifted heads."""
    square, statistics = _square(group), 2 * e * B * T
    scores = tensor(B, h) * square + 2 * square
    kept = scores + 6 * ROW + statistics + when_ffn(2 * ROW + 2 * tensor(B, T, f) + statistics)
    made = 2 * tensor(B, largest(SHIFTED, 1)) * square
    gradients = e * (d * d + d) + when_ffn(ROW + e * (2 * d * f + f + 3 * d))
    in_ffn = when_ffn(kept + tensor(B, T, f) + e * (d * f + d))
    return (L - 1) * kept + largest(in_ffn, scores + made + 6 * ROW + statistics + gradients)
