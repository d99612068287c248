"""Biases by distance inside blocks and clusters: against loops over tokens, and what they cost and never make."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.positions import Position, of_heads, positions_for
from ctxbench.implementations.routing import METHOD, blocked, distances, native, reference, tiles, whole
from ctxbench.implementations.routing.layer import Rules
from ctxbench.implementations.routing.params import RoutingParams
from ctxbench.method import Dims

OPERATORS = {"reference": reference.OPERATORS, "blocked": blocked.OPERATORS}
impls = pytest.mark.parametrize("impl", OPERATORS)
biases = pytest.mark.parametrize("position", ["t5", "alibi"])
CLUSTERS = 3


def encoding(position: str, heads: int, causal: bool) -> Position:
    """Of a layer with one head more, in front, as local heads are."""
    torch.manual_seed(1)
    dims = Dims(64, d_model=4 * (heads + 1), num_heads=heads + 1, causal=causal, position=position)
    return positions_for(dims)[0].double()


def bucket(away: int, causal: bool) -> int:
    """Row of T5's table for a key ``away`` tokens after its query: from the paper's equations."""
    side = 32 if causal else 16
    steps = max(-away, 0) if causal else abs(away)
    spread = side // 2 + int(math.log(max(steps, 1) / (side // 2)) / math.log(128 / (side // 2)) * (side // 2))
    return (steps if steps < side // 2 else min(side - 1, spread)) + (side if away > 0 and not causal else 0)


def by_distance(encoded: Position, head: int, distances: list[int], causal: bool) -> torch.Tensor:
    """What is added to scores; of three heads slopes are those of two, then the first one of four."""
    if hasattr(encoded, "table"):
        return encoded.table.weight[[bucket(away, causal) for away in distances], head]
    slope = [2**-4, 2**-8, 2**-2][head]
    return torch.tensor([-slope * abs(away) for away in distances], dtype=torch.float64)


def answer(q, k, v, head, i, seen, encoded, causal):
    """One query of one head against the keys it sees, all of batch 0; ``i`` is its place among the tokens."""
    query = q[0, head, i - k.shape[2] + q.shape[2]]
    added = by_distance(encoded, head + 1, [j - i for j in seen], causal)
    weights = (k[0, head, seen] @ query / math.sqrt(q.shape[3]) + added).softmax(dim=0)
    return weights @ v[0, head, seen]


def restricted(seen, i, rules):
    seen = [j for j in seen if j <= i] if rules.earlier else seen
    return ([j for j in seen if j != i] or [i]) if rules.exclude_self else seen


def looped_local(q, k, v, block, encoded, causal):
    S, out = k.shape[2], torch.zeros_like(q)
    for head, row in itertools.product(range(q.shape[1]), range(q.shape[2])):
        i = S - q.shape[2] + row
        seen = [j for j in range(S) if (j <= i if causal else True) and abs(i // block - j // block) <= 1]
        out[0, head, row] = answer(q, k, v, head, i, seen, encoded, causal)
    return out


def looped_strict(q, k, v, ids, rules, encoded):
    S, out = k.shape[2], torch.zeros_like(q)
    for head, row in itertools.product(range(q.shape[1]), range(q.shape[2])):
        i = S - q.shape[2] + row
        seen = restricted([j for j in range(S) if ids[0, head, j] == ids[0, head, i]], i, rules)
        out[0, head, row] = answer(q, k, v, head, i, seen, encoded, rules.earlier)
    return out


def looped_topw(q, k, v, query_ids, key_ids, rules, encoded, causal):
    out = torch.zeros_like(q)
    for head, i in itertools.product(range(q.shape[1]), range(q.shape[2])):
        own = [cluster for cluster in range(query_ids.shape[2]) if i in query_ids[0, head, cluster].tolist()]
        for cluster in own:
            seen = restricted(key_ids[0, head, cluster].tolist(), i, rules)
            out[0, head, i] += answer(q, k, v, head, i, seen, encoded, causal) / len(own)
    return out


def operands(queries: int, keys: int, heads: int = 2, width: int = 3) -> list[torch.Tensor]:
    """As projections hand them over: heads inside of tokens."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, n, heads, width, generator=generator, dtype=torch.float64) for n in (queries, keys, keys))
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def compare(found, expected, inputs, encoded) -> None:
    """Results and all gradients, those of T5's table among them."""
    of, weights = [*inputs, *encoded.parameters()], expected.detach().cos()
    both = [[y, *torch.autograd.grad(y, of, weights)] for y in (found, expected)]
    assert len(both[0]) == 1 + len(inputs) + hasattr(encoded, "table")
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    if hasattr(encoded, "table"):
        *_, of_table = both[0]
        assert not of_table[:, 0].any(), "of the head that is not among these"
        assert of_table[:, 1:].abs().sum(dim=1).count_nonzero() >= 10


@impls
@biases
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("tokens", "block"), [(37, 5), (170, 140), (21, 40)], ids=str)
def test_local_heads_equal_a_loop(tokens, block, causal, position, impl) -> None:
    """Several slabs a block, a block that is not full, and one that holds everything."""
    encoded, inputs = encoding(position, 2, causal), operands(tokens, tokens)
    found = OPERATORS[impl].local(*inputs, block, causal, of_heads(encoded, slice(1, None)))
    compare(found, looped_local(*inputs, block, encoded, causal), inputs, encoded)


@impls
@biases
@pytest.mark.parametrize(
    ("queries", "keys", "rules"),
    [
        (190, 190, Rules(CLUSTERS, True, False)),
        (60, 60, Rules(CLUSTERS, True, True)),
        (60, 60, Rules(CLUSTERS, False, False)),
        (21, 230, Rules(CLUSTERS, True, True)),
        (1, 200, Rules(CLUSTERS, True, False)),
    ],
    ids=["whole", "without itself", "bidirectional", "continued", "one query"],
)
def test_strict_heads_equal_a_loop(queries, keys, rules, position, impl) -> None:
    encoded, inputs = encoding(position, 2, rules.earlier), operands(queries, keys)
    ids = torch.randint(CLUSTERS, (1, 2, keys), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    own = ids if queries == keys else ids[:, :, keys - queries :]
    found = OPERATORS[impl].strict(*inputs, own, ids, rules, of_heads(encoded, slice(1, None)))
    if queries == 1:  # too few distances for what compare wants to see of a table
        torch.testing.assert_close(found, looped_strict(*inputs, ids, rules, encoded), rtol=0, atol=1e-13)
        return
    compare(found, looped_strict(*inputs, ids, rules, encoded), inputs, encoded)


@impls
@biases
@pytest.mark.parametrize(
    ("shared", "earlier", "exclude"),
    [(False, False, False), (True, False, False), (True, True, False), (True, True, True)],
    ids=["separate", "shared", "masked", "without itself"],
)
def test_topw_heads_equal_a_loop(shared, earlier, exclude, position, impl) -> None:
    """A token may be in several clusters or in none; the table of a layer without a direction has two sides."""
    encoded, inputs = encoding(position, 2, False), operands(170, 170)
    generator = torch.Generator().manual_seed(2)
    ids = [torch.rand(1, 2, 4, 170, generator=generator).topk(70, dim=3).indices.sort(dim=3).values for _ in range(2)]
    chosen, rules = [ids[0], ids[0] if shared else ids[1]], Rules(4, earlier, exclude)
    found = OPERATORS[impl].topw(*inputs, *chosen, rules, of_heads(encoded, slice(1, None)))
    compare(found, looped_topw(*inputs, *chosen, rules, encoded, False), inputs, encoded)


@biases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("earlier", "exclude"), [(False, False), (True, False), (True, True)], ids=str)
def test_native_kernels_are_the_reference(earlier, exclude, dtype, position) -> None:
    """Several tiles of keys, rows that end within a panel, and a batch whose clusters differ."""
    whole, rules = of_heads(encoding(position, 2, earlier), slice(1, None)), Rules(CLUSTERS, earlier, exclude)
    generator = torch.Generator().manual_seed(4)
    exact = [torch.randn(2, 403, 2, 6, generator=generator).to(dtype).transpose(1, 2).double() for _ in range(3)]
    ids = torch.randint(CLUSTERS, (2, 2, 403), generator=generator, dtype=torch.int32)
    drawn = (torch.rand(2, 2, 3, 403, generator=generator) for _ in range(2))
    taken = [x.topk(150, dim=3).indices.sort(dim=3).values for x in drawn]
    taken[1] = taken[0] if earlier else taken[1]
    for name, rest in {"local": (70, earlier), "strict": (ids, ids, rules), "topw": (*taken, rules)}.items():
        with torch.no_grad():
            found = getattr(native.OPERATORS, name)(*(x.to(dtype) for x in exact), *rest, whole)
            expected = getattr(reference.OPERATORS, name)(*exact, *rest, whole)
        assert found.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        else:
            assert (found.double() - expected).norm() < 0.008 * expected.norm(), name


@biases
def test_layers_give_each_head_its_own_numbers_wherever_a_stream_is_cut(position) -> None:
    """Local heads have the first columns of the one table, routed heads the others, and both its gradient."""
    params = RoutingParams(num_clusters=3, local_block=70, local_share=0.25)
    dims = Dims(160, d_model=16, num_heads=4, num_layers=2, position=position)
    torch.manual_seed(3)
    module = METHOD.make(dims, params, "blocked", "cpu", torch.float64)
    slow = METHOD.make(dims, params, "reference", "cpu", torch.float64)
    slow.load_state_dict(module.state_dict())
    x = torch.randn(1, 160, 16, dtype=torch.float64)
    expected = slow(x).y
    wanted = torch.autograd.grad(expected.square().sum(), list(slow.parameters()))
    for sizes in ([160], [1, 90, 1, 68]):
        pieces, state = [], module.init_state(1)
        for chunk in x.split(sizes, dim=1):
            y, state = module(chunk, state)
            pieces.append(y)
        y = torch.cat(pieces, dim=1)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        found = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    if position == "t5":
        (table,) = [i for i, (name, _) in enumerate(module.named_parameters()) if name.endswith("table.weight")]
        assert wanted[table].abs().sum(dim=0).gt(0).all(), "of every head"


VARIANTS = {
    "strict": (RoutingParams(local_block=150), True, 721),
    "strict, without itself": (RoutingParams(local_block=256, exclude_self=True, num_clusters=7), True, 700),
    "strict, bidirectional": (RoutingParams(local_block=150), False, 721),
    "one block": (RoutingParams(local_block=900, local_share=1.0), True, 500),
    "topw": (RoutingParams(selection="topw", local_block=150), False, 721),
    "topw, masked": (RoutingParams(selection="topw", masked=True, exclude_self=True, local_block=150), False, 721),
}


@biases
@pytest.mark.parametrize("name", VARIANTS)
def test_biases_cost_no_products_and_one_table(name, position) -> None:
    """Blocks of several slabs, the last one not full."""
    params, causal, tokens = VARIANTS[name]
    dims = Dims(tokens, 2, 16, 4, 2, 32, causal=causal, position=position)
    met = itertools.product(METHOD.modes if causal else ("forward", "train"), OPERATORS)
    for mode, impl in (*met, ("forward", "native")):
        cost = METHOD.cost_of(impl, mode, causal, position, params)
        values, seen = bindings(dims, params, 4, params.local_block), trace(METHOD, dims, params, impl, mode)
        assert evaluate(total(cost.flops), values) == seen.flops, (mode, impl)
        assert evaluate(cost.num_parameters, values) == seen.num_parameters
        assert not seen.uncounted


class Largest(TorchDispatchMode):
    """How many numbers the largest result of any operator has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return result


@biases
def test_no_operator_of_blocked_makes_what_grows_with_the_square_of_the_length(position) -> None:
    """A tile of scores and where its pairs read their numbers are the largest; the tracer cannot see inside."""
    encoded, tokens = of_heads(encoding(position, 2, True).float(), slice(1, None)), 2048
    q, k, v = (x.float().detach() for x in operands(tokens, tokens, width=8))
    ids = torch.arange(tokens).expand(1, 2, -1) * 7 % 16
    line = distances.line_of(encoded, q, k)
    dline = distances.gradient_of(line, position == "t5")
    with torch.no_grad(), Largest() as forward:
        whole.attend(q, k, v, ids.int(), 16, False, line)
    with torch.no_grad(), Largest() as backward:
        whole.attend_backward(v, q, k, v, ids.int(), 16, False, line, dline)
    assert q.numel() < max(forward.numbers, backward.numbers) <= tiles.ALIVE
    assert 2 * tokens**2 // 16 > tiles.ALIVE, "the pairs of all clusters"
