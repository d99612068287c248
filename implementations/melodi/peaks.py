"""Allocator peaks of MELODI: what is alive together at the worst moment. Derivation in README.md.

A row is ``B n d`` elements of ``n`` tokens. Tensors of a few rows of one token are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.decode_table import FEW
from ctxbench.implementations._shared.forms import T5_DISTANCES, rotating, rotation_tables
from ctxbench.implementations._shared.products_forms import backward_scratch, scratch
from ctxbench.implementations.melodi.params import MelodiParams
from ctxbench.method import ROPE

W, U, S, M, P = (param(name) for name in ("window", "summary_tokens", "short_slots", "long_slots", "long_per_window"))
NULLS = 2  # of slabs, in place of all empty slots
FULL = ceiling(M / P)  # windows that fill the long-term memory
ROWS = W + U


class Form(NamedTuple):
    """What decides the structure of a peak: the impl; 0 or 1: a long-term memory, a norm in the last mixing.

    ``position``: of the operator of ``kernels``, which makes no matrix of biases. ``turns``: whether it rotates queries
    as it reads them.
    """

    impl: str
    has_long: int
    norm_last: int
    position: str = ""
    turns: bool = False

    @property
    def reference(self) -> bool:
        """Whether all scores are kept."""
        return self.impl == "reference"

    @property
    def kernels(self) -> bool:
        """Whether the operator of ``ranges`` attends, with no copies and no biases of pairs."""
        return self.impl == "kernels"

    def biases(self, rows: Expr, keys: Expr) -> Expr:
        """Bytes of all layers' biases; of kernels, tables by distance."""
        if not self.kernels:
            return L * bias(rows, keys)
        distances = {"t5": T5_DISTANCES, "alibi": 2 * keys - 1}.get(self.position, 0)
        return L * Max(e, 4) * h * distances

    @property
    def rotates(self) -> bool:
        """Whether eager operators rotate queries and keys."""
        return self.position in ROPE and not self.turns

    def rotations(self, rows: Expr, keys: Expr, joined: int) -> Expr:
        """Bytes of rotated queries and of the tables beside; few queries of keys that are ``joined`` are decoded."""
        if self.position not in ROPE:
            return Integer(0)
        decoded = joined * Piecewise((1, (rows <= FEW) & (keys - 1 >= 2 * FEW + rows)), (0, True))
        return (decoded if self.turns else 1) * row(rows) + rotation_tables(rows)


def peak(impl: str, mode: str, params: MelodiParams, position: str = "", turns: bool = False) -> Expr:
    """Bytes of one impl in one mode; ``kernels`` are those of ``native`` and of ``triton``, which ``turns`` queries."""
    same = params.summary_tokens == params.short_slots > 0
    form = Form(impl, 1 if params.long_slots else 0, 1 if same else 0, position, turns)
    return {"forward": _forward, "stream": _stream, "decode": _decode, "train": _train}[mode](form)


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def some(count: Expr | int) -> Expr:
    """1 where there are any, else 0."""
    return Min(sympify(count), 1)


def filled(windows: Expr) -> Expr:
    """Filled slots of the long-term memory after so many windows."""
    return Min(M, P * windows)


def bias(rows: Expr, keys: Expr) -> Expr:
    """Bytes of one layer's bias."""
    return tensor(h, rows, keys)


def _memories(form: Form, windows: Expr) -> Expr:
    return 2 * L * row(S) + 2 * form.has_long * row(filled(windows))


def _queue(form: Form, pushes: Expr) -> Expr:
    """Where a call without gradients keeps the long-term memory of so many windows, keys and values."""
    return 2 * form.has_long * row(Min(pushes * Min(P, M), 2 * M + Min(P, M)))


def _layer(form: Form, rows: Expr, windows: Expr, fill: Expr | int = 0, kept: int = 0) -> Expr:
    """The last layer over ``rows`` rows of one window after ``windows`` others, its input left out.

    ``kept``: 1 where keys and values outlive the call.
    """
    keys = S + fill + rows
    operands = row(rows) + 2 * row(keys if kept or not form.kernels else rows)  # q, k, v
    seen = tensor(B, h, rows, keys)
    there = filled(windows)
    if form.reference:
        own = 3 * seen + bias(rows, keys) / e
        memory = 2 * row(M) + row(M - there) + 2 * tensor(B, h, rows, M) + row(rows)
    elif form.kernels:  # beside what was mixed: the result, what is left of it, or the two together
        own = row(rows) + Max(e, 4) * B * h * rows + form.rotations(rows, keys, kept)
        memory = 3 * row(rows) + some(windows) * 2 * Max(e, 4) * B * h * rows
        own = largest(own, _unit(rows) - operands, *[_rotating(rows) - operands] * form.rotates)
    else:
        is_partly = some(windows) * (1 - Min(floor(windows / sympify(FULL)), 1))
        if form.impl == "slabs":
            own, nulls, beside = row(rows), NULLS, Integer(0)
        else:
            own = row(rows) + 4 * B * h * rows
            nulls, beside = 1, 4 * B * h * rows
        memory = is_partly * 2 * row(there + nulls) + 2 * row(rows) + beside
    attending = operands + (largest(own, memory) if form.has_long else own)
    feeding = largest(2 * row(rows) + 2 * tensor(B, rows, f), 3 * row(rows)) + 2 * kept * row(keys)
    return largest(attending, feeding)  # the network, or the output projection and the sum


def _kept(form: Form, rows: Expr, windows: Expr) -> Expr:
    """Buffers of slabs, which the layers and windows of a call share: at the end of one after ``windows`` others."""
    if form.impl != "slabs":
        return Integer(0)
    is_partly = 1 - Min(floor(windows / sympify(FULL)), 1)
    recalled = some(windows) * scratch(rows, filled(windows) + is_partly * NULLS, causal=False)
    return largest(scratch(rows, S + rows, masked=False), form.has_long * recalled)


def _scaling(form: Form, rows: Expr, kept: Expr) -> Expr:
    """Unit keys beside the buffers of slabs.

    ``kept``: buffers of the windows before; those of this one are there if a layer below has used them.
    """
    if form.impl != "slabs":
        return Integer(0)
    below = some(L - 1) * scratch(rows, S + rows, masked=False)
    return _unit(rows) + largest(kept, below)


def _unit(rows: Expr) -> Expr:
    """Unit keys beside queries, the norm and what they are made of; in 16 bits they and their length are made in 32."""
    return 4 * row(rows) + (4 - Min(e, 4)) * 4 * B * rows * d + Max(e, 4) * B * h * rows


def _rotating(rows: Expr) -> Expr:
    """Keys while they are rotated by eager operators, after queries: the norm is gone by then."""
    return rotating(rows) - row(rows)


def _in_turn(form: Form, below: Expr, after: Expr, one: Callable[[Form], Expr]) -> Expr:
    """``one`` of the long layer or of the last, whichever holds more.

    ``below``: what every layer that is done leaves. ``after``: what the long one adds to it, once it is below.
    """
    if not form.has_long:
        return (L - 1) * below + one(form)
    above = Min(L - 1 - floor(L / 2), 1)  # a layer above the long one
    return largest(floor(L / 2) * below + one(form), (L - 1) * below + above * after + one(form._replace(has_long=0)))


def _closing() -> Expr:
    """The end of a whole window: its rows, their norm, and what is handed on."""
    return 2 * row(ROWS) + 6 * row(S)


def _joined(form: Form, windows: Expr) -> Expr:
    """The end of the one whole window of a call, with a new long-term memory."""
    return _closing() + form.has_long * 2 * row(filled(windows + 1))


def _forward(form: Form) -> Expr:
    """In the last closed window or in the open one; after the first, all outputs have their place."""
    closed = floor((T - 1) / W)
    rest = T - W * closed
    before, queue = closed - 1, _queue(form, closed)
    first = 1 - some(before)  # window of all: it makes the place of the slots

    def whole(form: Form) -> Expr:
        new = first * _queue(form, closed) + form.has_long * 2 * row(P)
        return largest(_layer(form, ROWS, before), _closing() + new)

    in_closed = some(closed) * (
        some(before) * row(T)
        + some(U + L - 1) * row(ROWS)
        + form.biases(ROWS, S + ROWS)
        + 2 * L * row(S)
        + some(before) * queue
        + largest(
            _kept(form, ROWS, before) + _in_turn(form, 2 * row(S), first * queue, whole),
            2 * (L - 1) * row(S) + _scaling(form, ROWS, some(before) * _kept(form, ROWS, before - 1)),
        )
    )
    earlier = some(closed) * _kept(form, ROWS, before)
    in_rest = (
        some(closed) * row(T)
        + some(L - 1) * row(rest)
        + form.biases(rest, S + rest)
        + 2 * L * row(S)
        + queue
        + largest(
            largest(earlier, _kept(form, rest, closed)) + _layer(form, rest, closed), _scaling(form, rest, earlier)
        )
    )
    return largest(in_closed, in_rest)


def _stream(form: Form) -> Expr:
    """The last whole window, or the one the stream ends in."""
    whole = floor(T / W)
    rest = T - W * whole
    before = whole - 1

    def closing(form: Form) -> Expr:
        return largest(_layer(form, ROWS, before), _joined(form, before))

    def open_(form: Form) -> Expr:
        return _layer(form, rest, whole, kept=1)

    in_whole = some(whole) * (
        (some(U + L - 1)) * row(ROWS)
        + some(before) * row(ROWS)
        + form.biases(ROWS, S + ROWS)
        + _memories(form, before)
        + largest(
            _kept(form, ROWS, before) + _in_turn(form, 2 * row(S), 2 * row(filled(whole)), closing),
            2 * (L - 1) * row(S) + _scaling(form, ROWS, Integer(0)),
        )
    )
    in_rest = some(rest) * (  # what a layer reads is kept by the one below
        some(whole) * row(ROWS)
        + form.biases(rest, S + rest)
        + _memories(form, whole)
        + largest(
            _kept(form, rest, whole) + _in_turn(form, 2 * row(S + rest) + row(rest), Integer(0), open_),
            (L - 1) * (2 * row(S + rest) + row(rest)) + _scaling(form, rest, Integer(0)),
        )
    )
    return largest(in_whole, in_rest)


def _decode(form: Form) -> Expr:
    """One token; one that ends its window pays for the summary, the mixing and a new long-term memory."""
    windows, fill = floor(T / W), T - W * floor(T / W)
    ends = floor((T + 1) / W) - windows
    rows = 1 + ends * U
    keys = S + fill + rows
    new = ends * 2 * row(S) + (1 - ends) * (2 * row(keys) + row(fill + 1))  # memory of a layer that is done
    keep = 2 * row(keys) + row(fill + 1)
    close = ends * (_joined(form, windows) + row(ROWS))
    in_last = (L - 1) * new + largest(_layer(form._replace(has_long=0), rows, windows, fill, kept=1), (1 - ends) * keep)
    in_middle = floor(L / 2) * new + largest(_layer(form, rows, windows, fill, kept=1), close)
    return form.biases(rows, keys) + some(L - 1) * row(rows) + largest(in_last, in_middle)


def _train(form: Form) -> Expr:
    """Backward through the last layer's attention, in the open window or in the last closed one."""
    if form.kernels:
        return _train_kernels(form)
    closed = floor((T - 1) / W)
    rest = T - W * closed
    memory = form.has_long * 2 * row(M) if form.reference else Integer(0)

    def scores(rows: Expr) -> tuple[Expr, Expr]:
        """Kept for backward by a layer, and by its recall."""
        if not form.reference:
            return Integer(0), 4 * B * h * rows * form.has_long if form.impl == "blocked" else Integer(0)
        seen = 2 * tensor(B, h, rows, S + rows) + h * rows * (S + rows)
        return seen, form.has_long * tensor(B, h, rows, M) + memory

    def window(rows: Expr, mixed: int) -> Expr:
        """Kept by all layers for a window; ``mixed``: it hands slots on."""
        mixing = mixed * (L - 1 + form.norm_last)
        norms = mixing * row(rows)
        width = Piecewise((12, f > 0), (10, True)) * row(rows) + tensor(B, rows, f)
        small = 2 * row(S) + mixed * 3 * row(S) + 2 * e * B * h * rows
        own, recall = scores(rows)
        return L * (width + small + own) + norms + form.has_long * (2 * row(rows) + mixed * 4 * row(P)) + recall

    def attention(rows: Expr, before: Expr) -> Expr:
        """Backward of the last layer's attention: what is not freed yet, and what it makes."""
        rest_of_layer = 13 * row(rows) + 2 * row(S)
        own, recall = scores(rows)
        if form.reference:
            made = largest(tensor(B, h, rows, S + rows), form.has_long * tensor(B, h, rows, M)) * 2
        elif form.impl == "slabs":
            made = backward_scratch(rows, S + rows, masked=False) + (Max(e, 4) + e) * h * rows * (S + rows)
        else:
            made = 3 * tensor(B, h, rows, S + rows)
        lower = (L - 1) * (window(rows, 0) - form.has_long * 2 * row(rows) - recall) / L
        return lower + rest_of_layer + own + recall + made + _slots(form, before)

    biases = [Integer(0)] * 2 if form.reference else [L * bias(rows, S + rows) for rows in (rest, ROWS)]
    in_rest = closed * window(ROWS, 1) + attention(rest, closed) + biases[0] + some(closed) * biases[1]
    in_closed = some(closed) * (
        (closed - 1) * window(ROWS, 1) + attention(ROWS, closed) + biases[1] + e * (2 * d * f + 3 * d**2)
    )
    return row(T) + largest(in_rest, in_closed)


def _train_kernels(form: Form) -> Expr:
    """The first gradients of the open window's last layer, or of the last closed one's, beside all that is saved.

    The first layer reads the open window where it lies, and nothing keeps what the last one makes of it.
    """
    closed = floor((T - 1) / W)
    rest = T - W * closed
    wide = Max(e, 4) * B * h
    partly = Min(Max(closed - 1, 0), FULL - 1)  # closed windows that recall from a memory that is not full

    def window(rows: Expr, mixed: int) -> Expr:
        """Kept by all layers for a window; ``mixed``: it hands slots on."""
        layer = Piecewise((12, f > 0), (10, True)) * row(rows) + tensor(B, rows, f) + 3 * wide * rows
        return L * (layer + mixed * 5 * row(S)) + mixed * (L - 1 + form.norm_last) * row(rows) + form.has_long * (
            2 * row(rows) + mixed * 3 * row(P)
        )  # fmt: skip

    def left(rows: Expr) -> Expr:
        """Kept by a recall from a memory that is not full: the result, its log-sums, and the part that is left."""
        return form.has_long * (row(rows) + 2 * wide * rows)

    def first(rows: Expr) -> Expr:
        """Made in the network, or in attention, which finds less of the layer."""
        hidden = when_ffn(2 * tensor(B, rows, f) + e * d * f)
        freed = when_ffn(tensor(B, rows, f) + 2 * row(rows) - 2 * e * d * f - row(rows))
        return largest(hidden, 5 * row(rows) + form.has_long * row(rows) + e * d**2 - freed)

    saved = row(T) + closed * window(ROWS, 1) + partly * left(ROWS) + _slots(form, closed)
    open_ = some(closed) * (1 - Min(floor(closed / sympify(FULL)), 1)) * left(rest)
    in_rest = saved + window(rest, 0) - 2 * row(rest) + open_ + first(rest)
    maps = L * e * (4 * d**2 + 2 * d * f) + e * (S + form.has_long * P) * ROWS
    memories = 2 * L * row(S) + form.has_long * 2 * row(filled(closed))
    mixed = (1 + form.norm_last) * row(ROWS)  # what the last layer's mixing kept is free again
    in_closed = some(closed) * (saved + row(ROWS) - mixed + maps + memories + first(ROWS))
    return largest(in_rest, in_closed)


def _slots(form: Form, windows: Expr) -> Expr:
    """Filled slots that every window's recall keeps, keys and values."""
    if form.reference or not form.has_long:
        return Integer(0)
    growing = Min(windows, FULL)
    return 2 * row(P * growing * (growing - 1) / 2 + (windows - growing) * M + filled(windows))
