"""Peaks of known size: the allocator's meter to the byte, the resident one within max(2 MiB, 3 %)."""

from pathlib import Path

import pytest
import torch

from ctxbench.cell import Cell
from ctxbench.measure import allocator, flops, memory
from ctxbench.method import Dims, Impl, Method
from ctxbench.registry import discover
from ctxbench.run.client import Server
from ctxbench.run.tasks import Memory, Task

MIB = 2**20
PLUGIN = """
from dataclasses import dataclass
import torch
from torch import nn
from ctxbench.method import Method, Params, param

@dataclass(frozen=True)
class Sizes(Params):
    mib: int = param(1, "scratch", unit="MiB", low=1)
    by_value: bool = param(False, "whether a shape depends on a value")
    steps: int = param(0, "operators that take no memory")

class Layer(nn.Module):
    def __init__(self, d_model, params):
        super().__init__()
        self.linear, self.params = nn.Linear(d_model, d_model), params

    def forward(self, x):
        first = torch.ones(self.params.mib << 18)
        second = first.clone()
        del first
        one = second[:1]
        for _ in range(self.params.steps):
            one.relu_()
        if self.params.by_value:
            x = x[:, : x.shape[1] - x.new_zeros(3).nonzero().shape[0]]
        return self.linear(x) + second[0]

METHOD = Method(
    name="sized", params=Sizes, memory_parameter="mib",
    build=lambda dims, params, impl, device, dtype: Layer(dims.d_model, params).to(device, dtype),
)
"""


@pytest.fixture(scope="module")
def server():
    with Server("memory", threads=1) as server:
        yield server


@pytest.fixture
def measured(server: Server, tmp_path: Path):
    def measure(mib: int, expected_s: float | None = None, **params: object) -> Memory:
        plugin = tmp_path / "sized.py"
        plugin.write_text(PLUGIN)
        cell = Cell(
            method="sized", impl="reference", seq_len=512, d_model=64, num_heads=2, memory=mib, params=params, threads=1
        )
        task = Task(kind="memory", cell=cell, origin=f"plugin:{plugin}", expected_s=expected_s)
        outcome = server.submit(task, timeout_s=60)
        assert outcome.status == "ok", outcome
        return outcome.memory

    return measure


# first and second live together, up to 1 GiB; then second, the projection and the sum, which are less.
@pytest.mark.parametrize("mib", [1, 16, 128, 512])
def test_both_meters_find_a_known_peak(measured, mib: int):
    found = measured(mib)
    assert found.allocated == 2 * mib * MIB
    assert found.traced == 2 * mib * MIB
    assert memory.agree(found.allocated, found.resident), f"{found.allocated} and {found.resident}"
    assert found.warnings == []
    assert found.parameters == 64 * 64 + 64


def test_a_long_call_is_made_once_under_both_meters(measured):
    found = measured(32, expected_s=10.0)
    assert found.allocated == 64 * MIB
    assert memory.agree(found.allocated, found.resident)


def test_the_record_of_a_long_call_is_no_part_of_its_peak(measured):
    """Recording every operator took 30 MiB in calls of a few seconds."""
    found = measured(8, expected_s=10.0, steps=40_000)
    assert found.allocated == 16 * MIB
    assert memory.agree(found.allocated, found.resident), f"{found.allocated} and {found.resident}"


def test_a_short_cell_does_not_pay_for_what_libraries_take_once(server: Server):
    registry = discover()
    cell = Cell(method="segment_recurrent", impl="blocked", seq_len=1024, causal=True, threads=1)
    task = Task(kind="memory", cell=cell, origin=registry.entries["segment_recurrent"].origin)
    found = server.submit(task, timeout_s=60).memory
    assert abs(found.resident - found.allocated) < MIB


def test_what_cannot_be_traced_is_counted_on_real_tensors(measured):
    found = measured(2, by_value=True)
    assert found.traced is None
    assert found.allocated == 4 * MIB
    assert any(warning.startswith("untraceable") for warning in found.warnings)
    assert found.counted_flops == 2 * 512 * 64 * 64


@pytest.mark.parametrize(
    ("allocated", "resident", "answer"),
    [
        (10 * MIB, 12 * MIB, True), (10 * MIB, 13 * MIB, False), (1000 * MIB, 1029 * MIB, True),
        (1000 * MIB, 1031 * MIB, False), (10 * MIB, None, None),
    ],
)  # fmt: skip
def test_meters_agree_within_two_mebibytes_or_three_per_cent(allocated, resident, answer):
    assert memory.agree(allocated, resident) is answer


def takes_five_mebibytes() -> None:
    first = torch.empty(3 * MIB, dtype=torch.uint8)
    second = torch.empty(2 * MIB, dtype=torch.uint8)
    del first, second
    torch.empty(4 * MIB, dtype=torch.uint8)


def test_the_light_meter_works_with_this_torch():
    assert allocator.measure(takes_five_mebibytes) == (5 * MIB, "allocator events")


def test_the_public_meter_takes_over_and_sees_the_same(monkeypatch):
    monkeypatch.setattr(allocator, "_light_works", lambda: False)
    assert allocator.measure(takes_five_mebibytes) == (5 * MIB, "profiler events")


def test_the_meter_sees_scratch_inside_kernels_and_the_backward_pass():
    x = torch.randn(64, 1024, requires_grad=True)
    grad = torch.ones(64, 1024)
    forward, _ = allocator.measure(lambda: x.detach().logsumexp(1))
    both, _ = allocator.measure(lambda: x.exp().backward(grad))
    assert forward >= 64 * 1024 * 4
    assert both == 2 * 64 * 1024 * 4


class FakeEvent:
    def __init__(self, at: float, size: int, kind: str = "memory_alloc"):
        self.at, self.size, self._kind = at, size, kind

    def kind(self) -> str:
        return self._kind

    def cpu_memory_usage(self) -> int:
        return self.size

    def cpu_elapsed_us(self, other: "FakeEvent") -> float:
        return other.at - self.at


def test_events_of_several_threads_are_merged_in_time_order():
    main = [FakeEvent(0, 0, "mark"), FakeEvent(1, 100), FakeEvent(5, -100)]
    helper = [FakeEvent(2, 0, "push"), FakeEvent(3, 70), FakeEvent(4, -70), FakeEvent(6, 90)]
    assert allocator.peak(allocator.merge([main, helper])) == 170
    assert allocator.peak(allocator.merge([main, [FakeEvent(6, 90)]])) == 100


def test_a_kernel_without_a_resettable_mark_says_so(tmp_path):
    assert memory.high_water(lambda: None, tmp_path / "nowhere")[0] is None
    assert "high-water" in memory.high_water(lambda: None, tmp_path / "nowhere")[1]


def test_a_long_call_is_made_again_where_the_mark_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(memory, "high_water", lambda call: (None, "no mark"))
    found = memory.measure(takes_five_mebibytes, expected_s=10.0)
    assert (found.allocated, found.resident, found.reason) == (5 * MIB, None, "no mark")


@pytest.mark.parametrize(
    ("expected_s", "marks", "resident"),
    [(0.05, [5], 5), (0.5, [6], 6), (0.5, [9, 5], 5), (0.5, [9, 9], 9), (0.5, [1], 1), (10.0, [9], 9)],
)
def test_a_mark_that_may_hold_the_record_of_another_meter_is_taken_again(monkeypatch, expected_s, marks, resident):
    taken = iter(marks)
    monkeypatch.setattr(memory, "high_water", lambda call: (call() and None) or (next(taken) * MIB, ""))
    found = memory.measure(takes_five_mebibytes, expected_s=expected_s)
    assert (found.allocated, found.resident) == (5 * MIB, resident * MIB)
    assert next(taken, None) is None


def test_an_impl_that_fails_on_fake_tensors_is_untraceable_and_not_an_error():
    class Stubborn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    method = Method(name="stubborn", build=lambda *_: Stubborn(), impls=(Impl("reference"),))
    trace = flops.count(method, Dims(8, d_model=8, num_heads=2), method.params(), "reference", "forward", "fp32")
    assert trace.untraceable
