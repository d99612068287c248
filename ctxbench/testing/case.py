"""What a law is tried on: one impl of a method at sizes so small that every law ends in a moment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ctxbench.method import Dims, Equivalence, Method, Output, Params, Support, no
from ctxbench.workload import DTYPES, as_output

TINY = Dims(seq_len=1, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=32)
LARGE = 16  # integer parameters from here on are scaled down
WIDEST = 32  # a scaled-down parameter is at most this


@dataclass(frozen=True)
class Case:
    """One impl at tiny sizes. ``label`` names what differs from the method's preferred form, as in ``memory=0``.

    ``retabled`` marks a form that differs from another one in a table of constants alone, as the extensions of RoPE do.
    ``crossed`` marks a form whose setting, direction and position have each been tried in another one.
    """

    method: Method
    impl: str
    params: Params
    dims: Dims
    modes: tuple[str, ...]
    device: str = "cpu"
    label: str = ""
    retabled: bool = False
    crossed: bool = False

    def __str__(self) -> str:
        name = f"{self.method.name}/{self.impl}"
        return f"{name}/{self.label}" if self.label else name

    @property
    def literal(self) -> bool:
        """Whether the impl is held to its declared defects and not to the reference."""
        return bool(self.method.impl(self.impl).defects)

    @property
    def dtype(self) -> str:
        """The most exact dtype the impl computes in: laws about equality are tried in it."""
        for dtype in ("fp64", "fp32"):
            if self.supports(dtype=dtype):
                return dtype
        return "bf16"

    @property
    def tolerance(self) -> float:
        """Largest difference, relative to the largest value, that counts as none."""
        return 1000 * torch.finfo(DTYPES[self.dtype]).eps

    def supports(
        self, mode: str = "forward", dtype: str | None = None, impl: str | None = None, **dims: Any
    ) -> Support:
        """Whether mathematics and impl have this mode, dtype and size."""
        if mode not in self.modes and mode in self.method.modes:
            return no(f"{mode} was left out of this check")
        sizes = self.dims.replace(**dims)
        answer = self.method.mode_support(mode, sizes, self.params)
        if not answer:
            return answer
        chosen = self.method.impl(impl or self.impl)
        return self.method.impl_support(chosen, mode, sizes, self.params, self.device, dtype or self.dtype)

    def build(self, dtype: str | None = None, impl: str | None = None, **dims: Any) -> torch.nn.Module:
        """Build in evaluation mode, weights from a fixed seed and moved off special values such as exact zeros."""
        torch.manual_seed(0)
        sizes = self.dims.replace(**dims)
        chosen = DTYPES[dtype or self.dtype]
        module = self.method.make(sizes, self.params, impl or self.impl, self.device, chosen)
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"build must return a torch.nn.Module, received {type(module).__name__}")
        jitter(module)
        return module.eval()

    def tokens(self, length: int | None = None, batch: int = 1, seed: int = 1) -> torch.Tensor:
        """Standard normal input ``[batch, length, d_model]``."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, length or self.dims.seq_len, self.dims.d_model)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, DTYPES[self.dtype])

    def lengths(self, mode: str = "forward", most: int = 12) -> list[int]:
        """1, 2, primes, and one below, at and above every block boundary, where the method takes them."""
        boundaries = [value for value in integers(self.params) if 2 <= value <= 2 * WIDEST]
        wanted = {1, 2, 13, 31, self.dims.seq_len}
        for boundary in sorted(set(boundaries)):
            wanted |= {boundary - 1, boundary, boundary + 1, 2 * boundary + 1}
        able = [length for length in sorted(wanted - {0}) if self.supports(mode, seq_len=length)]
        if not able:
            able = [n for n in range(1, 4 * self.dims.seq_len) if self.supports(mode, seq_len=n)][:most]
        return _thin(able, most)

    def where(self, **dims: Any) -> str:
        """The sizes of a failure, as a reader would write them down."""
        sizes = self.dims.replace(**dims)
        text = (
            f"T={sizes.seq_len} B={sizes.batch_size} d_model={sizes.d_model} heads={sizes.num_heads} "
            f"layers={sizes.num_layers} d_ff={sizes.d_ff} causal={sizes.causal} position={sizes.position}"
        )
        values = " ".join(f"{name}={value}" for name, value in self.params.as_dict().items())
        return f"{text} {values}".strip()


def small_params(method: Method, dims: Dims = TINY) -> Params:
    """The method's defaults with every large integer scaled down, by one common factor where that is small enough."""
    defaults = method.params()
    for values in (_by_common_factor(defaults), _one_by_one(defaults)):
        try:
            candidate = defaults.replace(**values)
        except ValueError:
            continue
        if values and sized(method, dims, candidate).seq_len > 1:
            return candidate
    return defaults


def integers(params: Params) -> list[int]:
    """Values of all integer parameters."""
    values = params.as_dict().values()
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool)]


def jitter(module: torch.nn.Module) -> None:
    """Move every parameter off special values: zero-initialised gates would hide what lies behind them."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.1 * noise).to(parameter.device, parameter.dtype))


def equivalent(case: Case, declared: Equivalence, other: Method) -> tuple[Case, Case]:
    """The two sides of a declared equivalence, at the sizes of ``case``."""
    here = dataclasses.replace(case, params=case.params.replace(**declared.params))
    there_params = small_params(other).replace(**declared.other_params)
    return here, Case(other, other.oracle, there_params, case.dims, other.modes, case.device)


def call(module: torch.nn.Module, x: torch.Tensor, state: Any = None) -> torch.Tensor:
    """``y`` of one call without gradients."""
    with torch.no_grad():
        return as_output(module(x) if state is None else module(x, state)).y


def streamed(module: torch.nn.Module, x: torch.Tensor, sizes: list[int]) -> Output:
    """Outputs of all tokens and the last state, from calls on chunks of these sizes and an empty start."""
    pieces, state = [], module.init_state(x.shape[0])  # type: ignore[operator]
    for chunk in x.split(sizes, dim=1):
        y, state = as_output(module(chunk, state))
        pieces.append(y)
    return Output(torch.cat(pieces, dim=1), state)


def sized(method: Method, dims: Dims, params: Params) -> Dims:
    """Give a case a length beyond every block, and as many layers as the method needs."""
    layers = max(dims.num_layers, method.fewest_layers(params))
    largest = max([value for value in integers(params) if value <= 8 * WIDEST], default=0)
    first = 2 * largest + 5 if largest >= 7 else 19
    for length in (*range(first, first + 80), *range(first, 0, -1)):
        sized = dims.replace(seq_len=length, num_layers=layers)
        if method.mode_support("forward", sized, params):
            return sized
    return dims.replace(num_layers=layers)


def _scalable(params: Params) -> dict[str, Any]:
    return {
        spec.name: spec
        for spec in dataclasses.fields(params)
        if type(spec.default) is int and spec.default >= LARGE and not spec.metadata.get("choices")
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: with tensors of a few kilobytes, handing work to others takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_common_factor(defaults: Params) -> dict[str, int]:
    large = _scalable(defaults)
    if not large:
        return {}
    values = {name: int(spec.default) for name, spec in large.items()}
    factor = 1
    while min(values.values()) // (2 * factor) >= 4:
        factor *= 2
    if max(values.values()) // factor > WIDEST:
        return {}
    return {name: max(value // factor, int(large[name].metadata.get("low") or 0)) for name, value in values.items()}


def _one_by_one(defaults: Params) -> dict[str, int]:
    chosen = {}
    for name, spec in _scalable(defaults).items():
        value = int(spec.default)
        while value >= LARGE:
            value //= 2
        chosen[name] = max(value, int(spec.metadata.get("low") or 0))
    return chosen


def _thin(lengths: list[int], most: int) -> list[int]:
    if len(lengths) <= most:
        return lengths
    step = (len(lengths) - 1) / (most - 1)
    return sorted({lengths[round(index * step)] for index in range(most)})
