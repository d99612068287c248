"""Closed forms of MELODI. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sympy import Expr, Integer, Min, Rational, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, f, h
from ctxbench.cost.terms import attention, ffn, largest, linear, linear_parameters, tensor, triangle, when_ffn
from ctxbench.implementations._shared.flash_table import DQ_ALONE
from ctxbench.implementations._shared.forms import core_backward, kernels, position_parameters, replayed
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.melodi.params import MelodiParams
from ctxbench.implementations.melodi.peaks import FULL, M, P, S, U, W, peak
from ctxbench.method import ROPE


class Windows(NamedTuple):
    """The windows of one call: ``closed`` whole ones that hand slots on, then ``rows`` after ``fill`` tokens.

    ``closing`` is 1 where these rows hand slots on too, which only a decoded token does.
    """

    closed: Expr
    rows: Expr
    fill: Expr
    closing: Expr
    before: Expr  # windows before the last

    @property
    def asking(self) -> Expr:
        """Rows that ask, over all windows."""
        return self.closed * (W + U) + self.rows

    @property
    def handed_on(self) -> Expr:
        """Windows that hand slots on."""
        return self.closed + self.closing


def windows(mode: str) -> Windows:
    """A whole sequence leaves its last window open: nobody would read what it hands on."""
    if mode == "decode":
        closing = floor((T + 1) / W) - floor(T / W)
        return Windows(Integer(0), 1 + closing * U, T - W * floor(T / W), closing, floor(T / W))
    closed = floor(T / W) if mode == "stream" else floor((T - 1) / W)
    return Windows(closed, T - W * closed, Integer(0), Integer(0), closed)


def cost(impl: str, mode: str, causal: bool, position: str, params: MelodiParams) -> Cost:
    """One impl in one mode. ``stream`` takes a window a call."""
    if impl == "graph":
        return replayed(*(cost("triton", each, causal, position, params) for each in (mode, "stream")))
    diagonal = impl == "diagonal_triton"  # the same products in another order
    impl = "triton" if diagonal else impl
    visible = kernels(impl) == "triton"
    call = windows(mode)
    has_long = Integer(1 if params.long_slots else 0)
    row_forward = 8 * d**2  # projections of one row
    handed = L * S + has_long * P  # slots a window hands on, over all layers
    algorithmic = {
        "projections": L * B * call.asking * row_forward,
        "attention": L * attention(_pairs(call, triangle)),
        "recall": has_long * attention(_recalled(call, null=0)),
        "ffn": L * ffn(call.asking),
        "mixing": linear(B * call.handed_on * (W + U), handed + (L - 1) * U, d),
        "memory": linear(B * call.handed_on * handed, d, 2 * d),
    }
    flops = dict(algorithmic)
    if not visible:
        flops["attention"] = L * attention(_pairs(call, {"slabs": _with_own}.get(impl, lambda n: n**2)))
        nulls = {"blocked": 1, "slabs": 2}.get(impl)
        flops["recall"] = has_long * attention(call.asking * M if nulls is None else _recalled(call, nulls))
    if mode == "train":
        any_closed = Min(call.closed, 1)
        first = any_closed * (W + U) + (1 - any_closed) * T  # rows of the first window
        table = "t5" if position in ("t5", "alibi") else "none"  # slopes times a scale that learns are a table too
        core = {"recall": core_backward(impl), "attention": core_backward(impl, table)}
        flops = {term: forward * (1 + core.get(term, Integer(2))) for term, forward in flops.items()}
        if impl == "reference":  # the first window recalls zeros, which ask for no gradient
            flops["recall"] -= has_long * attention(first * M)
        if visible:  # its short-term memory neither
            flops["attention"] -= L * attention(first * S) * (core_backward(impl) - Rational(DQ_ALONE))
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
    # Without a form: what a diagonal holds of several layers at once, and what training keeps where rotations are or,
    # of slabs, in 16 bits.
    unknown = diagonal or (mode == "train" and (position in ROPE or impl == "slabs"))
    highest = None if unknown else peak("kernels" if visible else impl, mode, params, position, impl == "triton")
    if mode == "train" and visible and highest is not None:  # few tokens hold less than gradients of parameters
        highest = largest(highest, tensor(_parameters(position, params)) + tensor(B, T, d))
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=_parameters(position, params),
        state_bytes=L * (2 * tensor(B, S, d) + 3 * tensor(B, T - W * floor(T / W), d))
        + has_long * 2 * tensor(B, Min(M, P * floor(T / W)), d),
        peak_bytes=highest,
        depth=L if mode == "decode" else ceiling(T / W) + L - 1,
    )


def _pairs(call: Windows, of: Callable[[Expr], Expr]) -> Expr:
    """Pairs inside windows, short-term memory included; no row sees itself. ``of``: n rows and themselves."""

    def window(rows: Expr, fill: Expr) -> Expr:
        return rows * (S + fill) + of(rows) - rows

    return call.closed * window(W + U, Integer(0)) + window(call.rows, call.fill)


def _with_own(rows: Expr) -> Expr:
    """Pairs of slabs, which take a row's own key with the others before it; ``_pairs`` takes off one a row."""
    return own_pairs(rows) + rows


def _recalled(call: Windows, null: int) -> Expr:
    """Pairs with filled slots of the long-term memory; ``null`` more keys where it is partly filled."""
    growing = Min(call.closed, FULL)  # windows before which it is not full; the first finds nothing
    partly = growing - Min(growing, 1)
    filled = P * growing * (growing - 1) / 2 + (call.closed - growing) * M + null * partly
    is_growing = 1 - Min(floor(call.before / sympify(FULL)), 1)
    last = Min(M, P * call.before) + null * is_growing * Min(call.before, 1)
    return (W + U) * filled + call.rows * last


def _parameters(position: str, params: MelodiParams) -> Expr:
    layer = 4 * d**2 + d + h + position_parameters(position)  # a table a layer
    layer += when_ffn(d + linear_parameters(d, f) + linear_parameters(f, d))
    mixed = W + U + 1
    normed: Expr = Integer(0)  # layers whose mixing has a norm
    if params.summary_tokens:
        normed = L if params.summary_tokens == params.short_slots else L - 1
    total = L * (layer + mixed * S) + (L - 1) * mixed * U + normed * d + U * d
    return total + (mixed * P + d if params.long_slots else 0)
