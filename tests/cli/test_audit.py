"""``ctxbench audit``: methods, runs and the source document's table; JSON, exit codes, wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctxbench.analysis.audit import VERDICTS
from ctxbench.cell import Cell
from ctxbench.rows import Flops, encode, row_for

PLUGINS = Path(__file__).parents[1] / "plugins"
CLAIMS = PLUGINS / "claims.py"


@pytest.fixture
def run(tmp_path: Path):
    """``run(extra)``: a run folder whose counted FLOPs exceed the formula by ``extra``."""

    def write(extra: int) -> Path:
        rows = [
            row_for(
                Cell(method="dense", impl="blocked", seq_len=n), "ok", flops=Flops(formula=n * n, counted=n * n + extra)
            )
            for n in (1024, 2048)
        ]
        (tmp_path / "rows.jsonl").write_bytes(b"".join(map(encode, rows)))
        (tmp_path / "run.json").write_text(json.dumps({"schema": "ctxbench.run/1"}))
        return tmp_path

    return write


def test_a_sound_method_holds(ctxbench) -> None:
    result = ctxbench("audit", "flawed", "--plugin", CLAIMS)
    assert result.code == 0
    assert "growth of peak memory" in result.out
    assert " 0 violated" in result.out


def test_a_false_claim_ends_with_exit_code_1_and_the_evidence(ctxbench, tmp_path: Path) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(
        "from pathlib import Path\nfrom ctxbench.registry import import_plugin\n"
        f"METHOD = import_plugin({str(CLAIMS)!r}).PAIRS['hidden T x T temporary'][0]\n"
    )
    result = ctxbench("audit", "flawed", "--plugin", plugin)
    assert result.code == 1
    assert "growth of peak memory [flawed/reference/forward] is violated" in result.out
    assert "claimed O(T), T^1.00 at most" in result.out


def test_json_of_a_method_is_one_object(ctxbench) -> None:
    found = ctxbench("audit", "flawed", "--plugin", CLAIMS, "--json").json
    assert (found["subject"], found["ok"]) == ("flawed", True)
    assert {verdict["verdict"] for verdict in found["verdicts"]} <= set(VERDICTS)
    assert {"FLOPs", "receptive field", "parameters"} <= {verdict["term"] for verdict in found["verdicts"]}


@pytest.mark.parametrize(("extra", "code"), [(0, 0), (1, 1)], ids=["agreeing", "contradicted"])
def test_a_run_is_audited_by_its_rows(ctxbench, run, extra: int, code: int) -> None:
    folder = run(extra)
    result = ctxbench("audit", folder)
    assert result.code == code
    assert ("FLOPs [dense/blocked/forward] is violated" in result.out) is bool(extra)
    found = ctxbench("audit", folder, "--json")
    assert found.code == code
    assert found.json["ok"] is not bool(extra)


def test_a_run_is_audited_without_torch(run) -> None:
    code = (
        "import sys; from ctxbench.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "audit", str(run(0))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_verbose_lists_every_term_of_a_run_and_quiet_the_last_line(ctxbench, run) -> None:
    folder = run(0)
    assert "growth of time" in ctxbench("audit", folder, "-v").out
    assert len(ctxbench("audit", folder, "-q").out.strip().splitlines()) == 1


def test_the_table_shows_ten_entries_and_is_wrong(ctxbench) -> None:
    result = ctxbench("audit", "--table", "--seq", "256", "--json")
    assert result.code == 1
    assert len(result.json["entries"]) == 10
    assert result.json["size"]["seq_len"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes a METHOD, a RUN or --table"),
        (["dense", "--table"], "received both"),
        (["densee"], "did you mean 'dense'"),
        (["dense", "--impl", "blockd"], "did you mean 'blocked'"),
        (["nowhere/run"], "not a run folder"),
        (["dense", "--seq", "1k"], "--seq belongs to --table"),
        (["--table", "--seq", "1k..4k"], "accepted: one length"),
        (["--table", "--impl", "blocked"], "--impl belongs to a METHOD"),
    ],
    ids=["nothing", "both", "method", "impl", "run", "seq", "lengths", "impl of the table"],
)
def test_wrong_input_is_a_usage_error(ctxbench, arguments: list[str], message: str) -> None:
    result = ctxbench("audit", *arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
