"""Attention with Transformer-XL's relative positions over a staircase of keys, all segments at once.

Scores are ``(content . k + position . r_distance) / sqrt(D)``, content and position being the queries plus one bias
each (Dai et al. 2019, section 3.3, arXiv:1901.02860). Keys and values are projected once a row. Blocks of queries then
see their keys as strided windows of one or two streams: rows, and in front of them compressed entries, where a method
has any. Two products make the scores: distances first, read through a stride one short of a row, which is the published
shift without its padded copy; contents are added by the second product. Nothing grows as T x T, and the backward pass
recomputes the scores block by block.

B batch, H heads, D head width, T tokens, P = past + T rows, F compressed entries, n queries and K keys of a block,
G segments a block; streams are ``[H * B, rows, D]``, heads outermost so that distances are shared by the batch;
X = H * B * G.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ctxbench.implementations._shared.staircase import BLOCK, NO_FAR, Block, Far, blocks


class Geometry(NamedTuple):
    """The staircase of one call: ``past`` rows come before its first token, ``phase`` of them in its segment."""

    segment_len: int
    mem_len: int
    same_length: bool
    past: int
    phase: int
    far: Far = NO_FAR

    def blocks(self, tokens: int, heads: int) -> Iterator[Block]:
        """Cover all queries; ``heads`` counts the batch in."""
        return blocks(tokens, self.past, self.phase, self.segment_len, self.mem_len, heads, far=self.far)


class Operands(NamedTuple):
    """What every block reads; the streams of compressed entries may be None."""

    content: torch.Tensor  # [H * B, T, D], queries plus u
    position: torch.Tensor  # [H * B, T, D], queries plus v
    k: torch.Tensor  # [H * B, P, D]
    v: torch.Tensor  # [H * B, P, D]
    r: torch.Tensor  # [H, longest K, D], by falling distance
    far_k: torch.Tensor | None = None  # [H * B, F, D]
    far_v: torch.Tensor | None = None


def attend(
    layer: Any, x: torch.Tensor, rows: torch.Tensor, geometry: Geometry, far: torch.Tensor | None = None,
    function: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Heads merged, before the output projection: ``[B, T, d_model]``.

    Args:
        layer: has ``q, k, v, r`` (linear maps), ``content_bias, position_bias: [H, D]``, ``num_heads``, and ``table``,
            one row a distance.
        x: inputs of the layer, ``[B, T, d_model]``.
        rows: the past rows and ``x``, ``[B, P, d_model]``. Gradients pass to rows of a query's own segment only.
        geometry: who sees what.
        far: compressed entries, ``[B, F, d_model]``; no gradient passes to them.
        function: :class:`Staircase`, or one of its signature.
    """
    H = layer.num_heads
    q = layer.q(x).unflatten(2, (H, -1)).permute(2, 0, 1, 3)  # [H, B, T, D]
    content, position = (
        (q + bias.view(H, 1, 1, -1)).flatten(0, 1) for bias in (layer.content_bias, layer.position_bias)
    )
    del q  # else it would live through the attention
    longest = max(block.keys for block in geometry.blocks(x.shape[1], heads=1))
    r = layer.r(layer.table[:longest].flip(0)).unflatten(1, (H, -1)).transpose(0, 1)
    mixed = (function or Staircase).apply(content, position, rows, layer.k.weight, layer.v.weight, r, geometry, far)
    return _heads_last(mixed, x.shape[0])


def attend_token(layer: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One query that sees all ``rows``, itself the last; the projections of the rows move to its side of the products.

    ``q . (W h) = (W^T q) . h``, so the rows are read as they are instead of being projected: 6 H d_model FLOPs a row
    instead of 6 d_model^2.
    """
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
        probabilities = _scores(operands, block, geometry, future).softmax(dim=2)
        _put(out, block, probabilities @ _seen(operands.v, operands.far_v, block, geometry))
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
    far_k: torch.Tensor | None = None
    far_v: torch.Tensor | None = None


def staircase_backward(grad: torch.Tensor, operands: Operands, geometry: Geometry) -> Gradients:
    """Gradients of :func:`staircase` for ``grad: [H * B, T, D]``; scores are computed again, block by block."""
    content, position, k, v, r, *far = operands
    exact = torch.promote_types(r.dtype, torch.float32)  # every block of the sequence adds to the distances
    result = Gradients(  # type: ignore[call-arg]
        torch.empty_like(content), torch.empty_like(position),
        *(torch.zeros_like(stream) for stream in (k, v, k, v)), torch.zeros_like(r, dtype=exact),
        *(None if stream is None else torch.zeros_like(stream) for stream in far),
    )  # fmt: skip
    future = _future(operands)
    for block in geometry.blocks(content.shape[1], len(content)):
        _block_backward(result, grad, operands, block, geometry, future)
    return result


def _block_backward(
    result: Gradients, grad: torch.Tensor, operands: Operands, block: Block, geometry: Geometry, future: torch.Tensor
) -> None:
    """Add one block's part; a function, so that nothing of one block lives through the next."""
    n, K = block.queries, block.keys
    content, position, k, v, r, far_k, far_v = operands
    above = _queries(grad, block)  # [X, n, D]
    probabilities = _scores(operands, block, geometry, future).softmax(dim=2)  # [X, n, K]
    by_value = probabilities.transpose(1, 2) @ above
    _add_seen(result.v, result.v_as_memory, result.far_v, by_value, block, geometry)
    del by_value
    by_score = torch._softmax_backward_data(
        above @ _seen(v, far_v, block, geometry).transpose(1, 2), probabilities, 2, above.dtype
    )
    by_score *= r.shape[2] ** -0.5
    del probabilities
    by_key = by_score.transpose(1, 2) @ _queries(content, block)
    _add_seen(result.k, result.k_as_memory, result.far_k, by_key, block, geometry)
    _put(result.content, block, by_score @ _seen(k, far_k, block, geometry))
    by_distance = _unshift(by_score).view(len(r), -1, K)  # [H, B * G * n, K]
    result.r[:, -K:] += by_distance.transpose(1, 2) @ _queries(position, block).reshape(len(r), -1, r.shape[2])
    _put(result.position, block, (by_distance @ r[:, -K:]).view(-1, n, r.shape[2]))


def project(
    ctx: Any, content: torch.Tensor, position: torch.Tensor, rows: torch.Tensor, w_k: torch.Tensor, w_v: torch.Tensor,
    r: torch.Tensor, geometry: Geometry, far: torch.Tensor | None,
) -> Operands:  # fmt: skip
    """The operands of a forward pass, kept in ``ctx`` for the backward pass."""
    streams = [
        None if stream is None else _heads_first(linear(stream, weight), len(r))
        for stream in (rows, far)
        for weight in (w_k, w_v)
    ]
    operands = Operands(content, position, streams[0], streams[1], r, *streams[2:])  # type: ignore[arg-type]
    ctx.geometry = geometry
    ctx.save_for_backward(*operands, rows, far, w_k, w_v)
    return operands


class Staircase(torch.autograd.Function):
    """Projection of keys and values, and attention: one node, so that memory rows pass gradients to weights alone."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        return staircase(project(ctx, *arguments), ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, rows, far, w_k, w_v = ctx.saved_tensors
        result = staircase_backward(grad, Operands(*saved), ctx.geometry)
        k, v, k_as_memory, v_as_memory = (_heads_last(stream, len(rows)) for stream in result[2:6])  # [B, P, d_model]
        by_rows = (k @ w_k).add_(v @ w_v)
        by_w_k = (k + k_as_memory).flatten(0, 1).T @ rows.flatten(0, 1)
        by_w_v = (v + v_as_memory).flatten(0, 1).T @ rows.flatten(0, 1)
        if far is not None and result.far_k is not None and result.far_v is not None:
            entries = far.flatten(0, 1)
            by_w_k.addmm_(_heads_last(result.far_k, len(far)).flatten(0, 1).T, entries)
            by_w_v.addmm_(_heads_last(result.far_v, len(far)).flatten(0, 1).T, entries)
        return result.content, result.position, by_rows, by_w_k, by_w_v, result.r.to(rows.dtype), None, None


def _scores(operands: Operands, block: Block, geometry: Geometry, future: torch.Tensor) -> torch.Tensor:
    """Masked scores of a block, ``[X, n, K]``."""
    n, K, r = block.queries, block.keys, operands.r
    position = _queries(operands.position, block).reshape(len(r), -1, r.shape[2])  # [H, B * G * n, D]
    by_distance = position @ r[:, -K:].transpose(1, 2)  # column 0 is K - 1 tokens away
    # Key j of row i is K - n + i - j away: column n - 1 - i + j. What the stride reads beyond a row is masked below.
    shifted = by_distance.as_strided((len(operands.k) * block.count, n, K), (n * K, K - 1, 1), n - 1)
    keys = _seen(operands.k, operands.far_k, block, geometry)
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


def _seen(stream: torch.Tensor, far: torch.Tensor | None, block: Block, geometry: Geometry) -> torch.Tensor:
    """Keys or values of a block, compressed entries first: ``[X, K, D]``; a view if G = 1 and none is compressed."""
    first, near = geometry.past + block.first_key, block.keys - block.far
    if far is None or not block.far:
        return _windows(stream, block, first, near)
    entries = _strided(far, block.count, block.far_step, block.first_far, block.far)
    return torch.cat((entries, _strided(stream, block.count, block.rows, first, near)), dim=2).flatten(0, 1)


def _windows(stream: torch.Tensor, block: Block, first: int, width: int) -> torch.Tensor:
    """``width`` rows from ``first`` on, and as many one segment further, ...: ``[X, width, D]``; a view if G = 1."""
    if block.count == 1:
        return stream[:, first : first + width]
    return _strided(stream, block.count, block.rows, first, width).flatten(0, 1)


def _strided(stream: torch.Tensor, count: int, step: int, first: int, width: int) -> torch.Tensor:
    """``count`` windows of ``width`` rows, each ``step`` rows further than the one before: ``[H * B, G, width, D]``."""
    matrix, row, column = stream.stride()
    matrices, _, D = stream.shape
    strides = (matrix, step * row, row, column)
    return stream.as_strided((matrices, count, width, D), strides, stream.storage_offset() + first * row)


def _queries(stream: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's rows of a stream of queries, ``[X, n, D]``."""
    return _windows(stream, block, block.first + block.offset, block.queries)


def _put(stream: torch.Tensor, block: Block, values: torch.Tensor) -> None:
    """Write a block's rows, ``values: [X, n, D]``."""
    target = _strided(stream, block.count, block.rows, block.first + block.offset, block.queries)
    target.copy_(values.view(target.shape))


def _add_seen(
    own: torch.Tensor, memory: torch.Tensor, far: torch.Tensor | None, values: torch.Tensor, block: Block,
    geometry: Geometry,
) -> None:  # fmt: skip
    """Add gradients ``[X, K, D]`` of a block's keys: to compressed entries, memory, and the segment's own rows."""
    windows = values.view(len(own), block.count, block.keys, -1)
    start, split = geometry.past + block.first_key, block.keys - block.own
    if far is not None and block.far:
        _add_windows(far, windows[:, :, : block.far], block.far_step, block.first_far)
    _add_windows(memory, windows[:, :, block.far : split], block.rows, start)
    _add_windows(own, windows[:, :, split:], block.rows, start + split - block.far)


def _add_windows(target: torch.Tensor, windows: torch.Tensor, step: int, start: int) -> None:
    """Add ``[H * B, G, width, D]`` to windows that begin at row ``start`` and ``step`` rows further each.

    Windows of successive segments overlap; pieces no wider than the step do not, so each addition is one operator.
    """
    _, count, width, _ = windows.shape
    for offset in range(0, width, step):
        size = min(step, width - offset)
        _strided(target, count, step, start + offset, size).add_(windows[:, :, offset : offset + size])


def _heads_first(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[B, P, d_model] -> [H * B, P, D]``; a view for a batch of one."""
    return x.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _heads_last(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """``[H * B, P, D] -> [B, P, d_model]``."""
    return x.unflatten(0, (-1, batch_size)).permute(1, 2, 0, 3).flatten(2)
