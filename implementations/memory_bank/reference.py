"""The layer segment by segment, in the order of the equations; all scores are kept, the whole bank is re-projected.

B batch, T tokens of a piece of a segment, K keys (earlier tokens of the segment included), M slots, H heads.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations.memory_bank.layer import Bank, MemoryBankLayer, State


def run(layer: MemoryBankLayer, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
    """``x: [B, T, d_model]`` to outputs of that shape; the state after them where one came in."""
    B, S = x.shape[0], layer.segment_len
    bank, k, v, pooled, tokens = layer.init_state(B) if state is None else state
    outputs = []
    while x.shape[1]:
        room = S - tokens % S
        piece, x = x[:, :room], x[:, room:]
        y, k, v = _piece(layer, piece, bank, k, v)
        outputs.append(y)
        pooled = pooled + y.sum(dim=1, dtype=pooled.dtype)
        tokens += y.shape[1]
        if tokens % S == 0 and (state is not None or x.shape[1]):  # else nothing would read what is written
            bank = _write(layer, bank, (pooled / S).to(y.dtype), tokens)
            k, v, pooled = layer.no_tokens(B)
    return torch.cat(outputs, dim=1), None if state is None else State(bank, k, v, pooled, tokens)


def _piece(
    layer: MemoryBankLayer, x: torch.Tensor, bank: Bank, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Consecutive tokens of one segment; ``k, v`` of its earlier tokens go in, those of all come out."""
    H, T, fill = layer.num_heads, x.shape[1], k.shape[2]
    normed = layer.norm_self(x)
    q = layer.position.rotate(split_heads(layer.q(normed), H), fill)
    k = torch.cat((k, layer.position.rotate(split_heads(layer.k(normed), H), fill)), dim=2)
    v = torch.cat((v, split_heads(layer.v(normed), H)), dim=2)
    visible = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
    x = x + layer.o(merge_heads(_attend(q, k, v, visible, layer.position.rectangle(T, k.shape[2], fill, like=q))))
    normed = layer.norm_read(x)
    slots = (split_heads(bank.read_keys, H), split_heads(bank.read_values, H))
    read = layer.read_o(merge_heads(_attend(split_heads(layer.read_q(normed), H), *slots)))
    x = x + torch.sigmoid(layer.gate(torch.cat((normed, read), dim=2))) * read
    if layer.ffn is not None and layer.norm_ffn is not None:
        x = x + layer.ffn(layer.norm_ffn(x))
    return x, k, v


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``softmax(q k^T / sqrt(D) + bias) v``, all ``[B, H, *, D]``."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, T, K or M]
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=3) @ v


def _write(layer: MemoryBankLayer, bank: Bank, mean: torch.Tensor, tokens: int) -> Bank:
    """Move one slot and its key towards the segment that ended after ``tokens`` tokens; ``mean: [B, d_model]``."""
    B, M, d_model = bank.values.shape
    content = layer.norm_write(mean)
    numbers = torch.arange(M, device=mean.device)
    if layer.slot_logits is None:
        slot = torch.full((B, 1), layer.least_used(tokens), device=mean.device)
        weight = (numbers == slot).to(mean.dtype)  # [B, M]
    else:
        soft = layer.slot_logits(content).softmax(dim=1)
        slot = soft.argmax(dim=1, keepdim=True)
        weight = (numbers == slot) + (soft - soft.detach())  # one-hot forward, softmax backward
    old = bank.values.gather(1, slot[:, :, None].expand(B, 1, d_model))[:, 0]
    step = weight[:, :, None] * torch.sigmoid(layer.update(torch.cat((old, content), dim=1)))[:, None]
    values = bank.values + step * (content[:, None] - bank.values)
    keys = bank.keys + step * (layer.write_key(content)[:, None] - bank.keys)
    return Bank(values, keys, layer.read_v(values), layer.read_k(keys))
