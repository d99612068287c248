"""Hyper-parameters of my method, and what they imply. Planning reads this file: no torch here."""

from dataclasses import dataclass

from ctxbench.method import Dims, Params, param


@dataclass(frozen=True)
class WindowParams(Params):
    """How far back a token sees."""

    window: int = param(256, "keys a query sees, itself included", unit="tokens", low=1)


def reach(dims: Dims, params: WindowParams, i: int) -> range:
    """Input positions that may influence output ``i``: every layer looks back one window."""
    return range(max(0, i - dims.num_layers * (params.window - 1)), i + 1)
