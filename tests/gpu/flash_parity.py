"""Run the kernels of ``ranges.attend`` against float64 and print the relative errors as JSON lines.

On the CUDA device with the shipped tiles, or, where TRITON_INTERPRET is 1, in Triton's interpreter with small ones. A
program of its own, because that variable must be set before the kernels are imported. The interpreter leaves out bf16,
of which it multiplies the bit patterns.
"""

from __future__ import annotations

import json

import torch
from interpreted import INTERPRETED, Counted, check_integers, mine, spare

from ctxbench.implementations._shared import ranges as kernels
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations._shared.positions import Rotary, Tables, turn
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.turning import Unturned, turned
from ctxbench.implementations.dense import triton
from ctxbench.workload import DTYPES

LONGER = 1 if INTERPRETED else 7  # lengths and lines, where tiles have up to 128 rows
SOME = ("causal", "window and cache", "fewer keys than queries", "segments, memory, state", "wide heads, padded")
# Small tiles, so that short sequences have edges on both sides and tiles that need no mask.
TILES = {"forward": Config(32, 16, 4, 1), "turned": Config(32, 16, 4, 1), "dq": Config(16, 32, 4, 1),
         "dkv": Config(16, 32, 4, 1), "table": Config(16, 16, 4, 1)}  # fmt: skip
OWN = Line(base=1)  # one past the query's own key


def window(left, right=0):
    return Line(base=-left), Line(base=1 + right)


CASES = {  # query heads, queries, offset, width, and of each range: key heads, keys, low, high[, rise]
    "causal": (2, 75, 0, 16, (2, 75, None, OWN)),
    "full": (1, 67, 0, 32, (1, 67, None, None)),
    "shorter than a tile": (2, 5, 0, 16, (2, 5, None, OWN)),
    "one query": (2, 1, 40, 16, (2, 41, None, OWN)),
    "cache": (1, 35, 48, 16, (1, 83, None, OWN)),
    "window and cache": (1, 37, 73, 24, (1, 110, *window(40))),
    "both sides": (1, 81, 0, 16, (1, 81, *window(9, 33))),
    "itself alone": (1, 40, 0, 16, (1, 40, *window(0))),
    "fewer keys than queries": (2, 61, 0, 16, (2, 30, Line(base=-38), Line(base=-28))),
    "later keys alone bounded": (1, 50, 0, 16, (1, 50, None, Line(base=7))),
    "earlier keys alone bounded": (1, 50, 0, 16, (1, 50, Line(base=-6), None)),
    "grouped heads": (6, 45, 3, 16, (2, 48, None, OWN), (3, 20, None, None)),
    "blocks and cells": (1, 77, 13, 16, (1, 90, Line(16, 16), OWN), (1, 6, None, Line(16))),
    "shifted blocks": (1, 70, 0, 16, (1, 70, Line(20, 20, 10, -10), Line(20, 20, 10, 10))),
    "segments, memory, state": (
        2, 83, 21, 16, (2, 104, Line(24, 24, base=-31), OWN), (1, 17, None, None), (2, 90, None, Line(5, 4, 3, -6))),
    "crossing lines": (1, 60, 0, 16, (1, 60, Line(3, 2, base=5), Line(base=-4)), (1, 3, None, Line(stride=0, base=2))),
    "nothing but a prefix": (1, 33, 0, 16, (1, 40, None, Line(stride=0, base=19)), (1, 0, None, None)),
    "from some position on": (2, 60, 5, 16, (1, 65, Line(base=-20), OWN, 37), (2, 9, None, None, 11)),
    "wide heads": (1, 37, 4, 256, (1, 41, Line(base=-9), OWN)),
    "wide heads, padded": (2, 19, 0, 136, (1, 19, None, OWN, 5), (1, 7, None, None)),
    "level and late": (1, 50, 7, 16, (1, 57, Line(stride=0, base=13), OWN)),
}  # fmt: skip


# The same with a bias on the first range: slopes and tables that reach as far, so that tiles lie within and beyond.
BIASED = {"slopes": ("causal", "both sides", "segments, memory, state"),
          "table of 7": ("causal", "full", "cache", "both sides", "wide heads"),
          "table of 30": ("segments, memory, state", "grouped heads", "window and cache", "one query")}  # fmt: skip
# With keys turned by their kernel and queries by that which attends: rule, width and tokens from query to query.
TURNED = {
    "causal": ("rope", 64, 1), "one query": ("rope", 16, 1), "cache": ("rope_linear", 18, 1),
    "full": ("rope_ntk", 128, 2), "segments, memory, state": ("rope_yarn", 16, 5),
    "grouped heads": ("rope_yarn_rotation", 32, 1), "from some position on": ("rope", 24, 1),
    "crossing lines": ("rope", 16, 7), "wide heads": ("rope_yarn", 256, 1), "wide heads, padded": ("rope", 136, 3),
}  # fmt: skip


def bounds(line, positions, keys, otherwise):
    if line is None:
        return torch.full_like(positions, otherwise)
    return torch.tensor([line.at(position) for position in positions.tolist()]).clamp(0, keys)


def rising(keys, rise):
    """Positions from which on keys are seen, in no order."""
    return torch.arange(keys) * rise % 64


def visible(queries, keys, low=None, high=None, offset=0, since=None):
    """Which pairs ``[queries, keys]`` the lines show, from their definition."""
    positions, key = torch.arange(queries) + offset, torch.arange(keys)
    first, end = bounds(low, positions, keys, 0), bounds(high, positions, keys, keys)
    seen = (key >= first[:, None]) & (key < end[:, None])
    return seen if since is None else seen & (positions[:, None] >= since)


def added(bias, ranges, queries, offset):
    """The bias of every pair ``[H, queries, all keys]`` from its definition."""
    rows, parts = torch.arange(queries)[:, None] + offset, []
    for one in ranges:
        if one.start is None:
            parts.append(bias.new_zeros(len(bias), queries, one.k.shape[2]))
            continue
        distance = torch.arange(one.k.shape[2]) * one.every + one.start - rows
        if bias.dim() == 1:
            parts.append(-bias[:, None, None] * distance.abs())
        else:
            farthest = bias.shape[1] // 2
            parts.append(bias[:, distance.clamp(-farthest, farthest) + farthest])
    return torch.cat(parts, 2)


def written_out(q, ranges, offset=0, scale=None, bias=None):
    """Output and log-sum-exp from the definition; rows without a key give 0."""
    k, v = (
        torch.cat([x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in each], 2)
        for each in ([one.k for one in ranges], [one.v for one in ranges])
    )
    seen = torch.cat(
        [visible(q.shape[2], one.k.shape[2], one.low, one.high, offset, one.since) for one in ranges], 1
    ).to(q.device)
    scores = q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    if bias is not None:
        scores = scores + added(bias, ranges, q.shape[2], offset)
    scores = scores.masked_fill(~seen, -1e300)
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


def longer(heads, queries, offset, width, *each):
    """The same case for the tiles of a device."""
    each = [(of, LONGER * keys, *(line and line._replace(base=LONGER * line.base) for line in lines[:2]), *lines[2:])
            for of, keys, *lines in each]  # fmt: skip
    return heads, queries if queries == 1 else LONGER * queries, LONGER * offset, width, *each


def drawn_bias(kind: str, heads: int) -> torch.Tensor | None:
    if not kind:
        return None
    if kind == "slopes":
        return torch.rand(heads) / 4
    return torch.randn(heads, 2 * LONGER * int(kind.split()[-1]) + 1)


def rotations(kind, step, offset, queries, width, each, dtype):
    """Tables of the queries and of the keys of each range, as kernels take them and in float64; none without a kind."""
    rope, exact = Rotary(width, kind or "rope", 4.0).to(torch.get_default_device()), torch.float64
    places = [(offset * step, queries, step), *((of * step, keys, 1) for of, keys, *_ in each)]
    given = [rope.tables(start, length, dtype, apart) for start, length, apart in places] if kind else []
    return given, [Tables(cos.to(exact), sin.to(exact)) for cos, sin in given]


def parity(heads, queries, offset, width, *each, dtype, kind="", rope="", step=1):
    torch.manual_seed(0)
    batch = 2 if heads * len(each) < 4 else 1
    q = torch.randn(batch, queries, heads, width).transpose(1, 2)  # heads as a layer splits them
    drawn = [torch.randn(batch, keys, of, width).transpose(1, 2) for of, keys, *_ in each for _ in range(2)]
    operands = [x.to(dtype).requires_grad_() for x in (q, *drawn)]
    exact = [x.detach().double().requires_grad_() for x in operands]

    bias, exact_bias = drawn_bias(kind, heads), None
    if bias is not None:
        exact_bias = bias.double()
    if kind.startswith("table"):
        operands, exact = [*operands, bias.requires_grad_()], [*exact, exact_bias.requires_grad_()]

    angles, exact_angles = rotations(rope, step, offset, queries, width, each, dtype)

    def ranges(of, angles, turn):
        held = [turn(x, angles[1 + at // 2]) if angles and at % 2 == 0 else x for at, x in enumerate(of[1:])]
        first, *others = (
            Range(*held[2 * which :][:2], low, high, since=rising(keys, *rise) if rise else None)
            for which, (_, keys, low, high, *rise) in enumerate(each)
        )
        return [first._replace(start=3, every=2 if kind == "slopes" else 1), *others]

    scale = 0.2
    asking = Unturned(operands[0], *angles[0]) if rope else operands[0]
    out, lse = kernels.attend(asking, ranges(operands, angles, turned), offset=offset, scale=scale, bias=bias)
    assert out.stride() == operands[0].stride()
    asking = turn(exact[0], exact_angles[0]) if rope else exact[0]
    expected, expected_lse = written_out(asking, ranges(exact, exact_angles, turn), offset, scale, exact_bias)
    if rope:
        with torch.no_grad():  # where nobody asks for gradients, turned queries are kept nowhere
            again = kernels.attend(Unturned(operands[0], *angles[0]), ranges(operands, angles, turned), offset=offset,
                                   scale=scale)  # fmt: skip
        assert torch.equal(out, again[0])
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse) * torch.isfinite(lse)
    received = torch.autograd.grad((out, lse), operands, (grad, grad_lse), retain_graph=not INTERPRETED)
    if not INTERPRETED:  # the same bits every time
        again = torch.autograd.grad((out, lse), operands, (grad, grad_lse))
        assert all(torch.equal(one, two) for one, two in zip(received, again, strict=True))
    there = torch.isfinite(expected_lse)
    truth = torch.autograd.grad(
        (expected, expected_lse[there]), exact, (grad.double(), grad_lse.double()[there]), materialize_grads=True
    )
    of_rows = "lse of rounded rows" if rope else "lse"  # turned, they are rounded to their dtype again
    names = ["out", of_rows, "dq", *(f"d{of}{which}" for which in range(len(each)) for of in "kv"), "dtable"][
        : 2 + len(received)
    ]
    pairs = zip(names, (out, lse, *received), (expected, expected_lse, *truth), strict=True)
    return {name: relative(mine, theirs) for name, mine, theirs in pairs}


def alone(dtype: torch.dtype) -> dict[str, float]:
    """Gradients of the output alone and of the log-sum-exp alone, and of queries whose keys need none."""
    torch.manual_seed(1)
    operands = [torch.randn(1, 1, 20, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in operands]
    received, truth = (attend(of[0], [Range(of[1], of[2], high=OWN)]) for attend, of in
                       ((kernels.attend, operands), (written_out, exact)))  # fmt: skip
    errors = {}
    for index, name in enumerate(("through out", "through lse")):
        mine = torch.autograd.grad(received[index].sum(), operands[:2], retain_graph=True)
        theirs = torch.autograd.grad(truth[index].sum(), exact[:2], retain_graph=True)
        errors |= {
            f"d{x} {name}": relative(*pair) for x, pair in zip("qk", zip(mine, theirs, strict=True), strict=True)
        }
    q, k, v = operands
    detached = kernels.attend(q, [Range(k.detach(), v.detach(), high=OWN), Range(k, v)])[0]
    mine = torch.autograd.grad(detached.sum(), operands)
    q, k, v = exact
    theirs = torch.autograd.grad(written_out(q, [Range(k.detach(), v.detach(), high=OWN), Range(k, v)])[0].sum(), exact)
    return errors | {f"d{x}, memory detached": relative(*pair) for x, *pair in zip("qkv", mine, theirs, strict=True)}


def skipping() -> dict[str, float]:
    """Keys whose tiles lie out of the band are NaN, and so are queries that no key of a tile is seen by."""
    torch.manual_seed(2)
    q, k, v, grad = (torch.randn(1, 1, 96, 16) for _ in range(4))
    k[:, :, :32], v[:, :, :32] = torch.nan, torch.nan  # two tiles of the forward pass, one of dQ
    tail = slice(64, None)  # these queries see the keys from 64 - 20 on
    operands = [x.requires_grad_() for x in (q[:, :, tail].clone(), k, v)]
    out, lse = kernels.attend(operands[0], [Range(k, v, *window(20))], offset=64)
    close = [x.detach().double() for x in (operands[0], k[:, :, 32:], v[:, :, 32:])]
    expected, expected_lse = written_out(close[0], [Range(*close[1:], *window(20))], offset=32)
    dq, dk, dv = torch.autograd.grad(out, operands, grad[:, :, tail])
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
        expected = written_out(q.double(), [Range(k.double(), v.double(), high=OWN if causal else None)])[0]
        errors[f"causal={causal}"] = relative(triton.attend(q, k, v, causal, None), expected)
    return errors


def main() -> None:
    runs = [(name, "", "fp32") for name in CASES] + [(name, "", "fp16") for name in SOME]
    runs += [(name, kind, "fp32") for kind, names in BIASED.items() for name in names]
    runs += [(name, "rope", "fp32") for name in TURNED] + [(name, "rope", "fp16") for name in ("causal", "wide heads")]
    spare()
    counted = Counted()
    if INTERPRETED:
        kernels.config = lambda kernel, *_: TILES[kernel]
    else:
        torch.set_default_device("cuda")
        runs += [(name, kind, "bf16") for name, kind, dtype in runs if dtype == "fp32"]
    for name, kind, dtype in runs:
        check_integers(dtype == "fp16")
        heads, queries, offset, width, *each = CASES[name] if INTERPRETED else longer(*CASES[name])
        rope, turned_width, step = TURNED[name] if kind == "rope" else ("", width, 1)
        given = {"rope": rope, "step": step} if rope else {"kind": kind}
        widths = (
            (turned_width,)
            if INTERPRETED or rope
            else (width, 48, 128, 256)
            if dtype == "fp32"
            else (width, 64, 96, 128, 256)
        )
        for channels in widths:
            if not mine():
                continue
            errors = parity(heads, queries, offset, channels, *each, dtype=DTYPES[dtype], **given)
            print(json.dumps([f"{name}, {channels} {kind}", dtype, errors]))
    for dtype in ("fp32", "fp16"):
        if mine():
            print(json.dumps(["one gradient", dtype, alone(DTYPES[dtype])]))
    for name, check in (("tiles out of sight", skipping), ("dense", module)) if INTERPRETED else (("dense", module),):
        if mine():
            print(json.dumps([name, "fp32", check()]))
    if INTERPRETED:
        counted.all_of("flash.forward", "flash.dq", "flash.dkv", "flash_bias.table", "flash_turned.turned",
                       "flash_turned.turn")  # fmt: skip


if __name__ == "__main__":
    main()
