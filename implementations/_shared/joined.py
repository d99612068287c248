"""Outputs of pieces that follow one another, as one tensor."""

from __future__ import annotations

import torch


class Joined:
    """Pieces ``[B, n, d]``, ``length`` rows in all: each is copied to its place at once, and none outlives its turn.

    Held back until the end, all outputs would be there twice. Where gradients may be asked for they are: backward keeps
    the pieces anyway, and a write in place would cost it a copy of the whole for every piece.
    """

    def __init__(self, length: int):
        self.length, self.filled = length, 0
        self.held: list[torch.Tensor] = []
        self.whole: torch.Tensor | None = None

    def add(self, piece: torch.Tensor) -> None:
        """The next rows; a piece that is the whole is not copied."""
        if torch.is_grad_enabled() or piece.shape[1] == self.length:
            self.held.append(piece)
            return
        if self.whole is None:
            self.whole = piece.new_empty(piece.shape[0], self.length, piece.shape[2])
        first, self.filled = self.filled, self.filled + piece.shape[1]
        self.whole[:, first : self.filled] = piece

    def result(self) -> torch.Tensor:
        """All rows, ``[B, length, d]``."""
        if self.whole is not None:
            return self.whole
        return self.held[0] if len(self.held) == 1 else torch.cat(self.held, dim=1)
