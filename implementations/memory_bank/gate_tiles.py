"""What the launches of the fused gate load, store and multiply, see ``gate``; no torch, no triton here."""

from __future__ import annotations

from ctxbench.implementations._shared.tiles import Work


def gated(
    kernel: str, rows: int, columns: int, depth: int, tokens: int, width: int, itemsize: int, *, batch: int = 1,
    keep: bool = False,
) -> Work:  # fmt: skip
    """The launch of ``gate``, or of its ``gradient``: a product in tiles of rows x columns by depth, and an epilogue.

    A tile of the result reads its rows of one operand and its columns of the weight whole.
    """
    down, across = -(-tokens // rows), -(-width // columns)
    operands = 3 if kernel == "gradient" else 1  # what the left side of the product is made of
    beside = 2 if kernel == "gradient" else 3
    stored = 2 if kernel == "gradient" else 1 + keep
    steps = batch * down * across * -(-width // depth)
    loaded = (operands * across + beside) * tokens * width + down * width * width
    return Work(steps, 0, steps, batch * loaded * itemsize, batch * stored * tokens * width * itemsize)
