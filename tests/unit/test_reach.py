"""Maps of who reaches whom: exact at small sizes, kept in a run folder, printed on a terminal."""

from __future__ import annotations

import json

import msgspec
from click.testing import CliRunner

from ctxbench.analysis import reach
from ctxbench.cli.reach import command
from ctxbench.registry import discover
from ctxbench.reports.figures import reach as figure
from ctxbench.testing.reach import reach_map

SIZE = 12


def triangle(found: reach.ReachMap) -> list[str]:
    return [f"{(1 << (i + 1)) - 1:x}" for i in range(found.seq_len)]


def test_dense_attention_reaches_every_earlier_token_by_gradient() -> None:
    found = reach_map(discover()["dense"], length=32)
    assert found.seq_len == 32
    assert found.gradient == found.values == found.claimed == triangle(found)
    assert found.counts() == {"gradient": 32 * 33 // 2, "values": 0, "claimed": 0, "unclaimed": 0, "": 32 * 31 // 2}


def test_a_memory_that_is_cut_from_the_graph_passes_values_alone() -> None:
    found = reach_map(discover()["transformer_xl"], length=32, draws=1)
    segment = found.params["segment_len"]
    assert found.state(segment, segment) == reach.GRADIENT
    assert found.state(segment, segment - 1) == reach.VALUES
    assert found.counts()["unclaimed"] == 0


def test_what_a_method_does_not_name_is_marked() -> None:
    rows = [f"{1 << i:x}" for i in range(SIZE)]
    seen = [f"{(1 << i) | 1:x}" for i in range(SIZE)]
    found = reach.ReachMap(method="m", impl="reference", seq_len=SIZE, params={}, dims={}, gradient=seen, values=seen,
                           claimed=rows)  # fmt: skip
    assert found.state(5, 0) == reach.UNCLAIMED
    assert found.state(5, 5) == reach.GRADIENT
    assert 'class="unclaimed"' in figure.svg(found)
    area = {state: sum(w * h for kind, _, _, w, h in figure.data(found) if kind == state) for state in figure.WORDS}
    counts = found.counts()
    assert all(area[state] == counts[state] for state in figure.WORDS)


def test_maps_of_a_run_are_kept_and_a_damaged_file_is_none(tmp_path) -> None:
    found = reach_map(discover()["dense"], length=32)
    reach.write(tmp_path, [found])
    assert reach.read(tmp_path) == {"dense": found}
    broken = msgspec.structs.replace(found, gradient=["zz"] * 32)
    reach.write(tmp_path, [broken])
    assert reach.read(tmp_path) == {}
    (tmp_path / reach.FILE).write_text("{")
    assert reach.read(tmp_path) == {}


def test_the_command_draws_in_text_and_as_json() -> None:
    drawn = CliRunner().invoke(command, ["dense", "--length", "32"])
    assert drawn.exit_code == 0, drawn.output
    lines = drawn.output.splitlines()
    assert lines[0].startswith("dense / reference, 32 tokens")
    assert lines[1:17] == ["\u2588" * (2 * i + 1) + "\u2584" for i in range(16)]
    answer = json.loads(CliRunner().invoke(command, ["dense", "--length", "32", "--json"]).output)
    assert answer["maps"][0]["method"] == "dense"
    assert answer["failed"] == []


def test_the_command_without_a_method_or_a_run_says_what_it_takes() -> None:
    refused = CliRunner().invoke(command, [])
    assert refused.exit_code != 0
    assert "--run RUN" in str(refused.exception) + refused.output
