"""The correctness check that precedes every timing: small, so that it costs less than what it guards.

Probes: *output* (shape, dtype, finite), *fresh* (other inputs, other outputs), *agreement* with the oracle impl,
*causality*, *batch_independence*, *receptive_field* and *state*. A literal sketch (an impl with ``defects``) is not
compared with the oracle; exactly the probes it declares must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.utils import _pytree as pytree

from ctxbench.cell import Cell
from ctxbench.measure.agreement import Agreement, compare
from ctxbench.measure.specimen import NotClaimed, Specimen
from ctxbench.method import Method, load
from ctxbench.rows import Gate
from ctxbench.units import counted

EPS = torch.finfo(torch.float32).eps
UNCHANGED = 4 * EPS  # of the largest output: what a sum in another order may move


@dataclass
class _Evidence:
    """Outputs that several probes look at: ``plain`` twice, and with the end of row 0 replaced."""

    plain: torch.Tensor
    again: torch.Tensor
    moved: torch.Tensor
    boundary: int  # first token of row 0 that was replaced
    floor: float  # changes up to here are rounding
    kept: list[str]  # attributes of the module that hold tensors of a call


def run_gate(method: Method, cell: Cell, seed: int = 0, passed: Sequence[Gate] = ()) -> Gate:
    """Check one impl at a length where the cell's parameters bind; takes some tenths of a second.

    A gate among ``passed`` that has computed the very same specimen stands for this one. What a sound impl raises is
    raised here too: a method that cannot run is an error, not a failed gate.
    """
    specimen = Specimen.of(method, cell, seed)
    for gate in passed:
        if gate.ok and gate.specimen == specimen.key:
            return msgspec.structs.replace(gate, stands_for=True)
    defects = method.impl(cell.impl).defects
    module, x = specimen.build(), specimen.inputs()
    before, received = _held(module), x.clone()
    plain = specimen.observe(module, x)
    complaint = _output(x, plain) or _input(x, received)
    if complaint:
        return Gate(ok=False, length=specimen.length, probes={"output": "failed"}, message=complaint)
    results: dict[str, str] = {"output": "passed"}
    reasons: dict[str, str] = {}
    agreement = Agreement()
    evidence: list[_Evidence] = []

    def look() -> _Evidence:
        if not evidence:
            evidence.append(_gather(specimen, module, x, plain, before))
        return evidence[0]

    def agree() -> str:
        nonlocal agreement
        agreement = compare(specimen, gradients=cell.mode == "train" and not defects)
        return agreement.complaint

    probes: dict[str, Callable[[], str]] = {
        "fresh": lambda: _fresh(look()),
        "agreement": agree,
        "causality": lambda: _causality(specimen, look()),
        "batch_independence": lambda: _batch_independence(look()),
        "receptive_field": lambda: _receptive_field(specimen),
        "state": lambda: _state(specimen, look()),
    }
    for name, probe in probes.items():
        results[name], reasons[name] = _run(name, probe, defects)
    failed = {name for name, result in results.items() if result == "failed"}
    wrong = [f"{name}: {reasons[name]}" for name in results if name in failed and name not in defects]
    wrong += [
        f"{name}: declared as a defect ({defects[name]}), but the probe passed"
        for name in defects
        if results.get(name) == "passed"
    ]
    if wrong:
        message = f"the gate failed at T = {specimen.length}{specimen.note}\n  " + "\n  ".join(wrong)
    elif failed:
        message = f"fails as declared: {', '.join(sorted(failed))}"
    else:
        message = "; ".join(
            f"{name} not claimed: {reasons[name]}" for name in results if results[name] == "not claimed"
        )
        message += f"{'; ' if message else ''}checked{specimen.note}" if specimen.note else ""
    return Gate(
        ok=not wrong, error=agreement.error, tolerance=agreement.tolerance, length=specimen.length, probes=results,
        message=message, specimen=specimen.key,
    )  # fmt: skip


def _run(name: str, probe: Callable[[], str], defects: Mapping[str, str]) -> tuple[str, str]:
    if defects and name == "agreement" and name not in defects:
        return "not claimed", "a literal sketch is not compared with the oracle"
    try:
        complaint = probe()
    except NotClaimed as reason:
        return "not claimed", str(reason)
    except Exception as error:
        if not defects:
            raise
        return "failed", f"{type(error).__name__}: {error}"
    return ("failed", complaint) if complaint else ("passed", "")


def _output(x: torch.Tensor, y: Any) -> str:
    if not isinstance(y, torch.Tensor):
        return f"the module returned {type(y).__name__}\n  accepted: a tensor or Output(y, state)"
    for what in ("shape", "dtype"):
        received, accepted = getattr(y, what), getattr(x, what)
        if received != accepted:
            plain = (tuple(received), tuple(accepted)) if what == "shape" else (received, accepted)
            return f"the output has {what} {plain[0]}\n  accepted: {plain[1]}, that of the input"
    bad = int((~torch.isfinite(y)).sum())
    if bad:
        return f"{bad} of {y.numel()} output values are NaN or infinite\n  accepted: finite values"
    return ""


def _input(x: torch.Tensor, received: torch.Tensor) -> str:
    if torch.equal(x, received):
        return ""
    return "the module wrote to its input\n  accepted: new tensors; look for operations in place, such as add_"


def _gather(
    specimen: Specimen, module: torch.nn.Module, x: torch.Tensor, plain: torch.Tensor, before: dict[str, set[int]]
) -> _Evidence:
    # An odd boundary lies inside every block, so that what leaks only within a block is seen.
    boundary = min(specimen.length - 1, 3 * specimen.length // 5 | 1)
    other = x.clone()
    other[0, boundary:] = 2 * specimen.inputs(seed=1)[0, boundary:]
    moved = specimen.observe(module, other)
    again = specimen.observe(module, x)
    kept = sorted(name for name, tensors in _held(module).items() if tensors - before.get(name, set()))
    return _Evidence(plain, again, moved, boundary, UNCHANGED * float(plain.abs().max()), kept)


def _held(module: torch.nn.Module) -> dict[str, set[int]]:
    """Tensors that are attributes of a module or of its parts but neither parameters nor buffers, by identity."""
    found: dict[str, set[int]] = {}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                tensors = {id(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)}
                if tensors:
                    found[f"{prefix}.{name}".lstrip(".")] = tensors
    return found


def _fresh(seen: _Evidence) -> str:
    if torch.equal(seen.plain[0], seen.moved[0]):
        return "other inputs gave the same output; look for results that are kept between calls"
    return ""


def _causality(specimen: Specimen, seen: _Evidence) -> str:
    if not specimen.method.causal:
        raise NotClaimed("the method declares no direction")
    if not specimen.dims.causal:
        raise NotClaimed("this cell is bidirectional")
    change = (seen.plain[0] - seen.moved[0]).abs().amax(dim=1)[: seen.boundary]
    early = torch.nonzero(change > seen.floor).flatten().tolist()
    if early:
        return (
            f"changing the tokens from {seen.boundary} on changed {len(early)} earlier outputs, the first at {early[0]}"
        )
    return ""


def _batch_independence(seen: _Evidence) -> str:
    change = (seen.plain[1] - seen.moved[1]).abs().amax(dim=1)
    leaked = int((change > seen.floor).sum())
    if leaked:
        return f"changing one sequence of the batch changed {leaked} outputs of another one; look at the batch axis"
    return ""


def _receptive_field(specimen: Specimen) -> str:
    """By gradients: row 0 answers for an output in the middle, row 1 for the last one."""
    if specimen.method.reach is None:
        raise NotClaimed("the method declares no reach")
    if not specimen.supports("train"):
        raise NotClaimed("this impl has no backward pass to look along")
    reach = load(specimen.method.reach)
    x = specimen.inputs().requires_grad_()
    outputs = (specimen.length // 2, specimen.length - 1)
    y = specimen.observe(specimen.build(), x, gradients=True)
    if not y.requires_grad:
        return "no gradient leads from the output to the input"
    weights = torch.randn(y.shape[2], generator=torch.Generator().manual_seed(specimen.seed)).to(y)
    sum((y[row, i] * weights).sum() for row, i in enumerate(outputs)).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    for row, i in enumerate(outputs):
        claimed = reach(specimen.dims, specimen.params, i)
        touched = set(torch.nonzero(x.grad[row].abs().amax(dim=1)).flatten().tolist())
        beyond = sorted(touched - set(claimed))
        if beyond:
            return f"output {i} depends on {counted(len(beyond), 'input')} outside its reach, the first at {beyond[0]}"
        # A set names what may have an influence, the contents decide; a range promises that its ends have.
        ends = {claimed[0], claimed[-1]} if isinstance(claimed, range) and len(claimed) else set()
        silent = sorted(ends - touched)
        if silent:
            return f"output {i} does not depend on input {silent[0]}, the end of its reach"
    return ""


def _state(specimen: Specimen, seen: _Evidence) -> str:
    """Nothing is kept on the module, and continuing a state gives what the whole sequence gives.

    A tensor on the module that changes no output, as a mask that is kept, fails literal sketches only.
    """
    if not torch.allclose(seen.plain, seen.again, rtol=0, atol=seen.floor):
        return "the same input gave another output at the second call; look for tensors kept on the module"
    if seen.kept and specimen.method.impl(specimen.impl).defects:
        return f"tensors of a call are kept on the module: {', '.join(seen.kept)}"
    if specimen.mode not in ("stream", "decode"):
        return ""
    if not specimen.supports("forward"):
        raise NotClaimed("this impl computes no whole sequence to compare with")
    whole = specimen.observe(specimen.build(), specimen.inputs(), whole=True)
    gap, allowed = float((whole - seen.plain).abs().max()), specimen.rounding(whole)
    if gap > allowed:
        return (
            f"continuing in pieces of {', '.join(map(str, specimen.pieces()))} tokens differs from the whole sequence "
            f"by {gap:.3g} (allowed {allowed:.3g})"
        )
    return ""
