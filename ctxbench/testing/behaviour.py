"""Laws about what a module computes: shapes, independence, causality, receptive field, state."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ctxbench.method import load
from ctxbench.testing.case import Case, call, streamed
from ctxbench.testing.law import law, need_mode, not_applicable, not_claimed, require
from ctxbench.workload import as_output, map_state


@law(every_form=True, literal=True, retabled=True)
def shape_and_dtype(case: Case) -> None:
    """The output has the shape, dtype and device of the input, and is finite."""
    x = case.tokens(batch=case.dims.batch_size)
    y = call(case.build(), x)
    require(
        isinstance(y, torch.Tensor), expected="a tensor, or Output(y, state)", seen=type(y).__name__, at=case.where(),
        look="what the module returns",
    )  # fmt: skip
    for what in ("shape", "dtype", "device"):
        expected, seen = getattr(x, what), getattr(y, what)
        require(
            expected == seen, expected=f"{what} {_plain(expected)}", seen=f"{what} {_plain(seen)}", at=case.where(),
            look="the last operation of the module",
        )  # fmt: skip
    bad = int((~torch.isfinite(y)).sum())
    require(
        not bad, expected="finite values", seen=f"{bad} NaN or infinite of {y.numel()}", at=case.where(),
        look="rows whose keys are all masked, divisions, exponentials, uninitialised memory",
    )  # fmt: skip


@law()
def determinism(case: Case) -> None:
    """The same module gives the same bits twice, and the same seed builds the same module."""
    module, x = case.build(), case.tokens(batch=case.dims.batch_size)
    first, second = call(module, x), call(module, x)
    require(
        torch.equal(first, second), expected="bit-identical results of two calls", seen=_difference(first, second),
        at=case.where(), look="randomness in forward, tensors kept on the module, uninitialised memory",
    )  # fmt: skip
    again = call(case.build(), x)
    require(
        torch.equal(first, again), expected="bit-identical results of two builds from one seed",
        seen=_difference(first, again), at=case.where(), look="a random generator that torch.manual_seed does not set",
    )  # fmt: skip


@law(every_form=True)
def batch_independence(case: Case) -> None:
    """A batch of n gives what n batches of one give."""
    x, module = case.tokens(batch=3), case.build(batch_size=3)
    together, alone = call(module, x), torch.cat([call(module, row) for row in x.split(1)])
    _require_same(
        together, alone, case, expected="row i of a batch independent of the other rows", batch_size=3,
        look="the axis attention runs over, batch_first, statistics over the batch",
    )  # fmt: skip


@law(every_form=True)
def causality(case: Case) -> str | None:
    """Changing token t leaves every output before t alone, and changes output t."""
    if not case.method.causal:
        not_claimed("METHOD.causal is empty")
    if not case.dims.causal:
        not_applicable("this form is bidirectional")
    touched = influence(case)
    for changed, outputs in enumerate(touched):
        early = [i for i in outputs if i < changed]
        require(
            not early, expected=f"outputs before token {changed} unchanged when token {changed} changes",
            seen=f"outputs {_some(early)} changed", at=case.where(), look="the mask, its diagonal, pooling or "
            "summaries that include the current block, statistics over the sequence",
        )  # fmt: skip
        require(
            changed in outputs, expected=f"output {changed} to change with token {changed}", seen="no change",
            at=case.where(), look="the residual path and the mask's diagonal",
        )  # fmt: skip
    return None


@law(every_form=True)
def receptive_field(case: Case) -> str | None:
    """The inputs that influence an output are exactly those that METHOD.reach names."""
    if case.method.reach is None:
        not_claimed("METHOD.reach is not given")
    reach = load(case.method.reach)
    length = case.dims.seq_len
    claimed = {(j, i) for i in range(length) for j in reach(case.dims, case.params, i)}
    seen: set[tuple[int, int]] = set()
    for seed in range(8):  # contents decide what a content-based method looks at: several draws
        seen |= {(j, i) for j, outputs in enumerate(influence(case, seed)) for i in outputs}
        beyond = sorted(seen - claimed)
        require(
            not beyond, expected="no influence from outside METHOD.reach",
            seen=f"(input, output) pairs {_some(beyond)} connected", at=case.where(),
            look="METHOD.reach with several layers, off-by-one in the window, global tokens",
        )  # fmt: skip
        if seen == claimed:
            return None
    missing = sorted(claimed - seen)
    require(
        not missing, expected="every input that METHOD.reach names to have an influence",
        seen=f"none for (input, output) pairs {_some(missing)} in 8 draws", at=case.where(),
        look="METHOD.reach (too wide), the mask (too narrow), state that is not carried",
    )  # fmt: skip
    return None


@law(every_form=True)
def any_length(case: Case) -> str:
    """Lengths 1, 2, a prime and one off every block boundary give finite outputs of the right shape."""
    lengths = case.lengths()
    for length in lengths:
        x = case.tokens(length)
        y = call(case.build(seq_len=length, batch_size=1), x)
        require(
            y.shape == x.shape and bool(torch.isfinite(y).all()), expected=f"a finite output of shape {tuple(x.shape)}",
            seen=f"shape {tuple(y.shape)}, {int((~torch.isfinite(y)).sum())} values not finite",
            at=case.where(seq_len=length, batch_size=1), look="the last, partial block and rows without any key; "
            "a length the method cannot have is refused by METHOD.support",
        )  # fmt: skip
    return f"T = {', '.join(map(str, lengths))}"


@law()
def non_contiguous_input(case: Case) -> None:
    """An input that is not contiguous in memory gives the same result."""
    x, module = case.tokens(batch=2), case.build()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    _require_same(
        call(module, strided), call(module, x), case, expected="the result of the contiguous input",
        look="view or as_strided on the input; use reshape",
    )  # fmt: skip


@law()
def purity(case: Case) -> None:
    """A call leaves its input, its state and the module as they were."""
    module, x = case.build(), case.tokens(batch=case.dims.batch_size)
    before, kept, held = x.clone(), {n: t.clone() for n, t in module.state_dict().items()}, _held_tensors(module)
    call(module, x)
    require(
        torch.equal(x, before), expected="the input unchanged", seen=_difference(x, before), at=case.where(),
        look="in-place operations on the input",
    )  # fmt: skip
    changed = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, kept[name])]
    require(
        not changed, expected="parameters and buffers unchanged", seen=f"{', '.join(changed)} changed",
        at=case.where(), look="in-place updates of buffers; state goes in and comes out",
    )  # fmt: skip
    new = sorted(_held_tensors(module).items() - held.items())
    require(
        not new, expected="no tensor kept on the module", seen=f"{', '.join(name for name, _ in new)} after the call",
        at=case.where(), look="assignments to self in forward; state goes in and comes out",
    )  # fmt: skip
    if not case.supports("stream"):
        return
    state = as_output(module(x, module.init_state(x.shape[0]))).state  # type: ignore[operator]
    frozen = map_state(torch.clone, state)
    call(module, x, state)
    require(
        _same_state(state, frozen), expected="the incoming state unchanged", seen="a state that was written to",
        at=case.where(), look="in-place operations on the state (copy_, index_put_, +=)",
    )  # fmt: skip


@law(every_form=True, retabled=True, crossed=True)
def streaming_equals_whole(case: Case) -> str:
    """Any chunking of a sequence, state carried, gives the outputs of the whole sequence."""
    need_mode(case, "stream")
    module, x = case.build(), case.tokens(batch=case.dims.batch_size)
    whole = call(module, x)
    splits = chunkings(case)
    for sizes in splits:
        with torch.no_grad():
            y = streamed(module, x, sizes).y
        _require_same(
            y, whole, case, expected=f"chunks {sizes} to give the whole sequence's outputs",
            look="positions and masks when the queries start after the cache, what the state keeps and drops",
        )  # fmt: skip
    return f"{len(splits)} chunkings"


@law(every_form=True)
def state_shapes(case: Case) -> None:
    """init_state and state_at have the structure, shapes and dtypes of a state that was really streamed."""
    need_mode(case, "stream")
    module, x = case.build(), case.tokens(batch=case.dims.batch_size)
    batch, seen = x.shape[0], 0
    state = module.init_state(batch)  # type: ignore[operator]
    _require_layout(state, module.state_at(batch, 0), case, 0)  # type: ignore[operator]
    for chunk in x.split(chunkings(case)[-1], dim=1):
        with torch.no_grad():
            state = as_output(module(chunk, state)).state
        seen += chunk.shape[1]
        _require_layout(state, module.state_at(batch, seen), case, seen)  # type: ignore[operator]


@law(every_form=True)
def decode_continues(case: Case) -> None:
    """A token decoded after T - 1 streamed tokens, or after state_at, has the right shape, and state moves on."""
    need_mode(case, "decode")
    module, batch, context = case.build(), case.dims.batch_size, case.dims.seq_len
    x = case.tokens(1, batch)
    with torch.no_grad():
        y, state = as_output(module(x, module.state_at(batch, context)))  # type: ignore[operator]
    require(
        y.shape == x.shape and bool(torch.isfinite(y).all()), expected=f"a finite output of shape {tuple(x.shape)}",
        seen=f"shape {tuple(y.shape)}, {int((~torch.isfinite(y)).sum())} values not finite", at=case.where(),
        look="state_at and the call with one token",
    )  # fmt: skip
    _require_layout(state, module.state_at(batch, context + 1), case, context + 1)  # type: ignore[operator]


def influence(case: Case, seed: int = 0) -> list[set[int]]:
    """For every input position, the output positions that change with it."""
    module, x = case.build(batch_size=1), case.tokens(seed=seed + 1)
    y = call(module, x)
    floor = case.tolerance * max(1.0, float(y.abs().max()))
    moved = case.tokens(seed=seed + 1001)
    touched = []
    for position in range(x.shape[1]):
        other = x.clone()
        other[:, position] = moved[:, position]
        change = (call(module, other) - y).abs().amax(dim=(0, 2))
        touched.append({int(i) for i in torch.nonzero(change > floor)})
    return touched


def chunkings(case: Case, count: int = 4) -> list[list[int]]:
    """Ways to cut the sequence: token by token, at random; at segment boundaries where the method has segments."""
    length = case.dims.seq_len
    step = case.method.segment_len(case.params) if case.method.segment else 1
    draw = random.Random(3)
    ways = [[min(step, length - start) for start in range(0, length, step)]]
    for _ in range(count - 1):
        sizes: list[int] = []
        while sum(sizes) < length:
            sizes.append(min(step * draw.randint(1, max(2, length // (3 * step))), length - sum(sizes)))
        ways.append(sizes)
    return ways


def _require_same(a: torch.Tensor, b: torch.Tensor, case: Case, *, expected: str, look: str, **dims: Any) -> None:
    if a.shape == b.shape:
        limit = case.tolerance * max(1.0, float(b.abs().max()))
        ok = bool(((a - b).abs() <= limit).all())
    else:
        ok = False
    require(ok, expected=expected, seen=_difference(a, b), at=case.where(**dims), look=look)


def _require_layout(streamed: Any, declared: Any, case: Case, context: int) -> None:
    seen, expected = layout(declared), layout(streamed)
    require(
        seen == expected, expected=f"state_at(.., {context}) shaped as the streamed state: {expected}", seen=seen,
        at=case.where(), look="init_state and state_at",
    )  # fmt: skip


def layout(state: Any) -> str:
    """Structure, shapes, dtypes and plain values of a state, as text."""
    leaves, structure = pytree.tree_flatten(state)
    parts = [
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return f"{pytree.tree_unflatten(parts, structure)}"


def _same_state(a: Any, b: Any) -> bool:
    return layout(a) == layout(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    )


def _held_tensors(module: torch.nn.Module) -> dict[str, int]:
    """Every tensor reachable from the attributes of a module or its children, by name and identity."""
    found: dict[str, int] = {}
    for name, child in module.named_modules():
        for attribute, value in vars(child).items():
            if attribute == "_modules":
                continue
            for index, leaf in enumerate(pytree.tree_leaves(value)):
                if isinstance(leaf, torch.Tensor):
                    found[f"{name}.{attribute}[{index}]".lstrip(".")] = id(leaf)
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    gap = (a - b).abs().to(torch.float64)
    position = [int(i) for i in torch.unravel_index(gap.nan_to_num(torch.inf).argmax(), gap.shape)]
    return f"largest difference {float(gap.max()):.3g} at [batch, token, channel] {position}"


def _some(items: list[Any]) -> str:
    shown = ", ".join(map(str, items[:6]))
    return f"{shown} and {len(items) - 6} more" if len(items) > 6 else shown


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
