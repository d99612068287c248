"""Run the decoding kernels against float64 and print the relative errors as JSON lines.

On the CUDA device, or, where TRITON_INTERPRET is 1, in Triton's interpreter with small tiles; see ``flash_parity``.
"""

from __future__ import annotations

import json

import torch
from flash_parity import relative
from interpreted import INTERPRETED, Counted, check_integers, mine, spare

from ctxbench.implementations._shared import decode as kernels
from ctxbench.implementations._shared.decode_table import Config
from ctxbench.implementations.dense import triton
from ctxbench.workload import DTYPES

CASES = {  # heads, heads of keys, queries, rows of the cache, keys in it, width, start, sinks, causal
    "one query": (1, 1, 1, 75, 75, 16, 0, 0, True),
    "one key": (2, 2, 1, 9, 1, 16, 0, 0, True),
    "shorter than a tile": (1, 1, 1, 5, 5, 16, 0, 0, True),
    "one part": (2, 1, 2, 16, 16, 16, 0, 0, True),
    "partly filled": (2, 2, 1, 90, 41, 24, 0, 0, True),
    "few queries": (1, 1, 5, 70, 70, 16, 0, 0, True),
    "more queries than keys": (1, 1, 6, 40, 3, 16, 0, 0, True),
    "no order": (1, 1, 3, 50, 50, 16, 0, 0, False),
    "grouped": (4, 2, 1, 67, 67, 16, 0, 0, True),
    "grouped, beyond a tile of queries": (4, 1, 5, 50, 50, 32, 0, 0, True),
    "ring": (1, 1, 1, 61, 61, 16, 17, 0, True),
    "ring, few queries": (2, 1, 4, 61, 61, 16, 44, 0, True),
    "wide heads": (2, 1, 3, 40, 37, 136, 0, 0, True),
    "ring behind sinks": (2, 2, 2, 61, 61, 16, 30, 4, True),
}
SOME = ("one query", "grouped", "ring behind sinks")


def in_order(cache: torch.Tensor, keys: int, start: int, sinks: int) -> torch.Tensor:
    """The keys of a cache, oldest first."""
    return torch.cat((cache[:, :, :sinks], cache[:, :, sinks:].roll(-start, 2)), dim=2)[:, :, :keys]


def parity(heads, of_keys, queries, capacity, keys, width, start, sinks, causal, dtype):
    torch.manual_seed(0)
    batch = 2 if heads < 3 else 1
    q = torch.randn(batch, queries, heads, width).transpose(1, 2).to(dtype)  # heads as a layer splits them
    k, v = (torch.randn(batch, of_keys, capacity, width).to(dtype) for _ in range(2))
    k[:, :, keys:], v[:, :, keys:] = torch.nan, torch.nan  # rows that are not filled
    out, lse = kernels.decode(q, k, v, keys, start=start, sinks=sinks, causal=causal, scale=0.3)
    assert out.stride() == q.stride()
    k, v = (in_order(cache.double(), keys, start, sinks).repeat_interleave(heads // of_keys, dim=1) for cache in (k, v))
    scores = q.double() @ k.mT * 0.3
    if causal:
        later = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        scores = scores.masked_fill(later, -torch.inf)
    expected_lse = scores.logsumexp(3)
    expected = scores.softmax(3).nan_to_num(0) @ v
    return {"out": relative(out, expected), "lse": relative(lse, expected_lse)}


def dense() -> dict[str, float]:
    """What dense decodes with."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    expected = (q.double() @ k.double().mT * 0.25).softmax(3) @ v.double()
    return {"out": relative(triton.attend(q, k, v, True, None), expected)}


def main() -> None:
    spare()
    counted = Counted()
    if INTERPRETED:
        kernels.config = lambda *_: Config(16, 16, 4, 1)
    else:
        torch.set_default_device("cuda")
    runs = [(name, "fp32") for name in CASES] + [(name, "fp16") for name in SOME]
    runs += [] if INTERPRETED else [(name, "bf16") for name in CASES]
    for name, dtype in runs:
        check_integers(dtype == "fp16")
        if not mine():
            continue
        print(json.dumps([name, dtype, parity(*CASES[name], DTYPES[dtype])]))
    if mine():
        print(json.dumps(["dense", "fp32", dense()]))
    if INTERPRETED:
        counted.all_of("partial", "merge")


if __name__ == "__main__":
    main()
