"""Hyper-parameters of MELODI, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, graph_table
from ctxbench.method import Dims, Params, Support, no, param

RELEASED = "released configuration"


@dataclass(frozen=True)
class MelodiParams(Params):
    """The window, what a layer hands to the next window, and what the long-term layer keeps of all windows."""

    window: int = param(
        512, "tokens of a window; the token mixing has weights for each", unit="tokens", low=1, source=RELEASED
    )
    summary_tokens: int = param(
        64, "summary tokens after the tokens of a window", unit="tokens", low=0, source=RELEASED
    )
    short_slots: int = param(
        64, "short-term memory: slots each layer hands to the next window", unit="slots", low=0, source=RELEASED
    )
    long_slots: int = param(
        4096,
        "long-term memory of the middle layer; 0 makes it a short-term layer",
        unit="slots",
        low=0,
        source=RELEASED,
    )
    long_per_window: int = param(
        32, "slots a window adds to the long-term memory, the oldest go", unit="slots", low=1, source=RELEASED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary_tokens and not self.short_slots:
            raise ValueError(
                f"short_slots must be at least 1 with summary tokens, received {self.short_slots} and "
                f"summary_tokens={self.summary_tokens}: the last layer's summary would go nowhere"
            )


def long_layer(dims: Dims, params: MelodiParams) -> int | None:
    """Index of the layer with the long-term memory, the middle one; None where there is none."""
    return dims.num_layers // 2 if params.long_slots else None


def reach(dims: Dims, params: MelodiParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: its window up to itself, all earlier ones through memories.

    A set and not a range, which would promise that its ends matter: what 576 rows leave in a slot, and a slot among 640
    keys, may round to nothing in low precision.
    """
    first = 0 if params.short_slots or params.long_slots else i - i % params.window
    return frozenset(range(first, i + 1))


def triton_support(dims: Dims, params: MelodiParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    return flash_table.support(dims, dtype)


def diagonal_support(dims: Dims, params: MelodiParams, device: str, dtype: str) -> Support:
    """Of the kernels; layers that go together share what is added to scores."""
    if dims.position in ("t5", "alibi"):
        return no(
            f"every layer scales {dims.position}'s bias by itself, and layers that go together share one: take the "
            "position none or rope"
        )
    return flash_table.support_at_once(dims, dtype)


def graph_support(dims: Dims, params: MelodiParams, device: str, dtype: str) -> Support:
    """Of the kernels, and of replays, which begin when the long-term memory is full."""
    filled = -(-params.long_slots // params.long_per_window)
    return triton_support(dims, params, device, dtype) and graph_table.support(dims, params.window, filled)
