"""The table of ``--impls auto``: lines hold or say why not, every method's own table is sound, rows keep the reason."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from math import inf
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ctxbench.analysis.steady import Steady
from ctxbench.cell import Cell
from ctxbench.config import compute_capability
from ctxbench.method import DTYPES, MODES, Dims, Impl, Method, Pick, no
from ctxbench.picks import Choice
from ctxbench.registry import discover
from ctxbench.rows import Latency, Picked, Row, cell_of, decode, encode, row_for
from ctxbench.run.store import read_rows

TOLERANCE = 1.05  # a pick may be slower than the best by what the tables state
PUBLISHED = Path(__file__).parents[2] / "reports" / "published" / "cpu" / "rows.jsonl"
METHODS = [method for method in discover() if method.picks]

WIDE = Method(
    name="wide", build=lambda *_: None, modes=("forward", "train"), causal=(True, False),
    impls=(
        Impl("reference"),
        Impl("blocked"),
        Impl("absent", needs=("a-package-that-nobody-has",)),
        Impl("new", devices=("cuda",)),
        Impl("even", support=lambda dims, params, device, dtype: no("odd lengths") if dims.seq_len % 2 else True),
        Impl("forwards", dtypes=("bf16",), modes=("forward",)),
        Impl("sketch", defects={"agreement": "planted"}),
    ),
    picks=(
        Pick("absent", devices=("cuda",), why="the best if it were there"),
        Pick("new", devices=("cuda",), dtypes=("bf16",), capability=90, causal=(True,), why="for Hopper"),
        Pick("even", modes=("train",), sizes={"seq_len": (64, 512), "head_dim": (1, 64)}, why="seen", measured=True),
    ),
)  # fmt: skip


def pick(
    mode: str = "forward", device: str = "cpu", dtype: str = "fp32", *, capability: int | None = None,
    without: tuple[str, ...] = (), **sizes: Any,
) -> tuple[str, list[str]]:  # fmt: skip
    dims = Dims(**{"seq_len": 128, **sizes})
    choice = WIDE.pick(mode, dims, WIDE.params(), device, dtype, capability, without)
    return choice.impl, list(choice.passed)


def test_the_first_line_that_holds_and_runs_is_taken() -> None:
    missing = "absent: needs the package a-package-that-nobody-has, which is not installed"
    assert pick("forward", "cuda:1", "bf16", capability=90) == ("new", [missing])
    assert pick("forward", "cuda", "fp32", capability=90) == ("blocked", [missing])
    assert pick("forward", "cuda", "bf16", capability=90, causal=False) == ("blocked", [missing])
    assert pick() == ("blocked", [])
    choice = WIDE.pick("train", Dims(seq_len=64), WIDE.params(), "cpu", "fp32")
    assert choice == ("even", "seen", True, ())
    assert WIDE.pick("forward", Dims(seq_len=64), WIDE.params(), "cpu", "fp32").why == "the portable fast path"


def test_what_was_passed_over_says_why() -> None:
    assert pick("train", seq_len=127) == ("blocked", ["even: odd lengths"])
    assert pick("train", seq_len=62) == ("blocked", ["even: taken at a seq_len from 64 to 512, received 62"])
    assert pick("train", num_heads=2) == ("blocked", ["even: taken at a head_dim up to 64, received 128"])
    _, old = pick("forward", "cuda", "bf16", capability=86)
    assert old[1:] == ["new: wants compute capability 9.0, this device has 8.6"]
    _, unknown = pick("forward", "cuda", "bf16")
    assert unknown[1:] == ["new: wants compute capability 9.0, and its device's compute capability is unknown"]


def test_impls_that_are_left_out_by_name_make_way_for_the_next() -> None:
    assert pick("train", without=("even",)) == ("blocked", ["even: left out by name"])
    assert pick("train", without=("even", "blocked")) == ("reference", ["even: left out by name"])


def test_a_method_without_a_table_is_picked_by_what_every_table_ends_with() -> None:
    plain = Method(name="plain", build=lambda *_: None, impls=(Impl("only", devices=("cuda",)),))
    choice = plain.pick("forward", Dims(seq_len=8), plain.params(), "cpu", "fp32")
    assert choice.impl == "only"
    assert choice.why == "nothing that auto knows runs here"
    assert choice.passed == ("only: only runs on cuda, not on cpu",)


@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        (Pick("fast"), "the impl 'fast'; accepted are absent, blocked, even, forwards, new, reference"),
        (Pick("sketch"), "the impl 'sketch'"),
        (Pick("blocked", devices=("gpu",)), "the device 'gpu'; accepted are cpu, cuda"),
        (Pick("blocked", dtypes=("int8",)), "the dtype 'int8'"),
        (Pick("blocked", modes=("backward",)), "the mode 'backward'"),
        (Pick("blocked", modes=("decode",)), "the mode 'decode'; accepted are forward, train"),
        (Pick("forwards", modes=("train",)), "the mode 'train'; accepted are forward"),
        (Pick("new", devices=("cpu",)), "the device 'cpu'; accepted are cuda"),
        (Pick("forwards", dtypes=("fp32",)), "the dtype 'fp32'; accepted are bf16"),
        (Pick("blocked", sizes={"length": (1, 2)}), "the size 'length'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_about_what_does_not_exist_is_refused(line: Pick, accepted: str) -> None:
    with pytest.raises(ValueError, match=r"method 'wide': a pick of .* names") as caught:
        Method(name="wide", build=WIDE.build, impls=WIDE.impls, picks=(line,))
    assert accepted in str(caught.value)


def test_a_line_says_where_it_holds() -> None:
    line = Pick("x", ("cuda",), ("bf16", "fp16"), ("forward",), (True,), 90, {"seq_len": (2048, inf)})
    assert line.condition == "cuda from 9.0 on, bf16 or fp16, forward, causal, seq_len from 2048 on"
    assert Pick("x").condition == "everywhere"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_line_names_what_the_method_and_its_impl_have(method: Method) -> None:
    for line in method.picks:
        impl = method.impl(line.impl)
        assert set(line.modes) <= set(method.modes) & set(impl.modes or MODES), line
        assert set(line.dtypes) <= set(impl.dtypes or DTYPES), line
        assert set(line.devices) <= set(impl.devices), line
        assert set(line.causal) <= set(method.causal or (True, False)), line


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_table_picks_one_sound_impl_that_runs_wherever_one_does(method: Method) -> None:
    params = method.params()
    causal = method.causal or (True,)
    shapes = [
        *itertools.product((1, 1024, 131072), (16, 64, 250, 256), (1, 4), causal, (1,)),
        *itertools.product((1024,), (250,), (4,), causal, (1 << 15,)),  # more heads than one axis of a grid has blocks
    ]
    used, runs = set(), set()
    for length, width, layers, causal, batch in shapes:
        layers = max(layers, method.fewest_layers(params))
        dims = Dims(length, batch, 4 * width, num_layers=layers, causal=causal, position=method.positions[0])
        for mode, (device, capability), dtype in itertools.product(
            MODES, (("cpu", None), ("cuda", None), ("cuda", 80), ("cuda", 90)), DTYPES
        ):
            if not method.mode_support(mode, dims, params):
                continue
            choice = method.pick(mode, dims, params, device, dtype, capability)
            impl = method.impl(choice.impl)
            used.add(choice.impl)
            lines = [line for line in method.picks if line.speaks(mode, device, dtype, causal)]
            runs |= {
                line.impl
                for line in lines
                if method.impl_support(method.impl(line.impl), mode, dims, params, device, dtype)
            }
            assert not impl.defects
            assert method.impl_support(impl, mode, dims, params, device, dtype), (choice, mode, device, dtype)
            assert choice.why
            assert not (choice.measured and device == "cuda")  # nobody has measured there yet
    assert not runs - used, "lines that are never taken"


def test_what_is_marked_as_measured_is_not_beaten_in_the_published_run() -> None:
    rows = [decode(line) for line in PUBLISHED.read_bytes().splitlines()]
    assert beaten(rows) == []
    compared = {taken.method for taken, _ in picked(rows)}
    assert compared == {method.name for method in METHODS}
    seen = {row.impl for row in rows if row.measured}
    for row in rows:  # a line may go without rows only where no method of that run had such an impl
        choice = choice_of(row, without=())
        assert choice.measured, (row.method, row.dtype)
        measured = [other for other in rows if (other.method, other.impl) == (row.method, choice.impl)]
        assert measured or choice.impl not in seen, (row.method, choice.impl)


def choice_of(row: Row, without: tuple[str, ...]) -> Choice:
    """What the shipped table takes for the cell of a row."""
    method = next(method for method in METHODS if method.name == row.method)
    cell = cell_of(row)
    return method.pick(cell.mode, cell.dims, cell.params_for(method), cell.device, cell.dtype, without=without)


def picked(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """The row that the table takes, and the rows of other sound impls, for every cell that has both.

    Impls that occur nowhere in a run are no choice there: it was made before they were.
    """
    methods = {method.name: method for method in METHODS}
    there = {row.impl for row in rows if row.measured}
    cells: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.measured and not methods[row.method].impl(row.impl).defects:
            cells[msgspec.structs.replace(cell_of(row), impl="").key][row.impl] = row
    found = []
    for known in cells.values():
        row = next(iter(known.values()))
        absent = tuple(impl.name for impl in methods[row.method].impls if impl.name not in there)
        taken = known.pop(choice_of(row, absent).impl, None)
        if taken is not None and known:
            found.append((taken, list(known.values())))
    return found


def beaten(rows: list[Row]) -> list[str]:
    """Picks that another impl of the run beats by more than TOLERANCE, at one speed of the machine.

    Processes minutes apart differ by more than each of them knows, so no length says so alone: two neighbouring ones of
    those that both impls share do, or the median over all; where they share a single length, that one.
    """
    steady = Steady([row for row in rows if row.measured])
    pairs: dict[Any, dict[int, float]] = defaultdict(dict)
    for taken, others in picked(rows):
        for other in others:
            times = steady.seconds(taken) / steady.seconds(other)
            pairs[taken.method, taken.impl, other.impl][taken.seq_len] = times
    found = []
    for (method, impl, other), times in pairs.items():
        ratios = [times[length] for length in sorted(times)]
        worst = max([median(ratios), *map(min, itertools.pairwise(ratios))])
        if worst > TOLERANCE:
            found.append(f"{method}: {other} beats {impl}, {worst:.2f}")
    return found


def run_of(times: dict[str, list[list[float]]]) -> list[Row]:
    """Rows of the method ``dense``: impl to the seconds of the processes at 1k, 2k, 4k ..."""
    return [
        row_for(
            Cell(method="dense", impl=impl, seq_len=1024 << octave), "ok",
            latency_s=Latency(
                median=median(processes), low=min(processes), high=max(processes),
                samples=[[each] for each in processes], n_processes=len(processes),
            ),
        )
        for impl, lengths in times.items()
        for octave, processes in enumerate(lengths)
    ]  # fmt: skip


def test_a_pick_that_another_impl_beats_is_found_and_one_slow_process_is_not_such() -> None:
    others = [[1.2], [2.0], [4.5], [9.0]]
    assert beaten(run_of({"native": [[1.0], [2.0], [4.0], [9.4]], "blocked": others})) == []
    assert beaten(run_of({"native": [[1.0], [2.0], [9.0], [9.4]], "blocked": others})) == []  # one slow process
    for slower in ([[1.0], [2.2], [4.9], [8.5]], [[1.3], [2.2], [4.0], [8.0]], [[1.0], [2.0], [4.8], [9.9]]):
        assert len(beaten(run_of({"native": slower, "blocked": others}))) == 1
    assert beaten(run_of({"native": [[1.3], [2.0], [5.0], [9.0], [22.0]], "blocked": [*others, [18.0]]})) == [
        "dense: blocked beats native, 1.08"  # most lengths, no two of them neighbours
    ]
    assert beaten(run_of({"native": [[1.3], [2.0]], "blocked": others[:1]})) == ["dense: blocked beats native, 1.08"]
    older = run_of({"blocked": [[1.2], [2.0]], "reference": [[1.0], [1.8]]})  # a run that had no native impl
    assert beaten(older) == ["dense: reference beats blocked, 1.16"]
    assert beaten([*older, *run_of({"native": [[0.9], [1.7]]})]) == []


def test_auto_is_one_cell_for_each_method_and_mode_with_its_reason(lab: Any) -> None:
    lab.add(WIDE)
    plan = lab.plan(methods="wide,square", impls="auto", seq_len="127,128", mode="forward,train")
    found = {(p.cell.method, p.cell.mode, p.cell.seq_len): p for p in plan.cells}
    assert len(found) == len(plan.cells) == 8
    assert {p.status for p in plan.cells} == {"planned"}
    assert found["wide", "train", 128].cell.impl == "even"
    assert found["wide", "train", 128].picked == Picked(why="seen", measured=True)
    assert found["wide", "train", 127].picked == Picked(why="the portable fast path", passed=["even: odd lengths"])
    assert found["square", "train", 128].cell.impl == "reference"  # it has no impl called blocked, and no table


def test_auto_beside_all_marks_the_cell_it_would_have_picked(lab: Any) -> None:
    lab.add(WIDE)
    plan = lab.plan(methods="wide", impls="all,auto", seq_len="128", mode="train")
    assert [p.cell.impl for p in plan.cells] == [impl.name for impl in WIDE.impls]
    assert [p.cell.impl for p in plan.cells if p.picked] == ["even"]


def test_leaving_out_everything_that_auto_knows_leaves_no_cell(lab: Any) -> None:
    assert not lab.plan(methods="square", impls="auto,-reference", seq_len="128").cells


def test_a_table_that_cannot_be_asked_is_the_portable_impl_and_its_own_error(lab: Any) -> None:
    def explode(*_: Any) -> Any:
        raise RuntimeError("boom")

    impls = (Impl("reference"), Impl("fast", support=explode))
    lab.add(Method(name="bad", build=explode, impls=impls, picks=(Pick("fast"),)))
    (planned,) = lab.plan(methods="bad", impls="auto", seq_len="128").cells
    assert (planned.cell.impl, planned.status) == ("reference", "planned")
    assert planned.picked.why == "the table could not be asked: RuntimeError: boom"


def test_the_row_of_a_picked_cell_keeps_the_reason_and_continues_as_any_other(lab: Any) -> None:
    lab.add(WIDE)
    config = lab.config(methods="wide", impls="auto", seq_len="127,128", mode="train")
    lab.run(lab.machine(), config)
    rows = {row.seq_len: row for row in read_rows(lab.folder / "run")}
    assert {length: row.impl for length, row in rows.items()} == {127: "blocked", 128: "even"}
    assert rows[127].picked == Picked(why="the portable fast path", passed=["even: odd lengths"])
    assert decode(encode(rows[127])) == rows[127]
    assert rows[127].cell == row_for(Cell(**{n: getattr(rows[127], n) for n in Cell.__struct_fields__}), "ok").cell
    again = lab.machine()
    lab.run(again, config)
    assert not [task for task in again.tasks if task.cell is not None]


def test_the_capability_of_a_device_comes_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: ((9, 0), (8, 6))[handle],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert [compute_capability(name) for name in ("cuda", "cuda:1", "cuda:2", "cpu")] == [90, 86, None, None]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert compute_capability("cuda") is None
