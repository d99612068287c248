"""The independent units of a row: one median a process, and how uncertain they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ctxbench.rows import Row

KERNELS = ("matmul", "copy")  # the reference kernels of ``ctxbench.measure.drift``
PRIOR_DOF = 4  # weight of the common variance, in degrees of freedom, against that of one cell


@dataclass(frozen=True)
class Processes:
    """The processes of one row that count: those that ran beside other work are left out where two quiet ones remain.

    medians: seconds a call, one a process. references: seconds of each reference kernel, one a process; empty where
    the row has none. paces: logarithm of the seconds that the product between the samples took while the typical sample
    ran, one a process; empty where the row has none. disturbed: other work ran beside some of them.
    """

    medians: np.ndarray
    references: dict[str, np.ndarray] = field(default_factory=dict)
    disturbed: bool = False
    paces: np.ndarray = field(default_factory=lambda: np.empty(0))


def processes(row: Row) -> Processes:
    """The processes of a row; none where it has no latency."""
    if row.latency_s is None:
        return Processes(np.empty(0))
    samples, contended = row.latency_s.samples, row.latency_s.contended
    sensors = row.env_delta.get("processes") or []
    chosen = [index for index, values in enumerate(samples) if values]
    quiet = [index for index in chosen if not (index < len(contended) and contended[index])]
    if 2 <= len(quiet) < len(chosen):
        chosen = quiet
    disturbed = not set(chosen) <= set(quiet)
    medians = np.array([np.median(samples[index]) for index in chosen])
    beats = [sensors[index].get("reference_beside_s") if index < len(sensors) else None for index in chosen]
    paces = np.array([pace(samples[i], seen) for i, seen in zip(chosen, beats, strict=True) if seen])
    paces = paces if len(paces) == len(chosen) else np.empty(0)
    names = {kernel: f"reference_{kernel}_s" for kernel in KERNELS}
    complete = all(index < len(sensors) and all(sensors[index].get(n) for n in names.values()) for index in chosen)
    if not chosen or not complete:
        return Processes(medians, disturbed=disturbed, paces=paces)
    seen = {kernel: np.array([np.mean(sensors[i][name]) for i in chosen]) for kernel, name in names.items()}
    return Processes(medians, seen, disturbed, paces)


def pace(samples: Sequence[float], beats: Sequence[Sequence[float]]) -> float:
    """How slow the machine was for one process: log of the reference's seconds while its typical sample ran.

    Args:
        samples: seconds of each call.
        beats: (samples taken before, seconds of the reference) in order; the first is before all samples, the last
            after them. A sample is held against the mean of the two beside it.
    """
    taken, seconds = np.asarray(beats, float).T
    before = np.searchsorted(taken, np.arange(len(samples)), side="right") - 1
    beside = (seconds[before] + seconds[np.minimum(before + 1, len(seconds) - 1)]) / 2
    return float(np.log(np.median(samples)) - np.log(np.median(np.asarray(samples) / beside)))


def moderated_variances(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Variance of each group, drawn towards the common one, and its degrees of freedom.

    Three processes say little about their spread, so the variances of all groups are averaged and count as
    ``PRIOR_DOF`` further observations of each (Smyth 2004, the moderated t). NaN where no group has two values.
    """
    dof = np.array([max(len(group) - 1, 0) for group in groups])
    own = np.array([np.var(group, ddof=1) if len(group) > 1 else 0.0 for group in groups])
    if not dof.sum():
        return np.full(len(groups), np.nan), dof
    common = float((dof * own).sum() / dof.sum())
    return (dof * own + PRIOR_DOF * common) / (dof + PRIOR_DOF), np.minimum(dof + PRIOR_DOF, dof.sum())
