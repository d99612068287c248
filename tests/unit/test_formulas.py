"""FLOP formulas of operators that torch's own counter is blind to, on fake tensors, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import bilinear, scaled_dot_product_attention

from ctxbench.cost.formulas import FORMULAS, formula
from ctxbench.cost.trace import Meter, trace
from ctxbench.method import Dims, Method, Params


def count(function, *shapes: tuple[int, ...]) -> Meter:
    """Call on fake tensors of these shapes under the meter."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = [torch.randn(shape) for shape in shapes]
        with Meter() as meter:
            function(*operands)
    return meter


def flops(function, *shapes: tuple[int, ...]) -> int:
    meter = count(function, *shapes)
    assert not meter.uncounted
    return sum(meter.flops.values())


HAND = {
    "mm": (torch.mm, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "mv": (torch.mv, [(5, 7), (7,)], 2 * 5 * 7),
    "addmv": (torch.addmv, [(5,), (5, 7), (7,)], 2 * 5 * 7),
    "dot": (torch.dot, [(7,), (7,)], 2 * 7),
    "vdot": (torch.vdot, [(7,), (7,)], 2 * 7),
    "addbmm": (torch.addbmm, [(5, 3), (2, 5, 7), (2, 7, 3)], 2 * 2 * 5 * 7 * 3),
    "baddbmm": (torch.baddbmm, [(2, 5, 3), (2, 5, 7), (2, 7, 3)], 2 * 2 * 5 * 7 * 3),
    "cdist, few rows": (torch.cdist, [(5, 7), (6, 7)], 2 * 5 * 6 * 7),
    "cdist, many rows": (torch.cdist, [(50, 7), (60, 7)], 2 * 50 * 60 * 7),
    "bilinear": (bilinear, [(5, 6), (5, 7), (3, 6, 7)], 2 * 5 * 3 * 6 * 7 + 2 * 5 * 3 * 7),
    "conv1d": (nn.functional.conv1d, [(2, 6, 10), (8, 6, 3)], 2 * 2 * 8 * 8 * 6 * 3),
    "complex FFT": (lambda x: torch.fft.fft(torch.complex(x, x)), [(3, 64)], 5 * 3 * 64 * 6),
    "real FFT": (torch.fft.rfft, [(3, 64)], 5 * 3 * 64 * 6 // 2),
    "element-wise": (lambda x: torch.softmax(x.exp().cumsum(1), 1).topk(3).values, [(5, 9)], 0),
}


@pytest.mark.parametrize(("function", "shapes", "expected"), HAND.values(), ids=HAND)
def test_operators_equal_a_count_by_hand(function, shapes, expected: int) -> None:
    assert flops(function, *shapes) == expected


def test_an_lstm_multiplies_by_both_its_matrices() -> None:
    assert flops(nn.LSTM(8, 12), (5, 2, 8)) == 2 * 5 * 2 * (8 + 12) * 48


def pairs(queries: int, keys: int, causal: bool) -> int:
    return sum(not causal or j <= i for i in range(queries) for j in range(keys))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 9), (9, 4), (33, 65)], ids=str)
def test_fused_attention_on_the_cpu_forward_and_backward(queries: int, keys: int, causal: bool) -> None:
    shapes = [(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    core = 4 * 2 * 3 * 8 * pairs(queries, keys, causal)
    assert flops(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal), *shapes) == core

    def train(q, k, v):
        operands = [x.requires_grad_() for x in (q, k, v)]
        scaled_dot_product_attention(*operands, is_causal=causal).sum().backward()

    assert flops(train, *shapes) == core + core * 5 // 2


def test_a_mask_tensor_is_charged_for_the_rectangle() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    seen = flops(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask), *[(1, 2, 5, 8), *[(1, 2, 7, 8)] * 2]
    )
    assert seen == 4 * 2 * 8 * 5 * 7


def test_grouped_queries_are_charged_for_every_query_head() -> None:
    def grouped(q, k, v):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert flops(grouped, (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)) == 4 * 2 * 4 * 8 * 5 * 7


T, D, FF = 7, 16, 40
ATTENTION = 2 * 2 * T * D * (4 * D + 2 * T)  # batch 2: four projections, scores and values


@pytest.mark.parametrize("weights", [False, True], ids=["no weights", "weights"])
def test_the_fast_path_of_multihead_attention_is_not_free(weights: bool) -> None:
    layer = nn.MultiheadAttention(D, 2, batch_first=True).eval()

    def call(x):
        with torch.no_grad():
            return layer(x, x, x, need_weights=weights)

    assert flops(call, (2, T, D)) == ATTENTION


@pytest.mark.parametrize("training", [False, True], ids=["eval fast path", "train"])
def test_the_encoder_layer_costs_the_same_on_either_path(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, FF, dropout=0.0, batch_first=True).train(training)

    def call(x):
        with torch.no_grad():
            return layer(x)

    assert flops(call, (2, T, D)) == ATTENTION + 2 * 2 * T * D * 2 * FF


def flex(mask_length: int | None = None, fake_mask: bool = False, compiled: bool = False) -> Method:
    """FlexAttention on the input itself, with a causal block mask of 64 x 64 tiles where a length is given."""

    class Flex(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.call = torch.compile(flex_attention) if compiled else flex_attention
            self.mask = None
            if mask_length and fake_mask:
                self.mask = causal_tiles(mask_length)
            elif mask_length:
                with unset_fake_temporarily():
                    self.mask = causal_tiles(mask_length)

        def forward(self, x):
            q = x.view(x.shape[0], x.shape[1], 2, 16).transpose(1, 2)
            return self.call(q, q, q, block_mask=self.mask).transpose(1, 2).reshape(x.shape)

    return Method("flex", build=lambda dims, params, impl, device, dtype: Flex().to(device, dtype))


def causal_tiles(length: int):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cpu", BLOCK_SIZE=64)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flex_attention_without_a_mask_is_charged_for_the_rectangle(compiled: bool) -> None:
    dims = Dims(seq_len=256, batch_size=3, d_model=32, num_heads=2)
    seen = trace(flex(compiled=compiled), dims, Params(), "reference")
    assert seen.by_op == {"flex_attention": 4 * 3 * 32 * 256 * 256}
    assert seen.coverage == 1.0


@pytest.mark.parametrize("length", [256, 200], ids=["whole tiles", "last tile cut"])
def test_flex_attention_is_charged_for_the_tiles_its_block_mask_keeps(length: int) -> None:
    dims = Dims(seq_len=length, batch_size=3, d_model=32, num_heads=2)
    kept = sum(
        (min(row + 64, length) - row) * (min(column + 64, length) - column)
        for row in range(0, length, 64)
        for column in range(0, row + 1, 64)
    )
    assert trace(flex(length), dims, Params(), "reference").flops == 4 * 3 * 32 * kept


def test_a_block_mask_without_values_is_charged_for_what_it_can_hold() -> None:
    dims = Dims(seq_len=256, d_model=32, num_heads=2)
    assert trace(flex(256, fake_mask=True), dims, Params(), "reference").flops == 4 * 32 * 256 * 256


@pytest.fixture
def custom_operator():
    """An operator that the dispatcher cannot look into."""
    library = torch.library.Library("ctxbench_test", "FRAGMENT")

    @torch.library.custom_op("ctxbench_test::scores", mutates_args=())
    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT

    @scores.register_fake
    def _(q, k):
        return q.new_empty(q.shape[0], k.shape[0])

    packet = torch.ops.ctxbench_test.scores
    yield packet
    FORMULAS.pop(packet, None)
    library._destroy()


def test_a_custom_operator_is_reported_until_it_has_a_formula(custom_operator) -> None:
    shapes = ((5, 8), (7, 8))
    blind = count(custom_operator, *shapes).result()
    assert blind.flops == 0
    assert blind.uncounted == {"ctxbench_test.scores": 1}
    assert blind.coverage == 0.0

    @formula(custom_operator)
    def _scores(q, k, out, **_):
        return 2 * q.numel() * k.shape[0]

    seen = count(custom_operator, *shapes).result()
    assert seen.flops == 2 * 5 * 7 * 8
    assert (seen.uncounted, seen.coverage) == ({}, 1.0)


def test_an_inverse_has_no_formula_and_is_reported() -> None:
    seen = count(lambda x: torch.linalg.inv(x) + 1, (4, 4)).result()
    assert seen.uncounted == {"aten.linalg_inv_ex": 1}
    assert 0 < seen.coverage < 1


def test_the_charge_of_a_real_fft_is_half_a_complex_one() -> None:
    assert flops(torch.fft.rfft, (1, 1000)) == round(2.5 * 1000 * math.log2(1000))
    assert flops(torch.fft.rfft, (4, 1)) == 0
