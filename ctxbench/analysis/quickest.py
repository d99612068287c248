"""Which of a method's impls stands for it: the fast one, not the one that a run happened to measure furthest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

GOOD = 1.1  # times a time that is worse by more than what one process says

Name = TypeVar("Name", bound=Hashable)


def quickest(impls: Mapping[Name, Mapping[int, float]]) -> Name:
    """The impl that stands for a method, of the seconds a call of each by length.

    An impl that reaches further wins, unless one that reaches at least half as far is faster by more than 10 % where
    both were measured last: a run has time for one impl of each method at its longest lengths, not always for the
    fastest. Of equal reach the faster one wins.
    """
    reach = {name: max(times) for name, times in impls.items()}
    first, *others = sorted(impls, key=lambda name: (-reach[name], impls[name][reach[name]]))
    chosen = first
    for name in others:
        if 2 * reach[name] >= reach[first] and _faster(impls[name], impls[chosen]):
            chosen = name
    return chosen


def _faster(mine: Mapping[int, float], theirs: Mapping[int, float]) -> bool:
    """Whether an impl is faster by more than 10 % at the longest length of both."""
    both = mine.keys() & theirs.keys()
    return bool(both) and GOOD * mine[max(both)] < theirs[max(both)]
