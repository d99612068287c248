"""Closed forms of the scaffolding in ``blocks``: parameters and allocator peaks of the layer around a mixer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sympy import Expr, Integer, Max, Min, Piecewise, Rational, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import (
    FUSED_BACKWARD,
    attention,
    ffn,
    largest,
    linear_parameters,
    projections,
    tensor,
    when_ffn,
)
from ctxbench.implementations._shared.flash_table import BACKWARD
from ctxbench.implementations._shared.staircase import BLOCK

T5_DISTANCES = 257  # of T5's table, before and after a query, its own with them: see ``positions.T5Bias``


def block_parameters(mixer: Expr | int) -> Expr:
    """Parameters of ``L`` pre-norm or post-norm blocks around a mixer with ``mixer`` parameters."""
    return L * (mixer + 2 * d + when_ffn(2 * d + linear_parameters(d, f) + linear_parameters(f, d)))


def position_parameters(position: str) -> Expr:
    """Parameters of the position encoding of a whole stack, see ``positions``: T5's one table, Transformer-XL's term.

    All the others are constants. FLOPs: rotations and biases act element by element, so they count as none.
    """
    if position == "t5":
        return 32 * h
    return L * (d * d + 2 * d) if position == "transformer_xl" else Integer(0)


def bias_bytes(position: str) -> Expr:
    """Bytes of what the kernels add to scores, in float32: slopes, unless they are so already, or T5's table."""
    if position == "alibi":
        return Piecewise((4 * h, e < 4), (0, True))
    return 4 * h * T5_DISTANCES if position == "t5" else Integer(0)


def slab_pairs(queries: Expr | int) -> Expr:
    """Pairs of causal attention by slabs, see ``slabs``: each slab of BLOCK queries ends at its last one."""
    whole = floor(sympify(queries) / BLOCK)
    return BLOCK**2 * whole * (whole + 1) / 2 + (queries - whole * BLOCK) * queries


def block_terms(tokens: Expr | int, pairs: Expr | int) -> dict[str, Expr]:
    """Forward FLOPs of the whole stack: four projections, attention over ``pairs``, the feed-forward networks."""
    return {"projections": L * projections(tokens), "attention": L * attention(pairs), "ffn": block_ffn(tokens)}


def core_backward(impl: str, position: str = "none") -> Expr:
    """Backward pass of an attention core, in forward passes: twice, unless probabilities are computed again.

    For the gradient of T5's table the kernels in Triton compute the scores and theirs once more.
    """
    twice = Rational(BACKWARD) + int(position == "t5")
    again = dict.fromkeys(("blocked", "slabs", "native", "flex"), FUSED_BACKWARD)
    return {**again, "triton": twice}.get(impl, Integer(2))


def kernels(impl: str) -> str:
    """Whose pairs and peaks an impl has: ``native`` runs the operator of ``triton``, up to its backward pass."""
    return "triton" if impl == "native" else impl


def replayed(plain: Cost, streamed: Cost) -> Cost:
    """The cost of replays, of ``plain`` launches and of a stream: every whole segment hands on what it has to.

    The buffers of a recording outlive the call that made them, so that no peak of one call has a formula.
    """
    return dataclasses.replace(plain, flops=streamed.flops, peak_bytes=None)


def trained(forward: Mapping[str, Expr], impl: str = "reference", position: str = "none") -> dict[str, Expr]:
    """FLOPs of forward and backward: three times the maps; attention too, unless an impl computes it again."""
    core = core_backward(impl, position)
    return {term: cost * (1 + core if term == "attention" else 3) for term, cost in forward.items()}


def block_ffn(tokens: Expr | int) -> Expr:
    """Forward FLOPs of the feed-forward networks of the whole stack."""
    return L * ffn(tokens)


def rotation_tables(tokens: Expr | int) -> Expr:
    """Bytes of the cosines and sines of one call of ``Rotary.rotate``, at least float32; training keeps them."""
    return Max(e, 4) * sympify(tokens) * d / h


def rotating(tokens: Expr | int) -> Expr:
    """Bytes alive while keys are rotated after queries: the norm, q, k, v, new queries, and two rows of products."""
    return 5 * tensor(B, tokens, d) + 2 * Max(e, 4) * B * sympify(tokens) * d + rotation_tables(tokens)


def rotated(peak: Expr, mode: str, beside: Expr | int = 0) -> Expr:
    """A stack's ``forward`` or ``train`` peak where every layer first rotates queries and keys of all tokens.

    ``beside``: what else a layer holds meanwhile.
    """
    if mode == "train":
        return peak + 2 * L * rotation_tables(T)
    return largest(peak, rotating(T) + beside + Min(L - 1, 1) * tensor(B, T, d))


def stack_peak(tokens: Expr | int, mixing: Expr) -> Expr:
    """Forward peak of a pre-norm stack over ``tokens`` tokens.

    ``mixing``: bytes alive inside the mixer at its worst, its normalised input included. The FFN stage holds the
    residual, its norm and two hidden tensors; from the second layer on the layer's input is alive too.
    """
    row = tensor(B, tokens, d)
    feed = Piecewise((2 * row + 2 * tensor(B, tokens, f), f > 0), (Integer(0), True))
    carried = Min(L - 1, 1) * row
    return largest(mixing, feed) + carried
