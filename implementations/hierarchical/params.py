"""Hyper-parameters of hierarchical attention, and which cells a token sees. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ctxbench.implementations._shared import flash_table, flex_table
from ctxbench.implementations._shared.flex_table import TILE
from ctxbench.method import YES, Dims, Params, Support, no, param

FORMS = ("causal_full", "causal_linear", "seed")
WIDEST_CELL = 512
SLAB = 128


@dataclass(frozen=True)
class Scale:
    """One resolution of the causal forms: token i sees the last ``most`` cells of ``span`` tokens complete with it.

    The tokens themselves are the scale of span 1. ``most`` None stands for all cells. Where scales are disjoint, one
    leaves the last ``behind`` tokens to finer scales, and to the next scale all cells that lie ``handed`` tokens back,
    ``group`` at a time because so many make up a coarser one.
    """

    span: int
    most: int | None
    behind: int = 0
    handed: int | None = None
    group: int = 1

    def sees(self, i: int) -> range:
        """Cells that token ``i`` sees."""
        return range(self.first(i + 1), max(0, (i + 1 - self.behind) // self.span))

    def first(self, tokens: int) -> int:
        """The first cell that the last of ``tokens`` tokens sees, or would see."""
        if self.handed is not None:
            return self.group * max(0, (tokens - self.handed) // (self.span * self.group))
        return 0 if self.most is None else max(0, (tokens - self.behind) // self.span - self.most)

    def keeps(self, tokens: int) -> int:
        """Cells that must be remembered after ``tokens`` tokens; every next token brings its own cell of span 1."""
        return tokens // self.span - self.first(tokens + (self.span == 1))


@dataclass(frozen=True)
class HierarchicalParams(Params):
    """Which form, how many resolutions, and how far each of them reaches."""

    form: str = param(
        "causal_full",
        "causal_full: a window and all complete cells; causal_linear: a window and the last cells of each scale; "
        "seed: the source document's branches, repaired, bidirectional",
        choices=FORMS,
    )
    window: int = param(256, "tokens a causal token sees one by one, itself included", unit="tokens", low=1)
    cells: int = param(
        128,
        "causal_linear: cells of each coarse scale that a token sees; causal_full: of all but the last, if disjoint",
        unit="cells",
        low=1,
    )
    disjoint: bool = param(
        False, "causal: a scale begins where the next finer one ends, so that no token is seen at two scales"
    )
    pool: int = param(
        4, "tokens of a cell of the first coarse scale, and cells of one scale in a cell of the next", unit="cells",
        low=2, source="source document, scales 1, 4, 16",
    )  # fmt: skip
    levels: int = param(
        3,
        "scales, that of single tokens included",
        unit="scales",
        low=1,
        high=10,
        source="source document, scales 1, 4, 16",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spans[-1] > WIDEST_CELL:
            raise ValueError(
                f"the widest cell, pool ** (levels - 1), may hold {WIDEST_CELL} tokens; "
                f"received pool={self.pool} and levels={self.levels}, which make {self.spans[-1]}"
            )

    @property
    def spans(self) -> tuple[int, ...]:
        """Tokens of a cell of each scale, fine to coarse."""
        return tuple(self.pool**level for level in range(self.levels))

    @property
    def scales(self) -> tuple[Scale, ...]:
        """What a token of the causal forms sees of each scale, fine to coarse."""
        most = self.cells if self.form == "causal_linear" else None
        overlapping = [Scale(span, self.window if span == 1 else most) for span in self.spans]
        if not self.disjoint:
            return tuple(overlapping)
        found, behind, beyond = [], 0, self.window
        for scale in overlapping[:-1]:
            found.append(replace(scale, behind=behind, handed=beyond, group=self.pool))
            behind, beyond = beyond, beyond + self.cells * scale.span * self.pool
        return (*found, replace(overlapping[-1], behind=behind))


def slab_rows(scales: Sequence[Scale]) -> int:
    """Queries a slab of the blocked impl: whole cells of the widest scale, as near to SLAB as they come."""
    return scales[-1].span * max(1, SLAB // scales[-1].span)


def support(dims: Dims, params: HierarchicalParams, mode: str) -> Support:
    """Every form has one direction; only the causal ones can be continued."""
    if params.form == "seed":
        if dims.causal:
            return no(
                "form=seed is bidirectional: its cells and queries look ahead; choose causal_full or causal_linear"
            )
        if dims.position != "none":
            return no(f"form=seed, as the source document has it, knows no positions, received {dims.position}")
        if mode in ("stream", "decode"):
            return no("form=seed cannot be continued: every output depends on later tokens")
    elif not dims.causal:
        return no(f"form={params.form} is causal; the bidirectional form is seed")
    return YES


def reach(dims: Dims, params: HierarchicalParams, i: int) -> range | set[int]:
    """Input positions that may influence output ``i``: what it sees, and what that has seen in the layers below."""
    if params.form == "seed":
        return range(dims.seq_len)
    reached = {i}
    for _ in range(dims.num_layers):
        reached = set().union(*(_tokens(params, j) for j in reached))
    return reached


def _tokens(params: HierarchicalParams, i: int) -> set[int]:
    """Tokens that one layer brings to token ``i``; the cells of a scale that it sees are neighbours."""
    seen: set[int] = set()
    for scale in params.scales:
        cells = scale.sees(i)
        seen.update(range(cells.start * scale.span, cells.stop * scale.span))
    return seen


def triton_support(dims: Dims, params: HierarchicalParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers; they take every form, and the pooling kernel every cell."""
    return flash_table.support(dims, dtype)


def flex_support(dims: Dims, params: HierarchicalParams, device: str, dtype: str) -> Support:
    """What FlexAttention takes, and cells that are handed on by groups which divide a tile."""
    if params.disjoint and params.form != "seed" and TILE % params.pool:
        return no(f"flex has block lists of {TILE} cells, which a disjoint pool must divide; received {params.pool}")
    return flex_table.support(dims, params, device, dtype)


def sketch_support(dims: Dims, params: HierarchicalParams, device: str, dtype: str) -> Support:
    """Where the sketch raises: too few heads to share out, or too few tokens to pool."""
    if params.levels == 1:
        return no("the sketch's defects are those of several scales; with one it is attention over the batch alone")
    heads = dims.num_heads // params.levels
    if heads == 0:
        return no(
            f"the sketch gives each scale num_heads // {params.levels} heads, which of {dims.num_heads} heads is none"
        )
    if dims.d_model % heads:
        return no(f"the sketch splits d_model among {heads} heads a scale, and {dims.d_model} is no multiple of that")
    if dims.seq_len < params.spans[-1]:
        return no(
            f"the sketch pools without padding and needs at least {params.spans[-1]} tokens, received {dims.seq_len}"
        )
    return YES
