"""Replayed segments equal those computed as ever, with a stand-in for CUDA graphs that repeats operators on places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ctxbench.implementations._shared import graph
from ctxbench.method import Dims
from ctxbench.registry import discover
from ctxbench.workload import as_output, tensors

SEGMENT = 6
FORMS: dict[str, tuple[Any, ...]] = {  # method, its parameters, a position that is not its first
    "rmt": ("rmt", {"num_memory": 2, "segment_len": SEGMENT}),
    "rmt xl": ("rmt", {"num_memory": 2, "segment_len": SEGMENT, "variant": "xl"}),
    "block_state": ("block_state", {"num_states": 2, "block_len": SEGMENT}),
    "block_state layer": ("block_state", {"block_len": SEGMENT, "variant": "layer", "update": "gru", "pool": "last"}),
    "segment_recurrent": ("segment_recurrent", {"memory_len": 5, "segment_len": SEGMENT}),
    "segment_recurrent t5": ("segment_recurrent", {"memory_len": 5, "segment_len": SEGMENT}, "t5"),
    "block_recurrent": ("block_recurrent", {"window": SEGMENT, "num_states": 3}),
    "melodi": (
        "melodi",
        {"window": SEGMENT, "summary_tokens": 2, "short_slots": 2, "long_slots": 5, "long_per_window": 2},
    ),
}


class Tape(TorchDispatchMode):
    """Repeats operators, with the tensors and numbers they had, into the tensors they gave; then spoils the latter."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        with self:
            action()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, tensors(out)))
        return out

    def replay(self) -> None:
        known, made = set(), []
        for operator, args, kwargs, places in self.calls:
            known |= {_storage(one) for one in tensors((args, kwargs))}
            for place, value in zip(places, tensors(operator(*args, **kwargs)), strict=True):
                if _storage(place) != _storage(value):  # not a view, and nothing that was written in place
                    place.copy_(value)
                    made += [] if _storage(place) in known else [place]
                known.add(_storage(place))
        for place in made:  # the memory of a graph belongs to the next thing that runs in it
            if place.is_floating_point():
                place.fill_(torch.nan)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Recordings by the stand-in, as they are made."""
    made: list[Tape] = []

    def record(action: Callable[[], None], device: torch.device) -> Callable[[], None]:
        made.append(Tape(action))
        return made[-1].replay

    monkeypatch.setattr(graph, "record", record)
    return made


def pair(form: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The reference, and the same computed by replays of the reference's operators."""
    name, values, *other = FORMS[form]
    method = discover()[name]
    monkeypatch.setattr(type(method), "impl", lambda self, _name: self.impls[0])  # of all impls, the reference
    params = method.params().replace(**values)
    dims = Dims(seq_len=64, d_model=16, num_heads=2, num_layers=2, d_ff=24, position=(*other, method.positions[0])[0])
    torch.manual_seed(0)
    plain = method.make(dims, params, "reference", "cpu", torch.float64)
    replayed = method.make(dims, params, "graph", "cpu", torch.float64)
    replayed.load_state_dict(plain.state_dict())
    return plain, replayed


def tokens_of(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_sequences_and_streams_equal_those_computed_as_ever(form, recorded, monkeypatch) -> None:
    plain, replayed = pair(form, monkeypatch)
    with torch.no_grad():
        for length in (8 * SEGMENT, 7 * SEGMENT + 1, SEGMENT, SEGMENT - 1, 1):
            x = tokens_of(length)
            torch.testing.assert_close(as_output(replayed(x)).y, as_output(plain(x)).y)
        assert len(recorded) == 2  # for all of them, one there and one back
        x, state, outputs = tokens_of(66), replayed.init_state(2), []
        for part in x.split([SEGMENT, 3 * SEGMENT, 2, SEGMENT, 1, 29, 4], dim=1):
            y, state = replayed(part, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), plain(x).y)
        expected = plain(x, plain.init_state(2)).state
        assert pytree.tree_structure(state) == pytree.tree_structure(expected)
        for one, other in zip(pytree.tree_leaves(state), pytree.tree_leaves(expected), strict=True):
            assert one == other if isinstance(one, int) else torch.allclose(one, other), (one, other)


@pytest.mark.parametrize("form", ["rmt", "segment_recurrent"])
def test_states_are_values(form, recorded, monkeypatch) -> None:
    """Two streams through one module, and a state used twice."""
    plain, replayed = pair(form, monkeypatch)
    a, b = tokens_of(8 * SEGMENT), tokens_of(8 * SEGMENT, seed=2)
    with torch.no_grad():
        replayed(a)  # records
        _, early = replayed(a[:, : 6 * SEGMENT], replayed.init_state(2))
        kept = [one.clone() for one in tensors(early)]
        ya, after = replayed(a[:, 6 * SEGMENT :], early)
        _, other = replayed(b[:, : 6 * SEGMENT], replayed.init_state(2))
        yb, _ = replayed(b[:, 6 * SEGMENT :], other)
        again, _ = replayed(a[:, 6 * SEGMENT :], early)
        expected = [plain(x).y[:, 6 * SEGMENT :] for x in (a, b)]
    assert all(map(torch.equal, kept, tensors(early)))
    assert torch.equal(ya, again)
    torch.testing.assert_close(ya, expected[0])
    torch.testing.assert_close(yb, expected[1])
    places = {_storage(place) for replay in replayed._made[1].sets for place in (replay.x, replay.y, *replay.state)}
    assert not places & {_storage(one) for one in tensors((ya, early, after))}


def test_weights_may_change_their_values_and_their_places(recorded, monkeypatch) -> None:
    plain, replayed = pair("rmt", monkeypatch)
    x = tokens_of(5 * SEGMENT)
    with torch.no_grad():
        replayed(x)
        before = len(recorded)
        for module in (plain, replayed):
            module.layers[0].q.weight.mul_(-3)
        torch.testing.assert_close(replayed(x).y, plain(x).y)
        assert len(recorded) == before
        for module in (plain, replayed):
            module.layers[0].q.weight = torch.nn.Parameter(-module.layers[0].q.weight)
        torch.testing.assert_close(replayed(x).y, plain(x).y)
        assert len(recorded) == before + 2
        torch.testing.assert_close(replayed(x[:1]).y, plain(x[:1]).y)  # another batch
        assert len(recorded) == before + 4


def test_gradients_are_refused(monkeypatch) -> None:
    _, replayed = pair("rmt", monkeypatch)
    x = tokens_of(2 * SEGMENT)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        replayed(x)
    replayed.eval()
    assert not replayed(x).y.requires_grad
    with pytest.raises(RuntimeError, match="gives no gradients"):
        replayed(x.requires_grad_())


def test_nothing_of_a_call_is_kept_for_the_next(recorded, monkeypatch) -> None:
    """The law of the conformance kit, which looks for tensors on the module."""
    _, replayed = pair("rmt", monkeypatch)
    replayed.eval()
    replayed(tokens_of(5 * SEGMENT))
    assert recorded
    kept = [leaf for value in vars(replayed).values() for leaf in pytree.tree_leaves(value)]
    assert not [leaf for leaf in kept if isinstance(leaf, torch.Tensor) and leaf not in set(replayed.parameters())]
