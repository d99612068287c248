"""Rows scaled to one root mean square: a row keeps itself and one number for backward.

On the CPU PyTorch makes this norm of six operators, all of which keep something.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

EPSILON = 1e-6


class _Scaled(torch.autograd.Function):
    """``x * length / sqrt(mean(x^2) + EPSILON) * weight`` over the last axis, in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, length: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_().mul_(length)
        ctx.save_for_backward(x, inverse, weight)
        ctx.length = length
        scaled = wide * inverse
        return (scaled if weight is None else scaled.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        scaled = x * inverse  # in fp32 at least
        product = scaled * grad
        by_weight = None
        if weight is not None:
            by_weight = product.sum(dim=tuple(range(x.dim() - 1))).to(weight.dtype)
            product *= weight
        along = product.mean(dim=-1, keepdim=True).mul_(-(ctx.length**-2))  # what changes the length alone
        del product
        scaled *= along
        if weight is None:
            scaled += grad
        else:
            scaled.addcmul_(grad.to(scaled.dtype), weight.to(scaled.dtype))
        return scaled.mul_(inverse).to(x.dtype), by_weight, None


def scaled(x: torch.Tensor, weight: torch.Tensor | None = None, length: float = 1.0) -> torch.Tensor:
    """Rows of ``[..., n]`` at root mean square ``length``, then times ``weight: [n]``; zeros stay zeros."""
    if x.device.type == "cuda":  # one kernel there
        return rms_norm(x, x.shape[-1:], weight, EPSILON) * length
    out: torch.Tensor = _Scaled.apply(x, weight, length)
    return out


class Norm(nn.RMSNorm):
    """The norm of a layer, ``[..., d_model]`` to the same."""

    def __init__(self, d_model: int):
        super().__init__(d_model, EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(x, self.weight)
