"""The long-term memory's queue while windows are pushed into it, without a copy of it for every window."""

from __future__ import annotations

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class Queue:
    """Keys and values ``[B, H, rows, D]``, first in, first out, at most ``most``; a call pushes ``pushes`` times.

    Joined anew for every window they would be read and written once more than recalling reads them. Here new rows are
    written behind the old ones, where there is room for as many again; when it is used up, the last rows go to the
    front. What the push before gave stays as it is. Where gradients may be asked for, which keep what recalling read,
    and for a push alone they are joined.
    """

    def __init__(self, most: int, pushes: int):
        self.most, self.pushes, self.end = most, pushes, 0
        self.places: list[torch.Tensor] = []

    def push(self, old: Pair, new: Pair) -> Pair:
        """The last ``most`` rows of ``old``, which the push before gave, and ``new``."""
        new = tuple(part[:, :, max(0, part.shape[2] - self.most) :] for part in new)  # type: ignore[assignment]
        more = new[0].shape[2]
        kept = min(old[0].shape[2], self.most - more)
        before = [part[:, :, part.shape[2] - kept :] for part in old]
        if torch.is_grad_enabled() or self.pushes == 1:
            return tuple(torch.cat(both, dim=2) for both in zip(before, new, strict=True))  # type: ignore[return-value]
        room = min(kept + self.pushes * more, 2 * self.most + more)
        if not self.places or self.end + more > self.places[0].shape[2]:
            self.places = self.places or [part.new_empty(*part.shape[:2], room, part.shape[3]) for part in new]
            self._write(0, before)
        self._write(self.end, new)
        return tuple(place[:, :, max(0, self.end - self.most) : self.end] for place in self.places)  # type: ignore[return-value]

    def _write(self, first: int, parts: list[torch.Tensor] | Pair) -> None:
        self.end = first + parts[0].shape[2]
        for place, part in zip(self.places, parts, strict=True):
            place[:, :, first : self.end] = part
