"""What a bounded state promises: a token, and a stream, cost the same however long the context is."""

from __future__ import annotations

import pytest

from ctxbench.cost import big_o, total
from ctxbench.cost.trace import trace
from ctxbench.method import Dims, Method, Params
from ctxbench.registry import discover

METHODS = list(discover())
FULL, FURTHER, MEMORY = 16384, 24576, 512


def impl_of(method: Method) -> str:
    """The fast path where there is one."""
    names = [impl.name for impl in method.impls]
    return "blocked" if "blocked" in names else method.oracle


def cost(method: Method, mode: str):
    found = method.cost_of(impl_of(method), mode, method.causal[0], method.positions[0], method.params())
    assert found is not None
    return found


def small(method: Method) -> tuple[Params, Dims]:
    """Narrow sizes, and memories that are full after FULL tokens."""
    params = method.params()
    if method.memory_parameter:
        name = method.memory_parameter
        params = params.replace(**{name: min(getattr(params, name), MEMORY)})
    sizes = Dims(
        FULL, d_model=64, num_heads=4, d_ff=128, causal=True, position=method.positions[0],
        num_layers=method.fewest_layers(params),
    )  # fmt: skip
    return params, sizes


DECODING = [method for method in METHODS if "decode" in method.modes]
BOUNDED = [method for method in DECODING if big_o(cost(method, "decode").state_bytes) == "O(1)"]


@pytest.mark.parametrize("method", DECODING, ids=lambda method: method.name)
def test_a_token_costs_what_its_state_holds(method: Method) -> None:
    found = cost(method, "decode")
    assert big_o(found.state_bytes) in ("O(1)", "O(T)")
    if big_o(found.state_bytes) == "O(1)":
        assert big_o(total(found.flops)) == "O(1)"


@pytest.mark.parametrize("method", BOUNDED, ids=lambda method: method.name)
def test_a_stream_through_a_bounded_state_has_a_flat_peak(method: Method) -> None:
    params, sizes = small(method)
    near, far = (
        trace(method, sizes.replace(seq_len=length), params, impl_of(method), "stream") for length in (FULL, FURTHER)
    )
    assert far.peak_bytes == near.peak_bytes
    assert far.state_bytes == near.state_bytes
    assert far.flops == pytest.approx(1.5 * near.flops, rel=0.1)


@pytest.mark.parametrize("method", BOUNDED, ids=lambda method: method.name)
def test_a_token_after_a_bounded_state_is_counted_the_same_at_any_context(method: Method) -> None:
    params, sizes = small(method)
    near, far = (
        trace(method, sizes.replace(seq_len=length), params, impl_of(method), "decode") for length in (FULL, FURTHER)
    )
    assert (far.flops, far.peak_bytes, far.state_bytes) == (near.flops, near.peak_bytes, near.state_bytes)


def test_most_methods_have_a_bounded_state() -> None:
    assert {"longformer", "transformer_xl", "memory_bank"} <= {method.name for method in BOUNDED}
