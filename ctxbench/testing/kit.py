"""Every law on every case: as (law, case) pairs for a test suite, or at once as a report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctxbench.method import Method
from ctxbench.registry import time_limit
from ctxbench.testing import agreement, behaviour, costs, gradients, literal  # noqa: F401  (they register the laws)
from ctxbench.testing.case import Case, one_thread
from ctxbench.testing.forms import cases_for
from ctxbench.testing.law import LAWS, VIOLATED, Finding, Law, Violation

TIME_LIMIT_S = 120  # one law on one case


@dataclass
class Report:
    """What the laws found on one method."""

    method: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no law is broken."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """Findings of broken laws."""
        return [finding for finding in self.findings if not finding.ok]

    def count(self, status: str) -> int:
        """Number of findings with a status."""
        return sum(finding.status == status for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"method": self.method, "ok": self.ok, "findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        lines = [f"{finding.law} [{finding.case}]: {finding.status}. {finding.message}" for finding in self.findings]
        return "\n".join(lines)


def laws_for(
    method: Method, impl: str | None = None, modes: Sequence[str] | None = None, device: str = "cpu",
    every: bool = False,
) -> list[tuple[Law, Case]]:  # fmt: skip
    """Pair every law with every form of a method, for ``pytest.mark.parametrize(("law", "case"), ..., ids=str)``.

    ``every`` spares nothing: crossed forms are asked all laws of forms. A test calls ``law(case)``: it raises
    Violation, or returns a Finding (held, not claimed, not applicable).
    """
    cases = cases_for(method, impl, modes, device, every)
    return [(law, case) for case in cases for law in LAWS.values() if law.asks(case)]


def check_method(
    method: Method,
    impl: str | None = None,
    modes: Sequence[str] | None = None,
    device: str = "cpu",
    on_finding: Callable[[Finding], None] | None = None,
    every: bool = False,
) -> Report:
    """Try every law on a method; never raises for what the method does.

    Raises:
        KeyError: when the method has no impl of that name.
    """
    if impl is not None:
        method.impl(impl)
    report = Report(method.name)
    try:
        pairs = laws_for(method, impl, modes, device, every)
    except Exception as error:  # support, layers and params are the plug-in's own code
        message = f"the description of the method raised {_summary(error)}\n  {_origin(error)}"
        report.findings.append(Finding("description", method.name, VIOLATED, message))
        return report
    with one_thread():
        for law, case in pairs:
            report.findings.append(answer(law, case))
            if on_finding is not None:
                on_finding(report.findings[-1])
    return report


def answer(law: Law, case: Case) -> Finding:
    """Try one law; an exception of the method, or a call that does not end, is a violation."""
    started = time.perf_counter()
    try:
        with time_limit(TIME_LIMIT_S, f"the law {law.name}"):
            finding = law(case)
    except Violation as violation:
        finding = Finding(law.name, str(case), VIOLATED, str(violation))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in may raise anything, SystemExit included
        message = f"the method raised {_summary(error)}\n  at {case.where()}\n  {_origin(error)}"
        finding = Finding(law.name, str(case), VIOLATED, message)
    return Finding(finding.law, finding.case, finding.status, finding.message, time.perf_counter() - started)


def _summary(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _origin(error: BaseException) -> str:
    """Where in the method's own code it happened: the innermost frame outside torch and the kit."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = ("/torch/", "/ctxbench/testing/", "<frozen ")
    own = [frame for frame in frames if not any(part in frame.filename for part in foreign)]
    frame = (own or frames)[-1]
    return f"look at {frame.filename}:{frame.lineno}, in {frame.name}"
