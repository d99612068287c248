"""The law of ``as_written`` impls: they fail exactly where their defects are declared."""

from __future__ import annotations

from collections.abc import Callable

from ctxbench.testing import agreement, behaviour
from ctxbench.testing.case import Case
from ctxbench.testing.law import Unanswered, Violation, law, not_applicable, require

PROBES: dict[str, tuple[Callable[[Case], str | None], ...]] = {
    "agreement": (agreement.agreement.function,),
    "causality": (behaviour.causality.function,),
    "batch_independence": (behaviour.batch_independence.function,),
    "receptive_field": (behaviour.receptive_field.function,),
    "state": (behaviour.determinism.function, behaviour.purity.function, behaviour.streaming_equals_whole.function),
}


@law(literal=True)
def declared_defects(case: Case) -> str:
    """An as_written impl fails exactly the probes its defects declare; the other probes hold."""
    if not case.literal:
        not_applicable("it declares no defects")
    declared = case.method.impl(case.impl).defects
    strangers = sorted(set(declared) - set(PROBES))
    require(
        not strangers, expected=f"defects among {', '.join(PROBES)}", seen=", ".join(strangers), at=str(case),
        look="Impl.defects",
    )  # fmt: skip
    failures = {name: _failure(probes, case) for name, probes in PROBES.items()}
    for name, failure in failures.items():
        if name in declared:
            require(
                failure, expected=f"the {name} probe to fail: {declared[name]}", seen="it holds", at=case.where(),
                look="Impl.defects, or a sketch that was repaired by accident",
            )  # fmt: skip
        else:
            require(
                not failure or name == "agreement", expected=f"the {name} probe to hold", seen=f"{failure}",
                at=case.where(), look="declare the defect in Impl.defects, or repair it",
            )  # fmt: skip
    return f"fails {', '.join(name for name in PROBES if name in declared)} as declared"


def _failure(probes: tuple[Callable[[Case], str | None], ...], case: Case) -> str:
    for probe in probes:
        try:
            probe(case)
        except Unanswered:
            continue
        except Violation as violation:
            return str(violation)
        except Exception as error:  # a sketch may fail in any way
            return f"{type(error).__name__}: {error}"
    return ""
