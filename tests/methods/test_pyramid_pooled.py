"""The pyramid with pooled queries: the first layer of a coarse level attends to the level below, before pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.pyramid import METHOD
from ctxbench.implementations.pyramid.params import PyramidParams
from ctxbench.implementations.pyramid.pooled_pairs import pairs_below
from ctxbench.method import Dims
from ctxbench.testing import LAWS, Case
from ctxbench.testing.behaviour import layout

TINY = Dims(seq_len=19, batch_size=2, d_model=16, num_heads=4, num_layers=3, d_ff=32)
SHAPES = {  # parameters, layers
    "levels3": (PyramidParams(3, 2, pooled_queries=True), 3),
    "uneven": (PyramidParams(3, 2, pooled_queries=True), 5),
    "pool3": (PyramidParams(2, 3, pooled_queries=True), 3),
    "one": (PyramidParams(1, 2, pooled_queries=True), 2),
}
DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
IMPLS = pytest.mark.parametrize("impl", ["reference", "blocked"])
shapes = pytest.mark.parametrize("shape", SHAPES)


def made(impl: str, shape: str, length: int = 19, causal: bool = True, **changes: Any) -> Any:
    params, layers = SHAPES[shape]
    torch.manual_seed(0)
    dims = TINY.replace(seq_len=length, num_layers=layers, causal=causal, **changes)
    return METHOD.make(dims, params, impl, "cpu", torch.float64)


def tokens(length: int, width: int = 16) -> torch.Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The whole by torch's own attention, masks from the definition, and one loop over tokens for what they read."""
    T, pool, causal = x.shape[1], module.pool, module.causal
    layers, outputs = iter(module.layers), []
    cells, below = x, None
    for level, size in enumerate(module.sizes):
        for index in range(size.num_layers):
            cells = one_layer(next(layers), cells, below if index == 0 else None, size, pool, causal)
        outputs.append(cells)
        if level < len(module.down):
            below = module.down[level](cells)
            groups = [group for group in below.split(pool, dim=1) if group.shape[1] == pool or not causal]
            cells = torch.stack([group.mean(dim=1) for group in groups], dim=1)
    if module.fusion is None:
        return outputs[0]
    rows = []
    for i in range(T):
        read = []
        for level in range(1, len(outputs)):
            cell = (i + 1) // pool**level - 1 if causal else i // pool**level
            read.append(outputs[level][:, cell] if cell >= 0 else torch.zeros_like(outputs[level][:, 0]))
        rows.append(outputs[0][:, i] + module.fusion(torch.cat(read, dim=1)))
    return torch.stack(rows, dim=1)


def one_layer(
    layer: Any, x: torch.Tensor, below: torch.Tensor | None, size: Dims, pool: int, causal: bool
) -> torch.Tensor:
    oracle = torch.nn.MultiheadAttention(size.d_model, size.num_heads, batch_first=True, dtype=torch.float64)
    mixer = layer.mixer
    oracle.load_state_dict(
        {
            "in_proj_weight": torch.cat((mixer.q.weight, mixer.k.weight, mixer.v.weight)),
            "in_proj_bias": torch.cat((mixer.q.bias, mixer.k.bias, mixer.v.bias)),
            "out_proj.weight": mixer.o.weight,
            "out_proj.bias": mixer.o.bias,
        }
    )
    keys, each = (x, 1) if below is None else (below, pool)
    hidden = [[causal and j >= (c + 1) * each for j in range(keys.shape[1])] for c in range(x.shape[1])]
    query, seen = layer.norm_mixer(x), layer.norm_mixer(keys)
    x = x + oracle(query, seen, seen, attn_mask=torch.tensor(hidden), need_weights=False)[0]
    return x + layer.ffn(layer.norm_ffn(x))


@DIRECTIONS
@IMPLS
@shapes
def test_module_equals_torch_attention_over_the_level_below(shape: str, impl: str, causal: bool) -> None:
    for length in (12, 17):
        module, x = made(impl, shape, length, causal), tokens(length)
        with torch.no_grad():
            torch.testing.assert_close(module(x).y, written_out(module, x), rtol=0, atol=1e-12)


@DIRECTIONS
@shapes
def test_blocked_equals_reference_with_all_gradients(shape: str, causal: bool) -> None:
    for length in (1, 3, 8, 300):  # without a cell, and over several slabs
        results = []
        for impl in ("reference", "blocked"):
            module, x = made(impl, shape, length, causal), tokens(length).requires_grad_()
            y = module(x).y
            (y * tokens(length).cos()).sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
            results.append((y, x.grad, *gradients))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@IMPLS
@shapes
def test_no_output_depends_on_a_later_token(shape: str, impl: str) -> None:
    module, x = made(impl, shape), tokens(19)
    with torch.no_grad():
        y = module(x).y
        for t in range(19):
            moved = x.clone()
            moved[:, t] += 1.0
            changed = module(moved).y
            torch.testing.assert_close(changed[:, :t], y[:, :t], rtol=0, atol=1e-14)
            assert not torch.equal(changed[:, t], y[:, t])


@IMPLS
@shapes
@pytest.mark.parametrize("position", ["none", "rope"])
def test_any_chunking_equals_the_whole(shape: str, impl: str, position: str) -> None:
    module, x = made(impl, shape, 41, position=position, num_heads=2), tokens(41)
    with torch.no_grad():
        whole = module(x).y
        for sizes in ([1] * 41, [3, 9, 1, 28], [20, 21]):
            state, pieces, seen = module.init_state(2), [], 0
            for chunk in x.split(sizes, dim=1):
                y, state = module(chunk, state)
                pieces.append(y)
                seen += chunk.shape[1]
                assert layout(state) == layout(module.state_at(2, seen))
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)


def test_a_rotated_query_stands_at_the_last_token_of_its_cell() -> None:
    """Cells of equal content: the score of cell c and finer cell j turns by the tokens between their last ones."""
    module = made("reference", "pool3", 12, position="rope", num_heads=1)
    mixer, seen = module.layers[2].mixer, []
    mixer.attend = lambda q, k, v, start, pool, causal: seen.append((q, k)) or q
    mixer(torch.ones(1, 4, 8).double(), None, torch.ones(1, 12, 8).double())
    (q, k) = seen[0]
    scores = q[0, 0] @ k[0, 0].T
    for c, j, other, finer in ((0, 2, 1, 5), (1, 0, 2, 3), (3, 4, 2, 1)):
        torch.testing.assert_close(scores[c, j], scores[other, finer], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", [2, 3])
@DIRECTIONS
def test_pairs_equal_a_count_one_by_one(pool: int, causal: bool) -> None:
    params = PyramidParams(3, pool, pooled_queries=True)
    for length in (1, 2, 5, 12, 41):
        counts = [-(-length // pool**level) if not causal else length // pool**level for level in range(3)]
        values = bindings(Dims(seq_len=length, causal=causal), params, 4, 512)
        for level in (1, 2):
            rows = [
                min(counts[level - 1], (c + 1) * pool) if causal else counts[level - 1] for c in range(counts[level])
            ]
            assert evaluate(pairs_below(None, level, "forward", causal, params), values) == sum(rows)


@DIRECTIONS
@IMPLS
@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("shape", ["levels3", "pool3", "one"])
def test_formulas_equal_the_trace(shape: str, mode: str, impl: str, causal: bool) -> None:
    params, layers = SHAPES[shape]
    dims = TINY.replace(num_layers=layers, causal=causal)
    if not METHOD.mode_support(mode, dims, params):
        assert not causal
        return
    cost = METHOD.cost_of(impl, mode, causal, "none", params)
    for length in (1, 8, 1031) if mode != "train" else (1, 2, 5, 37):  # below the pool a coarse level has no cell
        traced = trace(METHOD, dims.replace(seq_len=length), params, impl, mode)
        values = bindings(dims.replace(seq_len=length), params, 4, 512)
        assert evaluate(total(cost.flops), values) == traced.flops
        assert evaluate(cost.num_parameters, values) == traced.num_parameters
        if traced.state_bytes is not None:
            assert evaluate(cost.state_bytes, values) == traced.state_bytes


@pytest.mark.parametrize("law", ["gradcheck", "purity", "receptive_field", "two_training_steps", "agreement"])
def test_the_kit_holds(law: str) -> None:
    params, layers = SHAPES["levels3"]
    finding = LAWS[law](Case(METHOD, "blocked", params, TINY.replace(num_layers=layers), METHOD.modes))
    assert finding.status == "held", finding.message


def test_memory_stays_linear_and_work_quadratic() -> None:
    params = PyramidParams(pooled_queries=True)
    assert big_o(total(METHOD.cost_of("blocked", "forward", True, "none", params).flops)) == "O(T^2)"
    dims = Dims(seq_len=2048, d_model=64, num_layers=3, d_ff=0)
    peaks = [trace(METHOD, dims.replace(seq_len=n), params, "blocked", "train").peak_bytes for n in (2048, 8192)]
    assert peaks[1] < 4.2 * peaks[0]


def test_the_sketch_has_no_pooled_queries() -> None:
    params, layers = SHAPES["levels3"]
    answer = METHOD.impl_support(
        METHOD.impl("as_written"), "forward", TINY.replace(num_layers=layers), params, "cpu", "fp32"
    )
    assert "pools before a level" in answer.reason
