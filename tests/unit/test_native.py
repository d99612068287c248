"""Kernels in C++: compiled once, and what is said where they cannot be made."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ctxbench.implementations._shared import native, native_build, native_table
from ctxbench.method import Dims, Params, Support

TWICE = 'extern "C" void twice_float32(float *x) { *x *= 2; }'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small kernel, an empty cache, and nothing loaded or asked before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache ü"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    path = tmp_path / "with blank" / "twice.cpp"
    path.parent.mkdir()
    path.write_text(TWICE)
    native._library.cache_clear()
    native_build._refusal.cache_clear()
    yield path
    native._library.cache_clear()
    native_build._refusal.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The sources that were compiled."""
    done: list[Path] = []
    compile_ = native_build._compile
    monkeypatch.setattr(native_build, "_compile", lambda *a: (done.append(a[1]), compile_(*a))[1])
    return done


def doubled(source: Path) -> float:
    native._library.cache_clear()
    x = torch.ones(1)
    native.function(source, "twice", torch.float32, native.ctypes.c_void_p)(x.data_ptr())
    return float(x)


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "a cache ü" / "ctxbench" / "native").iterdir())


def test_a_library_is_compiled_once(source: Path, compiled: list[Path], tmp_path: Path) -> None:
    assert [doubled(source), doubled(source)] == [2, 2]
    assert compiled == [source]
    assert [path.suffix for path in kept(tmp_path)] == [".so"]


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-40] + b"?" + b[-39:]])
def test_a_file_that_is_not_as_it_was_written_is_made_again(
    source: Path, compiled: list[Path], tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    native_build.library(source)
    (library,) = kept(tmp_path)
    library.write_bytes(harm(library.read_bytes()))
    assert doubled(source) == 2
    assert compiled == [source] * 2


def test_another_version_of_the_compiler_compiles_anew(
    source: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    native_build.library(source)
    monkeypatch.setattr(native_build.compiler, "version", lambda words: "g++ 99")
    native_build.library(source)
    assert compiled == [source] * 2


def test_processes_that_compile_at_once_all_get_a_whole_library(source: Path, tmp_path: Path) -> None:
    program = (
        "import ctypes, sys; from pathlib import Path\n"
        "from ctxbench.implementations._shared.native_build import library\n"
        "ctypes.CDLL(str(library(Path(sys.argv[1])))).twice_float32\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(source)]) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert len(kept(tmp_path)) == 1


def test_a_home_that_cannot_be_written_is_no_hindrance(
    source: Path, compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [doubled(source), doubled(source)] == [2, 2]
    assert compiled == [source]
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_others_may_have_put_somewhere_is_not_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    theirs = native_build.library(source).parent
    theirs.chmod(0o777)
    with pytest.raises(RuntimeError, match=r"file.*it is somebody else's.*let XDG_CACHE_HOME name"):
        native_build.library(source)


def test_a_library_that_the_system_refuses_is_explained(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match=r"(?s)failed to map segment.*accepted: one that programs may be run from"):
        doubled(source)


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


def test_what_the_compiler_says_is_shown(source: Path) -> None:
    source.write_text("int wrong(")
    with pytest.raises(RuntimeError, match=r"could not compile twice.cpp:\n.*twice.cpp:1"):
        native.function(source, "twice", torch.float32)


def asked(dtype: str = "fp32") -> Support:
    return native_table.support(Dims(seq_len=64), Params(), "cpu", dtype)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_support_needs_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "need a C++ compiler, found none (no-such-compiler): install g++" in asked().reason


def test_support_needs_a_compiler_that_makes_kernels(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = script(tmp_path / "old", 'echo "in file" >&2; echo "old: error: no -fopenmp here" >&2; exit 1')
    monkeypatch.setenv("CXX", old)
    assert (
        asked().reason
        == f"{old} could not compile probe.cpp: old: error: no -fopenmp here; let CXX name another compiler"
    )


def test_cxx_may_have_arguments_and_a_path_with_blanks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = script(tmp_path / "with blank" / "my c++", 'exec c++ "$@"')
    for named in (spaced, f"'{spaced}' -DNDEBUG", "c++ -O1"):
        monkeypatch.setenv("CXX", named)
        assert asked(), named
        assert doubled(source) == 2
    monkeypatch.setenv("CXX", "c++ 'unclosed")
    assert "found none (c++ 'unclosed)" in asked().reason


def test_tensors_that_an_interpreter_takes_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset TRITON_INTERPRET" in asked().reason


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
