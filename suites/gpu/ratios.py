"""``python -m ctxbench.suites.gpu.ratios FILE``: whole layers of every method, each impl against the method's baseline.

The protocol: one process, fresh random inputs checked against the reference in float32 before any timing, rounds
interleaved in an order that is reversed each time, the last-level cache flushed before every call, CUDA events around
it; the figure is the median of the rounds' ratios with its quartiles, and an A/A control stands in every table.
Building masks and lists is inside the call, because users pay for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ctxbench.method import Dims, Method
from ctxbench.registry import discover
from ctxbench.workload import as_output, prepare

LENGTHS = (2048, 8192, 32768)
WIDTHS = {"d_model": 1024, "num_heads": 16, "d_ff": 0, "num_layers": 1}  # heads of 64 channels; mixing alone
ROUNDS, ROUND_S, FLUSH_BYTES = 7, 0.05, 256 * 2**20
BASELINES = ("flash", "flex", "blocked", "reference")  # the first one a method has there is what others are held to
TOLERANCE = 2**-5  # of whole layers in bf16, by root mean squares; the tests hold the kernels themselves


def comparisons(mode: str) -> Iterator[tuple[Method, Dims, list[str]]]:
    """Methods with at least two impls on this device, by length, the short ones first."""
    for seq_len in LENGTHS:
        for method in discover():
            params = method.params()
            layers = max(WIDTHS["num_layers"], method.fewest_layers(params))
            dims = Dims(
                seq_len, causal=method.causal[0], position=method.positions[0], **{**WIDTHS, "num_layers": layers}
            )
            usable = [
                impl.name
                for impl in method.impls
                if not impl.defects
                and method.mode_support(mode, dims, params)
                and method.impl_support(impl, mode, dims, params, "cuda", "bf16")
            ]
            if any(name not in ("reference", "blocked") for name in usable):
                yield method, dims, usable


def measure(method: Method, dims: Dims, impls: list[str], mode: str) -> dict[str, Any]:
    """One table: milliseconds, ratio to the baseline and error against the reference of every impl that runs."""
    calls, errors, failures = {}, {}, {}
    expected = _output(method, dims, method.oracle) if dims.seq_len <= LENGTHS[0] else None
    for impl in impls:
        try:
            work = prepare(method, dims, method.params(), impl, mode, "bf16", "cuda")
            work.call()
            torch.cuda.synchronize()
            if expected is not None:
                errors[impl] = _error(_output(method, dims, impl), expected)
            calls[impl] = work.call
        except Exception as error:  # out of memory, or a compiler that refuses: the others go on
            failures[impl] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            torch.cuda.empty_cache()
    wrong = {impl: error for impl, error in errors.items() if not error <= TOLERANCE}
    failures |= {impl: f"differs from the reference by {error:.3g}" for impl, error in wrong.items()}
    for impl in wrong:
        del calls[impl]
    baseline = next((name for name in BASELINES if name in calls), "")
    rows = _interleaved(calls, baseline) if len(calls) > 1 and baseline else []
    return {
        "method": method.name, "mode": mode, "seq_len": dims.seq_len, "d_model": dims.d_model, "heads": dims.num_heads,
        "dtype": "bf16", "causal": dims.causal, "position": dims.position, "baseline": baseline, "rows": rows,
        "errors": errors, "failures": failures,
    }  # fmt: skip


def _output(method: Method, dims: Dims, impl: str) -> torch.Tensor:
    """Weights and input are those of a seed, so that all impls see the same."""
    dtype = "fp32" if impl == method.oracle else "bf16"
    work = prepare(method, dims, method.params(), impl, "forward", dtype, "cuda")
    with torch.no_grad():
        return as_output(work.module(work.inputs[0])).y.float()


def _error(received: torch.Tensor, expected: torch.Tensor) -> float:
    return ((received - expected).norm() / expected.norm()).item()


def _interleaved(calls: dict[str, Callable[[], Any]], baseline: str) -> list[dict[str, Any]]:
    control = f"{baseline} again"
    functions = {**calls, control: calls[baseline]}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(ROUNDS):
        for name in functions if number % 2 == 0 else reversed(functions):
            times[name].append(_round(functions[name], flush))
    rows = []
    for name, own in times.items():
        quotients = [base / mine for base, mine in zip(times[baseline], own, strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        rows.append({"impl": name, "ms": statistics.median(own), "ratio": middle, "low": low, "high": high})
    return rows


def _round(function: Callable[[], Any], flush: torch.Tensor) -> float:
    """Median milliseconds of calls that together take ROUND_S."""
    samples: list[float] = []
    while sum(samples) < 1e3 * ROUND_S:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def main() -> int:
    """Write a table after the other; 1 where an impl fails or differs from its reference."""
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.gpu.ratios", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="no comparison begins after this")
    arguments = parser.parse_args()
    started, failed = time.monotonic(), False
    found = json.loads(arguments.file.read_text()) if arguments.file.exists() else []
    known = {(table["method"], table["seq_len"], table["mode"]) for table in found}
    for mode in ("forward", "train"):
        for method, dims, impls in comparisons(mode):
            if (method.name, dims.seq_len, mode) in known:
                continue
            if time.monotonic() - started > arguments.seconds:
                sys.stdout.write("the time is over; the same command goes on here\n")
                return 1
            table = measure(method, dims, impls, mode)
            found.append(table)
            arguments.file.write_text(json.dumps(found, indent=1) + "\n")
            failed |= bool(table["failures"])
            _show(table)
    return int(failed)


def _show(table: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{table['method']} {table['mode']} {table['seq_len']}, ratios to {table['baseline']}\n")
    for row in table["rows"]:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        sys.stdout.write(f"  {row['impl']:<20}{row['ms']:10.3f} ms  {row['ratio']:6.2f}x {interval}\n")
    for impl, reason in table["failures"].items():
        sys.stdout.write(f"  {impl:<20}{reason}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
