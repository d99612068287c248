"""Is the advice right? Every question that ``advise`` can be asked about a length of a run, asked of the shorter ones.

The questions follow from the options of the command, never from the answers. At each held-out length they are the
product of the direction (each method's own, ``--causal``, ``--bidirectional``), any state or a bounded one
(``--streaming``), all impls or one (``--impls NAME``), no memory limit or one between every two neighbouring needs that
the meters of memory tell apart, and all methods or all but the one that was advised. Two questions about the same cells
of which the same ones fit are one question; one that a single method could answer is none.

What fits is decided by the rows of the held-out length: measured peaks against the limit. An answer that needs more
than the limit is wrong however fast it is, and so is no answer where something fits.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis.advise import BOUNDED, FATAL, GOOD, Considered, consider, rank
from ctxbench.analysis.curves import curves
from ctxbench.analysis.forecast import Forecaster, disturbed
from ctxbench.analysis.reserve import PEAK_SHARE, PEAK_SLACK, needed
from ctxbench.cost.roofline import Ceilings
from ctxbench.errors import UserError
from ctxbench.plan import Planned
from ctxbench.registry import Registry
from ctxbench.rows import Row, cell_of
from ctxbench.units import format_bytes

LEAST_SHORTER = 3  # lengths below the held-out one
DIRECTIONS = ((None, ""), (True, "--causal"), (False, "--bidirectional"))

Seconds = Callable[[Row], float]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out question: who is fastest at this length, asked of the shorter ones. Times were measured.

    ``asked`` are the options beside the length; ``candidates`` counts the cells that qualify. ``advised`` is empty
    where nothing was advised although something qualifies; ``fits`` is false where the advised cell does not qualify.
    ``cautious``: the best was known and refused, because with what the forecast reserves it may not fit.
    ``advised_low_s`` and ``best_high_s`` are the ends of their rows' intervals that speak for the advice.
    """

    seq_len: int
    setting: str
    asked: str = ""
    advised: str
    advised_s: float
    best: str
    best_s: float
    candidates: int
    advised_low_s: float
    best_high_s: float
    fits: bool = True
    cautious: bool = False

    @property
    def regret(self) -> float:
        """How much slower the advised method is than the best; infinite where it does not qualify."""
        return self.advised_s / self.best_s - 1 if self.fits and self.advised else math.inf

    @property
    def shown_regret(self) -> float:
        """How much slower it is at least, by the intervals of both measurements; 0 where they overlap."""
        if math.isinf(self.regret):
            return math.inf
        return max(0.0, self.advised_low_s / self.best_high_s - 1) if self.regret > 0 else 0.0


@dataclass(frozen=True)
class Question:
    """A question with what the advice says and which rows qualify; judged by the times of either measure.

    ``limited``: it names a memory limit. ``unclear`` are the cells that the advice refused because they may not fit.
    """

    seq_len: int
    setting: str
    asked: str
    limited: bool
    qualified: tuple[Row, ...]
    advised: Row | None
    unclear: frozenset[str]

    def judged(self, seconds: Seconds) -> Trial:
        """The trial by these times of rows; their intervals are always those of the rows."""
        best = min(self.qualified, key=seconds)
        assert best.latency_s is not None
        latency = self.advised.latency_s if self.advised else None
        return Trial(
            seq_len=self.seq_len, setting=self.setting, asked=self.asked, candidates=len(self.qualified),
            advised=cell_of(self.advised).label() if self.advised else "",
            advised_s=seconds(self.advised) if self.advised else 0.0,
            best=cell_of(best).label(), best_s=seconds(best), advised_low_s=latency.low if latency else 0.0,
            best_high_s=best.latency_s.high, fits=self.advised is None or self.advised in self.qualified,
            cautious=best.cell in self.unclear,
        )  # fmt: skip


class Questions:
    """All questions of a run: ``plain``, one a length, of all methods; ``pairs``, of every two; ``every``, all options.

    ``steady`` gives the times at one speed of the machine; None where the rows have no reference.

    Raises:
        UserError: these rows hold no length that can be held out.
    """

    def __init__(self, rows: Sequence[Row], registry: Registry, ceilings: Ceilings):
        quiet = [row for row in rows if row.measured and not disturbed(row)]
        failed = [row for row in rows if row.status in FATAL]
        self._steady = Forecaster(registry, ceilings, quiet).steady
        groups = [
            group
            for length in sorted({row.seq_len for row in quiet})
            for group in _groups(quiet, failed, length, registry, ceilings)
        ]
        self.plain = [question for group in groups if (question := group.ask(group.cells, None, ""))]
        self.pairs = [question for group in groups for question in group.pairs()]
        self.every = [question for group in groups for question in group.every()]
        if not self.plain:
            noisy = sum(row.measured and disturbed(row) for row in rows)
            busy = f" ({noisy} rows ran beside other work in every process)" if noisy else ""
            raise UserError(
                f"no length can be held out{busy}\n"
                "  accepted: a run of two or more methods over at least four lengths, on a quiet machine"
            )

    @property
    def steady(self) -> Seconds | None:
        """Seconds of a row at the typical speed of the run."""
        return self._steady.seconds if self._steady.coefficient is not None else None


class _Group:
    """The cells of one setting at one held-out length: what the shorter ones say of each, and its row."""

    def __init__(self, seq_len: int, setting: str, cells: Sequence[Considered], rows: Sequence[Row]):
        self.seq_len, self.setting = seq_len, setting
        self.known = {cell.estimate.cell: (cell, row) for cell, row in zip(cells, rows, strict=True)}
        self.cells = tuple(self.known)
        self._needs = {key: _need(*known) for key, known in self.known.items()}
        self._asked: set[tuple[frozenset[str], frozenset[str]]] = set()

    def ask(
        self, cells: Sequence[str], limit: int | None, asked: str, streaming: bool = False, once: bool = False
    ) -> Question | None:
        """Ask about these cells; None where fewer than two methods qualify, or, ``once``, it was asked before.

        Below a limit, a cell whose memory nobody measured is left out: there is no truth to hold an answer against.
        """
        cells = [key for key in cells if limit is None or self._needs[key] is not None]
        admitted = [key for key in cells if not streaming or self.known[key][0].growth in BOUNDED]
        qualified = [key for key in admitted if self._stays_below(limit, key)]
        which = (frozenset(admitted), frozenset(qualified))
        if len({self.known[key][1].method for key in qualified}) < 2 or (once and which in self._asked):
            return None
        self._asked.add(which)
        found = rank([self.known[key][0] for key in cells], limit, streaming)
        first = self.known[found.ranked[0].estimate.cell][1] if found.ranked else None
        unclear = frozenset(
            self.known[key][1].cell for key in qualified if self.known[key][0].verdict(limit) == "unclear"
        )
        rows = tuple(self.known[key][1] for key in qualified)
        return Question(self.seq_len, self.setting, asked, limit is not None, rows, first, unclear)

    def pairs(self) -> Iterator[Question]:
        """Every two methods, by whichever of their impls is fastest."""
        methods = sorted({self.known[key][1].method for key in self.cells})
        for pair in itertools.combinations(methods, 2):
            of = [key for key in self.cells if self.known[key][1].method in pair]
            if (question := self.ask(of, None, f"--methods {','.join(pair)}")) is not None:
                yield question

    def every(self) -> Iterator[Question]:
        """The product of all options."""
        self._asked.clear()
        impls = sorted({self.known[key][1].impl for key in self.cells})
        for causal, direction in DIRECTIONS:
            for impl in ("", *impls):
                of = [
                    key
                    for key in self.cells
                    if causal in (None, self.known[key][1].causal) and impl in ("", self.known[key][1].impl)
                ]
                for streaming in (False, True):
                    for limit in self._limits(of):
                        options = [direction, f"--impls {impl}" * bool(impl), "--streaming" * streaming]
                        options += [] if limit is None else [f"--memory-limit {format_bytes(limit)}"]
                        yield from self._and_without_the_first(of, limit, " ".join(filter(None, options)), streaming)

    def _and_without_the_first(
        self, cells: Sequence[str], limit: int | None, asked: str, streaming: bool
    ) -> Iterator[Question]:
        question = self.ask(cells, limit, asked, streaming, once=True)
        if question is None:
            return
        yield question
        if question.advised is not None:
            out = question.advised.method
            rest = [key for key in cells if self.known[key][1].method != out]
            if (second := self.ask(rest, limit, f"--methods -{out} {asked}".strip(), streaming, once=True)) is not None:
                yield second

    def _limits(self, cells: Sequence[str]) -> list[int | None]:
        """No limit, and the geometric mean of every two neighbouring needs that the meters of memory tell apart."""
        needs = sorted((need, self.known[key][0].beside) for key in cells if (need := self._needs[key]) is not None)
        return [None] + [
            int(math.sqrt(low * high))
            for (low, beside), (high, _) in itertools.pairwise(needs)
            if high - low > max((PEAK_SHARE - 1) * (low - beside), PEAK_SLACK)
        ]

    def _stays_below(self, limit: int | None, key: str) -> bool:
        need = self._needs[key]
        return limit is None or (need is not None and need <= limit)


def _need(cell: Considered, row: Row) -> int | None:
    """Bytes that the measured cell took, with what lives beside the peak."""
    peak = needed(row)
    return None if peak is None else peak + cell.beside


def _groups(
    quiet: Sequence[Row], failed: Sequence[Row], length: int, registry: Registry, ceilings: Ceilings
) -> Iterator[_Group]:
    """Settings in which methods were measured here and at three shorter lengths."""
    forecaster = Forecaster(registry, ceilings, [row for row in quiet if row.seq_len < length])
    earlier = [row for row in failed if row.seq_len < length]
    settings: dict[str, list[tuple[Planned, Row]]] = defaultdict(list)
    for curve in curves(quiet):
        here = next((row for row in curve.rows if row.seq_len == length), None)
        entry = registry.entries.get(curve.method)
        if here is None or entry is None or sum(row.seq_len < length for row in curve.rows) < LEAST_SHORTER:
            continue
        if forecaster.estimate(cell_of(here)).latency_s is not None:
            setting = ", ".join(f"{name} {value}" for name, value in curve.setting.items())
            settings[setting].append((Planned(cell_of(here), entry.origin, entry.method), here))
    for setting, found in settings.items():
        known = consider([planned for planned, _ in found], forecaster, earlier)
        yield _Group(length, setting, known, [row for _, row in found])


def hit_rate(found: Sequence[Trial]) -> float:
    """Share of trials whose advised method is within 10 % of the best."""
    return float(np.mean([trial.regret <= GOOD for trial in found]))


def unrefuted(found: Sequence[Trial]) -> float:
    """Share of trials whose advised method is not shown to be slower than the best by more than 10 %."""
    return float(np.mean([trial.shown_regret <= GOOD for trial in found]))


def summary(found: Sequence[Trial]) -> dict[str, Any]:
    """How many, which share is right, and why not: ``answers`` are the different ones.

    ``cautious`` is the share that is wrong because the best may not fit, ``did_not_fit`` how many were advised what
    takes more than the limit.
    """
    different = answers(found)
    return {
        "count": len(found),
        "within_10_percent": hit_rate(found),
        "unrefuted": unrefuted(found),
        "answers": len(different),
        "answers_within_10_percent": hit_rate(different),
        "cautious": float(np.mean([trial.cautious and trial.fits and trial.regret > GOOD for trial in found])),
        "did_not_fit": sum(not trial.fits for trial in found),
    }


def misses(found: Sequence[Trial]) -> list[tuple[Trial, int]]:
    """Wrong answers, the worst first: one trial for all questions with the same answer, and how many they are."""
    groups: dict[Hashable, list[Trial]] = defaultdict(list)
    for trial in found:
        if trial.regret > GOOD:
            groups[_answer(trial)].append(trial)
    return sorted(((group[0], len(group)) for group in groups.values()), key=lambda pair: -pair[0].regret)


def answers(found: Sequence[Trial]) -> list[Trial]:
    """One trial of each answer: a length, who is advised and who is best."""
    return list({_answer(trial): trial for trial in found}.values())


def _answer(trial: Trial) -> Hashable:
    return trial.seq_len, trial.setting, trial.advised, trial.best, trial.fits, trial.cautious
