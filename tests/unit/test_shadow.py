"""The fast engine of the tracer says what fake tensors say, or is not used."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from ctxbench.cost import custom, shadow
from ctxbench.cost import trace as tracing
from ctxbench.cost.meter import Meter
from ctxbench.method import Dims, Method
from ctxbench.registry import discover

# A sketch that calls kernels which meta tensors do not reach, or reads values back, is left to fake tensors; so is
# FlexAttention, whose block masks are made under ``vmap`` and hold values.
CASES = [
    (method, impl.name, mode)
    for method in discover()
    for impl in method.impls
    for mode in ("forward", "train", "stream")
    if mode in (impl.modes or method.modes) and mode in method.modes and all(map(find_spec, impl.needs))
    if not impl.defects and impl.name != "flex"
]

MAKE_VALUES = {("compressive_memory", impl) for impl in ("blocked", "native", "slabs", "triton")}  # plans on the CPU


@pytest.mark.parametrize(("method", "impl", "mode"), CASES, ids=lambda value: getattr(value, "name", value))
def test_both_engines_agree_on_every_method(method, impl, mode):
    params = method.params()
    causal = method.causal[0] if method.causal else False
    dims = Dims(
        seq_len=700, d_model=32, num_heads=4, d_ff=64, num_layers=method.fewest_layers(params), causal=causal,
        position=method.positions[0],
    )  # fmt: skip
    subject = (dims, method, params, impl, mode, "fp32")
    fake = tracing._trace_fake(*subject, "cpu")
    for way in tracing.WAYS:
        quick = tracing._trace_shadow(*subject, way)
        assert (quick is None) == (not way.values and (method.name, impl) in MAKE_VALUES)
        assert quick is None or tracing._same(quick, fake)


def test_a_module_that_behaves_otherwise_on_meta_tensors_is_traced_on_fake_ones():
    class Cautious(torch.nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2) @ x if x.device.type == "cpu" else x + 1

    method = Method(name="cautious", build=lambda *_: Cautious())
    dims = Dims(seq_len=8192, d_model=16, num_heads=1)
    assert tracing.trace(method, dims, method.params(), "reference").flops == 4 * 8192**2 * 16


def test_a_module_that_reads_values_is_reported_with_the_operator_that_stopped_it():
    class Peeking(torch.nn.Module):
        def forward(self, x):
            return x * int(x.sum())

    method = Method(name="peeking", build=lambda *_: Peeking())
    dims = Dims(seq_len=8192, d_model=16, num_heads=1)
    assert tracing.trace(method, dims, method.params(), "reference").untraceable


@pytest.mark.parametrize("change", [{"dropout_p": 0.5}, {"enable_gqa": True}], ids=str)
def test_attention_that_the_fused_kernel_refuses_is_left_to_fake_tensors(change):
    q = torch.empty(1, 2, 8, 4, device="meta")
    with shadow.ShadowMeter(), pytest.raises(shadow.NotShadowed):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, **change)


def test_a_repeated_operator_is_counted_and_followed_every_time():
    meter = tracing.ShadowMeter()
    x = torch.empty(4, 8, device="meta")
    meter.ignore(x)
    with meter:
        kept = [x @ x.T for _ in range(3)]
    assert len({y.untyped_storage()._cdata for y in kept}) == 3
    seen = meter.result()
    assert (seen.flops, seen.peak_bytes) == (3 * 2 * 4 * 8 * 4, 3 * 4 * 4 * 4)


def test_numbers_of_different_types_are_not_taken_for_each_other():
    x = torch.empty(4, dtype=torch.int64, device="meta")
    with tracing.ShadowMeter():
        assert [(x * factor).dtype for factor in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


def seen_of(function, shapes, meter, calls):
    """What a meter says of a function without gradients."""
    operands = [torch.empty(shape, device="meta") for shape in shapes]
    meter.ignore(operands)
    with torch.no_grad(), calls, meter:
        kept = function(*operands)
    del kept
    return meter.result()


def rows_of_a_mask(x):
    for row in x:
        row[3:5] = 1
        row[-1] = 0


def every_second(x):
    for start in range(4):
        x[start : start + 4 : 2, None] = 0


def in_place(x, y):
    for i in range(5):
        x[i : i + 2].add_(y[:2]).mul_(2)
        x.masked_fill_(x > i, 0.0)


def in_place_of_any_stride(x, y):
    for width in range(1, 7):
        part = x.flatten()[: 8 * width].view(8, width)  # as many columns as rows move apart
        part[:, :1].add_(y[:, :1]).fill_(1.0)
        x[:2].mul_(y[0])
        x[:, :3].addmm_(y, y[1:, :3])
        part.addcmul_(part, part)


def turned(x):
    for _ in range(4):  # back and forth: the same call finds another shape
        x.t_()
        x = x @ x.t()
    return x


def kept_and_dropped(x):
    kept = []
    for i in range(6):
        kept.append((x @ x.T).softmax(1)[:, i:])
        if i % 2:
            kept.pop(0)
    return kept


def with_results_given(x, y):
    for _ in range(3):
        torch.matmul(x, x.T, out=y)
        torch.softmax(y, dim=1, out=y)
    return torch.topk(y, 2).values, y.max(dim=1)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (rows_of_a_mask, [(9, 7)]),
        (every_second, [(9, 7)]),
        (in_place, [(8, 7), (8, 7)]),
        (in_place_of_any_stride, [(8, 7), (8, 7)]),
        (turned, [(6, 6)]),
        (kept_and_dropped, [(8, 7)]),
        (with_results_given, [(8, 7), (8, 8)]),
        (lambda x: [torch.nn.functional.layer_norm(x, (7,)) for _ in range(3)], [(8, 7)]),
        (lambda x: [x.reshape(7, 8).T.reshape(8, 7) for _ in range(3)], [(8, 7)]),
        (lambda x: [torch.cat([x[i:], x[:i]]) for i in range(5)], [(8, 7)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_from_memory_count_and_live_as_calls(function, shapes):
    plain, quick, redirecting = Meter(), tracing.ShadowMeter(), tracing.ShadowMeter()
    expected = seen_of(function, shapes, plain, nullcontext())
    assert seen_of(function, shapes, quick, nullcontext()) == expected
    assert seen_of(function, shapes, redirecting, shadow.MetaCalls(redirecting)) == expected


def test_operators_of_a_backward_pass_are_remembered_too():
    class Loop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            total = torch.zeros_like(x)
            for row in range(4):
                total[row : row + 2] += grad[row : row + 2] @ x.T @ x
            return total

    meter, x = tracing.ShadowMeter(), torch.empty(5, 3, device="meta", requires_grad=True)
    with meter:
        Loop.apply(x).sum().backward()
    products = meter._seen[id(torch.ops.aten.mm.default)].values()
    assert sum(seen.again for seen in products) == 6
    assert meter.result().flops == 4 * 2 * 2 * 2 * 5 * 3


def test_what_is_only_written_is_remembered_whatever_its_strides():
    meter, x, y = tracing.ShadowMeter(), torch.empty(64, device="meta"), torch.empty(8, 2, device="meta")
    meter.ignore(x, y)
    with torch.no_grad(), meter:
        for width in range(2, 8):
            assert x[: 8 * width].view(8, width)[:, :2].add_(y).stride() == (width, 1)
    (seen,) = meter._seen[id(torch.ops.aten.add_.Tensor)].values()
    assert seen.again == 5
    assert meter.result().peak_bytes == 0


def test_what_never_comes_again_is_no_longer_remembered(monkeypatch):
    monkeypatch.setattr(shadow, "PATIENCE", 4)
    meter, x = tracing.ShadowMeter(), torch.empty(30, 3, device="meta")
    meter.ignore(x)
    with torch.no_grad(), meter:
        for i in range(1, 30):
            x[:i] @ x.T
    assert id(torch.ops.aten.mm.default) in meter.passed
    assert meter.result().flops == sum(2 * i * 3 * 30 for i in range(1, 30))


def test_a_module_that_makes_values_is_redirected():
    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.ones(x.shape[1], 1).tril().to(x.device)

    class Plain(torch.nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2) @ x

    for module, way in ((Masked, tracing.WAYS[1]), (Plain, tracing.WAYS[0])):
        method = Method(name="module", build=lambda *_, module=module: module())
        dims = Dims(seq_len=90, d_model=16, num_heads=1)
        assert tracing._compare(dims, method, method.params(), "reference", "train", "fp32") == way


def test_attention_in_a_training_step_is_the_operator_of_the_cpu():
    meter, q = tracing.ShadowMeter(makes_values=False), torch.empty(1, 2, 8, 4, device="meta", requires_grad=True)
    with meter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert set(meter.result().by_op) == {
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).is_meta  # torch's own again


def test_values_on_the_cpu_stay_values():
    """Only meta tensors are made from memory: a module may plan with small tensors of its own."""
    with torch.no_grad(), tracing.ShadowMeter():
        plans = [torch.arange(4).flip(0).add_(i).tolist() for i in range(3)]
    assert plans == [[3 + i, 2 + i, 1 + i, i] for i in range(3)]


def test_a_mask_made_row_by_row_on_the_cpu_is_followed():
    class Rows(torch.nn.Module):
        def forward(self, x):
            mask = torch.zeros(x.shape[1], x.shape[1])
            for i, row in enumerate(mask):
                row[max(0, i - 2) : i + 3] = 1
            return mask.to(x.device) @ x

    method = Method(name="rows", build=lambda *_: Rows())
    subject = (method, method.params(), "reference", "forward", "fp32")
    short = Dims(seq_len=90, d_model=16, num_heads=1)
    quick = tracing._trace_shadow(short, *subject, tracing.Way(redirect=True))
    assert tracing._same(quick, tracing._trace_fake(short, *subject, "cpu"))
    seen = tracing.trace(method, Dims(seq_len=32768, d_model=16, num_heads=1), method.params(), "reference")
    assert seen.flops == 2 * 32768**2 * 16
    assert seen.peak_bytes == 4 * 32768**2 + 4 * 32768 * 16


def test_both_engines_are_compared_once_for_all_lengths_of_a_cell(monkeypatch):
    method, lengths = discover()["dense"], []
    plain = tracing._trace_fake
    monkeypatch.setattr(tracing, "_AGREED", {})
    monkeypatch.setattr(tracing, "_trace_fake", lambda dims, *rest: lengths.append(dims.seq_len) or plain(dims, *rest))
    dims = Dims(seq_len=600, d_model=32, num_heads=2)
    before = tracing.trace(method, dims, method.params(), "blocked", "train")
    for length in (4096, 600, 5000):
        seen = tracing.trace(method, dims.replace(seq_len=length), method.params(), "blocked", "train")
        assert length != 600 or tracing._same(seen, before)
    probe_len = tracing._probe_len(method, method.params(), "train")
    assert lengths == [600, probe_len]
    tracing.trace(method, dims.replace(seq_len=4096, batch_size=2), method.params(), "blocked", "train")
    assert lengths == [600, probe_len, probe_len]


def test_what_one_process_found_of_the_engines_spares_another_the_comparison(monkeypatch):
    method = discover()["dense"]
    subject = (method, method.params(), "blocked", "forward", "fp32")
    dims = Dims(seq_len=4096, d_model=32, num_heads=2)
    monkeypatch.setattr(tracing, "_AGREED", {})
    assert tracing.engine(dims, *subject) == ""
    before = tracing.trace(dims=dims, method=method, params=method.params(), impl="blocked")
    told = tracing.engine(dims, *subject)
    assert told in tracing.ENGINES
    assert told != "fake"

    def refuse(*_):
        raise AssertionError("compared again")

    monkeypatch.setattr(tracing, "_AGREED", {})
    monkeypatch.setattr(tracing, "_compare", refuse)
    tracing.trust(told, dims, *subject)
    assert tracing.engine(dims.replace(seq_len=8192), *subject) == told  # for every length of the series
    assert tracing.engine(dims.replace(batch_size=2), *subject) == ""
    assert tracing._same(tracing.trace(method, dims, method.params(), "blocked"), before)
    tracing.trust("fake", dims, *subject)
    monkeypatch.setattr(tracing, "_trace_shadow", refuse)
    assert tracing._same(tracing.trace(method, dims, method.params(), "blocked"), before)


@pytest.mark.parametrize(
    ("name", "mode", "memory", "expected"),
    [
        ("dense", "train", None, 588),
        ("dense", "stream", None, 1100),
        ("longformer", "forward", 1024, 1100),
        ("longformer", "forward", 8192, 1100),
        ("transformer_xl", "forward", 64, 1100),
    ],
)
def test_engines_are_compared_over_two_pieces_and_more_than_a_likely_memory(name, mode, memory, expected):
    method = discover()[name]
    params = method.params()
    if memory is not None:
        params = params.replace(**{method.memory_parameter: memory})
    assert tracing._probe_len(method, params, mode) == expected


def test_multi_head_attention_is_one_operator_on_both_engines():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    method = Method(name="heads", build=lambda *_: Heads())
    subject = (Dims(seq_len=64, d_model=16, num_heads=2), method, method.params(), "reference", "forward", "fp32")
    quick, fake = tracing._trace_shadow(*subject), tracing._trace_fake(*subject, "cpu")
    assert quick is not None
    assert list(quick.by_op) == ["aten._native_multi_head_attention"]
    assert tracing._same(quick, fake)


def test_views_pass_the_fast_meter_alone():
    x = torch.empty(4, 8, device="meta", requires_grad=True)

    def dispatched(meter):
        with meter:
            x.t().view(2, 4, 4).unsqueeze(0).expand(3, -1, -1, -1)
        return {traits.name for traits in meter._traits.values()}

    seen = dispatched(Meter())
    assert {"aten.t", "aten.expand"} <= seen
    assert not dispatched(shadow.ShadowMeter())
    assert dispatched(Meter()) == seen  # they are back


class Kept(torch.autograd.Function):
    """Saves an operand, a result and a tensor of its own, and two plain attributes."""

    @staticmethod
    def forward(ctx, x, y, scale):
        half = x * 0.5
        out = (half @ y) * scale
        ctx.save_for_backward(y, out, half)
        ctx.scale, ctx.form = scale, (1, "rows")
        return out

    @staticmethod
    def backward(ctx, grad):
        y, out, half = ctx.saved_tensors
        return (grad * out) @ y.T * ctx.scale, half.T @ grad, None


class Shapeless(torch.autograd.Function):
    """Does not want zeros for gradients that are missing, which memory cannot tell."""

    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        return x @ y, x * scale

    @staticmethod
    def backward(ctx, grad, missing):
        assert missing is None
        return grad @ ctx.saved_tensors[0].T, None, None


class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        (fresh := x.clone()).mul_(scale)
        ctx.save_for_backward(fresh)
        return fresh @ y

    @staticmethod
    def backward(ctx, grad):
        (fresh,) = ctx.saved_tensors
        return grad.expand_as(grad) @ fresh.T.new_empty(grad.shape[1], fresh.shape[1]), None, None


@pytest.mark.parametrize("function", [Kept, Shapeless, Overwriting])
def test_custom_functions_from_memory_count_and_live_as_their_operators(function):
    own, found = (function.__dict__["forward"], function.__dict__["backward"]), []
    for remembers in (True, False):
        meter = tracing.ShadowMeter() if remembers else Meter()
        x, y = (torch.empty(6, 6, device="meta", requires_grad=True) for _ in range(2))
        meter.ignore(x, y)
        with contextlib.ExitStack() as stack:
            if remembers:
                stack.enter_context(custom.CustomFunctions(meter))
                stack.enter_context(shadow.MetaCalls(meter))
            stack.enter_context(meter)
            z = x
            for step in range(6):
                z = function.apply(z, y, 2.0 if step % 2 else 3.0)
                z = z[0] if isinstance(z, tuple) else z
            z.sum().backward()
        del z
        if remembers and function is Kept:
            calls = [meter._seen[id(method.__func__)] for method in own]
            whole = [seen.again for outcomes in calls for seen in outcomes.values()]
            assert sum(whole) + len(whole) == 2 * 6
            assert len(whole) < 8  # two scales, inputs with a gradient or all shared
        found.append(meter.result())
    assert found[0] == found[1]
    assert (function.__dict__["forward"], function.__dict__["backward"]) == own
