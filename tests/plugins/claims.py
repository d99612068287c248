"""Pairs of methods: one whose declarations are wrong in one respect, and a twin for which the same declarations hold.

``PAIRS`` maps the name of a flaw to the wrong method, its twin and the term of the audit that must answer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sympy import Integer, Max, Min
from torch import nn

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, T, d, e
from ctxbench.cost.symbols import param as symbol
from ctxbench.method import Method, Output, Params, param

_spec = importlib.util.spec_from_file_location("flawed_mixers", Path(__file__).with_name("flawed.py"))
assert _spec is not None
assert _spec.loader is not None
flawed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(flawed)

W = symbol("window")
WEIGHTS = 4 * d * d + 4 * d  # four linear maps with biases


@dataclasses.dataclass(frozen=True)
class Window(Params):
    """A window that the kit makes small."""

    window: int = param(256, "keys a token sees, itself included", unit="tokens", low=1)


def causal_reach(dims, params, i):
    return range(i + 1)


def window_reach(dims, params, i):
    return range(max(0, i + 1 - params.window), i + 1)


class Attention(nn.Module):
    """Causal attention of one head in a window; all scores are kept. Correct in every respect."""

    def __init__(self, d_model: int, window: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d_model, d_model) for _ in range(4))
        self.window = window

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        i = torch.arange(x.shape[1], device=x.device)
        gap = i[:, None] - i
        return (gap >= 0) & (gap < self.window)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        return self.out(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        weights = scores.masked_fill(~self.seen(x), -torch.inf).softmax(-1)
        return x + self.project(weights @ self.v(x))


class OneKeyMore(Attention):
    def seen(self, x):
        i = torch.arange(x.shape[1], device=x.device)
        gap = i[:, None] - i
        return (gap >= 0) & (gap <= self.window)


class NoOutputProjection(Attention):
    def project(self, y):
        return y


class OverTheBatch(nn.Module):
    """torch's attention with its default axis order on batch-first tensors."""

    batch_first = False

    def __init__(self, d_model: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, 2, batch_first=self.batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.batch_first else None
        )
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class OverTheTokens(OverTheBatch):
    batch_first = True


class HiddenSquare(flawed.Mixer):
    """The running mean as a product with a T x T matrix that nobody counts as one: sums over a broadcast."""

    def mix(self, x):
        i = torch.arange(x.shape[1], device=x.device)
        ramp = (i[:, None] >= i).to(x.dtype)
        return super().mix(x) * (ramp / ramp.sum(1, keepdim=True)).sum(1)[:, None]


class HiddenProduct(flawed.Mixer):
    """The running mean by a T x T product."""

    def mix(self, x):
        i = torch.arange(x.shape[1], device=x.device)
        ramp = (i[:, None] >= i).to(x.dtype)
        return (ramp / ramp.sum(1, keepdim=True)) @ x


class PoolsTheCurrentBlock(flawed.Mixer):
    """Means of blocks of four; a token reads that of its own block, which holds later tokens."""

    delay = 0

    def mix(self, x):
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % 4))
        means = padded.unflatten(1, (-1, 4)).mean(2)
        earlier = F.pad(means, (0, 0, self.delay, 0))[:, : means.shape[1]]
        return super().mix(x) + earlier.repeat_interleave(4, dim=1)[:, : x.shape[1]]


class PoolsTheBlockBefore(PoolsTheCurrentBlock):
    delay = 1


class Memoises(flawed.Mixer):
    """Answers by shape: the second input of a shape gets the first one's output."""

    def __init__(self, d_model):
        super().__init__(d_model)
        answers: dict[tuple[int, ...], torch.Tensor] = {}
        object.__setattr__(self, "lookup", lambda x, compute: answers.setdefault(tuple(x.shape), compute()))

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        return self.lookup(x, lambda: super(Memoises, self).forward(x))


class MemoisesTheMask(flawed.Mixer):
    """The harmless kind: what is kept depends on the length alone."""

    def __init__(self, d_model):
        super().__init__(d_model)
        counts: dict[int, list[int]] = {}
        object.__setattr__(self, "counts", lambda n: counts.setdefault(n, list(range(1, n + 1))))

    def mix(self, x):
        return x.cumsum(1) / torch.tensor(self.counts(x.shape[1]), dtype=x.dtype, device=x.device).unsqueeze(1)


class Streams(flawed.Mixer):
    """The running mean, with the sum and the number of tokens as its state."""

    def forward(self, x, state=None):
        if state is None:
            return Output(super().forward(x))
        total, count = state
        sums = total[:, None] + x.cumsum(1)
        counts = count + torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        y = x + self.map(sums / counts[:, None])
        return Output(y, (sums[:, -1].clone(), counts[-1:].clone()))

    def init_state(self, batch_size):
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size, context):
        weight = self.map.weight
        return weight.new_zeros(batch_size, weight.shape[0]), weight.new_full((1,), context)


class KeepsEveryToken(flawed.Mixer):
    """The same stream, with all tokens as its state."""

    def forward(self, x, state=None):
        if state is None:
            return Output(super().forward(x))
        seen = torch.cat((state, x), dim=1)
        y = x + self.map(self.mix(seen)[:, state.shape[1] :])
        return Output(y, seen)

    def init_state(self, batch_size):
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size, context):
        weight = self.map.weight
        return weight.new_zeros(batch_size, context, weight.shape[0])


class ForgetsItsState(Streams):
    def forward(self, x, state=None):
        _, after = super().forward(x, state)
        return Output(flawed.Mixer.forward(self, x), after)


def mixer_cost(impl, mode, causal, position, params) -> Cost:
    """One linear map; a state of the sum of all tokens and their number."""
    flops = {"map": (3 if mode == "train" else 1) * 2 * B * T * d * d}
    return Cost(flops, flops, d * d + d, state_bytes=e * (B * d + 1))


def attention_cost(impl, mode, causal, position, params) -> Cost:
    """Four projections and all pairs, whatever the window hides."""
    factor = 3 if mode == "train" else 1
    flops = {"projections": factor * 8 * B * T * d * d, "attention": factor * 4 * B * T * T * d}
    pairs = Min(T, W) * (Min(T, W) + 1) / 2 + Max(0, T - W) * W
    algorithmic = {"projections": flops["projections"], "attention": factor * 4 * B * pairs * d}
    return Cost(algorithmic, flops, WEIGHTS)


def changed(cost: Callable[..., Cost], **fields: Callable[[Cost, str], object]) -> Callable[..., Cost]:
    """The same formulas with some fields replaced; each field is a function of the right cost and the mode."""

    def replaced(impl, mode, causal, position, params):
        right = cost(impl, mode, causal, position, params)
        return dataclasses.replace(right, **{name: change(right, mode) for name, change in fields.items()})

    return replaced


def mixer(kind: type[nn.Module], **fields) -> Method:
    """A method of one mixer with the right formulas and reach unless others are given."""
    return flawed.method_of(kind, **{"cost": mixer_cost, "reach": causal_reach, **fields})


def stream(kind: type[nn.Module], **fields) -> Method:
    """A mixer that also streams."""
    return mixer(kind, modes=("forward", "stream"), **fields)


def attention(kind: type[nn.Module], **fields) -> Method:
    """A method of one windowed attention."""

    def build(dims, params, impl, device, dtype):
        return kind(dims.d_model, params.window).to(device, dtype)

    given = {"build": build, "params": Window, "causal": (True,), "cost": attention_cost, "reach": window_reach}
    return Method(**{"name": "flawed", **given, **fields})


def mixer_peak(cost: Cost, mode: str) -> object:
    """Two sequences and the counts: sum and mean, mean and map, map and result."""
    return 2 * B * T * d * e + T * e if mode == "forward" else None


def plain(cost: Cost) -> dict[str, object]:
    """The forward terms of the mixer, whatever the mode."""
    return {"map": 2 * B * T * d * d}


bare = {"cost": None, "reach": None}
right = {"mixer": mixer(flawed.Mixer), "attention": attention(Attention), "stream": stream(Streams)}

PAIRS: dict[str, tuple[Method, Method, str]] = {
    "attention over the batch axis": (
        mixer(OverTheBatch, **bare), mixer(OverTheTokens, **bare), "batch independence",
    ),
    "hidden T x T temporary": (mixer(HiddenSquare), right["mixer"], "growth of peak memory"),
    "hidden T x T product": (mixer(HiddenProduct), right["mixer"], "growth of FLOPs"),
    "memoised output": (mixer(Memoises), mixer(MemoisesTheMask), "causality"),
    "future leak through pooling": (
        mixer(PoolsTheCurrentBlock), mixer(PoolsTheBlockBefore), "causality",
    ),
    "window off by one": (attention(OneKeyMore), right["attention"], "receptive field"),
    "state that grows": (stream(KeepsEveryToken), right["stream"], "state bytes"),
    "state that is forgotten": (stream(ForgetsItsState), right["stream"], "state and streaming"),
    "dropped projection": (attention(NoOutputProjection), right["attention"], "FLOPs"),
    "backward not counted": (
        mixer(flawed.Mixer, cost=changed(mixer_cost, flops=lambda cost, mode: plain(cost))), right["mixer"], "FLOPs",
    ),
    "random output": (mixer(flawed.IsRandom), right["mixer"], "determinism"),
    "input overwritten": (mixer(flawed.WritesItsInput), right["mixer"], "no side effects"),
    "reach claimed too small": (
        mixer(flawed.Mixer, reach=lambda dims, params, i: range(max(0, i - 3), i + 1)), right["mixer"],
        "receptive field",
    ),
    "biases not counted as parameters": (
        mixer(flawed.Mixer, cost=changed(mixer_cost, num_parameters=lambda cost, mode: d * d)), right["mixer"],
        "parameters",
    ),
    "tensors kept on the module": (mixer(flawed.KeepsTensors), right["mixer"], "no side effects"),
    "weights that nothing uses": (
        mixer(flawed.HasDeadWeights, cost=changed(mixer_cost, num_parameters=lambda cost, mode: 2 * (d * d + d))),
        right["mixer"], "gradients",
    ),
    "wrong gradient": (mixer(flawed.HasAWrongBackward), right["mixer"], "gradients"),
    "peak claimed too low": (
        mixer(flawed.Mixer, cost=changed(mixer_cost, peak_bytes=lambda cost, mode: B * T * d * e)),
        mixer(flawed.Mixer, cost=changed(mixer_cost, peak_bytes=mixer_peak)), "peak memory",
    ),
    "state not declared": (
        stream(Streams, cost=changed(mixer_cost, state_bytes=lambda cost, mode: Integer(0))), right["stream"],
        "state bytes",
    ),
}  # fmt: skip

METHOD = right["mixer"]
