"""Lines of the table of ``--impls auto`` that several methods share; each method puts them in an order of its own.

What is marked as measured was seen on a CPU of two cores. Every line about CUDA is an expectation, from published
figures and from what the kernels execute: none has been measured on a device yet. Neither torch nor triton here.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from ctxbench.method import Pick

HALF = ("bf16", "fp16")
MANY_LAYERS = 4  # of a diagonal: with fewer, a launch for all of them saves less than recorded launches do

# On CPU.
BLOCKED = Pick(
    "blocked", devices=("cpu",), dtypes=("fp32",), modes=("forward",),
    why="of the impls in PyTorch none was faster by more than 5 %, the precision of a published run", measured=True,
)  # fmt: skip
NATIVE = Pick(
    "native", devices=("cpu",), dtypes=("fp32", "bf16"), modes=("forward", "stream"),
    why="kernels of our own whose scores never leave the innermost cache", measured=True,
)  # fmt: skip
NATIVE_FORWARD = replace(NATIVE, modes=("forward",))
NATIVE_TRAINED = Pick(
    "native", devices=("cpu",), dtypes=("fp32",), modes=("train",), sizes={"seq_len": (4096, inf)},
    why="kernels of our own, whose backward pass makes scores once and keeps them in the innermost caches",
    measured=True,
)  # fmt: skip
TILES = Pick(
    "native", devices=("cpu",), dtypes=("fp32",), modes=("forward",),
    why="one pass in C++ without copies, its scores in the caches", measured=True,
)  # fmt: skip
IDLE = "plain products use bf16 units that the fused kernel leaves idle"
SLABS = (
    Pick("slabs", ("cpu",), ("bf16",), ("forward", "stream"), why=IDLE, measured=True),
    Pick("slabs", ("cpu",), ("bf16",), ("train",), why=f"{IDLE}; not told apart from blocked at 2k and 4k tokens"),
)
SLABS_DECODED = replace(SLABS[0], modes=("decode",))

# On CUDA: dependent steps first, then kernels.
DIAGONAL = Pick(
    "diagonal_triton", devices=("cuda",), modes=("forward", "train"), sizes={"num_layers": (MANY_LAYERS, inf)},
    why="one launch for all layers of a diagonal: as many times fewer dependent steps as there are layers",
)  # fmt: skip
GRAPH = Pick(
    "graph", devices=("cuda",), modes=("forward", "stream"),
    why="a loop over segments waits for launches from Python, and a recorded step has none",
)  # fmt: skip
TRITON = Pick("triton", devices=("cuda",), why="kernels of our own, without masks or copies in memory")
FLEX = Pick("flex", devices=("cuda",), why="a compiled kernel that skips hidden tiles, where ours do not apply")
LOOP = (GRAPH, TRITON)
KERNELS = (TRITON, FLEX)

# Dense attention. On Hopper published kernels rank so: FlashAttention's newest, cuDNN, Triton, FlashAttention-2.
DENSE = (
    Pick("triton", devices=("cuda",), modes=("decode",), why="the keys of a long cache are split over the device"),
    Pick(
        "flash_attn_4", devices=("cuda",), dtypes=HALF, modes=("forward", "train"), capability=90,
        sizes={"seq_len": (2048, inf), "head_dim": (1, 128)},
        why="the fastest published kernels on Hopper from 2k tokens on",
    ),
    Pick(
        "cudnn", devices=("cuda",), dtypes=HALF, modes=("forward", "train"), capability=90,
        why="published figures on Hopper have it next to FlashAttention's newest, and ahead of it on short sequences",
    ),
    Pick(
        "flash", devices=("cuda",), dtypes=HALF, modes=("forward", "train"), capability=80,
        why="FlashAttention-2 was made for Ampere",
    ),
    Pick(
        "efficient", devices=("cuda",), dtypes=("fp32",), modes=("forward", "train"),
        why="PyTorch's one fused kernel in fp32",
    ),
    TRITON,
    FLEX,
)  # fmt: skip
