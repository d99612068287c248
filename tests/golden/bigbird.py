"""Make bigbird.npz: outputs and gradients of attentions of the package transformers, and the blocks they draw.

Run in an environment with bigbird_requirements.txt::

    python tests/golden/bigbird.py tests/golden/bigbird.npz

BigBirdBlockSparseAttention in training mode without dropout, because evaluation mode of that class draws no blocks at
all: it takes block 0 in place of every random one. The lists that it drew from NumPy's global generator are kept beside
the tensors, and further ones for each of its plans alone.

The external construction is LongformerSelfAttention with the global tokens first and their projections tied to the
others; its softmax is float32.
"""

import sys
from types import MethodType

import numpy as np
import torch
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

BATCH, D_MODEL, HEADS = 2, 8, 2
CASES = {  # tokens of a block, blocks, random blocks
    "most_blocks_unseen": (2, 14, 3),
    "one_random": (3, 9, 1),
    "blocks_of_one": (1, 12, 2),
}
PLANS = {  # tokens of a block, blocks, random blocks, heads
    "first_stretch": (2, 12, 3, 2),
    "two_stretches": (1, 29, 12, 3),
    "one_stretch": (1, 9, 4, 2),
    "old_3072": (64, 48, 3, 2),
    "old_4096": (128, 32, 2, 1),
}
ETC = (24, 3, 4)  # tokens, the global ones included; global tokens; radius
NAMES = {"q": "query", "k": "key", "v": "value"}


def run(seed: int, size: int, blocks: int, num_random: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    config = BigBirdConfig(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        block_size=size,
        num_random_blocks=num_random,
        attention_probs_dropout_prob=0.0,
    )
    layer = BigBirdBlockSparseAttention(config, seed=seed).double().train()
    drawn = []
    original = layer._bigbird_block_rand_mask_with_head

    def listen(self, *args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    layer._bigbird_block_rand_mask_with_head = MethodType(listen, layer)
    x = torch.randn(BATCH, size * blocks, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    everything = torch.ones(BATCH, size * blocks, dtype=torch.float64)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(everything, size)
    y = layer(x, band, rows, columns, blocked, blocked)[0]
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for ours, theirs in NAMES.items():
        for part in ("weight", "bias"):
            parameter = getattr(getattr(layer, theirs), part)
            made[f"{ours}.{part}"], made[f"grad.{ours}.{part}"] = parameter, parameter.grad
    arrays = {name: tensor.detach().numpy() for name, tensor in made.items()}
    return {**arrays, "random": np.stack(drawn[0]), "sizes": np.array([size, blocks, num_random])}


def plan(seed: int, size: int, blocks: int, num_random: int, heads: int) -> dict[str, np.ndarray]:
    config = BigBirdConfig(
        hidden_size=4 * heads, num_attention_heads=heads, block_size=size, num_random_blocks=num_random
    )
    layer, length = BigBirdBlockSparseAttention(config).train(), size * blocks
    np.random.seed(seed)
    if length in (1024, 3072, 4096):
        drawn = [
            layer._bigbird_block_rand_mask(4096, 4096, size, size, num_random, last_idx=1024)[: blocks - 2]
            for _ in range(heads)
        ]
    else:
        ends, counts = layer._get_rand_attn_plan(length, size, num_random)
        drawn = layer._bigbird_block_rand_mask_with_head(length, length, size, size, heads, ends, counts)
    return {"random": np.stack(drawn).astype(np.int16), "sizes": np.array([size, blocks, num_random, heads])}


def etc(length: int, num_global: int, radius: int) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, attention_window=[2 * radius], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, layer_id=0).double().eval()
    for name in NAMES.values():
        setattr(layer, f"{name}_global", getattr(layer, name))
    x = torch.randn(BATCH, length, D_MODEL, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    mask = torch.zeros(BATCH, length, dtype=torch.float64)
    mask[:, :num_global] = 10000.0
    y = layer(x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True)[0]
    y.backward(grad)
    made = {"x": x, "grad": grad, "y": y, "grad.x": x.grad}
    for ours, theirs in NAMES.items():
        for part in ("weight", "bias"):
            parameter = getattr(getattr(layer, theirs), part)
            made[f"{ours}.{part}"], made[f"grad.{ours}.{part}"] = parameter, parameter.grad
    arrays = {name: tensor.detach().numpy() for name, tensor in made.items()}
    return {**arrays, "sizes": np.array([length, num_global, radius])}


if __name__ == "__main__":
    cases = enumerate(CASES.items(), start=1)
    made = {case: run(seed, *sizes) for seed, (case, sizes) in cases}
    made |= {f"plan_{case}": plan(seed, *sizes) for seed, (case, sizes) in enumerate(PLANS.items(), start=5)}
    made["etc"] = etc(*ETC)
    arrays = {f"{case}/{name}": array for case, found in made.items() for name, array in found.items()}
    np.savez_compressed(sys.argv[1], **arrays)
