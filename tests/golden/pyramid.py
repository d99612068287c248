"""Make pyramid.npz: what every token reads of coarser levels, as the package hourglass-transformer-pytorch pools and shifts.

Run in an environment with pyramid_requirements.txt::

    python tests/golden/pyramid.py tests/golden/pyramid.npz

Without layers, the package's causal model adds to its input the repeated means of pooled and shifted tokens. Its first
cell holds one token, ours ``pool`` of them: with a token of zeros in front both have the same cells. A case is
``levels, pool``; ``x, y, gradient, gradient_x: [B, T, d]``, and the maps between levels: ``down.i: [d_i+1, d_i]`` and
``fusion: [d, d_1 + d_2 + ...]``. All in float64.
"""

import sys

import numpy as np
import torch
from hourglass_transformer_pytorch.hourglass_transformer_pytorch import HourglassTransformer

B, T, D = 2, 19, 16
CASES = {"two": (2, 2), "three": (3, 2), "pool3": (2, 3)}


def read(x: torch.Tensor, levels: int, pool: int) -> torch.Tensor:
    """The means that the levels 1 to ``levels - 1`` hold for each token, added up, ``[B, T, d]``."""
    depth = 0
    for _ in range(levels - 1):
        depth = (0, depth, 0)
    factors = (pool,) * (levels - 1) if levels > 2 else pool
    package = HourglassTransformer(
        x.shape[-1], depth=depth, shorten_factor=factors, attn_resampling=False, heads=1, dim_head=2, causal=True
    ).double()
    after = -(x.shape[1] + 1) % pool ** (levels - 1)  # the package takes whole cells only; what follows reads alone
    shifted = torch.nn.functional.pad(x, (0, 0, 1, after))
    return (package(shifted) - shifted)[:, 1 : 1 + x.shape[1]]


def main() -> None:
    """Write inputs, maps, results and gradients of every case."""
    arrays = {}
    for name, (levels, pool) in CASES.items():
        generator = torch.Generator().manual_seed(levels + 10 * pool)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        widths = [D // 2**level for level in range(levels)]
        downs = [draw(low, high) for high, low in zip(widths, widths[1:])]
        fusion, x, gradient = draw(D, sum(widths[1:])), draw(B, T, D).requires_grad_(), draw(B, T, D)
        y, before, down = x, torch.zeros_like(x), torch.eye(D, dtype=torch.float64)
        for level, part in enumerate(fusion.split(widths[1:], dim=1), start=1):
            found = read(x, level + 1, pool)
            down = downs[level - 1] @ down
            y = y + (found - before) @ down.T @ part.T
            before = found
        y.backward(gradient)
        case = {"x": x, "y": y, "gradient": gradient, "gradient_x": x.grad, "fusion": fusion}
        case |= {f"down.{level}": tensor for level, tensor in enumerate(downs)}
        arrays |= {f"{name}/{key}": tensor.detach().numpy() for key, tensor in case.items()}
    np.savez_compressed(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
