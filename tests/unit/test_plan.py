"""Every combination of the axes yields exactly one planned cell, with a forecast or a reason."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxbench.method import Method
from ctxbench.pace import Pace, effort, groups, processes_for, within_budget
from ctxbench.rows import row_for


def by(plan: Any, **wanted: Any) -> list[Any]:
    return [
        planned for planned in plan.cells if all(getattr(planned.cell, name) == value for name, value in wanted.items())
    ]


NO_TORCH = """
import sys
from ctxbench.cli import cli
from ctxbench.method import load
from ctxbench.registry import discover

for method in discover():
    for target in (method.support, *(impl.support for impl in method.impls), method.cost):
        load(target)
        assert "torch" not in sys.modules, f"{target} imports torch"
cli(["plan", "--methods", "all", "--seq", "1k..128k", "--json"], standalone_mode=False)
assert not {"torch", "pandas", "scipy"} & set(sys.modules)
"""


def test_planning_all_methods_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_defaults_are_the_methods_own_choices(lab: Any) -> None:
    plan = lab.plan(methods="all", seq_len="1k")
    (window,) = by(plan, method="window")
    cell = window.cell
    assert (cell.num_layers, cell.d_ff, cell.causal, cell.position, cell.dtype) == (2, 1024, True, "rope", "fp32")
    assert (cell.memory, cell.params) == (256, {"window": 256, "rate": 1.0, "shared": False, "kind": "soft"})
    (plain,) = by(plan, method="plain")
    assert (plain.cell.num_layers, plain.cell.causal, plain.cell.memory) == (1, False, None)


def test_the_memory_axis_sets_the_memory_parameter_and_leaves_others_one_cell(lab: Any) -> None:
    plan = lab.plan(methods="square,window", memory="128..512", seq_len="1k")
    assert [(p.cell.memory, p.cell.params["window"]) for p in by(plan, method="window")] == [
        (128, 128), (256, 256), (512, 512),
    ]  # fmt: skip
    assert [p.cell.memory for p in by(plan, method="square")] == [None]


def test_a_parameter_set_by_name_wins_over_the_memory_axis(lab: Any) -> None:
    config = lab.config(params={"window.window": 64}, methods="window", memory="128..512", seq_len="1k")
    assert [planned.cell.memory for planned in lab.plan(config).cells] == [64]


def test_what_cannot_run_is_a_cell_with_its_reason(lab: Any) -> None:
    plan = lab.plan(methods="all", impls="all", seq_len="1023,1k", mode="forward,decode", memory="4k")
    reasons = {
        (p.cell.method, p.cell.impl, p.cell.seq_len, p.cell.mode): (p.status, p.reason) for p in plan.cells
    }  # fmt: skip
    assert reasons["square", "gpu", 1024, "forward"] == ("unsupported", "gpu runs on cuda, not on cpu")
    assert reasons["square", "fast", 1023, "forward"] == ("unsupported", "odd lengths are refused")
    assert reasons["square", "reference", 1024, "decode"] == ("unsupported", "nothing is carried")
    assert reasons["plain", "reference", 1024, "decode"] == ("unsupported", "plain has no decode mode")
    assert reasons["window", "reference", 1024, "forward"][0] == "unsupported"
    assert "between 1 and 2048" in reasons["window", "reference", 1024, "forward"][1]
    assert reasons["square", "fast", 1024, "forward"] == ("planned", "")


def test_half_precision_on_cpu_is_refused_with_the_reason(lab: Any) -> None:
    (planned,) = lab.plan(dtype="fp16", seq_len="1k").cells
    assert planned.status == "unsupported"
    assert "emulated" in planned.reason


def test_an_impl_that_a_method_has_not_is_a_row_and_supported_leaves_it_out(lab: Any) -> None:
    named = lab.plan(methods="plain,square", impls="fast", seq_len="1k")
    assert {p.cell.method: p.status for p in named.cells} == {"plain": "unsupported", "square": "planned"}
    supported = lab.plan(methods="square", impls="supported", seq_len="1k")
    assert {p.cell.impl for p in supported.cells} == {"reference", "fast"}
    without = lab.plan(methods="square", impls="-gpu", seq_len="1k")
    assert {p.cell.impl for p in without.cells} == {"reference", "fast"}


def test_a_plug_in_that_raises_is_a_cell_with_the_error(lab: Any) -> None:
    def explode(*_: Any) -> Any:
        raise RuntimeError("boom")

    lab.add(Method(name="bad_support", build=explode, support=explode))
    lab.add(Method(name="bad_cost", build=explode, cost=explode))
    plan = lab.plan(methods="bad_support,bad_cost", seq_len="1k")
    cost, support = plan.cells
    assert (support.status, support.reason) == ("error", "support of bad_support raised RuntimeError: boom")
    assert (cost.status, cost.formula_error) == ("planned", "RuntimeError: boom")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    methods=st.sets(st.sampled_from(["square", "window", "plain"]), min_size=1),
    impls=st.sampled_from(["all", "reference", "reference,fast,gpu", "-reference,reference"]),
    lengths=st.sets(st.integers(1, 5000), min_size=1, max_size=4),
    memory=st.one_of(st.none(), st.sets(st.sampled_from([1, 64, 4096]), min_size=1)),
    modes=st.sets(st.sampled_from(["forward", "train", "stream", "decode"]), min_size=1),
    causal=st.sampled_from(["auto", "true,false", "false"]),
)
def test_every_combination_is_planned_exactly_once(
    lab: Any, methods: set[str], impls: str, lengths: set[int], memory: set[int] | None, modes: set[str], causal: str
) -> None:
    axes = {"methods": sorted(methods), "impls": impls, "seq_len": sorted(lengths), "mode": sorted(modes)}
    plan = lab.plan(lab.config(**axes, causal=causal, memory=sorted(memory) if memory else None))
    own = {"square": 3, "window": 1, "plain": 1}
    expected = 0
    for method in methods:
        chosen = own[method] if impls == "all" else 3 if "gpu" in impls else 1
        if impls.startswith("-"):
            chosen = own[method]  # all, without the reference, and the reference again
        sizes = len(memory) if memory and method == "window" else 1
        expected += chosen * sizes * len(lengths) * len(modes) * (2 if causal == "true,false" else 1)
    keys = [planned.cell.key for planned in plan.cells]
    assert len(keys) == len(set(keys)) == expected
    assert {planned.status for planned in plan.cells} <= {"planned", "unsupported", "skipped", "error"}
    assert all(planned.reason for planned in plan.cells if planned.status != "planned")


def test_forecasts_above_the_limits_are_skipped_with_the_limit(lab: Any) -> None:
    plan = lab.plan(lab.config(limits={"memory_limit": "600MiB", "max_flops": 2e10}, seq_len="1k..16k"))
    reasons = [planned.reason for planned in plan.cells]
    assert reasons[0] == ""
    assert "--max-flops 20.0 GFLOP" in reasons[3]
    (planned,) = lab.plan(lab.config(limits={"memory_limit": "600MiB"}, seq_len="8k")).cells
    assert "above the memory limit of 600 MiB" in planned.reason
    (planned,) = lab.plan(lab.config(limits={"cell_timeout": "1s"}, seq_len="32k")).cells
    assert "cell timeout" in planned.reason
    assert planned.forecast.latency_s > 1


@pytest.mark.parametrize("status", ["oom", "timeout", "killed"])
def test_after_a_failure_longer_cells_of_the_series_are_implied(status: str, lab: Any) -> None:
    plan = lab.plan(impls="reference,fast", seq_len="1k..8k")
    failed = by(plan, impl="reference", seq_len=2048)[0]
    again = lab.plan(impls="reference,fast", seq_len="1k..8k", finished=[row_for(failed.cell, status)])
    assert [p.status for p in by(again, impl="reference")] == ["planned", "planned", "skipped", "skipped"]
    assert by(again, impl="reference", seq_len=8192)[0].reason == f"implied by {status} at 2k tokens"
    assert {p.status for p in by(again, impl="fast")} == {"planned"}


def test_groups_hold_all_impls_of_a_length_and_long_calls_come_last(lab: Any) -> None:
    config = lab.config(methods="square,window", impls="reference,fast", seq_len="1k..32k")
    plan = lab.plan(config)
    waiting = [planned for planned in plan.cells if planned.status == "planned"]
    ordered = groups(waiting, config)
    assert sorted(p.cell.key for group in ordered for p in group) == sorted(p.cell.key for p in waiting)
    assert {p.cell.label() for p in ordered[0]} == {"square / reference", "square / fast", "window / reference"}
    assert max(effort(planned) for planned in ordered[0]) == 0
    assert min(effort(planned) for planned in ordered[-1]) > 0
    for group in ordered:
        assert len({p.cell.seq_len for p in group}) == 1


def test_the_fastest_impl_of_a_method_goes_ahead_of_slow_ones_at_shorter_lengths(lab: Any) -> None:
    config = lab.config(methods="square", impls="reference,fast", seq_len="4k,20k,32k")
    waiting = [planned for planned in lab.plan(config).cells if planned.status == "planned"]
    for planned in waiting:
        slow = 1.2 if planned.cell.impl == "reference" else 0.3
        planned.forecast.latency_s = slow * planned.cell.seq_len / 20480
    order = [[(p.cell.impl, p.cell.seq_len) for p in group] for group in groups(waiting, config)]
    assert order == [
        [("fast", 4096), ("reference", 4096)],
        [("fast", 20480)],
        [("fast", 32768)],
        [("reference", 20480)],
        [("reference", 32768)],
    ]
    open_cells = [planned for planned in waiting if planned.cell.impl == "reference" or planned.cell.seq_len > 20480]
    order = [[(p.cell.impl, p.cell.seq_len) for p in group] for group in groups(open_cells, config, waiting)]
    assert order[1:3] == [[("fast", 32768)], [("reference", 20480)]]  # no slow impl inherits the lead of a measured one
    sketch = waiting[0].method.impl("fast")
    with_defects = dataclasses.replace(sketch, defects={"agreement": "planted"})
    method = dataclasses.replace(waiting[0].method, impls=(waiting[0].method.impl("reference"), with_defects))
    for planned in waiting:
        planned.method = method
    flat = [(p.cell.impl, p.cell.seq_len) for group in groups(waiting, config) for p in group]
    assert flat.index(("reference", 32768)) < flat.index(("fast", 32768))  # a sketch leads nobody


def test_every_method_gets_to_16k_before_any_gets_further(lab: Any) -> None:
    config = lab.config(methods="square,window", impls="reference,fast", seq_len="1k..32k")
    waiting = [planned for planned in lab.plan(config).cells if planned.status == "planned"]
    for planned in waiting:
        slow = 0.5 if planned.cell.label() == "square / fast" else 3.0 if planned.cell.method == "square" else 0.001
        planned.forecast.latency_s = slow * planned.cell.seq_len / 1024  # 8 s at 16k is class after class behind
    ordered = groups(waiting, config)
    first = [{(p.cell.label(), p.cell.seq_len) for p in group} for group in ordered]
    place = {cell: number for number, group in enumerate(first) for cell in group}
    assert place["square / fast", 16384] < place["window / reference", 32768] < place["square / fast", 32768]
    assert place["square / fast", 16384] != place["window / reference", 16384]  # whose calls are worth replicates


def test_where_time_is_scarce_what_brings_each_method_to_16k_comes_first(lab: Any) -> None:
    config = lab.config(methods="square,window", impls="reference,fast", seq_len="1k..32k")
    cells = [planned for planned in lab.plan(config).cells if planned.status == "planned"]
    for planned in cells:
        planned.forecast.latency_s = {"square / fast": 0.2, "square / reference": 0.4}.get(planned.cell.label(), 0.1)
    pace = Pace(config, cells)
    fastest = pace.fastest()
    assert fastest == {planned.cell.key for planned in cells if planned.cell.label() != "square / reference"}
    group = [planned for planned in cells if planned.cell.seq_len == 1024]
    rest = [planned for planned in cells if planned not in group]
    first = [planned for planned in rest if planned.cell.key in fastest and planned.cell.seq_len <= 16384]
    slow = next(planned for planned in group if planned.cell.key not in fastest)
    leading = [planned for planned in group if planned is not slow]

    # A slow impl begins where it, what has begun and all first ones can have two processes.
    calls_s = [planned.forecast.latency_s for planned in leading]
    enough = (pace.cell(slow, 2) + pace.replicates(calls_s, 2) + pace.total(first, 2)) / 0.85
    assert pace.worth_beginning(slow, rest, enough + 0.1, calls_s, fastest)
    assert not pace.worth_beginning(slow, rest, enough - 0.1, calls_s, fastest)
    assert all(pace.worth_beginning(planned, rest, 0.1, calls_s, fastest) for planned in leading)

    # Once begun, the fastest have the first of the second processes, and none where the first ones keep no time.
    begun = {planned.cell.key: planned.forecast.latency_s for planned in group}
    two = sum(pace.time_child(planned.forecast.latency_s) for planned in leading)
    enough = (two + pace.total(first, 1)) / 0.85
    found = pace.shares(begun, rest, enough + 0.01, fastest)
    assert {key for key, count in found.items() if count == 2} == {planned.cell.key for planned in leading}
    assert set(pace.shares(begun, rest, 0.5 * enough, fastest).values()) == {1}

    # Third ones are for those up to 16k, when all of them can have three; with plenty of time everything has three.
    late = [planned for planned in rest if planned.cell.seq_len == 32768]
    for planned in late:
        planned.forecast.latency_s = 50.0  # so that not everything can have a process
    enough = (2 * two + pace.time_child(0.4) + pace.total(first, 3)) / 0.85
    found = pace.shares(begun, rest, enough + 0.01, fastest)
    assert found == {planned.cell.key: 2 if planned is slow else 3 for planned in group}
    assert pace.shares(begun, rest, enough - 0.1, fastest) != found
    assert set(pace.shares(begun, rest, 1e6, fastest).values()) == {3}
    measured = {slow.cell.key: 0.01}  # a call that turned out to be shorter than forecast
    assert slow.cell.key in pace.fastest(measured)


def test_the_budget_takes_the_cheapest_cells(lab: Any) -> None:
    config = lab.config(limits={"budget": "12s"}, seq_len="1k..32k")
    plan = lab.plan(config)
    fitting = [planned.cell.seq_len for planned in within_budget(plan)]
    assert fitting == [1024, 2048, 4096, 8192][: len(fitting)]
    assert 0 < len(fitting) < len(plan.cells)


def test_long_calls_are_worth_fewer_processes() -> None:
    assert [processes_for(latency, 5) for latency in (None, 0.1, 2.0, 3.0, 5.0, 6.0)] == [5, 5, 5, 2, 2, 1]


def test_processes_shrink_until_the_rest_fits(lab: Any) -> None:
    config = lab.config(protocol={"processes": 4}, seq_len="1k..4k")
    cells, pace = lab.plan(config).cells, Pace(config)
    assert pace.everywhere(cells, 1e6) == 4
    assert pace.everywhere(cells, pace.total(cells, 2) + 0.01) == 2
    assert pace.everywhere(cells, pace.total(cells, 1) / 0.85 + 0.01) == 1
    assert pace.everywhere(cells, pace.total(cells, 1)) == 0


def test_the_pace_learns_the_fixed_cost_of_each_kind_of_child(lab: Any) -> None:
    pace = Pace(lab.config())
    cold = pace.time_child(0.5)
    pace.learn("gate", elapsed_s=1.2, calls_s=1.0)  # one process is enough
    assert pace.fixed("gate") == pytest.approx(0.2)
    assert pace.time_child(0.5) < cold  # a process without the gate takes no longer than one with it
    for _ in range(50):
        pace.learn("time", elapsed_s=3.0, calls_s=1.0)
        pace.learn("memory", elapsed_s=2.0, call_s=0.25)
    assert pace.fixed_s == pytest.approx({"time": 2.0, "gate": 0.2, "memory": 1.7})
    assert pace.memory_child(4.0) == pytest.approx(1.7 + 1.2 * 4.0)
    assert pace.memory_child(0.05) == pytest.approx(1.7 + 2 * 0.05)
    pace.learn("time", elapsed_s=0.0, calls_s=1.0)
    assert 1.5 < pace.fixed("time") < 2.0  # one odd process among many moves little


def test_what_has_begun_needs_only_its_replicates(lab: Any) -> None:
    config = lab.config(protocol={"processes": 3}, seq_len="1k..4k")
    cells, pace = lab.plan(config).cells, Pace(config)
    begun = {planned.cell.key: 0.01 for planned in cells}
    left = pace.replicates(begun.values(), 3) + 0.01
    assert pace.everywhere(cells, left) == 0
    assert set(pace.shares(begun, [], left, set()).values()) == {3}


def test_counts_add_up(lab: Any) -> None:
    plan = lab.plan(methods="all", impls="all", seq_len="1k..4k", mode="forward,train")
    assert Counter(planned.status for planned in plan.cells) == plan.counts()
    assert sum(plan.counts().values()) == len(plan.cells)
