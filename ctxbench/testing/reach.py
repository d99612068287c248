"""Exact maps of who reaches whom: by gradients and by changed values, at a size where windows and memories show.

Weights are random and in float64, so that what is not connected is exactly zero. A method that looks at contents is
asked with several draws, and what any of them connects counts.
"""

from __future__ import annotations

import dataclasses

import torch

from ctxbench.analysis.reach import ReachMap
from ctxbench.errors import MeasurementError
from ctxbench.method import Method, load
from ctxbench.testing.case import TINY, Case, one_thread, small_params
from ctxbench.workload import as_output

LENGTH = 64
OTHERS = (64, 96, 128, 48, 32)
DRAWS = 3


def reach_map(method: Method, impl: str | None = None, length: int = LENGTH, draws: int = DRAWS) -> ReachMap:
    """The map of one impl, by default the oracle, in the fewest layers the method can have.

    Raises:
        MeasurementError: the method supports none of the lengths tried.
    """
    case = _case(method, impl or method.oracle, length)
    size = case.dims.seq_len
    reach = load(method.reach)
    claimed = [sum(1 << j for j in set(reach(case.dims, case.params, i))) for i in range(size)] if reach else []
    with one_thread():
        gradient, values = _seen(case, draws, claimed)
    return ReachMap(
        method=method.name, impl=case.impl, seq_len=size, params=case.params.as_dict(),
        dims=dataclasses.asdict(case.dims), gradient=_rows(gradient), values=_rows(values),
        claimed=[f"{row:x}" for row in claimed], draws=draws,
    )  # fmt: skip


def _seen(case: Case, draws: int, claimed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs ``[output, input]`` that any draw connects: by a gradient, and by a changed value.

    Further draws are only for what is claimed and was not seen: contents decide what a content-based method looks at.
    """
    size, module = case.dims.seq_len, case.build(batch_size=1)
    gradient, values = (torch.zeros(size, size, dtype=torch.bool) for _ in range(2))
    for draw in range(draws):
        values |= _changes(case, module, draw)
        gradient |= _gradients(case, module, draw)
        if _rows(gradient | values) == [f"{row:x}" for row in claimed]:
            break
    return gradient, values


def _case(method: Method, impl: str, length: int) -> Case:
    dims = TINY.replace(
        batch_size=1, causal=method.causal[0] if method.causal else True, position=method.positions[0]
    )  # fmt: skip
    params = small_params(method, dims)
    dims = dims.replace(num_layers=method.fewest_layers(params))
    for size in dict.fromkeys((length, *OTHERS)):
        case = Case(method, impl, params, dims.replace(seq_len=size), method.modes)
        if case.supports(seq_len=size):
            return case
    raise MeasurementError(
        f"{method.name} / {impl} runs at none of the lengths {', '.join(map(str, (length, *OTHERS)))}: "
        f"{case.supports().reason}"
    )


def _changes(case: Case, module: torch.nn.Module, draw: int) -> torch.Tensor:
    """``[output, input]``: whether the output changes when the input is replaced; one forward pass an input."""
    x, other = case.tokens(seed=draw + 1), case.tokens(seed=draw + 1001)
    with torch.no_grad():
        y = as_output(module(x)).y
        floor = case.tolerance * max(1.0, float(y.abs().max()))
        columns = []
        for position in range(x.shape[1]):
            moved = x.clone()
            moved[:, position] = other[:, position]
            columns.append(((as_output(module(moved)).y - y).abs() > floor).any(dim=2)[0])
    return torch.stack(columns, dim=1)


def _gradients(case: Case, module: torch.nn.Module, draw: int) -> torch.Tensor:
    """``[output, input]``: whether a random projection of the output has a derivative; one backward pass an output."""
    x = case.tokens(seed=draw + 1).requires_grad_()
    y = as_output(module(x)).y
    if not y.requires_grad:
        return torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    projected = (y * case.tokens(seed=draw + 2001)).sum(dim=(0, 2))
    rows = []
    for position in range(x.shape[1]):
        (slope,) = torch.autograd.grad(projected[position], x, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros(x.shape[1], dtype=torch.bool) if slope is None else (slope[0] != 0).any(dim=1))
    return torch.stack(rows)


def _rows(connected: torch.Tensor) -> list[str]:
    return [f"{sum(1 << j for j in row.nonzero().flatten().tolist()):x}" for row in connected]
