"""Position encodings against public packages, and against what their papers say of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.implementations._shared.positions import (
    ORIGINAL_LENGTH,
    AlibiBias,
    Position,
    RelativeTerm,
    Rotary,
    T5Bias,
    bucket,
    frequencies,
    positions_for,
    sinusoids,
    slopes,
)
from ctxbench.method import POSITIONS, ROPE, Dims

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "positions.npz"))
DIMS = Dims(seq_len=16, d_model=24, num_heads=3, num_layers=2)
TABLES = [name.removeprefix("frequencies/") for name in GOLDEN if name.startswith("frequencies/")]


def positions(name: str, **changes) -> Position:
    return positions_for(DIMS.replace(position=name, **changes))[0]


@pytest.mark.parametrize("name", TABLES)
def test_frequencies_equal_those_of_public_packages(name: str) -> None:
    kind = name.partition("/")[0]
    head_dim, scale, original, temperature = GOLDEN[f"settings/{name}"]
    rotary = Rotary(int(head_dim), kind, scale, original_length=int(original))
    np.testing.assert_allclose(rotary.frequencies, GOLDEN[f"frequencies/{name}"], rtol=5e-7)
    if kind != "rope_yarn_rotation":  # the package's name for this ramp is another method, which has no temperature
        assert rotary.temperature == pytest.approx(temperature, rel=1e-12)


def test_rotation_equals_that_of_llama() -> None:
    x = torch.from_numpy(GOLDEN["rotated/x"])
    y = Rotary(8).rotate(x, 100)
    np.testing.assert_allclose(y, GOLDEN["rotated/y"], rtol=0, atol=2e-5)  # its angles are float32
    np.testing.assert_allclose(Rotary(8).rotate(x.float(), 100), GOLDEN["rotated/y"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_buckets_equal_those_of_t5(causal: bool) -> None:
    expected = GOLDEN["bucket/causal" if causal else "bucket/bidirectional"]
    assert np.array_equal(bucket(torch.arange(-1000, 1001), causal), expected)


@pytest.mark.parametrize("heads", [1, 6, 8, 12, 16, 20])
@pytest.mark.parametrize("package", ["bloom", "mpt"])
def test_slopes_equal_those_of_bloom_and_mpt(package: str, heads: int) -> None:
    bias = GOLDEN[f"{package}/{heads}"]  # three keys, as an absolute position or as a negative distance
    np.testing.assert_allclose(slopes(heads), bias[:, 2] - bias[:, 1], rtol=1e-6)


@pytest.mark.parametrize("kind", ROPE)
def test_scores_of_rotated_vectors_depend_on_differences_alone(kind: str) -> None:
    rotary = Rotary(16, kind, 4.0)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    near = (rotary.rotate(q, 7) * rotary.rotate(k, 3)).sum()
    far = (rotary.rotate(q, 90_007) * rotary.rotate(k, 90_003)).sum()
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)
    moved = (rotary.rotate(q, 8) * rotary.rotate(k, 3)).sum()
    assert (near - moved).abs() > 1e-6


@pytest.mark.parametrize("kind", ROPE[1:])
def test_extensions_are_rope_at_scale_one_and_change_by_their_rule_beyond(kind: str) -> None:
    plain, extended = frequencies(64), frequencies(64, kind, 8.0)
    torch.testing.assert_close(frequencies(64, kind, 1.0), plain, rtol=1e-15, atol=0)
    ratio = plain / extended
    assert ratio[-1] == pytest.approx(8, rel=1e-12)
    assert ratio[0] == pytest.approx(8 if kind == "rope_linear" else 1, rel=1e-12)
    assert (ratio.diff() >= -1e-12).all()


def test_static_ntk_is_a_larger_base() -> None:
    base = 10_000.0 * 8.0 ** (64 / 62)
    torch.testing.assert_close(frequencies(64, "rope_ntk", 8.0), frequencies(64, base=base), rtol=1e-12, atol=0)


def test_ramps_of_yarn_differ_in_the_middle_alone() -> None:
    index, rotation = (frequencies(128, kind, 16.0) for kind in ("rope_yarn", "rope_yarn_rotation"))
    gap = (index / rotation - 1).abs()
    assert gap.max() > 0.5
    assert gap[:20].max() < 1e-12
    assert gap[47:].max() < 1e-12


@pytest.mark.parametrize("kind", ["rope_yarn", "rope_yarn_rotation"])
def test_logits_under_yarn_grow_by_the_square_of_its_temperature(kind: str) -> None:
    rotary = Rotary(16, kind, 16.0)
    x = torch.randn(1, 16, dtype=torch.float64)
    assert rotary.rotate(x, 5).square().sum() / x.square().sum() == pytest.approx((0.1 * math.log(16) + 1) ** 2)


def test_scale_comes_from_the_length_the_layer_is_built_for() -> None:
    assert torch.equal(positions("rope_linear").frequencies, frequencies(8))
    assert torch.equal(positions("rope_linear", seq_len=4 * ORIGINAL_LENGTH).frequencies, frequencies(8) / 4)


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_constants_stay_exact_when_a_module_changes_its_dtype(name: str) -> None:
    plain, halved = (torch.nn.ModuleList([positions(name)]).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    (exact,), (kept,) = list(plain.buffers()), list(halved.buffers())
    assert kept.dtype == torch.float64
    assert torch.equal(exact, kept)
    assert not plain.state_dict()


def test_bfloat16_tells_neighbouring_far_positions_apart() -> None:
    rotary, x = Rotary(8), torch.ones(2, 8, dtype=torch.bfloat16)
    a, b = rotary.rotate(x, 70_000)
    assert not torch.equal(a, b)
    exact = rotary.rotate(x.double(), 70_000)
    torch.testing.assert_close(rotary.rotate(x, 70_000).double(), exact, rtol=0, atol=0.02)
    distance = torch.tensor([-4097, -4096])
    bias = AlibiBias(DIMS.replace(d_model=256, num_heads=32)).bias(distance, torch.bfloat16)
    torch.testing.assert_close(bias.float(), AlibiBias(DIMS.replace(d_model=256, num_heads=32)).bias(
        distance, torch.float32), rtol=2**-8, atol=0)  # fmt: skip


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["t5", "alibi"])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(1, 1, 0), (5, 5, 0), (3, 9, 6), (4, 7, -3), (1, 200, 199)])
def test_rectangle_equals_the_bias_of_every_pair(name, causal, queries, keys, offset) -> None:
    position = positions(name, causal=causal).double()
    distance = torch.arange(keys) - torch.arange(offset, offset + queries)[:, None]
    found = position.rectangle(queries, keys, offset, torch.zeros((), dtype=torch.float64))
    assert torch.equal(found, position.bias(distance, torch.float64))
    assert found.shape == (3, queries, keys)
    assert found.is_contiguous()  # else attention would copy it at every call


def test_alibi_falls_with_the_distance_to_either_side() -> None:
    bias = positions("alibi").bias(torch.tensor([-3, 0, 3]), torch.float64)
    torch.testing.assert_close(bias, -torch.tensor(slopes(3)).double()[:, None] * torch.tensor([3.0, 0.0, 3.0]))


def test_one_table_of_t5_serves_all_layers_and_every_layer_has_its_own_relative_term() -> None:
    first, second = positions_for(DIMS.replace(position="t5"))
    assert first is second
    assert sum(p.numel() for p in torch.nn.ModuleList([first, second]).parameters()) == 32 * 3
    first, second = positions_for(DIMS.replace(position="transformer_xl"))
    assert first.r is not second.r


def test_relative_keys_are_projected_sinusoids_by_falling_distance() -> None:
    term = RelativeTerm(DIMS).double()
    keys = term.keys(5, -2)  # [H, 8, D]
    for index, distance in enumerate(range(5, -3, -1)):
        row = sinusoids(torch.tensor([distance], dtype=torch.float64), 24)[0]
        expected = [math.sin(distance * 10_000 ** (-2 * n / 24)) for n in range(12)]
        torch.testing.assert_close(row[:12], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(keys[:, index].flatten(), term.r.weight @ row)


@pytest.mark.parametrize("name", POSITIONS)
def test_every_name_has_an_encoding_and_only_none_leaves_all_alone(name: str) -> None:
    position, x = positions(name), torch.randn(1, 3, 4, 8)
    rotates = not torch.equal(position.rotate(x, 1), x)
    biased = position.rectangle(4, 4, 0, x) is not None
    assert (rotates, biased) == (name.startswith("rope"), name in ("t5", "alibi"))
    assert isinstance(position, RelativeTerm) == (name == "transformer_xl")


def test_positions_may_be_any_integers() -> None:
    rotary, x = Rotary(8), torch.randn(2, 3, 8)
    together = rotary.rotate(x, torch.tensor([9, 2, 40]))
    for index, position in enumerate((9, 2, 40)):
        torch.testing.assert_close(together[:, index : index + 1], rotary.rotate(x[:, index : index + 1], position))
    assert torch.equal(rotary.rotate(x, (9, 2, 40)), together)
    assert torch.equal(rotary.rotate(x, 7, step=4), rotary.rotate(x, torch.tensor([7, 11, 15])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "even"),
        ({"head_dim": 8, "scale": 0.5}, "scale must be at least 1"),
        ({"head_dim": 8, "kind": "spiral"}, "kind must be one of rope"),
        ({"head_dim": 8, "kind": "rope_yarn_steep"}, "rope_yarn, rope_yarn_rotation, received"),
    ],
)
def test_refuses_what_it_does_not_know(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frequencies(**arguments)


def test_t5_learns_from_every_visible_distance() -> None:
    position = T5Bias(DIMS).double()
    position.rectangle(200, 200, 0, torch.zeros((), dtype=torch.float64)).sum().backward()
    assert (position.table.weight.grad > 0).all()
