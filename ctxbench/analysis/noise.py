"""How much two measurements of the same code differ: the noise floor, from a run itself or from a stored A/A pair."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ctxbench.errors import EnvironmentUnusable, UserError
from ctxbench.run.store import now

SPLITS = 70  # of one cell: all of them up to eight processes
LEAST_CELLS = 6  # of an A/A pair, and of a size of its own


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """Relative differences that mean nothing: ``sizes`` by the decade of a call's seconds, ``overall`` elsewhere."""

    overall: float
    sizes: dict[int, float] = {}

    def at(self, seconds: float) -> float:
        """The floor of a call this long."""
        return self.sizes.get(decade(seconds), self.overall)

    def larger(self, other: Floor) -> Floor:
        """At every size the larger of two floors."""
        every = {*self.sizes, *other.sizes}
        sizes = {size: max(floor.sizes.get(size, floor.overall) for floor in (self, other)) for size in every}
        return Floor(overall=max(self.overall, other.overall), sizes=sizes)


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The stored floor of one device of one machine, from two runs of the same code."""

    machine: dict[str, Any]
    floor: Floor
    cells: int
    runs: list[str]
    measured_at: str


def decade(seconds: float) -> int:
    """-3 for one to ten milliseconds, -2 for ten to a hundred."""
    return math.floor(math.log10(seconds))


def floor_of(differences: Iterable[float]) -> float:
    """Median plus three robust standard deviations of |A/A ratio - 1|."""
    values = np.fromiter(differences, float)
    median = np.median(values)
    return float(median + 3 * 1.4826 * np.median(np.abs(values - median)))


def build_floor(cells: Sequence[tuple[float, Sequence[float]]]) -> Floor | None:
    """The floor from (seconds a call, |A/A ratio - 1| of one or more A/A comparisons) a cell; None without any."""
    known = [(seconds, list(differences)) for seconds, differences in cells if len(differences)]
    if not known:
        return None
    sizes = {}
    for size in {decade(seconds) for seconds, _ in known}:
        members = [differences for seconds, differences in known if decade(seconds) == size]
        if len(members) >= LEAST_CELLS:
            sizes[size] = floor_of(itertools.chain(*members))
    return Floor(overall=floor_of(itertools.chain(*(differences for _, differences in known))), sizes=sizes)


def split_differences(medians: np.ndarray) -> list[float]:
    """|ratio - 1| between the halves of one cell's processes, over all ways to halve them; empty below four.

    A half has half the processes, so its differences are divided by sqrt(2) to stand for the whole. Halves of one run
    share their hour and their heap layout: what changes from run to run is not in them.
    """
    count = len(medians)
    if count < 4:
        return []
    half = count // 2
    if math.comb(count, half) <= SPLITS:
        chosen = np.array(list(itertools.combinations(range(count), half)))
    else:
        generator = np.random.default_rng(count)
        chosen = np.array([generator.permutation(count)[:half] for _ in range(SPLITS)])
    logs, rest = np.log(medians), np.ones((len(chosen), count), bool)
    np.put_along_axis(rest, chosen, False, axis=1)
    others = np.broadcast_to(logs, rest.shape)[rest].reshape(len(chosen), -1)
    differences = np.median(logs[chosen], axis=1) - np.median(others, axis=1)
    found: list[float] = np.expm1(np.abs(differences) / math.sqrt(2)).tolist()
    return found


def identity(info: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What makes two runs runs of one machine, from ``run.json``; empty where it is not known."""
    environment = info.get("environment") or {}
    cpu, memory = environment.get("cpu") or {}, environment.get("memory") or {}
    found = {
        "cpu": cpu.get("model"),
        "cores": cpu.get("cores_usable"),
        "caches": cpu.get("caches"),
        "memory_gib": round(memory["total_bytes"] / 2**30) if memory.get("total_bytes") else None,
    }
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        gpus = environment.get("gpu") or []
        found["gpu"] = gpus[index].get("name") if index < len(gpus) else None
    return {name: value for name, value in found.items() if value is not None}


def load(machine: Mapping[str, Any]) -> Calibration | None:
    """The stored floor of a machine; None where it was never calibrated on this computer."""
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError):
        return msgspec.json.decode(_path(machine).read_bytes(), type=Calibration)
    return None


def calibrate(
    machine: Mapping[str, Any], cells: Sequence[tuple[float, float]], runs: Sequence[str]
) -> tuple[Calibration, Path]:
    """Store the floor of a machine from an A/A pair: (seconds a call, ratio) a cell.

    Raises:
        UserError: too few cells, or a machine that is not known.
        EnvironmentUnusable: the cache folder cannot be written.
    """
    if not machine:
        raise UserError("cannot calibrate: run.json does not say which machine this is")
    if len(cells) < LEAST_CELLS:
        raise UserError(
            f"an A/A calibration needs {LEAST_CELLS} cells, received {len(cells)}\n"
            "  measure more lengths or methods, twice, with the same command"
        )
    floor = build_floor([(seconds, [abs(ratio - 1)]) for seconds, ratio in cells])
    assert floor is not None
    found = Calibration(machine=dict(machine), floor=floor, cells=len(cells), runs=list(runs), measured_at=now())
    path = _path(machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(found))
    except OSError as error:
        raise EnvironmentUnusable(f"cannot write {path}: {error.strerror}\n  set XDG_CACHE_HOME") from None
    return found, path


def _path(machine: Mapping[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxbench"
    plain = msgspec.json.encode(dict(machine), order="sorted")
    return folder / f"noise-{hashlib.blake2b(plain, digest_size=6).hexdigest()}.json"
