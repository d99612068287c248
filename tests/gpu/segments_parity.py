"""Hold the triton impls of methods with segments to laws of the conformance kit; JSON lines of what each law answered.

``python segments_parity.py [FORM ...]``; without arguments all forms. On the CUDA device with the shipped tiles, or,
where TRITON_INTERPRET is 1, in Triton's interpreter with small ones and in float32 alone; see ``flash_parity``. Every
answer but ``held`` is a failure.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

from interpreted import INTERPRETED, mine, spare

from ctxbench.implementations._shared import decode, decode_table, ranges, relative_fused, relative_table
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.method import Dims, Method
from ctxbench.registry import discover
from ctxbench.testing import LAWS
from ctxbench.testing.case import Case

TILES = dict.fromkeys(("forward", "turned", "dq", "dkv", "table"), Config(16, 16, 4, 1))
FORMS = {  # method, position, layers, parameters, lengths
    "rmt": ("rmt", "none", 2, {"num_memory": 3, "segment_len": 14}, (31,)),
    "rmt, memory tokens that see each other": (
        "rmt", "rope", 1, {"num_memory": 3, "segment_len": 20, "variant": "xl"}, (1, 31)),
    "rmt, a table of distances": ("rmt", "t5", 1, {"num_memory": 3, "segment_len": 20, "variant": "xl"}, (31,)),
    "rmt, slopes": ("rmt", "alibi", 1, {"num_memory": 2, "segment_len": 17}, (20,)),
    "rmt, gradients cut": (
        "rmt", "none", 1, {"num_memory": 1, "segment_len": 7, "variant": "xl", "bptt_depth": 0}, (21,)),
    "block_state": ("block_state", "rope_yarn", 1, {"num_states": 2, "block_len": 23}, (1, 49)),
    "block_state, one state a layer": ("block_state", "t5", 2, {"block_len": 9, "variant": "layer"}, (19,)),
    "segment_recurrent": ("segment_recurrent", "none", 1, {"memory_len": 18, "segment_len": 17}, (1, 39)),
    "segment_recurrent, long memory": (
        "segment_recurrent", "rope", 1, {"memory_len": 21, "segment_len": 6}, (25,)),
    "segment_recurrent, a table of distances": (
        "segment_recurrent", "t5", 1, {"memory_len": 18, "segment_len": 17}, (39,)),
    "segment_recurrent, slopes": ("segment_recurrent", "alibi", 1, {"memory_len": 9, "segment_len": 6}, (20,)),
    "block_recurrent": ("block_recurrent", "t5", 1, {"window": 19, "num_states": 5}, (1, 41)),
    "block_recurrent, slopes": ("block_recurrent", "alibi", 1, {"window": 7, "num_states": 3}, (16,)),
    "block_recurrent, lstm": (
        "block_recurrent", "none", 2, {"window": 5, "num_states": 18, "gate": "lstm"}, (12,)),
    "melodi": (
        "melodi", "t5", 1, {"window": 15, "summary_tokens": 3, "short_slots": 3, "long_slots": 7,
                            "long_per_window": 3}, (1, 38, 53)),
    "melodi, slopes": (
        "melodi", "alibi", 1, {"window": 7, "summary_tokens": 2, "short_slots": 3, "long_slots": 4,
                               "long_per_window": 2}, (17,)),
    "melodi, rotated": (
        "melodi", "rope_ntk", 1, {"window": 7, "summary_tokens": 2, "short_slots": 3, "long_slots": 4,
                                  "long_per_window": 2}, (1, 17)),
    "melodi, no memory": (
        "melodi", "rope", 1, {"window": 18, "summary_tokens": 0, "short_slots": 0, "long_slots": 0}, (40,)),
    "transformer_xl": ("transformer_xl", "transformer_xl", 1, {"segment_len": 11, "mem_len": 17}, (1, 37)),
    "transformer_xl, zeros that are seen": (
        "transformer_xl", "transformer_xl", 1, {"segment_len": 9, "mem_len": 7, "start": "zeros"}, (20,)),
    "transformer_xl, as many keys for all": (
        "transformer_xl", "transformer_xl", 1,
        {"segment_len": 9, "mem_len": 13, "same_length": True, "clamp_len": 8}, (29,)),
    "compressive_transformer": (
        "compressive_transformer", "transformer_xl", 1,
        {"segment_len": 8, "mem_len": 6, "compressed_len": 5, "rate": 2, "auxiliary": "none"}, (1, 43)),
    "compressive_transformer, mean": (
        "compressive_transformer", "transformer_xl", 1,
        {"segment_len": 6, "mem_len": 3, "compressed_len": 20, "rate": 3, "compression": "mean"}, (31,)),
    "hierarchical": ("hierarchical", "none", 1, {"window": 9, "pool": 3, "levels": 3, "cells": 4}, (1, 50)),
    "hierarchical, all cells": (
        "hierarchical", "rope", 1, {"form": "causal_full", "window": 5, "pool": 2, "levels": 4}, (39,)),
    "hierarchical, disjoint": (
        "hierarchical", "none", 1, {"window": 5, "pool": 2, "levels": 3, "cells": 3, "disjoint": True}, (41,)),
    "hierarchical, seed": ("hierarchical", "none", 1, {"form": "seed", "pool": 2, "levels": 3}, (33,)),
    "pyramid": ("pyramid", "rope", 3, {"levels": 3}, (1, 43)),
    "pyramid, pooled queries": ("pyramid", "rope", 2, {"levels": 2, "pool": 3, "pooled_queries": True}, (1, 35)),
    "pyramid, both directions": ("pyramid", "none", 2, {"levels": 2, "pooled_queries": True}, (29,)),
    "dense, relative": ("dense", "transformer_xl", 1, {}, (1, 37)),
    "dense, relative, both directions": ("dense", "transformer_xl", 1, {}, (29,)),
    "diagonals": ("segment_recurrent", "rope", 3, {"memory_len": 3, "segment_len": 5}, (23,)),
    "diagonals, a table of distances": ("segment_recurrent", "t5", 2, {"memory_len": 3, "segment_len": 5}, (18,)),
    "diagonals of windows": (
        "melodi", "rope", 4,
        {"window": 5, "summary_tokens": 2, "short_slots": 3, "long_slots": 3, "long_per_window": 2},
        (23,)),
    "diagonals of states": ("block_state", "rope", 3, {"block_len": 5, "variant": "layer"}, (18,)),
}  # fmt: skip
BIDIRECTIONAL = ("dense, relative, both directions", "hierarchical, seed", "pyramid, both directions")
IMPLS = {form: "diagonal_triton" for form in FORMS if form.startswith("diagonals")}
AGREEMENT_ALONE = (
    "rmt, gradients cut", "rmt, slopes", "block_state, one state a layer", "segment_recurrent, slopes",
    "melodi, slopes",
    "transformer_xl, zeros that are seen", "compressive_transformer, mean", "hierarchical, all cells", *BIDIRECTIONAL,
    *IMPLS,
)  # fmt: skip


@dataclass(frozen=True)
class Chosen(Case):
    """A case at lengths of our choice, because the interpreter takes milliseconds a tile."""

    chosen: tuple[int, ...] = ()

    def lengths(self, mode: str = "forward", most: int = 12) -> list[int]:
        return list(self.chosen)


def here(method: Method, impl: str) -> Method:
    """The method with its reference and with an impl that also runs in the interpreter, in float32."""
    chosen = replace(method.impl(impl), devices=("cpu", "cuda"), dtypes=("fp32",) if INTERPRETED else ("fp32", "bf16"))
    return replace(method, impls=(method.impl("reference"), chosen), picks=())  # picks name the others too


def main(wanted: list[str]) -> None:
    spare()
    if INTERPRETED:
        ranges.config = lambda kernel, *_: TILES[kernel]
        relative_fused.tile = lambda *_: relative_table.Tile(16, 4, 1)
        decode.config = lambda *_: decode_table.Config(16, 16, 4, 1)
    for form in filter(lambda _: mine(), wanted or FORMS):
        name, position, layers, values, lengths = FORMS[form]
        impl = IMPLS.get(form, "triton")
        method = here(discover()[name], impl)
        dims = Dims(
            seq_len=lengths[-1],
            causal=form not in BIDIRECTIONAL,
            batch_size=1,
            d_model=32,
            num_heads=2,
            num_layers=layers,
            d_ff=0,
            position=position,
        )
        case = Chosen(
            method, impl, method.params().replace(**values), dims, method.modes, "cpu" if INTERPRETED else "cuda",
            chosen=lengths,
        )  # fmt: skip
        others = () if form in AGREEMENT_ALONE else ("streaming_equals_whole", "decode_continues")
        decoded = not method.impl(impl).modes or "decode" in method.impl(impl).modes
        for law in ("agreement", *(law for law in others if decoded or law != "decode_continues")):
            finding = LAWS[law](case)
            print(json.dumps([form, law, finding.status, finding.message]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
