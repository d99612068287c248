"""Losses that train a compression apart from the model (Rae et al. 2019, section 3.2 and algorithm 2).

Both reach the compression alone (auto-encoding: and its decoder): tokens and projections are constants to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ctxbench.implementations._shared.blocks import split_heads


def attention_reconstruction(layer: Any, queries: torch.Tensor, old: torch.Tensor, entries: torch.Tensor) -> Any:
    """Mean squared difference of what queries read from tokens and from the entries that replace them; a scalar.

    Reading is attention by content, without positions, mask and output projection.

    Args:
        layer: has the projections ``q, k, v`` and ``num_heads``.
        queries: inputs of the segment after which the tokens left, ``[B, S, d_model]``.
        old: the tokens, ``[B, n, d_model]``.
        entries: their compression, ``[B, n / c, d_model]``, with its graph.
    """

    def heads(project: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(linear(rows, project.weight.detach()), layer.num_heads)

    q = heads(layer.q, queries.detach())
    with torch.no_grad():
        exact = _read(q, heads(layer.k, old), heads(layer.v, old))
    return (_read(q, heads(layer.k, entries), heads(layer.v, entries)) - exact).square().mean()


def _read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scores in full: a fused operator's backward pass would compute them twice."""
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3) @ v


def auto_encoding(decoder: nn.Linear, old: torch.Tensor, entries: torch.Tensor) -> Any:
    """Mean squared difference of tokens and their reconstruction, ``decoder: d_model -> c d_model``; a scalar."""
    return (decoder(entries).unflatten(2, (-1, old.shape[2])).flatten(1, 2) - old.detach()).square().mean()


class AddedGradients(torch.autograd.Function):
    """``y`` unchanged; its backward pass also hands the parameters gradients that are known already.

    So a loss apart from the output takes part in training wherever the output does, and its graph is not kept.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, gradients: tuple[torch.Tensor, ...], *parameters: torch.Tensor) -> Any:
        ctx.save_for_backward(*gradients)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None, *ctx.saved_tensors
