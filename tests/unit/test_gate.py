"""The gate passes what is right and names what is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ctxbench.cell import Cell
from ctxbench.measure.gate import run_gate
from ctxbench.measure.specimen import LONGEST, Specimen
from ctxbench.method import Dims, Impl, Method, Output, Params, Support, no, param
from ctxbench.registry import reload
from ctxbench.rows import Gate

DENSE = reload("ctxbench.implementations.dense")


@dataclass(frozen=True)
class WindowParams(Params):
    window: int = param(8, "visible keys, the query included", unit="tokens", low=1)


class Window(nn.Module):
    """A causal window of running means behind a projection: small, exact, with a true reach."""

    def __init__(self, dims: Dims, window: int):
        super().__init__()
        self.value, self.window = nn.Linear(dims.d_model, dims.d_model), window

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        T = values.shape[1]
        far = torch.arange(T, device=values.device)
        visible = (far[:, None] >= far) & (far[:, None] < far + self.window)
        weights = visible.to(values.dtype)
        return weights @ values / weights.sum(1, keepdim=True)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.mean(self.value(x))


class Summed(Window):
    """The same by a sum over shifts: another order of the same additions."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        shifted = [nn.functional.pad(values, (0, 0, i, 0))[:, : values.shape[1]] for i in range(self.window)]
        counts = torch.arange(1, values.shape[1] + 1).clamp(max=self.window).to(values.dtype)
        return sum(shifted) / counts[:, None]


class Future(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + 0.001 * x.mean(1, keepdim=True)


class Mixed(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + 0.001 * x.mean(0, keepdim=True)


class Kept(Window):
    """Keeps the output for every shape it has seen."""

    def forward(self, x: torch.Tensor) -> Any:
        if not hasattr(self, "kept"):
            self.kept = super().forward(x).detach()
        return self.kept


class Stateful(Window):
    def forward(self, x: torch.Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) + 0.01 * self.calls


class Remembers(Window):
    """Keeps its last output on the module, without any use for it."""

    def forward(self, x: torch.Tensor) -> Any:
        self.last = super().forward(x)
        return self.last


class Pooled(Window):
    """Looks ahead, but never out of a block of 16."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        blocks = nn.functional.pad(values, (0, 0, 0, -values.shape[1] % 16)).unflatten(1, (-1, 16))
        spread = blocks.mean(2, keepdim=True).expand_as(blocks).flatten(1, 2)
        return spread[:, : values.shape[1]]


class Wider(Window):
    def __init__(self, dims: Dims, window: int):
        super().__init__(dims, window + 1)


class Narrower(Window):
    def __init__(self, dims: Dims, window: int):
        super().__init__(dims, window - 1)


class Detached(Window):
    """The right output with a wrong gradient."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return super().mean(values.detach() + 0 * values)


class Coarse(Window):
    """Computes in half precision inside."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return super().mean(values.bfloat16()).to(values.dtype)


class Wrong(Window):
    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return 1.001 * super().mean(values)


class Shorter(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x)[:, 1:]


class Promoted(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).double()


class NotANumber(Window):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return torch.where(torch.arange(x.shape[1])[:, None] == 3, torch.nan, y)


class Overwriting(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return x.add_(super().forward(x))


class Text(Window):
    def forward(self, x: torch.Tensor) -> Any:
        return Output("y")


class Renamed(Window):
    def __init__(self, dims: Dims, window: int):
        super().__init__(dims, window)
        self.extra = nn.Linear(2, 2)


KINDS = {kind.__name__: kind for kind in Window.__subclasses__()}


def build(dims: Dims, params: WindowParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    return KINDS.get(impl, Window)(dims, params.window).to(device, dtype)


def window_method(**changes: Any) -> Method:
    fields: dict[str, Any] = {
        "name": "window",
        "build": build,
        "params": WindowParams,
        "memory_parameter": "window",
        "causal": (True, False),
        "impls": (Impl("reference"), *(Impl(name) for name in KINDS)),
        "reach": lambda dims, params, i: range(max(0, i - params.window + 1), i + 1),
    }
    return Method(**{**fields, **changes})


def gate(impl: str, method: Method | None = None, **changes: Any) -> Gate:
    chosen = method or window_method()
    fields = {"seq_len": 200, "d_model": 16, "num_heads": 2, "d_ff": 0, **changes}
    return run_gate(chosen, Cell(method=chosen.name, impl=impl, **fields))


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("impl", ["reference", "Summed"])
def test_a_sound_impl_passes(impl: str, dtype: str, mode: str):
    seen = gate(impl, dtype=dtype, mode=mode)
    assert seen.ok, seen.message
    assert set(seen.probes.values()) <= {"passed", "not claimed"}
    if impl != "reference":
        assert seen.probes["agreement"] == "passed"
        assert 0 <= seen.error <= seen.tolerance


@pytest.mark.parametrize(
    ("impl", "probe", "words"),
    [
        ("Future", "causality", "earlier outputs"),
        ("Future", "receptive_field", "outside its reach"),
        ("Pooled", "causality", "earlier outputs"),
        ("Mixed", "batch_independence", "batch axis"),
        ("Kept", "fresh", "the same output"),
        ("Stateful", "state", "second call"),
        ("Wider", "receptive_field", "outside its reach"),
        ("Narrower", "receptive_field", "does not depend on input"),
        ("Wrong", "agreement", "away from the oracle"),
        ("Coarse", "agreement", "away from the oracle"),
        ("Renamed", "agreement", "weights are not those of reference"),
        ("Shorter", "output", "accepted: (2, 101, 16)"),
        ("Promoted", "output", "accepted: torch.float32"),
        ("NotANumber", "output", "NaN or infinite"),
        ("Text", "output", "returned str"),
        ("Overwriting", "output", "wrote to its input"),
    ],
)
def test_a_fault_fails_its_probe_and_is_explained(impl: str, probe: str, words: str):
    seen = gate(impl)
    assert not seen.ok
    assert seen.probes[probe] == "failed"
    assert words in seen.message


def test_a_wrong_gradient_is_only_seen_where_gradients_are_measured():
    assert gate("Detached", window_method(reach=None), mode="forward").ok
    seen = gate("Detached", window_method(reach=None), mode="train")
    assert not seen.ok
    assert "gradient" in seen.message


def test_what_is_not_claimed_is_not_probed():
    plain = window_method(causal=(), reach=None, impls=(Impl("Future"),))
    seen = gate("Future", plain)
    assert seen.ok
    assert seen.probes["causality"] == "not claimed"
    assert seen.probes["receptive_field"] == "not claimed"
    assert seen.probes["agreement"] == "not claimed"
    assert "only impl" in seen.message


def test_an_impl_without_a_backward_pass_is_not_probed_along_it():
    method = window_method(impls=(Impl("reference"), Impl("Summed", modes=("forward",))))
    seen = gate("Summed", method)
    assert seen.ok
    assert seen.probes["receptive_field"] == "not claimed"


def test_a_bidirectional_cell_claims_no_causality():
    method = window_method(reach=None)
    assert gate("reference", method, causal=False).probes["causality"] == "not claimed"


class TestLiteralSketches:
    def method(self, **defects: str) -> Method:
        return window_method(impls=(Impl("reference"), Impl("Future", defects=defects), Impl("Mixed", defects=defects)))

    def test_pass_when_exactly_the_declared_probes_fail(self):
        seen = gate("Future", self.method(causality="sees the mean", receptive_field="sees everything"))
        assert seen.ok, seen.message
        assert seen.probes["causality"] == seen.probes["receptive_field"] == "failed"
        assert seen.probes["agreement"] == "not claimed"
        assert "as declared" in seen.message

    def test_fail_when_a_probe_that_was_not_declared_fails(self):
        seen = gate("Future", self.method(causality="sees the mean"))
        assert not seen.ok
        assert "receptive_field: output" in seen.message

    def test_fail_when_a_declared_probe_passes(self):
        declared = self.method(causality="sees the mean", receptive_field="all", batch_independence="leaks")
        seen = gate("Future", declared)
        assert not seen.ok
        assert "batch_independence: declared as a defect (leaks), but the probe passed" in seen.message

    def test_may_declare_that_they_keep_tensors_on_the_module(self):
        declared = Impl("Remembers", defects={"state": "the last output lives on the module"})
        seen = gate("Remembers", window_method(impls=(Impl("reference"), declared)))
        assert seen.ok, seen.message
        assert seen.probes["state"] == "failed"

    def test_may_declare_that_they_compute_something_else(self):
        declared = self.method(causality="mean", receptive_field="all", agreement="adds a mean")
        assert gate("Future", declared).probes["agreement"] == "failed"


@pytest.mark.parametrize("mode", ["forward", "train", "stream", "decode"])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_dense_attention_passes_in_every_mode(impl: str, mode: str):
    seen = gate(impl, DENSE, mode=mode, d_model=32, d_ff=64)
    assert seen.ok, seen.message
    assert seen.probes["state"] == "passed"


def test_a_state_that_loses_tokens_is_found():
    def forgetful(*arguments: Any) -> nn.Module:
        module = DENSE.make(*arguments)
        forward = module.forward

        def forget(x: torch.Tensor, state: Any = None) -> Output:
            y, after = forward(x, state)
            return Output(y, tuple(type(layer)(layer.k[:, :, 1:], layer.v[:, :, 1:]) for layer in after or ()))

        module.forward = forget
        return module

    method = Method(name="forgetful", build=forgetful, modes=("forward", "stream"), causal=(True,))
    seen = gate("reference", method, mode="stream", d_model=32)
    assert seen.probes["state"] == "failed"
    assert "differs from the whole sequence" in seen.message


class TestSpecimen:
    def cell(self, **fields: Any) -> Cell:
        return Cell(method="window", impl="reference", d_model=16, num_heads=2, **fields)

    def test_is_longer_than_the_memory_and_ends_off_a_boundary(self):
        specimen = Specimen.of(window_method(), self.cell(seq_len=8192, memory=512), 0)
        assert specimen.length > 512
        assert specimen.length % 2 == 1
        assert specimen.params.window == 512

    def test_is_never_longer_than_the_cell(self):
        assert Specimen.of(window_method(), self.cell(seq_len=48, memory=512), 0).length == 48

    def test_takes_a_smaller_memory_where_the_cell_s_own_would_be_too_long_to_bind(self):
        specimen = Specimen.of(window_method(), self.cell(seq_len=2**17, memory=4096), 0)
        assert specimen.params.window < specimen.length <= LONGEST
        assert "window = " in specimen.note

    def test_respects_the_lengths_a_method_can_have(self):
        def multiples(dims: Dims, params: Params, mode: str) -> Support | bool:
            return True if dims.seq_len % 64 == 0 else no("a multiple of 64 is needed")

        specimen = Specimen.of(window_method(support=multiples), self.cell(seq_len=8192, memory=100), 0)
        assert specimen.length % 64 == 0
        assert specimen.length > 64

    @pytest.mark.parametrize("mode", ["stream", "decode"])
    def test_continues_in_pieces_that_cover_the_sequence(self, mode: str):
        specimen = Specimen.of(DENSE, Cell(method="dense", impl="reference", mode=mode, seq_len=8192), 0)
        assert sum(specimen.pieces()) == specimen.length
        assert len(specimen.pieces()) > 1
        assert specimen.pieces()[-1] == 1 or mode == "stream"


def test_a_sound_impl_that_raises_is_not_a_failed_gate():
    def fails(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        gate("reference", window_method(build=fails))


def test_a_gate_stands_for_a_longer_cell_only_where_it_computed_the_same():
    cell = {"method": "window", "impl": "Summed", "d_model": 16, "num_heads": 2, "d_ff": 0}
    short, long = (run_gate(window_method(), Cell(seq_len=length, **cell)) for length in (50, 400))
    assert short.ok
    assert long.ok
    assert short.specimen != long.specimen  # at 50 tokens the specimen is shorter
    built: list[str] = []

    def counting(dims: Dims, params: WindowParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
        built.append(impl)
        return build(dims, params, impl, device, dtype)

    def again(passed: Gate, **changes: Any) -> Gate:
        built.clear()
        return run_gate(window_method(build=counting), Cell(**{"seq_len": 800, **cell, **changes}), passed=[passed])

    assert again(long).stands_for
    assert not built
    assert again(long).error == long.error
    wrong = Gate(ok=False, specimen=long.specimen)
    others = [{"dtype": "bf16"}, {"mode": "train"}, {"memory": 4}, {"num_heads": 4}, {"causal": False}, {"seq_len": 50}]
    for passed, changes in [(short, {}), (wrong, {}), *((long, change) for change in others)]:
        assert not again(passed, **changes).stands_for
        assert built
