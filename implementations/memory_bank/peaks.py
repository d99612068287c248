"""Allocator peaks of the memory bank: what is alive together at the worst moment. Derivation in README.md.

A row is ``B n d`` elements of ``n`` tokens, a slab ``B M d`` elements: one of the four tensors of a layer's bank.
Tensors of a few rows of one token are left out where a segment or a bank dominates.
"""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Integer, Max, Min, Mod, Piecewise, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor
from ctxbench.implementations._shared.forms import rotating, rotation_tables
from ctxbench.implementations._shared.products_forms import backward_scratch, scratch

M = param("num_slots")
S = param("segment_len")
WHOLE = floor(T / S)  # segments that are complete
REST = Mod(T, S)  # tokens of the one that is not
SLAB = tensor(B, M, d)

Piece = Callable[[Expr], Expr]


def peak(impl: str, mode: str, argmax: bool, writes: Expr, rotates: bool = False) -> Expr:
    """Bytes of one impl in one mode; ``writes``: how many a layer makes in the call. Not of training that rotates."""
    if impl == "as_written":
        return _sketch_train() if mode == "train" else _sketch_forward()
    if impl == "triton":
        return _kernels_stream(argmax) if mode == "stream" else _kernels_forward(argmax, writes)
    if mode == "train":
        return _reference_train(writes) if impl == "reference" else _blocked_train(impl, argmax, writes)
    fixed, piece, extra = 3, _after_self_attention, 0
    if impl == "reference":
        fixed, piece, extra = 0, _reference_piece, 1
    elif impl == "slabs":
        piece = _after_self_attention_by_slabs
    if mode == "forward":
        plain = _forward(impl, fixed, piece, extra, writes)
        return largest(plain, _rotating_whole(fixed)) if rotates else plain
    if mode == "stream":
        return _stream(fixed, piece, extra, rotates)
    return _decode(impl, writes, rotates)


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def some(count: Expr | int) -> Expr:
    """1 where there are any, else 0."""
    return Min(sympify(count), 1)


def _after_self_attention(n: Expr | int) -> Expr:
    """Blocked, one piece in the loop, its output included: gate, or feed-forward network."""
    return largest(3 * row(n), 2 * row(n) + 2 * tensor(B, n, f))


def _after_self_attention_by_slabs(n: Expr | int) -> Expr:
    """The same, or the read."""
    return largest(_after_self_attention(n), row(n) + scratch(n, M, causal=False))


def _reference_piece(n: Expr | int) -> Expr:
    """Reference, one piece, its output included: self-attention's, the read's or the feed-forward network's worst."""
    mask = sympify(n) ** 2  # of one byte each, and its complement where scores are masked
    copied = SLAB * some(B - 1) * some(h - 1)  # strided heads of several rows cannot be one batch of matrices
    return mask + largest(
        4 * row(n) + 2 * tensor(B, h, n, n) + largest(row(n), mask),
        6 * row(n) + 2 * tensor(B, h, n, M) + copied,
        6 * row(n) + 2 * tensor(B, n, f),
    )


def _forward(impl: str, fixed: int, piece: Piece, extra: int, writes: Expr) -> Expr:
    """``fixed`` rows of all tokens live through the loop; outputs collect, and are joined at the end."""
    last = T - S * writes  # tokens since the last write
    beside = scratch(S, S, B * WHOLE) if impl == "slabs" else 4 * B * h * T  # buffers, or log-sum-exp
    stacked = (4 + some(B - 1) * some(REST)) * row(T - REST) + beside if fixed else Integer(0)
    held = (1 - extra) * 2 * row(REST)  # keys and values of the last, unfinished segment
    loop = (
        fixed * row(T)
        + held
        + largest(
            some(WHOLE) * (row(T - REST - S) + piece(S)),
            row(T - REST) + piece(REST),
            some(writes) * (row(S * writes) + (4 + extra) * SLAB + 2 * extra * row(S)),
        )
    )
    join = 2 * row(T) + 2 * extra * row(last)
    return some(L - 1) * row(T) + 4 * SLAB + largest(stacked, loop, join)


def _rotating_whole(fixed: int) -> Expr:
    """While queries and keys of whole segments are rotated, stacked or one after the other, or those of the last."""
    copied = some(B - 1) * some(REST) * row(T - REST) if fixed else Integer(0)
    several = T - REST if fixed else S
    turned = rotating(several) - rotation_tables(several) + rotation_tables(S)  # one set for all of them
    before = 0 if fixed else row(T - REST - S)
    ragged = (fixed or 1) * row(T - REST) + rotating(REST)
    inside = largest(some(WHOLE) * (copied + before + turned), some(REST) * ragged)
    return some(L - 1) * row(T) + 4 * SLAB + inside


def _stream(fixed: int, piece: Piece, extra: int, rotates: bool) -> Expr:
    """The last layer of a call, in a whole segment or in the one the stream ends in."""

    def call(n: Expr, earlier: Expr, unfinished: int) -> Expr:
        """``earlier``: calls before; the outputs of the last live. An unfinished segment keeps its keys and values."""
        before = (some(L - 1) + fixed + unfinished * 2 * (L - extra)) * row(n) + some(earlier) * row(S)
        banks = 4 * (L + (L - 1) * (1 - unfinished)) * SLAB  # all old ones, the new ones of the layers before
        write = (1 - unfinished) * ((4 + extra) * SLAB + (1 + 2 * extra) * row(n))
        inside = before + banks + largest(piece(n), write)
        if not rotates:
            return inside
        held = (some(L - 1) + unfinished * 2 * (L - 1)) * row(n) + some(earlier) * row(S)
        return largest(inside, held + banks + rotating(n))

    return largest(some(WHOLE) * call(S, WHOLE - 1, 0), some(REST) * call(REST, WHOLE, 1))


POOLED = Max(e, 4) * B * d  # the sum over a segment, in float32 at least


def _write(argmax: bool) -> Expr:
    """The new bank beside rows of one token, indices, and the logits of slots."""
    return 4 * SLAB + 10 * row(1) + 16 * B + (tensor(B, M) if argmax else 0)


def _gated(n: Expr | int) -> Expr:
    """The Triton impl, one piece in the loop, its output included: the fused gate, or the feed-forward network."""
    return 2 * row(n) + 2 * tensor(B, n, f)


def _kernels_forward(argmax: bool, writes: Expr) -> Expr:
    """As of ``blocked``, exactly: self-attention of whole segments with its log-sum-exps, or the loop over pieces."""
    whole = T - REST
    stacked = (4 + some(B - 1) * some(REST)) * row(whole) + 4 * B * h * whole
    loop = largest(
        some(WHOLE) * (row(whole - S) + _gated(S)),
        row(whole) + some(REST) * _gated(REST),
        some(writes) * (row(S * writes) + _write(argmax)),
    )
    return some(L - 1) * row(T) + 4 * SLAB + POOLED + largest(stacked, 3 * row(T) + 2 * row(REST) + loop)


def _kernels_stream(argmax: bool) -> Expr:
    """As of ``blocked``, exactly: the last layer of a call, in a whole segment or in the one the stream ends in."""
    states = L * (4 * SLAB + POOLED) + (L - 1) * POOLED + some(L - 1) * row(S)
    piece = largest(_gated(S), row(S) + POOLED + _write(argmax))
    whole = states + (L - 1) * 4 * SLAB + 3 * row(S) + some(WHOLE - 1) * row(S) + piece
    rest = states + some(L - 1) * (row(REST) - row(S)) + (3 + 2 * L) * row(REST) + some(WHOLE) * row(S) + _gated(REST)
    return largest(some(WHOLE) * whole, some(REST) * rest)


def _decode(impl: str, writes: Expr, rotates: bool) -> Expr:
    """One token; a token that completes a segment pays for new banks."""
    fill = Mod(T, S)
    caches = 2 * row(fill + 1)
    kept = (L - 1) * ((1 - writes) * caches + Max(e, 4) * B * d + 4 * writes * SLAB) + some(L - 1) * row(1)
    turned = rotating(1) if rotates else Integer(0)
    if impl == "blocked":
        loop = (1 - writes) * caches + 3 * row(1) + _after_self_attention(1)
        return kept + largest(caches + 4 * row(1), loop, writes * (4 * SLAB + 15 * row(1)), turned)
    copied = SLAB * some(B - 1) * some(h - 1)
    step = (
        caches
        + (fill + 1)
        + largest(
            3 * row(1) + 2 * tensor(B, h, fill + 1),
            4 * row(1) + 2 * tensor(B, h, M) + copied,
            4 * row(1) + 2 * tensor(B, f),
        )
    )
    return kept + largest(step, writes * (5 * SLAB + caches + 8 * row(1)), turned)


def _blocked_train(impl: str, argmax: bool, writes: Expr) -> Expr:
    """The last layer's forward at its last write or its end, or its backward through a feed-forward network or a write.

    Backward walks the loop from its end: what the last piece kept is gone when the whole segment before it is reached.
    """
    in_loop = Piecewise((5 * row(1) + 2 * tensor(B, f), f > 0), (3 * row(1), True))  # a token's, kept for backward
    by_slabs = 1 if impl == "slabs" else 0
    statistics = (8 * h * (1 - by_slabs) + Piecewise((24, f > 0), (16, True))) * B  # log-sum-exps and norms, fp32
    small = writes * (10 * row(1) + (tensor(B, M) if argmax else 0))
    slabs = 4 if argmax else 2  # a write's, kept for backward
    restacked = some(B - 1) * some(REST) * some(WHOLE - 1) * row(T - REST)
    layer = T * (8 * row(1) + in_loop + statistics) + restacked + small + (slabs * writes + 2) * SLAB
    last = T - S * writes  # tokens since the last write
    until_last = layer - last * in_loop
    weights = e * d * f
    gradients = 3 * weights + 6 * e * d * d
    stages = [
        2 * row(T) + row(last) + 2 * SLAB + layer,
        some(writes) * (row(T) + row(S * writes) + (2 if argmax else 4) * SLAB + until_last),
        row(T) + tensor(B, last, f) + weights + layer,
        some(WHOLE) * some(REST) * (row(T) + 3 * row(last) + tensor(B, S, f) + gradients + 2 * SLAB + until_last),
    ]
    # The loop is done: gradients of all that was prepared before it, next to what that kept.
    stages.append(T * (8 * row(1) + statistics) + (4 + some(REST)) * row(T) + 14 * e * d * d + 4 * SLAB)
    if by_slabs:  # the read of the last piece or a whole one, and self-attention of all whole segments
        held = row(T) + until_last + gradients + 2 * SLAB
        stages.append(held + 6 * row(last) + backward_scratch(last, M, causal=False))
        whole = 3 * row(last) + 6 * row(S) - S * in_loop + 2 * SLAB + backward_scratch(S, M, causal=False)
        stages.append(some(WHOLE) * some(REST) * (held + whole))
        itself = backward_scratch(S, S, B * WHOLE) + 3 * row(WHOLE * S)
        stages.append(T * (6 * row(1) + statistics) + (2 + some(REST)) * row(T) + 14 * e * d * d + 4 * SLAB + itself)
    if argmax:
        stages.append(some(writes) * (row(T) + 4 * row(last) + gradients + 6 * SLAB + until_last))
    return (L - 1) * (layer + row(T)) + largest(*stages)


def _reference_train(writes: Expr) -> Expr:
    """Backward through a softmax of the last layer's last whole segment, or the end of the forward."""

    def kept(whole: Expr, rest: Expr, made: Expr) -> Expr:
        tokens, squares = whole * S + rest, whole * S**2 + rest**2
        rows = Piecewise((15 * row(tokens) + 2 * tensor(B, tokens, f), f > 0), (13 * row(tokens), True))
        statistics = Piecewise((24, f > 0), (16, True)) * B * tokens
        scores = tensor(B, h, squares + tokens * M) + squares
        return rows + statistics + scores + (7 * made + 3) * SLAB

    def softmax(n: Expr) -> Expr:
        read, own = tensor(B, h, n, M), tensor(B, h, n, n)
        return row(T) - 2 * tensor(B, n, f) + largest(2 * read - 3 * row(n), 2 * own - read - 8 * row(n))

    layer = kept(WHOLE, REST, writes)
    in_rest = layer + softmax(REST)
    in_whole = some(WHOLE) * (kept(WHOLE, Integer(0), writes - some(REST)) + softmax(S))
    return (L - 1) * (layer + row(T)) + largest(layer + 2 * row(T), in_rest, in_whole) + SLAB


def _sketch_forward() -> Expr:
    """Averaged weights of the read live to the end of the layer."""
    scores, hidden = tensor(B, T, M), tensor(B, T, f)
    worst = largest(4 * row(T) + scores + 2 * hidden, 3 * row(T) + 2 * scores + 2 * tensor(M, d), 7 * row(T) + scores)
    return some(L - 1) * row(T) + worst


def _sketch_train() -> Expr:
    """Backward through the feed-forward network or the read's softmax of the last layer."""
    scores, hidden = tensor(B, T, M), tensor(B, T, f)
    rows = Piecewise((17, f > 0), (15, True)) * row(T)
    layer = rows + hidden + scores + 2 * tensor(M, d) + 16 * B * T
    gate = Piecewise((0, f > 0), (3 * row(T), True))
    return L * layer + largest(2 * hidden, gate, 2 * scores - hidden - 5 * row(T))
