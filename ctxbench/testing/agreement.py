"""Laws that compare: every impl with the oracle impl, and a method with what it declares itself equal to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ctxbench import registry
from ctxbench.method import Equivalence, Method
from ctxbench.testing.case import Case, equivalent
from ctxbench.testing.law import law, not_applicable, not_claimed, require
from ctxbench.workload import DTYPES, as_output


@law(every_form=True, crossed=True)
def agreement(case: Case) -> str:
    """Outputs and gradients are the oracle's: exactly in fp64, else within twice its rounding error and one more."""
    if case.impl == case.method.oracle:
        not_applicable("it is the oracle")
    tried = case.lengths(most=3 if case.crossed else 6)
    lengths = [n for n in tried if case.supports(seq_len=n, impl=case.method.oracle)]
    dtypes = [name for name in ("fp32", "bf16")[case.crossed :] if case.supports(dtype=name)]
    if not dtypes or not lengths:
        not_applicable("the impl and the oracle share no dtype and length")
    exact = case.dtype == "fp64"
    for length in lengths if exact else []:
        _compare_exactly(case, length)
    for dtype in dtypes:
        _compare_rounded(_shallow(case) if dtype == "bf16" else case, lengths, dtype)
    return f"{', '.join(['fp64'] * exact + dtypes)} at T = {', '.join(map(str, lengths))}"


@law()
def equivalences(case: Case) -> str:
    """The method equals what it declares itself equal to, with the other method's weights, at every shared position."""
    if not case.method.equals:
        not_claimed("METHOD.equals is empty")
    others, seen = registry.discover(), []
    for declared in case.method.equals:
        for position in _shared_positions(case, others[declared.other]):
            at = dataclasses.replace(case, dims=case.dims.replace(position=position))
            _compare_declared(at, declared, others[declared.other])
        seen.append(f"{declared.other} where {declared.when}")
    return "; ".join(seen)


def _shared_positions(case: Case, other: Method) -> list[str]:
    """Positions that the impl and the other method take; of those that differ in a table of constants, one."""
    own = case.method.impl(case.impl).positions or case.method.positions
    both = [name for name in case.method.positions if name in own and name in other.positions]
    both = [name for name in both if not (name.startswith("rope_") and "rope" in both)]
    return both or [case.dims.position]


def _compare_declared(case: Case, declared: Equivalence, other: Method) -> None:
    here, there = equivalent(case, declared, other)
    answer = here.supports() and there.supports(dtype=here.dtype)
    if not answer:
        not_applicable(f"{declared.when}: {answer.reason}")
    source, target = there.build(dtype=here.dtype), here.build()
    known = target.state_dict()
    lacking = sorted(set(source.state_dict()) - set(known))
    require(
        not lacking, expected=f"every weight of {declared.other} in {case.method.name}",
        seen=f"without {', '.join(lacking)}", at=here.where(), look=f"METHOD.equals, {declared.when!r}",
    )  # fmt: skip
    target.load_state_dict({**known, **source.state_dict()})
    x, grad = here.tokens(batch=2), here.tokens(batch=2, seed=3)
    train = _trains(here, here.dims.seq_len, here.dtype)
    mine, theirs = run(target, x, grad, train), run(source, x, grad, train)
    for name, value in theirs.items():
        gap, scale = distance(mine[name], value), max(1.0, float(value.abs().max()))
        require(
            gap <= here.tolerance * scale, expected=f"{name} of {declared.other} where {declared.when}",
            seen=f"largest difference {gap:.3g}", at=here.where(), look="the edge case of the mask or the memory",
        )  # fmt: skip


def _compare_exactly(case: Case, length: int) -> None:
    """In fp64 nothing is left to rounding: the smallest mistake in a mask or a scale shows."""
    reference, candidate = _pair(case, length, "fp64")
    x, grad = case.tokens(length, 2), case.tokens(length, 2, seed=3)
    train = _trains(case, length, "fp64")
    theirs, mine = run(reference, x, grad, train), run(candidate, x, grad, train)
    scale = max(1.0, *(float(value.abs().max()) for value in theirs.values()))
    for name, value in theirs.items():
        gap = distance(mine[name], value)
        require(
            gap <= case.tolerance * scale, expected=f"{name} in fp64 equal to that of {case.method.oracle}",
            seen=f"largest difference {gap:.3g}, relative to the largest value {gap / scale:.3g}",
            at=case.where(seq_len=length), look=f"{case.impl}: masks at the edges, scale, order of tokens",
        )  # fmt: skip


def _compare_rounded(case: Case, lengths: list[int], dtype: str) -> None:
    """Root-mean-square errors over all lengths: a single rounding error is a matter of luck."""
    errors: dict[str, list[float]] = {}  # by name: sums of squares of candidate, oracle, exact value; how many
    for length in lengths:
        reference, candidate = _pair(case, length, dtype)
        x = case.tokens(length, 2).to(DTYPES[dtype])
        grad = case.tokens(length, 2, seed=3).to(DTYPES[dtype])
        train = _trains(case, length, dtype)
        exact = run(_in_double(case, reference.state_dict(), length), x.double(), grad.double(), train)
        own, seen = run(reference, x, grad, train), run(candidate, x, grad, train)
        for name, value in exact.items():
            parts = (_squares(seen[name] - value), _squares(own[name] - value), _squares(value), value.numel())
            errors[name] = [a + b for a, b in zip(errors.get(name, [0.0] * 4), parts, strict=True)]
    figures = {name: [(part / parts[3]) ** 0.5 for part in parts[:3]] for name, parts in errors.items()}
    largest = max((size for name, (_, _, size) in figures.items() if name != "y"), default=0.0)
    for name, (error, own_error, size) in figures.items():
        limit = 2 * own_error + torch.finfo(DTYPES[dtype]).eps * (size if name == "y" else largest)
        require(
            error <= limit, expected=f"{name} in {dtype} within {limit:.3g} of the oracle in fp64 (root mean square; "
            "twice the oracle's own error and one rounding)", seen=f"{error:.3g}",
            at=f"T in {lengths}, otherwise {case.where()}",
            look=f"{case.impl}: the dtype of accumulation, of the softmax, of positions",
        )  # fmt: skip


def _shallow(case: Case) -> Case:
    """The fewest layers of a method whose layers pick by contents.

    In bf16 every few draws one token is picked otherwise on top of a rounded layer, by an impl or by the oracle: the
    error is then that of a token, or the limit many times too wide. In fp64 and fp32 all layers are compared.
    """
    if not case.method.discrete:
        return case
    return dataclasses.replace(case, dims=case.dims.replace(num_layers=case.method.fewest_layers(case.params)))


def _pair(case: Case, length: int, dtype: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The oracle and the impl with one set of weights."""
    reference = case.build(dtype=dtype, impl=case.method.oracle, seq_len=length)
    candidate = case.build(dtype=dtype, seq_len=length)
    differing = set(reference.state_dict()) ^ set(candidate.state_dict())
    require(
        not differing, expected=f"the weights of {case.method.oracle}",
        seen=f"names that differ: {', '.join(sorted(differing))}", at=case.where(),
        look="build: impls share one set of parameters",
    )  # fmt: skip
    candidate.load_state_dict(reference.state_dict())
    return reference, candidate


def _trains(case: Case, length: int, dtype: str) -> bool:
    return "train" in case.method.modes and bool(case.supports("train", dtype=dtype, seq_len=length))


def _in_double(case: Case, weights: Mapping[str, torch.Tensor], length: int) -> torch.nn.Module:
    impl = case.method.oracle
    if not case.supports(dtype="fp64", impl=impl, seq_len=length):
        not_applicable(f"the oracle {impl} does not compute in fp64")
    module = case.build(dtype="fp64", impl=impl, seq_len=length)
    module.load_state_dict(weights)
    return module


def run(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, train: bool = True) -> dict[str, torch.Tensor]:
    """``y`` and, when training, the gradients of the input and of every parameter, by name."""
    with torch.set_grad_enabled(train):
        leaf = x.detach().clone().requires_grad_(train)
        y = as_output(module(leaf)).y
    found = {"y": y.detach()}
    if train:
        y.backward(grad)
        found["gradient of the input"] = _or_zeros(leaf)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found[f"gradient of {name}"] = _or_zeros(parameter)
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, taken in float64; infinite where a value is missing."""
    if a.shape != b.shape:
        return float("inf")
    gap = (a.double() - b.double()).abs()
    return float(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if gap.numel() else 0.0


def _squares(tensor: torch.Tensor) -> float:
    """Sum of squares in float64; infinite where a value is missing."""
    return float(tensor.double().square().sum().nan_to_num(nan=float("inf")))


def _or_zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
