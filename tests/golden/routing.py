"""Make routing.npz: outputs and gradients of the packages routing-transformer and local-attention, in float64.

Run in an environment with routing_requirements.txt::

    python tests/golden/routing.py tests/golden/routing.npz

Centroids are given and not learned: the package would begin with some of its input, drawn at random. It divides by the
number of clusters of a token plus 1e-5. In the case ``balanced`` every token's best centroid also takes that token, so
that the top-w selection is the strict one. Where queries and keys are shared, keys are the queries at unit length.
"""

import sys

import numpy as np
import torch
from local_attention import LocalAttention
from routing_transformer.routing_transformer import KmeansAttention
from torch.nn.functional import normalize

BATCH, HEADS, WIDTH = 2, 2, 4
ROUTED = {  # tokens, clusters, tokens a cluster, causal with shared queries and keys
    "shared": (18, 3, 6, True),
    "shared_uncovered": (13, 2, 4, True),
    "separate": (14, 4, 5, False),
    "balanced": (16, 4, 4, True),
}
LOCAL = {"local_causal": (12, 4, True), "local_causal_ragged": (11, 3, True), "local_bidirectional": (12, 3, False)}


def draw(length: int) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, length, WIDTH, dtype=torch.float64)


def routed(name: str) -> dict[str, torch.Tensor]:
    length, clusters, window, shared = ROUTED[name]
    layer = KmeansAttention(clusters, window, HEADS, WIDTH, causal=shared, shared_qk=shared).double().eval()
    means = normalize(torch.randn(HEADS, clusters, WIDTH, dtype=torch.float64), dim=-1)
    q, k, v = (draw(length) for _ in range(3))
    if name == "balanced":
        means = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, dtype=torch.float64)).Q
        order = torch.rand(BATCH, HEADS, length).argsort(dim=2) % clusters
        q = 0.2 * q + 3 * torch.stack([means[head][order[:, head]] for head in range(HEADS)], dim=1)
    layer.kmeans.means.copy_(means)
    layer.kmeans.initted.fill_(True)
    leaves = {"q": q, "v": v} if shared else {"q": q, "k": k, "v": v}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, loss = layer(q, leaves.get("k", q), v)
    grad = draw(length)
    y.backward(grad)
    made = {**leaves, "means": means, "grad": grad, "y": y, "loss": loss / layer.kmeans.commitment}
    return {**made, **{f"grad.{leaf}": tensor.grad for leaf, tensor in leaves.items()}}


def local(name: str) -> dict[str, torch.Tensor]:
    length, block, causal = LOCAL[name]
    layer = LocalAttention(block, causal=causal, autopad=causal, use_rotary_pos_emb=False)
    leaves = {part: draw(length).requires_grad_() for part in "qkv"}
    y = layer(*leaves.values())
    grad = draw(length)
    y.backward(grad)
    return {**leaves, "grad": grad, "y": y, **{f"grad.{leaf}": tensor.grad for leaf, tensor in leaves.items()}}


if __name__ == "__main__":
    arrays = {}
    for seed, name in enumerate((*ROUTED, *LOCAL)):
        torch.manual_seed(seed)
        made = routed(name) if name in ROUTED else local(name)
        sizes = np.array((ROUTED | LOCAL)[name])
        arrays |= {f"{name}/{key}": tensor.detach().numpy() for key, tensor in made.items()} | {f"{name}/sizes": sizes}
    np.savez_compressed(sys.argv[1], **arrays)
