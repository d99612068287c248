"""All segments at once: no layer has a recurrence, because its memory is its own input (README, one-shot form).

Keys and values are projected once a token. Blocks of queries then see their keys as strided windows of that one
stream. Two products make the scores: distances first, read through a stride one short of a row, which is the
published shift without its padded copy; contents are added by the second product. Nothing grows as T x T, and the
backward pass recomputes the scores block by block.

B batch, H heads, D head width, T tokens, P = past + T rows, n queries and K keys of a block, G segments a block;
streams are ``[H * B, rows, D]``, heads outermost so that distances are shared by the batch; X = H * B * G.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ctxbench.implementations.transformer_xl.schedule import BLOCK, Block, blocks


class Geometry(NamedTuple):
    """The staircase of one call: ``past`` rows come before its first token, ``phase`` of them in its segment."""

    segment_len: int
    mem_len: int
    same_length: bool
    past: int
    phase: int

    def blocks(self, tokens: int, heads: int) -> Iterator[Block]:
        """Cover all queries; ``heads`` counts the batch in."""
        return blocks(tokens, self.past, self.phase, self.segment_len, self.mem_len, heads)


class Operands(NamedTuple):
    """What every block reads; scores are ``(content . k + position . r) / sqrt(D)``."""

    content: torch.Tensor  # [H * B, T, D], queries plus u
    position: torch.Tensor  # [H * B, T, D], queries plus v
    k: torch.Tensor  # [H * B, P, D]
    v: torch.Tensor  # [H * B, P, D]
    r: torch.Tensor  # [H, longest K, D], by falling distance


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    rows = torch.cat((past, x), dim=1) if past.shape[1] else x
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        return attend_token(layer, x, rows)
    params = layer.params
    geometry = Geometry(params.segment_len, params.mem_len, params.same_length, past.shape[1], phase)
    H = layer.num_heads
    q = layer.q(x).unflatten(2, (H, -1)).permute(2, 0, 1, 3)  # [H, B, T, D]
    content, position = (
        (q + bias.view(H, 1, 1, -1)).flatten(0, 1) for bias in (layer.content_bias, layer.position_bias)
    )
    del q  # else it would live through the attention
    longest = max(block.keys for block in geometry.blocks(x.shape[1], heads=1))
    r = layer.r(layer.table[:longest].flip(0)).unflatten(1, (H, -1)).transpose(0, 1)
    mixed = Staircase.apply(content, position, rows, layer.k.weight, layer.v.weight, r, geometry)
    return _heads_last(mixed, x.shape[0])


def attend_token(layer: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One query: the projections of keys, distances and values move to its side of the products.

    ``q . (W h) = (W^T q) . h``, so the rows are read as they are instead of being projected: 6 H d_model FLOPs a row
    instead of 6 d_model^2.
    """
    if layer.params.same_length:
        rows = rows[:, max(0, rows.shape[1] - layer.params.mem_len) :]
    B, K, d_model = rows.shape
    H, D = layer.content_bias.shape
    w_k, w_r, w_v = (weight.view(H, D, d_model) for weight in (layer.k.weight, layer.r.weight, layer.v.weight))
    q = layer.q(x).view(B, H, D).transpose(0, 1)
    content, position = (
        (q + bias[:, None]) * D**-0.5 @ w  # [H, B, d_model]
        for bias, w in ((layer.content_bias, w_k), (layer.position_bias, w_r))
    )
    by_distance = (position.flatten(0, 1) @ layer.table[:K].flip(0).T).view(H, B, K)
    scores = torch.baddbmm(by_distance.transpose(0, 1), content.transpose(0, 1), rows.transpose(1, 2))  # [B, H, K]
    seen = scores.softmax(dim=2) @ rows  # [B, H, d_model]
    mixed = seen.transpose(0, 1) @ w_v.transpose(1, 2)  # [H, B, D]
    return mixed.transpose(0, 1).reshape(B, 1, d_model)


def staircase(operands: Operands, geometry: Geometry) -> torch.Tensor:
    """The operator: ``[H * B, T, D]`` from projected queries, keys, values and distances; no gradient."""
    out = torch.empty_like(operands.content)
    future = _future(operands)
    for block in geometry.blocks(out.shape[1], len(out)):
        first = geometry.past + block.first_key
        probabilities = _scores(operands, block, geometry, future).softmax(dim=2)
        _put(out, block, probabilities @ _windows(operands.v, block, first, block.keys))
        del probabilities  # else it would live through the next block's scores
    return out


class Gradients(NamedTuple):
    """Of :class:`Operands`; keys and values get those of their own segment and of later ones apart."""

    content: torch.Tensor
    position: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_as_memory: torch.Tensor
    v_as_memory: torch.Tensor
    r: torch.Tensor


def staircase_backward(grad: torch.Tensor, operands: Operands, geometry: Geometry) -> Gradients:
    """Gradients of :func:`staircase` for ``grad: [H * B, T, D]``; scores are computed again, block by block."""
    content, position, k, v, r = operands
    exact = torch.promote_types(r.dtype, torch.float32)  # every block of the sequence adds to the distances
    result = Gradients(  # type: ignore[call-arg]
        torch.empty_like(content), torch.empty_like(position),
        *(torch.zeros_like(stream) for stream in (k, v, k, v)), torch.zeros_like(r, dtype=exact),
    )  # fmt: skip
    future = _future(operands)
    for block in geometry.blocks(content.shape[1], len(content)):
        _block_backward(result, grad, operands, block, geometry, future)
    return result


def _block_backward(
    result: Gradients, grad: torch.Tensor, operands: Operands, block: Block, geometry: Geometry, future: torch.Tensor
) -> None:
    """Add one block's part; a function, so that nothing of one block lives through the next."""
    n, K, start = block.queries, block.keys, geometry.past + block.first_key
    content, position, k, v, r = operands
    above = _queries(grad, block)  # [X, n, D]
    probabilities = _scores(operands, block, geometry, future).softmax(dim=2)  # [X, n, K]
    _add_windows(result.v, result.v_as_memory, probabilities.transpose(1, 2) @ above, block, start)
    by_score = torch._softmax_backward_data(
        above @ _windows(v, block, start, K).transpose(1, 2), probabilities, 2, above.dtype
    )
    by_score *= r.shape[2] ** -0.5
    del probabilities
    by_key = by_score.transpose(1, 2) @ _queries(content, block)
    _add_windows(result.k, result.k_as_memory, by_key, block, start)
    _put(result.content, block, by_score @ _windows(k, block, start, K))
    by_distance = _unshift(by_score).view(len(r), -1, K)  # [H, B * G * n, K]
    result.r[:, -K:] += by_distance.transpose(1, 2) @ _queries(position, block).reshape(len(r), -1, r.shape[2])
    _put(result.position, block, (by_distance @ r[:, -K:]).view(-1, n, r.shape[2]))


class Staircase(torch.autograd.Function):
    """Projection of keys and values, and attention: one node, so that memory rows pass gradients to weights alone."""

    @staticmethod
    def forward(
        ctx: Any, content: torch.Tensor, position: torch.Tensor, rows: torch.Tensor, w_k: torch.Tensor,
        w_v: torch.Tensor, r: torch.Tensor, geometry: Geometry,
    ) -> torch.Tensor:  # fmt: skip
        k, v = (_heads_first(linear(rows, weight), len(r)) for weight in (w_k, w_v))
        operands = Operands(content, position, k, v, r)
        ctx.geometry = geometry
        ctx.save_for_backward(*operands, rows, w_k, w_v)
        return staircase(operands, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, rows, w_k, w_v = ctx.saved_tensors
        result = staircase_backward(grad, Operands(*saved), ctx.geometry)
        k, v, k_as_memory, v_as_memory = (_heads_last(stream, len(rows)) for stream in result[2:6])  # [B, P, d_model]
        by_rows = (k @ w_k).add_(v @ w_v)
        by_w_k = (k + k_as_memory).flatten(0, 1).T @ rows.flatten(0, 1)
        by_w_v = (v + v_as_memory).flatten(0, 1).T @ rows.flatten(0, 1)
        return result.content, result.position, by_rows, by_w_k, by_w_v, result.r.to(rows.dtype), None


def _scores(operands: Operands, block: Block, geometry: Geometry, future: torch.Tensor) -> torch.Tensor:
    """Masked scores of a block, ``[X, n, K]``."""
    n, K, r = block.queries, block.keys, operands.r
    position = _queries(operands.position, block).reshape(len(r), -1, r.shape[2])  # [H, B * G * n, D]
    by_distance = position @ r[:, -K:].transpose(1, 2)  # column 0 is K - 1 tokens away
    # Key j of row i is K - n + i - j away: column n - 1 - i + j. What the stride reads beyond a row is masked below.
    shifted = by_distance.as_strided((len(operands.k) * block.count, n, K), (n * K, K - 1, 1), n - 1)
    keys = _windows(operands.k, block, geometry.past + block.first_key, K)
    scale = r.shape[2] ** -0.5  # inside the product, which rounds once
    content = _queries(operands.content, block)
    scores = torch.baddbmm(shifted, content, keys.transpose(1, 2), beta=scale, alpha=scale)
    scores[:, :, K - n :].masked_fill_(future[:n, :n], float("-inf"))
    outside = K - geometry.mem_len  # columns that some query of the block is too far from
    if geometry.same_length and outside > 0:
        old = torch.ones(n, outside, dtype=torch.bool, device=scores.device).tril(outside - n)
        scores[:, :, :outside].masked_fill_(old, float("-inf"))
    return scores


def _future(operands: Operands) -> torch.Tensor:
    """True where a key of the same block comes after the query, ``[BLOCK, BLOCK]``."""
    return torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=operands.k.device).triu(1)


def _unshift(shifted: torch.Tensor) -> torch.Tensor:
    """Undo the shift of a gradient that is 0 where masked: ``[X, n, K] -> [X, n * K]``, a row after the other."""
    X, n, K = shifted.shape
    plain = shifted.new_zeros(X, n * K)
    # The last key of a row shares its place with the first key of the next row, and is masked but for the last row.
    plain[:, n - 1 : -1].view(X, n, K - 1).copy_(shifted[:, :, :-1])
    plain[:, -1] = shifted[:, -1, -1]
    return plain


def _windows(stream: torch.Tensor, block: Block, first: int, width: int) -> torch.Tensor:
    """``width`` rows from ``first`` on, and as many one segment further, ...: ``[X, width, D]``; a view if G = 1."""
    return _strided(stream, block, first, width).flatten(0, 1) if block.count > 1 else stream[:, first : first + width]


def _strided(stream: torch.Tensor, block: Block, first: int, width: int) -> torch.Tensor:
    """The same rows as a view ``[H * B, G, width, D]``."""
    matrix, row, column = stream.stride()
    size = (len(stream), block.count, width, stream.shape[2])
    return stream.as_strided(size, (matrix, block.rows * row, row, column), stream.storage_offset() + first * row)


def _queries(stream: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's rows of a stream of queries, ``[X, n, D]``."""
    return _windows(stream, block, block.first + block.offset, block.queries)


def _put(stream: torch.Tensor, block: Block, values: torch.Tensor) -> None:
    """Write a block's rows, ``values: [X, n, D]``."""
    target = _strided(stream, block, block.first + block.offset, block.queries)
    target.copy_(values.view(target.shape))


def _add_windows(own: torch.Tensor, memory: torch.Tensor, values: torch.Tensor, block: Block, start: int) -> None:
    """Add gradients ``[X, K, D]`` of a block's keys from row ``start`` on, the segment's own rows to ``own``.

    Windows of successive segments overlap; pieces no wider than a segment do not, so each addition is one operator.
    """
    windows = values.view(len(own), block.count, block.keys, -1)
    split = block.keys - block.own
    for target, begin, end in ((memory, 0, split), (own, split, block.keys)):
        for first in range(begin, end, block.rows):
            width = min(block.rows, end - first)
            _strided(target, block, start + first, width).add_(windows[:, :, first : first + width])


def _heads_first(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[B, P, d_model] -> [H * B, P, D]``; a view for a batch of one."""
    return x.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _heads_last(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """``[H * B, P, D] -> [B, P, d_model]``."""
    return x.unflatten(0, (-1, batch_size)).permute(1, 2, 0, 3).flatten(2)
