"""A segment's step, recorded once and replayed over all whole segments: what makes short segments slow is launches.

A method whose segments follow one another does the same thing again and again, with a state of fixed shapes. Here the
tensors it reads and writes have fixed places: two sets of buffers, each with room for a segment and for a state. One
recording steps from the first set into the second, another one back, so that nothing is read where it is written, and
a sequence of any length is a series of replays between copies of its segments in and of their outputs out.

A recording repeats operators on places: no Python runs in it. So everything else must be constant: the numbers in a
state may only count tokens, and weights may change their values but not their places (a recording is made anew then).
What does not fit is computed as ever: tokens before and after whole segments, and segments while the state grows.

B batch, T tokens, S tokens a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ctxbench.method import Output

Action = Callable[[], None]
WARM = 2  # runs before a recording: kernels are compiled, libraries choose theirs and allocate


def record(action: Action, device: torch.device) -> Action:
    """What repeats ``action`` on the tensors it used; without a CUDA device, ``action`` itself."""
    if device.type != "cuda":
        return action
    current = torch.cuda.current_stream(device)
    aside = torch.cuda.Stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            action()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Not on the stream that PyTorch takes by itself: that one is of whichever device recorded first.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=aside):
        action()
    return graph.replay  # type: ignore[no-any-return]


class Buffers(NamedTuple):
    """Fixed places of one step: its segment and its output, ``[B, S, d_model]``, and the tensors of its state."""

    x: torch.Tensor
    y: torch.Tensor
    state: list[torch.Tensor]


class Recording:
    """Two recorded steps of ``step(x, state) -> (y, state)``, from one set of buffers into the other and back.

    ``x`` and ``state`` are examples, of whose shapes all others will be. ``weights`` are kept, so that no other tensor
    takes the places the recording reads.
    """

    def __init__(
        self, step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]], x: torch.Tensor, state: Any,
        weights: list[torch.Tensor],
    ):  # fmt: skip
        leaves, self.structure = pytree.tree_flatten(state)
        self.step, self.leaves, self.weights = step, leaves, weights
        self.moved = [0] * len(leaves)  # what one step adds to the numbers in a state
        self.sets = [Buffers(_place(x), _place(x), [_place(leaf) for leaf in _tensors(leaves)]) for _ in range(2)]
        self.replays = [record(partial(self._act, turn), x.device) for turn in range(2)]

    def run(self, x: torch.Tensor, y: torch.Tensor, state: Any) -> Any:
        """The state after whole segments ``x: [B, n S, d_model]``, copied; outputs go into ``y``, n is at least 1."""
        leaves = pytree.tree_leaves(state)
        for place, value in zip(self.sets[0].state, _tensors(leaves), strict=True):
            place.copy_(value)
        count, size = 0, self.sets[0].x.shape[1]
        for part, out in zip(x.split(size, dim=1), y.split(size, dim=1), strict=True):
            source = self.sets[count % 2]
            source.x.copy_(part)
            self.replays[count % 2]()
            out.copy_(source.y)
            count += 1
        results = iter(self.sets[count % 2].state)
        after = [
            next(results).clone() if isinstance(leaf, torch.Tensor) else leaf + count * moved
            for leaf, moved in zip(leaves, self.moved, strict=True)
        ]
        return pytree.tree_unflatten(after, self.structure)

    def _act(self, turn: int) -> None:
        source, target = self.sets[turn], self.sets[1 - turn]
        places = iter(source.state)
        before = [next(places) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        y, state = self.step(source.x, pytree.tree_unflatten(before, self.structure))
        after = pytree.tree_leaves(state)
        self.moved = [
            0 if isinstance(one, torch.Tensor) else two - one for one, two in zip(self.leaves, after, strict=True)
        ]
        source.y.copy_(y)
        for place, value in zip(target.state, _tensors(after), strict=True):
            place.copy_(value)


class Replaying(nn.Module):
    """A stack whose whole segments are replayed; comes before the stack's own class, see :func:`replaying`.

    A segment is computed as ever once for each set of shapes of a state, which shows whether the state keeps them.
    """

    segment: int

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._keeps: dict[Any, bool] = {}  # shapes of a state -> whether a whole segment leaves them as they are
        self._made: tuple[Any, Recording] | None = None

    def forward(self, x: torch.Tensor, state: Any = None) -> Output:
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(
                "a recorded step gives no gradients: call it under torch.no_grad(), or train with another impl"
            )
        with torch.no_grad():
            return self._forward(x, state)

    def _forward(self, x: torch.Tensor, state: Any) -> Output:
        carried = self.init_state(x.shape[0]) if state is None else state  # type: ignore[operator]
        y, at = torch.empty_like(x), 0
        while at < x.shape[1]:
            fill = tokens(carried) % self.segment
            end, shapes = min(at + self.segment - fill, x.shape[1]), _shapes(carried)
            whole = end - at == self.segment
            if whole and self._keeps.get(shapes):
                end = at + (x.shape[1] - at) // self.segment * self.segment
                recording = self._recording(x[:, at : at + self.segment], carried, shapes)
                carried = recording.run(x[:, at:end], y[:, at:end], carried)
            else:
                y[:, at:end], carried = super().forward(x[:, at:end], carried)
                if whole:
                    self._keeps[shapes] = _shapes(carried) == shapes
            at = end
        return Output(y, None if state is None else carried)

    def _recording(self, x: torch.Tensor, state: Any, shapes: Any) -> Recording:
        """The last one, or a new one where shapes differ or a weight lies elsewhere than it did."""
        weights = [part.detach() for part in (*self.parameters(), *self.buffers())]
        places = [part.untyped_storage()._cdata for part in weights]
        key = (x.shape, x.dtype, x.device, shapes, places, torch.is_inference_mode_enabled())
        if self._made is None or self._made[0] != key:
            self._made = None  # frees the buffers of the old one first
            self._made = (key, Recording(super().forward, x, state, weights))
        return self._made[1]


def replaying(stack: type[nn.Module], segment: int) -> type[nn.Module]:
    """The class ``stack``, with the same weights, whose whole segments of ``segment`` tokens are replayed.

    ``stack`` continues from a state, whose first number is how many tokens came before; after a while, states before
    whole segments all have the same shapes.
    """
    return type(f"Replaying{stack.__name__}", (Replaying, stack), {"segment": segment, "__doc__": stack.__doc__})


def tokens(state: Any) -> int:
    """How many tokens a state has seen: the first number in it."""
    return next(leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, int))


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _place(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _shapes(state: Any) -> Any:
    return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in _tensors(pytree.tree_leaves(state)))
