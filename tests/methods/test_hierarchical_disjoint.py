"""Hierarchical attention with disjoint scales: every earlier token is seen once, at one resolution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter
from ctxbench.implementations.hierarchical import METHOD
from ctxbench.implementations.hierarchical.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.hierarchical.cost import _visible
from ctxbench.implementations.hierarchical.params import HierarchicalParams
from ctxbench.implementations.hierarchical.reference import OPERATORS as REFERENCE
from ctxbench.method import Dims
from ctxbench.testing import LAWS, Case
from ctxbench.testing.behaviour import layout
from ctxbench.workload import prepare, state_bytes

TINY = Dims(seq_len=61, batch_size=2, d_model=8, num_heads=2, d_ff=12)
FORMS = {
    "full": HierarchicalParams(window=5, cells=2, disjoint=True),
    "full-pool3": HierarchicalParams(window=3, cells=1, pool=3, disjoint=True),
    "full-two": HierarchicalParams(window=7, levels=2, disjoint=True),
    "linear": HierarchicalParams(form="causal_linear", window=6, cells=2, pool=2, disjoint=True),
    "linear-four": HierarchicalParams(form="causal_linear", window=3, cells=3, pool=2, levels=4, disjoint=True),
    "linear-least": HierarchicalParams(form="causal_linear", window=1, cells=1, pool=3, levels=2, disjoint=True),
    "window-alone": HierarchicalParams(window=4, levels=1, disjoint=True),
}
OPERATORS = {"reference": REFERENCE, "blocked": BLOCKED}
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", OPERATORS)


def representatives(params: HierarchicalParams, i: int) -> list[tuple[int, range]]:
    """Scale and tokens of all that token ``i`` sees, written from the definition: walk back, scale by scale."""
    found, end = [], i + 1
    for level, span in enumerate(params.spans):
        wanted = params.window if level == 0 else params.cells
        if level + 1 < params.levels:  # at least so many, and the rest is whole cells of the next scale
            begin = max(0, (end if level else i + 1) - wanted * span)
            begin -= begin % (span * params.pool)
        elif level == 0 or params.form == "causal_linear":
            begin = max(0, end - wanted * span)
        else:
            begin = 0
        found += [(level, range(first, first + span)) for first in range(begin, end, span)]
        end = begin
    return found


@forms
def test_every_earlier_token_is_seen_once(params: HierarchicalParams) -> None:
    for i in range(150):
        seen = [token for _, cell in representatives(params, i) for token in cell]
        assert sorted(seen) == list(range(min(seen), i + 1))
        if params.form == "causal_full" and params.levels > 1:
            assert len(seen) == i + 1
        cells = [range(c * s.span, (c + 1) * s.span) for s in params.scales for c in s.sees(i)]
        assert sorted(cells, key=min) == sorted((cell for _, cell in representatives(params, i)), key=min)


def looped(mixer: Any, x: torch.Tensor, params: HierarchicalParams) -> torch.Tensor:
    """One sample ``[T, d]``: every token collects its representatives one by one."""
    q, k, v = (each(x).view(len(x), mixer.num_heads, -1) for each in (mixer.q, mixer.k, mixer.v))
    mixed = torch.zeros_like(q)
    for head, i in itertools.product(range(mixer.num_heads), range(len(x))):
        cells = representatives(params, i)
        keys = torch.stack([sum(k[j, head] for j in cell) / len(cell) for _, cell in cells])
        values = torch.stack([sum(v[j, head] for j in cell) / len(cell) for _, cell in cells])
        logits = keys @ q[i, head] / math.sqrt(mixer.head_dim) + q.new_tensor([math.log(len(c)) for _, c in cells])
        mixed[i, head] = logits.softmax(dim=0) @ values
    return mixer.o(mixed.flatten(1))


def made(impl: str, params: HierarchicalParams, length: int = 61) -> Any:
    torch.manual_seed(0)
    return METHOD.make(TINY.replace(seq_len=length), params, impl, "cpu", torch.float64)


def tokens(length: int = 61) -> torch.Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@impls
@forms
def test_mixer_equals_a_loop_over_representatives(params: HierarchicalParams, impl: str) -> None:
    mixer, x = made(impl, params).layers[0].mixer, tokens(45)
    with torch.no_grad():
        expected = torch.stack([looped(mixer, sample, params) for sample in x])
        torch.testing.assert_close(mixer(x).y, expected, rtol=0, atol=1e-12)


@impls
def test_it_is_dense_attention_where_keys_and_values_do_not_change_within_cells(impl: str) -> None:
    """A cell of equal keys weighs like its tokens, and nothing is counted twice."""
    params, T, D = FORMS["full"], 96, 4
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(2, 1, 1, T // 16, D, generator=generator, dtype=torch.float64)
    levels = [coarse.repeat_interleave(16 // span, dim=3) for span in params.spans]
    q = torch.randn(1, 1, T, D, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *levels[0], is_causal=True)
    torch.testing.assert_close(OPERATORS[impl].attend(q, levels, params.scales, 0), expected, rtol=0, atol=1e-12)


@forms
def test_blocked_equals_reference_with_all_gradients(params: HierarchicalParams) -> None:
    for length in (1, 8, 300):  # within a slab, and over several
        results = []
        for impl in OPERATORS:
            module, x = made(impl, params, length), tokens(length).requires_grad_()
            y = module(x).y
            (y * tokens(length).cos()).sum().backward()
            results.append((y, x.grad, *(parameter.grad for parameter in module.parameters())))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@impls
@forms
def test_any_chunking_equals_the_whole(params: HierarchicalParams, impl: str) -> None:
    module, x = made(impl, params, 150), tokens(150)
    formula = METHOD.cost_of(impl, "stream", True, "none", params).state_bytes
    with torch.no_grad():
        whole = module(x).y
        for sizes in ([1] * 40 + [7, 13, 50, 40], [64, 64, 22]):
            state, pieces, seen = module.init_state(2), [], 0
            for chunk in x.split(sizes, dim=1):
                y, state = module(chunk, state)
                pieces.append(y)
                seen += chunk.shape[1]
                assert layout(state) == layout(module.state_at(2, seen))
                values = bindings(TINY.replace(seq_len=seen), params, 8, 512)
                assert state_bytes(state) == evaluate(formula, values)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)


@forms
def test_pairs_equal_the_sum_over_tokens(params: HierarchicalParams) -> None:
    for length in (1, 2, 9, 30, 77, 150):
        values = bindings(Dims(seq_len=length), params, 4, 512)
        for scale in params.scales:
            counted = [len(scale.sees(i)) for i in range(length + 1)]
            assert evaluate(_visible(scale, "forward"), values) == sum(counted[:length])
            assert evaluate(_visible(scale, "decode"), values) == counted[length]


@impls
@pytest.mark.parametrize("mode", ["forward", "stream", "decode"])
@pytest.mark.parametrize("form", ["full", "linear-four"])
def test_flops_equal_the_count_over_many_slabs_and_calls(form: str, mode: str, impl: str) -> None:
    cost = METHOD.cost_of(impl, mode, True, "none", FORMS[form])
    for length in (9, 512, 1290):
        dims = Dims(length, 1, 4, 1, 1, 0)
        work = prepare(METHOD, dims, FORMS[form], impl, mode, "fp32", rotate=1)
        with Meter() as meter:
            work.call()
        assert evaluate(total(cost.flops), bindings(dims, FORMS[form], 4, 512)) == meter.result().flops


@pytest.mark.parametrize("law", ["causality", "receptive_field", "agreement", "gradcheck", "state_shapes", "purity"])
@pytest.mark.parametrize("form", ["full", "linear"])
def test_the_kit_holds(form: str, law: str) -> None:
    dims = TINY.replace(num_layers=2, d_model=16)
    finding = LAWS[law](Case(METHOD, "blocked", FORMS[form], dims, METHOD.modes))
    assert finding.status == "held", finding.message


def test_growth_and_memory() -> None:
    for form, order in (("causal_full", "O(T^2)"), ("causal_linear", "O(T)")):
        cost = METHOD.cost_of("blocked", "forward", True, "none", HierarchicalParams(form=form, disjoint=True))
        assert big_o(total(cost.algorithmic)) == big_o(total(cost.flops)) == order
    module = METHOD.make(TINY, HierarchicalParams(form="causal_linear", disjoint=True), "blocked", "cpu", torch.float32)
    assert state_bytes(module.state_at(1, 1 << 13)) == state_bytes(module.state_at(1, 1 << 16))
