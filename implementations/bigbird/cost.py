"""Closed forms of BigBird. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import linear_parameters, tensor, when_ffn
from ctxbench.implementations._shared.forms import (
    T5_DISTANCES,
    bias_bytes,
    block_parameters,
    block_terms,
    position_parameters,
    rotated,
    rotation_tables,
    stack_peak,
    trained,
)
from ctxbench.implementations._shared.native_table import PAD
from ctxbench.implementations._shared.products_forms import items
from ctxbench.implementations.bigbird.etc_cost import etc_cost
from ctxbench.implementations.bigbird.params import PANEL, BigBirdParams
from ctxbench.method import ROPE

# Of the blocked impl: queries whose scores are alive together, in slabs and of global rows, and scores of these.
SLAB, END, END_SCORES = Integer(256), Integer(128), Integer(1 << 20)
b, r = param("block_size"), param("num_random")
blocks = ceiling(T / b)
last = T - (blocks - 1) * b  # tokens of the last block


def visible_pairs() -> Expr:
    """Pairs a head needs; with at least five blocks, all full, b^2 (n (7 + r) - 12 - 2 r) for n >= 5 + r blocks."""
    ends = (b + last) * T
    edges = 2 * b * ((3 + Min(r, blocks - 4)) * b + last)
    inner = (blocks - 4) * b * ((4 + Min(r, blocks - 5)) * b + last)
    return Piecewise((T * T, blocks <= 4), (ends + edges + inner, True))


def cost(impl: str, mode: str, causal: bool, position: str, params: BigBirdParams) -> Cost:
    """One impl in one mode."""
    if params.form == "etc":
        return etc_cost(impl, mode)
    visible = visible_pairs()
    algorithmic, flops = block_terms(T, visible), block_terms(T, visible if impl != "reference" else T * T)
    if mode == "train":
        algorithmic, flops = trained(algorithmic), trained(flops, impl, position)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(4 * linear_parameters(d, d)) + position_parameters(position),
        peak_bytes=_peak(impl, mode, position),
        depth=L,
    )


def _peak(impl: str, mode: str, position: str) -> Expr | None:
    if impl == "flex" or (position in ("t5", "alibi") and impl != "triton"):
        return None
    most = _forward_peak(impl, position) if mode == "forward" else _train_peak(impl, position)
    return rotated(most, mode) if position in ROPE and impl != "triton" else most


row = tensor(B, T, d)  # bytes of a sequence
_few = Min(b + last, END)  # queries of the global rows, for some heads of the batch
_heads = items(Max(2, floor(END_SCORES / (_few * T))))
piece, end_keys = e * _heads * _few * d / h, e * _heads * T * d / h
padded = tensor(B, blocks * b, d)
_edges, _inner = Min(2, blocks - 2), Max(0, Min(Max(1, floor(SLAB / b)), blocks - 4))  # rows of each kind of slab
few = blocks <= 2  # nothing between the ends: the fused impls are one call
# The lists of the rows between the ends, int32: where each begins, and the blocks.
_listed = _edges * (4 + Min(r, blocks - 4)) + Max(0, blocks - 4) * (5 + Min(r, blocks - 5))
lists = 4 * h * (blocks - 1 + _listed)
indices = 8 * B * h * _listed  # of the blocked impl: the blocks, numbered over the batch


def _buffers(gathered: int, scores: int, queries: int) -> Expr:
    """Bytes of so many copies of what the largest slab needs: gathered blocks, scores, queries."""
    most, rows = _largest_slab(), Max(_edges, _inner)
    of_scores = Max(tensor(B, h, most * b, Min(b, SLAB)), e * _heads * _few * T)
    return indices + gathered * tensor(B, most * b, d) + scores * of_scores + queries * tensor(B, rows * b, d)


def _largest_slab() -> Expr:
    """Blocks gathered for one head of one sequence."""
    return Max(_edges * (4 + Min(r, blocks - 4)), _inner * (5 + Min(r, blocks - 5)))


def _forward_peak(impl: str, position: str) -> Expr:
    """Norm, q, k and v; then scores twice with mask and output, or the output, keys and values by block and a slab."""
    if impl == "reference":  # with several sequences v is copied for the batched product
        return stack_peak(T, 5 * row + 2 * tensor(B, h, T, T) + h * T * T + Min(B - 1, 1) * row)
    if impl == "triton":  # the ends and the rest, then their concatenation beside the lists
        bias = bias_bytes(position)  # of a table the one call of all rows holds a copy in one piece, too
        alone = 5 * row + 4 * B * h * T + (2 if position == "t5" else 1) * bias
        finding = 4 * row + (52 * T5_DISTANCES if position == "t5" else 0)  # the bucket of every distance
        finding += 2 * row + rotation_tables(T) if position in ROPE else 0  # rotated queries and keys
        return stack_peak(T, Max(finding, Piecewise((alone, few), (6 * row + lists + bias, True))))
    slab = 5 * row + (_panels() if impl == "native" else 2 * padded + _buffers(2, 1, 1) + piece)
    return stack_peak(T, Piecewise((5 * row + 4 * B * h * T, few), (slab, True)))


def _panels() -> Expr:
    """Keys and values as the native kernel packs them."""
    width = d / h
    keys, values = width * Min(PANEL, PAD * ceiling(b / PAD)), Min(PANEL, b) * PAD * ceiling(width / PAD)
    return tensor(B, h, blocks * ceiling(b / PANEL), keys + values)


def _biases(position: str) -> tuple[Expr, Expr]:
    """What a layer keeps of biases for the backward pass, and what is there in the middle of its attention's.

    Of slopes one copy. Of a table one for each of the calls, and which entry of T5's each distance takes; in the
    backward pass that of the first call, and gradients of the others.
    """
    bias = bias_bytes(position)
    if position != "t5":
        return bias, bias
    taken = Integer(8 * T5_DISTANCES)
    return taken + bias * Piecewise((1, few), (3, True)), taken + bias * Piecewise((2, few), (3, True))


def _train_peak(impl: str, position: str) -> Expr:
    """The top layer's backward pass, in its FFN or in its attention, with all layers below it still saved."""
    scores, statistics, hidden = tensor(B, h, T, T), 2 * e * B * T, tensor(B, T, f)
    kept_biases, biases = _biases(position)
    if impl == "reference":
        core = scores + h * T * T  # probabilities and mask
        attending = core + 5 * row + 2 * scores  # norm q k, output, gradient of v; gradients of probabilities, scores
    elif impl == "triton":
        core = 4 * B * h * T + Piecewise((0, few), (row + lists, True))  # beside what was concatenated, its parts
        # Norm q k v, output, gradients of the mixed rows, of q, of k and v from the rest and the last block, a sum of
        # these; queries of the last block, and the first block's result with its log-sum-exps.
        ends = tensor(B, last, d) + tensor(B, b, d) + 4 * B * h * b
        attending = Piecewise((core + 10 * row, few), (12 * row + ends, True))
    else:
        core = Piecewise((4 * B * h * T, few), (0, True))
        # Keys and values by block and the sums of their gradients, in single precision at least.
        wide = Max(e, 4) * B * d * b
        converted = Piecewise((wide * _largest_slab(), e < 4), (0, True))
        by_block = 2 * padded + 2 * wide * blocks + _buffers(2, 2, 1)
        # Norm q k v, output, gradients of the mixed rows and of q; what all keys get from a few queries, or a slab's.
        summed = by_block + Max(end_keys + 2 * piece, _buffers(1, 0, 1) - indices + converted)
        attending = core + Piecewise((10 * row, few), (7 * row + summed, True))
    # Of rotated queries a fused call of all rows gives an output that merging heads copies.
    rotates = position in ROPE
    merged = Piecewise((row, few), (0, True)) if rotates and impl not in ("reference", "triton") else Integer(0)
    if rotates and impl == "triton":  # one table for both
        core += rotation_tables(T)
        attending += rotation_tables(T)
    kept = core + kept_biases + merged + 6 * row  # norm q k v, mixed, output
    kept += statistics + when_ffn(2 * row + 2 * hidden + statistics)
    in_ffn = when_ffn(kept + hidden + e * (d * f + d))
    gradients = e * (d * d + d) + when_ffn(row + e * (2 * d * f + f + 3 * d))
    return (L - 1) * kept + Max(in_ffn, attending + biases + statistics + gradients)
