"""What a law is, how it answers, and what a violation says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ctxbench.testing.case import Case

HELD, VIOLATED, NOT_CLAIMED, NOT_APPLICABLE = "held", "violated", "not claimed", "not applicable"
STATUSES = (HELD, VIOLATED, NOT_CLAIMED, NOT_APPLICABLE)


class Violation(AssertionError):
    """A broken law: what was expected, what was seen, at which sizes, and where to look."""

    def __init__(self, expected: str, seen: str, at: str, look: str):
        super().__init__(f"expected {expected}\n  saw {seen}\n  at {at}\n  look at {look}")


class Unanswered(Exception):
    """A law that asks nothing of this case."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Finding:
    """The answer of one law on one case. ``message`` is the reason, or the violation."""

    law: str
    case: str
    status: str
    message: str = ""
    elapsed_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return self.status != VIOLATED


@dataclass(frozen=True)
class Law:
    """A statement every method must satisfy. Calling it raises :class:`Violation`, or returns a :class:`Finding`.

    Attributes:
        statement: one sentence.
        every_form: tried on every setting, direction, position and memory size; else on the preferred form alone.
        literal: holds of ``as_written`` impls too.
        retabled: tried even on forms that differ from another one in a table of constants alone.
        crossed: tried even on forms whose setting, direction and position have each been tried in another one.
    """

    name: str
    statement: str
    function: Callable[[Case], str | None]
    every_form: bool = False
    literal: bool = False
    retabled: bool = False
    crossed: bool = False

    def __str__(self) -> str:
        return self.name

    def asks(self, case: Case) -> bool:
        """Whether this form of the method is one to try the law on."""
        if case.crossed:
            return self.crossed and not case.retabled
        return not case.label or (self.every_form and (self.retabled or not case.retabled))

    def __call__(self, case: Case) -> Finding:
        try:
            if case.literal and not self.literal:
                not_applicable("an as_written impl is held to its declared defects, see declared_defects")
            answer = case.supports()
            if not answer:
                not_applicable(answer.reason)
            note = self.function(case)
        except Unanswered as unanswered:
            return Finding(self.name, str(case), unanswered.status, str(unanswered))
        return Finding(self.name, str(case), HELD, note or "")


LAWS: dict[str, Law] = {}


def law(
    *, every_form: bool = False, literal: bool = False, retabled: bool = False, crossed: bool = False
) -> Callable[[Callable[[Case], str | None]], Law]:
    """Register a function ``f(case) -> note | None`` under its name; its docstring is the statement."""

    def register(function: Callable[[Case], str | None]) -> Law:
        statement = (function.__doc__ or "").strip()
        made = Law(function.__name__, statement, function, every_form, literal, retabled, crossed)
        LAWS[made.name] = made
        return made

    return register


def not_claimed(reason: str) -> NoReturn:
    """End a law: the method does not claim it."""
    raise Unanswered(NOT_CLAIMED, reason)


def not_applicable(reason: str) -> NoReturn:
    """End a law: it has no meaning for this case."""
    raise Unanswered(NOT_APPLICABLE, reason)


def require(ok: Any, *, expected: str, seen: str, at: str, look: str) -> None:
    """Raise :class:`Violation` unless ``ok``."""
    if not ok:
        raise Violation(expected, seen, at, look)


def need_mode(case: Case, mode: str) -> None:
    """End a law that is about a mode the case has not."""
    answer = case.supports(mode)
    if not answer:
        not_applicable(answer.reason)
