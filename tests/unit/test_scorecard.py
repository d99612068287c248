"""The score card: planted curves know their exponent, tables keep every tool, earlier sections stay."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ctxbench.suites.scorecard import fits, gates
from ctxbench.suites.scorecard.__main__ import main
from ctxbench.suites.scorecard.card import Score, absent, load, tables


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
    assert not gates._ours(quiet, quiet)
    assert gates._ours(quiet, slower)
    assert not gates._ours(slower, quiet)
    assert not gates._median_5_percent(quiet, quiet)
    assert gates._median_5_percent(quiet, slower)


def test_tables_keep_every_tool_and_say_what_is_missing() -> None:
    common = {"section": "memory", "work": "w"}
    text = tables(
        [
            Score(tool="a", quantity="1 MiB", value=-3.25, unit="%", note="x | y", **common),
            Score(tool="b", quantity="1 MiB", **common),
            *absent("memory", "no-such-distribution"),
        ]
    )
    assert "| a | w | -3.2 % | x / y |" in text
    assert "| b | w | - |  |" in text
    assert "| no-such-distribution | - | - | not installed |" in text


def test_a_section_measured_again_replaces_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [Score(section=name, tool="t", work="w", quantity="q", value=1.0) for name in ("memory", "fits")]
    (tmp_path / "score.json").write_bytes(msgspec.json.encode(old))
    new = Score(section="fits", tool="t", work="w", quantity="q", value=2.0)
    monkeypatch.setattr(fits, "scores", lambda: iter([new]))
    monkeypatch.setattr("sys.argv", ["scorecard", "fits", "--out", str(tmp_path)])
    assert main() == 0
    assert [(score.section, score.value) for score in load(tmp_path / "score.json")] == [("memory", 1.0), ("fits", 2.0)]
    assert "| t | w | 2 |" in (tmp_path / "SCORE.md").read_text()


def test_an_unknown_section_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["scorecard", "speed"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "accepted: timing, gates, memory, flops, fits" in capsys.readouterr().err
