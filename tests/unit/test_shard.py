"""Parts of a plan: together they are the plan, apart they share nothing, and they are about equally heavy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.cell import Cell
from ctxbench.cost.figures import Figures
from ctxbench.errors import UserError
from ctxbench.plan import Planned
from ctxbench.shard import Shard, digest, parse, part, weight

MANY = {"methods": "all", "impls": "all", "seq_len": "1k..64k", "mode": "forward,train", "memory": "128..512"}


def planned(length: int, flops: int | None) -> Planned:
    figures = None if flops is None else Figures(algorithmic=flops, flops=flops, num_parameters=1, state_bytes=0)
    return Planned(Cell(method="m", impl="i", seq_len=length), "tests", None, figures=figures)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/2/3", "1.5/2"])
def test_a_malformed_shard_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="1/4 on the first of four"):
        parse(text)


def test_parts_are_counted_from_one() -> None:
    assert parse(" 2/8 ") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"


@given(
    flops=st.lists(st.one_of(st.none(), st.integers(10**6, 10**13)), max_size=40), count=st.integers(1, 6)
)  # fmt: skip
def test_parts_are_disjoint_complete_in_order_and_balanced(flops: list[int | None], count: int) -> None:
    cells = [planned(index + 1, work) for index, work in enumerate(flops)]
    parts = [part(cells, Shard(index, count)) for index in range(1, count + 1)]
    lengths = [cell.cell.seq_len for own in parts for cell in own]
    assert sorted(lengths) == list(range(1, len(cells) + 1))
    assert all(own == [cell for cell in cells if cell in own] for own in parts)
    loads = [sum(map(weight, own)) for own in parts]
    heaviest = max(map(weight, cells), default=0.0)
    assert max(loads) - min(loads) <= heaviest


def test_parts_of_a_plan_do_not_depend_on_what_a_machine_has_measured(lab: Any) -> None:
    slow = lambda cell: 1e-3 * cell.seq_len  # noqa: E731
    config = lab.config(**MANY)
    rows = lab.run(lab.machine(slow), config).rows
    whole = lab.plan(config)
    seen = []
    for index in (1, 2, 3):
        own = msgspec.structs.replace(config, shard=f"{index}/3")
        fresh, informed = lab.plan(own), lab.plan(own, finished=rows)
        assert [p.cell.key for p in fresh.cells] == [p.cell.key for p in informed.cells]
        assert (fresh.whole, fresh.digest) == (len(whole.cells), whole.digest)
        seen += [p.cell.key for p in fresh.cells]
    assert sorted(seen) == sorted(p.cell.key for p in whole.cells)
    assert whole.digest == digest(seen)


def test_a_part_is_resumed_as_that_part_alone(lab: Any) -> None:
    whole = lab.config(methods="square,window")
    assert msgspec.structs.replace(whole, shard="1/2").comparable != whole.comparable
    assert msgspec.structs.replace(whole, budget_s=1.0).comparable == whole.comparable
