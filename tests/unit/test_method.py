"""The contract: what a method may say of itself, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ctxbench.method import YES, Dims, Impl, Method, Params, Support, load, no, param


@dataclass(frozen=True)
class Sizes(Params):
    window: int = param(256, "keys", low=1, high=1024)
    rate: float = param(0.5, "a share", low=0.0, high=1.0)
    kind: str = param("soft", "how", choices=("soft", "hard"))
    shared: bool = param(False, "a switch")


METHOD = Method(
    name="mine",
    build=lambda *_: None,
    params=Sizes,
    memory_parameter="window",
    segment="window",
    modes=("forward", "train"),
    without={"decode": "nothing is carried"},
    causal=(True,),
    impls=(Impl("reference"), Impl("fast", devices=("cuda",), dtypes=("bf16",), modes=("forward",))),
    layers=lambda params: 2,
)
DIMS = Dims(seq_len=64, num_layers=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"d_model": 10, "num_heads": 4}, "multiple of num_heads"),
        ({"d_ff": -1}, "d_ff"),
        ({"position": "learned"}, "position must be one of"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIMS.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be between 1 and 1024, received 0"),
        ({"window": 4096}, "between 1 and 1024"),
        ({"window": 2.0}, "window must be of type int, received 2.0"),
        ({"window": True}, "of type int"),
        ({"window": "8"}, "of type int"),
        ({"rate": 1.5}, "rate must be between"),
        ({"rate": float("nan")}, "rate must be between"),
        ({"kind": "odd"}, "kind must be one of soft, hard"),
        ({"shared": 1}, "of type bool"),
        ({"windw": 8}, "no parameter 'windw'; this method has window, rate, kind, shared"),
    ],
)
def test_wrong_parameters_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes().replace(**changes)


def test_an_integer_is_a_valid_float() -> None:
    assert Sizes().replace(rate=1).as_dict() == {"window": 256, "rate": 1, "kind": "soft", "shared": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Mine"}, "lower-case identifier"),
        ({"name": "a" * 41}, "at most 40"),
        ({"name": "../x"}, "lower-case identifier"),
        ({"impls": ()}, "at least one impl"),
        ({"impls": (Impl("a"), Impl("a"))}, "no two of one name"),
        ({"modes": ("inference",)}, "names the mode 'inference'"),
        ({"without": {"prefill": "x"}}, "names the mode 'prefill'"),
        ({"memory_parameter": "slots"}, "memory_parameter 'slots' is not one of its parameters"),
        ({"segment": "slots"}, "segment 'slots'"),
        ({"positions": ("none", "spiral")}, "names the position 'spiral'"),
        ({"without_positions": {"spiral": "it has no centre"}}, "names the position 'spiral'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_inconsistent_description_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**{"name": "mine", "build": lambda *_: None, **fields})


@pytest.mark.parametrize(
    ("mode", "dims", "reason"),
    [
        ("forward", DIMS, ""),
        ("decode", DIMS, "nothing is carried"),
        ("stream", DIMS, "mine has no stream mode"),
        ("forward", DIMS.replace(causal=False), "mine has no bidirectional form"),
        ("forward", DIMS.replace(position="rope"), "mine takes the positions none, not rope"),
        ("forward", DIMS.replace(num_layers=1), "needs at least 2 layers with these parameters, received 1"),
    ],
    ids=["yes", "reason given", "no reason given", "direction", "position", "layers"],
)
def test_what_the_mathematics_does_not_have_is_said(mode: str, dims: Dims, reason: str) -> None:
    answer = METHOD.mode_support(mode, dims, Sizes())
    assert (answer.ok, bool(answer)) == (not reason, not reason)
    assert reason in answer.reason


def test_a_position_that_is_not_taken_has_its_own_reason_and_rotations_need_pairs() -> None:
    method = Method("mine", build=lambda *_: None, positions=("rope",), without_positions={"t5": "no distances"})
    params = method.params()
    assert method.mode_support("forward", Dims(8, position="t5"), params).reason == "no distances"
    assert "takes the positions rope" in method.mode_support("forward", Dims(8, position="alibi"), params).reason
    assert method.mode_support("forward", Dims(8, position="rope"), params)
    odd = method.mode_support("forward", Dims(8, d_model=12, num_heads=4, position="rope"), params)
    assert odd.reason == "rope turns pairs of channels and needs an even head width, received 3"


@pytest.mark.parametrize(
    ("impl", "mode", "device", "dtype", "reason"),
    [
        (METHOD.impl("reference"), "train", "cpu", "fp32", ""),
        (METHOD.impl("fast"), "forward", "cuda:1", "bf16", ""),
        (METHOD.impl("fast"), "forward", "cpu", "bf16", "fast runs on cuda, not on cpu"),
        (METHOD.impl("fast"), "forward", "cuda", "fp32", "computes in bf16, not in fp32"),
        (METHOD.impl("fast"), "train", "cuda", "bf16", "has the modes forward, not train"),
        (Impl("x", needs=("no-such-package-here",)), "forward", "cpu", "fp32", "which is not installed"),
        (Impl("x", positions=("rope",)), "forward", "cpu", "fp32", "x takes the positions rope, not none"),
        (Impl("x", support=lambda *_: no("odd")), "forward", "cpu", "fp32", "odd"),
    ],
    ids=["yes", "device index", "device", "dtype", "mode", "package", "position", "own answer"],
)
def test_what_an_impl_cannot_do_is_said(impl: Impl, mode: str, device: str, dtype: str, reason: str) -> None:
    answer = METHOD.impl_support(impl, mode, DIMS, Sizes(), device, dtype)
    assert answer.ok is (not reason)
    assert reason in answer.reason


def test_the_oracle_is_the_reference_or_the_first_impl() -> None:
    assert METHOD.oracle == "reference"
    assert Method("m", build=lambda *_: None, impls=(Impl("a"), Impl("b"))).oracle == "a"


def test_segment_length_is_the_declared_parameter_or_512() -> None:
    assert METHOD.segment_len(Sizes(window=64)) == 64
    assert Method("m", build=lambda *_: None).segment_len(Params()) == 512


def test_functions_are_named_lazily() -> None:
    assert load("ctxbench.method:YES") is YES
    assert load(YES) is YES
    assert load(None) is None
    with pytest.raises(ValueError, match="expected 'module:attribute'"):
        load("ctxbench.method")
    assert Support(True)
