"""Fused attention of queries over up to three ranges of keys under one softmax: the operator around its kernels.

They are ``flash``'s in Triton, or ``flash_turned``'s for queries that are to be turned by their positions, and for CPU
tensors ``ranges_native``'s in C++.

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

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import ranges_native
from ctxbench.implementations._shared.flash_table import (
    BACKWARD,
    DQ_ALONE,
    MOST_RANGES,
    NATIVE_BACKWARD,
    WIDEST,
    Config,
    chunk,
    config,
    padded,
)
from ctxbench.implementations._shared.lines import PLAIN, SLOPES, TABLE, Line, Placed, place, placed_pairs

if TYPE_CHECKING:
    from ctxbench.implementations._shared.turning import Unturned

__all__ = ["Line", "Range", "attend"]


class Range(NamedTuple):
    """Keys and values ``[B, H_kv, S, D]``, channels side by side, and the lines between which a query sees them."""

    k: torch.Tensor
    v: torch.Tensor
    low: Line | None = None  # the first key a query sees, clamped to 0 .. S; None: 0
    high: Line | None = None  # one past the last, clamped likewise; None: S
    start: int | None = None  # position of key 0, where a bias is to be added
    every: int = 1  # tokens from one key to the next
    since: torch.Tensor | None = None  # [S] integers: a key is hidden from queries before this position
    places: torch.Tensor | None = None  # [B, S] integers, on CPUs: each key's position, in place of start and every


def attend(
    q: torch.Tensor | Unturned, ranges: Sequence[Range], *, offset: int = 0, scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax attention of ``q`` over all keys that ``ranges`` show, as one softmax.

    Args:
        q: ``[B, H, T, D]``, any strides; float32, float16 or bfloat16, on CPU float32, bfloat16 or float64. Unturned
            queries are turned where they are read; the keys must be already.
        ranges: one to three; H is a multiple of each one's H_kv.
        offset: position of the first query, at least 0.
        scale: of the scores; None for ``D ** -0.5``.
        bias: added to the scaled scores of ranges that have a ``start`` or ``places``, at least in float32, by the
            distance d of the key from the query in tokens. ``[H]``: slopes, ``-bias[h] |d|``, constants.
            ``[H, 2 F + 1]``: a table, ``bias[h, F + d]`` with d clamped to -F .. F, where ``every`` is 1; it has a
            gradient.

    Returns:
        Output ``[B, H, T, D]``, and the natural log-sum-exp of the scaled scores ``[B, H, T]``, at least in float32. A
        query that sees no key has output 0 and log-sum-exp minus infinity.

    Raises:
        ValueError: for shapes, dtypes or lines the kernels do not take.
    """
    angles: list[torch.Tensor] = []
    if not isinstance(q, torch.Tensor):
        angles = [q.cos, q.sin]
        q = q.x
    _check(q, ranges, offset)
    if bias is not None:
        _check_bias(q, ranges, bias)
        bias = bias.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    lines: list[int] = []
    for one in ranges:
        for line in (one.low, one.high):
            lines += place(line, offset, q.shape[2], one.k.shape[2])
        added = bias is not None and (one.start is not None or one.places is not None)
        kind = PLAIN if bias is None or not added else SLOPES if bias.dim() == 1 else TABLE
        lines += (kind, one.every, (one.start or 0) - offset, one.since is None, one.places is None)
    tables = [(table - offset).int() for one in ranges for table in (one.since, one.places) if table is not None]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys, values = [one.k for one in ranges], [one.v for one in ranges]
    keep = bool(angles) and torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys, *values))
    out, lse, _turned = _attend(q, keys, values, bias, tables, lines, scale, angles, keep)
    return out, lse


def _check_bias(q: torch.Tensor, ranges: Sequence[Range], bias: torch.Tensor) -> None:
    if bias.dim() not in (1, 2) or bias.shape[0] != q.shape[1] or (bias.dim() == 2 and bias.shape[1] % 2 == 0):
        raise ValueError(f"a bias is [H] or [H, 2 F + 1] with H = {q.shape[1]}, received {tuple(bias.shape)}")
    if bias.dim() == 2 and any(one.start is not None and one.every != 1 for one in ranges):
        raise ValueError("a table of biases takes keys of consecutive tokens: every must be 1")
    if bias.dim() == 1 and bias.requires_grad:
        raise ValueError("slopes are constants: pass them detached")


def _check(q: torch.Tensor, ranges: Sequence[Range], offset: int) -> None:
    if native(q):
        taken, names = (torch.float32, torch.bfloat16, torch.float64), "fp32, bf16 or fp64"
    else:
        taken, names = (torch.float32, torch.float16, torch.bfloat16), "fp32, fp16 or bf16"
    if q.dtype not in taken:
        raise ValueError(f"q, k and v must be all {names}, received {q.dtype}")
    widest = None if native(q) else WIDEST[q.element_size()]
    if widest is not None and q.shape[3] > widest:
        raise ValueError(f"in {q.dtype} a head has at most {widest} channels, received {q.shape[3]}")
    if not 1 <= len(ranges) <= MOST_RANGES:
        raise ValueError(f"one softmax spans 1 to {MOST_RANGES} ranges, received {len(ranges)}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, received {offset}")
    for k, v, *_, places in ranges:
        if places is not None and (not native(q) or places.shape != (k.shape[0], k.shape[2])):
            raise ValueError(
                f"places are [B, S] = {(k.shape[0], k.shape[2])} and for the kernels of CPUs alone, received "
                f"{tuple(places.shape)} on {q.device.type}: elsewhere keys have a start"
            )
        if v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
            raise ValueError(
                "q, k and v must agree in batch and width, k and v in all, and the heads of q be a multiple of theirs; "
                f"received {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v must be all {names}, received {q.dtype}, {k.dtype}, {v.dtype}")


def native(q: torch.Tensor | Unturned) -> bool:
    """Whether the kernels in C++ take these queries; Triton's interpreter reads tensors of the CPU too.

    Meta tensors stand for those of the CPU, see ``cost.shadow``.
    """
    return q.device.type in ("cpu", "meta") and os.environ.get("TRITON_INTERPRET") != "1"


def architecture_of(device: torch.device) -> int:
    """Which half of CONFIGS a device takes: 90 where a block has the shared memory of a Hopper."""
    # Triton's interpreter runs on CPU tensors and has no limits.
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


def _options(
    kernel: str, q: torch.Tensor, kinds: tuple[tuple[int, ...], ...], grouped: bool = False
) -> tuple[Config, dict[str, Any]]:
    """Launch parameters of one kernel, and the compile-time arguments that follow from them."""
    width, heavy = q.shape[3], len(kinds) > 1 or any(bias != PLAIN or not known for *_, bias, known in kinds)
    table = any(bias == TABLE for *_, bias, _known in kinds)
    chosen = config(kernel, width, q.element_size(), architecture_of(q.device), heavy, grouped, table)
    return chosen, {
        "D": width, "WIDTH": padded(width), "CHUNK": chunk(width, q.element_size()), "ROWS": chosen.rows,
        "COLUMNS": chosen.columns, "num_warps": chosen.warps, "num_stages": chosen.stages,
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


class Shown(NamedTuple):
    """What of a range an operator's schema carries as integers: its lines over rows, and the places of its keys."""

    low: Placed
    high: Placed
    bias: int
    every: int
    ahead: int  # key 0 is so many tokens after row 0
    known: int  # 0: a table says from which row on each key is seen
    even: int  # 0: a table says how many tokens after row 0 each key is


def _shown(lines: list[int]) -> list[Shown]:
    each = (lines[at : at + 15] for at in range(0, len(lines), 15))
    return [Shown(Placed(*one[:5]), Placed(*one[5:10]), *one[10:]) for one in each]


def _as_kernels_read(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], tables: list[torch.Tensor], lines: list[int]
) -> tuple[list[Any], tuple[tuple[int, ...], ...]]:
    """Each range as the tuple that ``flash`` describes, and the kinds of their lines and biases."""
    described, shown, given = [], _shown(lines), iter(tables)
    for k, v, one in zip(map(_rows, keys), map(_rows, values), shown, strict=True):
        group, places = q.shape[1] // k.shape[1], (one.every, one.ahead)
        described.append(
            (
                k,
                v,
                *_strides(k, v),
                group,
                k.shape[2],
                one.low[1:],
                one.high[1:],
                *places,
                k if one.known else next(given),
            )
        )
    return described, tuple((one.low.kind, one.high.kind, one.bias, one.known) for one in shown)


def _as_native(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], tables: list[torch.Tensor], lines: list[int]
) -> list[tuple[Any, ...]]:
    """Each range as ``ranges_native`` describes it."""
    given = iter(tables)
    return [
        (
            *(k, v, q.shape[1] // k.shape[1], *one[:5], None if one.known else next(given).contiguous(), *[None] * 4),
            None if one.even else next(given).contiguous(),
        )
        for k, v, one in zip(map(_rows, keys), map(_rows, values), _shown(lines), strict=True)
    ]


def _farthest(bias: torch.Tensor | None) -> int:
    return bias.shape[1] // 2 if bias is not None and bias.dim() == 2 else 0


@torch.library.custom_op("ctxbench::attend", mutates_args=())
def _attend(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: torch.Tensor | None,
    tables: list[torch.Tensor], lines: list[int], scale: float, angles: list[torch.Tensor], keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output and log-sum-exp; and the turned queries, where ``angles`` turn them and ``keep`` asks for them."""
    q = _rows(q)
    B, H, T, _D = q.shape
    out, lse, turned = _attend_fake(q, keys, values, bias, tables, lines, scale, angles, keep)
    if not out.numel():
        return out, lse, turned
    if native(q):
        ranges_native.attend(q, out, lse, bias, _as_native(q, keys, values, tables, lines), _farthest(bias), scale)
    else:
        from ctxbench.implementations._shared import flash, flash_turned  # Triton is a package of its own

        ranges, kinds = _as_kernels_read(q, keys, values, tables, lines)
        chosen, options = _options("turned" if angles else "forward", q, kinds)
        grid, biases = (-(-T // chosen.rows), B * H), lse if bias is None else bias
        options |= {"KINDS": kinds, "RANGES": len(kinds)}
        with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
            if angles:
                flash_turned.turned_kernel[grid](
                    q, *angles, turned if keep else out, out, lse, biases, tuple(ranges), *_strides(q, out),
                    angles[0].stride(0), H, T, _farthest(bias), scale, **options,
                )  # fmt: skip
            else:
                flash.forward_kernel[grid](
                    q, out, lse, biases, tuple(ranges), *_strides(q, out), H, T, _farthest(bias), scale, **options
                )
    return out, lse, turned


@torch.library.custom_op("ctxbench::attend_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, keys: list[torch.Tensor],
    values: list[torch.Tensor], bias: torch.Tensor | None, tables: list[torch.Tensor], out: torch.Tensor,
    lse: torch.Tensor, lines: list[int], scale: float, wanted: list[bool], angles: list[torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """DQ, that of a table of biases, and dK and dV of each range, as far as ``wanted``: the table first.

    ``angles``: those by which ``q`` was turned, if it was: dQ is turned back by them.
    """
    q, grad = _rows(q), _rows(grad)
    B, H, T, _D = q.shape
    gradients = _attend_backward_fake(
        grad, grad_lse, q, keys, values, bias, tables, out, lse, lines, scale, wanted, angles
    )
    if not out.numel():
        return [x.zero_() for x in gradients]
    through = None if grad_lse is None else grad_lse.contiguous()
    if native(q):
        ranges = _as_native(q, keys, values, tables, lines)
        _backward_native(grad, through, q, bias, ranges, out, lse, scale, wanted, gradients)
        return gradients
    from ctxbench.implementations._shared import flash, flash_bias, turning

    dq, delta = gradients[0], torch.empty_like(lse)
    through, biases = lse if through is None else through, lse if bias is None else bias
    ranges, kinds = _as_kernels_read(q, keys, values, tables, lines)
    shared = H, T, _farthest(bias), scale
    with torch.cuda.device_of(q):
        chosen, options = _options("dq", q, kinds)
        flash.dq_kernel[-(-T // chosen.rows), B * H](
            q, out, grad, lse, through, delta, biases, dq, tuple(ranges), *_strides(q, out, grad, dq), *shared,
            KINDS=kinds, RANGES=len(kinds), THROUGH_LSE=grad_lse is not None, **options,
        )  # fmt: skip
        if angles:
            turning.launch(dq, dq, *angles, back=True)
        if bias is not None and wanted[0]:
            chosen, options = _options("table", q, kinds)
            tiles = -(-T // chosen.rows)
            sums = lse.new_zeros(tiles, B, *bias.shape)
            flash_bias.table_kernel[tiles, B * H](
                q, grad, lse, delta, bias, sums, tuple(ranges), *_strides(q, grad), *shared, KINDS=kinds,
                RANGES=len(kinds), **options,
            )  # fmt: skip
            gradients[1] = sums.sum((0, 1))
        rest = iter(gradients[1 + wanted[0] :])
        for k, one, (low, high, added, known), want in zip(keys, ranges, kinds, wanted[1:], strict=True):
            if want:
                dk, dv = next(rest), next(rest)
                if k.numel():
                    chosen, options = _options("dkv", q, kinds, grouped=k.shape[1] < H)
                    flash.dkv_kernel[-(-k.shape[2] // chosen.columns), B * k.shape[1]](
                        q, grad, lse, delta, biases, dk, dv, one, *_strides(q, grad, dk, dv), *shared,
                        LOW=low, HIGH=high, BIAS=added, KNOWN=known, GROUP=H // k.shape[1], **options,
                    )  # fmt: skip
    return gradients


def _backward_native(
    grad: torch.Tensor, through: torch.Tensor | None, q: torch.Tensor, bias: torch.Tensor | None,
    ranges: list[tuple[Any, ...]], out: torch.Tensor, lse: torch.Tensor, scale: float, wanted: list[bool],
    gradients: list[torch.Tensor],
) -> None:  # fmt: skip
    """Fill ``gradients``, as ``_attend_backward`` returns them.

    Those of keys and values in bfloat16 are summed in float32 first: for a moment three times their bytes, which
    formulas of peaks leave out.
    """
    dq, *rest = gradients
    of_table = rest.pop(0) if bias is not None and wanted[0] else None
    sums = None if of_table is None else of_table.new_zeros(q.shape[0], *of_table.shape)
    exact = [torch.zeros_like(x, dtype=lse.dtype) if x.dtype != lse.dtype else x.zero_() for x in rest]
    pairs = iter(zip(exact[::2], exact[1::2], strict=True))
    each = [next(pairs) if want else None for want in wanted[1:]]
    farthest = _farthest(bias)
    ranges_native.backward(q, _rows(out), grad, lse, through, bias, ranges, farthest, scale, dq, sums, each)
    if of_table is not None and sums is not None:
        torch.sum(sums, 0, out=of_table)
    for x, sum_ in zip(rest, exact, strict=True):
        if x is not sum_:
            x.copy_(sum_)


@_attend.register_fake
def _attend_fake(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: torch.Tensor | None,
    tables: list[torch.Tensor], lines: list[int], scale: float, angles: list[torch.Tensor], keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return _like(q), lse, _like(q) if keep else q.new_empty(0)


@_attend_backward.register_fake
def _attend_backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, keys: list[torch.Tensor],
    values: list[torch.Tensor], bias: torch.Tensor | None, tables: list[torch.Tensor], out: torch.Tensor,
    lse: torch.Tensor, lines: list[int], scale: float, wanted: list[bool], angles: list[torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    table = [torch.empty_like(bias)] if bias is not None and wanted[0] else []
    pairs = (_like(x) for k, v, want in zip(keys, values, wanted[1:], strict=True) if want for x in (k, v))
    return [_like(q), *table, *pairs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, keys, values, bias, tables, ctx.lines, ctx.scale, angles, _keep = inputs
    out, lse, turned = output
    ctx.ranges, ctx.hidden = len(keys), len(tables)
    ctx.mark_non_differentiable(turned)
    ctx.save_for_backward(turned if angles else q, bias, out, lse, *keys, *values, *tables, *angles)
    ctx.set_materialize_grads(False)  # most callers drop the log-sum-exp


def _differentiate(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    q, bias, out, lse, *held = ctx.saved_tensors
    keys, values, rest = held[: ctx.ranges], held[ctx.ranges : 2 * ctx.ranges], held[2 * ctx.ranges :]
    tables, angles = rest[: ctx.hidden], rest[ctx.hidden :]
    grad = torch.zeros_like(out) if grad is None else grad
    wanted = [ctx.needs_input_grad[3], *(k or v for k, v in zip(*ctx.needs_input_grad[1:3], strict=True))]
    dq, *rest = _attend_backward(
        grad, grad_lse, q, keys, values, bias, tables, out, lse, ctx.lines, ctx.scale, wanted, angles
    )
    table = rest.pop(0) if wanted[0] else None
    pairs = iter(zip(rest[::2], rest[1::2], strict=True))
    each = [next(pairs) if want else (None, None) for want in wanted[1:]]
    nothing = [None] * len(tables), None, None, [None] * len(angles), None
    return dq, [dk for dk, _dv in each], [dv for _dk, dv in each], table, *nothing


_attend.register_autograd(_differentiate, setup_context=_save)


@formula(torch.ops.ctxbench.attend)
def _attend_flops(
    q: Any, keys: Any, values: Any, bias: Any, tables: Any, lines: list[int], scale: float, *rest: Any, **_: Any
) -> int:
    """Two products over the visible pairs; tiles out of sight are skipped. Keys hidden by ``since`` are multiplied."""
    return sum(_range_flops(q, k, one) for k, one in zip(keys, _shown(lines), strict=True))


@formula(torch.ops.ctxbench.attend_backward)
def _attend_backward_flops(
    grad: Any, grad_lse: Any, q: Any, keys: Any, values: Any, bias: Any, tables: Any, out_: Any, lse: Any,
    lines: list[int], scale: float, wanted: list[bool], *rest: Any, **_: Any,
) -> int:  # fmt: skip
    """Seven products: scores and their gradient in both kernels, then dQ, dK and dV; three where dQ alone is wanted.

    Scores and their gradient once more for a table of biases. In C++ one kernel makes all, from five products.
    """
    once = native(q)
    products = NATIVE_BACKWARD if once else BACKWARD
    return sum(
        int(
            _range_flops(q, k, one)
            * ((products if want else DQ_ALONE) + int(one.bias == TABLE and wanted[0] and not once))
        )
        for k, one, want in zip(keys, _shown(lines), wanted[1:], strict=True)
    )


def _range_flops(q: Any, k: Any, one: Shown) -> int:
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * placed_pairs(q.shape[2], k.shape[2], one.low, one.high))
