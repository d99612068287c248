"""Rows: one JSON object a line, read back as they were written."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.cell import Cell
from ctxbench.rows import (
    FAILURES,
    SCHEMA,
    STATUSES,
    Counted,
    Flops,
    Forecast,
    Gate,
    Latency,
    PeakBytes,
    Row,
    StateBytes,
    cell_of,
    decode,
    encode,
    json_schema,
    row_for,
)

CELL = Cell(method="dense", impl="blocked", seq_len=1024)
COUNT = st.none() | st.integers(0, 2**60)
SECONDS = st.floats(1e-9, 1e6)
TEXT = st.text(max_size=40)

latencies = st.builds(
    Latency, median=SECONDS, low=SECONDS, high=SECONDS, n_processes=st.integers(1, 9),
    samples=st.lists(st.lists(SECONDS, max_size=5), max_size=3), cpu_median=st.none() | SECONDS,
)  # fmt: skip
rows = st.builds(
    Row,
    cell=TEXT, status=st.sampled_from(STATUSES), reason=TEXT, method=TEXT, impl=TEXT, mode=TEXT, device=TEXT,
    dtype=TEXT, position=TEXT, batch_size=st.integers(1, 99), seq_len=st.integers(1, 2**40),
    d_model=st.integers(1, 9999), num_heads=st.integers(1, 99), num_layers=st.integers(1, 99),
    d_ff=st.integers(0, 9999), causal=st.booleans(), memory=COUNT,
    params=st.dictionaries(TEXT, st.integers() | TEXT | st.booleans(), max_size=4),
    latency_s=st.none() | latencies, peak_bytes=st.builds(PeakBytes, allocated=COUNT, resident=COUNT),
    state_bytes=st.builds(StateBytes, measured=COUNT), num_parameters=st.builds(Counted, formula=COUNT),
    flops=st.builds(Flops, counted=COUNT, uncounted=st.dictionaries(TEXT, st.integers(0, 99), max_size=3)),
    gate=st.none() | st.builds(Gate, ok=st.booleans(), probes=st.dictionaries(TEXT, TEXT, max_size=3), message=TEXT),
    forecast=st.none() | st.builds(Forecast, latency_s=st.none() | SECONDS), detail=TEXT,
)  # fmt: skip


@given(rows)
def test_a_row_reads_back_as_it_was_written_on_one_line(row: Row) -> None:
    line = encode(row)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == row


def test_a_row_answers_its_cell() -> None:
    row = row_for(CELL, "ok", tokens_per_s=10.0)
    assert (row.schema, row.cell, row.status) == (SCHEMA, CELL.key, "ok")
    assert cell_of(row) == CELL
    assert row_for(CELL, "skipped", "too long", threads=4).threads == 4


def test_every_field_of_a_cell_is_a_field_of_its_row() -> None:
    assert set(Cell.__struct_fields__) <= set(Row.__struct_fields__)


def test_only_a_timed_row_is_measured() -> None:
    latency = Latency(median=1, low=1, high=1, samples=[[1.0]], n_processes=1)
    assert row_for(CELL, "ok", latency_s=latency).measured
    assert row_for(CELL, "unstable", latency_s=latency).measured
    assert not row_for(CELL, "gate_failed", latency_s=latency).measured
    assert not row_for(CELL, "ok").measured
    assert set(FAILURES) < set(STATUSES)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b'{"cell": "x"}', "status"),
        (encode(row_for(CELL, "ok")).replace(b'"seq_len":1024', b'"seq_len":"long"'), "seq_len"),
        (encode(row_for(CELL, "ok"))[:-20], "truncated"),
    ],
    ids=["field missing", "wrong type", "truncated"],
)
def test_a_damaged_line_is_refused(line: bytes, path: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=path):
        decode(line)


def test_the_schema_describes_a_row() -> None:
    schema = json_schema()
    properties = schema["$defs"]["Row"]["properties"]
    assert set(properties) == set(Row.__struct_fields__)
    assert set(json.loads(encode(row_for(CELL, "ok")))) <= set(properties)
