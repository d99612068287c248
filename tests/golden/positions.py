"""Make positions.npz: tables, buckets and slopes of public packages, and three attention layers that use them.

Run in an environment with positions_requirements.txt::

    python tests/golden/positions.py tests/golden/positions.npz

Frequencies are float32 in both packages. The layers run in float64 with outputs and gradients; LlamaAttention is given
cosines and sines of its own package, which are float32.
"""

import sys

import numpy as np
import torch
from transformers import BloomConfig, LlamaConfig, T5Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention
from x_transformers.x_transformers import RotaryEmbedding

BATCH, TOKENS, D_MODEL, HEADS = 2, 11, 12, 3
ROPE = {  # our name: rule of the package, head width, factor, original length
    "rope/64": ("default", 64, 1.0, 4096),
    "rope/6": ("default", 6, 1.0, 4096),
    "rope_linear/64": ("linear", 64, 4.0, 4096),
    "rope_yarn/128": ("yarn", 128, 16.0, 4096),
    "rope_yarn/64": ("yarn", 64, 32.0, 4096),
    "rope_yarn/8": ("yarn", 8, 2.5, 512),
    "rope_yarn_rotation/128": ("llama3", 128, 16.0, 4096),
    "rope_yarn_rotation/8": ("llama3", 8, 2.5, 512),
}


def llama(kind: str, head_dim: int, factor: float, original: int) -> LlamaConfig:
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope |= {"factor": factor, "original_max_position_embeddings": original}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 32.0}
    config = LlamaConfig(
        hidden_size=head_dim * HEADS,
        num_attention_heads=HEADS,
        max_position_embeddings=original,
        rope_parameters=rope,
    )
    config._attn_implementation = "eager"
    return config


def frequencies(config: LlamaConfig, kind: str) -> tuple[torch.Tensor, float]:
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config)


def tables() -> dict[str, np.ndarray]:
    made = {}
    for name, (kind, head_dim, factor, original) in ROPE.items():
        found, temperature = frequencies(llama(kind, head_dim, factor, original), kind)
        made[f"frequencies/{name}"] = found.numpy()
        made[f"settings/{name}"] = np.array([head_dim, factor, original, temperature])
    for head_dim, factor in ((64, 8.0), (10, 3.0)):
        made[f"frequencies/rope_ntk/{head_dim}"] = RotaryEmbedding(head_dim, base_rescale_factor=factor).inv_freq.numpy()
        made[f"settings/rope_ntk/{head_dim}"] = np.array([head_dim, factor, 4096, 1.0])
    x = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = LlamaRotaryEmbedding(llama("default", 8, 1.0, 4096))(x, torch.arange(100, 140)[None])
    made["rotated/x"], made["rotated/y"] = x.numpy(), apply_rotary_pos_emb(x, x, cos, sin)[0].numpy()
    distance = torch.arange(-1000, 1001)
    made["bucket/causal"] = T5Attention._relative_position_bucket(distance, bidirectional=False).numpy().astype(np.int8)
    made["bucket/bidirectional"] = T5Attention._relative_position_bucket(distance).numpy().astype(np.int8)
    for heads in (1, 6, 8, 12, 16, 20):
        made[f"bloom/{heads}"] = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32).numpy()[:, 0]
        made[f"mpt/{heads}"] = build_mpt_alibi_tensor(heads, 3).numpy()[:, 0]
    return made


def future() -> torch.Tensor:
    return torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def layers() -> dict[str, np.ndarray]:
    made = {}
    for kind, factor in (("default", 1.0), ("yarn", 8.0)):
        config = llama(kind, D_MODEL // HEADS, factor, 64)
        layer, rotary = LlamaAttention(config, 0).double(), LlamaRotaryEmbedding(config)
        made |= recorded(
            f"llama_{kind}",
            layer,
            {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
            lambda x, layer=layer, rotary=rotary: layer(x, rotary(x, torch.arange(TOKENS)[None]), future())[0],
        )
    for name, causal in (("t5_causal", True), ("t5_bidirectional", False)):
        config = T5Config(d_model=D_MODEL, d_kv=D_MODEL // HEADS, num_heads=HEADS, dropout_rate=0.0, is_decoder=causal)
        config._attn_implementation = "eager"
        layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
        made |= recorded(
            name,
            layer,
            {"q": "q", "k": "k", "v": "v", "o": "o", "position.table": "relative_attention_bias"},
            lambda x, layer=layer, causal=causal: layer(x, mask=future() if causal else None)[0],
        )
    layer = BloomAttention(BloomConfig(hidden_size=D_MODEL, n_head=HEADS), 0).double().eval()
    alibi = build_alibi_tensor(torch.ones(BATCH, TOKENS), HEADS, torch.float64)
    made |= recorded(
        "bloom",
        layer,
        {"qkv": "query_key_value", "o": "dense"},
        lambda x: layer(x, torch.zeros_like(x), alibi, future())[0],
    )
    return made


def recorded(name: str, layer: torch.nn.Module, names: dict[str, str], call) -> dict[str, np.ndarray]:
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    x = torch.randn(BATCH, TOKENS, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    y = call(x)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for ours, theirs in names.items():
        for part, parameter in layer.get_submodule(theirs).named_parameters():
            made[f"{ours}.{part}"], made[f"grad.{ours}.{part}"] = parameter, parameter.grad
    return {f"{name}/{key}": tensor.detach().numpy() for key, tensor in made.items()}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **tables(), **layers())
