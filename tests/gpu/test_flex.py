"""FlexAttention: block lists against brute force, impls against the reference, formulas against the tracer.

Uncompiled it computes in float64 and keeps all scores, through dynamo alone it has gradients too, and compiled for the
CPU it walks the block lists: each shows what the others cannot.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace, uncompiled_flex_attention
from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.lines import Line, place
from ctxbench.implementations._shared.positions import positions_for
from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered
from ctxbench.implementations._shared.window_flex import attend as attend_window
from ctxbench.implementations.bigbird import flex as bigbird_flex
from ctxbench.implementations.dense import flex as dense_flex
from ctxbench.implementations.dense import reference as dense_reference
from ctxbench.implementations.longformer import reference as longformer_reference
from ctxbench.method import Dims, Method
from ctxbench.registry import discover
from ctxbench.workload import as_output

METHODS = {method.name: method for method in discover()}

# Method, parameters, changes of the sizes, lengths; lengths around tiles, blocks and segments.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...]]] = [
    *(("dense", {}, {"causal": causal, "position": position}, (1, 128, 301))
      for causal in (True, False) for position in ("none", "alibi", "t5")),
    *(("longformer", {"window": window, "num_global": prefix}, {"causal": causal}, (1, 5, 389, 700))
      for causal in (True, False) for window, prefix in ((1, 0), (150, 130), (300, 16), (600, 129))),
    ("longformer", {"window": 40, "num_global": 16, "separate_global": False}, {}, (301,)),
    *(("longformer", {"window": 40, "num_global": 0}, {"position": position, "causal": causal}, (7, 301))
      for position in ("alibi", "t5") for causal in (True, False)),
    *(("bigbird", {"block_size": 16, "num_random": 2}, {"causal": False, "position": position}, (1, 31, 61, 77, 333))
      for position in ("none", "alibi", "t5")),
    *(("bigbird", {"form": "etc", "num_global": prefix, "local_radius": radius}, {"causal": False}, (1, 300))
      for prefix, radius in ((5, 20), (140, 130))),
    ("longlora", {"group": 256}, {}, (1, 128, 256, 300, 700)),
    ("longlora", {"group": 256, "wrap": True}, {"causal": False}, (1, 130, 256, 384, 500, 700)),
    ("longlora", {}, {}, (1024,)),
    ("longlora", {"group": 256}, {"position": "t5"}, (300,)),
    ("longlora", {"group": 256, "wrap": True}, {"causal": False, "position": "alibi"}, (500,)),
    ("longlora", {"group": 256, "wrap": True}, {"causal": False, "position": "t5"}, (500,)),
    *(("pyramid", {"pool": 3, "pooled_queries": pooled}, {"num_layers": 4, "causal": causal}, (20, 400))
      for pooled in (True, False) for causal in (True, False)),
    ("hierarchical", {}, {}, (1, 130, 700)),
    ("hierarchical", {"window": 40}, {"position": "rope"}, (301,)),
    ("hierarchical", {"window": 300, "levels": 1}, {}, (129, 700)),
    ("hierarchical", {"form": "causal_linear", "window": 50, "cells": 20}, {}, (3, 700, 1301)),
    ("hierarchical", {"form": "causal_linear", "window": 150, "cells": 130, "pool": 3}, {}, (5, 1301)),
    ("hierarchical", {"disjoint": True, "window": 20, "cells": 9}, {}, (1, 130, 1301)),
    ("hierarchical", {"form": "causal_linear", "disjoint": True, "window": 70, "cells": 40, "pool": 2}, {}, (700,)),
    ("hierarchical", {"form": "seed"}, {"causal": False}, (1, 130)),
    *(("transformer_xl", {"segment_len": 128, "mem_len": memory, "start": start}, {"position": "transformer_xl"},
       (1, 128, 200, 600)) for memory in (0, 128, 384) for start in ("empty", "zeros")),
]  # fmt: skip


def sized(name: str, params: dict[str, Any], changes: dict[str, Any]) -> tuple[Method, Any, Dims]:
    method, heads = METHODS[name], 4 if name == "pyramid" else 2  # of which each level has half
    plain = {"d_model": 16 * heads, "num_heads": heads, "num_layers": 2, "batch_size": 2, "d_ff": 24}
    return method, method.params().replace(**params), Dims(**{"seq_len": 1, **plain, **changes})


@pytest.mark.parametrize(("name", "params", "changes", "lengths"), CASES, ids=str)
def test_formulas_are_what_the_tracer_counts(
    name: str, params: dict[str, Any], changes: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    method, values, dims = sized(name, params, changes)
    modes = method.impl("flex").modes
    for mode, length in itertools.product(
        modes, lengths if changes.get("position") in (None, "none") else lengths[-1:]
    ):
        sizes = dims.replace(seq_len=length)
        counted = trace(method, sizes, values, "flex", mode, "bf16")
        cost = method.cost_of("flex", mode, sizes.causal, sizes.position, values)
        formula = {term: evaluate(x, bindings(sizes, values, 2, 512)) for term, x in cost.flops.items()}
        at = (mode, length, formula, counted.by_op)
        assert evaluate(total(cost.flops), bindings(sizes, values, 2, 512)) == counted.flops, at
        assert not counted.uncounted, at


@pytest.mark.parametrize(("name", "params", "changes", "lengths"), CASES, ids=str)
def test_every_impl_agrees_with_the_reference_in_float64(
    name: str, params: dict[str, Any], changes: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    method, values, dims = sized(name, params, changes)
    for length in lengths:
        sizes = dims.replace(seq_len=length)
        expected, seen = (results(method, sizes, values, impl) for impl in ("reference", "flex"))
        for wanted, found in zip(expected, seen, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def results(method: Method, sizes: Dims, params: Any, impl: str) -> list[torch.Tensor]:
    """Output, and the gradients of input and weights where the impl trains."""
    torch.manual_seed(0)
    module = method.make(sizes, params, impl, "cpu", torch.float64)
    x = torch.randn(2, sizes.seq_len, sizes.d_model, dtype=torch.float64, requires_grad=True)
    trains = "train" in method.impl("flex").modes
    with uncompiled_flex_attention(), torch.set_grad_enabled(trains):
        y = as_output(module(x)).y
        if not trains:
            return [y]
        y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in (x, *module.parameters()))]


LINES = {
    "causal": [(None, Line(base=1))],
    "a window": [(Line(base=-149), Line(base=1))],
    "a band and a prefix": [(Line(base=-200), Line(base=61)), (None, Line(stride=0, base=130))],
    "groups": [(Line(256, 256), Line(base=1))],
    "shifted groups in a circle": [
        (Line(256, 256, shift=128, base=-128), Line(base=1)), (Line(256, 140, shift=128, base=500), None),
    ],
    "segments": [(Line(100, 100, base=-150), Line(base=1))],
    "cells": [(None, Line(stride=3, base=3))],
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(("queries", "offset"), [(640, 0), (511, 0), (200, 313), (1, 513)])
def test_block_lists_keep_exactly_the_tiles_that_are_seen(name: str, queries: int, offset: int) -> None:
    keys = queries + offset
    lines = tuple(
        flex.Seen(*(place(line, offset, queries, keys) for line in pair), 0, keys) for pair in LINES[name]
    )  # fmt: skip
    mask = flex.block_mask(queries, keys, lines, torch.device("cpu"))
    row, key = torch.arange(queries)[:, None], torch.arange(keys)
    position = row + offset
    visible = torch.zeros(queries, keys, dtype=torch.bool)
    for low, high in LINES[name]:
        first = (
            0 if low is None else (position + low.shift).div(low.step, rounding_mode="floor") * low.stride + low.base
        )
        end = (
            keys
            if high is None
            else (position + high.shift).div(high.step, rounding_mode="floor") * high.stride + high.base
        )
        visible |= (key >= first) & (key < end)
    assert torch.equal(mask.mask_mod(None, None, row, key).expand_as(visible), visible)
    by_tile = [[visible[i : i + 128, j : j + 128] for j in range(0, keys, 128)] for i in range(0, queries, 128)]
    kept = torch.tensor([[bool(tile.any()) for tile in tiles] for tiles in by_tile])
    alone = [
        [any_full(LINES[name], tile, i, j, offset, keys) for j, tile in enumerate(tiles)]
        for i, tiles in enumerate(by_tile)
    ]
    assert torch.equal(mask.to_dense()[0, 0].bool(), kept)
    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, torch.tensor(alone))
    assert not (full & dense(mask.kv_num_blocks, mask.kv_indices)).any()


def any_full(pairs: Any, tile: torch.Tensor, i: int, j: int, offset: int, keys: int) -> bool:
    """Whether one range alone shows a whole tile of keys to all of its queries; a tile cut by the end needs a mask."""
    if tile.shape[1] < 128 or not tile.all():
        return False
    rows = range(i * 128 + offset, i * 128 + offset + tile.shape[0])
    return any(
        all(
            (low is None or low.at(p) <= j * 128) and (high is None or min(high.at(p), keys) >= j * 128 + 128)
            for p in rows
        )
        for low, high in pairs
    )


def dense(counts: Any, indices: Any) -> torch.Tensor:
    """Lists as a table of tiles."""
    table = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        table[row, indices[0, 0, row, :count].long()] = True
    return table


TRAINED: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    *(("bigbird", {"block_size": size, "num_random": 2}, {"causal": False}, 333) for size in (16, 48, 128)),
    *(("transformer_xl", {"segment_len": 128, "mem_len": memory, "start": start}, {"position": "transformer_xl"}, 600)
      for memory, start in ((0, "empty"), (256, "empty"), (256, "zeros"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "changes", "length"), TRAINED, ids=str)
def test_lists_of_rows_and_of_columns_keep_what_the_mask_shows(
    name: str, params: dict[str, Any], changes: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, values, dims = sized(name, params, {**changes, "seq_len": length, "num_layers": 1})
    masks = []

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, *_: Any, **__: Any) -> torch.Tensor:
        masks.append((mask, k.shape[2]))
        return q

    monkeypatch.setattr(flex, "run", noted)
    method.make(dims, values, "flex", "cpu", torch.float32)(torch.zeros(1, length, dims.d_model))
    ((mask, keys),) = masks
    side = mask.BLOCK_SIZE[0]
    head, row, key = torch.meshgrid(*(torch.arange(n) for n in (dims.num_heads, length, keys)), indexing="ij")
    visible = mask.mask_mod(torch.tensor(0), head, row, key)
    by_tile = torch.stack([
        torch.stack([tile.flatten(1).float().mean(1) for tile in rows.split(side, 2)], 1)
        for rows in visible.split(side, 1)
    ], 1)  # fmt: skip
    for of, seen in (("kv", by_tile), ("q", by_tile.mT)):
        partial, full = (
            tabled(*(getattr(mask, f"{kind}{of}_{part}") for part in ("num_blocks", "indices")))
            for kind in ("", "full_")
        )
        assert not (partial & full).any()
        assert torch.equal((partial | full).expand_as(seen), seen > 0)
        assert ((seen == 1) | ~full).all()
        if name == "bigbird":
            assert not partial.any()


def tabled(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Lists of each head as tables of tiles."""
    return torch.stack([dense(counts[:, [h]], indices[:, [h]]) for h in range(counts.shape[1])])


@contextlib.contextmanager
def through_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of torch.compile but its kernels, with a backward pass on the CPU."""
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    flex._compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1, error_on_recompile=True):
        yield
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def test_what_a_score_reads_has_gradients_and_every_shape_a_compilation_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with through_dynamo(monkeypatch):
        for length, position in ((13, "t5"), (140, "t5"), (140, "alibi")):
            term = positions_for(Dims(length, d_model=24, num_heads=3, position=position))[0].double()
            found = []
            for attend in (dense_reference.attend, dense_flex.attend, dense_flex.attend):  # again: nothing recompiles
                torch.manual_seed(0)
                q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
                term.zero_grad()
                attend(q, k, v, True, term).square().sum().backward()
                found.append([x.grad.clone() for x in (q, k, v, *term.parameters())])
            for again in found[1:]:
                for wanted, seen in zip(found[0], again, strict=True):
                    torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "params", "changes", "length"), [TRAINED[0], TRAINED[-1]], ids=str)
def test_layers_train_through_dynamo(
    name: str, params: dict[str, Any], changes: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, values, dims = sized(name, params, {**changes, "seq_len": length, "num_layers": 1})
    x, found = torch.randn(1, length, dims.d_model, dtype=torch.float64), []
    with through_dynamo(monkeypatch):
        for impl in ("reference", "flex"):
            torch.manual_seed(0)
            module = method.make(dims, values, impl, "cpu", torch.float64)
            y = as_output(module(x)).y
            y.square().sum().backward()
            found.append([y.detach(), *(weight.grad for weight in module.parameters())])
    for wanted, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
def test_tiles_of_the_backward_pass_divide_a_block(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for block, width, dtype in itertools.product(
        (16, 48, 64, 96, 320), (32, 64, 128, 256), (torch.bfloat16, torch.float32)
    ):
        (one,) = flex.choices_for(block).get_flex_attention_bwd_configs(width, dtype, "cuda")
        assert not any(block % getattr(one, name) for name in flex.BACKWARD_TILES)
        assert one.block_n1 % one.block_m1 == one.block_m2 % one.block_n2 == 0  # the kernel's own demand


def test_compiled_for_the_cpu_the_block_lists_give_the_same() -> None:
    torch.manual_seed(0)
    T, pattern = 389, Pattern(left=99, right=0, dilation=1, num_global=3, causal=True)
    q, k, v = (torch.randn(1, 2, T, 16) for _ in range(3))
    with torch.no_grad():
        found = attend_window(q, k, v, *of_window(q, k, v), pattern)
    exact = [x.double() for x in (q, k, v)]
    expected = longformer_reference.attend(*exact, *of_window(*exact), pattern)
    assert (found - expected).norm() / expected.norm() < 16 * 2.0**-24


def of_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[GlobalRows, Scattered]:
    """A prefix of three."""
    return GlobalRows(q[:, :, :3], k[:, :, :3], v[:, :, :3], (0, 1, 2)), Scattered(k[:, :, :0], v[:, :, :0], ())


def test_blocks_of_bigbird_are_tiles_and_give_the_same_compiled_for_the_cpu() -> None:
    method = METHODS["bigbird"]
    params, sizes = method.params(block_size=16, num_random=2), Dims(333, d_model=32, num_heads=2, causal=False, d_ff=0)
    pattern = params.pattern(333, 2)
    mask = bigbird_flex.block_mask(pattern, 1, 2, torch.device("cpu"), False)
    for head, rows in enumerate(mask.to_dense()[0].bool()):
        assert [tuple(row.nonzero().flatten().tolist()) for row in rows] == list(pattern.sees(1, head))
    found, x = [], torch.randn(1, 333, 32, generator=torch.Generator().manual_seed(1))
    for impl, dtype in (("reference", torch.float64), ("flex", torch.float32)):
        torch.manual_seed(0)
        module = method.make(sizes, params, impl, "cpu", torch.float32).to(dtype)
        with torch.no_grad():
            found.append(as_output(module(x.to(dtype))).y)
    assert (found[1] - found[0]).norm() / found[0].norm() < 16 * 2.0**-24


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 3, 16)
    with torch._dynamo.config.patch(disable=True), pytest.raises(RuntimeError, match="switched off"):
        dense_flex.attend(q, q, q, True, None)  # type: ignore[arg-type]
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    method = METHODS["dense"]
    answer = method.impl_support(method.impl("flex"), "forward", Dims(seq_len=64), method.params(), "cuda", "bf16")
    assert "unset TORCH_COMPILE_DISABLE" in answer.reason


@pytest.mark.parametrize(
    ("name", "params", "changes", "mode", "device", "reason"),
    [
        ("dense", {}, {}, "train", "cuda", ""),
        ("dense", {}, {}, "forward", "cpu", "runs on cuda"),
        ("dense", {}, {}, "decode", "cuda", "forward, train"),
        ("dense", {}, {"d_model": 16}, "forward", "cuda", "16 to 256 channels, received 8"),
        ("dense", {}, {"position": "transformer_xl"}, "forward", "cuda", "not transformer_xl"),
        ("longformer", {}, {}, "train", "cuda", ""),
        ("longformer", {"dilation": 2}, {}, "forward", "cuda", "received dilation=2"),
        ("longformer", {"scattered": "100"}, {}, "forward", "cuda", "received scattered=100"),
        ("bigbird", {}, {"causal": False}, "forward", "cuda", ""),
        ("bigbird", {}, {"causal": False}, "train", "cuda", ""),
        ("bigbird", {"block_size": 24}, {"causal": False}, "forward", "cuda", "received 24"),
        ("longlora", {}, {"seq_len": 1024}, "train", "cuda", ""),
        ("longlora", {}, {"seq_len": 1000}, "train", "cuda", "received 125"),
        ("pyramid", {}, {"num_layers": 3}, "train", "cuda", ""),
        ("hierarchical", {"disjoint": True}, {}, "train", "cuda", ""),
        ("hierarchical", {"pool": 3}, {}, "train", "cuda", ""),
        ("hierarchical", {"pool": 3, "disjoint": True}, {}, "train", "cuda", "received 3"),
        ("transformer_xl", {}, {"position": "transformer_xl"}, "train", "cuda", ""),
        ("transformer_xl", {"mem_len": 100}, {"position": "transformer_xl"}, "forward", "cuda", "received 100"),
    ],
)
def test_support_says_why_not(
    name: str, params: dict[str, Any], changes: dict[str, Any], mode: str, device: str, reason: str
) -> None:
    method, values, dims = sized(name, params, {"d_model": 64, "seq_len": 4096, **changes})
    answer = method.impl_support(method.impl("flex"), mode, dims, values, device, "bf16")
    assert bool(answer) is not bool(reason), answer.reason
    assert reason in answer.reason
