"""The one thing that is measured: method x impl x params x dims x dtype x mode x device."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ctxbench.method import DTYPE_BYTES, Dims, Method, Params

PROTOCOL = 1  # raised whenever a change makes old numbers incomparable


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A point of the plan. ``memory`` is the value of the method's memory parameter, None where it has none."""

    method: str
    impl: str
    mode: str = "forward"
    device: str = "cpu"
    dtype: str = "fp32"
    batch_size: int = 1
    seq_len: int
    d_model: int = 256
    num_heads: int = 4
    num_layers: int = 1
    d_ff: int = 1024
    causal: bool = True
    position: str = "none"
    memory: int | None = None
    params: dict[str, Any] = {}
    threads: int = 0

    @property
    def dims(self) -> Dims:
        """The sizes every method shares."""
        return Dims(
            seq_len=self.seq_len, batch_size=self.batch_size, d_model=self.d_model, num_heads=self.num_heads,
            num_layers=self.num_layers, d_ff=self.d_ff, causal=self.causal, position=self.position,
        )  # fmt: skip

    def params_for(self, method: Method) -> Params:
        """The method's parameters with this cell's values; the memory size goes to the parameter that it sweeps."""
        # JSON makes lists of tuples, on the way to a child and out of a row.
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in self.params.items()}
        if self.memory is not None and method.memory_parameter is not None:
            values[method.memory_parameter] = self.memory
        return method.params().replace(**values)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """Stable identity of the cell: the same on every machine and in every version of the protocol."""
        plain = {"protocol": PROTOCOL, **msgspec.to_builtins(self)}
        return hashlib.blake2b(msgspec.json.encode(plain, order="sorted"), digest_size=8).hexdigest()

    @property
    def series(self) -> tuple[Any, ...]:
        """Everything but the length: cells of one series differ in ``seq_len`` alone."""
        plain = msgspec.to_builtins(self)
        return tuple(sorted((name, repr(value)) for name, value in plain.items() if name != "seq_len"))

    def label(self) -> str:
        """``transformer_xl / blocked``, as figures and tables name a series."""
        return f"{self.method} / {self.impl}"
