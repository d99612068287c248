"""The fast engine of the tracer says what fake tensors say, or is not used."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ctxbench.cost import shadow
from ctxbench.cost import trace as tracing
from ctxbench.method import Dims, Method
from ctxbench.registry import discover

# A sketch that calls kernels which meta tensors do not reach, or reads values back, is left to fake tensors.
CASES = [
    (method, impl.name, mode)
    for method in discover()
    for impl in method.impls
    for mode in ("forward", "train", "stream")
    if mode in (impl.modes or method.modes) and mode in method.modes and all(map(find_spec, impl.needs))
    if not impl.defects
]


@pytest.mark.parametrize(("method", "impl", "mode"), CASES, ids=lambda value: getattr(value, "name", value))
def test_both_engines_agree_on_every_method(method, impl, mode):
    params = method.params()
    causal = method.causal[0] if method.causal else False
    dims = Dims(
        seq_len=700, d_model=32, num_heads=4, d_ff=64, num_layers=method.fewest_layers(params), causal=causal,
        position=method.positions[0],
    )  # fmt: skip
    subject = (dims, method, params, impl, mode, "fp32")
    quick, fake = tracing._trace_shadow(*subject), tracing._trace_fake(*subject, "cpu")
    assert quick is not None
    assert quick.by_op == fake.by_op
    assert quick.peak_bytes == fake.peak_bytes
    assert quick.num_parameters == fake.num_parameters
    assert quick.uncounted == fake.uncounted


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
    with shadow.CpuAttention(), pytest.raises(shadow.NotShadowed):
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
