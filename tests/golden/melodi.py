"""Make melodi.npz: buckets of T5's one-sided position bias, by the package transformers.

Run in an environment with melodi_requirements.txt::

    python tests/golden/melodi.py tests/golden/melodi.npz
"""

import sys

import numpy as np
import torch
from transformers.models.t5.modeling_t5 import T5Attention

if __name__ == "__main__":
    before = torch.arange(0, -700, -1)
    bucket = T5Attention._relative_position_bucket(before, bidirectional=False, num_buckets=32, max_distance=128)
    np.savez_compressed(sys.argv[1], before=before.numpy(), bucket=bucket.numpy())
