"""Laws about training: gradients exist, are right, and a second step works."""

from __future__ import annotations

import torch
from torch.autograd.gradcheck import GradcheckError

from ctxbench.testing.case import Case, call
from ctxbench.testing.law import law, need_mode, not_applicable, require
from ctxbench.workload import as_output


@law()
def gradients_reach_everything(case: Case) -> None:
    """Every input token and every parameter gets a finite gradient that is not all zero."""
    need_mode(case, "train")
    module = case.build().train()
    x = case.tokens(batch=case.dims.batch_size).requires_grad_()
    _backward(module, x, case)
    assert x.grad is not None
    silent = [t for t in range(x.shape[1]) if not bool(x.grad[:, t].any())]
    require(
        not silent, expected="a gradient at every input token", seen=f"none at tokens {silent[:8]}", at=case.where(),
        look="detach, no_grad, indices where values were meant",
    )  # fmt: skip
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        require(
            grad is not None and bool(grad.any()), expected=f"a gradient at {name}",
            seen="None" if grad is None else "zeros", at=case.where(),
            look="a parameter that is not used, or used under no_grad or through a discrete choice",
        )  # fmt: skip
        require(
            grad is not None and bool(torch.isfinite(grad).all()), expected=f"a finite gradient at {name}",
            seen="NaN or infinity", at=case.where(), look="softmax rows without keys, divisions at zero",
        )  # fmt: skip


@law()
def gradcheck(case: Case) -> None:
    """In float64, at a tiny size, the gradients equal finite differences."""
    need_mode(case, "train")
    if case.dtype != "fp64":
        not_applicable(f"{case.impl} does not compute in fp64")
    # Within one segment: methods that carry a memory may stop its gradient, which finite differences cannot know.
    longest = min(case.dims.seq_len // 2, case.method.segment_len(case.params))
    length = next((n for n in range(longest, 0, -1) if case.supports(seq_len=n)), case.dims.seq_len)
    module = case.build(seq_len=length, batch_size=1).train()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    values = [
        parameter.detach().clone().requires_grad_() for parameter in module.parameters() if parameter.requires_grad
    ]

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        replaced = dict(zip(names, parameters, strict=True))
        return as_output(torch.func.functional_call(module, replaced, (x,))).y

    x = case.tokens(length).requires_grad_()
    torch.manual_seed(5)  # fast mode projects on random directions
    try:
        torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    except GradcheckError as error:
        require(
            False, expected="gradients equal to finite differences", seen=str(error).strip().splitlines()[0],
            at=case.where(seq_len=length, batch_size=1), look="a hand-written backward, detach, in-place operations",
        )  # fmt: skip


@law()
def two_training_steps(case: Case) -> None:
    """Two training steps in a row work, and after them the module computes what a fresh one with its weights does."""
    need_mode(case, "train")
    module = case.build().train()
    optimiser = torch.optim.SGD([{"params": module.parameters()}], lr=1e-3)  # a group may be empty
    for step in range(2):
        optimiser.zero_grad(set_to_none=True)
        x = case.tokens(batch=case.dims.batch_size, seed=step + 1).requires_grad_()
        try:
            _backward(module, x, case)
        except RuntimeError as error:
            require(
                False, expected=f"training step {step + 1} to run", seen=str(error).splitlines()[0], at=case.where(),
                look="a graph kept from the step before: state on the module, caches that are not detached",
            )  # fmt: skip
        optimiser.step()
    fresh = case.build()
    fresh.load_state_dict(module.state_dict())
    x = case.tokens(batch=case.dims.batch_size, seed=9)
    stale, right = call(module.eval(), x), call(fresh, x)
    gap, limit = float((stale - right).abs().max()), case.tolerance * max(1.0, float(right.abs().max()))
    require(
        gap <= limit, expected="the trained module to equal a fresh one with its weights",
        seen=f"largest difference {gap:.3g}", at=case.where(), look="values derived from weights and kept",
    )  # fmt: skip


def _backward(module: torch.nn.Module, x: torch.Tensor, case: Case) -> None:
    y = as_output(module(x)).y
    y.backward(case.tokens(x.shape[1], x.shape[0], seed=77))
