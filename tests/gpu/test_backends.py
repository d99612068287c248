"""Pinned back ends: what they are charged for, what they refuse, and how packages of other layouts are called."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import backends
from ctxbench.implementations._shared.backends_table import causal_support
from ctxbench.implementations.dense import METHOD
from ctxbench.method import Dims

PINNED = ("cudnn", "flash", "efficient")


@pytest.mark.parametrize("impl", PINNED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_formulas_are_what_the_tracer_counts(impl: str, mode: str, causal: bool) -> None:
    params, dims = METHOD.params(), Dims(seq_len=301, num_layers=2, batch_size=2, causal=causal)
    counted = trace(METHOD, dims, params, impl, mode, "bf16")
    cost = METHOD.cost_of(impl, mode, causal, "none", params)
    assert evaluate(total(cost.flops), bindings(dims, params, 2, METHOD.segment_len(params))) == counted.flops
    assert not counted.uncounted


@pytest.mark.parametrize("impl", PINNED)
def test_a_decoded_token_sees_all_keys(impl: str) -> None:
    params, dims = METHOD.params(), Dims(seq_len=77)
    counted = trace(METHOD, dims, params, impl, "decode", "bf16")
    cost = METHOD.cost_of(impl, "decode", True, "none", params)
    assert evaluate(total(cost.flops), bindings(dims, params, 2, METHOD.segment_len(params))) == counted.flops


@pytest.mark.parametrize("name", PINNED)
def test_fewer_queries_than_keys_are_refused_where_a_mask_would_have_two_meanings(name: str) -> None:
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 5, 8)
    with pytest.raises(ValueError, match="received 3 and 5"):
        getattr(backends, name)(q, k, k, True, None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4", "fla", "xformers"])
def test_packages_get_tokens_before_heads(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens_first(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
        assert q.shape == (2, 7, 3, 8)  # [B, T, H, D]
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal).transpose(
            1, 2
        )

    planted, operators = ModuleType(name), ModuleType(f"{name}.ops")
    if name == "flash_attn_4":
        operators.flash_attn_func = lambda q, k, v, causal: (tokens_first(q, k, v, causal), None)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", operators)
    elif name == "fla":
        operators.parallel_attn = lambda q, k, v: tokens_first(q, k, v, True)  # type: ignore[attr-defined]
        for part in ("fla", "fla.ops", "fla.ops.attn"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        monkeypatch.setitem(sys.modules, "fla.ops.attn.parallel", operators)
    elif name == "flash_attn":
        planted.flash_attn_func = lambda q, k, v, causal: tokens_first(q, k, v, causal)  # type: ignore[attr-defined]
    else:
        operators.LowerTriangularMask = type("LowerTriangularMask", (), {})  # type: ignore[attr-defined]
        operators.memory_efficient_attention = lambda q, k, v, attn_bias: tokens_first(  # type: ignore[attr-defined]
            q, k, v, attn_bias is not None
        )
    monkeypatch.setitem(sys.modules, name, planted)
    monkeypatch.setitem(sys.modules, f"{name}.ops", operators)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal)
    if name == "fla" and not causal:
        with pytest.raises(ValueError, match="received causal=False"):
            backends.fla(q, k, v, False, None)  # type: ignore[arg-type]
        return
    torch.testing.assert_close(getattr(backends, name)(q, k, v, causal, None), expected)
    if causal:
        with pytest.raises(ValueError, match="received 3 and 7"):
            getattr(backends, name)(q[:, :, :3], k, v, True, None)


@pytest.mark.parametrize(
    ("impl", "changes", "dtype", "device", "reason"),
    [
        ("cudnn", {}, "bf16", "cpu", "runs on cuda"),
        ("cudnn", {}, "fp32", "cuda", "bf16, fp16"),
        ("flash", {"d_model": 40, "num_heads": 2}, "bf16", "cuda", "multiple of 8 channels"),
        ("efficient", {"position": "alibi"}, "fp32", "cuda", "not alibi"),
        ("efficient", {}, "fp32", "cuda", ""),
        ("flash_attn", {}, "bf16", "cuda", "flash-attn"),
        ("flash_attn_4", {}, "bf16", "cuda", "flash-attn-4"),
        ("fla", {}, "bf16", "cuda", "fla-core"),
    ],
)
def test_support_says_why_not(impl: str, changes: dict[str, Any], dtype: str, device: str, reason: str) -> None:
    dims = Dims(seq_len=64, **changes)
    answer = METHOD.impl_support(METHOD.impl(impl), "forward", dims, METHOD.params(), device, dtype)
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason


def test_packages_that_share_a_folder_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 lies in a folder of flash_attn's without being it."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "flash_attn_4-4.0.dist-info").mkdir()
    metadata = tmp_path / "flash_attn_4-4.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    dims, params = Dims(seq_len=64), METHOD.params()
    assert METHOD.impl_support(METHOD.impl("flash_attn_4"), "forward", dims, params, "cuda", "bf16")
    assert not METHOD.impl_support(METHOD.impl("flash_attn"), "forward", dims, params, "cuda", "bf16")


def test_fla_is_causal_alone() -> None:
    answer = causal_support(Dims(seq_len=64, causal=False), METHOD.params(), "cuda", "bf16")
    assert "causal" in answer.reason
    assert causal_support(Dims(seq_len=64), METHOD.params(), "cuda", "bf16")


def test_a_chunk_behind_a_cache_is_refused_with_the_modes_that_are_there() -> None:
    answer = METHOD.impl_support(METHOD.impl("flash"), "stream", Dims(seq_len=64), METHOD.params(), "cuda", "bf16")
    assert "forward, train, decode" in answer.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("causal", [True, False])
def test_back_ends_agree_with_float64_on_the_device(name: str, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 301, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    error = (getattr(backends, name)(q, k, v, causal, None).double() - expected).norm() / expected.norm()
    assert error < 4 * 2.0**-8
