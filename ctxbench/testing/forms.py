"""The forms of a method that the laws are tried on: settings, directions, positions and memory sizes of each impl.

A *setting* is what changes the mathematics beside the sizes: each value of a choice or a switch alone, and whatever
combination the method declares in ``METHOD.variants``. Every setting is crossed with every direction and position.
What a product of all laws with all crossings would cost is spared where it says little: see ``Case.crossed`` and
``Case.retabled``; ``every=True`` spares nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxbench.method import ROPE, Dims, Method, Params, Support
from ctxbench.testing.case import TINY, Case, sized, small_params
from ctxbench.testing.law import LAWS

SAME_BUT_FOR_CONSTANTS = {**dict.fromkeys(ROPE[1:], "rope"), "alibi": "t5"}  # other angles; other numbers a distance


@dataclass(frozen=True)
class Form:
    """One crossing of setting, direction and position: mathematics, whoever computes it."""

    label: str
    setting: Mapping[str, Any]
    params: Params
    dims: Dims


@dataclass(frozen=True)
class Coverage:
    """How many laws are asked of one impl in one form, in which modes; ``reason`` says what is left out and why."""

    method: str
    impl: str
    form: str
    laws: int
    modes: tuple[str, ...]
    reason: str


def cases_for(
    method: Method, impl: str | None = None, modes: Sequence[str] | None = None, device: str = "cpu",
    every: bool = False,
) -> list[Case]:  # fmt: skip
    """All forms of a method's impls: settings, directions, positions, memory sizes, and their crossings.

    Of other settings than the default, and of crossings, an impl has those that it runs here.

    Raises:
        KeyError: when the method has no impl of that name.
    """
    impls = [method.impl(impl)] if impl else list(method.impls)
    found = forms(method)
    alone = full(method, found)
    admitted = [form for form in found if form in alone or admits(method, form)]
    cases = []
    for one in impls:
        for form in admitted:
            case = case_of(method, one.name, form, modes or (), device)
            crossed = form not in alone
            if crossed or form.setting:
                if not any(case.supports(mode) for mode in case.modes):
                    continue
                case = dataclasses.replace(case, crossed=crossed and not every, retabled=case.retabled and not every)
            cases.append(case)
            if form is found[0]:
                cases += _memories(case)
    return cases


def coverage(method: Method, impl: str | None = None, every: bool = False, device: str = "cpu") -> list[Coverage]:
    """The whole product of impls, settings, positions, directions and modes: what the laws are tried on, and what not.

    Forms that the mathematics refuses have one line for all impls.
    """
    found = []
    impls = [method.impl(impl)] if impl else list(method.impls)
    cases = {
        (case.impl, case.label): case for one in impls for case in cases_for(method, one.name, None, device, every)
    }
    for form in forms(method):
        answer = admits(method, form)
        if not answer:
            found.append(Coverage(method.name, "all", form.label, 0, (), answer.reason))
            continue
        for one in impls:
            case = cases.pop((one.name, form.label), None) or case_of(method, one.name, form, (), device)
            found.append(_covered(case))
    return found + [_covered(case) for case in cases.values()]


def _covered(case: Case) -> Coverage:
    answers = {mode: case.supports(mode) for mode in case.method.modes}
    modes = tuple(mode for mode, answer in answers.items() if answer)
    laws = sum(law.asks(case) for law in LAWS.values()) if modes else 0
    reasons = [answer.reason for answer in answers.values() if not answer]
    if modes and not laws:
        reasons.append("as the same form with rope or t5, but for a table of constants")
    return Coverage(case.method.name, case.impl, case.label, laws, modes, "; ".join(dict.fromkeys(reasons)))


def settings(method: Method) -> list[dict[str, Any]]:
    """The default, each other value of a choice or a switch (of numbers the ends), and the declared variants."""
    found: list[dict[str, Any]] = [{}]
    for spec in dataclasses.fields(method.params):
        values = spec.metadata.get("choices") or ((False, True) if type(spec.default) is bool else ())
        if values and isinstance(spec.default, (int, float)) and type(spec.default) is not bool:
            values = (min(values), max(values))
        found += [{spec.name: value} for value in values if value != spec.default]
    return found + [dict(variant) for variant in method.variants if dict(variant) not in found]


def forms(method: Method) -> list[Form]:
    """Every crossing of settings, positions and directions; that of all defaults, which has no label, first."""
    usual, directions = small_params(method, _usual(method)), method.causal or (True,)
    found = []
    for setting in settings(method):
        try:
            params = usual.replace(**setting)
        except ValueError:  # at odds with another parameter
            continue
        for position, causal in itertools.product(method.positions, directions):
            dims = sized(method, TINY.replace(causal=causal, position=position), params)
            parts = [",".join(f"{name}={value}" for name, value in setting.items())] if setting else []
            parts += [("causal" if causal else "bidirectional")] if causal != directions[0] else []
            parts += [position] if position != method.positions[0] else []
            found.append(Form("/".join(parts), setting, params, dims))
    return found


def full(method: Method, found: Sequence[Form]) -> list[Form]:
    """Of all forms those where a setting, direction or position is tried, the others at their defaults.

    What the default setting does not have, such as a direction, is tried with the first one that has it.
    """
    groups: dict[Any, list[Form]] = {}
    for form in found:
        for key in ((str(form.setting),), (form.dims.causal, None), (form.dims.position,)):
            groups.setdefault(key, []).append(form)
    chosen = [next((form for form in group if admits(method, form)), group[0]) for group in groups.values()]
    return [form for form in found if any(form is one for one in chosen)]


def admits(method: Method, form: Form) -> Support:
    """Whether the mathematics has this form, in any mode; else why it has no forward pass."""
    answers = [method.mode_support(mode, form.dims, form.params) for mode in method.modes]
    return next((answer for answer in answers if answer), answers[0])


def case_of(method: Method, impl: str, form: Form, modes: Sequence[str] = (), device: str = "cpu") -> Case:
    """One impl of a form."""
    retabled = SAME_BUT_FOR_CONSTANTS.get(form.dims.position) in method.positions
    return Case(method, impl, form.params, form.dims, tuple(modes or method.modes), device, form.label, retabled)


def _memories(case: Case) -> Iterator[Case]:
    """Other sizes of the memory, none included."""
    name = case.method.memory_parameter
    if name is None:
        return
    small = int(getattr(case.params, name))
    for size in dict.fromkeys((0, small + small // 2 + 1)):
        try:
            params = case.params.replace(**{name: size})
        except ValueError:  # outside the parameter's range, or at odds with another parameter
            continue
        dims = sized(case.method, case.dims, params)
        yield dataclasses.replace(case, params=params, dims=dims, label=f"memory={size}")


def _usual(method: Method) -> Dims:
    return TINY.replace(causal=(method.causal or (True,))[0], position=method.positions[0])
