"""Run the flash kernels against float64 and print the relative errors as JSON lines.

On the CUDA device with the shipped tiles, or, where TRITON_INTERPRET is 1, in Triton's interpreter with small ones. A
program of its own, because that variable must be set before the kernels are imported. The interpreter leaves out bf16,
of which it multiplies the bit patterns.
"""

from __future__ import annotations

import json
import os

import torch

from ctxbench.implementations._shared import flash as kernels
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations.dense import triton
from ctxbench.workload import DTYPES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LONGER = 1 if INTERPRETED else 7  # lengths and radii, where tiles have up to 128 rows
SOME = ("causal", "window and cache", "fewer keys than queries")
# Small tiles, so that short sequences have edges on both sides and tiles that need no mask.
TILES = {"forward": Config(32, 16, 4, 1), "dq": Config(16, 32, 4, 1), "dkv": Config(16, 32, 4, 1)}
CASES = {  # heads, queries, keys, width, left, right
    "causal": (2, 75, 75, 16, None, 0),
    "full": (1, 67, 67, 32, None, None),
    "shorter than a tile": (2, 5, 5, 16, None, 0),
    "one query": (2, 1, 41, 16, None, 0),
    "cache": (1, 35, 83, 16, None, 0),
    "cross": (1, 35, 83, 16, None, None),
    "window": (1, 90, 90, 16, 20, 0),
    "window and cache": (1, 37, 110, 24, 40, 0),
    "both sides": (1, 81, 81, 16, 9, 33),
    "itself alone": (1, 40, 40, 16, 0, 0),
    "fewer keys than queries": (2, 61, 30, 16, 7, 2),
    "later keys alone bounded": (1, 50, 50, 16, None, 6),
    "earlier keys alone bounded": (1, 50, 50, 16, 6, None),
}


def band(queries: int, keys: int, left: int | None, right: int | None) -> torch.Tensor:
    position, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    return seen


def written_out(q, k, v, seen):
    """Output and log-sum-exp from the definition; rows without a key give 0."""
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~seen, -1e300)
    lse = scores.logsumexp(3)
    return (scores.softmax(3) * seen) @ v, torch.where(seen.any(1), lse, -torch.inf)


def relative(received: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of the root mean squares; infinities must be the same ones."""
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(received))
    expected, received = expected.detach()[finite], received.detach()[finite].double()
    if not expected.norm():  # softmax over one key: its gradient is 0
        return received.norm().item()
    return ((received - expected).norm() / expected.norm()).item()


def parity(heads, queries, keys, width, left, right, dtype):
    queries, keys = (size if size == 1 else LONGER * size for size in (queries, keys))
    left, right = (radius if radius is None else LONGER * radius for radius in (left, right))
    torch.manual_seed(0)
    q = torch.randn(2, queries, heads, width).transpose(1, 2)  # heads as a layer splits them
    k, v = (torch.randn(2, keys, heads, width).transpose(1, 2) for _ in range(2))
    operands = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in operands]
    out, lse = kernels.flash(*operands, left, right)
    assert out.stride() == operands[0].stride()
    expected, expected_lse = written_out(*exact, band(queries, keys, left, right))
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse) * torch.isfinite(lse)
    received = torch.autograd.grad((out, lse), operands, (grad, grad_lse))
    if not INTERPRETED:  # the same bits every time
        again = torch.autograd.grad(kernels.flash(*operands, left, right), operands, (grad, grad_lse))
        assert all(torch.equal(one, two) for one, two in zip(received, again, strict=True))
    there = torch.isfinite(expected_lse)
    truth = torch.autograd.grad(
        (expected, expected_lse[there]), exact, (grad.double(), grad_lse.double()[there]), materialize_grads=True
    )
    pairs = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *received), (expected, expected_lse, *truth), strict=True)
    return {name: relative(mine, theirs) for name, mine, theirs in pairs}


def alone(dtype: torch.dtype) -> dict[str, float]:
    """Gradients of the output alone and of the log-sum-exp alone, as autograd asks for them."""
    torch.manual_seed(1)
    operands = [torch.randn(1, 1, 20, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in operands]
    received, truth = kernels.flash(*operands, right=0), written_out(*exact, band(20, 20, None, 0))
    errors = {}
    for index, name in enumerate(("through out", "through lse")):
        mine = torch.autograd.grad(received[index].sum(), operands[:2], retain_graph=True)
        theirs = torch.autograd.grad(truth[index].sum(), exact[:2], retain_graph=True)
        errors |= {
            f"d{x} {name}": relative(*pair) for x, pair in zip("qk", zip(mine, theirs, strict=True), strict=True)
        }
    return errors


def skipping() -> dict[str, float]:
    """Keys whose tiles lie out of the band are NaN, and so are queries that no key of a tile is seen by."""
    torch.manual_seed(2)
    q, k, v, grad = (torch.randn(1, 1, 96, 16) for _ in range(4))
    k[:, :, :32], v[:, :, :32] = torch.nan, torch.nan  # two tiles of the forward pass, one of dQ
    tail = slice(64, None)  # these queries see the keys from 64 - 20 on
    operands = [q[:, :, tail], k, v]
    out, lse = kernels.flash(*operands, left=20, right=0)
    expected, expected_lse = written_out(*(x.double() for x in (q[:, :, tail], k[:, :, 32:], v[:, :, 32:])),
                                         band(32, 64, 20, 0))  # fmt: skip
    dq, dk, dv = kernels._flash_backward(grad[:, :, tail], None, *operands, out, lse, 20, 0)
    assert torch.isfinite(dq).all()
    assert not dk[:, :, :32].any()
    assert not dv[:, :, :32].any()
    return {"out": relative(out, expected), "lse": relative(lse, expected_lse)}


def module() -> dict[str, float]:
    """What dense puts at its seam."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    errors = {}
    for causal in (True, False):
        expected = written_out(q.double(), k.double(), v.double(), band(40, 40, None, 0 if causal else None))[0]
        errors[f"causal={causal}"] = relative(triton.attend(q, k, v, causal, None), expected)
    return errors


def main() -> None:
    runs = [(name, "fp32") for name in CASES] + [(name, "fp16") for name in SOME]
    if INTERPRETED:
        kernels.config = lambda kernel, *_: TILES[kernel]
    else:
        torch.set_default_device("cuda")
        runs += [(name, "bf16") for name in CASES]
    for name, dtype in runs:
        heads, queries, keys, width, left, right = CASES[name]
        widths = (width,) if INTERPRETED else (width, 48, 64) if dtype == "fp32" else (width, 64, 96, 128)
        for channels in widths:
            errors = parity(heads, queries, keys, channels, left, right, DTYPES[dtype])
            print(json.dumps([f"{name}, {channels}", dtype, errors]))
    for dtype in ("fp32", "fp16"):
        print(json.dumps(["one gradient", dtype, alone(DTYPES[dtype])]))
    for name, check in (("tiles out of sight", skipping), ("dense", module)) if INTERPRETED else (("dense", module),):
        print(json.dumps([name, "fp32", check()]))


if __name__ == "__main__":
    main()
