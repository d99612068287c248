"""Run the pooling kernels against float64 and print the relative errors as JSON lines; see ``flash_parity``.

On the CUDA device or, where TRITON_INTERPRET is 1, in Triton's interpreter, where the bytes of every launch are held
against their closed form.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from flash_parity import relative
from interpreted import INTERPRETED, Counted, check_integers, mine, spare

from ctxbench.implementations._shared.pooling import pooled, raised
from ctxbench.workload import DTYPES

# Tokens, channels, pool, levels. Shorter than one cell, one off a cell, more than a tile, more channels than a tile.
MEANS = [
    (1, 16, 4, 2), (3, 16, 4, 2), (15, 16, 4, 2), (16, 20, 4, 2), (77, 16, 4, 2), (133, 24, 4, 3), (130, 150, 2, 1),
    (83, 16, 3, 3), (9, 5, 3, 2), (71, 16, 5, 2), (40, 16, 37, 1), (300, 5, 2, 9),
]  # fmt: skip
SUMS = [(1, 0, 2), (1, 1, 2), (7, 1, 3), (50, 2, 4), (101, 3, 4), (66, 0, 5), (9, 5, 16)]  # tokens, shift, pool


def means(x: torch.Tensor, pool: int, levels: int, ragged: bool) -> list[torch.Tensor]:
    """Cells of each level of ``[B, H, T, D]``, from their definition."""
    T, found = x.shape[2], []
    for span in (pool**level for level in range(1, levels + 1)):
        whole = [x[:, :, end - span : end].mean(2) for end in range(span, T + 1, span)]
        if ragged and T % span:
            whole.append(x[:, :, len(whole) * span :].mean(2))
        found.append(torch.stack(whole, 2) if whole else x[:, :, :0])
    return found


def errors(outputs: Any, exact: Any, leaves: Any, wide: Any) -> dict[str, float]:
    """Of outputs, and of the gradients of all of them."""
    outputs, exact = ([x for x in all if x.numel()] for all in (outputs, exact))
    grads = [torch.randn_like(x) for x in outputs]
    mine = torch.autograd.grad(outputs, leaves, grads)
    theirs = torch.autograd.grad(exact, wide, [grad.double() for grad in grads])
    pairs = {"out": zip(outputs, exact, strict=True), "gradient": zip(mine, theirs, strict=True)}
    return {name: max(relative(*pair) for pair in each) for name, each in pairs.items()}


def of_means(dtype: torch.dtype, T: int, D: int, pool: int, levels: int, ragged: bool) -> dict[str, float]:
    k, v = ((torch.randn(2, T, 3, D)).transpose(1, 2).to(dtype).requires_grad_() for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (k, v)]
    sources, levels_found = pooled([k, v], pool, levels, ragged)
    exact = [torch.stack(pair) for pair in zip(*(means(x, pool, levels, ragged) for x in wide), strict=True)]
    assert [x.shape for x in levels_found] == [x.shape for x in exact]
    return errors([*sources, *levels_found], [*(1 * x for x in wide), *exact], [k, v], wide)


def of_sums(dtype: torch.dtype, T: int, shift: int, pool: int) -> dict[str, float]:
    rows = (T - 1 + shift) // pool + 2  # the last one is read by nobody
    fine, coarse = (torch.randn(2, count, 40).to(dtype).requires_grad_() for count in (T, rows))
    wide = [x.detach().double().requires_grad_() for x in (fine, coarse)]
    expected = wide[0] + wide[1][:, (torch.arange(T) + shift).div(pool, rounding_mode="floor")]
    return errors([raised(fine, coarse, pool, shift)], [expected], [fine, coarse], wide)


def main() -> None:
    spare()
    counted = Counted()
    if not INTERPRETED:
        torch.set_default_device("cuda")
    for dtype in ("fp32", "fp16") if INTERPRETED else ("fp32", "fp16", "bf16"):
        check_integers(dtype == "fp32")
        torch.manual_seed(0)
        some = slice(3, 6) if INTERPRETED and dtype == "fp16" else slice(None)
        for case in MEANS[some]:
            for ragged in (False, True):
                if not mine():
                    continue
                print(json.dumps([["means", *case, ragged], dtype, of_means(DTYPES[dtype], *case, ragged)]))
        for case in SUMS[some]:
            if not mine():
                continue
            print(json.dumps([["sums", *case], dtype, of_sums(DTYPES[dtype], *case)]))
    if INTERPRETED:
        counted.all_of("gather", "spread")


if __name__ == "__main__":
    main()
