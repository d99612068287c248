"""Does an impl compute what the oracle computes? The tolerance is derived from float64, never tuned.

The error of the impl against the oracle in float64 may be at most twice the oracle's own error in the cell's dtype,
and one rounding more. Errors are root mean squares, of the worst token where there are tokens: the largest of many
single roundings is luck, and one wrong token still shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ctxbench.measure.specimen import NotClaimed, Specimen

Tensors = dict[str, torch.Tensor]
PER_TOKEN = ("output", "gradient of the input")


@dataclass
class Agreement:
    """Worst error and what was allowed there, both relative to the values; ``complaint`` when beyond it."""

    error: float | None = None
    tolerance: float | None = None
    complaint: str = ""


def compare(specimen: Specimen, gradients: bool) -> Agreement:
    """Compare outputs and, for ``gradients``, those of the input and of every parameter, on one sequence.

    Raises:
        NotClaimed: when the impl is the oracle, or there is nothing it can be compared with.
    """
    method, oracle = specimen.method, specimen.method.oracle
    if specimen.impl == oracle:
        alone = "it is the method's only impl" if len(method.impls) == 1 else "it is the oracle of the other impls"
        raise NotClaimed(alone)
    for dtype in (specimen.dtype, "fp64"):
        if not specimen.supports(impl=oracle, dtype=dtype):
            raise NotClaimed(f"the oracle {oracle} does not run here in {dtype}")
    candidate = specimen.build()
    rounded, exact = specimen.build(oracle), specimen.build(oracle, "fp64")
    try:
        rounded.load_state_dict(candidate.state_dict())
        exact.load_state_dict(candidate.state_dict())
    except RuntimeError as error:
        return Agreement(complaint=f"its weights are not those of {oracle}: {' '.join(str(error).split())}")
    x = specimen.inputs()[:1]
    truth = _run(specimen, exact, x.double(), gradients)
    own = _run(specimen, rounded, x, gradients)
    seen = _run(specimen, candidate, x, gradients)
    return _judge(truth, own, seen, torch.finfo(x.dtype).eps, specimen)


def _judge(truth: Tensors, own: Tensors, seen: Tensors, eps: float, specimen: Specimen) -> Agreement:
    worst = Agreement(0.0, eps)
    for group in ("output", "gradient"):
        names = [name for name in truth if name.startswith(group)]
        scale = max((_size(name, truth[name]) for name in names), default=0.0)
        for name in names:
            if name not in seen:
                return Agreement(complaint=f"no {name}, which the oracle {specimen.method.oracle} has")
            allowed = 2 * _size(name, own[name] - truth[name]) + eps * scale
            error = _size(name, seen[name] - truth[name])
            relative, limit = error / (scale or 1.0), allowed / (scale or 1.0)
            if not error <= allowed:
                return Agreement(
                    relative, limit,
                    f"{name} in {specimen.dtype} is {relative:.2g} of its size away from the oracle "
                    f"{specimen.method.oracle} in fp64 (allowed {limit:.2g})",
                )  # fmt: skip
            if worst.error is None or worst.tolerance is None or relative / limit > worst.error / worst.tolerance:
                worst = Agreement(relative, limit)
    return worst


def _run(specimen: Specimen, module: torch.nn.Module, x: torch.Tensor, gradients: bool) -> Tensors:
    x = x.detach().clone().requires_grad_(gradients)
    y = specimen.observe(module, x, gradients)
    found = {"output": y.detach()}
    if gradients:
        draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(specimen.seed + 9))
        y.backward(draw.to(y))
        assert x.grad is not None
        found["gradient of the input"] = x.grad
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
    return found


def _size(name: str, values: torch.Tensor) -> float:
    """Root mean square: of the largest token in outputs and in the input's gradient, of the whole in parameters."""
    squares = values.double().square()
    return float((squares.mean(dim=-1).max() if name in PER_TOKEN else squares.mean()).sqrt())
