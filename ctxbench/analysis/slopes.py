"""Growth with the length: slopes between neighbouring lengths, one robust slope, and the fit of one constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ctxbench.analysis.frame import MEASURED

if TYPE_CHECKING:
    import pandas as pd


class LocalSlope(NamedTuple):
    """Slope of log value against log length between two neighbouring lengths.

    ``seq_len`` is their geometric mean. ``low`` and ``high`` take the interval ends that tilt the line most: a bound,
    not a confidence level.
    """

    seq_len: float
    value: float
    low: float
    high: float


class Trend(NamedTuple):
    """Robust slope over all lengths (Theil-Sen) with its 95 % interval; the interval is NaN below four points."""

    value: float
    low: float
    high: float


def local_slopes(
    lengths: Sequence[float],
    values: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> list[LocalSlope]:
    """Slopes between neighbours of a curve with increasing lengths and positive values."""
    low, high = values if low is None else low, values if high is None else high
    slopes = []
    for i in range(len(lengths) - 1):
        octave = math.log(lengths[i + 1] / lengths[i])
        slopes.append(
            LocalSlope(
                seq_len=math.sqrt(lengths[i] * lengths[i + 1]),
                value=math.log(values[i + 1] / values[i]) / octave,
                low=math.log(low[i + 1] / high[i]) / octave,
                high=math.log(high[i + 1] / low[i]) / octave,
            )
        )
    return slopes


def trend(lengths: Sequence[float], values: Sequence[float]) -> Trend | None:
    """One slope for a whole curve; None below two points."""
    if len(lengths) < 2:
        return None
    from scipy.stats import theilslopes

    fit = theilslopes([math.log(value) for value in values], [math.log(length) for length in lengths])
    if len(lengths) < 4:
        return Trend(float(fit.slope), math.nan, math.nan)
    return Trend(float(fit.slope), float(fit.low_slope), float(fit.high_slope))


def fit_constant(measured: Sequence[float], model: Sequence[float]) -> float:
    """The constant ``c`` that minimises the squared relative error, in logarithms, of ``measured = c * model``."""
    ratios = [math.log(y / x) for y, x in zip(measured, model, strict=True)]
    return math.exp(sum(ratios) / len(ratios))


def model_table(series: pd.DataFrame) -> pd.DataFrame:
    """One series measured against its formula, a length a line.

    Columns: seq_len, status, reason, latency_s with its interval, work (FLOPs by formula; ``basis`` says which of
    the three numbers it is), model_s (the work times one fitted constant), residual (measured / model - 1), and for
    the step from the previous measured length slope, slope_low, slope_high, slope_formula and slope_at.
    """
    table = series.sort_values("seq_len").drop_duplicates("seq_len", keep="last")
    keep = ["seq_len", "status", "reason", "latency_s", "latency_low_s", "latency_high_s"]
    basis = work_basis(table)
    work = table[basis].astype(float)
    table = table[keep].assign(work=work.where(work > 0), basis=basis).reset_index(drop=True)
    usable = table["status"].isin(MEASURED) & (table["latency_s"] > 0)
    for column in keep[3:]:
        table[column] = table[column].where(usable)
    fitted = table[usable & table["work"].notna()]
    constant = fit_constant(list(fitted["latency_s"]), list(fitted["work"])) if len(fitted) else math.nan
    table["model_s"] = table["work"] * constant
    table["residual"] = table["latency_s"] / table["model_s"] - 1
    for column in ("slope", "slope_low", "slope_high", "slope_formula", "slope_at"):
        table[column] = math.nan
    measured = table[usable]
    lengths = list(measured["seq_len"])
    steps = local_slopes(lengths, *(list(measured[name]) for name in ("latency_s", "latency_low_s", "latency_high_s")))
    formula = local_slopes(lengths, list(measured["work"])) if measured["work"].notna().all() else []
    for i, step in enumerate(steps):
        row = measured.index[i + 1]
        table.loc[row, ["slope", "slope_low", "slope_high", "slope_at"]] = [
            step.value,
            step.low,
            step.high,
            step.seq_len,
        ]
        if formula:
            table.loc[row, "slope_formula"] = formula[i].value
    return table


def work_basis(series: pd.DataFrame) -> str:
    """Which FLOP column the model is built on: the formula of the impl, else the count, else the algorithm's."""
    for column in ("flops_formula", "flops_counted", "flops_algorithmic"):
        if series[column].notna().any():
            return column
    return "flops_formula"
