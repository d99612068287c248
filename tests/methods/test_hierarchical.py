"""Hierarchical attention: loops over tokens and cells, torch's own layers, the published compressed branch, the stream,
the formulas against the source document's own totals, and the sketch's defects."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import conv_transpose1d, gelu, layer_norm, linear, scaled_dot_product_attention

from ctxbench.cost import big_o, evaluate, symbols, total
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations.hierarchical import METHOD
from ctxbench.implementations.hierarchical.as_written import SketchAttention
from ctxbench.implementations.hierarchical.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.hierarchical.cost import _visible
from ctxbench.implementations.hierarchical.layer import averaged
from ctxbench.implementations.hierarchical.params import HierarchicalParams, Scale
from ctxbench.implementations.hierarchical.reference import OPERATORS as REFERENCE
from ctxbench.method import Dims
from ctxbench.testing import LAWS, Case
from ctxbench.workload import prepare, state_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Dims(seq_len=29, batch_size=2, d_model=16, num_heads=4, num_layers=2, d_ff=32)
FORMS = {
    "full": HierarchicalParams(window=8),
    "full-pool3": HierarchicalParams(window=5, pool=3),
    "window-alone": HierarchicalParams(window=5, levels=1),
    "linear": HierarchicalParams(form="causal_linear", window=6, cells=2, pool=2),
    "linear-least": HierarchicalParams(form="causal_linear", window=1, cells=1, pool=3, levels=2),
    "seed": HierarchicalParams(form="seed", pool=2),
    "seed-pool3": HierarchicalParams(form="seed", pool=3, levels=2),
    "seed-alone": HierarchicalParams(form="seed", levels=1),
}
CAUSAL = [name for name, params in FORMS.items() if params.form != "seed"]
IMPLS = pytest.mark.parametrize("impl", ["reference", "blocked"])


def sizes(form: str, **changes: Any) -> Dims:
    return TINY.replace(causal=form in CAUSAL, **changes)


def made(impl: str, dims: Dims, params: HierarchicalParams) -> Any:
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


def looped_causal(mixer: Any, x: torch.Tensor, params: HierarchicalParams) -> torch.Tensor:
    """One sample ``[T, d]``: every token collects what it sees, one token and one cell after the other."""
    T, d = x.shape
    q, k, v = (linear(x, each.weight, each.bias) for each in (mixer.q, mixer.k, mixer.v))
    width = d // mixer.num_heads
    mixed = torch.zeros_like(x)
    for head, i in itertools.product(range(mixer.num_heads), range(T)):
        part = slice(head * width, (head + 1) * width)
        logits, values = [], []
        for level in range(params.levels):
            span = params.pool**level
            complete = [c for c in range(T) if (c + 1) * span <= i + 1]
            if level == 0:
                complete = complete[-params.window :]
            elif params.form == "causal_linear":
                complete = complete[-params.cells :]
            for c in complete:
                inside = range(c * span, (c + 1) * span)
                key = sum(k[j, part] for j in inside) / span
                logits.append(q[i, part] @ key / math.sqrt(width) + math.log(span))
                values.append(sum(v[j, part] for j in inside) / span)
        mixed[i, part] = torch.stack(logits).softmax(dim=0) @ torch.stack(values)
    return linear(mixed, mixer.o.weight, mixer.o.bias)


def torch_seed(mixer: Any, x: torch.Tensor, params: HierarchicalParams) -> torch.Tensor:
    """A batch ``[B, T, d]`` by torch's own attention module and transposed convolution."""
    T, d = x.shape[1:]
    columns = []
    for level, branch in enumerate(mixer.branches):
        span = params.pool**level
        groups = [x[:, first : first + span].mean(dim=1) for first in range(0, T, span)]
        cells = torch.stack(groups, dim=1)
        oracle = torch.nn.MultiheadAttention(d, branch.num_heads, batch_first=True, dtype=x.dtype)
        oracle.load_state_dict(
            {
                "in_proj_weight": torch.cat((branch.q.weight, branch.k.weight, branch.v.weight)),
                "in_proj_bias": torch.cat((branch.q.bias, branch.k.bias, branch.v.bias)),
                "out_proj.weight": branch.o.weight,
                "out_proj.bias": branch.o.bias,
            }
        )
        found, _ = oracle(cells, cells, cells)
        if level:
            up = mixer.up[level - 1]
            found = conv_transpose1d(found.transpose(1, 2), up.weight, up.bias, stride=span).transpose(1, 2)[:, :T]
        columns.append(found)
    return linear(torch.cat(columns, dim=2), mixer.fusion.weight, mixer.fusion.bias)


def expected_output(module: Any, x: torch.Tensor, params: HierarchicalParams) -> torch.Tensor:
    """The whole stack around the mixers written out above."""
    for layer in module.layers:
        normed = layer_norm(x, x.shape[2:], layer.norm_mixer.weight, layer.norm_mixer.bias)
        if params.form == "seed":
            mixed = torch_seed(layer.mixer, normed, params)
        else:
            mixed = torch.stack([looped_causal(layer.mixer, sample, params) for sample in normed])
        x = x + mixed
        normed = layer_norm(x, x.shape[2:], layer.norm_ffn.weight, layer.norm_ffn.bias)
        x = x + layer.ffn.down(gelu(layer.ffn.up(normed)))
    return x


@IMPLS
@pytest.mark.parametrize("form", FORMS)
def test_module_equals_loops_or_torch_layers(impl: str, form: str) -> None:
    for length in (1, 2, 7, 19):
        dims = sizes(form, seq_len=length, num_layers=1, d_model=8, num_heads=2)
        module, x = made(impl, dims, FORMS[form]), tokens(dims)
        with torch.no_grad():
            torch.testing.assert_close(module(x).y, expected_output(module, x, FORMS[form]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_blocked_equals_reference_with_all_gradients(form: str) -> None:
    for length in (1, 3, 8, 150, 300):  # within a slab, and over several
        dims = sizes(form, seq_len=length, d_model=8, num_heads=2)
        results = []
        for impl in ("reference", "blocked"):
            module, x = made(impl, dims, FORMS[form]), tokens(dims).requires_grad_()
            y = module(x).y
            (y * tokens(dims).cos()).sum().backward()
            results.append((y, x.grad, *(parameter.grad for parameter in module.parameters())))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_coarse_part_equals_the_published_compressed_branch(operators: Any) -> None:
    """Attention over cells alone and its log-sum-exp come from the oracle; torch's attention over a window joins in."""
    golden = np.load(GOLDEN / "hierarchical.npz")
    q, cells, kv, found, lse = (torch.from_numpy(golden[name]) for name in ("q", "cells", "kv", "found", "lse"))
    span, window, (T, D) = int(golden["span"]), 3, q.shape[2:]
    near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    local = scaled_dot_product_attention(q, *kv, attn_mask=near)
    scores = (q @ kv[0].transpose(2, 3) * D**-0.5).masked_fill(~near, float("-inf"))
    share = torch.sigmoid(lse + math.log(span) - scores.logsumexp(dim=3)).unsqueeze(3)
    expected = share * found + (1 - share) * local
    mixed = operators.attend(q, [kv, cells], [Scale(1, window), Scale(span, None)], 0)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


@IMPLS
def test_a_cell_of_equal_keys_weighs_like_its_tokens(impl: str) -> None:
    operators, span, T, D = {"reference": REFERENCE, "blocked": BLOCKED}[impl], 4, 24, 4
    generator = torch.Generator().manual_seed(1)
    cells = torch.randn(2, 1, 1, T // span, D, generator=generator, dtype=torch.float64)
    kv, q = cells.repeat_interleave(span, dim=3), torch.randn(1, 1, T, D, generator=generator, dtype=torch.float64)
    mixed = operators.attend(q, [kv, cells], [Scale(1, 1), Scale(span, None)], 0)
    for i in range(T):
        seen = [i, *range((i + 1) // span * span)]  # itself, and every token of every complete cell
        weights = (q[0, 0, i] @ kv[0, 0, 0, seen].T * D**-0.5).softmax(dim=0)
        torch.testing.assert_close(mixed[0, 0, i], weights @ kv[1, 0, 0, seen], rtol=1e-12, atol=1e-12)


@IMPLS
@pytest.mark.parametrize("form", CAUSAL)
def test_no_output_depends_on_a_later_token(impl: str, form: str) -> None:
    dims = sizes(form)
    module, x = made(impl, dims, FORMS[form]), tokens(dims)
    with torch.no_grad():
        y = module(x).y
        for t in range(dims.seq_len):
            moved = x.clone()
            moved[:, t:] += torch.randn(moved[:, t:].shape, generator=torch.Generator().manual_seed(t)).double()
            changed = module(moved).y
            torch.testing.assert_close(changed[:, :t], y[:, :t], rtol=0, atol=1e-13)
            assert not torch.allclose(changed[:, t], y[:, t])


@IMPLS
@pytest.mark.parametrize("form", CAUSAL)
def test_a_prefix_gives_the_prefix_of_the_outputs(impl: str, form: str) -> None:
    dims = sizes(form)
    module, x = made(impl, dims, FORMS[form]), tokens(dims)
    with torch.no_grad():
        whole = module(x).y
        for length in range(1, dims.seq_len):
            torch.testing.assert_close(module(x[:, :length]).y, whole[:, :length], rtol=1e-12, atol=1e-12)


@IMPLS
@pytest.mark.parametrize("form", CAUSAL)
def test_any_chunking_equals_the_whole(impl: str, form: str) -> None:
    dims = sizes(form, seq_len=150, d_model=8, num_heads=2, num_layers=1)
    module, x = made(impl, dims, FORMS[form]), tokens(dims)
    draw = random.Random(11)
    formula = METHOD.cost_of(impl, "stream", True, "none", FORMS[form]).state_bytes
    with torch.no_grad():
        whole = module(x).y
        for most in (19, 140):
            state, pieces, seen = module.init_state(dims.batch_size), [], 0
            while seen < dims.seq_len:
                y, state = module(x[:, seen : seen + draw.randint(1, most)], state)
                seen += y.shape[1]
                pieces.append(y)
                expected = evaluate(formula, values(dims.replace(seq_len=seen), FORMS[form], itemsize=8))
                assert state_bytes(state) == expected
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)


def test_a_state_moves_between_impls() -> None:
    reference, blocked = (made(impl, TINY, FORMS["full"]) for impl in ("reference", "blocked"))
    x = tokens(TINY)
    with torch.no_grad():
        _, state = reference(x[:, :13], reference.init_state(TINY.batch_size))
        torch.testing.assert_close(blocked(x[:, 13:], state).y, reference(x).y[:, 13:], rtol=1e-11, atol=1e-11)


def test_state_is_bounded_where_the_cells_are() -> None:
    def carried(form: str, context: int) -> int:
        module = METHOD.make(TINY, HierarchicalParams(form=form), "blocked", "cpu", torch.float32)
        return state_bytes(module.state_at(1, context))

    assert carried("causal_linear", 1 << 12) == carried("causal_linear", 1 << 16)
    assert carried("causal_full", 1 << 16) > 10 * carried("causal_full", 1 << 12)


def test_ragged_tail_is_the_mean_of_what_it_has() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1)
    assert averaged(x, 4).flatten().tolist() == [1.5, 4.5]


@pytest.mark.parametrize(
    ("form", "changes", "mode", "reason"),
    [
        ("causal_full", {"causal": False}, "forward", "is causal; the bidirectional form is seed"),
        ("seed", {"causal": True}, "forward", "form=seed is bidirectional"),
        ("seed", {"causal": False}, "stream", "cannot be continued"),
        ("seed", {"causal": False}, "decode", "cannot be continued"),
    ],
    ids=["full-backwards", "seed-causal", "seed-stream", "seed-decode"],
)
def test_directions_a_form_lacks_are_refused_with_the_reason(
    form: str, changes: dict[str, Any], mode: str, reason: str
) -> None:
    answer = METHOD.mode_support(mode, TINY.replace(**changes), HierarchicalParams(form=form))
    assert not answer
    assert reason in answer.reason


def test_cells_beyond_512_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"may hold 512 tokens; received pool=4 and levels=6, which make 1024"):
        HierarchicalParams(levels=6)


def values(dims: Dims, params: HierarchicalParams, itemsize: int = 4) -> dict[str, Any]:
    return symbols.bindings(dims, params, itemsize, METHOD.segment_len(params))


def law_cases() -> list[Any]:
    """The laws of the kit on the forms that it does not meet by itself, and on a sketch with heads to share out."""
    rounds = [
        *itertools.product(FORMS, ("reference", "blocked"), ("parameters_equal_formula",)),
        *itertools.product(
            ("linear", "linear-least", "seed-pool3", "seed-alone"), ("reference",), ("flops_equal_formula",)
        ),
        *itertools.product([form for form in FORMS if form != "full"], ("blocked",), ("flops_equal_formula",)),
        *itertools.product(FORMS, ("blocked",), ("agreement", "receptive_field", "gradients_reach_everything")),
        *itertools.product(CAUSAL, ("blocked",), ("state_shapes", "decode_continues", "purity")),
        *itertools.product(("full", "linear", "seed"), ("blocked",), ("gradcheck", "batch_independence")),
        *itertools.product(("full", "linear"), ("as_written",), ("declared_defects",)),
        *itertools.product(("full", "seed"), ("as_written",), ("flops_equal_formula", "parameters_equal_formula")),
    ]
    return [pytest.param(*each, id="-".join(each)) for each in rounds]


@pytest.mark.parametrize(("form", "impl", "law"), law_cases())
def test_every_form_keeps_the_law(form: str, impl: str, law: str) -> None:
    case = Case(METHOD, impl, FORMS[form], sizes(form), METHOD.modes)
    finding = LAWS[law](case)
    assert finding.status == "held", finding.message


@IMPLS
@pytest.mark.parametrize("mode", ["forward", "stream", "decode"])
@pytest.mark.parametrize("form", ["full-pool3", "linear"])
def test_flops_equal_the_count_over_many_slabs_and_calls(form: str, mode: str, impl: str) -> None:
    for length in (512, 1290):
        dims = Dims(length, 1, 4, 1, 1, 0)
        work = prepare(METHOD, dims, FORMS[form], impl, mode, "fp32", rotate=1)
        with Meter() as meter:
            work.call()
        formula = total(METHOD.cost_of(impl, mode, True, "none", FORMS[form]).flops)
        assert evaluate(formula, values(dims, FORMS[form])) == meter.result().flops


@pytest.mark.parametrize(
    ("span", "most", "length", "pairs"),
    [(4, None, 4096, 2_096_128), (16, None, 4096, 522_496), (4, None, 1000, 124_750), (16, None, 1000, 30_814)],
)
def test_pairs_of_a_coarse_scale_are_the_published_counts(span: int, most: int | None, length: int, pairs: int) -> None:
    assert evaluate(_visible(Scale(span, most), "forward"), {"T": length}) == pairs
    assert sum(len(Scale(span, most).sees(i)) for i in range(length)) == pairs


@pytest.mark.parametrize("scale", [Scale(1, 7), Scale(4, 3), Scale(9, 1), Scale(3, None)], ids=str)
def test_pairs_of_any_scale_equal_the_sum_over_tokens(scale: Scale) -> None:
    bound = {"window": scale.most or 0, "cells": scale.most or 0}
    for length in (1, 2, 8, 26, 27, 100):
        counted = [len(scale.sees(i)) for i in range(length + 1)]
        assert evaluate(_visible(scale, "forward"), {"T": length, **bound}) == sum(counted[:length])
        assert evaluate(_visible(scale, "decode"), {"T": length, **bound}) == counted[length]


def test_totals_of_the_repaired_sketch() -> None:
    dims, params = Dims(4096, 1, 512, 8, 1, 0, causal=False), HierarchicalParams(form="seed")
    cost, here = METHOD.cost_of("reference", "forward", False, "none", params), values(dims, params)
    assert evaluate(total(cost.flops), here) == 58_653_147_136
    assert evaluate(cost.num_parameters, here) - 2 * 512 == 9_182_720  # without the layer's norm
    claimed = 3 * 4096 * 512
    assert evaluate(total(cost.flops), here) // claimed == 9322


@pytest.mark.parametrize(("form", "order"), [("causal_full", "O(T^2)"), ("causal_linear", "O(T)"), ("seed", "O(T^2)")])
def test_growth(form: str, order: str) -> None:
    cost = METHOD.cost_of("blocked", "forward", form != "seed", "none", HierarchicalParams(form=form))
    assert big_o(total(cost.algorithmic)) == big_o(total(cost.flops)) == order
    assert big_o(cost.peak_bytes) == "O(T)"


PEAKS = [
    pytest.param(form, impl, mode, id=f"{form}-{impl}-{mode}")
    for form, impl, mode in (
        *itertools.product(("causal_linear",), ("blocked",), ("forward", "train", "stream", "decode")),
        *itertools.product(("causal_linear",), ("reference",), ("train", "decode")),
        *itertools.product(("causal_full",), ("blocked",), ("stream",)),
        *itertools.product(("seed",), ("reference", "blocked", "as_written"), ("forward", "train")),
    )
]


@pytest.mark.parametrize(("form", "impl", "mode"), PEAKS)
def test_peak_is_within_three_percent_of_the_trace(form: str, impl: str, mode: str) -> None:
    params = HierarchicalParams(form=form)
    dims = Dims(4099, 2, 128, 4, 2, 0, causal=form != "seed")
    formula = evaluate(METHOD.cost_of(impl, mode, dims.causal, "none", params).peak_bytes, values(dims, params))
    assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)


def sketch(scales: tuple[int, ...] = (1, 4, 16), d_model: int = 24, num_heads: int = 6) -> SketchAttention:
    torch.manual_seed(2)
    dims = TINY.replace(d_model=d_model, num_heads=num_heads)
    return SketchAttention(dims, scales).double().eval()


def touched(module: Any, x: torch.Tensor, sample: int, token: int) -> torch.Tensor:
    """Which outputs ``[B, T]`` move with one token of one sample."""
    moved = x.clone()
    moved[sample, token] += 1.0
    with torch.no_grad():
        return (module(moved).y - module(x).y).abs().amax(dim=2) > 1e-12


def test_sketch_lets_samples_of_a_batch_attend_to_each_other() -> None:
    x = torch.randn(2, 32, 24, dtype=torch.float64)
    assert touched(sketch(), x, sample=1, token=5)[0].any()


def test_sketch_mixes_tokens_inside_their_widest_cell_only() -> None:
    x = torch.randn(1, 64, 24, dtype=torch.float64)
    assert touched(sketch(), x, 0, 5)[0].nonzero().flatten().tolist() == list(range(16)), "some of them earlier"


def test_sketch_builds_averaged_weights_it_never_uses() -> None:
    """``need_weights`` is left on: torch then writes the weights out and cannot use a fused kernel."""
    with Meter() as meter, torch.no_grad():
        sketch()(torch.randn(1, 32, 24, dtype=torch.float64))
    names = set(meter.result().by_op)
    assert any("bmm" in name for name in names)
    assert not any("attention" in name for name in names)


def test_sketch_shares_its_heads_out_among_the_scales() -> None:
    heads = [each.num_heads for each in sketch(num_heads=8, d_model=24).attentions]
    assert heads == [2, 2, 2], "6 heads in all, not 8, each twice as wide"
    for num_heads, d_model, reason in ((2, 16, "of 2 heads is none"), (16, 512, "512 is no multiple")):
        dims = TINY.replace(num_heads=num_heads, d_model=d_model)
        answer = METHOD.impl_support(METHOD.impl("as_written"), "forward", dims, HierarchicalParams(), "cpu", "fp32")
        assert not answer
        assert reason in answer.reason


def test_sketch_without_single_tokens_pools_with_the_wrong_scale() -> None:
    module = sketch(scales=(4, 16))
    x = torch.randn(1, 32, 24, dtype=torch.float64)
    taken: list[int] = []
    for pooling in module.poolings:
        pooling.register_forward_hook(lambda layer, _, __: taken.append(layer.kernel_size[0]))
    with torch.no_grad():
        module(x)
    assert taken == [16, 16], "scale 4 finds the pool of 16, the last of the list"


def test_sketch_stretches_ragged_lengths_and_drops_their_tail() -> None:
    module = sketch(scales=(1, 4))
    x = torch.randn(1, 11, 24, dtype=torch.float64)
    assert touched(module, x, 0, 10)[0].nonzero().flatten().tolist() == [10], "the tail is never pooled"
    reached = touched(module, x, 0, 4)[0].nonzero().flatten().tolist()
    assert min(reached) < 4 or max(reached) > 7, "cell 4..7 is stretched beyond itself"


def test_sketch_refuses_fewer_tokens_than_a_widest_cell() -> None:
    answer = METHOD.impl_support(
        METHOD.impl("as_written"), "forward", TINY.replace(seq_len=15), HierarchicalParams(), "cpu", "fp32"
    )
    assert not answer
    assert "at least 16 tokens, received 15" in answer.reason
    with pytest.raises(RuntimeError):
        sketch()(torch.randn(1, 15, 24, dtype=torch.float64))
