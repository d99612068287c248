"""Make rmt.npz: memory tokens around segments of the package transformers' GPT-2, outputs and gradients, in float64.

Run in an environment with rmt_requirements.txt::

    python tests/golden/rmt.py tests/golden/rmt.npz

GPT-2 gets the embeddings [memory; segment; memory] and gives back its last hidden states, after the final norm; the
last ones are the next segment's memory. Its position embeddings are zero, its activation the exact GELU. The variant
xl is the same model with a mask of its own.
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, D_MODEL, HEADS, D_FF, LAYERS = 2, 6, 2, 8, 2
CASES: dict[str, dict[str, Any]] = {
    "hf": {"length": 11, "segment": 4, "memory": 3},
    "hf_cut": {"length": 12, "segment": 3, "memory": 2, "depth": 1},
    "xl_cut": {"length": 9, "segment": 3, "memory": 2, "full": True, "depth": 0},
}


def mask(segment: int, memory: int, full: bool) -> torch.Tensor | None:
    """Additive mask ``[1, 1, n, n]``; None leaves the model to its own causal one."""
    if not full:
        return None
    n = segment + 2 * memory
    seen = torch.ones(n, n).tril()
    seen[:memory, :memory] = 1
    seen[-memory:, -memory:] = 1
    return torch.where(seen.bool(), 0.0, -torch.inf).double()[None, None]


def run(length: int, segment: int, memory: int, full: bool = False, depth: int | None = None) -> dict[str, np.ndarray]:
    """Segment after segment, one loss over all of them; memory is cut before every ``depth + 1``-th segment."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4, n_positions=segment + 2 * memory, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_inner=D_FF,
        activation_function="gelu", bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        model.transformer.wpe.weight.zero_()
    tokens = torch.randn(memory, D_MODEL, dtype=torch.float64, requires_grad=True)
    x = torch.randn(BATCH, length, D_MODEL, dtype=torch.float64, requires_grad=True)
    outputs, carried = [], tokens.expand(BATCH, -1, -1)
    for number, part in enumerate(x.split(segment, dim=1)):
        if depth is not None and number and number % (depth + 1) == 0:
            carried = carried.detach()
        embeddings = torch.cat((carried, part, carried), dim=1)
        result = model(
            inputs_embeds=embeddings, attention_mask=mask(part.shape[1], memory, full), output_hidden_states=True
        )
        hidden = result.hidden_states[-1]
        outputs.append(hidden[:, memory:-memory])
        carried = hidden[:, -memory:]
    y = torch.cat(outputs, dim=1)
    grad = torch.randn_like(y)
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad, "memory": tokens, "grad.memory": tokens.grad}
    for name, entry in ours(model).items():
        made[name], made[f"grad.{name}"] = value_of(entry, gradient=False), value_of(entry, gradient=True)
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


def ours(model: Any) -> dict[str, Any]:
    """Parameters by our names; a pair names one of the three parts of a joined projection."""
    names: dict[str, Any] = {"norm": model.transformer.ln_f}
    for index, block in enumerate(model.transformer.h):
        prefix = f"layers.{index}"
        names |= {f"{prefix}.{name}": (block.attn.c_attn, part) for part, name in enumerate("qkv")}
        names |= {f"{prefix}.o": block.attn.c_proj, f"{prefix}.ffn.up": block.mlp.c_fc}
        names |= {f"{prefix}.ffn.down": block.mlp.c_proj, f"{prefix}.norm_mixer": block.ln_1}
        names |= {f"{prefix}.norm_ffn": block.ln_2}
    return {f"{name}.{kind}": (module, kind) for name, module in names.items() for kind in ("weight", "bias")}


def value_of(entry: Any, gradient: bool) -> torch.Tensor:
    """A parameter or its gradient in our layout; GPT-2 keeps its matrices transposed."""
    module, kind = entry
    module, part = module if isinstance(module, tuple) else (module, None)
    tensor = getattr(module, kind)
    tensor = tensor.grad if gradient else tensor
    if part is not None:
        tensor = tensor[..., part * D_MODEL : (part + 1) * D_MODEL]
    return tensor.T if tensor.dim() == 2 else tensor


if __name__ == "__main__":
    arrays = {f"{name}/{key}": array for name, case in CASES.items() for key, array in run(**case).items()}
    np.savez_compressed(sys.argv[1], **arrays)
