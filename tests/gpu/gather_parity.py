"""Run the kernels that select and gather against float64 and print the relative errors as JSON lines.

On the CUDA device, or, where TRITON_INTERPRET is 1, in Triton's interpreter with small tiles; see ``flash_parity``.
A choice that must be the reference's own is reported as the share of it that is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from flash_parity import TILES, relative
from interpreted import INTERPRETED, Counted, check_integers, mine, spare

from ctxbench.implementations._shared import ranges
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.compressive_memory import METHOD as COMPRESSIVE_MEMORY
from ctxbench.implementations.memorizing import METHOD as MEMORIZING
from ctxbench.implementations.memorizing import reference as memorizing_reference
from ctxbench.implementations.memorizing import search
from ctxbench.implementations.memorizing import triton as memorizing
from ctxbench.implementations.memory_bank import METHOD as MEMORY_BANK
from ctxbench.implementations.memory_bank import gate
from ctxbench.implementations.routing import METHOD as ROUTING
from ctxbench.implementations.routing import choosing, gathered
from ctxbench.implementations.routing import reference as routing_reference
from ctxbench.implementations.routing import routing as clusters
from ctxbench.implementations.routing import triton as routing
from ctxbench.implementations.routing.layer import Rules
from ctxbench.method import Dims, Method
from ctxbench.workload import DTYPES

PLAIN = Position()
Errors = dict[str, float]
Check = Callable[[torch.dtype], Errors]


def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """``[B, T, H, D]`` as ``[B, H, T, D]``: heads as a layer splits them. Where scores are unscaled, ``scale`` is."""
    return (torch.randn(shape) * scale).transpose(1, 2).to(dtype).requires_grad_()


def against(mine: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], operands: dict) -> Errors:
    """Errors of the result and of the gradients of ``operands`` where a gradient is defined."""
    wide = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    received, expected = mine(**operands), exact(**wide)
    grad = torch.randn(expected.shape).to(received.dtype)
    both = [
        torch.autograd.grad(y, list(leaves.values()), g, allow_unused=True)
        for y, leaves, g in ((received, operands, grad), (expected, wide, grad.double()))
    ]
    pairs = {f"d{name}": pair for name, *pair in zip(operands, *both, strict=True) if pair[0] is not None}
    assert not any(theirs is not None and theirs.any() for mine, theirs in zip(*both, strict=True) if mine is None)
    return {name: relative(*pair) for name, pair in {"out": (received, expected), **pairs}.items()}


def differing(received: torch.Tensor, expected: torch.Tensor) -> float:
    return (received.long() != expected.long()).double().mean().item()


# Routing: [B, T, H, D]; T = 1 and lengths below a tile, beyond a tile, queries that continue a state.
def in_clusters(
    queries: int, keys: int, earlier: bool, without_self: bool, num_clusters: int = 3, width: int = 16
) -> Check:
    def check(dtype: torch.dtype) -> Errors:
        q, k, v = (draw(dtype, 1, tokens, 1, width) for tokens in (queries, keys, keys))
        key_ids = torch.randint(num_clusters, (1, 1, keys), dtype=torch.int32)
        rest = key_ids if queries == keys else key_ids[:, :, keys - queries :], key_ids
        rules = Rules(num_clusters, earlier, without_self)
        return against(
            lambda q, k, v: routing.strict(q, k, v, *rest, rules, PLAIN),
            lambda q, k, v: routing_reference.strict(q, k, v, *rest, rules, PLAIN),
            {"q": q, "k": k, "v": v},
        )

    return check


def in_taken(tokens: int, w: int, earlier: bool, without_self: bool, shared: bool, width: int = 16) -> Check:
    def check(dtype: torch.dtype) -> Errors:
        operands = {name: draw(dtype, 1, tokens, 2, width) for name in "qkv"}
        ids = [torch.rand(1, 2, 3, tokens).topk(w, dim=3).indices.sort(dim=3).values for _ in range(2)]
        ids = [ids[0], ids[0] if shared else ids[1]]
        numbers = ids if shared else [each.int() for each in ids]
        rules = Rules(3, earlier, without_self)
        return against(
            lambda q, k, v: routing.topw(q, k, v, *numbers, rules, PLAIN),
            lambda q, k, v: routing_reference.topw(q, k, v, *ids, rules, PLAIN),
            operands,
        )

    return check


def in_blocks(queries: int, keys: int, earlier: bool) -> Check:
    def check(dtype: torch.dtype) -> Errors:
        operands = {"q": draw(dtype, 1, queries, 1, 16), **{name: draw(dtype, 1, keys, 1, 16) for name in "kv"}}
        return against(
            lambda q, k, v: routing.local(q, k, v, 10, earlier, PLAIN),
            lambda q, k, v: routing_reference.local(q, k, v, 10, earlier, PLAIN),
            operands,
        )

    return check


def choices(dtype: torch.dtype) -> Errors:
    """Who is nearest and who is taken, also where many are equally near."""
    x, means = torch.randn(1, 2, 75, 16).to(dtype), torch.randn(2, 40, 16).to(dtype)
    coarse = torch.randint(-2, 3, (1, 2, 75, 16)).to(dtype), torch.randint(-1, 2, (2, 40, 16)).to(dtype)
    errors = {"nearest": differing(routing.nearest(x, means), clusters.assigned(x, means))}
    wide = torch.randn(1, 2, 37, 104).to(dtype), torch.randn(2, 20, 104).to(dtype)
    errors["nearest, wide heads"] = differing(routing.nearest(*wide), clusters.assigned(*wide))
    errors["nearest of equals"] = differing(routing.nearest(*coarse), clusters.assigned(*coarse))
    similarity = torch.randint(-3, 3, (1, 1, 2, 150)).to(dtype) * torch.tensor([1.0, 0.0]).repeat(75).to(dtype)
    for w in (1, 50, 150):
        first = similarity.sort(dim=3, descending=True, stable=True).indices[..., :w].sort(dim=3).values
        errors[f"{w} taken"] = differing(choosing.best_tokens(similarity, w), first)
    few = coarse[0], coarse[1][:, :2]
    errors["taken of equals"] = differing(routing.taken(*few, 20), clusters.taken(*few, 20))
    return errors


# Memorizing: exact search, oldest first of equal scores, all segments at once.
def best(queries: int, keys: int, top_k: int, width: int = 16) -> Check:
    def check(dtype: torch.dtype) -> Errors:
        q = draw(dtype, 1, queries, 2, width, scale=width**-0.5)
        k, v = (draw(dtype, 1, keys, 2, width).detach() for _ in range(2))
        return against(
            lambda q: memorizing.lookup(q, k, v, top_k),
            lambda q: memorizing_reference.lookup(q, k.double(), v.double(), top_k),
            {"q": q},
        )

    return check


def equals(dtype: torch.dtype) -> Errors:
    """Scores of which most are equal: the oldest of equal ones are picked, and no other. The segment never ends."""
    q, k = torch.randint(-1, 2, (1, 1, 20, 16)).to(dtype), torch.randint(-1, 2, (1, 1, 50, 2)).to(dtype)
    k = torch.cat((k, torch.zeros(1, 1, 50, 14, dtype=dtype)), dim=3)
    v = torch.randn(1, 1, 50, 16).to(dtype)
    _, picked, _ = search.search(q, k, v, 7, 50, 2**31 - 1, 50, True)
    expected = (q @ k.transpose(2, 3)).sort(dim=3, descending=True, stable=True).indices[0, :, :, :7]
    return {"picked": differing(picked.sort(dim=2).values, expected.sort(dim=2).values)}


def at_once(tokens: int, top_k: int | None, segment_len: int, memory_len: int) -> Check:
    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        for begin in range(0, tokens, segment_len):
            seen, own = slice(max(0, begin - memory_len), begin), q[:, :, begin : begin + segment_len]
            stored = k[:, :, seen].detach(), v[:, :, seen].detach()
            found.append(memorizing_reference.lookup(own, *stored, top_k) if begin else own * 0)
        return torch.cat(found, dim=2)

    def check(dtype: torch.dtype) -> Errors:
        operands = {name: draw(dtype, 1, tokens, 2, 16, scale=0.25 if name == "q" else 1.0) for name in "qkv"}
        return against(
            lambda q, k, v: memorizing.whole(q, k, v, top_k, segment_len, memory_len), exact, operands
        )  # fmt: skip

    return check


def window(dtype: torch.dtype) -> Errors:
    bias = torch.zeros(1, 9)
    return against(
        lambda q, k, v: memorizing.window(q, k, v, bias),
        lambda q, k, v: memorizing_reference.OPERATORS.window(q, k, v, bias.double()),
        {"q": draw(dtype, 1, 30, 1, 16, scale=0.25), **{name: draw(dtype, 1, 37, 1, 16) for name in "kv"}},
    )


def gated(tokens: int, width: int) -> Check:
    def check(dtype: torch.dtype) -> Errors:
        operands = {name: torch.randn(2, tokens, width).to(dtype).requires_grad_() for name in ("x", "half", "read")}
        operands["weight"] = (torch.randn(width, 2 * width) * width**-0.5).to(dtype)[:, width:].requires_grad_()
        return against(
            lambda **all: gate.Gated.apply(*all.values(), True),
            lambda x, half, read, weight: x + torch.sigmoid(half + read @ weight.T) * read,
            operands,
        )

    return check


def module(
    method: Method, tokens: int, chunks: tuple[int, ...], position: str = "none", **changes: Any
) -> Check:  # fmt: skip
    """A stack, its parameters' gradients in one number, and the same outputs streamed in these chunks."""

    def check(dtype: torch.dtype) -> Errors:
        params = method.params(**changes)
        causal = params.selection == "strict" if method is ROUTING else True
        dims = Dims(seq_len=tokens, d_model=32, num_heads=2, num_layers=2, d_ff=0, causal=causal,
                    position=position)  # fmt: skip
        device = str(torch.get_default_device())
        mine = method.make(dims, params, "triton", device, dtype)
        with torch.no_grad():  # scores of 20 would multiply their own rounding by as much
            for name, parameter in mine.named_parameters():
                if name.endswith("mixer.scale"):
                    parameter.fill_(4.0)
        exact = method.make(dims, params, "reference", device, torch.float64)
        exact.load_state_dict(mine.state_dict())
        x = torch.randn(1, tokens, 32).to(dtype)
        received, expected = mine(x).y, exact(x.double()).y
        grad = torch.randn(expected.shape).to(dtype)
        received.backward(grad)
        expected.backward(grad.double())
        pairs = [(a.grad, b.grad) for a, b in zip(mine.parameters(), exact.parameters(), strict=True)]
        assert all((a is None) == (b is None) for a, b in pairs)
        gradients = [torch.cat([g[side].flatten().double() for g in pairs if g[0] is not None]) for side in range(2)]
        errors = {"out": relative(received, expected), "gradients": relative(*gradients)}
        if chunks:
            with torch.no_grad():
                state, outputs = mine.init_state(1), []
                for piece in x.split(chunks, dim=1):
                    y, state = mine(piece, state)
                    outputs.append(y)
            errors["streamed"] = relative(torch.cat(outputs, dim=1), expected)
        return errors

    return check


ITEMS = {"segment_len": 8, "recent_len": 8, "compressed_len": 8, "item_len": 2, "rate": 2, "top_k": 3}
CHECKS: dict[str, Check] = {
    "strict": in_clusters(65, 65, True, False),
    "strict, without itself": in_clusters(45, 45, True, True),
    "strict, bidirectional": in_clusters(45, 45, False, False),
    "strict, continued": in_clusters(21, 75, True, True),
    "strict, one query": in_clusters(1, 40, True, False),
    "strict, one token": in_clusters(1, 1, True, True),
    "strict, empty clusters": in_clusters(40, 40, True, False, 20),
    "strict, wide heads": in_clusters(21, 37, True, True, 2, 104),
    "topw": in_taken(45, 19, False, False, False),
    "topw, masked": in_taken(45, 19, True, True, True),
    "topw, one taken": in_taken(20, 1, True, False, True),
    "topw, wide heads": in_taken(21, 11, True, False, True, 104),
    "local": in_blocks(45, 45, True),
    "local, bidirectional": in_blocks(37, 37, False),
    "local, continued": in_blocks(8, 17, True),
    "choices": choices,
    "search": best(37, 75, 7),
    "search, one query": best(1, 50, 16),
    "search, everything": best(20, 33, 40),
    "search, wide heads": best(21, 35, 5, 104),
    "search, equals": equals,
    "segments": at_once(45, 5, 10, 25),
    "segments, fewer than wanted": at_once(25, 12, 8, 14),
    "segments, dense": at_once(45, None, 10, 25),
    "one token": at_once(1, 5, 10, 25),
    "window": window,
    "gate": gated(21, 40),
    "gate, one token": gated(1, 16),
    "routing": module(ROUTING, 30, (11, 1, 18), "rope", num_clusters=3, local_block=8),
    "routing, topw": module(ROUTING, 21, (), "rope", num_clusters=3, local_block=8, selection="topw"),
    "memorizing": module(MEMORIZING, 30, (8, 5, 17), memory_len=12, segment_len=8, top_k=4, window=6),
    "memorizing, t5": module(MEMORIZING, 21, (8, 5, 8), "t5", memory_len=12, segment_len=8, top_k=4, window=6),
    "memory_bank": module(MEMORY_BANK, 21, (5, 3, 13), num_slots=5, segment_len=8),
    "compressive_memory": module(COMPRESSIVE_MEMORY, 37, (8, 5, 24), "rope", **ITEMS),
}
HALF = ["strict", "topw", "search", "segments", "gate", "choices"]


def runs() -> Iterator[tuple[str, str]]:
    yield from ((name, "fp32") for name in CHECKS)
    yield from ((name, "fp16") for name in HALF)
    if not INTERPRETED:
        yield from ((name, "bf16") for name in HALF)


def main() -> None:
    spare()
    counted = Counted()
    if INTERPRETED:
        ranges.config = gathered.config = lambda kernel, *_: TILES[kernel]
        choosing.SELECT, choosing.TOKENS, choosing.CENTROIDS, choosing.ADDED = 64, 32, {512: 16}, 16
        search.GATHERING, search.keys, search.queries = 16, lambda *_: 16, lambda *_: 16
        gate.TILES = dict.fromkeys((2, 4), gate.Tile(16, 16, 16, 4, 1))
    else:
        torch.set_default_device("cuda")
    for name, dtype in runs():
        if (sys.argv[1:] and name not in sys.argv[1:]) or not mine():
            continue
        torch.manual_seed(0)
        check_integers(dtype == "fp16")
        print(json.dumps([name, dtype, CHECKS[name](DTYPES[dtype])]), flush=True)
    if INTERPRETED and not sys.argv[1:]:
        counted.all_of(
            *(f"gathered.{name}" for name in ("forward", "dq", "dkv")), "gate.gate", "gate.gradient",
            *(f"choosing.{name}" for name in ("nearest", "taken", "add")), "search.search", "search.gradient",
        )  # fmt: skip


if __name__ == "__main__":
    main()
