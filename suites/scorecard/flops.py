"""Public FLOP counters on every method: what they count against the closed form, both with one multiply-add as two."""

from __future__ import annotations

import contextlib
import io
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.method import Dims
from ctxbench.registry import discover
from ctxbench.suites.scorecard.card import Score

SEQ_LEN = 1024
IMPLS = ("reference", "blocked")


def measure(tool: str, done: dict[str, Any]) -> dict[str, dict[str, list[int | str]]]:
    """By impl and method: the closed form, and what the tool counted or the name of the error it ended in."""
    found: dict[str, dict[str, list[int | str]]] = {}
    for impl in IMPLS:
        for method, dims, truth in _works(impl):
            counted: int | str
            try:
                counted = _ours(method, dims, impl) if tool == "ctxbench" else _theirs(TOOLS[tool], method, dims, impl)
            except Exception as error:  # whatever another tool comes to
                counted = type(error).__name__
            found.setdefault(impl, {})[method.name] = [truth, counted]
    return found


def scores(raws: dict[str, dict[str, dict[str, list[int | str]]]]) -> Iterator[Score]:
    """A line a tool and impl: signed error over all methods, and how many it gets exactly."""
    for impl in IMPLS:
        for tool, found in raws.items():
            yield from _line(tool, impl, found[impl])


def _works(impl: str) -> Iterator[tuple[Any, Dims, int]]:
    """Every method, its sizes and the FLOPs of its closed form."""
    for method in discover():
        params = method.params()
        dims = Dims(
            SEQ_LEN, causal=method.causal[0], position=method.positions[0], num_layers=method.fewest_layers(params)
        )  # fmt: skip
        cost = method.cost_of(impl, "forward", dims.causal, dims.position, params)
        yield method, dims, evaluate(total(cost.flops), bindings(dims, params, 4, method.segment_len(params)))


def _line(tool: str, impl: str, found: dict[str, list[int | str]]) -> Iterator[Score]:
    errors = [counted / truth - 1 for truth, counted in found.values() if not isinstance(counted, str)]  # type: ignore[operator]
    failures = [f"{name} ({counted})" for name, (_, counted) in found.items() if isinstance(counted, str)]
    note = f"fails on {len(failures)}, such as {failures[0]}" if failures else ""
    common: dict[str, Any] = {"section": "flops", "tool": tool, "work": f"{impl} of {len(found)} methods", "note": note}
    if not errors:
        yield Score(quantity="exact", **common)
        return
    size = [abs(error) for error in errors]
    yield Score(quantity="exact", value=sum(error == 0 for error in errors), unit=f"of {len(found)}", **common)
    yield Score(quantity="median error", value=100 * statistics.median(errors), unit="%", **common)
    yield Score(quantity="worst error", value=100 * errors[size.index(max(size))], unit="%", **common)


def _ours(method: Any, dims: Dims, impl: str) -> int:
    return trace(method, dims, method.params(), impl, "forward").flops


def _theirs(count: Callable[[Any, Any], int], method: Any, dims: Dims, impl: str) -> int:
    import torch

    from ctxbench.workload import prepare

    work = prepare(method, dims, method.params(), impl, "forward", "fp32")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return count(work.module, work.inputs[0])


def _torch(module: Any, x: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops())


def _fvcore(module: Any, x: Any) -> int:
    import logging

    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    return 2 * int(
        FlopCountAnalysis(module, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    )


def _calflops(module: Any, x: Any) -> int:
    from calflops import calculate_flops

    flops, _, _ = calculate_flops(model=module, args=[x], print_results=False, output_as_string=False)
    return int(flops)


def _ptflops(module: Any, x: Any) -> int:
    from ptflops import get_model_complexity_info

    macs, _ = get_model_complexity_info(
        module, tuple(x.shape[1:]), input_constructor=lambda _: {"x": x}, as_strings=False,
        print_per_layer_stat=False, verbose=False,
    )  # fmt: skip
    return 2 * int(macs)


def _thop(module: Any, x: Any) -> int:
    from thop import profile

    macs, _ = profile(module, inputs=(x,), verbose=False)
    return 2 * int(macs)


def _torchinfo(module: Any, x: Any) -> int:
    from torchinfo import summary

    return 2 * int(summary(module, input_data=x, verbose=0).total_mult_adds)


TOOLS: dict[str, Callable[[Any, Any], int]] = {
    "ctxbench": _torch,  # traced on fake tensors; see measure
    "torch.utils.flop_counter": _torch,
    "fvcore": _fvcore,
    "calflops": _calflops,
    "ptflops": _ptflops,
    "thop": _thop,
    "torchinfo": _torchinfo,
}
