"""Kernels in C++: compiled once, and what is said where they cannot be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxbench.implementations._shared import native, native_table
from ctxbench.method import Dims, Params


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "twice.cpp"
    source.write_text('extern "C" void twice_float32(float *x) { *x *= 2; }')
    calls: list[Any] = []
    run = subprocess.run
    monkeypatch.setattr(native.subprocess, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    for _ in range(2):
        native._library.cache_clear()
        x = torch.ones(1)
        native.function(source, "twice", torch.float32, native.ctypes.c_void_p)(x.data_ptr())
        assert x.item() == 2
    assert len(calls) == 1
    assert [path.suffix for path in (tmp_path / "ctxbench" / "native").iterdir()] == [".so"]
    native._library.cache_clear()


PRODUCT = """
#include "tiles.hpp"
#define PRODUCT(NAME, T)                                                                                   \\
    extern "C" void NAME(const T *a, const T *b, T *c, int64_t rows, int64_t columns, int64_t depth) {     \\
        tiles::product(a, depth, b, columns, c, columns, rows, columns, depth, true);                      \\
    }
PRODUCT(product_float32, float)
PRODUCT(product_float64, double)
"""


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
def test_a_source_includes_the_products_of_tiles(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    source = tmp_path / "product.cpp"
    source.write_text(PRODUCT)
    types = [native.ctypes.c_void_p] * 3 + [native.ctypes.c_int64] * 3
    multiply = native.function(source, "product", dtype, *types)
    for rows, columns, depth in ((1, 16, 1), (5, 48, 7), (6, 64, 64), (23, 112, 65)):
        a, b, c = (torch.randn(shape, dtype=dtype) for shape in ((rows, depth), (depth, columns), (rows, columns)))
        expected = c + a @ b
        multiply(a.data_ptr(), b.data_ptr(), c.data_ptr(), rows, columns, depth)
        assert (c - expected).abs().max() < limit


def test_what_the_compiler_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int wrong(")
    with pytest.raises(RuntimeError, match=r"could not compile wrong.cpp:\n.*wrong.cpp:1"):
        native.function(source, "wrong", torch.float32)


def test_support_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_table.support(Dims(seq_len=64), Params(), "cpu", "fp32")
    monkeypatch.setenv("CXX", "no-such-compiler")
    answer = native_table.support(Dims(seq_len=64), Params(), "cpu", "fp32")
    assert not answer
    assert "need a C++ compiler, found none (no-such-compiler): install g++" in answer.reason


def test_native_impls_need_no_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from ctxbench import registry
from ctxbench.method import Dims
for method in registry.discover():
    if any(impl.name == "native" for impl in method.impls):
        params = method.params()
        dims = Dims(seq_len=80, num_layers=method.fewest_layers(params))
        module = method.make(dims, params, "native", "cpu", torch.float32)
        with torch.no_grad():
            module(torch.randn(1, 80, dims.d_model))
        print(method.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"dense", "longformer"} <= set(done.stdout.split())
