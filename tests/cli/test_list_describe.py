"""Listing and describing: complete, machine-readable, and clear about wrong input."""

from __future__ import annotations

import pytest

from ctxbench.cost import evaluate, symbols, total
from ctxbench.errors import Exit
from ctxbench.method import Dims
from ctxbench.registry import discover


def test_list_methods_names_every_registered_method(ctxbench):
    result = ctxbench("list", "methods", "--json")
    assert [entry["name"] for entry in result.json] == discover().names()
    for entry in result.json:
        assert {"name", "title", "family", "memory_parameter", "modes", "paper", "impls"} <= entry.keys()
        assert {"name", "supported", "reason"} <= entry["impls"][0].keys()


def test_list_on_cuda_says_why_a_cpu_only_impl_is_not_supported(ctxbench, tmp_path):
    plugin = tmp_path / "cpu_only.py"
    plugin.write_text(
        "from ctxbench.method import Impl, Method\n"
        "METHOD = Method(name='cpu_only', build=lambda *_: None, impls=(Impl('reference', devices=('cpu',)),))\n"
    )
    result = ctxbench("list", "impls", "--device", "cuda:0", "--plugin", plugin, "--json")
    entry = next(entry for entry in result.json if entry["method"] == "cpu_only")
    assert not entry["supported"]
    assert entry["reason"] == "reference runs on cpu, not on cuda"


def test_list_shows_a_broken_plugin_with_its_error_and_goes_on(ctxbench, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text("raise RuntimeError('half written')\n")
    result = ctxbench("list", "--plugin", plugin)
    assert result.code == Exit.OK
    assert "RuntimeError: half written" in result.out
    assert "dense" in result.out


@pytest.mark.parametrize("what", ["methods", "impls", "suites", "metrics", "devices"])
def test_every_listing_is_a_json_array_of_objects(ctxbench, what):
    listed = ctxbench("list", what, "--json").json
    assert listed
    assert all(isinstance(entry, dict) for entry in listed)


def test_unknown_listing_suggests_the_nearest(ctxbench):
    result = ctxbench("list", "metods")
    assert result.code == Exit.USAGE
    assert "did you mean 'methods'?" in result.err


def test_unknown_command_suggests_the_nearest(ctxbench):
    result = ctxbench("descibe", "dense")
    assert result.code == Exit.USAGE
    assert "did you mean 'describe'?" in result.err


def test_unknown_option_is_a_usage_error(ctxbench):
    assert ctxbench("list", "--jsn").code == Exit.USAGE


@pytest.mark.parametrize("name", discover().names())
def test_describe_prints_the_formulas_own_numbers(ctxbench, name):
    method = discover()[name]
    described = ctxbench("describe", name, "--seq", "1k,3000", "--json").json
    for cost in described["costs"]:
        for at in cost["at"]:
            dims = Dims(**{**described["dims"], "seq_len": at["seq_len"]})
            params = method.params()
            values = symbols.bindings(dims, params, 4, method.segment_len(params))
            formula = total(method.cost_of(cost["impl"], "forward", dims.causal, dims.position, params).flops)
            assert at["flops"] == evaluate(formula, values)
        assert cost["formulas"]["flops"]["big_o"].startswith("O(T")
    longest = max(map(len, ctxbench("describe", name).out.splitlines()))
    assert longest < 320  # a formula nobody would read is told in other words


@pytest.mark.parametrize("name", discover().names())
def test_describe_as_text_names_impls_modes_and_growth(ctxbench, name):
    result = ctxbench("describe", name)
    assert result.code == Exit.OK
    for impl in discover()[name].impls:
        assert impl.name in result.out
    for word in ("decode:", "O(", "local slope", "paper:", "    depth  "):
        assert word in result.out


def test_a_formula_that_nobody_would_read_is_told_by_its_value_and_its_terms(ctxbench):
    described = ctxbench("describe", "memorizing", "--seq", "1k,8k,64k").out
    of_blocked = described.partition("  blocked\n")[2].partition("  triton\n")[0]
    peak = next(line for line in of_blocked.splitlines() if "peak_bytes" in line)
    assert "10240*T at 8k, 64k  (" in peak
    assert "characters in full: --json)" in peak
    assert "projections: 8*B*L*T*d^2" in of_blocked
    assert described.count("  num_parameters") == 1  # the same for every implementation
    assert ctxbench("describe", "memorizing", "--latex").out.count("peak_bytes") == 3


def test_support_is_that_of_the_device_dtype_and_mode_asked_for(ctxbench):
    described = ctxbench("describe", "dense", "--device", "cuda:1", "--dtype", "bf16", "--mode", "decode").out
    assert "Implementations on cuda:1, bf16, decode" in described
    assert "slabs: no: slabs runs on cpu, not on cuda" in described
    assert "slabs: yes" in ctxbench("describe", "dense", "--dtype", "bf16").out


def test_a_cost_function_that_raises_is_a_line_of_the_description_and_of_the_plan(ctxbench, tmp_path):
    plugin = tmp_path / "costly.py"
    plugin.write_text(
        "from ctxbench.method import Method\nMETHOD = Method(name='costly', build=print, cost=lambda *a: 1 / 0)\n"
    )
    described = ctxbench("describe", "costly", "--plugin", str(plugin))
    assert (described.code, "reference: the cost function failed: ZeroDivisionError" in described.out) == (0, True)
    planned = ctxbench("plan", "--methods", "costly", "--seq", "64", "--plugin", str(plugin))
    assert (planned.code, "ZeroDivisionError: division by zero" in planned.out) == (0, True)


def test_describe_dense_states_the_quadratic_and_its_slope(ctxbench):
    described = ctxbench("describe", "dense", "--seq", "128k", "--json").json
    blocked = next(cost for cost in described["costs"] if cost["impl"] == "blocked")
    assert blocked["formulas"]["flops"]["big_o"] == "O(T^2)"
    assert blocked["formulas"]["peak_bytes"]["big_o"] == "O(T)"
    assert blocked["at"][0]["slope"] == pytest.approx(1.98, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "dens"], "did you mean 'dense'?"),
        (["describe", "dense", "--seq", "1k.."], "a range needs both ends"),
        (["describe", "dense", "--seq", "0"], "must be at least 1"),
        (["describe", "dense", "--seq", "8k..1k"], "the range runs backwards"),
        (["describe", "dense", "--seq", "1q"], "not a size"),
        (["describe", "longformer", "--params", "windw=3"], "did you mean 'window'?"),
        (["describe", "longformer", "--params", "window"], "NAME=VALUE"),
        (["describe", "longformer", "--params", "window=0"], "window must be"),
        (["describe", "dense", "--device", "gpu"], "unknown device 'gpu'"),
        (["list", "impls", "--device", "cuda:x"], "unknown device 'cuda:x'"),
        (["describe", "dense", "--mode", "prefill"], "'prefill' is not one of"),
        (["describe", "quikc"], "unknown method or suite 'quikc'; did you mean 'quick'?"),
        (["describe", "nowhere.toml"], "cannot read the suite 'nowhere.toml'"),
    ],
)
def test_wrong_input_says_what_is_wrong_and_what_is_accepted(ctxbench, arguments, message):
    result = ctxbench(*arguments)
    assert result.code == Exit.USAGE
    assert message in result.err


def test_color_never_prints_no_escape_codes(ctxbench, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in ctxbench("list").out


def test_describe_has_a_section_of_claims_where_there_are_none(ctxbench):
    for method in discover():
        shown = ctxbench("describe", method.name).out.partition("\nClaims of the source documents\n")[2]
        assert ("none about this method" in shown) == (not method.claims)
        assert all(claim.true in shown for claim in method.claims)


def test_describe_says_which_positions_a_method_takes_and_why_not_others(ctxbench):
    described = ctxbench("describe", "dense").out
    assert "  rope_yarn: YaRN, its ramp from kept to divided frequencies linear in the channel" in described
    assert "  rope_yarn_rotation: YaRN, its ramp linear in the number of turns" in described
    described = ctxbench("describe", "transformer_xl", "--json").json
    assert described["positions"] == ["transformer_xl"]
    reason = described["without_positions"]["rope"]
    (line,) = [line for line in ctxbench("describe", "transformer_xl").out.splitlines() if f": no, {reason}" in line]
    assert "rope, rope_linear" in line  # one reason for several is said once
