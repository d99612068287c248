"""Closed forms of the memory bank. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Integer, Max, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, e
from ctxbench.cost.terms import attention, linear, linear_parameters, projections, tensor, triangle
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    slab_pairs,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.implementations.memory_bank.peaks import REST, WHOLE, M, S, peak
from ctxbench.method import ROPE


def cost(impl: str, mode: str, causal: bool, position: str, params: MemoryBankParams) -> Cost:
    """One impl in one mode. ``stream`` takes a segment a call, so that no segment is split."""
    if impl == "as_written":
        return _sketch(mode)
    argmax = params.write == "argmax"
    tokens: Expr = Integer(1) if mode == "decode" else T
    writes = _writes(mode)
    row_write = linear(B, d, 5 * d + (M if argmax else 0))  # key, gate, the row's two projections; slot logits
    algorithmic = {
        "projections": L * projections(tokens),
        "attention": L * attention(_pairs(mode, triangle)),
        "read": L * linear(B * tokens, d, 2 * d),
        "read_attention": L * attention(tokens * M),
        "gate": L * linear(B * tokens, 2 * d, d),
        "ffn": block_ffn(tokens),
        "write": L * writes * row_write,
        "bank": L * linear(M, d, 2 * d) if mode != "decode" else Integer(0),  # the initial one, once for all rows
    }
    flops = dict(algorithmic)
    if impl == "slabs":
        flops["attention"] = L * attention(_pairs(mode, own_pairs))
    if impl == "blocked" and position in ("t5", "alibi"):
        flops["attention"] = L * attention(_pairs(mode, slab_pairs))
    if impl == "reference":
        flops["attention"] = L * attention(_pairs(mode, lambda n: n**2))
        flops["write"] = L * writes * (row_write + linear(B * (M - 1), d, 2 * d))  # every row projected
    if mode == "train":
        core = core_backward(impl, position)
        fused = ("attention", "read_attention")
        flops = {term: forward * (1 + core if term in fused else 3) for term, forward in flops.items()}
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        if argmax:  # the straight-through gradient asks what a write to any other slot would have changed
            credit = L * writes * linear(B * M, d, 2 * d)
            algorithmic["write"] += credit
            flops["write"] += credit if impl != "reference" else 0
    rotates = position in ROPE
    known = (impl != "triton" or mode != "train") if position == "none" else rotates and impl != "triton"
    known = known and (mode != "train" or not rotates)
    known = known and (mode != "decode" or impl not in ("slabs", "triton"))  # which have no such mode
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=_parameters(argmax) + position_parameters(position),
        state_bytes=L * (4 * tensor(B, M, d) + 2 * tensor(B, REST, d) + Max(e, 4) * B * d),
        peak_bytes=peak(impl, mode, argmax, writes, rotates) if known else None,
        depth=L if mode == "decode" else L * ceiling(T / S),
    )


def _writes(mode: str) -> Expr:
    """Writes made: a whole sequence skips the one that nothing would read, a stream leaves it for what follows."""
    if mode == "decode":
        return floor((T + 1) / S) - WHOLE
    return WHOLE if mode == "stream" else floor((T - 1) / S)


def _pairs(mode: str, of: Callable[[Expr], Expr]) -> Expr:
    """Pairs of self-attention inside the segments; ``of`` counts those of n tokens among themselves."""
    return REST + 1 if mode == "decode" else WHOLE * of(S) + of(REST)


def _parameters(argmax: bool) -> Expr:
    maps = 9 * linear_parameters(d, d) + 2 * linear_parameters(2 * d, d)
    logits = linear_parameters(d, M) if argmax else 0
    return block_parameters(maps + logits + 4 * d + 2 * M * d)


def _sketch(mode: str) -> Cost:
    """The sketch: attention over the B rows at each position, one bank for all, writes without a gradient."""
    terms = {
        "projections": L * projections(T),
        "attention": L * attention(T * B),
        "read": L * linear(B * T, d, d),
        "read_attention": L * attention(T * M),
        "bank": L * linear(M, d, 2 * d),
        "gate": L * linear(B * T, 2 * d, d),
        "ffn": block_ffn(T),
    }
    factor = 3 if mode == "train" else 1
    terms = {term: factor * forward for term, forward in terms.items()}
    terms["write"] = L * linear(B, d, M + 2 * d)
    bank = 3 * linear_parameters(d, d) + linear_parameters(2 * d, d) + linear_parameters(d, M) + 2 * M * d
    layer = 8 * linear_parameters(d, d) + linear_parameters(2 * d, d) + 2 * d
    return Cost(
        algorithmic=terms,
        flops=terms,
        num_parameters=bank + block_parameters(layer) + 2 * d,
        peak_bytes=peak("as_written", mode, True, Integer(0)),
        depth=L,
    )
