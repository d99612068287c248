"""Other people's fused attention on CUDA, each pinned: what cannot run there is an error, never another kernel.

``scaled_dot_product_attention`` chooses a kernel without saying which. Here each of PyTorch's three is called by its
own operator. ``flash_attn``, ``flash_attn_4``, ``fla`` and ``xformers`` are
packages of their own, imported when they are first called.

All take ``q: [B, H, T, D]`` and ``k, v: [B, H, S, D]`` and return ``[B, H, T, D]``. Causal attention has as many keys
as queries, where every library aligns the mask alike; one decoded token sees all keys.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.positions import Position

aten = torch.ops.aten


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """NVIDIA's cuDNN, through PyTorch."""
    lse = torch.is_grad_enabled()
    out: torch.Tensor = aten._scaled_dot_product_cudnn_attention(q, k, v, None, lse, 0.0, _masked(q, k, causal))[0]
    return out


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """FlashAttention-2 as PyTorch ships it."""
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, _masked(q, k, causal))[0]
    return out


def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """The memory-efficient kernel as PyTorch ships it; the one that takes float32."""
    lse = torch.is_grad_enabled()
    out: torch.Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, lse, 0.0, _masked(q, k, causal))[0]
    return out


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """The flash-attn package, 2.x; tokens come before heads there."""
    from flash_attn import flash_attn_func

    out: torch.Tensor = flash_attn_func(*_tokens_first(q, k, v), causal=_masked(q, k, causal))
    return out.transpose(1, 2)


def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """The flash-attn-4 package, which is imported as ``flash_attn.cute``; it returns the log-sum-exp too."""
    from flash_attn.cute import flash_attn_func

    out: torch.Tensor = flash_attn_func(*_tokens_first(q, k, v), causal=_masked(q, k, causal))[0]
    return out.transpose(1, 2)


def fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """Softmax attention of flash-linear-attention, causal alone."""
    from fla.ops.attn.parallel import parallel_attn

    if not causal:
        raise ValueError("fla has causal softmax attention alone, received causal=False; choose another impl")
    _masked(q, k, causal)
    out: torch.Tensor = parallel_attn(*_tokens_first(q, k, v))
    return out.transpose(1, 2)


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """The best operator of xFormers for the shape, forward and backward; tokens come before heads there."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    mask: Any = LowerTriangularMask() if _masked(q, k, causal) else None
    out: torch.Tensor = memory_efficient_attention(*_tokens_first(q, k, v), attn_bias=mask)
    return out.transpose(1, 2)


def _masked(q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
    """Whether a causal mask hides anything.

    Raises:
        ValueError: fewer queries than keys, where libraries disagree on what causal means.
    """
    if not causal or q.shape[2] == 1:
        return False
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"a causal mask needs as many queries as keys here, received {q.shape[2]} and {k.shape[2]}: libraries "
            "align the others at different corners"
        )
    return True


def _tokens_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]
