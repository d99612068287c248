"""The largest values of every row, found in a tournament: exact, and several times as fast as ``topk`` of a long row.

A column belongs to a group of GROUP columns that stand evenly apart, so the largest value of every group is a maximum
of vectors. The K largest values lie in the K groups with the largest ones: of a value outside of them, each of these K
groups holds one at least as large. So each round is a ``topk`` of K GROUP values, and the first one of as few.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ctxbench.implementations._shared.tournament import GROUP, padded


def best(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest of each row of ``[n, columns]`` in any order, and their columns: ``[n, count]`` both.

    Rows of other than a padded width are copied first.
    """
    missing = padded(values.shape[1], count) - values.shape[1]
    least = float("-inf") if values.is_floating_point() else torch.iinfo(values.dtype).min
    return _best(pad(values, (0, missing), value=least) if missing else values, count)


def _best(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a padded width."""
    width = values.shape[1]
    if width <= GROUP * count:
        found, columns = values.topk(count, dim=1, sorted=False)
        return found, columns
    _, groups = _best(values.unflatten(1, (GROUP, -1)).amax(dim=1), count)
    members = torch.arange(0, width, width // GROUP, device=values.device)
    columns = (groups.unsqueeze(1) + members[:, None]).flatten(1)  # [n, GROUP * count]
    found, place = values.gather(1, columns).topk(count, dim=1, sorted=False)
    return found, columns.gather(1, place)
