"""Fused attention of queries over up to three ranges of keys under one softmax: the operator around ``flash``.

Row i of the queries stands at position ``p = i + offset``. Of each range it sees the keys from ``low`` to before
``high``, two lines over p (see ``lines``):

    causal                      high = Line(base=1)
    window of w keys            low = Line(base=1 - w), high = Line(base=1)
    a fixed memory              neither
    blocks of c                 low = Line(c, c), high = Line(c, c, base=c)
    Transformer-XL's segments   low = Line(c, c, base=-mem), high = Line(base=1)
    whole cells of c before p   high = Line(c), over one key a cell

Results over keys that are no such range are merged by their log-sum-exps, through which gradients are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import flash
from ctxbench.implementations._shared.flash_table import (
    BACKWARD,
    DQ_ALONE,
    MOST_RANGES,
    WIDEST,
    Config,
    config,
    padded,
)
from ctxbench.implementations._shared.lines import Line, Placed, place, placed_pairs

__all__ = ["Line", "Range", "attend"]


class Range(NamedTuple):
    """Keys and values ``[B, H_kv, S, D]``, channels side by side, and the lines between which a query sees them."""

    k: torch.Tensor
    v: torch.Tensor
    low: Line | None = None  # the first key a query sees, clamped to 0 .. S; None: 0
    high: Line | None = None  # one past the last, clamped likewise; None: S


def attend(
    q: torch.Tensor, ranges: Sequence[Range], *, offset: int = 0, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of ``q`` over all keys that ``ranges`` show, as one softmax.

    Args:
        q: ``[B, H, T, D]``, any strides; float32, float16 or bfloat16.
        ranges: one to three; H is a multiple of each one's H_kv.
        offset: position of the first query, at least 0.
        scale: of the scores; None for ``D ** -0.5``.

    Returns:
        Output ``[B, H, T, D]``, and the natural log-sum-exp of the scaled scores ``[B, H, T]`` in float32. A query that
        sees no key has output 0 and log-sum-exp minus infinity.

    Raises:
        ValueError: for shapes, dtypes or lines the kernels do not take.
    """
    _check(q, ranges, offset)
    lines: list[int] = []
    for _k, _v, low, high in ranges:
        for line in (low, high):
            lines += place(line, offset, q.shape[2], _k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _attend(q, [one.k for one in ranges], [one.v for one in ranges], lines, scale)


def _check(q: torch.Tensor, ranges: Sequence[Range], offset: int) -> None:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q, k and v must be all fp32, fp16 or bf16, received {q.dtype}")
    widest = WIDEST[q.element_size()]
    if q.shape[3] > widest:
        raise ValueError(f"in {q.dtype} a head has at most {widest} channels, received {q.shape[3]}")
    if not 1 <= len(ranges) <= MOST_RANGES:
        raise ValueError(f"one softmax spans 1 to {MOST_RANGES} ranges, received {len(ranges)}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, received {offset}")
    for k, v, _low, _high in ranges:
        if v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
            raise ValueError(
                "q, k and v must agree in batch and width, k and v in all, and the heads of q be a multiple of theirs; "
                f"received {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v must be all fp32, fp16 or bf16, received {q.dtype}, {k.dtype}, {v.dtype}")


def architecture_of(device: torch.device) -> int:
    """Which half of CONFIGS a device takes: 90 where a block has the shared memory of a Hopper."""
    # Triton's interpreter runs on CPU tensors and has no limits.
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


def _options(kernel: str, q: torch.Tensor) -> tuple[Config, dict[str, Any]]:
    """Launch parameters of one kernel, and the compile-time arguments that follow from them."""
    width = q.shape[3]
    chosen = config(kernel, width, q.element_size(), architecture_of(q.device))
    return chosen, {
        "D": width, "WIDTH": padded(width), "ROWS": chosen.rows, "COLUMNS": chosen.columns,
        "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with the channels of a row side by side, as the kernels read them."""
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of that shape with channels side by side; heads stay where they are, so merging them is free."""
    like = torch.empty_like(x)
    return like if like.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _placed(lines: list[int]) -> list[tuple[Placed, Placed]]:
    """The lines of each range, from the integers that an operator's schema can carry."""
    each = [Placed(*lines[at : at + 5]) for at in range(0, len(lines), 5)]
    return list(zip(each[::2], each[1::2], strict=True))


def _as_kernels_read(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], lines: list[int]
) -> tuple[list[Any], tuple[tuple[int, int], ...]]:
    """Each range as the tuple that ``flash`` describes, and the kinds of their lines."""
    described = []
    for k, v, (low, high) in zip(map(_rows, keys), map(_rows, values), _placed(lines), strict=True):
        described.append((k, v, *_strides(k, v), q.shape[1] // k.shape[1], k.shape[2], low[1:], high[1:]))
    return described, tuple((low.kind, high.kind) for low, high in _placed(lines))


@torch.library.custom_op("ctxbench::attend", mutates_args=())
def _attend(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], lines: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q = _rows(q)
    B, H, T, _D = q.shape
    out, lse = _like(q), q.new_empty(B, H, T, dtype=torch.float32)
    ranges, kinds = _as_kernels_read(q, keys, values, lines)
    chosen, options = _options("forward", q)
    if out.numel():
        with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
            flash.forward_kernel[triton.cdiv(T, chosen.rows), B * H](
                q, out, lse, tuple(ranges), *_strides(q, out), H, T, scale, KINDS=kinds, RANGES=len(kinds), **options
            )
    return out, lse


@torch.library.custom_op("ctxbench::attend_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, keys: list[torch.Tensor],
    values: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, lines: list[int], scale: float,
    wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """DQ, then dK and dV of each range that is ``wanted``."""
    q, grad = _rows(q), _rows(grad)
    B, H, T, _D = q.shape
    dq, delta = _like(q), torch.empty_like(lse)
    gradients = [dq, *(_like(x) for k, v, want in zip(keys, values, wanted, strict=True) if want for x in (k, v))]
    if not out.numel():
        return [dq, *(x.zero_() for x in gradients[1:])]
    through = lse if grad_lse is None else grad_lse.contiguous()
    ranges, kinds = _as_kernels_read(q, keys, values, lines)
    with torch.cuda.device_of(q):
        chosen, options = _options("dq", q)
        flash.dq_kernel[triton.cdiv(T, chosen.rows), B * H](
            q, out, grad, lse, through, delta, dq, tuple(ranges), *_strides(q, out, grad, dq), H, T, scale,
            KINDS=kinds, RANGES=len(kinds), THROUGH_LSE=grad_lse is not None, **options,
        )  # fmt: skip
        chosen, options = _options("dkv", q)
        rest = iter(gradients[1:])
        for k, one, (low, high), want in zip(keys, ranges, kinds, wanted, strict=True):
            if want:
                dk, dv = next(rest), next(rest)
                if k.numel():
                    flash.dkv_kernel[triton.cdiv(k.shape[2], chosen.columns), B * k.shape[1]](
                        q, grad, lse, delta, dk, dv, one, *_strides(q, grad, dk, dv), H, T, scale,
                        LOW=low, HIGH=high, GROUP=H // k.shape[1], **options,
                    )  # fmt: skip
    return gradients


@_attend.register_fake
def _attend_fake(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], lines: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attend_backward.register_fake
def _attend_backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, keys: list[torch.Tensor],
    values: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, lines: list[int], scale: float,
    wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    return [_like(q), *(_like(x) for k, v, want in zip(keys, values, wanted, strict=True) if want for x in (k, v))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, keys, values, ctx.lines, ctx.scale = inputs
    ctx.save_for_backward(q, *output, *keys, *values)
    ctx.set_materialize_grads(False)  # most callers drop the log-sum-exp


def _differentiate(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, out, lse, *held = ctx.saved_tensors
    keys, values = held[: len(held) // 2], held[len(held) // 2 :]
    grad = torch.zeros_like(out) if grad is None else grad
    wanted = [k or v for k, v in zip(*ctx.needs_input_grad[1:3], strict=True)]
    dq, *rest = _attend_backward(grad, grad_lse, q, keys, values, out, lse, ctx.lines, ctx.scale, wanted)
    pairs = iter(zip(rest[::2], rest[1::2], strict=True))
    each = [next(pairs) if want else (None, None) for want in wanted]
    return dq, [dk for dk, _dv in each], [dv for _dk, dv in each], None, None


_attend.register_autograd(_differentiate, setup_context=_save)


@formula(torch.ops.ctxbench.attend)
def _attend_flops(q: Any, keys: Any, values: Any, lines: list[int], scale: float, **_: Any) -> int:
    """Two products over the visible pairs; tiles out of sight are skipped."""
    return sum(_range_flops(q, k, bounds) for k, bounds in zip(keys, _placed(lines), strict=True))


@formula(torch.ops.ctxbench.attend_backward)
def _attend_backward_flops(
    grad: Any, grad_lse: Any, q: Any, keys: Any, values: Any, out_: Any, lse: Any, lines: list[int], scale: float,
    wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    """Seven products: scores and their gradient in both kernels, then dQ, dK and dV; three where dQ alone is wanted."""
    return sum(
        int(_range_flops(q, k, bounds) * (BACKWARD if want else DQ_ALONE))
        for k, bounds, want in zip(keys, _placed(lines), wanted, strict=True)
    )


def _range_flops(q: Any, k: Any, bounds: tuple[Placed, Placed]) -> int:
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * placed_pairs(q.shape[2], k.shape[2], *bounds))
