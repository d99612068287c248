"""What fraction of matrix-product speed the linear methods reach at 32k tokens.

The baseline is a plain product repeated until it has done the same FLOPs, so a ratio is the fraction. A method is
one layer without feed-forward network: norm, projections, mixing; its impl is the one that ``auto`` means in the
dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctxbench import workload
from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.method import DTYPE_BYTES, Dims, Method
from ctxbench.registry import discover
from ctxbench.suites.benchmarks.ratios import Comparison

TOKENS, SIDE = 32768, 1024
FLOORS, AIMS = {"fp32": 0.40, "bf16": 0.30}, {"fp32": 0.60, "bf16": 0.45}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def products(flops: int, dtype: torch.dtype) -> Callable[[], None]:
    """Square matrix products that add up to ``flops``; of the last one as many rows as are left."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    count, rows = divmod(max(1, round(flops / (2 * SIDE**2))), SIDE)

    def run() -> None:
        for _ in range(count):
            a @ b
        if rows:
            a[:rows] @ b

    return run


def linear_methods(dtype: str) -> list[tuple[Method, str, Dims, int]]:
    """Methods whose fast path grows as T, with that impl, the sizes of one layer and its FLOPs at TOKENS."""
    found = []
    for method in discover():
        params = method.params()
        if method.portable == method.oracle:
            continue
        dims = Dims(
            TOKENS, d_ff=0, causal=method.causal[0], position=method.positions[0],
            num_layers=method.fewest_layers(params),
        )  # fmt: skip
        impl = method.pick("forward", dims, params, "cpu", dtype).impl
        cost = method.cost_of(impl, "forward", dims.causal, dims.position, params)
        if cost is not None and big_o(total(cost.flops)) == "O(T)":
            values = bindings(dims, params, DTYPE_BYTES[dtype], method.segment_len(params))
            found.append((method, impl, dims, evaluate(total(cost.flops), values)))
    return found


def comparisons() -> list[Comparison]:
    """One table a dtype and method."""
    found = []
    for dtype, floor in FLOORS.items():
        for method, impl, dims, flops in linear_methods(dtype):
            name = f"{method.name}/{impl}"
            work = workload.prepare(method, dims, method.params(), impl, "forward", dtype, rotate=1)
            candidates = {
                "matrix products of equal FLOPs": products(flops, DTYPES[dtype]),
                name: work.call,
            }
            title = (
                f"{method.name}, one layer without feed-forward network, {TOKENS} tokens, {dtype}: fraction of matmul"
            )
            found.append(
                Comparison(
                    title, "matrix products of equal FLOPs", candidates, floor={name: floor}, aim={name: AIMS[dtype]}
                )
            )
    return found
