"""The conformance kit: every law a method must satisfy, for our own methods and for third-party ones.

In a test suite::

    from ctxbench.testing import laws_for

    @pytest.mark.parametrize(("law", "case"), laws_for(METHOD), ids=str)
    def test_conformance(law, case):
        law(case)

On the command line: ``ctxbench check NAME``. At once: ``check_method(METHOD).failures``.
"""

from ctxbench.testing.case import Case, small_params, streamed
from ctxbench.testing.forms import cases_for
from ctxbench.testing.kit import Report, answer, check_method, laws_for
from ctxbench.testing.law import HELD, LAWS, NOT_APPLICABLE, NOT_CLAIMED, STATUSES, VIOLATED, Finding, Law, Violation

__all__ = [
    "HELD",
    "LAWS",
    "NOT_APPLICABLE",
    "NOT_CLAIMED",
    "STATUSES",
    "VIOLATED",
    "Case",
    "Finding",
    "Law",
    "Report",
    "Violation",
    "answer",
    "cases_for",
    "check_method",
    "laws_for",
    "small_params",
    "streamed",
]
