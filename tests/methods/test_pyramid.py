"""The pyramid: layers against torch's own, the whole against explicit loops, the shift, the stream, the sketch."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from ctxbench.cost import big_o, evaluate, symbols, total
from ctxbench.cost.trace import trace
from ctxbench.implementations.dense import METHOD as DENSE
from ctxbench.implementations.pyramid import METHOD
from ctxbench.implementations.pyramid.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.pyramid.layer import Pyramid
from ctxbench.implementations.pyramid.params import PyramidParams, level_dims
from ctxbench.implementations.pyramid.reference import OPERATORS as REFERENCE
from ctxbench.method import Dims

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "pyramid.npz"))
TINY = Dims(seq_len=19, batch_size=2, d_model=16, num_heads=4, num_layers=3, d_ff=32)
SHAPES = {  # levels, pool, layers
    "levels3": (3, 2, 3),
    "uneven": (3, 2, 5),
    "pool3": (2, 3, 3),
    "one": (1, 2, 2),
    "deep": (4, 2, 4),
}
DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
CELLS = pytest.mark.parametrize(
    ("impl", "mode", "causal"),
    [
        pytest.param(impl.name, mode, causal, id=f"{impl.name}-{mode}-{'causal' if causal else 'bidirectional'}")
        for impl in METHOD.impls
        for mode in impl.modes or METHOD.modes
        for causal in (True, False)
        if causal or mode in ("forward", "train")
    ],
)
IMPLS = pytest.mark.parametrize("impl", ["reference", "blocked"])


def made(impl: str, dims: Dims, params: PyramidParams) -> Any:
    """A module in float64 whose parameters are all far from 0 and 1; the same weights for every impl."""
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def tokens(dims: Dims, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(dims.batch_size, length or dims.seq_len, dims.d_model, generator=generator, dtype=torch.float64)


def looped(module: Pyramid, x: torch.Tensor) -> torch.Tensor:
    """The pyramid of one sample, ``[T, d]``, one query, one cell and one token at a time."""
    T, pool, causal = x.shape[0], module.pool, module.causal
    layers = iter(module.layers)
    outputs, cells = [], x
    for level, size in enumerate(module.sizes):
        for _ in range(size.num_layers):
            cells = _looped_layer(next(layers), cells, size.num_heads, causal)
        outputs.append(cells)
        if level < len(module.down):
            groups = [cells[first : first + pool] for first in range(0, cells.shape[0], pool)]
            means = [sum(group) / len(group) for group in groups if len(group) == pool or not causal]
            means_or_none = torch.stack(means) if means else cells.new_zeros(0, cells.shape[1])
            down = module.down[level]
            cells = means_or_none @ down.weight.T + down.bias
    if module.fusion is None:
        return outputs[0]
    rows = []
    for i in range(T):
        read = []
        for level in range(1, len(outputs)):
            cell = math.floor((i + 1) / pool**level) - 1 if causal else i // pool**level
            read.append(outputs[level][cell] if cell >= 0 else x.new_zeros(outputs[level].shape[1]))
        rows.append(outputs[0][i] + module.fusion.weight @ torch.cat(read) + module.fusion.bias)
    return torch.stack(rows)


def _looped_layer(layer: Any, x: torch.Tensor, num_heads: int, causal: bool) -> torch.Tensor:
    normed = layer_norm(x, x.shape[1:], layer.norm_mixer.weight, layer.norm_mixer.bias)
    q, k, v = (linear(normed, each.weight, each.bias) for each in (layer.mixer.q, layer.mixer.k, layer.mixer.v))
    width = x.shape[1] // num_heads
    mixed = torch.zeros_like(x)
    for head, i in itertools.product(range(num_heads), range(x.shape[0])):
        part = slice(head * width, (head + 1) * width)
        seen = i + 1 if causal else x.shape[0]
        weights = torch.stack([q[i, part] @ k[j, part] / math.sqrt(width) for j in range(seen)]).softmax(dim=0)
        mixed[i, part] = weights @ v[:seen, part]
    x = x + linear(mixed, layer.mixer.o.weight, layer.mixer.o.bias)
    normed = layer_norm(x, x.shape[1:], layer.norm_ffn.weight, layer.norm_ffn.bias)
    return x + layer.ffn.down(gelu(layer.ffn.up(normed)))


@DIRECTIONS
@IMPLS
@pytest.mark.parametrize("shape", SHAPES)
def test_module_equals_loops_over_tokens_and_cells(impl: str, causal: bool, shape: str) -> None:
    levels, pool, layers = SHAPES[shape]
    for length in (1, 2, 7, 9):
        dims = TINY.replace(seq_len=length, batch_size=1, num_layers=layers, causal=causal)
        module, x = made(impl, dims, PyramidParams(levels, pool)), tokens(dims)
        with torch.no_grad():
            torch.testing.assert_close(module(x).y[0], looped(module, x[0]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "blocked", "native"])
@pytest.mark.parametrize(("case", "levels", "pool"), [("two", 2, 2), ("three", 3, 2), ("pool3", 2, 3)])
def test_causal_cells_are_those_of_the_hourglass_package(case: str, levels: int, pool: int, impl: str) -> None:
    """Pooling, shift and repetition between layers that pass their input on: golden/pyramid.py."""
    golden = {
        key.partition("/")[2]: torch.from_numpy(array) for key, array in GOLDEN.items() if key.startswith(f"{case}/")
    }
    dims = Dims(19, batch_size=2, d_model=16, num_heads=4, num_layers=levels, d_ff=0, causal=True)
    module = made(impl, dims, PyramidParams(levels, pool))
    with torch.no_grad():
        for layer in module.layers:
            for parameter in layer.mixer.o.parameters():
                parameter.zero_()
        for level, down in enumerate(module.down):
            down.weight.copy_(golden[f"down.{level}"])
            down.bias.zero_()
        module.fusion.weight.copy_(golden["fusion"])
        module.fusion.bias.zero_()
    x = golden["x"].clone().requires_grad_(impl != "native")  # native computes values; its gradients are blocked's
    with torch.set_grad_enabled(impl != "native"):
        y = module(x).y
    torch.testing.assert_close(y.detach(), golden["y"], rtol=1e-12, atol=1e-12)
    if impl != "native":
        y.backward(golden["gradient"])
        torch.testing.assert_close(x.grad, golden["gradient_x"], rtol=1e-12, atol=1e-12)


@DIRECTIONS
@IMPLS
def test_layers_of_every_level_equal_torch_encoder_layer(impl: str, causal: bool) -> None:
    dims = TINY.replace(causal=causal)
    module = made(impl, dims, PyramidParams())
    for layer, size in zip(module.layers, module.sizes, strict=True):
        oracle = torch.nn.TransformerEncoderLayer(
            size.d_model, size.num_heads, size.d_ff, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True, dtype=torch.float64,
        )  # fmt: skip
        mixer = layer.mixer
        weights = {
            "self_attn.in_proj_weight": torch.cat((mixer.q.weight, mixer.k.weight, mixer.v.weight)),
            "self_attn.in_proj_bias": torch.cat((mixer.q.bias, mixer.k.bias, mixer.v.bias)),
            **{f"self_attn.out_proj.{name}": tensor for name, tensor in mixer.o.named_parameters()},
            **{f"linear1.{name}": tensor for name, tensor in layer.ffn.up.named_parameters()},
            **{f"linear2.{name}": tensor for name, tensor in layer.ffn.down.named_parameters()},
            **{f"norm1.{name}": tensor for name, tensor in layer.norm_mixer.named_parameters()},
            **{f"norm2.{name}": tensor for name, tensor in layer.norm_ffn.named_parameters()},
        }
        oracle.load_state_dict(weights)
        x = tokens(dims.replace(d_model=size.d_model))
        hidden = torch.ones(19, 19, dtype=torch.bool).triu(1) if causal else None
        torch.testing.assert_close(layer(x).y, oracle(x, src_mask=hidden), rtol=1e-12, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_equals_reference_with_all_gradients(causal: bool, shape: str) -> None:
    levels, pool, layers = SHAPES[shape]
    for length in (1, 3, 8, 37):
        dims = TINY.replace(seq_len=length, num_layers=layers, causal=causal)
        results = []
        for impl in ("reference", "blocked"):
            module, x = made(impl, dims, PyramidParams(levels, pool)), tokens(dims).requires_grad_()
            y = module(x).y
            (y * tokens(dims).cos()).sum().backward()
            results.append((y, x.grad, *(parameter.grad for parameter in module.parameters())))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@IMPLS
@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_depends_on_a_later_token(impl: str, shape: str) -> None:
    levels, pool, layers = SHAPES[shape]
    dims = TINY.replace(num_layers=layers)
    module, x = made(impl, dims, PyramidParams(levels, pool)), tokens(dims)
    with torch.no_grad():
        y = module(x).y
        for t in range(dims.seq_len):
            moved = x.clone()
            moved[:, t] += 1.0
            changed = module(moved).y
            assert torch.equal(changed[:, :t], y[:, :t])
            assert not torch.equal(changed[:, t], y[:, t])


@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
@pytest.mark.parametrize("pool", [2, 3, 5])
def test_causal_token_reads_the_last_cell_complete_with_it(operators: Any, pool: int) -> None:
    levels, d = 3, 4
    for start, length in itertools.product((0, 1, 4, 9, 17), (1, 2, 7, 40)):
        fine = torch.zeros(1, length, d, dtype=torch.float64)
        coarse = []
        for level in range(1, levels):  # the value of a cell is 1 + its number; 0 stands for no cell
            first, after = start // pool**level, (start + length) // pool**level
            coarse.append(torch.arange(first, after + 1, dtype=torch.float64).reshape(1, -1, 1))
        weight = torch.zeros(d, levels - 1, dtype=torch.float64)
        weight[0, 0] = weight[1, 1] = 1.0
        y = operators.fuse(fine, coarse, start, pool, True, weight, torch.zeros(d, dtype=torch.float64))
        for level in range(1, levels):
            expected = [math.floor((i + 1) / pool**level) for i in range(start, start + length)]
            assert y[0, :, level - 1].tolist() == expected


@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_bidirectional_token_reads_its_own_cell(operators: Any) -> None:
    pool, length = 2, 11
    coarse = [torch.arange(-(-length // pool**level)).double().reshape(1, -1, 1) for level in (1, 2)]
    fine, weight = torch.zeros(1, length, 2).double(), torch.eye(2).double()
    y = operators.fuse(fine, coarse, 0, pool, False, weight, torch.zeros(2).double())
    assert y[0].tolist() == [[i // 2, i // 4] for i in range(length)]


def test_ragged_tail_is_the_mean_of_what_it_has() -> None:
    module = made("reference", TINY.replace(causal=False), PyramidParams(2, 4))
    cells = torch.arange(6.0).double().reshape(1, 6, 1)
    _, pooled, _ = module._coarsen(cells, None, 0)
    assert pooled.flatten().tolist() == [1.5, 4.5]


@IMPLS
@pytest.mark.parametrize("shape", SHAPES)
def test_any_chunking_equals_the_whole(impl: str, shape: str) -> None:
    levels, pool, layers = SHAPES[shape]
    dims = TINY.replace(seq_len=41, num_layers=layers)
    module, x = made(impl, dims, PyramidParams(levels, pool)), tokens(dims)
    draw = random.Random(11)
    with torch.no_grad():
        whole = module(x).y
        for most in (1, 3, 9, 30, 41):
            state, pieces, seen = module.init_state(dims.batch_size), [], 0
            while seen < dims.seq_len:
                size = draw.randint(1, most)
                y, state = module(x[:, seen : seen + size], state)
                seen = min(seen + size, dims.seq_len)
                pieces.append(y)
                assert _shapes(state) == _shapes(module.state_at(dims.batch_size, seen))
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)


def test_a_state_moves_between_impls() -> None:
    reference, blocked = (made(impl, TINY, PyramidParams()) for impl in ("reference", "blocked"))
    x = tokens(TINY)
    with torch.no_grad():
        _, state = reference(x[:, :13], reference.init_state(TINY.batch_size))
        torch.testing.assert_close(blocked(x[:, 13:], state).y, reference(x).y[:, 13:], rtol=1e-11, atol=1e-11)


def _shapes(state: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(state) if leaf is not None]


@pytest.mark.parametrize(("num_layers", "shares"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (7, [3, 2, 2])])
def test_no_layer_is_dropped(num_layers: int, shares: list[int]) -> None:
    dims = TINY.replace(num_layers=num_layers)
    assert [size.num_layers for size in level_dims(dims, PyramidParams())] == shares
    assert len(made("blocked", dims, PyramidParams()).layers) == num_layers


def test_heads_keep_their_width_while_they_last() -> None:
    sizes = level_dims(Dims(seq_len=1, d_model=256, num_heads=4, num_layers=4), PyramidParams(levels=4))
    assert [(size.num_heads, size.head_dim) for size in sizes] == [(4, 64), (2, 64), (1, 64), (1, 32)]


@pytest.mark.parametrize(
    ("changes", "levels", "mode", "reason"),
    [
        ({"d_model": 20, "num_heads": 2, "num_layers": 4}, 4, "forward", "d_model to be a multiple of 8, received 20"),
        ({"d_ff": 30}, 3, "forward", "d_ff to be a multiple of 4, received 30"),
        ({"d_model": 30, "num_heads": 5}, 2, "forward", "width of 15 into 2 heads"),
        ({"num_layers": 2}, 3, "forward", "at least 3 layers"),
        ({"causal": False}, 3, "stream", "cannot be continued"),
        ({"causal": False}, 3, "decode", "cannot be continued"),
    ],
    ids=["width", "hidden", "heads", "layers", "stream", "decode"],
)
def test_impossible_sizes_are_refused_with_the_reason(
    changes: dict[str, Any], levels: int, mode: str, reason: str
) -> None:
    answer = METHOD.mode_support(mode, TINY.replace(**changes), PyramidParams(levels))
    assert not answer
    assert reason in answer.reason


def values(dims: Dims, params: PyramidParams) -> dict[str, Any]:
    return symbols.bindings(dims, params, 4, METHOD.segment_len(params))


def traced_equal_formulas(impl: str, mode: str, dims: Dims, params: PyramidParams) -> None:
    traced, cost = trace(METHOD, dims, params, impl, mode), METHOD.cost_of(impl, mode, dims.causal, "none", params)
    here = values(dims, params)
    assert evaluate(total(cost.flops), here) == traced.flops
    assert evaluate(cost.num_parameters, here) == traced.num_parameters
    assert not traced.uncounted
    if traced.state_bytes is not None:
        assert evaluate(cost.state_bytes, here) == traced.state_bytes


@CELLS
@pytest.mark.parametrize("shape", ["levels3", "uneven", "pool3", "one"])
def test_formulas_equal_the_trace(impl: str, mode: str, causal: bool, shape: str) -> None:
    levels, pool, layers = SHAPES[shape]
    params = PyramidParams(levels, pool)
    for length, batch in ((1, 2), (13, 2), (1031, 1)):
        dims = TINY.replace(seq_len=length, batch_size=batch, num_layers=layers, causal=causal)
        if METHOD.impl_support(METHOD.impl(impl), mode, dims, params, "cpu", "fp32"):
            traced_equal_formulas(impl, mode, dims, params)


@CELLS
def test_formulas_equal_the_trace_at_128k(request: pytest.FixtureRequest, impl: str, mode: str, causal: bool) -> None:
    if impl == "triton":
        request.getfixturevalue("for_triton")
    length = 131072 if mode != "stream" else 8191
    traced_equal_formulas(impl, mode, TINY.replace(seq_len=length, causal=causal), PyramidParams())


@CELLS
def test_peak_is_within_three_percent_of_the_trace(impl: str, mode: str, causal: bool) -> None:
    if impl == "flex":  # declares none, as the README says
        assert METHOD.cost_of(impl, mode, causal, "none", PyramidParams()).peak_bytes is None
        return
    for levels, length, batch, hidden in ((3, 4096, 1, 512), (2, 5003, 2, 0), (1, 4097, 1, 512)):
        dims = Dims(length, batch, 128, 4, num_layers=levels + 1, d_ff=hidden, causal=causal)
        params = PyramidParams(levels)
        formula = evaluate(METHOD.cost_of(impl, mode, causal, "none", params).peak_bytes, values(dims, params))
        assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)


def test_totals_differ_from_the_repaired_sketch_by_the_projection_of_level_0() -> None:
    """The sketch with attention over tokens, as published: 141,532,594,176 FLOPs and 8,904,320 parameters."""
    dims, params = Dims(4096, 1, 512, 8, 6, 2048, causal=False), PyramidParams()
    ours = METHOD.cost_of("reference", "forward", False, "none", params)
    sketch = METHOD.cost_of("as_written", "forward", False, "none", params)
    here, projection = values(dims, params), 512 * 512
    assert evaluate(total(ours.flops), here) + 2 * 4096 * projection == 141_532_594_176
    assert evaluate(ours.num_parameters, here) + projection == 8_904_320
    assert evaluate(sketch.num_parameters, here) == 8_904_320


def test_three_levels_cost_73_of_192_of_flat_layers_and_stay_quadratic() -> None:
    dims, params = Dims(2**17, 1, 256, 4, 3, 1024, causal=False), PyramidParams()
    pyramid = METHOD.cost_of("blocked", "forward", False, "none", params)
    dense = DENSE.cost_of("blocked", "forward", False, "none", DENSE.params())
    layers = total({term: pyramid.algorithmic[term] for term in ("projections", "attention", "ffn")})
    here = values(dims, params)
    assert 192 * evaluate(layers, here) == 73 * evaluate(total(dense.algorithmic), here)
    assert big_o(total(pyramid.flops)) == "O(T^2)"


def sketch(dims: Dims, params: PyramidParams) -> Any:
    torch.manual_seed(2)
    return METHOD.make(dims, params, "as_written", "cpu", torch.float64).eval()


def touched(module: Any, x: torch.Tensor, sample: int, token: int) -> torch.Tensor:
    """Which outputs ``[B, T]`` move with one token of one sample."""
    moved = x.clone()
    moved[sample, token] += 1.0
    with torch.no_grad():
        return (module(moved) - module(x)).abs().amax(dim=2) > 1e-12


def test_sketch_lets_samples_of_a_batch_attend_to_each_other() -> None:
    dims = TINY.replace(causal=False, d_model=32, seq_len=16)
    assert touched(sketch(dims, PyramidParams()), tokens(dims), sample=1, token=5)[0].any()


def test_sketch_never_attends_to_another_token() -> None:
    dims = TINY.replace(causal=False, d_model=32, seq_len=64, batch_size=1)
    module, x = sketch(dims, PyramidParams()), tokens(dims)
    assert touched(sketch(dims, PyramidParams(levels=1)), x, 0, 21)[0].nonzero().flatten().tolist() == [21]
    moved = touched(module, x, 0, 21)[0].nonzero().flatten()
    assert moved.min() < 21, "pooling and interpolation reach backwards"
    assert moved.max() - moved.min() < 12, "and only a few cells far"


def test_sketch_stretches_coarse_cells_and_drops_the_tail() -> None:
    dims = TINY.replace(causal=False, d_model=32, seq_len=11, batch_size=1)
    module, x = sketch(dims, PyramidParams(levels=2)), tokens(dims)
    assert touched(module, x, 0, 10)[0].nonzero().flatten().tolist() == [10], "the odd last token is never pooled"
    reached = {int(i) for i in touched(module, x, 0, 8)[0].nonzero()}
    assert 10 in reached, "a cell of tokens 8 and 9 is stretched beyond them"


def test_sketch_drops_layers_that_do_not_divide() -> None:
    dims = TINY.replace(num_layers=7)
    assert sum(len(layers) for layers in sketch(dims, PyramidParams()).levels) == 6


def test_sketch_shrinks_its_heads_and_refuses_what_they_cannot_share() -> None:
    dims = TINY.replace(seq_len=16)
    assert [layers[0].attention.head_dim for layers in sketch(dims, PyramidParams()).levels] == [4, 2, 1]
    answer = METHOD.impl_support(
        METHOD.impl("as_written"), "forward", dims.replace(num_heads=8), PyramidParams(), "cpu", "fp32"
    )
    assert not answer
    assert "8 heads at the coarsest width of 4" in answer.reason


def test_sketch_refuses_fewer_tokens_than_a_coarsest_cell() -> None:
    answer = METHOD.impl_support(
        METHOD.impl("as_written"), "forward", TINY.replace(seq_len=3), PyramidParams(), "cpu", "fp32"
    )
    assert not answer
    assert "at least 4 tokens, received 3" in answer.reason
