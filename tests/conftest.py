"""Fixtures every layer of the tests uses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("FORCE_COLOR", None)


@dataclass
class Result:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU count as Triton's: traced, they stand for a device's."""
    monkeypatch.setattr("ctxbench.implementations._shared.ranges.native", lambda q: False)


@pytest.fixture
def ctxbench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call the command line in this process: ``ctxbench("list", "methods")``."""
    from ctxbench.cli import main

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["ctxbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's calibration cache, and from one another's; compiled kernels are shared."""
    cache, kernels = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp().parent / "kernels"
    kernels.mkdir(exist_ok=True)  # files of many names, each made once
    (cache / "ctxbench").mkdir()
    (cache / "ctxbench" / "native").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
