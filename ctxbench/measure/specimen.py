"""A cell made small: the same method, impl, widths and dtype at a length where its parameters still bind."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ctxbench.cell import Cell
from ctxbench.method import Dims, Method, Params
from ctxbench.workload import DTYPES, as_output

LONGEST = 1200
LEAST = 64
ODD = 37  # beyond the last boundary, so that blocks and segments end incomplete
BATCH = 2
SMALL_MEMORY = (256, 128, 64, 32, 16, 8)
MOST_LAYERS = 2
PRODUCTS = 32  # roundings that two orders of the same sums may differ by


class NotClaimed(Exception):
    """The method makes no statement that a probe could check; the message says which is missing."""


@dataclass(frozen=True)
class Specimen:
    """What the gate builds and calls. ``note`` says what was made smaller than in the cell, for messages."""

    method: Method
    impl: str
    mode: str
    dims: Dims
    params: Params
    device: str
    dtype: str
    seed: int
    note: str = ""

    @classmethod
    def of(cls, method: Method, cell: Cell, seed: int) -> Specimen:
        """Shrink a cell: length, batch and depth always; the memory size only where it would not bind."""
        params, note = cell.params_for(method), ""
        layers = min(cell.num_layers, max(MOST_LAYERS, method.fewest_layers(params)))
        dims = cell.dims.replace(batch_size=BATCH, num_layers=layers)
        for smaller in _variants(method, params):
            length = _binding_length(method, smaller)
            if length <= LONGEST:
                if smaller != params:
                    note = f" with {method.memory_parameter} = {getattr(smaller, method.memory_parameter or '')}"
                params = smaller
                break
        first = cls(method, cell.impl, cell.mode, dims, params, cell.device, cell.dtype, seed, note)
        wanted = min(cell.seq_len, LONGEST, _binding_length(method, params))
        for length in _lengths(wanted, cell.seq_len):
            specimen = first._at(length)
            if specimen.supports():
                return specimen
        longest = first._at(cell.seq_len)
        return longest if longest.supports() else first._at(wanted)

    @property
    def length(self) -> int:
        """Tokens of the sequence the gate computes."""
        return self.dims.seq_len

    @property
    def key(self) -> str:
        """Name of all that the gate's result depends on, so that equal keys need one gate."""
        what = (self.method.name, self.impl, self.mode, self.dims, self.params)
        parts = (*what, self.device, self.dtype, self.seed, self.note)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def supports(self, mode: str = "", impl: str = "", dtype: str = "") -> bool:
        """Whether the method and the impl have this; by default: what the cell asks for."""
        mode, impl, dtype = mode or self.mode, impl or self.impl, dtype or self.dtype
        support = self.method.mode_support(mode, self.dims, self.params) and self.method.impl_support(
            self.method.impl(impl), mode, self.dims, self.params, self.device, dtype
        )
        return bool(support)

    def build(self, impl: str = "", dtype: str = "") -> torch.nn.Module:
        """The module with the weights of ``seed``."""
        torch.manual_seed(self.seed)
        module = self.method.make(self.dims, self.params, impl or self.impl, self.device, DTYPES[dtype or self.dtype])
        return module.train(self.mode == "train")  # type: ignore[no-any-return]

    def inputs(self, seed: int = 0) -> torch.Tensor:
        """Standard normal tokens ``[2, T, d_model]`` in the cell's dtype."""
        generator = torch.Generator().manual_seed(self.seed + 1 + seed)
        shape = (BATCH, self.length, self.dims.d_model)
        return torch.randn(shape, generator=generator).to(self.device, DTYPES[self.dtype])

    def pieces(self) -> list[int]:
        """Lengths in which a sequence is continued: segments in ``stream``; a prefix, then one token in ``decode``."""
        if self.mode == "stream" or self.method.segment:
            step = min(self.method.segment_len(self.params), self.length) if self.method.segment else self._uneven()
            sizes = [min(step, self.length - start) for start in range(0, self.length, step)]
        else:
            sizes = [self.length]
        if self.mode == "decode":
            # A method with segments is only whole again at their boundaries: its single token starts a new one.
            kept = sizes[:-1] if self.method.segment and len(sizes) > 1 else [self.length - 1]
            sizes = [size for size in [*kept, 1] if size]
        return sizes

    def observe(self, module: Any, x: torch.Tensor, gradients: bool = False, whole: bool = False) -> torch.Tensor:
        """Outputs ``[B, T, d_model]`` as the mode computes them: in one piece, or piece by piece with the state."""
        with _no_grad_unless(gradients):
            if self.mode in ("forward", "train"):
                return as_output(module(x)).y
            sizes = self.pieces()
            x = x[:, : sum(sizes)]
            if whole:
                return as_output(module(x)).y
            state, outputs = module.init_state(x.shape[0]), []
            for piece in x.split(sizes, dim=1):
                y, state = as_output(module(piece, state))
                outputs.append(y)
            return torch.cat(outputs, dim=1)

    def rounding(self, y: torch.Tensor) -> float:
        """How far two orders of the same computation may lie apart in this dtype."""
        return PRODUCTS * torch.finfo(y.dtype).eps * max(1.0, float(y.detach().abs().max()))

    def _uneven(self) -> int:
        return max(1, 2 * self.length // 5)

    def _at(self, length: int) -> Specimen:
        if self.mode == "decode" and self.method.segment:  # whole segments and the one token after them
            segment = self.method.segment_len(self.params)
            length = max(1, (length - 1) // segment) * segment + 1
        return Specimen(
            self.method, self.impl, self.mode, self.dims.replace(seq_len=length), self.params, self.device, self.dtype,
            self.seed, self.note,
        )  # fmt: skip


def _binding_length(method: Method, params: Params) -> int:
    memory = int(getattr(params, method.memory_parameter)) if method.memory_parameter else 0
    segment = method.segment_len(params) if method.segment else 0
    return max(LEAST, memory + segment) + ODD


def _variants(method: Method, params: Params) -> Iterator[Params]:
    """The cell's own parameters, then smaller memory sizes that the method accepts."""
    yield params
    name = method.memory_parameter
    for size in SMALL_MEMORY if name else ():
        assert name is not None
        if size < getattr(params, name):
            with contextlib.suppress(ValueError):
                yield params.replace(**{name: size})


def _lengths(wanted: int, longest: int) -> Iterator[int]:
    """The length wanted, then rounder ones near it, for methods that only take multiples of something."""
    yield wanted
    for step in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        for length in (wanted // step * step, -(-wanted // step) * step):
            if 0 < length <= longest:
                yield length


@contextlib.contextmanager
def _no_grad_unless(gradients: bool) -> Iterator[None]:
    with torch.set_grad_enabled(gradients):
        yield
