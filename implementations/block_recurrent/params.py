"""Hyper-parameters of the Block-Recurrent Transformer, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, graph_table
from ctxbench.method import Dims, Params, Support, param

FROM_TOP = 3  # the recurrent layer, counted from the top; in shallower stacks the lowest layer


@dataclass(frozen=True)
class BlockRecurrentParams(Params):
    """The window, which is also the block of the recurrence, and the states."""

    window: int = param(
        512, "keys a token sees, itself included, and tokens between two updates of the states", unit="tokens", low=1,
        source="Hutchins et al. 2022, 4",
    )  # fmt: skip
    num_states: int = param(
        512, "state vectors of the recurrent layer", unit="vectors", low=1, source="Hutchins et al. 2022, 4"
    )
    gate: str = param(
        "fixed",
        "how a state takes up what it read: by a learned constant, or by gates that depend on what was read",
        choices=("fixed", "lstm"),
        source="Hutchins et al. 2022, 3.2: fixed did best, with skip",
    )


def recurrent_layer(num_layers: int) -> int:
    """Index of the layer with the states."""
    return max(0, num_layers - FROM_TOP)


def reach(dims: Dims, params: BlockRecurrentParams, i: int) -> range | frozenset[int]:
    """Input positions that may influence output ``i``: windows, and everything earlier through the states.

    Beyond the window a set and not a range, which would promise gradients at its ends: a call passes values alone.
    """
    return range(i + 1) if i < params.window else frozenset(range(i + 1))


def triton_support(dims: Dims, params: BlockRecurrentParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    return flash_table.support(dims, dtype)


def graph_support(dims: Dims, params: BlockRecurrentParams, device: str, dtype: str) -> Support:
    """Of the kernels, and of replays, which begin when there is a window to look back at."""
    return triton_support(dims, params, device, dtype) and graph_table.support(dims, params.window, 1)
