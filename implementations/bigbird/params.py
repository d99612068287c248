"""Hyper-parameters of BigBird, and the plan of blocks they stand for. Imports no torch."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ctxbench.implementations._shared import flash_table, flex_table, native_table
from ctxbench.implementations._shared.window import Pattern as Window
from ctxbench.method import YES, Dims, Params, Support, no, param

MASK = (1 << 64) - 1
PANEL = 64  # tokens of a block that the native kernel keeps in one piece


@dataclass(frozen=True)
class Pattern:
    """Which blocks of keys a block of queries sees; rows and columns below are blocks.

    The first and the last row see all columns, and all rows see those two. A row between them also sees itself, its
    neighbours, and ``num_random`` more (as many as there are, where there are fewer), drawn for every layer and head
    from all columns, or from the first ``random_within``, or as the published code draws them (``official``, where all
    heads draw from one generator). The last block holds what is left of the tokens, ``1 .. block_size`` of them.
    """

    seq_len: int
    block_size: int
    num_random: int
    random_within: int
    seed: int
    official: bool = False
    num_heads: int = 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence, the last included."""
        return -(-self.seq_len // self.block_size)

    def fixed(self, row: int) -> list[int]:
        """The columns that a row between the first and the last sees in every layer and head, ascending."""
        return sorted({0, row - 1, row, row + 1, self.num_blocks - 1})

    def sees(self, layer: int, head: int) -> tuple[tuple[int, ...], ...]:
        """The columns of each row, ascending."""
        return _plan(self, layer, head)


@lru_cache(maxsize=64)
def _plan(pattern: Pattern, layer: int, head: int) -> tuple[tuple[int, ...], ...]:
    blocks = pattern.num_blocks
    everything = tuple(range(blocks))
    if pattern.official:
        from ctxbench.implementations.bigbird.official import drawn  # and NumPy, for which no listing waits

        lists = drawn(pattern.seq_len, pattern.block_size, pattern.num_random, pattern.num_heads, pattern.seed + layer)[
            head
        ]
        between = [tuple(sorted({*pattern.fixed(row), *more})) for row, more in enumerate(lists, start=1)]
        return (everything, *between, everything)[:blocks]
    numbers = random_numbers(pattern.seed, layer, head)
    within = min(blocks, pattern.random_within or blocks)
    between = [_draw(pattern.fixed(row), pattern.num_random, within, numbers) for row in range(1, blocks - 1)]
    return (everything, *between, everything)[:blocks]


def _draw(fixed: list[int], count: int, within: int, numbers: Iterator[int]) -> tuple[int, ...]:
    """Add ``count`` of the first ``within`` blocks to the fixed ones, each draw uniform over those that are left."""
    taken = [block for block in fixed if block < within]
    for _ in range(min(count, within - len(taken))):
        chosen = next(numbers) * (within - len(taken)) >> 64  # the chosen-th block that is not taken
        for block in taken:
            chosen += block <= chosen
        insort(taken, chosen)
    return (*taken, *(block for block in fixed if block >= within))


def random_numbers(*key: int) -> Iterator[int]:
    """Endless 64-bit random numbers of a key: SplitMix64 (Steele et al. 2014), the same on every machine."""
    state = 0
    for part in key:
        state = _mix(state + part + 1)
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        yield _mix(state)


def _mix(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


@dataclass(frozen=True)
class BigBirdParams(Params):
    """One layer's attention pattern; layers and heads differ in their random blocks alone."""

    form: str = param(
        "itc", "itc: the first and the last block are global; etc: further tokens are", choices=("itc", "etc")
    )
    block_size: int = param(
        64,
        "itc: tokens of a block; a token sees 5 + num_random blocks",
        unit="tokens",
        low=1,
        source="Zaheer et al. 2020, E",
    )
    num_random: int = param(
        3, "itc: random blocks a block of queries sees", unit="blocks", low=0, source="Zaheer et al. 2020, E"
    )
    random_within: int = param(
        0,
        "random blocks come from the first so many blocks; 0: from all",
        unit="blocks",
        low=0,
        source="ours: 0; published code: 2 num_random + 4 of longer sequences",
    )
    plan: str = param(
        "uniform",
        "itc: random blocks are drawn uniformly, or (official) as the published code draws them, number by number",
        choices=("uniform", "official"),
    )
    seed: int = param(0, "itc: seed of the random blocks", low=0)
    num_global: int = param(
        256, "etc: global tokens ahead of the sequence", unit="tokens", low=1, source="Zaheer et al. 2020, E"
    )
    local_radius: int = param(
        84, "etc: keys that a token sees on each side", unit="tokens", low=0, source="Ainslie et al. 2020, ETC"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.num_random + 4  # the first block and a row's window may be among them
        if 0 < self.random_within < least:
            raise ValueError(
                f"random_within must be 0 or at least num_random + 4 = {least}, received {self.random_within}: "
                "a row would find too few blocks to draw from"
            )

    def pattern(self, seq_len: int, num_heads: int = 1) -> Pattern:
        """The pattern of blocks at one length."""
        official = self.plan == "official"
        return Pattern(seq_len, self.block_size, self.num_random, self.random_within, self.seed, official, num_heads)

    def window(self) -> Window:
        """The pattern of the external construction, over the global tokens and then the sequence."""
        return Window(self.local_radius, self.local_radius, 1, self.num_global, causal=False)


def support(dims: Dims, params: BigBirdParams, mode: str) -> Support:
    """The published plans exist for some lengths only, and rows are sets here."""
    if params.form == "etc" and dims.position != "none":
        return no("the global tokens of form=etc have no place in the sequence, hence no position")
    if params.form == "etc" or params.plan == "uniform":
        return YES
    if params.random_within:
        return no("the published plan limits its random blocks itself: random_within must be 0 with plan=official")
    pattern = params.pattern(dims.seq_len, dims.num_heads)
    try:
        plans = [pattern.sees(layer, head) for layer in range(dims.num_layers) for head in range(dims.num_heads)]
    except ValueError as error:
        return no(str(error))
    expected = [len(pattern.fixed(row)) + params.num_random for row in range(1, pattern.num_blocks - 1)]
    if any([len(row) for row in plan[1:-1]] != expected for plan in plans):
        return no(f"the published plan lets a row see a block twice at {dims.seq_len} tokens; rows are sets here")
    return YES


def triton_support(dims: Dims, params: BigBirdParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers."""
    return flash_table.support(dims, dtype)


def native_support(dims: Dims, params: BigBirdParams, device: str, dtype: str) -> Support:
    """Lists of blocks, in the dtypes that the kernel multiplies in."""
    if params.form == "etc":
        return no("the native kernel reads lists of blocks; the external construction is a window and a prefix")
    return native_table.wide_support(dims, params, device, dtype)


def flex_support(dims: Dims, params: BigBirdParams, device: str, dtype: str) -> Support:
    """Blocks that FlexAttention's tiles divide; the external construction is a window and a prefix."""
    if params.form == "itc" and params.block_size % flex_table.NARROWEST:
        least = flex_table.NARROWEST
        return no(f"flex takes a block_size that is a multiple of {least} tokens, received {params.block_size}")
    return flex_table.support(dims, params, device, dtype)


def reach(dims: Dims, params: BigBirdParams, i: int) -> set[int]:
    """Input positions that may influence output ``i``: what any head sees, and what they saw in the layers below."""
    if params.form == "etc":  # global tokens hold nothing of the sequence before the second layer
        near = range(max(0, i - params.local_radius), min(dims.seq_len, i + params.local_radius + 1))
        return set(near if dims.num_layers == 1 else range(dims.seq_len))
    pattern, size = params.pattern(dims.seq_len, dims.num_heads), params.block_size
    reached = {i // size}
    for layer in reversed(range(dims.num_layers)):
        plans = [pattern.sees(layer, head) for head in range(dims.num_heads)]
        reached = {column for plan in plans for row in reached for column in plan[row]}
    return {token for block in reached for token in range(block * size, min((block + 1) * size, dims.seq_len))}
