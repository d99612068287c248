"""The tracer: peaks of known allocation patterns, any length at no cost, and what it cannot follow."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ctxbench.cost.trace import Meter, trace
from ctxbench.method import Dims, Method, Output, Params
from ctxbench.registry import discover

KIB = 256  # floats in a KiB


def peak(function, *sizes: int) -> int:
    """Peak in KiB above the operands, which are ``sizes`` KiB large."""
    with FakeTensorMode():
        operands = [torch.empty(size * KIB) for size in sizes]
        meter = Meter()
        meter.ignore(operands)
        with meter:
            y = function(*operands)
        del y
    assert meter.peak % 1024 == 0
    return meter.peak // 1024


def chain(x):
    for _ in range(10):
        x = x + 1
    return x


def hold(x):
    return [x + i for i in range(10)]


def release(x):
    a = torch.cat([x, x, x])
    b = a.sum()
    del a
    return torch.cat([x, x]) + b * 0


def in_place(x):
    y = x + 1
    for _ in range(5):
        y += 1
    return y


PATTERNS = {
    "a view": (lambda x: x.view(-1, KIB).T[1:], [4], 0),
    "one result": (lambda x: x + 1, [4], 4),
    "a chain keeps two": (chain, [4], 8),
    "a list keeps all": (hold, [4], 40),
    "in place keeps one": (in_place, [4], 4),
    "written into the operand": (lambda x: x.add_(1), [4], 0),
    "a view keeps its storage": (lambda x: torch.cat([x, x])[:KIB] + 0, [4], 9),
    "expand takes nothing": (lambda x: x.unsqueeze(0).expand(100, -1), [4], 0),
    "split takes nothing": (lambda x: x.split(KIB), [4], 0),
    "two operands": (lambda x, y: x + y, [4, 4], 4),
}


@pytest.mark.parametrize(("function", "sizes", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_peaks_of_known_patterns(function, sizes, expected: int) -> None:
    assert peak(function, *sizes) == expected


def test_what_is_released_does_not_count_twice() -> None:
    """12 KiB, freed; then 8 and 8 with scalars beside them."""
    with FakeTensorMode():
        x = torch.empty(4 * KIB)
        meter = Meter()
        meter.ignore(x)
        with meter:
            release(x)
    assert 16 * 1024 <= meter.peak <= 16 * 1024 + 16


def test_the_backward_pass_is_followed() -> None:
    """exp saves its result; the peak is that result, the sum's gradient being an expanded scalar, and the gradient."""
    with FakeTensorMode():
        x = torch.empty(4 * KIB, requires_grad=True)
        meter = Meter()
        meter.ignore(x)
        with meter:
            x.exp().sum().backward()
    assert 8 * 1024 <= meter.peak <= 8 * 1024 + 64


def test_the_meter_sees_the_same_on_real_tensors() -> None:
    def call(x, weight):
        return (x @ weight).softmax(dim=1) @ weight.T

    def run(mode) -> Meter:
        with mode:
            x, weight = torch.randn(64, 32), torch.randn(32, 48)
            meter = Meter()
            meter.ignore(x, weight)
            with meter:
                call(x, weight)
        return meter

    fake, real = run(FakeTensorMode()), run(torch.no_grad())
    assert (fake.peak, fake.flops, fake.moved) == (real.peak, real.flops, real.moved)


def test_checkpointing_trades_flops_for_memory() -> None:
    class Deep(nn.Module):
        def __init__(self, saves: bool):
            super().__init__()
            self.saves = saves
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6)
            )

        def forward(self, x):
            for block in self.blocks:
                x = x + (block(x) if self.saves else checkpoint(block, x, use_reentrant=False))
            return x

    def traced(saves: bool):
        method = Method("deep", build=lambda dims, params, impl, device, dtype: Deep(saves).to(device, dtype))
        return trace(method, Dims(seq_len=4096, d_model=32), Params(), "reference", "train")

    plain, again = traced(True), traced(False)
    assert again.peak_bytes < plain.peak_bytes / 2
    # Once more forward; the last product of a block is not needed to compute its gradients.
    assert plain.flops < again.flops <= plain.flops * 4 // 3


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    method = Method("tied", build=lambda dims, params, impl, device, dtype: Tied().to(device, dtype))
    assert (
        trace(method, Dims(seq_len=8, d_model=16), Params(), "reference", dtype="bf16").num_parameters == 16 * 16 + 32
    )


def test_state_bytes_of_a_cache() -> None:
    method = discover()["dense"]
    for mode in ("stream", "decode"):
        seen = trace(method, Dims(seq_len=1000, batch_size=3), method.params(), "blocked", mode, "bf16")
        assert seen.state_bytes == 2 * 3 * 1000 * 256 * 2


class ByValue(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x, state=None):
        kept = x[x > 0]
        return Output(x + self.map(x) + kept.sum() * 0)


class ByBranch(ByValue):
    def forward(self, x, state=None):
        return Output(x if x.sum() > 0 else self.map(x))


@pytest.mark.parametrize("kind", [ByValue, ByBranch])
def test_shapes_that_depend_on_values_are_reported_with_their_operator(kind) -> None:
    method = Method("m", build=lambda dims, params, impl, device, dtype: kind(dims.d_model).to(device, dtype))
    seen = trace(method, Dims(seq_len=16, d_model=16), Params(), "reference")
    assert "aten." in seen.untraceable


def test_a_mistake_of_the_module_is_raised_not_hidden_and_not_logged(caplog) -> None:
    method = Method("m", build=lambda dims, params, impl, device, dtype: nn.Linear(3, 3).to(device, dtype))
    with pytest.raises(RuntimeError, match="reduction dim"):
        trace(method, Dims(seq_len=16, d_model=16), Params(), "reference")
    assert not caplog.records


LONG = """
import resource
from ctxbench.cost.trace import trace
from ctxbench.method import Dims
from ctxbench.registry import discover
method = discover()["dense"]
trace(method, Dims(seq_len=64), method.params(), "blocked")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for impl in ("reference", "blocked"):
    for mode in ("forward", "train"):
        seen = trace(method, Dims(seq_len=131072), method.params(), impl, mode)
        assert seen.peak_bytes > 2**30 and not seen.untraceable
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_128k_tokens_take_no_memory() -> None:
    """The reference would need 544 GiB."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500e6
