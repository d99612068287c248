"""The rules for meta tensors say what torch says, or nothing."""

from __future__ import annotations

import random

import pytest
import torch

from ctxbench.cost.rules import RULES

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


A, B = meta(2, 3, 5), meta(2, 5, 4)
NARROW, LAST = meta(2, 1, 6, 7), meta(2, 6, 7, 4).permute(0, 3, 1, 2)
MASK = meta(3, 5, dtype=torch.bool)
CALLS = [
    (aten._softmax.default, (A, -1, False), {}),
    (aten._softmax.default, (meta(4, 4, dtype=torch.float64), 0, False), {}),
    (aten._softmax.default, (NARROW, 1, False), {}),  # can be read as channels last, too
    (aten.bitwise_not.default, (MASK,), {}),
    (aten.bitwise_not.default, (meta(7, dtype=torch.int32),), {}),
    (aten.tril.default, (MASK,), {}),
    (aten.tril.default, (A, 1), {}),
    (aten.triu.default, (A, -2), {}),
    (aten.masked_fill.Scalar, (A, MASK, float("-inf")), {}),
    (aten.masked_fill.Scalar, (A, meta(5, dtype=torch.bool), 0.0), {}),
    (aten.cat.default, ([A, meta(2, 3, 1)], 2), {}),
    (aten.cat.default, ([A, meta(2, 5, 7).transpose(1, 2)[:, :1, :]], 1), {}),
    (aten.cat.default, ([meta(3), meta(0), meta(4)],), {}),
    (aten.cat.default, ([meta(2, 3, 4, 5), meta(2, 3, 5, 4).transpose(2, 3)], 1), {}),
    (aten.add.Tensor, (A, A), {}),
    (aten.add.Tensor, (A, A), {"alpha": 2}),
    (aten.mul.Tensor, (MASK, MASK), {}),
    (aten.add.Tensor, (A, meta(5)), {}),
    (aten.add.Tensor, (meta(2, 1, 4, 5), meta(3, 1, 1)), {}),  # the first could be read as channels last
    (aten.add.Tensor, (A, 1.5), {}),
    (aten.mul.Tensor, (A.transpose(0, 1), A.transpose(0, 1)), {}),
    (aten.mul.Tensor, (A[:, :2].transpose(0, 2), meta(2, 1)), {}),
    (aten.mul.Tensor, (A, torch.nn.Parameter(meta(5))), {}),
    (aten.where.self, (MASK, meta(), meta()), {}),
    (aten.where.self, (MASK, A, meta(2, 1, 1)), {}),
    (aten.mul.Tensor, (meta(5, dtype=torch.int64), 3), {}),
    (aten.sub.Tensor, (meta(7, 1), meta(5)), {}),
    (aten.sub.Tensor, (meta(3, 1), meta(2, 1, 4)), {}),
    (aten.add.Tensor, (meta(1, 2, 6, 7), meta(6, 7)), {}),
    (aten.bitwise_and.Tensor, (MASK, meta(1, 5, dtype=torch.bool)), {}),
    (aten.eq.Tensor, (meta(4, 3, 1, dtype=torch.int64), meta(5, dtype=torch.int64)), {}),
    (aten.le.Tensor, (meta(6, dtype=torch.int64), meta(6, 1, dtype=torch.int64)), {}),
    (aten.eq.Scalar, (A, float("-inf")), {}),
    (aten.slice_backward.default, (A, [2, 9, 5], 1, 3, 6, 1), {}),
    (aten.slice_backward.default, (A.transpose(0, 1), [3, 4, 5], 1, 0, 4, 2), {}),
    (aten.bmm.default, (A, B), {}),
    (aten.bmm.default, (A, B.transpose(1, 2).contiguous().transpose(1, 2)), {}),
    (aten.ones.default, ([3, 4],), {"device": torch.device("meta")}),
    (aten.zeros.default, ([3, 0],), {"device": torch.device("meta"), "dtype": torch.bool, "pin_memory": False}),
    (aten.new_zeros.default, (MASK, [2, 7]), {"pin_memory": False}),
    (aten.new_zeros.default, (A, [4]), {"dtype": torch.float64}),
    (aten.arange.default, (7,), {"device": torch.device("meta"), "pin_memory": False}),
    (aten.arange.start, (3, 9), {"device": torch.device("meta"), "dtype": torch.float32}),
    (aten.clone.default, (A.transpose(0, 2),), {"memory_format": torch.contiguous_format}),
]
REFUSED = [
    (aten._softmax.default, (A.transpose(0, 1), -1, False), {}),
    (aten._softmax.default, (LAST, 1, False), {}),
    (aten._softmax.default, (A, 1, True), {}),
    (aten.tril.default, (A.transpose(1, 2),), {}),
    (aten.add.Tensor, (meta(5, dtype=torch.int64), 1.5), {}),  # another type comes out
    (aten.mul.Tensor, (MASK, 2), {}),
    (aten.eq.Tensor, (A, meta(5, dtype=torch.float64)), {}),
    (aten.mul.Tensor, (A, meta(2, 3, 5, dtype=torch.float64)), {}),
    (aten.mul.Tensor, (A.transpose(0, 1), A.transpose(1, 2).contiguous().view(3, 2, 5)), {}),  # of two orders
    (aten.mul.Tensor, (meta(5, 3, 1, 2).permute(0, 3, 1, 2),) * 2, {}),  # an axis of one place may lie anywhere
    (aten.where.self, (MASK, meta(), meta(dtype=torch.float64)), {}),
    (aten.masked_fill.Scalar, (meta(5), MASK, 0.0), {}),  # the mask is the larger one
    (aten.masked_fill.Scalar, (meta(3, 5, dtype=torch.int64), MASK, 1.5), {}),  # another type may come out
    (aten.cat.default, ([A, meta(2, 3, 1, dtype=torch.float64)], 2), {}),
    (aten.cat.default, ([A, meta(0)], 2), {}),
    (aten.cat.default, ([A, meta(2, 4, 1)], 2), {}),
    (aten.bmm.default, (A, A), {}),
    (aten.ones.default, ([3, 4],), {"device": torch.device("cpu")}),
    (aten.new_zeros.default, (A, [3, 4]), {"device": torch.device("cpu")}),
    (aten.arange.default, (7.5,), {"device": torch.device("meta")}),
    (aten.clone.default, (A.transpose(0, 2),), {}),
    (aten.softmax.int_out, (A, 2), {"out": meta(2, 3)}),
    (aten._softmax_backward_data.out, (A, A, 2, torch.float32), {"grad_input": meta(1)}),
]


@pytest.mark.parametrize(("operator", "args", "kwargs"), CALLS, ids=str)
def test_a_rule_makes_what_torch_makes(operator, args, kwargs):
    said, made = RULES[id(operator)](*args, **kwargs), operator(*args, **kwargs)
    assert said is not None
    assert (said.shape, said.stride(), said.dtype) == (made.shape, made.stride(), made.dtype)
    assert said.untyped_storage().nbytes() == made.untyped_storage().nbytes()
    assert said.is_meta


@pytest.mark.parametrize(("operator", "args", "kwargs"), REFUSED, ids=str)
def test_a_rule_leaves_to_torch_what_it_does_not_cover(operator, args, kwargs):
    assert RULES[id(operator)](*args, **kwargs) is None


def laid_out(size, device, choose):
    """A tensor of some of these extents: dense, with gaps, turned, in channels last."""
    shape = [extent if choose.random() < 0.8 else 1 for extent in size][choose.choice((0, 0, 0, 1)) :]
    axes = choose.sample(range(len(shape)), len(shape)) if choose.random() < 0.3 else list(range(len(shape)))
    gap = choose.choice((0, 0, 3))
    room = [shape[axis] + gap * (axis == 0) for axis in axes]
    last = len(shape) == 4 and choose.random() < 0.2
    base = torch.empty(room, device=device, memory_format=torch.channels_last if last else torch.contiguous_format)
    turned = base.permute([axes.index(axis) for axis in range(len(axes))])
    return turned[: shape[0]] if shape else turned


FAMILIES = {
    "add": lambda x, y: (aten.add.Tensor, (x, y)),
    "number": lambda x, y: (aten.mul.Tensor, (x, 2.0)),
    "compared": lambda x, y: (aten.le.Tensor, (x, y)),
    "where": lambda x, y: (aten.where.self, (x > 0, x, y)),
    "masked": lambda x, y: (aten.masked_fill.Scalar, (x, y > 0, 0.0)),
    "softmax": lambda x, y: (aten._softmax.default, (x, 0, False)),
    "cat": lambda x, y: (aten.cat.default, ([x, y], 0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_by_rule_are_those_of_the_kernels_of_the_cpu(family):
    said_often = 0
    for seed in range(400):
        found = []
        for device in ("meta", "cpu"):
            choose = random.Random(seed)
            size = [choose.choice((1, 2, 3, 5)) for _ in range(choose.randint(1, 5))]
            operator, args = FAMILIES[family](laid_out(size, device, choose), laid_out(size, device, choose))
            try:
                found.append((operator(*args), RULES[id(operator)](*args) if device == "meta" else None))
            except (RuntimeError, IndexError):  # shapes that do not fit
                break
        else:
            (meta_made, said), (made, _) = found
            if said is not None:
                said_often += 1
                assert said.shape == meta_made.shape == made.shape
                assert said.stride() == meta_made.stride() == made.stride()
    assert said_often > 100


def test_a_result_that_is_there_already_stays():
    place = torch.empty_like(A)
    assert RULES[id(aten.softmax.int_out)](A, 2, out=place) is place
    assert aten.softmax.int_out(A, 2, out=place) is place
    assert RULES[id(aten._softmax_backward_data.out)](A, A, 2, A.dtype, grad_input=place) is place
    assert aten._softmax_backward_data.out(A, A, 2, A.dtype, grad_input=place) is place
