"""The score card: planted curves know their exponent, the page keeps every tool, a card goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from ctxbench.suites.scorecard import fits, flops, gates, memory, timing
from ctxbench.suites.scorecard.__main__ import main
from ctxbench.suites.scorecard.card import PEERS, Card, Part, absence, load, page, version


@pytest.mark.parametrize(
    ("name", "exponent"),
    [("N", 1.0), ("N^1.5", 1.5), ("N^2", 2.0), ("window of 4k", 1.0), ("1 ms + N", 0.8676), ("N + N^2 / 8k", 1.889)],
)
def test_a_planted_curve_knows_its_exponent(name: str, exponent: float) -> None:
    assert fits.true_exponent(fits.CURVES[name]) == pytest.approx(exponent, abs=2e-3)


def test_our_own_slope_is_that_of_a_planted_power() -> None:
    found = [scaling.tail.value for scaling in fits._ours("N^1.5")]
    assert len(found) == fits.REPEATS
    assert sum(abs(value - 1.5) <= fits.RIGHT for value in found) >= 19


def test_gates_judge_identical_and_slower_code() -> None:
    quiet = [[1.0 + 0.001 * index, 1.0, 1.0] for index in range(8)]
    slower = [[1.2 * value for value in samples] for samples in quiet]
    beats = [[[0, 1e-3], [3, 1e-3]]] * 8
    assert not gates._ours(quiet, quiet, beats, beats)
    assert gates._ours(quiet, slower, beats, beats)
    assert not gates._ours(slower, quiet, beats, beats)
    assert not gates._median_5_percent(quiet, quiet)
    assert gates._median_5_percent(quiet, slower)


def test_a_gate_finds_below_a_restless_machine_what_medians_alone_do_not() -> None:
    random = np.random.default_rng(1)
    restless = np.exp(random.normal(0, 0.07, (32, 6)).cumsum(axis=1) / 2)  # of 32 processes, before and after 5 samples
    samples = (restless[:, 1:] + restless[:, :-1]) / 2 * np.exp(random.normal(0, 0.01, (32, 1)))
    beats = [[[taken, 1e-3 * speed] for taken, speed in enumerate(process)] for process in restless]
    found = {tool: gates._alarms(tool, samples.tolist(), beats, 1.05) for tool in gates.GATES if "ctxbench" in tool}
    assert found["ctxbench"] >= 90
    assert found["ctxbench, medians alone"] <= 50
    assert gates._alarms("ctxbench", samples.tolist(), beats, 1.0) <= 1


def test_the_page_keeps_every_tool_and_says_what_is_missing() -> None:
    card = Card(machine={"cpu": "c", "cores": 2, "system": "s", "python": "3", "torch": "2"})
    raw = {"1": 2**21, "16": 2**24}
    for tool, absent in (("memray", "cannot be imported: x | y"), ("polling", ""), ("tracemalloc", "")):
        part = Part(section="memory", tool=tool, version="9", measured_at="2026-01-02", absent=absent, raw=raw)
        card.keep(part, [("memory", name) for name in memory.TOOLS])
    text = page(card, memory.scores(card.raws("memory")))
    assert "| polling | two tensors | +0.0 % | -50.0 % | resident size every 10 ms |" in text
    assert "| memray | 9 | - | 0 | cannot be imported: x / y |" in text
    assert "Measured on c, 2 cores, s, Python 3, torch 2, 2026-01-02." in text
    assert [part.tool for part in card.parts] == ["memray", "polling", "tracemalloc"]  # memory's own order


def test_a_peer_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PEERS, "no-such-distribution", "no_such_module")
    assert absence("no-such-distribution") == "not installed"
    (tmp_path / "half_a_peer.py").write_text("import its_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PEERS, "msgspec", "half_a_peer")  # installed, yet of no use
    assert absence("msgspec") == "cannot be imported: ModuleNotFoundError: No module named 'its_missing_dependency'"
    assert absence("torch.utils.benchmark") == ""
    assert version("torch.utils.benchmark") == version("torch")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command on a folder; ``fits`` and ``memory`` cost nothing, every tool counts how often it is asked."""
    asked: list[str] = []

    def fake(section: str, raw):
        return lambda tool, done: asked.append(f"{section}/{tool}") or raw

    for module, section, raw in (
        (fits, "fits", {"N": [1.0]}), (memory, "memory", {"1": 2**21}), (flops, "flops", {}), (gates, "gates", {}),
        (timing, "timing", {"elapsed_s": 0}),
    ):  # fmt: skip
        monkeypatch.setattr(module, "measure", fake(section, raw))
        monkeypatch.setattr(module, "scores", lambda raws: iter(()))
    monkeypatch.setattr("ctxbench.suites.scorecard.__main__.absence", lambda tool: "not installed" * (tool == "asv"))

    def run(*arguments: str) -> list[str]:
        asked.clear()
        monkeypatch.setattr("sys.argv", ["scorecard", *arguments, "--out", str(tmp_path)])
        assert main() == 0
        return list(asked)

    return run


def test_a_card_goes_on_where_it_stopped(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("fits/big-O", "memory") == [*(f"memory/{tool}" for tool in memory.TOOLS), "fits/big-O"]
    assert call("--for", "-1") == []
    rest = call()
    assert "fits/big-O" not in rest
    assert "fits/google-benchmark" in rest
    assert "timing/pyperf" in rest
    assert call() == []  # asv is looked for again and still not installed
    assert call("fits/big-O") == ["fits/big-O"]  # named: measured anew
    parts = load(tmp_path / "score.json").parts
    assert (
        len(parts)
        == len({(part.section, part.tool) for part in parts})
        == sum(len(module.TOOLS) for module in (timing, gates, memory, flops, fits))
    )
    assert {part.absent for part in parts if part.tool == "asv"} == {"not installed"}


def test_a_tool_that_fails_does_not_stop_the_others(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tool, done):
        raise RuntimeError(f"{tool}\nfell over")

    monkeypatch.setattr(fits, "measure", fails)
    monkeypatch.setattr("sys.argv", ["scorecard", "fits", "memory/polling", "--out", str(tmp_path)])
    assert main() == 1
    parts = {part.tool: part for part in load(tmp_path / "score.json").parts}
    assert parts["big-O"].absent == "failed: RuntimeError: big-O fell over"
    assert not parts["polling"].absent


def test_a_card_of_another_machine_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "score.json").write_bytes(msgspec.json.encode(Card(machine={"cpu": "another"})))
    monkeypatch.setattr("sys.argv", ["scorecard", "fits", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "another machine" in capsys.readouterr().err


def test_timing_holds_a_tool_against_the_truth_around_it() -> None:
    cells = len(timing.CELLS)
    raw = {
        "before": [[1.0, 1.0, 1.0]] * cells, "after": [[1.1, 1.1, 1.1]] * cells,
        "stated": [(1.05, 1.0, 1.1)] * (cells - 1) + [(2.1, 2.0, 2.2)], "elapsed_s": 10.0,
    }  # fmt: skip
    found = {score.quantity: score for score in timing.scores({"pyperf": raw}) if score.tool == "pyperf"}
    assert found["worst bias"].value == pytest.approx(100)
    assert found["truth inside"].value == cells - 1
    assert found["machine moved by"].value == pytest.approx(10)
    assert found["seconds a cell"].value == 10 / cells


def test_the_table_of_asv_is_read() -> None:
    shown = "param1\n   0      81.0±8ms\n   1   1.20±0.02s \n  12     370±50μs\n  x  n/a\n"
    assert [value for row in timing.asv_rows(shown) for value in row] == pytest.approx(
        [0, 0.081, 0.008, 1, 1.2, 0.02, 12, 3.7e-4, 5e-5]
    )


def test_an_unknown_part_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["scorecard", "timing/stopwatch"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "unknown part timing/stopwatch; accepted: timing, gates, memory, flops, fits, timing/ctxbench" in message
