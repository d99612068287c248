"""Hyper-parameters of block attention with a state, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, graph_table
from ctxbench.method import YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class BlockStateParams(Params):
    """The blocks, and what passes from one to the next."""

    block_len: int = param(
        2048, "tokens of a block, which attend to each other", unit="tokens", low=1, source="source document, 2 K"
    )
    num_states: int = param(
        1, "state vectors in front of a block", unit="vectors", low=1, source="source document: a state vector"
    )
    update: str = param(
        "mlp",
        "what makes the next state of the last one and the pooled block: a two-matrix network or a gated unit",
        choices=("mlp", "gru"),
        source="source document: a tiny MLP or RNN",
    )
    variant: str = param(
        "bottom",
        "bottom: one state, prepended to the tokens, made of the last layer's outputs; layer: one state a layer",
        choices=("bottom", "layer"),
        source="project",
    )
    pool: str = param(
        "mean", "what stands for a block: the mean of its outputs or the last one", choices=("mean", "last"),
        source="project",
    )  # fmt: skip


def reach(dims: Dims, params: BlockStateParams, i: int) -> range:
    """Input positions that may influence output ``i``: its block up to itself, all earlier ones through the state."""
    return range(i + 1)


def fused_support(dims: Dims, params: BlockStateParams, device: str, dtype: str) -> Support:
    """Fused causal attention adds no bias to its scores."""
    if dims.position in ("t5", "alibi"):
        return no(f"the fused causal kernel adds no bias by distance, which {dims.position} is")
    return YES


def triton_support(dims: Dims, params: BlockStateParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    return flash_table.support(dims, dtype)


def graph_support(dims: Dims, params: BlockStateParams, device: str, dtype: str) -> Support:
    """Of the kernels, and of replays."""
    return flash_table.support(dims, dtype) and graph_table.support(dims, params.block_len)


def diagonal_support(dims: Dims, params: BlockStateParams, device: str, dtype: str) -> Support:
    """Cells are independent where a state stays in its layer."""
    if params.variant != "layer":
        return no(
            f"in the variant {params.variant} a state leaves at the top and enters at the bottom, so no two cells of "
            "blocks and layers are independent: take the variant layer"
        )
    return fused_support(dims, params, device, dtype)


def diagonal_triton_support(dims: Dims, params: BlockStateParams, device: str, dtype: str) -> Support:
    """Of a diagonal, and of the kernels."""
    return diagonal_support(dims, params, device, dtype) and flash_table.support_at_once(dims, dtype)
