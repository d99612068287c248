"""What FlexAttention takes, for planning too: neither torch nor triton here."""

from __future__ import annotations

import os

from ctxbench.method import ROPE, YES, Dims, Impl, Params, Support, no

TILE = 128  # tokens a side of the tiles that are kept or skipped: PyTorch's own, and what all of its kernels divide
NARROWEST, WIDEST = 16, 256  # channels of a head
OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # variables with which torch.compile does nothing


def support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """Heads that the kernels take, and a compiler to make them: uncompiled, all scores would be kept."""
    if not NARROWEST <= dims.head_dim <= WIDEST:
        return no(f"FlexAttention takes heads of {NARROWEST} to {WIDEST} channels, received {dims.head_dim}")
    off = [name for name in OFF if os.environ.get(name, "0") not in ("", "0")]
    if off:
        return no(f"FlexAttention without its compiler keeps all scores: unset {off[0]}")
    return YES


def whole_tiles(what: str, tokens: int) -> Support:
    """Whether a boundary that moves through the sequence lies between tiles, where block lists have closed forms."""
    if tokens % TILE:
        return no(f"flex has block lists of {TILE} tokens: {what} must be a multiple of it, received {tokens}")
    return YES


def flex_impl(
    run: str, support: str, note: str, modes: tuple[str, ...] = ("forward", "train"),
    positions: tuple[str, ...] = ("none", *ROPE),
) -> Impl:  # fmt: skip
    """The impl of a method; on CPU each shape compiles for tens of seconds, and there is no backward pass."""
    return Impl(
        "flex", run=run, needs=("triton",), devices=("cuda",), dtypes=("bf16", "fp16", "fp32"), modes=modes,
        positions=positions, support=support, note=note,
    )  # fmt: skip
