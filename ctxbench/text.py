"""What the user is told about a row, in one place: every warning, what it means and what to do next."""

from __future__ import annotations

from enum import Enum


class Warn(Enum):
    """A warning of a row: the code that rows carry, what it means, what to do next."""

    CONTENDED = (
        "contended",
        "other work ran on this machine during the measurement",
        "close other programs and measure again with --rerun all",
    )
    ONE_PROCESS = (
        "one_process",
        "a single process was measured, so its spread is unknown",
        "raise --budget or --cell-timeout, or measure this length alone",
    )
    PRECISION = (
        "precision",
        "the interval is wider than the precision asked for",
        "raise --processes, or accept the interval: --precision 5%",
    )
    UNSTEADY = (
        "unsteady",
        "calls still became faster or slower when sampling began",
        "look at the warm-up samples with `ctxbench show`",
    )
    FEW_SAMPLES = ("few_samples", "fewer samples than asked for", "raise --cell-timeout")
    SHORT_CALLS = (
        "short_calls",
        "a call takes less than 100 us, where the clock and the interpreter are part of the result",
        "raise --seq, --batch or --d-model",
    )
    SPREAD = (
        "spread",
        "samples of one process differ by more than the machine explains",
        "look at the samples with `ctxbench show`",
    )
    BIMODAL = (
        "bimodal",
        "the samples form two clusters, so one median describes neither",
        "look at the samples with `ctxbench show`",
    )
    THROTTLED = (
        "throttled",
        "the clock of the device fell during the measurement",
        "let the device cool, or fix its clock, and measure again",
    )
    DRIFT = (
        "drift",
        "the reference kernels ran at another speed after the measurement than before it",
        "measure again when the machine is quiet; `ctxbench show` has both times of both kernels",
    )
    TOO_FAST = (
        "too_fast",
        "faster than the ceilings of this machine allow",
        "check that the impl computes what it claims: `ctxbench check METHOD`",
    )
    METERS_DISAGREE = (
        "meters_disagree",
        "allocator and resident peak differ by more than max(2 MiB, 3 %)",
        "kernels with scratch buffers do that; read both columns",
    )
    PEAK_FORMULA = (
        "peak_formula",
        "the measured peak differs from the formula by more than 3 %",
        "correct the method's cost.py, or read the measured column",
    )
    FLOPS_DISAGREE = (
        "flops_disagree",
        "the dispatcher counted other FLOPs than the formula says",
        "correct the method's cost.py: `ctxbench check METHOD`",
    )
    FLOPS_ZERO = (
        "flops_zero",
        "no FLOPs were counted for a method that multiplies matrices",
        "register a formula for the operators the counter is blind to",
    )
    UNCOUNTED = (
        "uncounted",
        "operators without a FLOP formula ran, so the count is a lower bound",
        "register formulas for them",
    )
    UNTRACEABLE = (
        "untraceable",
        "shapes depend on values, so the fake-tensor tracer stopped",
        "read the measured columns only",
    )
    STATE_FORMULA = (
        "state_formula",
        "the state has another size than the formula says",
        "correct the method's cost.py: `ctxbench check METHOD`",
    )
    PARAMETERS_FORMULA = (
        "parameters_formula",
        "the module has another number of parameters than the formula says",
        "correct the method's cost.py: `ctxbench check METHOD`",
    )
    FORMULA_FAILED = (
        "formula_failed",
        "the method's cost formula raised an error",
        "correct the method's cost.py: `ctxbench check METHOD`",
    )
    MEMORY_FAILED = (
        "memory_failed",
        "the process that measures memory did not finish",
        "read the reason; the latency stands on its own",
    )
    PROCESS_FAILED = (
        "process_failed",
        "one of the timing processes did not finish",
        "read the reason; the other processes are kept",
    )
    CHECKSUM = (
        "checksum",
        "processes computed different outputs from the same weights and input",
        "check the impl for races or uninitialised memory: `ctxbench check METHOD`",
    )
    NO_GATE = (
        "no_gate",
        "the correctness gate was switched off with --no-gate",
        "never publish such a number; measure again with the gate",
    )
    OTHER_MACHINE = (
        "other_machine",
        "the row was measured on another machine than the first ones of this merged run",
        "compare it with rows of its own machine; FLOPs and allocated bytes are the same anywhere",
    )
    OTHER = ("other", "a remark of the measuring process", "read it")

    def __init__(self, code: str, meaning: str, action: str):
        self.code, self.meaning, self.action = code, meaning, action

    def __call__(self, detail: str = "") -> str:
        """The text a row carries: the code and, after a colon, what is particular to this row."""
        return f"{self.code}: {detail}" if detail else self.code


_BY_CODE = {kind.code: kind for kind in Warn}


def kind_of(warning: str) -> Warn:
    """Which warning a row's text is; OTHER where its code is not known."""
    return _BY_CODE.get(warning.partition(":")[0].strip(), Warn.OTHER)


def explain(warning: str) -> str:
    """One sentence for a reader: meaning, the row's own detail, what to do next."""
    kind = kind_of(warning)
    code, _, detail = warning.partition(":")
    if kind is Warn.OTHER and code.strip() != kind.code:
        return warning
    particular = f" ({detail.strip()})" if detail.strip() else ""
    return f"{kind.meaning}{particular}; {kind.action}"
