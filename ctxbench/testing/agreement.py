"""Laws that compare: every impl with the oracle impl, and a method with what it declares itself equal to."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ctxbench import registry
from ctxbench.testing.case import Case, equivalent
from ctxbench.testing.law import law, not_applicable, not_claimed, require
from ctxbench.workload import DTYPES, as_output


@law(every_form=True)
def agreement(case: Case) -> str:
    """Outputs and gradients equal the oracle's, within twice the oracle's own rounding error and one rounding more."""
    if case.impl == case.method.oracle:
        not_applicable("it is the oracle")
    lengths = [n for n in case.lengths(most=6) if case.supports(seq_len=n, impl=case.method.oracle)]
    dtypes = [name for name in ("fp32", "bf16") if case.supports(dtype=name)]
    if not dtypes or not lengths:
        not_applicable("the impl and the oracle share no dtype and length")
    for length in lengths:
        for dtype in dtypes:
            _compare(case, length, dtype)
    return f"{', '.join(dtypes)} at T = {', '.join(map(str, lengths))}"


@law()
def equivalences(case: Case) -> str:
    """The method equals what it declares itself equal to, with the other method's weights."""
    if not case.method.equals:
        not_claimed("METHOD.equals is empty")
    others = registry.discover()
    for declared in case.method.equals:
        here, there = equivalent(case, declared, others[declared.other])
        answer = here.supports() and there.supports(dtype=case.dtype)
        if not answer:
            not_applicable(f"{declared.when}: {answer.reason}")
        source, target = there.build(dtype=case.dtype), here.build()
        known = target.state_dict()
        lacking = sorted(set(source.state_dict()) - set(known))
        require(
            not lacking, expected=f"every weight of {declared.other} in {case.method.name}",
            seen=f"without {', '.join(lacking)}", at=here.where(), look=f"METHOD.equals, {declared.when!r}",
        )  # fmt: skip
        target.load_state_dict({**known, **source.state_dict()})
        x, grad = case.tokens(batch=2), case.tokens(batch=2, seed=3)
        mine, theirs = run(target, x, grad), run(source, x, grad)
        for name, value in theirs.items():
            gap, scale = distance(mine[name], value), max(1.0, float(value.abs().max()))
            require(
                gap <= case.tolerance * scale, expected=f"{name} of {declared.other} where {declared.when}",
                seen=f"largest difference {gap:.3g}", at=here.where(), look="the edge case of the mask or the memory",
            )  # fmt: skip
    return "; ".join(f"{declared.other} where {declared.when}" for declared in case.method.equals)


def _compare(case: Case, length: int, dtype: str) -> None:
    oracle, rounded = case.method.oracle, DTYPES[dtype]
    reference = case.build(dtype=dtype, impl=oracle, seq_len=length)
    candidate = case.build(dtype=dtype, seq_len=length)
    weights = reference.state_dict()
    require(
        set(weights) == set(candidate.state_dict()), expected=f"the weights of {oracle}",
        seen=f"names that differ: {', '.join(sorted(set(weights) ^ set(candidate.state_dict())))}", at=case.where(),
        look="build: impls share one set of parameters",
    )  # fmt: skip
    candidate.load_state_dict(weights)
    x = case.tokens(length, 2).to(rounded)
    grad = case.tokens(length, 2, seed=3).to(rounded)
    train = "train" in case.method.modes and bool(case.supports("train", dtype=dtype, seq_len=length))
    exact = run(_in_double(case, oracle, weights, length), x.double(), grad.double(), train)
    own = run(reference, x, grad, train)
    seen = run(candidate, x, grad, train)
    eps = torch.finfo(rounded).eps
    for group in ("y", "gradients"):
        names = [name for name in exact if (name == "y") == (group == "y")]
        band = eps * max((float(exact[name].abs().max()) for name in names), default=0.0)
        for name in names:
            error, limit = distance(seen[name], exact[name]), 2 * distance(own[name], exact[name]) + band
            require(
                error <= limit, expected=f"{name} in {dtype} within {limit:.3g} of the oracle in fp64 "
                "(twice the oracle's own error and one rounding)", seen=f"{error:.3g}",
                at=case.where(seq_len=length), look=f"{case.impl}: masks at the edges, scale, dtype of accumulation",
            )  # fmt: skip


def _in_double(case: Case, impl: str, weights: Mapping[str, torch.Tensor], length: int) -> torch.nn.Module:
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


def _or_zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
