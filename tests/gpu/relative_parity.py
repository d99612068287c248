"""Run the kernels of the relative term against float64 and print the relative errors as JSON lines.

On the CUDA device with the shipped tiles, or, where TRITON_INTERPRET is 1, in Triton's interpreter with small ones. A
program of its own, because that variable must be set before the kernels are imported. The interpreter leaves out bf16,
of which it multiplies the bit patterns.
"""

from __future__ import annotations

import json

import torch
from flash_parity import relative as error
from interpreted import INTERPRETED, Counted, check_integers, mine, spare

from ctxbench.implementations._shared import relative_fused as kernels
from ctxbench.implementations._shared.relative_table import Stair, Tile
from ctxbench.workload import DTYPES

LONGER = 1 if INTERPRETED else 5  # all lengths, where tiles have 32 or 64 rows
NAMES = ("dq", "du", "dw", "dr", "dk", "dv", "own dk", "own dv", "far dk", "far dv")
CASES = {  # rows, entries, bounds; keys are the rows and the past
    "segments": (61, 0, Stair(20, 24)),
    "no memory": (40, 0, Stair(16, 0)),
    "memory without end": (45, 0, Stair(9, 2**31 - 1)),
    "a token": (1, 0, Stair(16, 16)),
    "a token of a stream": (1, 0, Stair(16, 20, past=25, phase=5)),
    "in the middle of a segment": (43, 0, Stair(20, 24, past=31, phase=7)),
    "zeros that are seen": (33, 0, Stair(16, 19, past=19)),
    "the same number of keys": (50, 0, Stair(20, 17, band=1)),
    "the same number, streamed": (37, 0, Stair(20, 17, past=24, phase=7, band=1)),
    "dense": (45, 0, Stair()),
    "dense with a cache": (21, 0, Stair(memory=34, past=34)),
    "dense in both directions": (39, 0, Stair(causal=0, nearest=-38)),
    "compressed": (58, 22, Stair(12, 9, capacity=5, rate=3)),
    "compressed, all seen": (40, 9, Stair(12, 9, capacity=2**30, rate=3)),
    "compressed, streamed": (40, 23, Stair(12, 12, past=17, phase=5, known=7, capacity=20, rate=4)),
}
WIDE = {  # the same, and channels
    "wide, compressed": (37, 13, Stair(14, 9, capacity=5, rate=3), 104),
    "wide, the same number, streamed": (35, 0, Stair(12, 17, past=10, phase=3, band=1), 64),
    "wide, both directions": (19, 0, Stair(causal=0, nearest=-18), 128),
}
SOME = ("segments", "compressed", "dense in both directions")


def longer(stair: Stair) -> Stair:
    """All lengths times LONGER; what is not a length stays."""
    scaled = {name: getattr(stair, name) * LONGER for name in ("memory", "past", "phase", "known", "capacity")}
    segment = stair.segment if stair.segment == Stair().segment else stair.segment * LONGER
    return stair._replace(segment=segment, **scaled)


def definition(rows: int, entries: int, stair: Stair):
    """Distance, visibility, and whether a key is of the row's own segment: ``[rows, entries + keys]`` each."""
    keys = rows + stair.past
    distance = torch.zeros(rows, entries + keys, dtype=torch.int64)
    seen, own = torch.zeros_like(distance, dtype=torch.bool), torch.zeros_like(distance, dtype=torch.bool)
    for row in range(rows):
        place = row + stair.past
        begin = (row + stair.phase) // stair.segment * stair.segment - stair.phase + stair.past
        left = max(0, begin - stair.memory)
        there = stair.known + left // stair.rate
        first = max(0, place - stair.memory + 1) if stair.band else left
        for key in range(keys):
            distance[row, entries + key] = place - key
            seen[row, entries + key] = key >= first and (key <= place or not stair.causal)
            own[row, entries + key] = key >= begin
        for entry in range(min(entries, there)):
            distance[row, entry] = place - left + there - entry
            seen[row, entry] = entry >= there - stair.capacity
    return distance, seen, own


def written_out(q, u, w, k, v, r, seen, distance):
    """The operator from its definition; ``k, v``: entries, then rows."""
    content = (q + u[:, None]) @ k.transpose(2, 3)
    position = (q + w[:, None]) @ r.transpose(1, 2)
    position = position.gather(3, distance.expand_as(content))
    scores = ((content + position) * q.shape[3] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(3) @ v


def parity(rows: int, entries: int, stair: Stair, width: int, dtype: torch.dtype) -> dict[str, float]:
    rows, entries, stair = rows if rows == 1 else rows * LONGER, entries * LONGER, longer(stair)
    if stair.nearest:
        stair = stair._replace(nearest=1 - rows)
    torch.manual_seed(0)
    B, H, keys = *((2, 1) if entries else (1, 2)), rows + stair.past
    distance, seen, own = definition(rows, entries, stair)
    distance = (distance - stair.nearest).clamp(min=0)
    q, k, v = (torch.randn(B, size, H, width).transpose(1, 2) for size in (rows, keys, keys))
    u, w, r = (
        torch.randn(H, width),
        torch.randn(H, width),
        torch.randn(int(distance.max()) + 1, H, width).transpose(0, 1),
    )
    far = [torch.randn(B, entries, H, width).transpose(1, 2) for _ in range(2)] if entries else [None, None]
    given = [x if x is None else x.to(dtype) for x in (q, u, w, k, v, r, *far)]
    exact = [x if x is None else x.double().requires_grad_() for x in given]
    out, lse = torch.ops.ctxbench.relative(*given, list(stair))
    # What rows give to keys of earlier segments goes through copies, so that the two parts have gradients of their own.
    old_k, old_v = (x.detach().requires_grad_() for x in exact[3:5])
    fq, fu, fw, fk, fv, fr, *entry = exact
    weights = own[:, entries:]
    expected = sum_of_parts(fq, fu, fw, (fk, old_k), (fv, old_v), fr, entry, seen, distance, weights)
    grad = torch.randn_like(out)
    received = torch.ops.ctxbench.relative_backward(grad, *given, out, lse, list(stair), True)
    leaves = [fq, fu, fw, fr, fk, fv, old_k, old_v, *(entry if entries else ())]
    dq, du, dw, dr, dk, dv, old_dk, old_dv, *far_grads = torch.autograd.grad(expected, leaves, grad.double())
    truth = [dq, du, dw, dr, dk + old_dk, dv + old_dv, dk, dv, *far_grads]
    return {"out": error(out, expected)} | {
        name: error(mine, theirs) for name, mine, theirs in zip(NAMES, received, truth, strict=False)
    }


def sum_of_parts(q, u, w, k, v, r, entry, seen, distance, own):
    """The definition, with keys of a row's own segment from the first of each pair and all others from the second."""
    if entry[0] is None:
        far_k, far_v = (x[0][:, :, :0] for x in (k, v))
    else:
        far_k, far_v = entry
    count = far_k.shape[2]
    content = (q + u[:, None]) @ torch.cat((far_k, k[0]), 2).transpose(2, 3)
    content_old = (q + u[:, None]) @ torch.cat((far_k.detach(), k[1]), 2).transpose(2, 3)
    mine = torch.cat((torch.ones(own.shape[0], count, dtype=torch.bool), own), 1).to(q.device)
    position = ((q + w[:, None]) @ r.transpose(1, 2)).gather(3, distance.to(q.device).expand_as(content))
    scores = (torch.where(mine, content, content_old) + position) * q.shape[3] ** -0.5
    p = scores.masked_fill(~seen.to(q.device), float("-inf")).softmax(3)
    return (p * mine) @ torch.cat((far_v, v[0]), 2) + (p * ~mine) @ torch.cat((far_v.detach(), v[1]), 2)


def main() -> None:
    spare()
    counted = Counted()
    runs = [(name, "fp32") for name in CASES] + [(name, "fp16") for name in SOME]
    if INTERPRETED:
        kernels.tile = lambda *_: Tile(16, 4, 1)
    else:
        torch.set_default_device("cuda")
        runs += [(name, "bf16") for name in CASES]
    for name, dtype in runs:
        check_integers(dtype == "fp16")
        widths = (16,) if INTERPRETED else (16, 24) if dtype == "fp32" else (16, 48, 64)
        for width in widths:
            if not mine():
                continue
            print(json.dumps([f"{name}, {width}", dtype, parity(*CASES[name], width, DTYPES[dtype])]), flush=True)
    for name, dtype in [*((name, "fp32") for name in WIDE), ("wide, compressed", "fp16")]:
        check_integers(dtype == "fp16")
        if not mine():
            continue
        print(json.dumps([name, dtype, parity(*WIDE[name], DTYPES[dtype])]), flush=True)
    if INTERPRETED:
        counted.all_of("relative_kernels.forward", *(f"relative_backward.{name}" for name in ("dq", "dkv", "dr")))


if __name__ == "__main__":
    main()
