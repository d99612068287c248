"""From samples to numbers: the median of process medians and its interval. Processes are the independent units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ctxbench.rows import Latency
from ctxbench.run.tasks import Samples

RESAMPLES = 10_000
SEED = 20_2611
LEAST_PROCESSES = 5  # fewer give no bootstrap interval, only their range
CONFIDENCE = 0.95
FENCE = 1.5  # interquartile ranges beyond the quartiles


def summarise(processes: Sequence[Samples], precision: float) -> tuple[Latency, bool]:
    """Put the processes of one cell together.

    Returns:
        The row's latency, and whether half its interval is at most ``precision`` of the median. A single sample has
        no spread, so it never reaches a precision.
    """
    measured = [process for process in processes if process.samples]
    if not measured:
        raise ValueError("no process delivered a sample")
    medians = [float(np.median(process.samples)) for process in measured]
    median = float(np.median(medians))
    low, high = interval(medians) if len(medians) > 1 else median_interval(measured[0].samples)
    cpu = [float(np.median(process.cpu)) for process in measured if process.cpu]
    latency = Latency(
        median=median,
        low=low,
        high=high,
        samples=[process.samples for process in measured],
        cpu_median=float(np.median(cpu)) if cpu else None,
        n_processes=len(measured),
        stop=[process.stop for process in measured],
        outliers=sum(outliers(process.samples) for process in measured),
        faults_per_call=float(np.median([process.faults_per_call for process in measured])),
        contended=[process.contended for process in measured],
        warmup=[process.warmup for process in measured],
        set_up=float(np.median([process.set_up_s for process in measured])),
    )
    known = len(measured) > 1 or len(measured[0].samples) > 1
    return latency, known and (high - low) / 2 <= precision * median


def interval(medians: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median over processes, or their range where there are fewer than five."""
    values = np.asarray(medians)
    if len(values) < LEAST_PROCESSES:
        return float(values.min()), float(values.max())
    draws = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.median(values[draws], axis=1), (tail, 100 - tail))
    return float(low), float(high)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median of one process, by ranks; the range below six samples."""
    ordered = sorted(samples)
    count = len(ordered)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
    return ordered[max(low - 1, 0)], ordered[min(high, count - 1)]


def half_width(samples: Sequence[float]) -> float:
    """Half the median's interval, relative to the median; infinite for a single sample."""
    if len(samples) < 2:
        return math.inf
    low, high = median_interval(samples)
    median = float(np.median(samples))
    return (high - low) / 2 / median if median > 0 else math.inf


def outliers(samples: Sequence[float]) -> int:
    """Samples beyond Tukey's inner fences; they are counted and drawn, never deleted."""
    if len(samples) < 4:
        return 0
    values = np.asarray(samples)
    first, third = np.percentile(values, (25, 75))
    margin = FENCE * (third - first)
    return int(((values < first - margin) | (values > third + margin)).sum())


def robust_cv(samples: Sequence[float]) -> float:
    """Relative spread that outliers cannot move: 1.4826 median absolute deviations over the median."""
    values = np.asarray(samples)
    median = float(np.median(values))
    return float(1.4826 * np.median(np.abs(values - median)) / median) if median > 0 else math.inf


def is_bimodal(samples: Sequence[float]) -> bool:
    """Two clusters, each of at least a tenth of the samples, with a gap of over five times their inner spread."""
    values = np.sort(np.asarray(samples))
    least = max(3, math.ceil(len(values) / 10))
    if len(values) < 2 * least:
        return False
    gaps = np.diff(values)[least - 1 : len(values) - least]
    cut = int(gaps.argmax()) + least
    spread = max(float(np.median(np.abs(part - np.median(part)))) for part in (values[:cut], values[cut:]))
    return bool(gaps.max() > 5 * spread and gaps.max() > 0.05 * values[cut - 1])
