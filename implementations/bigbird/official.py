"""The random blocks that the published code draws, number by number. Imports no torch.

It seeds NumPy's global generator with the number of the layer. Which blocks may be drawn depends on the length: most
lengths keep all of them to the first ``2 r + 5``, and 1024, 3072 and 4096 tokens have a plan of their own, made for a
sequence of 4096 and cut to length.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

OLD_LENGTHS, LONGEST, OLD_REACH = (1024, 3072, 4096), 4096, 1024  # tokens
Rows = list[list[int]]


@lru_cache(maxsize=64)
def drawn(seq_len: int, block_size: int, num_random: int, num_heads: int, seed: int) -> tuple[Rows, ...]:
    """The random blocks of the rows between the first and the last, head by head; a list may name a block twice.

    Raises:
        ValueError: when the length is no multiple of the block, or a row finds too few blocks to draw from.
    """
    if seq_len % block_size:
        raise ValueError(f"the published plan needs a multiple of block_size = {block_size} tokens, received {seq_len}")
    blocks = seq_len // block_size
    numbers = np.random.RandomState(seed)
    if seq_len in OLD_LENGTHS:
        heads = tuple(_old_plan(block_size, num_random, numbers) for _ in range(num_heads))
    else:
        heads = _plan(blocks, num_random, num_heads, numbers)
    heads = tuple(rows[: max(0, blocks - 2)] for rows in heads)
    if any(len(row) < num_random for rows in heads for row in rows):
        raise ValueError(f"the published plan finds fewer than {num_random} blocks for some of its {blocks} rows")
    return heads


def _plan(blocks: int, r: int, num_heads: int, numbers: np.random.RandomState) -> tuple[Rows, ...]:
    """One or two stretches of columns with a number of draws from each; row ``blocks - 1`` is drawn and dropped."""
    if 2 * r + 5 < blocks:
        stretches = [(0, 2 * r + 5, r), (2 * r + 5, blocks, 0)]
    elif r + 5 < blocks:
        stretches = [(0, r + 5, r // 2), (r + 5, blocks, r - r // 2)]
    else:
        stretches = [(0, blocks, r)]
    lists: tuple[Rows, ...] = tuple([[] for _ in range(blocks)] for _ in range(num_heads))
    for index, (start, stop, _) in enumerate(stretches):
        earlier_rows = [(index, range(1, start))] if index else []
        earlier_columns = [(column, range(start, stop)) for column in range(index)]
        own = [(index, range(max(1, start), stop))]
        for column, rows in earlier_rows + earlier_columns + own:
            low, high, count = stretches[column]
            for row in rows if count else ():
                for head in range(num_heads):
                    lists[head][row] += _legal(row, low, high, numbers)[:count]
    return tuple(rows[1:] for rows in lists)


def _legal(row: int, low: int, high: int, numbers: np.random.RandomState) -> list[int]:
    """The blocks ``low .. high - 1`` that a row may draw, in random order."""
    illegal = {row - 1, row, row + 1, 0, high - 1}
    if row == 1:
        illegal.add(high - 2)
    if row == high - 2:
        illegal.add(1)
    return [int(block) for block in numbers.permutation(np.arange(low, high)) if block not in illegal]


def _old_plan(block_size: int, r: int, numbers: np.random.RandomState) -> Rows:
    """The plan for 4096 tokens, of which shorter sequences take the first rows."""
    blocks = LONGEST // block_size
    last = OLD_REACH // block_size - 1 if 2 * block_size < OLD_REACH else blocks - 1
    middle, rows = np.arange(1, blocks - 1), []
    for row in range(1, blocks - 1):
        before = min(row - 2, last)
        if row in (1, 2):
            legal = middle[row + 1 : last]
        elif row in (blocks - 3, blocks - 2):  # its own neighbours are not left out
            legal = middle[:last]
        elif before < row - 2 or row + 1 == last:
            legal = middle[:before]
        else:
            legal = np.concatenate((middle[:before], middle[row + 1 : last]))
        rows.append([int(block) for block in numbers.permutation(legal)[:r]])
    return rows
