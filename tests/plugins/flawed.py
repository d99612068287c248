"""One flaw after another: modules that break exactly one law each. Built by ``flawed(NAME)``."""

from __future__ import annotations

import time

import torch
from torch import nn

from ctxbench.method import Dims, Impl, Method, Output, Params


class Mixer(nn.Module):
    """A causal running mean with a projection: correct in every respect."""

    def __init__(self, d_model: int):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).unsqueeze(1)
        return x.cumsum(1) / counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.map(self.mix(x))


class ReturnsWrongShape(Mixer):
    def forward(self, x):
        return super().forward(x)[:, :-1]


class ReturnsNan(Mixer):
    def forward(self, x):
        return super().forward(x) / torch.zeros((), dtype=x.dtype)


class ReturnsOtherDtype(Mixer):
    def forward(self, x):
        return super().forward(x).to(torch.float16)


class IsRandom(Mixer):
    def forward(self, x):
        return super().forward(x) + 0.01 * torch.randn_like(x)


class MixesTheBatch(Mixer):
    def forward(self, x):
        return super().forward(x) + x.mean(dim=0, keepdim=True)


class SeesTheFuture(Mixer):
    def mix(self, x):
        return super().mix(x) + 1e-3 * x.roll(-1, dims=1)


class IgnoresItsToken(Mixer):
    def forward(self, x):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return self.map(self.mix(before))


class FailsAtLengthOne(Mixer):
    def mix(self, x):
        return x * float("nan") if x.shape[1] == 1 else super().mix(x)


class NeedsContiguous(Mixer):
    def forward(self, x):
        return super().forward(x.view(-1).view(x.shape))


class WritesItsInput(Mixer):
    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            x.mul_(2)
        return y


class KeepsTensors(Mixer):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class CachesItsWeights(Mixer):
    def forward(self, x):
        if not hasattr(self, "kept"):
            object.__setattr__(self, "kept", (self.map.weight.detach().clone(),))
        return super().forward(x) + nn.functional.linear(x, self.kept[0])


class KeepsTheGraph(Mixer):
    def forward(self, x):
        y = super().forward(x) + (self.past if hasattr(self, "past") else 0)
        object.__setattr__(self, "past", y.mean(dim=(0, 1)))
        return y


class HasDeadWeights(Mixer):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.unused = nn.Linear(d_model, d_model)


class DetachesItsInput(Mixer):
    def forward(self, x):
        return self.map(self.mix(x.detach())) + 0 * x


class _DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class HasAWrongBackward(Mixer):
    def forward(self, x):
        return super().forward(_DoubledGradient.apply(x))


class StreamsWrongly(Mixer):
    """Forgets its state."""

    def forward(self, x, state=None):
        y = super().forward(x)
        return Output(y, None if state is None else state + x.sum(1))

    def init_state(self, batch_size):
        return torch.zeros(batch_size, self.map.in_features, dtype=self.map.weight.dtype)

    def state_at(self, batch_size, context):
        return self.init_state(batch_size)


class DeclaresAnotherState(StreamsWrongly):
    def state_at(self, batch_size, context):
        return self.init_state(batch_size).unsqueeze(0)


class WritesItsState(StreamsWrongly):
    def forward(self, x, state=None):
        y = Mixer.forward(self, x)
        if state is None:
            return Output(y)
        return Output(y, state.add_(x.sum(1)))


class Raises(Mixer):
    def forward(self, x):
        raise RuntimeError("planted in forward")


class Exits(Mixer):
    def forward(self, x):
        raise SystemExit(3)


class Hangs(Mixer):
    def forward(self, x):
        while True:
            time.sleep(0.01)


# What each flaw must be caught by.
CAUGHT_BY: dict[type[Mixer], str] = {
    ReturnsWrongShape: "shape_and_dtype",
    ReturnsNan: "shape_and_dtype",
    ReturnsOtherDtype: "shape_and_dtype",
    IsRandom: "determinism",
    MixesTheBatch: "batch_independence",
    SeesTheFuture: "causality",
    IgnoresItsToken: "causality",
    FailsAtLengthOne: "any_length",
    NeedsContiguous: "non_contiguous_input",
    WritesItsInput: "purity",
    KeepsTensors: "purity",
    CachesItsWeights: "two_training_steps",
    KeepsTheGraph: "two_training_steps",
    HasDeadWeights: "gradients_reach_everything",
    DetachesItsInput: "gradcheck",
    HasAWrongBackward: "gradcheck",
    StreamsWrongly: "streaming_equals_whole",
    DeclaresAnotherState: "state_shapes",
    WritesItsState: "purity",
    Raises: "shape_and_dtype",
    Exits: "shape_and_dtype",
}


def method_of(kind: type[Mixer], **fields) -> Method:
    """A method whose one impl is this module."""

    def build(dims: Dims, params: Params, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
        return kind(dims.d_model).to(device, dtype)

    modes = ("forward", "train", *(("stream",) if issubclass(kind, StreamsWrongly) else ()))
    return Method(**{"name": "flawed", "build": build, "modes": modes, "causal": (True,), **fields})


METHOD = method_of(Mixer, impls=(Impl("reference"),))
