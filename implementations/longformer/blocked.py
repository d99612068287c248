"""Blocks of queries against a contiguous copy of the keys they see; neither pass holds more than one block's scores.

The queries of one block see the prefix and one run of neighbouring keys. Keys and values are copied a span of several
blocks at a time; before each block the prefix is written over the keys that have left the window, directly in front of
its run, so that ``[prefix | run]`` is one matrix that needs a mask in two corners alone. With dilation the same holds
inside each residue class of positions, which is a strided slice. The backward pass computes the probabilities again,
as fused kernels do: five products for the forward two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations.longformer.layer import GlobalRows
from ctxbench.implementations.longformer.params import Pattern

BLOCK = 64  # queries a block: larger ones multiply more masked pairs, smaller ones gain little and cost more calls
SPAN = 16  # blocks a copy


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, pattern: Pattern) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``, stored as ``[B, T, H, D]``."""
    return _Band.apply(q, k, v, everywhere(rows, pattern.causal), pattern)


def everywhere(rows: GlobalRows, causal: bool) -> torch.Tensor:
    """Global rows over all tokens; in the causal form the last G of their keys are their own tokens."""
    G, S = rows.q.shape[2], rows.k.shape[2]
    if G == 0:
        return rows.q
    if causal and G < S:  # torch aligns is_causal at the first key, not at the last
        visible = torch.ones(G, S, dtype=torch.bool, device=rows.q.device).tril(S - G)
        return scaled_dot_product_attention(*rows, attn_mask=visible)
    return scaled_dot_product_attention(*rows, is_causal=causal)


class Block(NamedTuple):
    """``rows`` queries whose run of ``run`` keys begins at key ``start`` of the span.

    ``missing`` keys of the run would lie before the first key of the sequence.
    """

    rows: int
    start: int
    run: int
    missing: int


class Span(NamedTuple):
    """Blocks of equally many queries, and the tokens that hold their queries and their non-global keys."""

    queries: slice
    keys: slice
    blocks: tuple[Block, ...]


def plan(T: int, S: int, G: int, pattern: Pattern) -> Iterator[Span]:
    """Spans that cover all rows but the first G, of T queries that are the last T of S keys."""
    step, first = pattern.dilation, S - T + G  # first: position of the first row outside the prefix
    for residue in range(min(step, S - first)):
        start = first + residue
        before = (start - pattern.num_global) // step  # keys of this residue class ahead of its first query
        origin, row = start - before * step, G + residue
        total = before + -(-(S - start) // step)
        ragged = (total - before) % BLOCK
        for begin in (*range(before, total - ragged, SPAN * BLOCK), *([total - ragged] if ragged else [])):
            rows = BLOCK if begin < total - ragged else ragged
            end = min(begin + SPAN * rows, total - ragged if rows == BLOCK else total)
            low, high = max(0, begin - pattern.left), min(total, end + pattern.right)
            yield Span(
                _every(row + (begin - before) * step, end - begin, step),
                _every(origin + low * step, high - low, step),
                tuple(_block(index, rows, low, total, pattern) for index in range(begin, end, rows)),
            )


def _block(index: int, rows: int, low: int, total: int, pattern: Pattern) -> Block:
    start, stop = max(0, index - pattern.left), min(total, index + rows + pattern.right)
    return Block(rows, start - low, stop - start, start - (index - pattern.left))


def _every(start: int, count: int, step: int) -> slice:
    return slice(start, start + (count - 1) * step + 1, step)


class Operands(NamedTuple):
    """One block's part of the buffers: n queries, m columns (prefix and run), batch and heads together."""

    query: torch.Tensor  # [B * H, n, D]
    keys: torch.Tensor  # [B * H, m, D], as values
    keys_t: torch.Tensor  # [B * H, D, m]
    values: torch.Tensor
    scores: torch.Tensor  # [B * H, n, m]
    hidden: list[tuple[torch.Tensor, torch.Tensor]]  # corners of the scores, and where they are masked
    prefix: list[tuple[torch.Tensor, torch.Tensor]]  # where the prefix of keys and of values goes, and the prefix


class _Scratch:
    """Buffers that every span uses again. Spans of one form, all but the first and last few, share their operands."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, G: int, pattern: Pattern):
        B, H, T, D = q.shape
        self.q, self.k, self.v, self.pattern = q, k, v, pattern
        self.spans = list(plan(T, k.shape[2], G, pattern))
        g, forms = pattern.num_global, {span.blocks for span in self.spans}
        rows = max(blocks[0].rows for blocks in forms)
        self.queries = q.new_empty(B * H * D * max(len(blocks) * blocks[0].rows for blocks in forms))
        columns = g + max(blocks[-1].start + blocks[-1].run for blocks in forms)
        self.keys, self.values = k.new_empty(B, H, columns, D), v.new_empty(B, H, columns, D)
        self.scores = q.new_empty(B * H * rows * (g + max(block.run for blocks in forms for block in blocks)))
        self.corner = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril(-1)
        self._operands: dict[tuple[Block, ...], list[Operands]] = {}

    def load(self, span: Span) -> list[Operands]:
        """Copy the queries, keys and values of a span; returns the operands of its blocks, to be used in order."""
        read(self.q, self.queries, span)
        g = self.pattern.num_global
        for buffer, source in ((self.keys, self.k), (self.values, self.v)):
            run = source[:, :, span.keys]
            buffer[:, :, g : g + run.shape[2]] = run
        if span.blocks not in self._operands:
            self._operands[span.blocks] = [self._cut(i, block) for i, block in enumerate(span.blocks)]
        return self._operands[span.blocks]

    def _cut(self, i: int, block: Block) -> Operands:
        B, H, _, D = self.keys.shape
        g, batch, rows = self.pattern.num_global, B * H, block.rows
        start, end = block.start, block.start + g + block.run
        scores = self.scores[: batch * rows * (end - start)].view(batch, rows, end - start)
        hidden = []
        left = self.corner[:rows, block.missing : block.missing + block.run]  # row t does not see the run's t first
        if left.shape[1]:
            hidden.append((scores[:, :, g : g + left.shape[1]], left))
        last = g + self.pattern.left + self.pattern.right - block.missing  # the last column that row 0 sees
        if last + 1 < end - start:
            hidden.append((scores[:, :, last:], self.corner.T[:rows, : end - start - last]))
        pairs = ((self.keys, self.k), (self.values, self.v)) if g else ()
        keys = self.keys[:, :, start:end].flatten(0, 1)
        return Operands(
            query=self.queries[i * batch * rows * D : (i + 1) * batch * rows * D].view(batch, rows, D),
            keys=keys,
            keys_t=keys.transpose(1, 2),
            values=self.values[:, :, start:end].flatten(0, 1),
            scores=scores,
            hidden=hidden,
            prefix=[(buffer[:, :, start : start + g], source[:, :, :g]) for buffer, source in pairs],
        )


def probabilities(block: Operands) -> torch.Tensor:
    """Put the prefix in its place, then softmax over the visible keys: ``[B * H, n, m]``, in the scores' buffer."""
    for place, prefix in block.prefix:
        place.copy_(prefix)
    scores, scale = block.scores, block.query.shape[2] ** -0.5
    scores.baddbmm_(block.query, block.keys_t, beta=0, alpha=scale)
    for corner, mask in block.hidden:
        corner.masked_fill_(mask, float("-inf"))
    return torch.softmax(scores, dim=2, out=scores)


def read(rows: torch.Tensor, buffer: torch.Tensor, span: Span) -> None:
    """Copy a span of ``rows: [B, H, T, D]`` to a flat buffer, one ``[B, H, n, D]`` after the other."""
    by_block, place = _by_block(rows, buffer, span)
    place.copy_(by_block)


def write(rows: torch.Tensor, buffer: torch.Tensor, span: Span) -> None:
    """Copy such a buffer back."""
    by_block, place = _by_block(rows, buffer, span)
    by_block.copy_(place)


def _by_block(rows: torch.Tensor, buffer: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    n = span.blocks[0].rows
    by_block = rows[:, :, span.queries].unflatten(2, (-1, n)).permute(2, 0, 1, 3, 4)
    return by_block, buffer[: by_block.numel()].view(by_block.shape)


class _Band(torch.autograd.Function):
    """All rows outside the prefix; ``head: [B, H, G, D]`` becomes the first rows of the result."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: torch.Tensor, pattern: Pattern
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        G = head.shape[2]
        ctx.save_for_backward(q, k, v)
        ctx.pattern, ctx.num_head = pattern, G
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        out[:, :, :G] = head
        if G == T:
            return out
        scratch = _Scratch(q, k, v, G, pattern)
        for span in scratch.spans:
            for block in scratch.load(span):
                block.query.baddbmm_(probabilities(block), block.values, beta=0)
            write(out, scratch.queries, span)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v = ctx.saved_tensors
        G, g, scale = ctx.num_head, ctx.pattern.num_global, q.shape[3] ** -0.5
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if q.shape[2] == G:
            return dq, dk, dv, grad, None
        scratch = _Scratch(q, k, v, G, ctx.pattern)
        drows, dscores, product = (torch.empty_like(a) for a in (scratch.queries, scratch.scores, scratch.keys))
        # Every block adds to the prefix, and several to each key: sum in at least single precision.
        wide = torch.promote_types(q.dtype, torch.float32)
        dkeys, dvalues = (torch.empty_like(scratch.keys, dtype=wide) for _ in range(2))
        prefix_dk, prefix_dv = (torch.zeros_like(k[:, :, :g], dtype=wide) for _ in range(2))
        for span in scratch.spans:
            read(grad, drows, span)
            dkeys.zero_(), dvalues.zero_()
            for i, (place, block) in enumerate(zip(span.blocks, scratch.load(span), strict=True)):
                p, columns = probabilities(block), _like(block.keys, product)
                dout = drows[i * block.query.numel() :][: block.query.numel()].view(block.query.shape)
                by_head = columns.view(*q.shape[:2], -1, q.shape[3])
                run = slice(place.start, place.start + place.run)
                columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
                prefix_dv += by_head[:, :, :g]
                dvalues[:, :, run] += by_head[:, :, g:]
                ds = _like(p, dscores).baddbmm_(dout, block.values.transpose(1, 2), beta=0)
                torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
                columns.baddbmm_(ds.transpose(1, 2), block.query, beta=0, alpha=scale)
                prefix_dk += by_head[:, :, :g]
                dkeys[:, :, run] += by_head[:, :, g:]
                dout.baddbmm_(ds, block.keys, beta=0, alpha=scale)
            write(dq, drows, span)
            length = -(-(span.keys.stop - span.keys.start) // span.keys.step)
            dk[:, :, span.keys] += dkeys[:, :, :length]
            dv[:, :, span.keys] += dvalues[:, :, :length]
        dk[:, :, :g] += prefix_dk
        dv[:, :, :g] += prefix_dv
        return dq, dk, dv, grad[:, :, :G], None


def _like(shaped: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The head of a buffer in the shape of another tensor."""
    return buffer.view(-1)[: shaped.numel()].view(shaped.shape)
