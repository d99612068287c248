"""The fast schedule: fused attention, all that no write can change computed at once, one row re-projected a write.

Self-attention, the read's queries and the token half of its gate do not depend on the bank: whole segments are stacked
into the batch and go through them together. What remains in the loop over segments is the read, the other half of the
gate (``W [x; read] = W_x x + W_r read``), the feed-forward network and the write, which changes one row of the bank.

B batch, T tokens, S tokens a segment, M slots; ``[B, M, d_model]`` bank tensors are split into heads as views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.memory_bank.layer import Bank, MemoryBankLayer, State

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # after self-attention; the read's queries; the gate's half


def run(layer: MemoryBankLayer, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
    """``x: [B, T, d_model]`` to outputs of that shape; the state after them where one came in."""
    return schedule(layer, x, state, attend, gated_read)


def schedule(
    layer: MemoryBankLayer, x: torch.Tensor, state: State | None, attend: Callable[..., torch.Tensor],
    gated_read: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, State | None]:  # fmt: skip
    """The same around another self-attention, and another read with its gate."""
    B, S = x.shape[0], layer.segment_len
    bank, k, v, pooled, tokens = layer.init_state(B) if state is None else state
    end = tokens + x.shape[1]
    pieces, k, v = _before_the_bank(layer, x, k, v, tokens % S, attend)
    outputs = []
    for piece in pieces:
        outputs.append(_with_bank(layer, bank, *piece, gated_read))
        pooled = pooled + outputs[-1].sum(dim=1, dtype=pooled.dtype)
        tokens += outputs[-1].shape[1]
        if tokens % S == 0 and (state is not None or tokens < end):  # else nothing would read what is written
            bank = _write(layer, bank, (pooled / S).to(x.dtype), tokens)
            pooled = torch.zeros_like(pooled)
    del pieces, piece  # else they would live while the outputs are joined
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y, None if state is None else State(bank, k, v, pooled, tokens)


def _before_the_bank(
    layer: MemoryBankLayer, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fill: int,
    attend: Callable[..., torch.Tensor],
) -> tuple[list[Piece], torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pieces that end with their segments: the rest of the one under way, whole ones, the beginning of the last."""
    B, T, d_model = x.shape
    S = layer.segment_len
    opening = min(T, -fill % S)
    whole, rest = divmod(T - opening, S)
    pieces = []
    if opening:
        part = x[:, :opening]
        mixed, k, v = _self_attend(layer, part, attend, k, v)
        pieces.append(_prepare(layer, part, mixed))
    if whole:
        part = x[:, opening : T - rest].reshape(B * whole, S, d_model)
        stacked = _prepare(layer, part, _self_attend(layer, part, attend)[0])
        pieces += zip(*(each.view(B, whole, S, d_model).unbind(1) for each in stacked), strict=True)
    if rest:
        part = x[:, T - rest :]
        mixed, k, v = _self_attend(layer, part, attend)
        pieces.append(_prepare(layer, part, mixed))
    elif (fill + T) % S == 0:
        k, v, _ = layer.no_tokens(B)
    return pieces, k, v


def _self_attend(
    layer: MemoryBankLayer, x: torch.Tensor, attend: Callable[..., torch.Tensor], k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Consecutive tokens of one segment a batch row; ``k, v`` of its earlier tokens go in, those of all come out."""
    normed = layer.norm_self(x)
    q, new_k, new_v = (split_heads(project(normed), layer.num_heads) for project in (layer.q, layer.k, layer.v))
    fill = 0 if k is None else k.shape[2]
    q, new_k = layer.position.both(q, new_k, fill)
    del normed
    if k is not None and v is not None:
        new_k, new_v = torch.cat((k, new_k), dim=2), torch.cat((v, new_v), dim=2)
    return attend(q, new_k, new_v, layer.position), new_k, new_v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """Causal attention ``[B, H, T, D]``; the last query stands at the last key."""
    if isinstance(position, Bias):
        return attend_slabs(q, k, v, causal=True, position=position)
    T, S = q.shape[2], k.shape[2]
    if T == S:
        return scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T > 1 else None
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _prepare(layer: MemoryBankLayer, x: torch.Tensor, mixed: torch.Tensor) -> Piece:
    """All of a piece that comes before the bank, from its input and what self-attention mixed."""
    x = x + layer.o(merge_heads(mixed))
    del mixed
    normed = layer.norm_read(x)
    half = linear(normed, layer.gate.weight[:, : x.shape[2]], layer.gate.bias)
    return x, layer.read_q(normed), half


def _with_bank(
    layer: MemoryBankLayer, bank: Bank, x: torch.Tensor, query: torch.Tensor, half: torch.Tensor,
    gated_read: Callable[..., torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Read, gate and feed-forward network of one piece, ``[B, T, d_model]``."""
    x = gated_read(layer, bank, x, query, half)
    if layer.ffn is not None and layer.norm_ffn is not None:
        x = x + layer.ffn(layer.norm_ffn(x))
    return x


def gated_read(
    layer: MemoryBankLayer, bank: Bank, x: torch.Tensor, query: torch.Tensor, half: torch.Tensor,
    attend: Callable[..., torch.Tensor] = scaled_dot_product_attention,
) -> torch.Tensor:  # fmt: skip
    """``x`` and what its queries read, as much as the gate lets through; ``attend(q, k, v)`` sees every slot."""
    q, k, v = (split_heads(part, layer.num_heads) for part in (query, bank.read_keys, bank.read_values))
    read = layer.read_o(merge_heads(attend(q, k, v)))
    gate = torch.sigmoid(half + linear(read, layer.gate.weight[:, x.shape[2] :]))
    return torch.addcmul(x, gate, read)


def _write(layer: MemoryBankLayer, bank: Bank, mean: torch.Tensor, tokens: int) -> Bank:
    """Move one slot and its key towards the segment that ended after ``tokens`` tokens; ``mean: [B, d_model]``."""
    B, d_model = mean.shape
    content = layer.norm_write(mean)[:, None]  # [B, 1, d_model], as all rows below
    if layer.slot_logits is None:
        weights = None
        slot = torch.full((B, 1), layer.least_used(tokens), device=mean.device)
    else:
        weights = layer.slot_logits(content[:, 0]).softmax(dim=1)
        slot = weights.argmax(dim=1, keepdim=True)
    batch = torch.arange(B, device=mean.device)[:, None]
    old_value, old_key = bank.values[batch, slot], bank.keys[batch, slot]  # gather would save the bank for backward
    content_key = layer.write_key(content)
    gate = torch.sigmoid(layer.update(torch.cat((old_value, content), dim=2)))
    value, key = torch.lerp(old_value, content, gate), torch.lerp(old_key, content_key, gate)
    rows = (value, key, layer.read_v(value), layer.read_k(key))
    place = slot[:, :, None].expand(B, 1, d_model)
    written = Bank(*(slots.scatter(1, place, row) for slots, row in zip(bank, rows, strict=True)))
    if weights is None or not weights.requires_grad:
        return written
    return Bank(
        *_CreditSlots.apply(
            weights, gate, content, content_key, bank.values, bank.keys, layer.read_v.weight, layer.read_k.weight,
            *written,
        )
    )  # fmt: skip


class _CreditSlots(torch.autograd.Function):
    """The written bank unchanged; backward gives the slot weights the gradient of a write to every slot.

    The straight-through write is ``slot_m += w_m gate (content - slot_m)`` with a one-hot ``w``, so that
    ``dL/dw_m = <dL/dslot_m, gate (content - slot_m)>`` for every m, keys likewise. What arrives at the projected bank
    goes back through the projections here, where a dense write would project the whole bank in the forward too.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tensors[:7])
        return tensors[7:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *into: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, content, content_key, values, keys, project_values, project_keys = ctx.saved_tensors
        into_values, into_keys, into_read_values, into_read_keys = into
        gain = (into_values + into_read_values @ project_values) * (content - values)
        gain += (into_keys + into_read_keys @ project_keys) * (content_key - keys)
        return (gain * gate).sum(dim=2), *(None,) * 7, *into
