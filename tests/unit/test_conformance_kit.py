"""The conformance kit catches every planted flaw, by the law that is meant for it, and passes what is sound."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sympy import Integer

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, T, d, e
from ctxbench.method import YES, Equivalence, Impl, Method, Params, no, param
from ctxbench.registry import discover, import_plugin
from ctxbench.testing import (
    HELD,
    LAWS,
    NOT_APPLICABLE,
    NOT_CLAIMED,
    cases_for,
    check_method,
    kit,
    laws_for,
    small_params,
)

flawed = import_plugin(str(Path(__file__).parents[1] / "plugins" / "flawed.py"))
LINEAR = {"map": 2 * B * T * d * d}


def sound(impl, mode, causal, position, params) -> Cost:
    """Closed forms of the sound mixer: one linear map."""
    flops = {term: (3 if mode == "train" else 1) * value for term, value in LINEAR.items()}
    return Cost(flops, flops, num_parameters=d * d + d)


def failing(report) -> set[str]:
    return {finding.law for finding in report.failures}


@pytest.mark.parametrize("kind", flawed.CAUGHT_BY, ids=lambda kind: kind.__name__)
def test_a_planted_flaw_is_caught(kind) -> None:
    report = check_method(flawed.method_of(kind))
    caught = {finding.law: finding.message for finding in report.failures}
    assert flawed.CAUGHT_BY[kind] in caught
    message = caught[flawed.CAUGHT_BY[kind]]
    assert "T=19 B=2 d_model=16" in message or "seq_len" in message or " at T=" in message
    assert "look at" in message


def test_a_sound_method_keeps_every_law_and_is_told_what_it_does_not_claim() -> None:
    report = check_method(flawed.METHOD)
    assert report.failures == []
    by_law = {finding.law: finding for finding in report.findings}
    assert set(by_law) == set(LAWS)
    assert by_law["receptive_field"].status == NOT_CLAIMED
    assert by_law["flops_equal_formula"].status == NOT_CLAIMED
    assert by_law["streaming_equals_whole"].status == NOT_APPLICABLE
    assert all(f.message for f in report.findings if f.status in (NOT_CLAIMED, NOT_APPLICABLE))


def test_a_call_that_never_ends_is_a_violation(monkeypatch) -> None:
    monkeypatch.setattr(kit, "TIME_LIMIT_S", 1)
    case = cases_for(flawed.method_of(flawed.Hangs))[0]
    finding = kit.answer(LAWS["shape_and_dtype"], case)
    assert not finding.ok
    assert "did not end within 1 s" in finding.message


def test_a_method_whose_description_raises_is_a_violation() -> None:
    report = check_method(flawed.method_of(flawed.Mixer, support=lambda *_: 1 / 0))
    assert not report.ok


def test_building_something_else_is_a_violation() -> None:
    report = check_method(Method("other", build=lambda *_: None))
    assert "build must return a torch.nn.Module" in report.failures[0].message


def test_an_impl_that_does_not_exist_is_the_callers_mistake() -> None:
    with pytest.raises(KeyError):
        check_method(flawed.METHOD, "nope")


@pytest.mark.parametrize(
    ("cost", "law"),
    [
        (lambda *a: Cost({}, {"map": 2 * B * T * d * d + 1}, d * d + d), "flops_equal_formula"),
        (
            lambda *a: Cost({}, {"map": LINEAR["map"] * (3 if a[1] == "train" else 1)}, d * d),
            "parameters_equal_formula",
        ),
        (lambda *a: Cost({}, LINEAR, d * d + d, peak_bytes=4 * e * B * T * d), "peak_equals_formula"),
    ],
    ids=["FLOPs off by one", "bias forgotten", "peak too high"],
)
def test_a_wrong_formula_is_caught(cost, law: str) -> None:
    report = check_method(flawed.method_of(flawed.Mixer, cost=cost), modes=("forward",))
    assert law in failing(report)


def test_right_formulas_hold() -> None:
    report = check_method(flawed.method_of(flawed.Mixer, cost=sound))
    assert report.failures == []
    assert {f.status for f in report.findings if f.law == "flops_equal_formula"} == {HELD}


def test_a_wrong_state_formula_is_caught() -> None:
    report = check_method(flawed.method_of(flawed.StreamsWrongly, cost=lambda *a: Cost({}, LINEAR, Integer(1))))
    assert "state_bytes_equal_formula" in failing(report)


@pytest.mark.parametrize(
    ("reach", "held"),
    [
        (lambda dims, params, i: range(i + 1), True),
        (lambda dims, params, i: range(max(0, i - 3), i + 1), False),
        (lambda dims, params, i: range(dims.seq_len), False),
    ],
    ids=["exact", "too narrow", "too wide"],
)
def test_reach_must_be_the_receptive_field(reach, held: bool) -> None:
    report = check_method(flawed.method_of(flawed.Mixer, reach=reach))
    assert ("receptive_field" not in failing(report)) is held


class Slower(flawed.Mixer):
    """The same mathematics in another order of operations."""

    def mix(self, x):
        return torch.stack([x[:, : t + 1].mean(1) for t in range(x.shape[1])], dim=1)


class Biased(Slower):
    def mix(self, x):
        return super().mix(x) * (1 + 1e-5)


def two_impls(other) -> Method:
    kinds = {"reference": flawed.Mixer, "other": other}

    def build(dims, params, impl, device, dtype):
        return kinds[impl](dims.d_model).to(device, dtype)

    return Method("pair", build=build, causal=(True,), impls=(Impl("reference"), Impl("other")))


@pytest.mark.parametrize(("other", "held"), [(Slower, True), (Biased, False)], ids=["reordered", "off by 1e-5"])
def test_agreement_allows_rounding_and_nothing_more(other, held: bool) -> None:
    report = check_method(two_impls(other), "other")
    assert ("agreement" not in failing(report)) is held


@pytest.mark.parametrize("discrete", [True, False])
def test_only_bf16_of_layers_that_pick_is_compared_at_the_fewest(discrete: bool) -> None:
    """What rounding in one layer makes the next one pick is nobody's mistake; everything else is compared whole."""
    built = set()

    def build(dims, params, impl, device, dtype):
        built.add((dtype, dims.num_layers))
        return {"reference": flawed.Mixer, "other": Slower}[impl](dims.d_model).to(device, dtype)

    impls = (Impl("reference"), Impl("other"))
    method = Method("pair", build=build, causal=(True,), impls=impls, discrete=discrete)
    case = cases_for(method, "other")[0]
    LAWS["agreement"](case)
    whole = case.dims.num_layers
    assert whole > 1
    assert {layers for dtype, layers in built if dtype == torch.bfloat16} == {1 if discrete else whole}
    assert {layers for dtype, layers in built if dtype == torch.float32} == {whole}
    assert (torch.float64, whole) in built


def literal(kind, **defects: str) -> Method:
    kinds = {"reference": flawed.Mixer, "as_written": kind}

    def build(dims, params, impl, device, dtype):
        return kinds[impl](dims.d_model).to(device, dtype)

    return Method("sketch", build=build, causal=(True,), impls=(Impl("reference"), Impl("as_written", defects=defects)))


def test_a_sketch_that_fails_as_declared_holds() -> None:
    method = literal(flawed.SeesTheFuture, causality="looks one token ahead", agreement="so it differs")
    report = check_method(method, "as_written")
    assert report.failures == []


@pytest.mark.parametrize(
    "method",
    [
        literal(flawed.SeesTheFuture, agreement="it differs"),
        literal(flawed.SeesTheFuture, agreement="", causality="", state="it keeps none"),
        literal(flawed.MixesTheBatch, agreement="", typo="no such probe"),
    ],
    ids=["undeclared defect", "declared defect absent", "unknown probe"],
)
def test_a_sketch_that_fails_otherwise_is_a_violation(method) -> None:
    assert "declared_defects" in failing(check_method(method, "as_written"))


def test_a_declared_equivalence_is_checked_with_the_other_methods_weights() -> None:
    dense = discover()["dense"]
    same = Method("same", build=dense.build, causal=(True,), equals=(Equivalence("always", "dense", {}),))
    other = Method("other", build=flawed.METHOD.build, causal=(True,), equals=(Equivalence("always", "dense", {}),))
    assert "equivalences" not in failing(check_method(same))
    assert "equivalences" in failing(check_method(other))


@dataclass(frozen=True)
class Sizes(Params):
    window: int = param(512, "w", low=1)
    block: int = param(64, "b", low=2)
    slots: int = param(64, "s")
    ratio: int = param(4, "small stays")
    share: float = param(0.5, "a float stays")
    kind: int = param(128, "choices stay", choices=(64, 128))


def test_large_parameters_are_scaled_by_one_factor() -> None:
    """Ratios such as window = 8 blocks carry meaning and survive."""
    small = small_params(Method("m", build=flawed.METHOD.build, params=Sizes))
    assert (small.window, small.block, small.slots) == (32, 4, 4)
    assert (small.ratio, small.share, small.kind) == (4, 0.5, 128)


def test_memory_sizes_and_directions_are_cases_of_their_own() -> None:
    method = Method(
        "m", build=flawed.METHOD.build, params=Sizes, memory_parameter="slots", causal=(True, False),
        positions=("none", "rope"),
    )  # fmt: skip
    crossed = {case.label: case.crossed for case in cases_for(method)}
    once = ["", "memory=0", "memory=7", "bidirectional", "rope", "kind=64"]
    twice = ["bidirectional/rope", "kind=64/bidirectional", "kind=64/rope", "kind=64/bidirectional/rope"]
    assert crossed == {**dict.fromkeys(once, False), **dict.fromkeys(twice, True)}
    assert not any(case.crossed for case in cases_for(method, every=True))


@dataclass(frozen=True)
class Kinds(Params):
    kind: str = param("soft", "k", choices=("soft", "hard"))
    size: int = param(1, "s", low=1)


def only_hard_looks_ahead(dims, params, mode):
    return YES if dims.causal or params.kind == "hard" else no("only a hard one looks ahead")


def test_what_only_another_setting_has_is_tried_with_that_setting_and_all_laws() -> None:
    """A direction that the default setting does not have must not go untested."""
    method = dataclasses.replace(
        flawed.METHOD, params=Kinds, causal=(True, False), support=only_hard_looks_ahead, variants=({"size": 2},)
    )
    tried = {case.label: case.crossed for case in cases_for(method)}
    assert tried == {"": False, "kind=hard": False, "kind=hard/bidirectional": False, "size=2": False}
    laws = {law.name for law, case in laws_for(method) if case.label == "kind=hard/bidirectional"}
    assert {"batch_independence", "receptive_field", "flops_equal_formula"} <= laws


def test_a_crossing_is_asked_what_tells_impls_apart() -> None:
    method = dataclasses.replace(flawed.METHOD, params=Kinds, positions=("none", "rope", "rope_yarn"))
    tried = {law.name for law, case in laws_for(method) if case.label == "kind=hard/rope"}
    assert tried == {"agreement", "streaming_equals_whole"}
    assert not [law for law, case in laws_for(method) if case.label == "kind=hard/rope_yarn"]
    every = {law.name for law, case in laws_for(method, every=True) if case.label == "kind=hard/rope_yarn"}
    assert every > tried


def test_a_variant_with_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter 'sise'"):
        dataclasses.replace(flawed.METHOD, params=Kinds, variants=({"sise": 2},))


def test_another_table_of_constants_is_tried_where_it_could_matter_alone() -> None:
    method = dataclasses.replace(flawed.METHOD, positions=("none", "rope", "rope_yarn"))
    tried = {label: {law.name for law, case in laws_for(method) if case.label == label} for label in method.positions}
    assert tried["rope_yarn"] == {"shape_and_dtype", "streaming_equals_whole", "parameters_equal_formula"}
    assert tried["rope"] > tried["rope_yarn"]
    alone = dataclasses.replace(flawed.METHOD, positions=("none", "rope_yarn"))
    assert {law.name for law, case in laws_for(alone) if case.label} == tried["rope"]


def test_pairs_have_readable_ids() -> None:
    law, case = laws_for(flawed.METHOD)[0]
    assert f"{law}-{case}" == "agreement-flawed/reference"
