"""Make hierarchical.npz: attention over complete cells as the package flash-linear-attention computes it, in float32.

Run in an environment with hierarchical_requirements.txt::

    python tests/golden/hierarchical.py tests/golden/hierarchical.npz

Queries ``q: [1, H, T, D]``, keys and values ``kv: [2, 1, H, T, D]``, their means ``cells``, and of the attention over
the cells alone the result ``found: [1, H, T, D]`` and the log-sum-exp ``lse: [1, H, T]``, -inf where none is complete.
"""

import sys

import numpy as np
import torch
from fla.ops.nsa.naive import naive_nsa_compression

SPAN, T, H, D = 4, 14, 2, 3


def main() -> None:
    """Write inputs and results."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, H, T, D, generator=generator)
    kv = torch.randn(2, 1, H, T, D, generator=generator)
    cells = kv[:, :, :, : T // SPAN * SPAN].unflatten(3, (-1, SPAN)).mean(dim=4)
    tokens_first = (tensor.transpose(1, 2) for tensor in (q, *cells))
    found, lse = naive_nsa_compression(*tokens_first, block_size=SPAN, scale=D**-0.5)
    results = {"found": found.transpose(1, 2), "lse": lse.transpose(1, 2)}
    arrays = {name: tensor.numpy() for name, tensor in {"q": q, "kv": kv, "cells": cells, **results}.items()}
    np.savez_compressed(sys.argv[1], span=SPAN, **arrays)


if __name__ == "__main__":
    main()
