"""Triton's interpreter without what it does again and again, for the programs that hold kernels against float64.

Where TRITON_INTERPRET is 1, which must be set before kernels are imported; elsewhere nothing here does anything.
"""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def spare() -> None:
    """Put NumPy under ``triton.language`` once a launch, and once for each module that device functions come from.

    The interpreter would do so for each of their thousands of calls, a third of its time.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        there: set[str] = set()

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            if self.fn.__module__ not in there:
                there.add(self.fn.__module__)
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*arguments, **named)

        interpreter.InterpretedFunction.__call__ = call
        check_integers(False)


def check_integers(wanted: bool) -> None:
    """Whether every sum and product of integers is held against 32 bits, which takes another third.

    What overflows does so in whatever dtype, so the programs that run cases in two of them ask for it in one.
    """
    if INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        object.__setattr__(interpreter_builder.options, "sanitize_overflow", wanted)
