"""Dense attention has no hyper-parameters of its own; here is what it can and cannot do. Imports no torch."""

from __future__ import annotations

from ctxbench.implementations._shared import flash_table, relative_table
from ctxbench.method import YES, Dims, Params, Support, no


def support(dims: Dims, params: Params, mode: str) -> Support:
    """A cache is of use only when later tokens cannot change earlier outputs."""
    if mode in ("stream", "decode") and not dims.causal:
        return no("a bidirectional layer cannot be continued: every output depends on later tokens")
    return YES


def slabs_support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """Rotations happen before the operator; what is added to scores depends on the head, and heads are regrouped."""
    if dims.position in ("t5", "alibi", "transformer_xl"):
        return no(f"slabs adds nothing to scores, and {dims.position} does; blocked goes by slabs there too")
    return YES


def triton_support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers, or those of Transformer-XL's term."""
    if dims.position == "transformer_xl":
        return relative_table.support(dims, dtype)
    return flash_table.support(dims, dtype)


def reach(dims: Dims, params: Params, i: int) -> range:
    """Input positions that may influence output ``i``."""
    return range(i + 1) if dims.causal else range(dims.seq_len)
