"""Make bigbird.npz: outputs and gradients of BigBirdBlockSparseAttention of the package transformers.

Run in an environment with bigbird_requirements.txt::

    python tests/golden/bigbird.py tests/golden/bigbird.npz

In training mode without dropout, because evaluation mode of that class draws no blocks at all: it takes block 0 in
place of every random one. The lists that it drew from NumPy's global generator are kept beside the tensors.
"""

import sys
from types import MethodType

import numpy as np
import torch
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

BATCH, D_MODEL, HEADS = 2, 8, 2
CASES = {  # tokens of a block, blocks, random blocks
    "most_blocks_unseen": (2, 14, 3),
    "one_random": (3, 9, 1),
    "blocks_of_one": (1, 12, 2),
}
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


if __name__ == "__main__":
    cases = enumerate(CASES.items(), start=1)
    arrays = {f"{case}/{name}": array for seed, (case, sizes) in cases for name, array in run(seed, *sizes).items()}
    np.savez_compressed(sys.argv[1], **arrays)
