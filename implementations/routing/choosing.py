"""Who belongs to which cluster, in Triton: nearest centroids without their scores, and each centroid's best tokens.

X = B H heads, T tokens, K clusters, D head width, w tokens a cluster.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.flash_rows import _dot, _load
from ctxbench.implementations._shared.flash_table import padded
from ctxbench.implementations._shared.ranges import _rows, _strides
from ctxbench.implementations.routing.gathered import Lists

TOKENS = 64  # of a tile of the scores that are compared and dropped
CENTROIDS = {256: 32, 512: 16}  # the same by bytes of a row, at most: operands of long rows leave registers for fewer
SELECT = 4096  # similarities of a centroid that are looked at together
ADDED = 32  # tokens whose contributions are added up together


def centroids_of_tile(width: int, itemsize: int) -> int:
    """How many centroids tokens are compared with at a time."""
    return next(count for most, count in CENTROIDS.items() if padded(width) * itemsize <= most)


def adding(width: int) -> int:
    """Warps that add up rows: of eight numbers a thread the compiler spills some, of four and of sixteen none."""
    return 8 if padded(width) <= 32 else 4


@triton.jit
def nearest_kernel(
    X, MEANS, IDS, x_batch, x_head, x_row, m_head, m_row, heads, T, centroids, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The centroid with the largest inner product, the first of equal ones. Grid: tiles of tokens, X."""
    start, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    x = _load(X + head // heads * x_batch + head % heads * x_head, start, x_row, T, ROWS, D, WIDTH)
    best, at = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.int32)
    for first in range(0, centroids, COLUMNS):
        means = _load(MEANS + head % heads * m_head, first, m_row, centroids, COLUMNS, D, WIDTH)
        scores = _dot(x, tl.trans(means)).to(X.dtype.element_ty).to(tl.float32)  # equal where the reference's are
        scores = tl.where(first + tl.arange(0, COLUMNS)[None, :] < centroids, scores, float("-inf"))
        value, index = tl.max(scores, 1, return_indices=True)
        at = tl.where(value > best, first + index, at)
        best = tl.maximum(best, value)
    row = start + tl.arange(0, ROWS)
    tl.store(IDS + head * T + row, at, mask=row < T)


@triton.jit
def _ordered(SIMILARITY, start, T, SIZE: tl.constexpr):
    """Similarities as unsigned numbers in the same order, and which of them exist."""
    token = start + tl.arange(0, SIZE)
    value = tl.load(SIMILARITY + token, mask=token < T, other=0.0).to(tl.float32) + 0.0  # no negative zero
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000), token < T


@triton.jit
def taken_kernel(SIMILARITY, IDS, T, w, SIZE: tl.constexpr):
    """The w most similar tokens of a centroid, ascending; of equal ones at the limit the first. Grid: X K.

    A radix search: four times the histogram of one more byte, of those that agree with the limit so far.
    """
    SIMILARITY += tl.program_id(0).to(tl.int64) * T
    IDS += tl.program_id(0).to(tl.int64) * w
    limit, wanted = tl.zeros([], tl.uint32), w
    for byte in tl.static_range(4):
        shift = 24 - 8 * byte
        counts = tl.zeros([256], tl.int32)
        for start in range(0, T, SIZE):
            key, there = _ordered(SIMILARITY, start, T, SIZE)
            if byte > 0:
                there = there & (key >> (shift + 8) == limit)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=there)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), 0)
        limit = limit * 256 + digit.to(tl.uint32)
    written, equals = 0, 0
    for start in range(0, T, SIZE):
        key, there = _ordered(SIMILARITY, start, T, SIZE)
        equal = (there & (key == limit)).to(tl.int32)
        order = equals + tl.cumsum(equal, 0)
        take = ((there & (key > limit)) | ((equal == 1) & (order <= wanted))).to(tl.int32)
        place = written + tl.cumsum(take, 0) - take
        tl.store(IDS + place, start + tl.arange(0, SIZE), mask=take == 1)
        equals += tl.sum(equal, 0)
        written += tl.sum(take, 0)


@triton.jit
def add_kernel(
    PARTS, SLOTS, BEGINS, OUT, p_batch, p_head, p_row, o_batch, o_head, o_row, heads, T, N, D: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Sum or mean of the slots of each token, in the order of the slots. Grid: tiles of tokens, X."""
    head = tl.program_id(1).to(tl.int64)
    PARTS += head // heads * p_batch + head % heads * p_head
    OUT += head // heads * o_batch + head % heads * o_head
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, column = token < T, tl.arange(0, WIDTH)
    begin = tl.load(BEGINS + head * (T + 1) + token, mask=there, other=0)
    count = tl.load(BEGINS + head * (T + 1) + token + 1, mask=there, other=0) - begin
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(0, tl.max(count, 0)):
        more = index < count
        slot = tl.load(SLOTS + head * N + begin + index, mask=more, other=0)
        place = PARTS + slot.to(tl.int64)[:, None] * p_row + column[None, :]
        acc += tl.load(place, mask=more[:, None] & (column[None, :] < D), other=0.0).to(tl.float32)
    if MEAN:
        acc = acc / tl.maximum(count, 1)[:, None]
    place = OUT + token.to(tl.int64)[:, None] * o_row + column[None, :]
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=there[:, None] & (column[None, :] < D))


@torch.library.custom_op("ctxbench::nearest", mutates_args=())
def nearest(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """``routing.assigned`` of ``x: [B, H, T, D]`` and ``means: [H, K, D]``: ``[B, H, T]`` int32."""
    x, means = _rows(x), means.contiguous()
    B, H, T, D = x.shape
    ids = torch.empty(B, H, T, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors'
        nearest_kernel[triton.cdiv(T, TOKENS), B * H](
            x, means, ids, *_strides(x), *means.stride()[:2], H, T, means.shape[1], D=D, WIDTH=padded(D), ROWS=TOKENS,
            COLUMNS=centroids_of_tile(D, x.element_size()),
        )  # fmt: skip
    return ids


@torch.library.custom_op("ctxbench::best_tokens", mutates_args=())
def best_tokens(similarity: torch.Tensor, w: int) -> torch.Tensor:
    """``similarity: [B, H, K, T]`` to the tokens of its w largest values, ascending: ``[B, H, K, w]`` int32."""
    similarity = similarity.contiguous()
    ids = torch.empty(*similarity.shape[:3], w, dtype=torch.int32, device=similarity.device)
    T = similarity.shape[3]
    with torch.cuda.device_of(similarity):
        taken_kernel[(similarity.numel() // T,)](similarity, ids, T, w, SIZE=min(SELECT, padded(T)))
    return ids


@torch.library.custom_op("ctxbench::add_up", mutates_args=())
def add_up(
    parts: torch.Tensor, slots: torch.Tensor, begins: torch.Tensor, like: torch.Tensor, mean: bool
) -> torch.Tensor:
    """Sum, or ``mean``, of the rows of ``parts: [B, H, N, D]`` that belong to each token; 0 where none does.

    Args:
        parts: by slot.
        slots: those of token 0, of token 1 and so on, ascending, ``[X, N]`` int32.
        begins: where the slots of each token begin, ``[X, T + 1]`` int32.
        like: what the result looks like, ``[B, H, T, D]``.
        mean: divide by how many there are.
    """
    parts, out = _rows(parts), _by_token(like)
    B, H, T, D = like.shape
    with torch.cuda.device_of(parts):
        add_kernel[triton.cdiv(T, ADDED), B * H](
            parts, slots, begins, out, *_strides(parts, out), H, T, slots.shape[1], D=D, WIDTH=padded(D), ROWS=ADDED,
            MEAN=mean, num_warps=adding(D),
        )  # fmt: skip
    return out


def _by_token(like: torch.Tensor) -> torch.Tensor:
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def runs(ids: torch.Tensor, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of numbers ``ids: [X, N]`` below ``kinds``: their order, stable, and where each number begins; both int32."""
    ordered, order = ids.sort(dim=1, stable=True)
    bounds = torch.arange(kinds + 1, dtype=ids.dtype, device=ids.device).expand(len(ids), -1).contiguous()
    return order.int(), torch.searchsorted(ordered, bounds, out_int32=True)


def clustered(query_ids: torch.Tensor, key_ids: torch.Tensor, clusters: int) -> Lists:
    """Tokens by the cluster each belongs to, ``[B, H, T]`` and ``[B, H, S]``; queries are the last T tokens."""
    keys, key_begins = runs(key_ids.flatten(0, 1), clusters)
    if query_ids is key_ids:
        return Lists(keys, keys, key_begins, key_begins)
    queries, query_begins = runs(query_ids.flatten(0, 1), clusters)
    return Lists(queries, keys, query_begins, key_begins)


def chosen(query_ids: torch.Tensor, key_ids: torch.Tensor) -> Lists:
    """Tokens by the cluster that took them, ``[B, H, K, w]``: all runs are equally long."""
    K, w = query_ids.shape[2:]
    begins = torch.arange(0, K * w + 1, w, dtype=torch.int32, device=query_ids.device)
    begins = begins.expand(query_ids.shape[0] * query_ids.shape[1], -1).contiguous()
    queries, keys = (ids.flatten(0, 1).flatten(1).int() for ids in (query_ids, key_ids))
    return Lists(queries, queries if query_ids is key_ids else keys, begins, begins)


@nearest.register_fake
def _(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[:3], dtype=torch.int32, device=x.device)


@best_tokens.register_fake
def _(similarity: torch.Tensor, w: int) -> torch.Tensor:
    return torch.empty(*similarity.shape[:3], w, dtype=torch.int32, device=similarity.device)


@add_up.register_fake
def _(parts: Any, slots: Any, begins: Any, like: torch.Tensor, mean: bool) -> torch.Tensor:
    return _by_token(like)


@formula(torch.ops.ctxbench.nearest)
def _nearest_flops(x: Any, means: Any, **_: Any) -> int:
    return int(2 * x.numel() * means.shape[1])


@formula(torch.ops.ctxbench.best_tokens, torch.ops.ctxbench.add_up)
def _no_products(*_: Any, **__: Any) -> int:
    return 0
