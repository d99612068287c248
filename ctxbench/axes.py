"""The size grammar: ``1k..128k`` and its relatives, used for lengths and for memory sizes."""

from __future__ import annotations

import re

from ctxbench.errors import UserError

GRAMMAR = (
    "1k..128k (doubles), 1k..128k*4 (times four), 1k..8k+1k (steps of 1k), 1k,3k,10k (a list); k = 1024, m = 1048576"
)
_SIZE = re.compile(r"([0-9]+)([kKmM]?)")
_SCALE = {"": 1, "k": 1024, "m": 1024**2}
_LARGEST = 2**40
_MOST = 10_000


def parse_size(text: str) -> int:
    """Read one size, ``4k`` or ``4096``, as a number of tokens (at least 1)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _malformed(text, "not a size")
    size = int(match[1]) * _SCALE[match[2].lower()]
    if not 1 <= size <= _LARGEST:
        raise _malformed(text, "must be at least 1" if size < 1 else f"must be at most {_LARGEST}")
    return size


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read a list of sizes and ranges; the result is strictly increasing and never empty.

    Raises:
        UserError: says what is wrong, what was received and what is accepted.
    """
    sizes: set[int] = set()
    for part in text.split(","):
        sizes.update(_range(part.strip()) if ".." in part else (parse_size(part),))
        if len(sizes) > _MOST:
            raise _malformed(text, f"more than {_MOST} sizes")
    return tuple(sorted(sizes))


def _range(text: str) -> list[int]:
    first_text, _, rest = text.partition("..")
    match = re.fullmatch(r"([^*+]*)(?:([*+])(.*))?", rest)
    if match is None or not first_text or not match[1]:
        raise _malformed(text, "a range needs both ends")
    first, last = parse_size(first_text), parse_size(match[1])
    if last < first:
        raise _malformed(text, "the range runs backwards")
    operator, step = match[2] or "*", parse_size(match[3]) if match[2] else 2
    if operator == "*" and step < 2:
        raise _malformed(text, "a factor must be at least 2")
    sizes, size = [], first
    while size <= last:
        sizes.append(size)
        if len(sizes) > _MOST:
            raise _malformed(text, f"more than {_MOST} sizes")
        size = size * step if operator == "*" else size + step
    return sizes


def _malformed(text: str, why: str) -> UserError:
    return UserError(f"malformed size {text!r}: {why}\n  accepted: {GRAMMAR}")
