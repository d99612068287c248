"""Forecasts of time and peak memory: a roofline for what was never measured, scaling for what was.

Time of one call, where nothing of its series was measured::

    t = steps * STEP_S + flops / (EFFICIENCY * matmul ceiling) + traffic / copy ceiling

Traffic is what an unfused program moves: its peak memory several times over, or the least traffic where that is more.
Once another length of the series has finished, ``t(T) = t(T0) * model(T) / model(T0)``: the model's constant errors
cancel. Without formulas, a power law through the finished cells takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from ctxbench.cell import Cell
from ctxbench.cost.figures import Figures
from ctxbench.rows import Forecast
from ctxbench.units import format_tokens

EFFICIENCY = 0.5  # of the matmul ceiling, typical of whole layers: small products, softmax, norms
PASSES = 3  # how often a program touches its peak memory
STEP_S = {"cpu": 300e-6, "cuda": 150e-6}  # dispatching one layer evaluation
TRAIN_FACTOR = 3.0  # dispatch and traffic of forward plus backward, over forward
DRIFT = (0.8, 1.25)  # how far an octave may bend away from the model, learnt from the two nearest lengths
LONE_EXPONENTS = (1.0, 1.5, 2.0)  # low, middle, high growth where one finished length and no formula is all there is


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """How fast this machine can be: FLOP/s of large products by dtype, byte/s of a copy (read plus write)."""

    flops_per_s: dict[str, float]
    bytes_per_s: float
    calibrated: bool
    device: str = "cpu"
    threads: int = 0
    measured_at: str = ""

    def matmul(self, dtype: str) -> float:
        """FLOP/s in a dtype; the slowest known one stands in for a dtype that was not calibrated."""
        return self.flops_per_s.get(dtype) or min(self.flops_per_s.values())

    def raised_by(self, other: Ceilings) -> Ceilings:
        """The higher of both: a calibration beside other work must not lower what the machine has already shown."""
        if not self.calibrated:
            return other
        rates = {
            dtype: max(self.flops_per_s.get(dtype, 0.0), other.flops_per_s.get(dtype, 0.0))
            for dtype in {*self.flops_per_s, *other.flops_per_s}
        }
        return msgspec.structs.replace(other, flops_per_s=rates, bytes_per_s=max(self.bytes_per_s, other.bytes_per_s))


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A finished cell of a series."""

    seq_len: int
    latency_s: float
    peak_bytes: int | None = None
    figures: Figures | None = None


def call_model(cell: Cell, figures: Figures, ceilings: Ceilings) -> float:
    """Seconds of one call by the roofline with efficiency and unfused traffic."""
    kind = cell.device.partition(":")[0]
    compute = figures.flops / (EFFICIENCY * ceilings.matmul(cell.dtype))
    return steps(cell, figures) * STEP_S[kind] + compute + traffic(cell, figures) / ceilings.bytes_per_s


def steps(cell: Cell, figures: Figures) -> float:
    """Layer evaluations that depend on one another; a backward pass counts as two more."""
    return _train_factor(cell) * max(figures.depth or 0, cell.num_layers)


def traffic(cell: Cell, figures: Figures) -> float:
    """Bytes an unfused program moves."""
    return max(_least_traffic(cell, figures), PASSES * _train_factor(cell) * (figures.peak_bytes or 0))


def call_bound(cell: Cell, figures: Figures, ceilings: Ceilings) -> float:
    """Seconds below which no program stays that does this work: full ceilings, perfect overlap."""
    return max(figures.flops / ceilings.matmul(cell.dtype), _least_traffic(cell, figures) / ceilings.bytes_per_s)


def forecast(cell: Cell, figures: Figures | None, ceilings: Ceilings, finished: Sequence[Point] = ()) -> Forecast:
    """Forecast one cell from the finished cells of its series, else from the roofline, else not at all."""
    points = sorted(finished, key=lambda point: abs(math.log(point.seq_len / cell.seq_len)))
    peak = _peak(cell, figures, points)
    if not points:
        return _from_roofline(cell, figures, ceilings, peak)
    nearest = points[0]
    if figures is not None and nearest.figures is not None:
        low, middle, high = _scaled(cell, figures, ceilings, points)
        basis = "formula, scaled"
    else:
        low, middle, high = _powers(cell.seq_len, points, lambda point: point.latency_s)
        basis = "power law"
    return Forecast(
        latency_s=middle, low=low, high=high, peak_bytes=peak,
        basis=f"{basis} from {format_tokens(nearest.seq_len)}",
    )  # fmt: skip


def _from_roofline(cell: Cell, figures: Figures | None, ceilings: Ceilings, peak: int | None) -> Forecast:
    if figures is None:
        return Forecast(peak_bytes=peak, basis="no formula and nothing of this series measured")
    middle, bound = call_model(cell, figures, ceilings), call_bound(cell, figures, ceilings)
    # Built-in ceilings may be below this machine's real ones, so that the bound is none.
    low = bound if ceilings.calibrated else bound / 8
    basis = "roofline" if ceilings.calibrated else "roofline, uncalibrated"
    return Forecast(latency_s=middle, low=min(low, middle), high=3 * middle, peak_bytes=peak, basis=basis)


def _scaled(cell: Cell, figures: Figures, ceilings: Ceilings, points: list[Point]) -> tuple[float, float, float]:
    nearest = points[0]
    model = _model_at(nearest, cell, ceilings)
    middle = nearest.latency_s * call_model(cell, figures, ceilings) / model
    octaves = math.log2(cell.seq_len / nearest.seq_len)
    second = points[1] if len(points) > 1 else None
    if second is not None and second.figures is not None and (second.seq_len < nearest.seq_len) == (octaves > 0):
        residual = (nearest.latency_s / second.latency_s) / (model / _model_at(second, cell, ceilings))
        drift = residual ** (1 / math.log2(nearest.seq_len / second.seq_len))
        middle *= min(max(drift, DRIFT[0]), DRIFT[1]) ** octaves
    spread: float = 1.2 * 1.15 ** abs(octaves)
    return middle / spread, middle, middle * spread


def _model_at(point: Point, cell: Cell, ceilings: Ceilings) -> float:
    assert point.figures is not None
    return call_model(msgspec.structs.replace(cell, seq_len=point.seq_len), point.figures, ceilings)


def _powers(seq_len: int, points: list[Point], value: Callable[[Point], float]) -> tuple[float, float, float]:
    """Low, middle and high continuation of a power law through the nearest points."""
    nearest = points[0]
    exponents: tuple[float, ...] = LONE_EXPONENTS
    if len(points) > 1:
        second = points[1]
        slope = math.log(value(nearest) / value(second)) / math.log(nearest.seq_len / second.seq_len)
        slope = min(max(slope, 0.0), 3.0)
        exponents = (max(slope - 0.3, 0.0), slope, max(slope + 0.3, 2.0))
    ratio = seq_len / nearest.seq_len
    low, middle, high = sorted(value(nearest) * ratio**exponent for exponent in exponents)
    return low, middle, high


def _peak(cell: Cell, figures: Figures | None, points: list[Point]) -> int | None:
    """The formula, corrected by what the nearest finished cell really took; else a power law."""
    known = [point for point in points if point.peak_bytes]
    if figures is not None and figures.peak_bytes is not None:
        nearest = known[0] if known else None
        if nearest is not None and nearest.figures is not None and nearest.figures.peak_bytes:
            return int(figures.peak_bytes * max(1.0, (nearest.peak_bytes or 0) / nearest.figures.peak_bytes))
        return figures.peak_bytes
    if not known:
        return None
    _, middle, _ = _powers(cell.seq_len, known, lambda point: float(point.peak_bytes or 1))
    return int(middle)


def _train_factor(cell: Cell) -> float:
    return TRAIN_FACTOR if cell.mode == "train" else 1.0


def _least_traffic(cell: Cell, figures: Figures) -> float:
    """Inputs, outputs, weights and, when decoding, the state, each touched once."""
    if figures.least_bytes is not None:
        return figures.least_bytes
    tokens = cell.batch_size * (1 if cell.mode == "decode" else cell.seq_len)
    state = figures.state_bytes if cell.mode == "decode" else 0
    return least_bytes(cell.itemsize, tokens, cell.d_model, figures.num_parameters, state)


def least_bytes(itemsize: int, tokens: int, d_model: int, num_parameters: int, state_bytes: int = 0) -> int:
    """Bytes no program avoids: inputs, outputs, weights and a state that is read, each touched once."""
    return itemsize * (2 * tokens * d_model + num_parameters) + state_bytes
