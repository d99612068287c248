"""The rules for meta tensors say what torch says, or nothing."""

from __future__ import annotations

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
    (aten.add.Tensor, (A, 1.5), {}),
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
]
REFUSED = [
    (aten._softmax.default, (A.transpose(0, 1), -1, False), {}),
    (aten._softmax.default, (LAST, 1, False), {}),
    (aten._softmax.default, (NARROW, 1, False), {}),  # can be read as channels last, too
    (aten._softmax.default, (A, 1, True), {}),
    (aten.tril.default, (A.transpose(1, 2),), {}),
    (aten.add.Tensor, (meta(5, dtype=torch.int64), 1.5), {}),  # another type comes out
    (aten.add.Tensor, (meta(2, 1, 4, 5), meta(3, 1, 1)), {}),  # the first could be read as channels last
    (aten.mul.Tensor, (MASK, 2), {}),
    (aten.eq.Tensor, (A, meta(5, dtype=torch.float64)), {}),
    (aten.mul.Tensor, (A, meta(2, 3, 5, dtype=torch.float64)), {}),
    (aten.mul.Tensor, (A.transpose(0, 1), A.transpose(0, 1)), {}),
    (aten.masked_fill.Scalar, (meta(5), MASK, 0.0), {}),  # the mask is the larger one
    (aten.masked_fill.Scalar, (meta(3, 5, dtype=torch.int64), MASK, 1.5), {}),  # another type may come out
    (aten.cat.default, ([A, meta(2, 3, 1, dtype=torch.float64)], 2), {}),
    (aten.cat.default, ([A, meta(0)], 2), {}),
    (aten.cat.default, ([A, meta(2, 4, 1)], 2), {}),
    (aten.bmm.default, (A, A), {}),
    (aten.ones.default, ([3, 4],), {"device": torch.device("cpu")}),
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


def test_a_result_that_is_there_already_stays():
    place = torch.empty_like(A)
    assert RULES[id(aten.softmax.int_out)](A, 2, out=place) is place
    assert aten.softmax.int_out(A, 2, out=place) is place
    assert RULES[id(aten._softmax_backward_data.out)](A, A, 2, A.dtype, grad_input=place) is place
    assert aten._softmax_backward_data.out(A, A, 2, A.dtype, grad_input=place) is place
