"""Suites, layers and the checked configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench import suite
from ctxbench.config import Config, change_limits, require_devices, resolve
from ctxbench.devices import cuda_present
from ctxbench.errors import EnvironmentUnusable, UserError
from ctxbench.suite import Axes, Layer, Limits, Protocol, Suite


@pytest.mark.parametrize("name", ["decoding", "memory", "quick", "scaling", "streaming", "training"])
def test_every_shipped_suite_loads_and_has_a_title(name: str) -> None:
    assert name in suite.names()
    assert suite.load_suite(name).title


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[axes]\nbtach = 1", ["btach", "$.axes", "batch_size"], id="wrong-key-in-a-section"),
        pytest.param("[limits]\nbudgte = 1", ["budgte", "did you mean 'budget'"], id="near-miss"),
        pytest.param("[axis]\nseq_len = 1", ["axis", "accepted: axes"], id="wrong-section"),
        pytest.param("[axes]\nseq_len = [1, 2.5]", ["$.axes.seq_len[1]"], id="wrong-type-in-a-list"),
        pytest.param("[protocol]\nprocesses = 'many'", ["$.protocol.processes", "int"], id="wrong-type"),
        pytest.param("[axes\n", ["not TOML", "line 1"], id="broken-toml"),
        pytest.param("\udcff", ["not TOML"], id="not-text"),
    ],
)
def test_a_wrong_suite_says_where_and_what_is_accepted(text: str, said: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        suite.parse_suite(text.encode(errors="surrogateescape"), "mine.toml")
    for part in ("mine.toml", *said):
        assert part in str(raised.value)


def test_an_unknown_suite_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"did you mean 'scaling'"):
        suite.load_suite("scalign")
    with pytest.raises(UserError, match="cannot read the suite"):
        suite.load_suite("nowhere.toml")


def test_later_layers_win_and_origins_say_which(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.ctxbench.axes]\nbatch_size = 2\nseq_len = "2k"\n[tool.ctxbench.params]\n"window.window" = 64\n'
    )
    name, stack = suite.layers("quick", Suite(axes=Axes(seq_len="8k")), tmp_path)
    merged, origins = suite.merge(stack)
    assert name == "quick"
    assert (merged.axes.seq_len, origins["axes.seq_len"]) == ("8k", "flag")
    assert (merged.axes.batch_size, origins["axes.batch_size"]) == (2, "pyproject.toml")
    assert (merged.limits.budget, origins["limits.budget"]) == ("100s", "suite quick")
    assert (merged.axes.d_model, origins["axes.d_model"]) == (256, "default")
    assert (merged.params["window.window"], origins["params.window.window"]) == (64, "pyproject.toml")


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, "quick"),
        ({"seq_len": "1k..128k"}, "scaling"),
        ({"methods": "all"}, "scaling"),
        ({"mode": "train"}, "quick"),
    ],
    ids=["bare", "lengths", "methods", "other-axis"],
)
def test_without_a_suite_chosen_methods_or_lengths_take_the_limits_of_scaling(
    axes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert suite.layers(None, Suite(axes=Axes(**axes)), tmp_path)[0] == expected


def test_a_wrong_key_in_pyproject_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.ctxbench.axes]\nbtach = 1\n")
    with pytest.raises(UserError, match=r"pyproject\.toml: .*btach"):
        suite.layers("quick", Suite(), tmp_path)


_AXES = st.fixed_dictionaries(
    {},
    optional={
        "seq_len": st.sampled_from(["1k", "2k..8k"]),
        "batch_size": st.integers(1, 4),
        "d_model": st.sampled_from([64, 128]),
        "mode": st.sampled_from(["forward", "train"]),
    },
)


@given(st.lists(_AXES, min_size=1, max_size=4))
def test_merging_takes_each_key_from_the_last_layer_that_sets_it(values: list[dict[str, Any]]) -> None:
    stack = [Layer(str(number), Suite(axes=Axes(**axes))) for number, axes in enumerate(values)]
    merged, origins = suite.merge(stack)
    for name in ("seq_len", "batch_size", "d_model", "mode"):
        setting = [number for number, axes in enumerate(values) if name in axes]
        assert getattr(merged.axes, name) == (values[setting[-1]][name] if setting else None)
        assert origins.get(f"axes.{name}") == (str(setting[-1]) if setting else None)


def test_a_configuration_has_parsed_values(lab: Any) -> None:
    config = lab.config(
        limits={"budget": "2m", "memory_limit": "1GiB"}, protocol={"precision": "2%", "sample_budget": "250ms"},
        params={"window.window": "64,1k", "rate": 0.5}, methods="window,square", dtype="auto,bf16",
    )  # fmt: skip
    assert config.methods == ["square", "window"]
    assert config.seq_len == [1024, 2048, 4096]
    assert (config.budget_s, config.memory_limit) == (120.0, {"cpu": 2**30})
    assert (config.protocol.precision, config.protocol.sample_budget) == (0.02, 0.25)
    assert config.params == {"window": {"rate": [0.5], "window": [64, 1024]}}
    assert config.dtype == [None, "bf16"]


def test_the_default_budget_is_ten_minutes_on_cpu(lab: Any) -> None:
    assert lab.config(limits={"budget": "auto"}).budget_s == 600


def test_all_problems_are_listed_at_once(lab: Any) -> None:
    with pytest.raises(UserError) as raised:
        lab.config(
            methods="sqare", seq_len="8k..1k", device="gpu", dtype="fp8", mode="train_step", d_model=10,
            params={"window.widow": 1}, limits={"budget": "soon"}, protocol={"processes": 0},
        )  # fmt: skip
    message = str(raised.value)
    assert message.startswith("9 problems")
    parts = ["did you mean 'square'", "runs backwards", "'gpu'", "'fp8'", "did you mean 'train'", "10 and 4"]
    parts += ["did you mean 'window'", "'soon'", "processes must be at least 1", "axes.seq_len, set by flag"]
    for part in parts:
        assert part in message


@pytest.mark.parametrize("size", ["1k..", "0", "8k..1k", "1q", "", "-4"])
def test_a_malformed_size_is_refused_with_the_grammar(size: str, lab: Any) -> None:
    with pytest.raises(UserError) as raised:
        lab.config(seq_len=size)
    assert "seq_len" in str(raised.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"window.window": "4k"}, "between 1 and 2048"),
        ({"window.window": 1.5}, "whole number"),
        ({"window.shared": "maybe"}, "true or false"),
        ({"window.rate": "fast"}, "a number"),
        ({"window.kind": "medium"}, "soft, hard"),
        ({"nothing": 1}, "unknown axis or parameter"),
        ({"nobody.window": 1}, "unknown method"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_parameter_is_refused(params: dict[str, Any], said: str, lab: Any) -> None:
    with pytest.raises(UserError, match=said):
        lab.config(methods="all", params=params)


def test_a_parameter_without_a_method_reaches_every_method_that_has_it(lab: Any) -> None:
    config = lab.config(methods="all", params={"window": [64, 128], "window.shared": "true"})
    assert config.params == {"window": {"window": [64, 128], "shared": [True]}}


def test_a_cuda_device_that_is_absent_is_an_unusable_environment(lab: Any) -> None:
    if cuda_present():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(EnvironmentUnusable, match="accepted on this machine: cpu"):
        require_devices(lab.config(device="cuda"))


def test_limits_of_a_stored_configuration_can_change_and_nothing_else(lab: Any) -> None:
    config = lab.config()
    stored = msgspec.convert(msgspec.json.decode(msgspec.json.encode(config)), Config)
    assert stored == config
    changed = change_limits(stored, Limits(budget="5m", cell_timeout="10s", max_flops=1e9))
    assert (changed.budget_s, changed.cell_timeout_s, changed.max_flops) == (300.0, 10.0, 1e9)
    assert changed.comparable == config.comparable


def test_the_protocol_is_part_of_what_sessions_must_agree_on(lab: Any) -> None:
    assert lab.config(protocol={"seed": 1}).comparable != lab.config().comparable
    assert lab.config(limits={"budget": "1m"}).comparable == lab.config().comparable


def test_no_gate_and_zero_threads_are_kept(lab: Any) -> None:
    stack = [Layer("default", suite.DEFAULTS), Layer("flag", Suite(protocol=Protocol(gate=False)))]
    assert resolve("x", stack, lab.registry).protocol.gate is False
