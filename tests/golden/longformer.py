"""Make longformer.npz: outputs and gradients of LongformerSelfAttention of the package transformers.

Run in an environment with longformer_requirements.txt::

    python tests/golden/longformer.py tests/golden/longformer.npz

The package computes the softmax in float32 whatever the input, so the tensors carry errors of about 1e-7.
"""

import sys

import numpy as np
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

BATCH, LENGTH, D_MODEL, HEADS, WINDOW = 2, 24, 8, 2, 8
CASES = {"no_globals": (), "one_global": (0,), "three_globals": (0, 1, 2), "scattered": (0, 5, 6, 17)}
NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "global_q": "query_global",
    "global_k": "key_global",
    "global_v": "value_global",
}


def run(positions: tuple[int, ...]) -> dict[str, np.ndarray]:
    torch.manual_seed(len(positions))
    config = LongformerConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, attention_window=[WINDOW], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, layer_id=0).double().eval()
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.float64)  # 0 local, positive global, negative padding
    mask[:, list(positions)] = 10000.0
    y = layer(
        x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=len(positions) > 0
    )[0]
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for ours, theirs in NAMES.items():
        linear = getattr(layer, theirs)
        for part in ("weight", "bias"):
            parameter = getattr(linear, part)
            made[f"{ours}.{part}"] = parameter
            if parameter.grad is not None:
                made[f"grad.{ours}.{part}"] = parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in made.items()}


if __name__ == "__main__":
    arrays = {f"{case}/{name}": array for case, at in CASES.items() for name, array in run(at).items()}
    np.savez_compressed(sys.argv[1], **arrays)
