"""Windowed and global attention in blocks: no more than one block's scores in either pass.

The queries of one block see the global tokens and one run of neighbouring keys. Keys and values are copied a span of
several blocks at a time; before each block the globals are written over the keys that have left the window, directly
in front of its run. So ``[globals | run]`` is one matrix, which needs a mask in two corners, and in the columns of
scattered globals: in the run, and in the causal form for earlier rows. With dilation the same holds inside each residue
class of positions, which is a strided slice. The backward pass computes the probabilities again, as fused kernels do:
five products for the forward two.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered

BLOCK = 64  # queries a block: larger ones multiply more masked pairs, smaller ones gain little and cost more calls
SPAN = 16  # blocks a copy


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, scattered: Scattered, pattern: Pattern,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``, stored as ``[B, T, H, D]``.

    ``line: [H, Pattern.steps(S)]``, where there are no globals: what is added to the scores, by steps of the band.
    """
    return _Band.apply(q, k, v, everywhere(rows, pattern), *scattered, pattern, line)


def everywhere(rows: GlobalRows, pattern: Pattern) -> torch.Tensor:
    """Global rows over all tokens; in the causal form up to their own."""
    q, k, v, at = rows
    G, S = q.shape[2], k.shape[2]
    if G == 0:
        return q
    if pattern.causal and pattern.scattered:
        own = torch.tensor(at, device=q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(S, device=q.device) <= own[:, None])
    if pattern.causal and G < S:  # torch aligns is_causal at the first key, not at the last
        visible = torch.ones(G, S, dtype=torch.bool, device=q.device).tril(S - G)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=pattern.causal)


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
    """One block's part of the buffers: n queries, m columns (globals and run), batch and heads together."""

    query: torch.Tensor  # [B * H, n, D]
    keys: torch.Tensor  # [B * H, m, D], as values
    keys_t: torch.Tensor  # [B * H, D, m], of the keys or of their copy in one piece
    values: torch.Tensor
    scores: torch.Tensor  # [B * H, n, m]
    tile: tuple[int, int, int] | None  # which of the tiles of biases is its own
    hidden: list[tuple[torch.Tensor, torch.Tensor]]  # corners of the scores, and what hides the pairs there
    front: list[tuple[torch.Tensor, torch.Tensor]]  # where the globals of keys and of values go, and those


class _Scratch:
    """Buffers that every span uses again. Spans of one form, all but the first and last few, share their operands."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, G: int, pattern: Pattern, scattered: Scattered,
        line: torch.Tensor | None,
    ):  # fmt: skip
        B, H, T, D = q.shape
        self.line = line
        self.q, self.k, self.v, self.pattern, self.at = q, k, v, pattern, scattered.at
        self.before = k.shape[2] - T
        self.spans = list(plan(T, k.shape[2], G, pattern))
        self.globals = [a[:, :, : pattern.num_global] for a in (k, v)]
        if self.at:
            pairs = zip(self.globals, (scattered.k, scattered.v), strict=True)
            self.globals = [torch.cat(pair, dim=2) for pair in pairs]
        g, forms = pattern.num_global + len(self.at), {span.blocks for span in self.spans}
        self.width = g
        rows = max(blocks[0].rows for blocks in forms)
        self.queries = q.new_empty(B * H * D * max(len(blocks) * blocks[0].rows for blocks in forms))
        columns = g + max(blocks[-1].start + blocks[-1].run for blocks in forms)
        self.keys, self.values = k.new_empty(B, H, columns, D), v.new_empty(B, H, columns, D)
        widest = g + max(block.run for blocks in forms for block in blocks)
        self.scores = q.new_empty(B * H * rows * widest)
        # In half precision torch on CPU transposes the keys of a batched product unless they lie in one piece.
        self.packed = k.new_empty(B * H * widest * D) if half_on_cpu(k) else None
        # Added, since masking a strided corner by booleans takes a tenth of the whole: neither vectors nor threads.
        self.left, self.right = q.new_full((2, rows, rows), -math.inf)
        self.left.tril_(-1), self.right.triu_(1)
        self._operands: dict[tuple[Block, ...], list[Operands]] = {}
        self.tiles: dict[tuple[int, int, int], torch.Tensor] = {}  # biases of blocks of one form, [H, n, m]

    def load(self, span: Span) -> list[Operands]:
        """Copy the queries, keys and values of a span; returns the operands of its blocks, to be used in order."""
        read(self.q, self.queries, span)
        for buffer, source in ((self.keys, self.k), (self.values, self.v)):
            run = source[:, :, span.keys]
            buffer[:, :, self.width : self.width + run.shape[2]] = run
        if span.blocks not in self._operands:
            self._operands[span.blocks] = [self._cut(i, block) for i, block in enumerate(span.blocks)]
        return self._operands[span.blocks]

    def _cut(self, i: int, block: Block) -> Operands:
        B, H, _, D = self.keys.shape
        g, batch, rows = self.width, B * H, block.rows
        start, end = block.start, block.start + g + block.run
        scores = self.scores[: batch * rows * (end - start)].view(batch, rows, end - start)
        hidden = []
        left = self.left[:rows, block.missing : block.missing + block.run]  # row t does not see the run's t first
        if left.shape[1]:
            hidden.append((scores[:, :, g : g + left.shape[1]], left))
        last = g + self.pattern.left + self.pattern.right - block.missing  # the last column that row 0 sees
        if last + 1 < end - start:
            hidden.append((scores[:, :, last:], self.right[:rows, : end - start - last]))
        pairs = zip((self.keys, self.values), self.globals, strict=True) if g else ()
        keys = self.keys[:, :, start:end].flatten(0, 1)
        return Operands(
            query=self.queries[i * batch * rows * D : (i + 1) * batch * rows * D].view(batch, rows, D),
            keys=keys,
            keys_t=(keys if self.packed is None else _like(keys, self.packed)).transpose(1, 2),
            values=self.values[:, :, start:end].flatten(0, 1),
            scores=scores,
            tile=None if self.line is None else self._tile(block),
            hidden=hidden,
            front=[(buffer[:, :, start : start + g], source) for buffer, source in pairs],
        )

    def _tile(self, block: Block) -> tuple[int, int, int]:
        key = (block.rows, block.run, block.missing)
        if self.line is not None and key not in self.tiles:
            self.tiles[key] = self.line[:, self.steps(*key)]
        return key

    def steps(self, rows: int, run: int, missing: int) -> torch.Tensor:
        """Which column of the line each pair of a block takes, ``[n, m]``; hidden pairs take any."""
        device, far = self.q.device, self.pattern.left - missing
        back = far + torch.arange(rows, device=device)[:, None] - torch.arange(run, device=device)
        S = self.k.shape[2]
        return (back + min(self.pattern.right, S - 1)).clamp(0, self.pattern.steps(S) - 1)

    def probabilities(self, span: Span, i: int, block: Operands) -> torch.Tensor:
        """Put the globals in place, then softmax over the visible keys: ``[B * H, n, m]``, in the scores' buffer."""
        for place, source in block.front:
            place.copy_(source)
        if self.packed is not None:
            block.keys_t.transpose(1, 2).copy_(block.keys)
        scores, scale = block.scores, block.query.shape[2] ** -0.5
        if block.tile is not None:
            tile = self.tiles[block.tile]
            scores.view(-1, *tile.shape).copy_(tile)
        scores.baddbmm_(block.query, block.keys_t, beta=0 if block.tile is None else 1, alpha=scale)
        for corner, mask in block.hidden:
            corner.add_(mask)
        if self.at:
            self._hide_scattered(scores, span, i)
        return torch.softmax(scores, dim=2, out=scores)

    def _hide_scattered(self, scores: torch.Tensor, span: Span, i: int) -> None:
        """Scattered globals are no part of the run, and in the causal form no row sees a later one."""
        block, step, g = span.blocks[i], self.pattern.dilation, self.width
        first = span.keys.start + block.start * step
        for place in self.at[bisect_left(self.at, first) : bisect_left(self.at, first + block.run * step)]:
            column, between = divmod(place - first, step)
            if not between:
                scores[:, :, g + column] = -math.inf
        if self.pattern.causal:
            row = self.before + span.queries.start + i * block.rows * step
            seen = bisect_right(self.at, row)
            for column, place in enumerate(self.at[seen:], start=self.pattern.num_global + seen):
                blind = min(block.rows, -((row - place) // step))  # rows that come before it
                scores[:, :blind, column] = -math.inf


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
    """All rows that are not global; ``head: [B, H, G, D]`` holds the global ones, the prefix first."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: torch.Tensor,
        scattered_k: torch.Tensor, scattered_v: torch.Tensor, at: tuple[int, ...], pattern: Pattern,
        line: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        B, H, T, D = q.shape
        scattered = Scattered(scattered_k, scattered_v, at)
        own = scattered.rows(T, k.shape[2])
        G = head.shape[2] - len(own)
        ctx.save_for_backward(q, k, v, scattered_k, scattered_v, line)
        ctx.pattern, ctx.num_head, ctx.at = pattern, G, at
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        out[:, :, :G] = head[:, :, :G]
        if G == T:
            return out
        scratch = _Scratch(q, k, v, G, pattern, scattered, line)
        for span in scratch.spans:
            for i, block in enumerate(scratch.load(span)):
                block.query.baddbmm_(scratch.probabilities(span, i, block), block.values, beta=0)
            write(out, scratch.queries, span)
        if own:
            out[:, :, own] = head[:, :, G:]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, scattered_k, scattered_v, line = ctx.saved_tensors
        scattered, pattern, G = Scattered(scattered_k, scattered_v, ctx.at), ctx.pattern, ctx.num_head
        own = scattered.rows(q.shape[2], k.shape[2])
        dhead = grad[:, :, :G]
        if own:
            dhead = torch.cat((dhead, grad[:, :, own]), dim=2)
            grad = grad.index_fill(2, torch.tensor(own, device=grad.device), 0)
        scale, g = q.shape[3] ** -0.5, pattern.num_global
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if q.shape[2] == G:
            return dq, dk, dv, dhead, torch.zeros_like(scattered_k), torch.zeros_like(scattered_v), None, None, None
        scratch = _Scratch(q, k, v, G, pattern, scattered, line)
        dtiles: dict[tuple[int, int, int], torch.Tensor] = {}
        front = scratch.width
        drows, dscores, product = (torch.empty_like(a) for a in (scratch.queries, scratch.scores, scratch.keys))
        # Every block adds to the globals, and several to each key: sum in at least single precision.
        wide = torch.promote_types(q.dtype, torch.float32)
        dkeys, dvalues = (torch.empty_like(scratch.keys, dtype=wide) for _ in range(2))
        front_dk, front_dv = (torch.zeros_like(a, dtype=wide) for a in scratch.globals)
        for span in scratch.spans:
            read(grad, drows, span)
            dkeys.zero_(), dvalues.zero_()
            for i, (place, block) in enumerate(zip(span.blocks, scratch.load(span), strict=True)):
                p, columns = scratch.probabilities(span, i, block), _like(block.keys, product)
                dout = drows[i * block.query.numel() :][: block.query.numel()].view(block.query.shape)
                by_head = columns.view(*q.shape[:2], -1, q.shape[3])
                run = slice(place.start, place.start + place.run)
                columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
                front_dv += by_head[:, :, :front]
                dvalues[:, :, run] += by_head[:, :, front:]
                values = block.values if scratch.packed is None else columns.copy_(block.values)
                ds = _like(p, dscores).baddbmm_(dout, values.transpose(1, 2), beta=0)
                torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
                if block.tile is not None and ctx.needs_input_grad[8]:
                    above = ds.view(*q.shape[:2], *ds.shape[1:]).sum(dim=0, dtype=wide)
                    dtiles[block.tile] = dtiles[block.tile] + above if block.tile in dtiles else above
                columns.baddbmm_(ds.transpose(1, 2), block.query, beta=0, alpha=scale)
                front_dk += by_head[:, :, :front]
                dkeys[:, :, run] += by_head[:, :, front:]
                dout.baddbmm_(ds, block.keys, beta=0, alpha=scale)
            write(dq, drows, span)
            length = -(-(span.keys.stop - span.keys.start) // span.keys.step)
            dk[:, :, span.keys] += dkeys[:, :, :length]
            dv[:, :, span.keys] += dvalues[:, :, :length]
        dk[:, :, :g] += front_dk[:, :, :g]
        dv[:, :, :g] += front_dv[:, :, :g]
        dline = None
        if line is not None and ctx.needs_input_grad[8]:
            dline = torch.zeros_like(line, dtype=wide)
            for form, above in dtiles.items():
                dline.index_add_(1, scratch.steps(*form).flatten(), above.flatten(1))
            dline = dline.to(line.dtype)
        return dq, dk, dv, dhead, front_dk[:, :, g:].to(k.dtype), front_dv[:, :, g:].to(v.dtype), None, None, dline


def half_on_cpu(x: torch.Tensor) -> bool:
    """Whether batched products of it are oneDNN's."""
    return x.device.type == "cpu" and x.itemsize < 4


def _like(shaped: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The head of a buffer in the shape of another tensor."""
    return buffer.view(-1)[: shaped.numel()].view(shaped.shape)
