"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, T, d]`` tensor, a slab one ``[B, R, d]`` tensor of the states.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.biased_window_forms import BLOCK, block_pairs
from ctxbench.implementations._shared.forms import stack_peak
from ctxbench.implementations._shared.products_forms import backward_scratch
from ctxbench.implementations.block_recurrent.params import FROM_TOP, BlockRecurrentParams

W, R = param("window"), param("num_states")
WHOLE = floor(T / W)
REST = T - WHOLE * W
SLAB = tensor(B, R, d)


def peak(impl: str, mode: str, params: BlockRecurrentParams) -> Expr | None:
    """Bytes above parameters, inputs and incoming state; None where no formula is known."""
    if mode == "train":
        if params.gate == "lstm":
            return None
        return _train() if impl == "reference" else _trained(impl)
    if impl == "triton":
        return _kernels(mode, Integer(10 if params.gate == "lstm" else 9))
    if impl == "slabs":
        return None
    if impl == "blocked":
        return _blocked_forward() if mode == "forward" else None
    update = _write(Min(2 * W, T + 1))
    return {"forward": _forward, "stream": _stream, "decode": lambda: _decode(update)}[mode]()


def _kernels(mode: str, slabs: Expr) -> Expr:
    """Of kernels that keep no scores; ``slabs``: states before an update with what it makes of them, at its worst."""
    if mode == "decode":
        return _decode((slabs - 3) * SLAB)
    return {"forward": _kernels_forward, "stream": _kernels_stream}[mode](slabs)


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def _window(n: Expr | int, keys: Expr | int) -> Expr:
    """Scores, their bias and the sum, beside the distances."""
    n = sympify(n)
    return 2 * tensor(B, h, n, keys) + tensor(h, n, keys) + 8 * n * keys


def _write(keys: Expr | int) -> Expr:
    """Scores of an update and their probabilities; states before and after, with what is made of them."""
    return 2 * tensor(B, h, R, keys) + 8 * SLAB


def _forward() -> Expr:
    """Norm, queries, keys, values and outputs so far, at a window; later the local part and what was read."""
    n = Min(W, T)
    local = 4 * row(T) + row(T - n) + 3 * SLAB + _window(n, Min(T, 2 * W - 1))
    update = Min(WHOLE, 1) * (6 * row(T) + _write(Min(2 * W, T)))
    return stack_peak(T, largest(local, update, 8 * row(T)))


def _blocked_forward() -> Expr:
    """Rows; the scores of a block of queries."""
    n = Min(BLOCK, T)
    return stack_peak(T, largest(5 * row(T) + 2 * tensor(B, h, n, W - 1 + n), 8 * row(T)))


def _kernels_forward(slabs: Expr) -> Expr:
    """The last update beside norm, keys, values, local part, queries and what was read so far, or all that is joined.

    The first states are projected once for all rows of the batch.
    """
    updates, first = floor((T - 1) / W), 2 * e * R * d
    later, any_ = Min(Max(updates - 1, 0), 1), Min(updates, 1)
    update = any_ * (5 * row(T) + row(updates * W) + (slabs - 3) * SLAB + later * 3 * SLAB + (1 - later) * first)
    joined = 9 * row(T) + any_ * 3 * SLAB + (1 - any_) * first
    below = Min(Max(L - FROM_TOP, 0), 1) * row(T)
    network = when_ffn((2 + Min(L - 1, 1)) * row(T) + 2 * tensor(B, T, f))
    return largest(below + largest(update, joined, 4 * row(T) + 3 * e * R * d), network)


def _kernels_stream(slabs: Expr) -> Expr:
    """As ``_stream``; in the recurrent layer queries, an update, what is joined, or what is kept; or in the last.

    Keys and values before a call stay in their state, but for a call of one token, which joins them to its own.
    """
    under, above = Max(L - FROM_TOP, 0), Min(L - 1, FROM_TOP - 1)

    def call(begin: Expr, n: Expr, kept: Expr, ends: int) -> Expr:
        near, after, token = Min(W - 1, begin), Min(W - 1, begin + n), Max(2 - n, 0)
        old = 3 * SLAB + 2 * row(Min(W, begin)) + (L - 1) * 2 * row(near) + Min(begin, 1) * row(W)
        keys, made = 2 * row(token * Min(W, begin) + n), ends * 3 * SLAB
        new = made + 2 * row(kept)
        recurrent = under * 2 * row(after) + Min(under, 1) * row(n) + largest(
            keys + 5 * row(n), ends * (keys + 4 * row(n) + (slabs - 3) * SLAB), keys + made + 7 * row(n),
            keys + 3 * row(n) + new, new + when_ffn(2 * row(n) + 2 * tensor(B, n, f)), new + 4 * row(n),
        )  # fmt: skip
        done = new + (L - 2) * 2 * row(after) + row(n)
        window = largest(6 * row(n), 3 * row(n) + 2 * row(token * near + n) + 2 * row(after))
        last_ = done + largest(window, 2 * row(after) + when_ffn(2 * row(n) + 2 * tensor(B, n, f)))
        return old + largest(recurrent, Min(above, 1) * last_)

    whole = Min(WHOLE, 1) * call(WHOLE * W - W, W, W, ends=1)
    begun = 3 * SLAB + 2 * e * R * d  # the first states, projected once and copied for every row
    return largest(whole, Min(REST, 1) * call(WHOLE * W, REST, Min(W, WHOLE * W) + REST, ends=0), begun)


def _stream() -> Expr:
    """A call with the state before it and the output of the call before, in the recurrent layer or in the last one."""

    def call(begin: Expr, n: Expr, kept: Expr, ends: int) -> Expr:
        known, near = Min(W, begin), Min(W - 1, begin)
        old = 3 * SLAB + 2 * row(known) + (L - 1) * 2 * row(near) + Min(begin, 1) * row(W)
        held = 2 * row(known + n) + 2 * row(n)
        after = held + 3 * row(n) + largest(_write(Min(2 * W, known + n)), 2 * row(kept))
        new = 3 * ends * SLAB + 2 * row(kept)
        above = new + Max(L - 2, 0) * 2 * row(Min(W - 1, begin + n)) + 3 * row(n) + 2 * row(near + n)
        feed = when_ffn(2 * row(n) + 2 * tensor(B, n, f) + new)
        window = _window(n, near + n)
        return old + largest(held + window, after, feed, Min(L - 1, 1) * (above + window))

    whole = Min(WHOLE, 1) * call(WHOLE * W - W, W, W, ends=1)
    return largest(whole, Min(REST, 1) * call(WHOLE * W, REST, Min(W, WHOLE * W) + REST, ends=0))


def _decode(update: Expr) -> Expr:
    """Joined keys and values and their copies; a token that completes a window pays for an update.

    In a stack of several layers the last one has no states: what those below it keep is then held beside its own.
    """
    ends = floor((T + 1) / W) - WHOLE
    joined = 2 * row(Min(T, W + REST) + 1)
    kept = 2 * row(Min(T + 1, W + (1 - ends) * (REST + 1))) + ends * 3 * SLAB
    local = 2 * row(Min(T + 1, W - 1))
    recurrent = Max(L - FROM_TOP, 0) * local + joined + largest(kept, ends * update)
    above = Min(L - 1, 1) * (kept + (L - 1) * local + 2 * row(Min(T, W - 1) + 1))
    return largest(recurrent, above) + 3 * row(1)


def _train() -> Expr:
    """All that is saved, when the network's hidden rows get their gradient."""
    pieces, updates = block_pairs(T, W, W), floor((T - 1) / W)
    keys = W * (2 * updates - Min(updates, 1))
    local = (tensor(B, h) + 9) * pieces
    recurrent = tensor(B, h, T * R + updates * R * R + keys * R) + (15 * updates + 4) * SLAB
    rows = 15 * row(T) + 3 * tensor(B, T, f)
    below = (L - 1) * (local + 11 * row(T) + 2 * tensor(B, T, f))
    return below + local + recurrent + rows + Integer(16) * B * T + 3 * e * B * h * T


def _trained(impl: str) -> Expr:
    """All that ``blocked``, ``slabs`` or ``triton`` save, at the first gradients of the last layer.

    A sum of rows names what is kept: norms, products before and after they have unit length, results. Of several batch
    rows blocks of windows are copies, in the recurrent layer beside the keys and values that updates read.
    """
    blocks, statistics = impl != "triton", 0 if impl == "slabs" else 4 * B * h
    r = Min(BLOCK, T)
    band = e * h * r * (W + r) if blocks else 4 * B * h * T
    network = when_ffn(2 * row(T) + 2 * tensor(B, T, f) + 2 * e * B * T)
    around = band + row(T) + 2 * e * B * T + network  # the residual, numbers of norms
    plain = 8 * row(T) + 4 * e * B * h * T
    updates = floor((T - 1) / W)
    attended = 0 if impl == "slabs" else 1
    update = (15 + 2 * attended) * SLAB + 4 * e * B * R + 6 * e * B * h * R + 2 * statistics * R
    read = (3 + attended + 2) * row(T) + 2 * e * B * h * T + statistics * T
    recurrent = (7 + 2 * Min(B - 1, 1) if blocks else 8) * row(T) + 4 * e * B * h * T + read + updates * update
    saved = recurrent + (L - 1) * plain + L * around + 4 * e * R * d
    if blocks:
        made = row(T) + 2 * Max(e, 4) * B * T * d + Max(e, 4) * h * r * (W + r) + 3 * tensor(B, h, r, Min(T, W - 1 + r))
    else:
        made = 4 * row(T)
    done = when_ffn(2 * tensor(B, T, f) + row(T) - 2 * e * d * f)  # of the network, when attention gets its gradient
    inside = Min(L - 1, 1) * (made + e * d * d - done)
    # Of one layer: the gradient of what was mixed; two of all queries, their sum, those of keys and values; windows.
    any_ = Min(updates, 1)
    slices = any_ * (5 * row(T) + SLAB - attended * row(T - updates * W + W) - update + e * (8 * d * d + R * d))
    local = made + (3 + 2 * any_) * row(T) - read - updates * update + e * (7 * d * d + any_ * 5 * d * d)
    opened = any_ * (row(T) + 4 * SLAB + 3 * e * d * d - attended * row(T - updates * W))  # keys of the last states
    stages = [2 * row(T) + 2 * e * d * d, slices, local, opened]
    if impl == "slabs":  # buffers of a read, and of an update
        n, keys = Min(W, T), Min(2 * W, T)
        stages.append(backward_scratch(n, R, causal=False) + row(n) + 2 * SLAB + 2 * e * d * d)
        stages.append(any_ * (row(T) + backward_scratch(R, keys, causal=False) + 2 * row(keys) + 2 * SLAB))
    output = (1 - Min(L - 1, 1)) * (largest(*stages) - done)
    return saved + largest(when_ffn(tensor(B, T, f) + e * (d * f + d)), inside, output)
