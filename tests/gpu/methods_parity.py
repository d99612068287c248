"""Run what methods put at their seam for Triton against their references in float64, as JSON lines of relative errors.

All cases, or those whose names begin with an argument. On the CUDA device, or, where TRITON_INTERPRET is 1, in Triton's
interpreter with small tiles; see ``flash_parity``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from flash_parity import TILES, relative
from interpreted import INTERPRETED, Counted, mine, spare

from ctxbench.implementations import bigbird, longformer, longlora
from ctxbench.implementations._shared import decode, lists
from ctxbench.implementations._shared import ranges as kernels
from ctxbench.implementations._shared.decode_table import Config as Few
from ctxbench.method import Dims, Method, Params, load
from ctxbench.workload import DTYPES

SMALL = Dims(seq_len=45, d_model=64, num_heads=4, d_ff=0, causal=True)
CASES: dict[str, tuple[Method, dict[str, Any], dict[str, Any]]] = {  # method, parameters, dims
    "longlora": (longlora.METHOD, {"group": 12}, {}),
    "longlora, a part": (longlora.METHOD, {"group": 34}, {"position": "rope"}),
    "longlora, circle": (longlora.METHOD, {"group": 20, "wrap": True}, {"causal": False}),
    "longlora, table": (longlora.METHOD, {"group": 34}, {"position": "t5"}),
    "longlora, slopes in a circle": (
        longlora.METHOD, {"group": 20, "wrap": True}, {"position": "alibi", "causal": False}),
    "longlora, one head": (longlora.METHOD, {"group": 8}, {"num_heads": 1, "d_model": 16}),
    "longlora, one token": (longlora.METHOD, {}, {"seq_len": 1}),
    "longformer": (longformer.METHOD, {"window": 12, "num_global": 3}, {}),
    "longformer, both sides": (longformer.METHOD, {"window": 12, "num_global": 3}, {"causal": False}),
    "longformer, scattered": (
        longformer.METHOD, {"window": 9, "num_global": 2, "scattered": "7+30+31", "separate_global": False}, {}),
    "longformer, scattered both sides": (
        longformer.METHOD, {"window": 9, "num_global": 2, "scattered": "7+30"}, {"causal": False, "position": "rope"}),
    "longformer, dilated heads": (
        longformer.METHOD,
        {"window": 5, "num_global": 2, "dilation": 3, "dilated_heads": 2, "scattered": "17"}, {}),
    "longformer, slopes": (longformer.METHOD, {"window": 10, "num_global": 0}, {"position": "alibi"}),
    "longformer, table": (
        longformer.METHOD, {"window": 10, "num_global": 0, "dilation": 2}, {"position": "t5", "causal": False}),
    "longformer, three tokens": (longformer.METHOD, {"window": 8, "num_global": 2}, {"seq_len": 3}),
    "bigbird": (
        bigbird.METHOD, {"block_size": 7, "num_random": 1},
        {"causal": False, "seq_len": 67, "position": "rope_yarn"}),
    "bigbird, larger than a tile": (
        bigbird.METHOD, {"block_size": 20, "num_random": 1}, {"causal": False, "seq_len": 105, "position": "alibi"}),
    "bigbird, table": (
        bigbird.METHOD, {"block_size": 20, "num_random": 1}, {"causal": False, "seq_len": 207, "num_heads": 1,
        "d_model": 16, "position": "t5"}),
    "bigbird, wide heads": (
        bigbird.METHOD, {"block_size": 20, "num_random": 1}, {"causal": False, "seq_len": 90, "num_heads": 1,
        "d_model": 136, "position": "t5"}),
    "bigbird, three blocks": (
        bigbird.METHOD, {"block_size": 16, "num_random": 1}, {"causal": False, "position": "rope"}),
    "bigbird, one block": (bigbird.METHOD, {"block_size": 64}, {"causal": False}),
    "bigbird, external": (
        bigbird.METHOD, {"form": "etc", "num_global": 6, "local_radius": 5}, {"causal": False}),
}  # fmt: skip


def parity(method: Method, params: Params, dims: Dims, dtype: torch.dtype) -> dict[str, float]:
    """Outputs of a layer, and gradients of its input and parameters, of one call and of a stream where there is one."""
    torch.manual_seed(0)
    device = torch.get_default_device()
    fast, exact = (
        load(method.build)(dims, params, impl, device, of)
        for impl, of in (("triton", dtype), (method.oracle, torch.float64))
    )
    exact.load_state_dict(fast.state_dict())
    x = torch.randn(2, dims.seq_len, dims.d_model).to(dtype)
    inputs = x.requires_grad_(), x.detach().double().requires_grad_()
    results = [module(given).y for module, given in zip((fast, exact), inputs, strict=True)]
    grad = torch.randn_like(results[0])
    names = ["x", *(name for name, _ in fast.named_parameters())]
    received, expected = (
        dict(zip(names, torch.autograd.grad(y, [given, *module.parameters()], grad.to(y.dtype)), strict=True))
        for module, given, y in zip((fast, exact), inputs, results, strict=True)
    )
    errors = {"y": relative(*results)}
    errors |= {f"d{name}": relative(received[name], expected[name]) for name in names if not vanishes(name, dims)}
    if "stream" in method.modes and dims.causal:
        errors["stream"] = relative(streamed(fast, x.detach()), results[1])
    return errors


def vanishes(name: str, dims: Dims) -> bool:
    """Whether a gradient is nothing but rounding: a bias of keys moves all scores of a query alike, one key is all."""
    return name.endswith(("k.bias", "key.bias")) or (dims.seq_len == 1 and (".q." in name or ".k." in name))


@torch.no_grad()
def streamed(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same tokens in calls of 16, and the last few one by one."""
    state, outputs, at = module.init_state(x.shape[0]), [], 0
    while at < x.shape[1]:
        size = 16 if at + 20 < x.shape[1] else 1
        out = module(x[:, at : at + size], state)
        outputs.append(out.y)
        state, at = out.state, at + size
    return torch.cat(outputs, dim=1)


def main() -> None:
    spare()
    counted = Counted()
    if INTERPRETED:
        kernels.config = lambda kernel, *_: TILES[kernel]
        lists.listed_config = lambda kernel, *_: TILES[kernel]._replace(rows=16, columns=16)
        decode.config = lambda *_: Few(16, 16, 4, 1)
    else:
        torch.set_default_device("cuda")
    for name, (method, params, dims) in CASES.items():
        if not name.startswith(tuple(sys.argv[1:]) or ""):
            continue
        for dtype in ("fp32",) if INTERPRETED else ("fp32", "bf16"):
            if not mine():
                continue
            errors = parity(method, method.params(**params), SMALL.replace(**dims), DTYPES[dtype])
            print(json.dumps([name, dtype, errors]))
    if INTERPRETED:
        counted.all_of("flash.forward", "flash.dq", "flash.dkv")


if __name__ == "__main__":
    main()
