"""What one call is, in each mode: the same definition for the tracer, the gate and every meter. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ctxbench.method import Dims, Method, Output, Params

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def as_output(result: Any) -> Output:
    """Accept a bare tensor from a module that carries no state."""
    return result if isinstance(result, Output) else Output(*result) if isinstance(result, tuple) else Output(result)


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of a state, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def state_bytes(state: Any) -> int:
    """Bytes that a state keeps alive: whole storages, each once.

    A slice of a longer tensor keeps that tensor alive, so a bounded state must hold copies, not views.
    """
    storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors(state))}
    return sum(storages.values())


def map_state(function: Callable[[torch.Tensor], torch.Tensor], state: Any) -> Any:
    """Apply a function to every tensor of a state."""
    return pytree.tree_map_only(torch.Tensor, function, state)


@dataclass
class Workload:
    """A built module with everything a call needs; ``call`` is what is timed, traced and counted.

    ``inputs`` are rotated, so that no call sees the values of the one before it.
    """

    module: torch.nn.Module
    mode: str
    inputs: list[torch.Tensor]
    chunk: int
    state: Any = None
    grad: torch.Tensor | None = None
    count: int = field(default=0)

    def call(self) -> torch.Tensor:
        """Run one call on the next input; returns ``y`` of its last tokens: ``[B, T or chunk or 1, d_model]``."""
        x = self.inputs[self.count % len(self.inputs)]
        self.count += 1
        if self.mode == "train":
            self.forget_gradients()
            y: torch.Tensor = as_output(self.module(x)).y
            y.backward(self.grad)
            return y
        with torch.no_grad():
            if self.mode == "forward":
                return as_output(self.module(x)).y
            if self.mode == "decode":
                return as_output(self.module(x, self.state)).y
            state = self.module.init_state(x.shape[0])  # type: ignore[operator]
            for chunk in x.split(self.chunk, dim=1):
                y, state = as_output(self.module(chunk, state))
            return y

    def forget_gradients(self) -> None:
        """Drop all gradients, so that every call allocates them anew."""
        self.module.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None

    def tokens(self) -> int:
        """Tokens a call consumes, batch included."""
        return int(self.inputs[0].shape[0] * self.inputs[0].shape[1])


def prepare(
    method: Method, dims: Dims, params: Params, impl: str, mode: str, dtype: str, device: str = "cpu",
    seed: int = 0, rotate: int = 3,
) -> Workload:  # fmt: skip
    """Build the module (weights from ``seed``) and its inputs (standard normal, from ``seed + 1``)."""
    torch.manual_seed(seed)
    module = method.make(dims, params, impl, device, DTYPES[dtype]).train(mode == "train")
    torch.manual_seed(seed + 1)
    length = 1 if mode == "decode" else dims.seq_len
    shape = (dims.batch_size, length, dims.d_model)
    inputs = [torch.randn(shape, device=device, dtype=DTYPES[dtype]) for _ in range(rotate)]
    work = Workload(module, mode, inputs, method.segment_len(params))
    if mode == "train":
        for x in inputs:
            x.requires_grad_()
        work.grad = torch.randn(shape, device=device, dtype=DTYPES[dtype])
    if mode == "decode":
        with torch.no_grad():
            work.state = module.state_at(dims.batch_size, dims.seq_len)
    return work


def num_parameters(module: torch.nn.Module) -> int:
    """Trainable elements."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
