"""The meter behind every count: sees each operator once, forward and backward, and follows storages until they die.

FLOPs of an operator come from ``cost.formulas`` or torch's registry. The running sum of the bytes of live storages is
what the allocator would hold. Temporaries inside a kernel are invisible here (the allocator meter sees them).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ctxbench.cost import formulas

# Operators that multiply no matrices and are neither element-wise (tagged by torch) nor views (seen in the schema).
_NO_MATMUL = frozenset(
    """
    softmax _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _safe_softmax native_layer_norm
    native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward sum mean amax amin max min argmax argmin any
    all prod var std var_mean logsumexp cumsum cumprod cummax logcumsumexp sort topk kthvalue gather scatter
    scatter_add scatter_reduce index index_put index_put_ _index_put_impl_ index_select index_add index_copy
    index_fill masked_fill masked_select masked_scatter embedding embedding_dense_backward copy_ _to_copy clone cat
    stack constant_pad_nd pad roll flip repeat repeat_interleave tril triu tril_ triu_ diag arange linspace zeros
    ones full empty empty_strided empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
    new_empty_strided scalar_tensor lift_fresh lift_fresh_copy rand randn rand_like randn_like normal_ uniform_
    bernoulli native_dropout native_dropout_backward multinomial randint randperm avg_pool1d avg_pool2d
    avg_pool2d_backward _adaptive_avg_pool2d max_pool2d_with_indices max_pool2d_with_indices_backward
    upsample_linear1d upsample_linear1d_backward upsample_nearest1d upsample_nearest1d_backward select_backward
    slice_backward slice_scatter select_scatter unfold_backward as_strided_scatter bincount unique_consecutive
    _unique2 searchsorted bucketize nonzero linalg_vector_norm norm one_hot _local_scalar_dense item equal
    is_same_size set_ resize_ fill_ zero_ _foreach_zero_ detach_ eye scatter_ scatter_add_ scatter_reduce_
    index_add_ index_copy_ index_fill_ masked_fill_ masked_scatter_ take _assert_async _assert_scalar
    _assert_tensor_metadata sym_size sym_stride diagonal_backward diagonal_copy
    floor_divide unsafe_split unsafe_chunk _linalg_check_errors complex polar zeros_and_scatter
    """.split()  # noqa: SIM905
)


_DEVICE = torch.ops.prim.device.default


@dataclass
class Trace:
    """What a call would do.

    Attributes:
        flops: matmul-like FLOPs; ``by_op`` splits them.
        peak_bytes: most bytes alive at once above what was live before the call.
        bytes_moved: operands and results of every operator, each once; a fused kernel is one operator.
        uncounted: operators that may multiply matrices and have no formula, with how often they ran.
        coverage: share of ``bytes_moved`` whose operator is understood.
        untraceable: the operator that stopped the tracer (a shape that depends on a value), else empty.
    """

    flops: int = 0
    by_op: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    bytes_moved: int = 0
    uncounted: dict[str, int] = field(default_factory=dict)
    coverage: float = 1.0
    state_bytes: int | None = None
    num_parameters: int = 0
    untraceable: str = ""


class Work(NamedTuple):
    """What one operator did; ``flops`` is None where it has no formula, ``unknown`` where it should have one."""

    name: str
    flops: int | None
    traffic: int
    unknown: bool


class Traits(NamedTuple):
    """What a meter asks of an operator once."""

    operator: Any
    name: str
    idle: bool  # a query or a view: no work, and no storage that is not followed already
    composite: bool  # a recipe of other operators, and without a formula of its own
    count: Any  # (args, kwargs, out) -> FLOPs, or None
    suspect: bool  # may multiply matrices, as far as can be known
    in_place: bool  # writes its first argument and returns that, no more


class Meter(TorchDispatchMode):
    """Counts every dispatched operator and follows every storage; usable on real and on fake tensors."""

    supports_higher_order_operators = True  # FlexAttention arrives like any operator

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.moved = self.moved_unknown = 0
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}  # id of a storage -> weak reference, so that ids are not reused unnoticed
        self._on_death = self._release
        self._traits: dict[int, Traits] = {}  # by the id of the operator, whose own hash is slow

    def ignore(self, *values: Any) -> None:
        """Take these tensors as live before the call."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, 0)

    def result(self) -> Trace:
        """What was seen so far."""
        return Trace(
            flops=sum(self.flops.values()),
            by_op=dict(self.flops),
            peak_bytes=self.peak,
            bytes_moved=self.moved,
            uncounted=dict(self.uncounted),
            coverage=1.0 - self.moved_unknown / self.moved if self.moved else 1.0,
        )

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatched(operator, args, kwargs or {})

    def dispatched(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Pass an operator on and count it."""
        traits = self._traits.get(id(operator)) or self._learn(operator)
        if traits.idle:
            if operator is _DEVICE and isinstance(args[0], FakeTensor):  # asked several times an operator
                return args[0].fake_device
            return operator(*args, **kwargs)
        if traits.composite:
            with self:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(traits, args, kwargs)

    def _learn(self, operator: Any) -> Traits:
        idle = getattr(operator, "namespace", "") == "prim" or _is_view(operator)
        count = None if idle else formulas.lookup(operator)
        composite = not idle and count is None and _may_decompose(operator)
        suspect, in_place = not _multiplies_nothing(operator), _is_in_place(operator)
        traits = Traits(operator, _name(operator), idle, composite, count, suspect, in_place)
        self._traits[id(operator)] = traits
        return traits

    def _run(self, traits: Traits, args: Any, kwargs: Any) -> Any:
        """Run one operator, follow what it touches and count what it does."""
        operands = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        traffic = 0
        for operand in operands:
            self._follow(operand, 0)
            traffic += operand.numel() * operand.element_size()
        out = self._call(traits, args, kwargs)
        for result in tensors_in(out):
            self._follow(result, None)
            traffic += result.numel() * result.element_size()
        flops = None if traits.count is None else int(traits.count(args, kwargs, out))
        self._add(Work(traits.name, flops, traffic, flops is None and traffic > 0 and traits.suspect))
        return out

    def _call(self, traits: Traits, args: Any, kwargs: Any) -> Any:
        return traits.operator(*args, **kwargs)

    def _add(self, work: Work, times: int = 1) -> None:
        self.moved += work.traffic * times
        if work.flops is not None:
            self.flops[work.name] += work.flops * times
        elif work.unknown:
            self.uncounted[work.name] += times
            self.moved_unknown += work.traffic * times

    def _follow(self, tensor: torch.Tensor, size: int | None) -> None:
        """Follow a tensor's storage; ``size`` is what counts of it, all for None."""
        if tensor.layout is torch.strided:  # sparse tensors have no storage of their own
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._own(storage, storage.nbytes() if size is None else size)

    def _own(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage until it dies."""
        reference = Reference(storage, self._on_death)
        reference.identity = identity = storage._cdata
        reference.size = size
        self._known[identity] = reference
        self.live += size
        if self.live > self.peak:
            self.peak = self.live

    def _release(self, reference: Reference) -> None:
        self._known.pop(reference.identity, None)
        self.live -= reference.size


class Reference(weakref.ref[torch.UntypedStorage]):
    """A storage that is counted; lighter than a function of its own for each."""

    __slots__ = ("identity", "size")
    identity: int
    size: int


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator; faster than torch's tree walk."""
    if isinstance(value, torch.Tensor):
        return [value]
    found = []
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += tensors_in(item)
    return found


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's whole storage."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0


def _name(operator: Any) -> str:
    return str(getattr(operator, "overloadpacket", operator))


def _may_decompose(operator: Any) -> bool:
    """Whether an operator is only a recipe of others; asked once, because entering the mode again costs more."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return hasattr(operator, "decompose") and (
        key in operator.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)
    )


def _is_view(operator: Any) -> bool:
    if operator is torch.ops.aten._unsafe_view.default:
        return True
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return False
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _is_in_place(operator: Any) -> bool:
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or torch.Tag.inplace_view in operator.tags:
        return False
    aliases = [value.alias_info is not None for value in (*schema.arguments, *schema.returns)]
    return (
        schema.name.endswith("_")
        and schema.name != "aten::_resize_output_"
        and aliases == [True] + [False] * (len(aliases) - 2) + [True]
    )


def _multiplies_nothing(operator: Any) -> bool:
    if torch.Tag.pointwise in getattr(operator, "tags", ()):
        return True
    namespace, _, name = _name(operator).rpartition(".")
    return namespace in ("aten", "prims", "prim", "flex_lib") and (
        name in _NO_MATMUL or name.rstrip("_") in _NO_MATMUL or name.endswith("_copy")
    )
