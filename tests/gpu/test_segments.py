"""Triton and graph impls of methods with segments: the kit's laws in the interpreter, exact counts, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ctxbench.cost import Cost, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Trace, trace
from ctxbench.method import Dims, Method, Params
from ctxbench.registry import discover

FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {  # method, position, parameters
    "rmt": ("rmt", "none", {"num_memory": 3, "segment_len": 40}),
    "rmt xl": ("rmt", "none", {"num_memory": 3, "segment_len": 40, "variant": "xl"}),
    "rmt t5": ("rmt", "t5", {"num_memory": 3, "segment_len": 40}),
    "rmt xl t5": ("rmt", "t5", {"num_memory": 3, "segment_len": 40, "variant": "xl"}),
    "rmt xl alibi": ("rmt", "alibi", {"num_memory": 3, "segment_len": 40, "variant": "xl"}),
    "block_state": ("block_state", "none", {"num_states": 2, "block_len": 50}),
    "block_state t5": ("block_state", "t5", {"num_states": 2, "block_len": 50}),
    "block_state layer": ("block_state", "rope", {"block_len": 50, "variant": "layer", "update": "gru"}),
    "segment_recurrent": ("segment_recurrent", "none", {"memory_len": 30, "segment_len": 40}),
    "segment_recurrent cut": ("segment_recurrent", "rope", {"memory_len": 50, "segment_len": 40, "bptt_depth": 1}),
    "segment_recurrent t5": ("segment_recurrent", "t5", {"memory_len": 30, "segment_len": 40}),
    "segment_recurrent cut alibi": (
        "segment_recurrent",
        "alibi",
        {"memory_len": 50, "segment_len": 40, "bptt_depth": 1},
    ),
    "block_recurrent": ("block_recurrent", "none", {"window": 40, "num_states": 24}),
    "block_recurrent t5": ("block_recurrent", "t5", {"window": 40, "num_states": 8}),
    "block_recurrent alibi": ("block_recurrent", "alibi", {"window": 40, "num_states": 8}),
    "transformer_xl": ("transformer_xl", "transformer_xl", {"segment_len": 40, "mem_len": 70}),
    "transformer_xl zeros": (
        "transformer_xl",
        "transformer_xl",
        {"segment_len": 40, "mem_len": 30, "start": "zeros"},
    ),
    "transformer_xl band": (
        "transformer_xl",
        "transformer_xl",
        {"segment_len": 40, "mem_len": 30, "same_length": True},
    ),
    "compressive": (
        "compressive_transformer",
        "transformer_xl",
        {"segment_len": 40, "mem_len": 40, "compressed_len": 30},
    ),
    "hierarchical": ("hierarchical", "none", {"window": 40, "cells": 9}),
    "hierarchical disjoint": ("hierarchical", "rope", {"window": 12, "cells": 5, "pool": 3, "disjoint": True}),
    "hierarchical full": ("hierarchical", "none", {"form": "causal_full", "window": 20}),
    "pyramid": ("pyramid", "rope", {"levels": 2}),
    "pyramid alone": ("pyramid", "none", {"levels": 2, "pool": 3}),
    "pyramid pooled": ("pyramid", "none", {"levels": 2, "pool": 3, "pooled_queries": True}),
    "dense relative": ("dense", "transformer_xl", {}),
    "melodi": (
        "melodi",
        "none",
        {"window": 40, "summary_tokens": 4, "short_slots": 4, "long_slots": 7, "long_per_window": 3},
    ),
    "melodi t5": (
        "melodi",
        "t5",
        {"window": 40, "summary_tokens": 4, "short_slots": 4, "long_slots": 7, "long_per_window": 3},
    ),
    "melodi rotated": (
        "melodi",
        "rope",
        {"window": 40, "summary_tokens": 4, "short_slots": 4, "long_slots": 7, "long_per_window": 3},
    ),
    "melodi short": ("melodi", "alibi", {"window": 40, "summary_tokens": 0, "short_slots": 3, "long_slots": 0}),
}
LENGTHS = {"forward": (1, 203), "train": (121,), "stream": (203,), "decode": (39, 40)}
# One token would leave a device idle; it goes by their impl `blocked`.
UNDECODED = ("transformer_xl", "compressive_transformer", "hierarchical", "pyramid")
FORMS_AND_MODES = [
    (form, mode) for form, (name, *_) in FORMS.items() for mode in LENGTHS if mode != "decode" or name not in UNDECODED
]
REPLAYED = [form for form, (name, *_) in FORMS.items() if name not in (*UNDECODED, "dense")]


def method_and_params(form: str) -> tuple[Method, Params]:
    method = discover()[FORMS[form][0]]
    return method, method.params().replace(**FORMS[form][2])


def counted_and_formula(form: str, impl: str, mode: str, length: int, **sizes: int) -> tuple[Trace, Cost, Any]:
    (method, params), position = method_and_params(form), FORMS[form][1]
    dims = Dims(**{"seq_len": length, "num_layers": 2, "batch_size": 2, "d_model": 64, "d_ff": 96, **sizes},
                position=position)  # fmt: skip
    traced = trace(method, dims, params, impl, mode, "fp32")
    assert not traced.untraceable, traced.untraceable
    cost = method.cost_of(impl, mode, True, position, params)
    return traced, cost, bindings(dims, params, 4, method.segment_len(params))


@pytest.mark.parametrize(("form", "mode"), FORMS_AND_MODES)
@pytest.mark.usefixtures("for_triton")
def test_formulas_are_what_the_tracer_counts(form: str, mode: str) -> None:
    pytest.importorskip("triton")
    for length in LENGTHS[mode]:
        traced, cost, values = counted_and_formula(form, "triton", mode, length)
        assert evaluate(total(cost.flops), values) == traced.flops, (length, traced.by_op)
        assert not traced.uncounted
        method, params = method_and_params(form)
        reference = method.cost_of("reference", mode, True, FORMS[form][1], params)
        assert evaluate(total(cost.algorithmic), values) == evaluate(total(reference.algorithmic), values)


@pytest.mark.parametrize("form", ["segment_recurrent cut", "segment_recurrent t5", "block_state layer", "melodi"])
@pytest.mark.usefixtures("for_triton")
def test_diagonals_execute_the_visible_pairs_too(form: str) -> None:
    pytest.importorskip("triton")
    traced, cost, values = counted_and_formula(form, "diagonal_triton", "train", 163, num_layers=3)
    assert evaluate(total(cost.flops), values) == traced.flops


@pytest.mark.parametrize("form", REPLAYED)
@pytest.mark.usefixtures("for_triton")
def test_replays_cost_what_a_stream_does(form: str) -> None:
    pytest.importorskip("triton")
    traced, cost, values = counted_and_formula(form, "graph", "forward", 203)
    assert evaluate(total(cost.flops), values) == traced.flops, traced.by_op


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, mode) for form in ("rmt xl", "segment_recurrent") for mode in ("forward", "decode")]
    + [("rmt xl", "train"), ("melodi rotated", "stream"), ("melodi rotated", "decode")]
    + [(form, mode) for form in ("transformer_xl", "compressive") for mode in ("forward", "train", "stream")],
)
@pytest.mark.usefixtures("for_triton")
def test_peaks_are_near_the_tracers(form: str, mode: str) -> None:
    pytest.importorskip("triton")
    sizes = {"batch_size": 1, "d_model": 128, "num_layers": 1, "d_ff": 512}
    traced, cost, values = counted_and_formula(form, "triton", mode, 2048, **sizes)
    assert abs(traced.peak_bytes / evaluate(cost.peak_bytes, values) - 1) <= 0.03


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *itertools.product(("hierarchical", "hierarchical full", "pyramid alone"), ("forward", "train", "stream")),
        ("block_state", "forward"),
        ("melodi rotated", "forward"),
    ],
)
@pytest.mark.usefixtures("for_triton")
def test_peaks_are_the_tracers(form: str, mode: str) -> None:
    pytest.importorskip("triton")
    for length in (77, 203, 1301):
        traced, cost, values = counted_and_formula(form, "triton", mode, length, d_model=64, num_layers=3)
        assert evaluate(cost.peak_bytes, values) == traced.peak_bytes, length


def test_methods_hold_the_laws_in_the_interpreter(program) -> None:
    answers = program("segments_parity.py", interpret=True)
    assert len(answers) == 71
    assert not [answer for answer in answers if answer[2] != "held"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_methods_hold_the_laws_on_the_device(program) -> None:
    answers = program("segments_parity.py", interpret=False)
    assert not [answer for answer in answers if answer[2] != "held"]


@pytest.mark.parametrize(
    ("name", "impl", "changes", "reason"),
    [
        ("rmt", "triton", {}, ""),
        ("rmt", "triton", {"device": "cpu"}, "runs on cuda"),
        ("rmt", "triton", {"dtype": "fp64"}, "not in fp64"),
        ("rmt", "triton", {"position": "t5"}, ""),
        ("rmt", "graph", {"position": "alibi"}, ""),
        ("rmt", "graph", {"seq_len": 1023}, "at least 2 of 512 tokens, received 1023 tokens, which hold 1"),
        ("rmt", "graph", {"mode": "train"}, "has the modes forward, stream"),
        ("rmt", "graph", {"device": "cpu"}, "runs on cuda"),
        ("segment_recurrent", "graph", {"seq_len": 2048}, "after 4 while the state still grows"),
        ("segment_recurrent", "graph", {"seq_len": 3072}, ""),
        ("segment_recurrent", "diagonal_triton", {"position": "t5"}, ""),
        ("segment_recurrent", "graph", {"position": "alibi"}, ""),
        ("melodi", "triton", {"position": "t5"}, ""),
        ("melodi", "diagonal_triton", {"position": "t5"}, "scales t5's bias by itself"),
        (
            "melodi",
            "diagonal_triton",
            {"batch_size": 2000, "num_layers": 9},
            "at most 65535 heads in a batch, received 72000",
        ),
        ("segment_recurrent", "diagonal_triton", {"batch_size": 2000, "num_layers": 9}, "received 72000"),
        ("segment_recurrent", "triton", {"batch_size": 2000, "num_layers": 9}, ""),
        ("melodi", "graph", {"position": "rope"}, "after 128 while"),
        ("block_recurrent", "triton", {"position": "alibi"}, ""),
        ("block_recurrent", "graph", {}, ""),
        ("block_state", "triton", {"position": "t5"}, ""),
        ("block_state", "diagonal_triton", {"position": "t5"}, "takes the positions none"),
    ],
)
def test_support_says_why_not(monkeypatch, name: str, impl: str, changes: dict[str, Any], reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    method = discover()[name]
    asked = {"mode": "forward", "device": "cuda", "dtype": "bf16", "seq_len": 8192, "position": "none", **changes}
    mode, device, dtype = (asked.pop(key) for key in ("mode", "device", "dtype"))
    answer = method.impl_support(method.impl(impl), mode, Dims(**asked), method.params(), device, dtype)
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
