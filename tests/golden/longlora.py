"""Make longlora.npz: outputs and gradients of LlamaAttention of the package transformers under a mask for each head.

Run in an environment with longlora_requirements.txt::

    python tests/golden/longlora.py tests/golden/longlora.npz

Eager attention, with its rotary embedding; the masks are made here from the definition, pair by pair. The class takes
its softmax and its angles in float32, so the tensors carry errors of about 1e-7.
"""

import sys

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

BATCH, D_MODEL = 2, 8
CASES = {  # tokens, group, heads, wrap
    "quarter": (16, 4, 2, False),
    "quarter_wrapped": (16, 4, 2, True),
    "half": (12, 6, 4, False),
    "half_wrapped": (12, 6, 4, True),
    "whole_wrapped": (8, 8, 2, True),
}


def visible(tokens: int, group: int, shift: int, wrap: bool) -> torch.Tensor:
    """Pairs (query, key) of one head; the order is that of the rolled sequence."""
    order = [(place + shift) % tokens for place in range(tokens)]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            if i // group == j // group:
                query, key = order[i], order[j]
                mask[query, key] = wrap or key <= query
    return mask


def run(seed: int, tokens: int, group: int, heads: int, wrap: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=D_MODEL, num_attention_heads=heads, num_key_value_heads=heads, attention_bias=True,
        attn_implementation="eager",
    )  # fmt: skip
    attention = LlamaAttention(config, layer_idx=0).double().train()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.4)
    x = torch.randn(BATCH, tokens, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    shifts = [0] * (heads // 2) + [group // 2] * (heads // 2)
    seen = torch.stack([visible(tokens, group, shift, wrap) for shift in shifts])
    mask = torch.zeros(1, heads, tokens, tokens, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    position = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    y, _ = attention(x, position_embeddings=position, attention_mask=mask)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for name in "qkvo":
        layer = getattr(attention, f"{name}_proj")
        for kind in ("weight", "bias"):
            made[f"{name}.{kind}"] = getattr(layer, kind)
            made[f"grad.{name}.{kind}"] = getattr(layer, kind).grad
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


if __name__ == "__main__":
    arrays = {
        f"{name}/{key}": array
        for seed, (name, case) in enumerate(CASES.items())
        for key, array in run(seed, *case).items()
    }
    np.savez_compressed(sys.argv[1], **arrays)
