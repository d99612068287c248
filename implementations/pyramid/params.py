"""Hyper-parameters of the pyramid, and the sizes of its levels. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import cells_table, flash_table, flex_table
from ctxbench.method import ROPE, YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class PyramidParams(Params):
    """How many resolutions there are, and how fast they coarsen."""

    levels: int = param(
        3, "resolutions, the full one included", unit="levels", low=1, high=16, source="source document, 3"
    )
    pool: int = param(
        2,
        "cells of one level that are averaged into a cell of the next",
        unit="cells",
        low=2,
        source="source document, 2",
    )
    pooled_queries: bool = param(
        False,
        "the first layer of a coarse level attends from its cells to those of the level below, before pooling",
        source="Dai et al. 2020, Funnel-Transformer, 2.1",
    )


def fewest_layers(params: PyramidParams) -> int:
    """Every level has at least one layer."""
    return params.levels


def level_dims(dims: Dims, params: PyramidParams) -> tuple[Dims, ...]:
    """Sizes of each level, fine to coarse: width, FFN width and heads halve; the head width stays while heads last.

    The layers are shared out evenly; a remainder goes to the finest levels. ``seq_len`` stays the number of tokens.
    """
    layers, spare = divmod(dims.num_layers, params.levels)
    return tuple(
        dims.replace(
            d_model=dims.d_model >> level,
            d_ff=dims.d_ff >> level,
            num_heads=max(1, dims.num_heads >> level),
            num_layers=layers + (level < spare),
        )
        for level in range(params.levels)
    )


def support(dims: Dims, params: PyramidParams, mode: str) -> Support:
    """Sizes that halve without a remainder at every level, and a direction that can be continued."""
    halvings = 2 ** (params.levels - 1)
    for name, width in (("d_model", dims.d_model), ("d_ff", dims.d_ff)):
        if width % halvings:
            return no(f"{params.levels} levels need {name} to be a multiple of {halvings}, received {width}")
    for level in range(params.levels):
        width, heads = dims.d_model >> level, max(1, dims.num_heads >> level)
        if width % heads:
            return no(f"level {level} would split a width of {width} into {heads} heads; choose d_model or num_heads")
        if dims.position in ROPE and width // heads % 2:
            return no(f"level {level} has an odd head width of {width // heads}, and {dims.position} turns pairs")
    if dims.position in ("t5", "alibi") and params.pooled_queries:
        return no(f"{dims.position} is not built for pooled_queries, whose keys are finer cells than their queries")
    if mode in ("stream", "decode") and not dims.causal:
        return no("a bidirectional pyramid cannot be continued: every output depends on later tokens")
    return YES


def reach(dims: Dims, params: PyramidParams, i: int) -> range:
    """Input positions that may influence output ``i``: level 0 alone reaches all that the direction allows."""
    return range(i + 1) if dims.causal else range(dims.seq_len)


def triton_support(dims: Dims, params: PyramidParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers, at every level: heads widen where their number does not halve."""
    for level in level_dims(dims, params):
        answer = flash_table.support(level, dtype)
        if not answer:
            return answer
    return cells_table.support(params.pool, 1) if params.levels > 1 else YES


def flex_support(dims: Dims, params: PyramidParams, device: str, dtype: str) -> Support:
    """What FlexAttention takes, at every level."""
    for level in level_dims(dims, params):
        answer = flex_table.support(level, params, device, dtype)
        if not answer:
            return answer
    return YES


def sketch_support(dims: Dims, params: PyramidParams, device: str, dtype: str) -> Support:
    """Where the sketch raises: too few tokens to pool, or a coarse width that all heads cannot share."""
    if params.pooled_queries:
        return no("the sketch pools before a level, queries and keys alike: it has no pooled_queries")
    tokens = params.pool ** (params.levels - 1)
    if dims.seq_len < tokens:
        return no(f"the sketch pools without padding and needs at least {tokens} tokens, received {dims.seq_len}")
    narrowest = dims.d_model >> (params.levels - 1)
    if narrowest % dims.num_heads:
        return no(
            f"the sketch keeps all {dims.num_heads} heads at the coarsest width of {narrowest}, no multiple of it"
        )
    return YES
