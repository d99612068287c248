"""What only hardware can show; skipped, with the reason printed, where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from ctxbench.cost.trace import trace
from ctxbench.method import Dims
from ctxbench.registry import discover
from ctxbench.workload import as_output, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
METHODS = [
    (method, impl.name)
    for method in discover()
    for impl in method.impls
    if not impl.defects and "cuda" in impl.devices and "fp32" in (impl.dtypes or ("fp32",))
]


def skip_unless_supported(method, impl, dims, params) -> None:
    answer = method.impl_support(method.impl(impl), "forward", dims, params, "cuda", "fp32")
    if not answer:
        pytest.skip(answer.reason)


@pytest.mark.parametrize(("method", "impl"), METHODS, ids=lambda value: getattr(value, "name", value))
def test_cuda_agrees_with_cpu_in_float32(method, impl):
    params = method.params()
    dims = Dims(seq_len=601, d_model=64, num_heads=2, d_ff=128, num_layers=method.fewest_layers(params),
                causal=method.causal[0] if method.causal else False, position=method.positions[0])  # fmt: skip
    skip_unless_supported(method, impl, dims, params)
    plain = impl if "cpu" in method.impl(impl).devices else method.oracle
    here = prepare(method, dims, params, plain, "forward", "fp32", "cpu")
    there = prepare(method, dims, params, impl, "forward", "fp32", "cuda")
    there.module.load_state_dict(here.module.state_dict())
    with torch.no_grad():
        expected = as_output(here.module(here.inputs[0])).y
        received = as_output(there.module(here.inputs[0].cuda())).y.cpu()
    torch.testing.assert_close(received, expected, rtol=2e-3, atol=2e-3)


def trained(method, impl: str) -> bool:
    """Kernels of our own have programs that hold their gradients against float64; the compiler's have not."""
    return impl not in ("triton", "graph", "diagonal_triton") and "train" in (method.impl(impl).modes or method.modes)


@pytest.mark.parametrize(
    ("method", "impl"), [pair for pair in METHODS if trained(*pair)], ids=lambda value: getattr(value, "name", value)
)
def test_gradients_on_cuda_agree_with_the_reference_on_cpu(method, impl):
    params = method.params()
    dims = Dims(seq_len=512, d_model=64, num_heads=2, d_ff=128, num_layers=method.fewest_layers(params),
                causal=method.causal[0] if method.causal else False, position=method.positions[0])  # fmt: skip
    skip_unless_supported(method, impl, dims, params)
    here = prepare(method, dims, params, method.oracle, "train", "fp32", "cpu")
    there = prepare(method, dims, params, impl, "train", "fp32", "cuda")
    there.module.load_state_dict(here.module.state_dict())
    found, grad = [], None
    for work in (here, there):
        x = here.inputs[0].detach().to(work.inputs[0].device).requires_grad_()
        y = as_output(work.module(x)).y
        grad = torch.randn_like(y) if grad is None else grad.to(y.device)
        y.backward(grad)
        found.append({name: part.grad for name, part in work.module.named_parameters()} | {"x": x.grad})
    for name, expected in found[0].items():
        received = found[1][name]
        assert (received is None) == (expected is None), name
        if expected is not None and expected.norm() > 1e-4:  # a bias of keys moves nothing: rounding alone
            assert (received.cpu() - expected).norm() <= 5e-3 * expected.norm(), name


@pytest.mark.parametrize(("method", "impl"), METHODS, ids=lambda value: getattr(value, "name", value))
def test_allocator_peak_is_near_the_tracers(method, impl):
    if impl == "graph":
        pytest.skip("what a recorded step needs is allocated once, before the call that is measured")
    params = method.params()
    dims = Dims(seq_len=4096, num_layers=method.fewest_layers(params),
                causal=method.causal[0] if method.causal else False, position=method.positions[0])  # fmt: skip
    skip_unless_supported(method, impl, dims, params)
    work = prepare(method, dims, params, impl, "forward", "fp32", "cuda")
    work.call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.call()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    traced = trace(method, dims, params, impl, "forward", "fp32").peak_bytes
    assert measured >= 0.5 * traced
    assert measured <= 1.5 * traced + 2**21
