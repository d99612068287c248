"""Attention inside clusters in Triton, rows gathered by index inside the loops: no gathered copy, no score matrix.

Queries and keys are listed cluster by cluster, ascending, so a cluster is a run of both lists. A call's queries are the
last tokens, so causality inside a run is a triangle of ranks aligned at its end, and tiles beyond it are skipped. A
query is listed once (``strict``) or by any number of clusters (``topw``): there results are by slot of the list, and
``choosing.add_up`` makes the mean. Nothing is added atomically: every run gives the same bits.

X = B H heads, T queries, S keys, N listed queries, M listed keys, C clusters, D head width.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.flash_rows import _dot
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _add_dkv, _add_dq, _online
from ctxbench.implementations._shared.flash_table import BACKWARD, padded
from ctxbench.implementations._shared.ranges import _rows, _strides, architecture_of
from ctxbench.implementations.routing.launch import config


class Lists(NamedTuple):
    """Who is in which cluster, int32: tokens ``[X, N]`` and ``[X, M]``, where each run begins ``[X, C + 1]``."""

    queries: torch.Tensor
    keys: torch.Tensor
    query_begins: torch.Tensor
    key_begins: torch.Tensor


@triton.jit
def _run_of(BEGINS, tile, clusters, SIZE: tl.constexpr, CLUSTERS: tl.constexpr):
    """The run that a tile of SIZE ranks belongs to, and the tile's first rank in it; -1 where there is none."""
    run = tl.arange(0, CLUSTERS)
    there = run < clusters
    begin = tl.load(BEGINS + run, mask=there, other=0)
    tiles = tl.cdiv(tl.load(BEGINS + run + 1, mask=there, other=0) - begin, SIZE)
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    which = tl.max(tl.where(own, run, -1), 0)
    return which, (tile - tl.sum(tl.where(own, before, 0), 0)) * SIZE


@triton.jit
def _tile_of_run(
    QUERY_BEGINS, KEY_BEGINS, head, tile, clusters, SIZE: tl.constexpr, CLUSTERS: tl.constexpr, BY_KEYS: tl.constexpr
):  # fmt: skip
    """The run of a tile, or -1; the tile's first rank; the run's first query and first key, and how many it has."""
    QUERY_BEGINS += head * (clusters + 1)
    KEY_BEGINS += head * (clusters + 1)
    run, start = _run_of(KEY_BEGINS if BY_KEYS else QUERY_BEGINS, tile, clusters, SIZE, CLUSTERS)
    there = tl.maximum(run, 0)
    first, first_key = tl.load(QUERY_BEGINS + there), tl.load(KEY_BEGINS + there)
    queries, keys = tl.load(QUERY_BEGINS + there + 1) - first, tl.load(KEY_BEGINS + there + 1) - first_key
    return run, start, first, first_key, queries, keys


@triton.jit
def _key_tiles(
    position, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLIER: tl.constexpr, WITHOUT_SELF: tl.constexpr
):  # fmt: skip
    """Tiles of keys that ROWS queries from ``position`` on see wholly, and those that any of them sees."""
    whole, last = keys // COLUMNS, tl.cdiv(keys, COLUMNS)
    if EARLIER:
        whole = (position + 1 - WITHOUT_SELF) // COLUMNS
        last = tl.cdiv(tl.minimum(position + ROWS, keys), COLUMNS)
    return whole, last


@triton.jit
def _gather(base, rows, stride, there, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix as ``[len(rows), WIDTH]``, zero where ``there`` says no."""
    column = tl.arange(0, WIDTH)
    mask = there[:, None]
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _scatter(base, rows, stride, there, value, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write what ``_gather`` would read."""
    column = tl.arange(0, WIDTH)
    mask = there[:, None]
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    place = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _seen(rank, key, EARLIER: tl.constexpr, WITHOUT_SELF: tl.constexpr, inside):
    """Whether a query sees a key, by ranks among the keys of the run; one that sees nothing else sees itself."""
    if EARLIER:
        last = rank
        if WITHOUT_SELF:
            last = tl.maximum(rank - 1, 0)
        inside = inside & (key <= last)
    return inside


@triton.jit
def forward_kernel(
    Q, K, V, QUERIES, KEYS, QUERY_BEGINS, KEY_BEGINS, OUT, LSE, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, heads, N, M, clusters, scale, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLUSTERS: tl.constexpr, EARLIER: tl.constexpr,
    WITHOUT_SELF: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of listed queries. Grid: bound on tiles, X."""
    head = tl.program_id(1).to(tl.int64)
    # The last ranks of a run have most keys and begin first.
    run, start, first, first_key, queries, keys = _tile_of_run(
        QUERY_BEGINS, KEY_BEGINS, head, tl.num_programs(0) - 1 - tl.program_id(0), clusters, ROWS, CLUSTERS, False
    )
    if run < 0:
        return
    Q += head // heads * q_batch + head % heads * q_head
    K += head // heads * k_batch + head % heads * k_head
    V += head // heads * v_batch + head % heads * v_head
    OUT += head // heads * o_batch + head % heads * o_head
    KEYS += head * M + first_key

    rank = start + tl.arange(0, ROWS)
    slot = first + rank
    there = rank < queries
    rows = tl.load(QUERIES + head * N + slot, mask=there, other=0)
    position = rank + (keys - queries)
    q = _gather(Q, rows, q_row, there, D, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum and sum, in units of base 2
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    to_base_2 = scale * LOG2_E
    whole, last = _key_tiles(start + keys - queries, keys, ROWS, COLUMNS, EARLIER, WITHOUT_SELF)
    for part in tl.static_range(2):  # before the triangle, then its edge, which alone needs a mask
        steps = whole if part == 0 else last - whole
        for step in range(0, steps):
            key = (step if part == 0 else whole + step) * COLUMNS + tl.arange(0, COLUMNS)
            inside = key < keys
            columns = tl.load(KEYS + key, mask=inside, other=0)
            scores = _dot(q, tl.trans(_gather(K, columns, k_row, inside, D, WIDTH)))
            if part == 1:
                seen = _seen(position[:, None], key[None, :], EARLIER, WITHOUT_SELF, inside[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            top, total, p, shrink = _online(top, total, scores, to_base_2)
            v = _gather(V, columns, v_row, inside, D, WIDTH)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
    empty = total == 0.0  # a cluster that takes no keys
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    _scatter(OUT, slot if BY_SLOT else rows, o_row, there, acc, D, WIDTH)
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(LSE + head * N + slot, lse, mask=there)


@triton.jit
def dq_kernel(
    Q, K, V, QUERIES, KEYS, QUERY_BEGINS, KEY_BEGINS, OUT, GRAD, SHARE, LSE, DELTA, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, dq_batch, dq_head, dq_row, heads, T, N, M, clusters, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLUSTERS: tl.constexpr,
    EARLIER: tl.constexpr, WITHOUT_SELF: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Gradient dQ of one tile of listed queries, and for ``dkv_kernel`` the row sums of ``grad * output``."""
    head = tl.program_id(1).to(tl.int64)
    run, start, first, first_key, queries, keys = _tile_of_run(
        QUERY_BEGINS, KEY_BEGINS, head, tl.num_programs(0) - 1 - tl.program_id(0), clusters, ROWS, CLUSTERS, False
    )
    if run < 0:
        return
    Q += head // heads * q_batch + head % heads * q_head
    K += head // heads * k_batch + head % heads * k_head
    V += head // heads * v_batch + head % heads * v_head
    OUT += head // heads * o_batch + head % heads * o_head
    GRAD += head // heads * g_batch + head % heads * g_head
    DQ += head // heads * dq_batch + head % heads * dq_head
    KEYS += head * M + first_key

    rank = start + tl.arange(0, ROWS)
    slot = first + rank
    there = rank < queries
    rows = tl.load(QUERIES + head * N + slot, mask=there, other=0)
    position = rank + (keys - queries)
    q = _gather(Q, rows, q_row, there, D, WIDTH)
    grad = _gather(GRAD, rows, g_row, there, D, WIDTH)
    if BY_SLOT:  # a share of the mean's gradient
        grad = (grad * tl.load(SHARE + head * T + rows, mask=there, other=0.0)[:, None]).to(q.dtype)
    o = _gather(OUT, slot if BY_SLOT else rows, o_row, there, D, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + head * N + slot, delta, mask=there)
    lse = tl.load(LSE + head * N + slot, mask=there, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    whole, last = _key_tiles(start + keys - queries, keys, ROWS, COLUMNS, EARLIER, WITHOUT_SELF)
    for part in tl.static_range(2):
        steps = whole if part == 0 else last - whole
        for step in range(0, steps):
            key = (step if part == 0 else whole + step) * COLUMNS + tl.arange(0, COLUMNS)
            inside = key < keys
            columns = tl.load(KEYS + key, mask=inside, other=0)
            k = _gather(K, columns, k_row, inside, D, WIDTH)
            v = _gather(V, columns, v_row, inside, D, WIDTH)
            scores = _dot(q, tl.trans(k))
            if part == 1:
                seen = _seen(position[:, None], key[None, :], EARLIER, WITHOUT_SELF, inside[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            acc = _add_dq(acc, scores, scale * LOG2_E, lse, delta, grad, k, v, ROWS, COLUMNS, D, WIDTH, WIDTH)
    _scatter(DQ, slot if BY_SLOT else rows, dq_row, there, acc * scale, D, WIDTH)


@triton.jit
def dkv_kernel(
    Q, K, V, QUERIES, KEYS, QUERY_BEGINS, KEY_BEGINS, GRAD, SHARE, LSE, DELTA, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, T, N, M, clusters, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLUSTERS: tl.constexpr,
    EARLIER: tl.constexpr, WITHOUT_SELF: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Gradients dK and dV of one tile of listed keys; scores are ``[COLUMNS, ROWS]``. Grid: bound on tiles, X."""
    head = tl.program_id(1).to(tl.int64)
    run, start, first, first_key, queries, keys = _tile_of_run(
        QUERY_BEGINS, KEY_BEGINS, head, tl.program_id(0), clusters, COLUMNS, CLUSTERS, True
    )
    if run < 0:
        return
    Q += head // heads * q_batch + head % heads * q_head
    K += head // heads * k_batch + head % heads * k_head
    V += head // heads * v_batch + head % heads * v_head
    GRAD += head // heads * g_batch + head % heads * g_head
    DK += head // heads * dk_batch + head % heads * dk_head
    DV += head // heads * dv_batch + head % heads * dv_head
    QUERIES += head * N + first
    LSE += head * N + first
    DELTA += head * N + first

    key = start + tl.arange(0, COLUMNS)
    inside = key < keys
    columns = tl.load(KEYS + head * M + first_key + key, mask=inside, other=0)
    k = _gather(K, columns, k_row, inside, D, WIDTH)
    v = _gather(V, columns, v_row, inside, D, WIDTH)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    tile = 0
    if EARLIER:  # the first query that sees a key stands where it does, and the first of a run also sees itself
        tile = tl.maximum(start - (keys - queries), 0) // ROWS
    for step in range(tile, tl.cdiv(queries, ROWS)):
        rank = step * ROWS + tl.arange(0, ROWS)
        there = rank < queries
        rows = tl.load(QUERIES + rank, mask=there, other=0)
        q = _gather(Q, rows, q_row, there, D, WIDTH)
        grad = _gather(GRAD, rows, g_row, there, D, WIDTH)
        if BY_SLOT:
            grad = (grad * tl.load(SHARE + head * T + rows, mask=there, other=0.0)[:, None]).to(q.dtype)
        lse = tl.load(LSE + rank, mask=there, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(DELTA + rank, mask=there, other=0.0)
        position = rank[None, :] + (keys - queries)
        seen = _seen(position, key[:, None], EARLIER, WITHOUT_SELF, inside[:, None] & there[None, :])
        scores = tl.where(seen, _dot(k, tl.trans(q)), float("-inf"))
        dk, dv = _add_dkv(dk, dv, scores, scale * LOG2_E, lse, delta, q, grad, v, ROWS, COLUMNS, D, WIDTH, WIDTH)
    at = first_key + key if BY_SLOT else columns
    _scatter(DK, at, dk_row, inside, dk * scale, D, WIDTH)
    _scatter(DV, at, dv_row, inside, dv, D, WIDTH)


def _launch(kernel: str, q: torch.Tensor, lists: Lists, clusters: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid of one kernel, and its compile-time arguments: every run may end in a tile that is not full."""
    width = q.shape[3]
    chosen = config(kernel, width, q.element_size(), architecture_of(q.device))
    listed = lists.keys.shape[1] // chosen.columns if kernel == "dkv" else lists.queries.shape[1] // chosen.rows
    return (listed + clusters, q.shape[0] * q.shape[1]), {
        "D": width, "WIDTH": padded(width), "ROWS": chosen.rows, "COLUMNS": chosen.columns,
        "CLUSTERS": triton.next_power_of_2(clusters), "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


@torch.library.custom_op("ctxbench::gathered", mutates_args=())
def gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
    query_begins: torch.Tensor, key_begins: torch.Tensor, pairs: int, earlier: bool, without_self: bool, by_slot: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Results by token ``[B, H, T, D]`` or ``by_slot`` ``[B, H, N, D]``, and log-sum-exp ``[X, N]`` in base 2.

    Args:
        q: ``[B, H, T, D]``, any strides.
        k: ``[B, H, S, D]``.
        v: the same shape as ``k``.
        queries: of :class:`Lists`; by token every query must be listed once.
        keys: of the lists.
        query_begins: of the lists.
        key_begins: of the lists.
        pairs: what a head is charged for; how many there are is contents.
        earlier: a query sees the tokens up to itself; its run's queries are the last of its keys then.
        without_self: and itself only where it would see nothing else.
        by_slot: whether results are by slot of the list.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    lists = Lists(queries, keys, query_begins, key_begins)
    clusters = query_begins.shape[1] - 1
    out, lse = _results(q, queries, by_slot)
    grid, options = _launch("forward", q, lists, clusters)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        forward_kernel[grid](
            q, k, v, *lists, out, lse, *_strides(q, k, v, out), q.shape[1], queries.shape[1], keys.shape[1], clusters,
            q.shape[3] ** -0.5, EARLIER=earlier, WITHOUT_SELF=without_self, BY_SLOT=by_slot, **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("ctxbench::gathered_backward", mutates_args=())
def gathered_backward(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, share: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
    query_begins: torch.Tensor, key_begins: torch.Tensor, pairs: int, earlier: bool, without_self: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, by token; with ``share: [X, T]`` by slot and in float32.

    ``grad: [B, H, T, D]`` is by token always; ``share`` is the part of it that each slot of a token takes.
    """
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    lists, by_slot = Lists(queries, keys, query_begins, key_begins), share is not None
    clusters = query_begins.shape[1] - 1
    dq, dk, dv = _gradients(q, k, v, queries, keys, by_slot)
    delta = torch.empty_like(lse)
    sizes = q.shape[1], q.shape[2], queries.shape[1], keys.shape[1], clusters, q.shape[3] ** -0.5
    rules = {"EARLIER": earlier, "WITHOUT_SELF": without_self, "BY_SLOT": by_slot}
    shares = lse if share is None else share
    with torch.cuda.device_of(q):
        grid, options = _launch("dq", q, lists, clusters)
        dq_kernel[grid](
            q, k, v, *lists, out, grad, shares, lse, delta, dq, *_strides(q, k, v, out, grad, dq), *sizes, **rules,
            **options,
        )  # fmt: skip
        grid, options = _launch("dkv", q, lists, clusters)
        dkv_kernel[grid](
            q, k, v, *lists, grad, shares, lse, delta, dk, dv, *_strides(q, k, v, grad, dk, dv), *sizes, **rules,
            **options,
        )  # fmt: skip
    return dq, dk, dv


def _token_by_token(like: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty ``[B, H, rows, D]`` whose heads lie side by side, so that merging them is free."""
    B, H, _, D = like.shape
    return like.new_empty(B, rows, H, D, dtype=dtype).transpose(1, 2)


def _results(q: torch.Tensor, queries: torch.Tensor, by_slot: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = _token_by_token(q, queries.shape[1] if by_slot else q.shape[2], q.dtype)
    return out, q.new_empty(queries.shape, dtype=torch.float32)


def _gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, by_slot: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if by_slot:
        listed = queries.shape[1], keys.shape[1], keys.shape[1]
        dq, dk, dv = (_token_by_token(q, rows, torch.float32) for rows in listed)
    else:
        dq, dk, dv = (_token_by_token(x, x.shape[2], x.dtype) for x in (q, k, v))
    return dq, dk, dv


@gathered.register_fake
def _(q: Any, k: Any, v: Any, queries: Any, keys: Any, query_begins: Any, key_begins: Any, *rest: Any) -> Any:
    return _results(q, queries, rest[-1])


@gathered_backward.register_fake
def _(
    grad: Any, out: Any, lse: Any, share: Any, q: Any, k: Any, v: Any, queries: Any, keys: Any, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _gradients(q, k, v, queries, keys, share is not None)


@formula(torch.ops.ctxbench.gathered)
def _flops(q: Any, k: Any, v: Any, queries: Any, keys: Any, query_begins: Any, key_begins: Any, pairs: int,
           *_: Any, **__: Any) -> int:  # fmt: skip
    """Two products over the pairs a head is charged for."""
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs)


@formula(torch.ops.ctxbench.gathered_backward)
def _backward_flops(grad: Any, out_: Any, lse: Any, share: Any, *arguments: Any, **_: Any) -> int:
    """Seven products: scores and their gradient in both kernels, then dQ, dK and dV."""
    return int(_flops(*arguments) * BACKWARD)
