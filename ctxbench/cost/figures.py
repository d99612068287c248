"""The closed forms of one cell as integers. Needs no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from ctxbench.cell import Cell
from ctxbench.cost import symbols
from ctxbench.cost.model import Cost, evaluate, local_slope, total
from ctxbench.method import Method


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What the formulas say of one cell: FLOPs, bytes and counts; None where the method has no such formula."""

    algorithmic: int
    flops: int
    num_parameters: int
    state_bytes: int
    peak_bytes: int | None = None
    least_bytes: int | None = None
    depth: int | None = None


class Evaluator:
    """Evaluates formulas of many cells; a method's formulas are built once for each structure they take."""

    def __init__(self) -> None:
        self._costs: dict[Any, Cost | None] = {}

    def figures(self, method: Method, cell: Cell) -> Figures | None:
        """Numbers of one cell; None where the method declares no formulas. Errors of a formula are raised."""
        cost, values = self._bound(method, cell)
        if cost is None:
            return None
        optional = {
            name: None if formula is None else evaluate(formula, values)
            for name, formula in (
                ("peak_bytes", cost.peak_bytes),
                ("least_bytes", cost.least_bytes),
                ("depth", cost.depth),
            )
        }
        return Figures(
            algorithmic=evaluate(total(cost.algorithmic), values),
            flops=evaluate(total(cost.flops), values),
            num_parameters=evaluate(cost.num_parameters, values),
            state_bytes=evaluate(cost.state_bytes, values),
            **optional,
        )

    def terms(self, method: Method, cell: Cell) -> dict[str, int]:
        """FLOPs of one cell by term; empty where the method declares no formulas. Errors of a formula are raised."""
        cost, values = self._bound(method, cell)
        return {} if cost is None else {name: evaluate(term, values) for name, term in cost.flops.items()}

    def slope(self, method: Method, cell: Cell) -> float | None:
        """Slope of log FLOPs against log T at this cell, by formula."""
        cost, values = self._bound(method, cell)
        return None if cost is None else local_slope(total(cost.flops), values)

    def _bound(self, method: Method, cell: Cell) -> tuple[Cost | None, dict[str, Any]]:
        params = cell.params_for(method)
        key = (method.name, cell.impl, cell.mode, cell.causal, cell.position, params)
        if key not in self._costs:
            self._costs[key] = method.cost_of(cell.impl, cell.mode, cell.causal, cell.position, params)
        return self._costs[key], symbols.bindings(cell.dims, params, cell.itemsize, method.segment_len(params))
