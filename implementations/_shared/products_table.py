"""How plain products cut their queries into slabs, and who has them; torch-free: formulas share its constants."""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.method import Impl

BLOCK = 256  # queries a causal slab: fewer skip more hidden pairs, and cost calls and speed of every product
REST = 64  # at most so many queries that are left go with the slab before them
SCORES = 1 << 21  # scores of a slab that are computed together: in bf16 they stay in a last-level cache


def slabs_impl(
    run: str, modes: tuple[str, ...] = ("forward", "train", "stream"), positions: tuple[str, ...] = (),
    support: str | None = None,
    note: str = "plain products by slabs of queries: for bf16, in which the fused kernel is slow on CPU",
) -> Impl:  # fmt: skip
    """The impl of a method; fp64 is there to be compared."""
    return Impl(
        "slabs", run=run, devices=("cpu",), dtypes=("bf16", "fp64"), modes=modes, positions=positions, support=support,
        note=note,
    )  # fmt: skip


class Slab(NamedTuple):
    """Queries ``begin .. end`` and the first ``keys`` keys, all that any of them sees."""

    begin: int
    end: int
    keys: int


class Plan(NamedTuple):
    """Slabs, and how many heads of rows of the batch may be computed together."""

    slabs: list[Slab]
    fit: int

    @property
    def longest(self) -> int:
        """Queries of the longest slab, the first or the last."""
        return max(self.slabs[0].end, self.slabs[-1].end - self.slabs[-1].begin)


def plan(heads: int, queries: int, keys: int, causal: bool) -> Plan:
    """As many items together as keep the scores of the longest slab within SCORES."""
    made = Plan(slabs(queries, keys, heads, causal), 1)
    return made._replace(fit=max(1, SCORES // max(1, made.longest * keys)))


def slabs(queries: int, keys: int, heads: int, causal: bool) -> list[Slab]:
    """Cover the queries. Causal slabs have BLOCK rows, the last one what is left; others as many as may be, evenly."""
    if causal:
        count, rows = max(1, -((REST - queries) // BLOCK)), BLOCK
    else:
        most = max(BLOCK, SCORES // max(1, heads * keys))
        count = max(1, -(-queries // most))
        rows = -(-queries // count)
    ends = [*range(rows, rows * count, rows), queries]
    begins = [0, *ends[:-1]]
    return [Slab(a, b, keys - queries + b if causal else keys) for a, b in zip(begins, ends, strict=True)]
