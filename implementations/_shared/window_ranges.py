"""Windowed and global attention by the flash kernels: band, prefix and scattered globals are ranges of one softmax.

The band is two lines, the prefix a range that all see. A scattered global is a key of a third range, which the causal
form shows from its own position on, and is hidden in the band. Dilation is the same inside each residue class of
positions, which is a strided view. Global rows are a launch of their own, with their own keys.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered

NEVER = 2**30  # a position that no query reaches


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, scattered: Scattered, pattern: Pattern,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``, stored as ``[B, T, H, D]``.

    ``line: [H, Pattern.steps(S)]``, where there are no globals: what is added to the scores, by steps of the band.
    """
    T, S = q.shape[2], k.shape[2]
    own = scattered.rows(T, S)
    G = rows.q.shape[2] - len(own)
    local = _local(q[:, :, G:], k, v, scattered, pattern, by_distance(line, S, pattern))
    if not rows.q.shape[2]:
        return local
    head = everywhere(rows, G, pattern.causal)
    result = torch.cat([x.transpose(1, 2) for x in (head[:, :, :G], local)], dim=1).transpose(1, 2)
    return result.index_copy(2, torch.tensor(own, device=q.device), head[:, :, G:]) if own else result


def everywhere(rows: GlobalRows, prefix: int, causal: bool) -> torch.Tensor:
    """Global rows over all tokens; in the causal form up to their own. The first ``prefix`` rows are consecutive."""
    q, k, v, at = rows
    if not causal:
        return decode(q, k, v, causal=False)[0] if is_decoding(q, k, v) else attend_ranges(q, [Range(k, v)])[0]
    parts = [attend_ranges(q[:, :, :prefix], [Range(k, v, high=Line(base=1))], offset=at[0])[0]] if prefix else []
    for which in range(prefix, len(at)):
        seen = slice(at[which] + 1)
        parts.append(attend_ranges(q[:, :, which : which + 1], [Range(k[:, :, seen], v[:, :, seen])])[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def by_distance(line: torch.Tensor | None, S: int, pattern: Pattern) -> torch.Tensor | None:
    """Biases by steps from a key back to its query, from the line of those from the query back."""
    if line is None:
        return None
    left, right = (min(side, S - 1) for side in (pattern.left, pattern.right))
    farthest = max(left, right)
    return torch.nn.functional.pad(line.flip(1), (farthest - left, farthest - right))


def _local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scattered: Scattered, pattern: Pattern,
    table: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """All queries after the prefix, the last of which stands at the last key."""
    T, prefix, step = q.shape[2], min(pattern.num_global, k.shape[2]), pattern.dilation
    first = k.shape[2] - T - prefix  # the first query among the keys of the band
    shared = [Range(k[:, :, :prefix], v[:, :, :prefix])] if prefix else []
    hidden = None
    if scattered.at:
        places = torch.tensor(scattered.at, device=q.device, dtype=torch.int32) - prefix
        shared.append(Range(scattered.k, scattered.v, since=places if pattern.causal else None))
        hidden = torch.zeros(k.shape[2] - prefix, device=q.device, dtype=torch.int32)
        hidden[[place - prefix for place in scattered.at if place >= prefix]] = NEVER
    k, v = k[:, :, prefix:], v[:, :, prefix:]
    if step == 1:
        return _band(q, k, v, first, shared, hidden, pattern, table)
    out = torch.empty(q.shape[0], T, q.shape[1], q.shape[3], device=q.device, dtype=q.dtype).transpose(1, 2)
    for rest in range(min(step, T)):
        own = slice((first + rest) % step, None, step)  # keys of the residue class of every step-th query from rest on
        beside = [one._replace(since=_counted(one.since, first + rest, step)) for one in shared]
        mixed = _band(q[:, :, rest::step], k[:, :, own], v[:, :, own], (first + rest) // step, beside,
                      None if hidden is None else hidden[own], pattern, table)  # fmt: skip
        out[:, :, rest::step] = mixed
    return out


def _counted(since: torch.Tensor | None, first: int, step: int) -> torch.Tensor | None:
    """Positions, counted in steps of the class of ``first``: the first of it that is no earlier."""
    return None if since is None else -((first % step - since) // step)


def _band(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, shared: list[Range], hidden: torch.Tensor | None,
    pattern: Pattern, table: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Queries from key ``first`` on, one a key."""
    low, high = Line(base=-pattern.left), Line(base=1 + pattern.right)
    band = Range(k, v, low, high, start=0, since=hidden)
    return attend_ranges(q, [band, *shared], offset=first, bias=table)[0]
