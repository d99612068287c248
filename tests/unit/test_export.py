"""Rows in other formats, through the command line."""

from __future__ import annotations

import csv
import errno
import io
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ctxbench.cell import Cell
from ctxbench.cli.export import command
from ctxbench.errors import EnvironmentUnusable, RunFolderError, UserError
from ctxbench.rows import Latency, PeakBytes, encode, row_for

HOSTILE = 'a|b & 50% "quoted", $x_1$ \\end{tabular} <script>'


@pytest.fixture
def folder(tmp_path):
    rows = []
    for length in (1024, 2048):
        latency = Latency(median=length * 1e-6, low=length * 0.9e-6, high=length * 1.1e-6, n_processes=2,
                          samples=[[length * 1e-6 * (1 + i / 100) for i in range(-3, 4)]] * 2)  # fmt: skip
        cell = Cell(method="dense", impl="blocked", seq_len=length, memory=256)
        rows.append(row_for(cell, "ok", latency_s=latency, peak_bytes=PeakBytes(allocated=2**20)))
    rows.append(row_for(Cell(method="dense", impl="blocked", seq_len=4096, memory=256), "oom", HOSTILE))
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(encode, rows)))
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_csv_has_a_line_for_every_row_and_plain_numbers(folder):
    output = run(folder, "--to", "csv", "--out", "-").stdout
    lines = list(csv.DictReader(io.StringIO(output)))
    assert [line["seq_len"] for line in lines] == ["1024", "2048", "4096"]
    assert float(lines[0]["latency_s"]) == pytest.approx(1.024e-3)
    assert lines[0]["peak_allocated"] == "1048576"
    assert lines[2]["latency_s"] == ""
    assert lines[2]["reason"] == HOSTILE


def test_markdown_keeps_its_columns_whatever_a_reason_contains(folder):
    lines = run(folder, "--to", "md", "--out", "-").stdout.splitlines()
    bars = [line.replace("\\|", "").count("|") for line in lines]
    assert len(lines) == 5
    assert len(set(bars)) == 1
    assert "<script>" not in "\n".join(lines).replace("\\<", "")


def test_latex_leaves_nothing_of_a_reason_active(folder):
    output = run(folder, "--to", "latex", "--out", "-").stdout
    rows = [line for line in output.splitlines() if line.endswith(r"\\")]
    ampersands = {line.replace(r"\&", "").count("&") for line in rows}
    assert len(ampersands) == 1
    assert output.count(r"\end{tabular}") == 1
    assert r"50\%" in output


def test_pytest_benchmark_compares_what_was_exported(folder):
    assert run(folder, "--to", "pytest-benchmark").exit_code == 0
    path = folder / "rows.json"
    benchmarks = json.loads(path.read_text())["benchmarks"]
    assert [b["name"] for b in benchmarks] == [
        "dense[blocked-forward-fp32-1k-m256]",
        "dense[blocked-forward-fp32-2k-m256]",
    ]
    assert benchmarks[0]["stats"]["rounds"] == 14
    assert benchmarks[0]["stats"]["outliers"].count(";") == 1
    compare = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median,rounds"],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert compare.returncode == 0, compare.stderr
    assert "dense[blocked-forward-fp32-1k-m256]" in compare.stdout


def test_figures_come_as_svg_pdf_and_png_and_twice_the_same(folder, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        assert run(folder, "--to", "figures", "--out", out).exit_code == 0
    names = sorted(path.name for path in first.iterdir())
    assert {"latency.svg", "memory.pdf", "flops.png", "model-dense-blocked.svg"} <= set(names)
    assert [(second / name).read_bytes() for name in names] == [(first / name).read_bytes() for name in names]


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentUnusable, match=r"ctxbench\[parquet\]"):
        run(folder, "--to", "parquet")


def test_parquet_keeps_the_columns(folder):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pandas as pd

    assert run(folder, "--to", "parquet").exit_code == 0
    assert list(pd.read_parquet(folder / "rows.parquet")["seq_len"]) == [1024, 2048, 4096]


def test_a_place_that_cannot_be_written_is_named(folder):
    with pytest.raises(RunFolderError, match=r"(?s)cannot write.*--out"):
        run(folder, "--to", "csv", "--out", folder / "absent" / "rows.csv")


@pytest.mark.parametrize("closed", ["ENOSPC", "EROFS", "EACCES"])
def test_a_full_or_closed_disk_is_the_environments_fault(folder, monkeypatch, closed):
    def refuse(*_, **__):
        raise OSError(getattr(errno, closed), "planted")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(EnvironmentUnusable, match=r"(?s)cannot write .*planted.*has room"):
        run(folder, "--to", "csv")


def test_binary_formats_do_not_go_to_standard_output(folder):
    with pytest.raises(UserError, match="standard output"):
        run(folder, "--to", "figures", "--out", "-")


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="not a run folder"):
        run(tmp_path, "--to", "csv")
