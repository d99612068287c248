"""The calls that every timing tool makes: whole layers, built as the harness builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctxbench.method import Dims
from ctxbench.registry import reload

CELLS = (  # method, impl, tokens, mode: from one to some tens of milliseconds
    ("dense", "blocked", 1024, "forward"),
    ("dense", "reference", 512, "train"),
    ("longformer", "blocked", 2048, "forward"),
    ("transformer_xl", "blocked", 2048, "forward"),
    ("memory_bank", "blocked", 1024, "train"),
)
THREADS = 1


def name(cell: tuple[str, str, int, str]) -> str:
    """``dense/blocked 1024 forward``."""
    method, impl, tokens, mode = cell
    return f"{method}/{impl} {tokens} {mode}"


def call(index: int) -> Callable[[], Any]:
    """The call of one cell, ready to be timed."""
    import torch

    from ctxbench.workload import prepare

    torch.set_num_threads(THREADS)
    method_name, impl, tokens, mode = CELLS[index]
    method = reload(f"ctxbench.implementations.{method_name}")
    params = method.params()
    dims = Dims(tokens, num_layers=method.fewest_layers(params), position=method.positions[0], causal=method.causal[0])
    return prepare(method, dims, params, impl, mode, "fp32").call
