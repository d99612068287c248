"""Exact FLOPs and exact allocator peak of any module at any length, on fake tensors: no memory, no arithmetic.

Every operator that reaches the dispatcher is seen once, forward and backward. Its FLOPs come from ``cost.formulas`` or
torch's registry; its outputs' storages are followed until they die, so that the running sum is what the allocator
would hold. Temporaries inside a kernel are invisible here (the allocator meter sees them).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ctxbench import workload
from ctxbench.cost import formulas, shadow
from ctxbench.method import Dims, Method, Params

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
    floor_divide unsafe_split unsafe_chunk _linalg_check_errors complex polar
    """.split()  # noqa: SIM905
)


_DEVICE = torch.ops.prim.device.default
PROBE = 1500  # tokens at which both engines must agree: two default segments and a ragged one


@dataclass
class Trace:
    """What a call would do.

    Attributes:
        flops: matmul-like FLOPs; ``by_op`` splits them.
        peak_bytes: most bytes alive at once above what was live before the call.
        bytes_moved: sum of operand and result sizes over all operators: the unfused upper bound.
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
        kwargs = kwargs or {}
        if operator is _DEVICE and isinstance(args[0], FakeTensor):  # asked several times an operator: answer at once
            return args[0].fake_device
        if getattr(operator, "namespace", "") == "prim":  # other queries: no work, no storage
            return operator(*args, **kwargs)
        if _is_view(operator):  # no work, and a storage that is followed already
            return operator(*args, **kwargs)
        count = formulas.lookup(operator)
        if count is None and _may_decompose(operator):
            with self:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(operator, count, args, kwargs)[0]

    def _run(self, operator: Any, count: Any, args: Any, kwargs: Any) -> tuple[Any, Work]:
        """Run one operator, follow what it touches and count what it does."""
        operands = _tensors(args) + _tensors(kwargs) if kwargs else _tensors(args)
        for operand in operands:
            self._follow(operand, 0)
        out = operator(*args, **kwargs)
        results = _tensors(out)
        for result in results:
            self._follow(result, _storage_bytes(result))
        flops = None if count is None else int(count(args, kwargs, out))
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*operands, *results))
        unknown = flops is None and traffic > 0 and not _multiplies_nothing(operator)
        work = Work(_name(operator), flops, traffic, unknown)
        self._add(work)
        return out, work

    def _add(self, work: Work) -> None:
        self.moved += work.traffic
        if work.flops is not None:
            self.flops[work.name] += work.flops
        elif work.unknown:
            self.uncounted[work.name] += 1
            self.moved_unknown += work.traffic

    def _follow(self, tensor: torch.Tensor, size: int) -> None:
        if tensor.layout is not torch.strided:  # sparse tensors have no storage of their own
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known:
            return

        def release(_: Any, identity: int = identity, size: int = size) -> None:
            self._known.pop(identity, None)
            self.live -= size

        self._known[identity] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


class ShadowMeter(Meter):
    """A meter for meta tensors that asks torch only once what an operator makes of operands of given shapes.

    A loop over segments repeats itself hundreds of times, and torch answers in Python. Only an operator whose results
    are new tensors is remembered; one that writes or gives a view always runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[Any, tuple[Any, Work]] = {}

    def _run(self, operator: Any, count: Any, args: Any, kwargs: Any) -> tuple[Any, Work]:
        if not shadow.is_pure(operator):
            return super()._run(operator, count, args, kwargs)
        key = (operator, shadow.metadata(args), shadow.metadata(kwargs))
        seen = self._seen.get(key)
        if seen is None:
            out, work = super()._run(operator, count, args, kwargs)
            self._seen[key] = shadow.recipe(out), work
            return out, work
        recipe, work = seen
        out = shadow.make(recipe)
        for result in _tensors(out):
            self._follow(result, _storage_bytes(result))
        self._add(work)
        return out, work


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator; faster than torch's tree walk."""
    if isinstance(value, torch.Tensor):
        return [value]
    found = []
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += _tensors(item)
    return found


def _storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0


@cache
def _name(operator: Any) -> str:
    return str(getattr(operator, "overloadpacket", operator))


@cache
def _may_decompose(operator: Any) -> bool:
    """Whether an operator is only a recipe of others; asked once, because entering the mode again costs more."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return hasattr(operator, "decompose") and (
        key in operator.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)
    )


@cache
def _is_view(operator: Any) -> bool:
    if operator is torch.ops.aten._unsafe_view.default:
        return True
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return False
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


@cache
def _multiplies_nothing(operator: Any) -> bool:
    if torch.Tag.pointwise in getattr(operator, "tags", ()):
        return True
    namespace, _, name = _name(operator).rpartition(".")
    return namespace in ("aten", "prims", "prim") and (
        name in _NO_MATMUL or name.rstrip("_") in _NO_MATMUL or name.endswith("_copy")
    )


def trace(
    method: Method, dims: Dims, params: Params, impl: str, mode: str = "forward", dtype: str = "fp32",
    device: str = "cpu",
) -> Trace:  # fmt: skip
    """Trace one call of ``mode``; never allocates the tensors it describes.

    Long cells go to the fast engine (see ``cost.shadow``) when it agrees with fake tensors at a short length.
    """
    subject = (method, params, impl, mode, dtype)
    if device == "cpu" and mode != "decode" and dims.seq_len > 2 * PROBE:
        short = dims.replace(seq_len=PROBE)
        probe = _trace_shadow(short, *subject)
        fake = _trace_fake(short, *subject, device) if probe is not None else None
        if probe is not None and fake is not None and _same(probe, fake):
            found = _trace_shadow(dims, *subject)
            if found is not None:
                return found
    return _trace_fake(dims, *subject, device)


def _trace_fake(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str, device: str) -> Trace:
    meter = Meter()
    parameters, carried, untraceable = 0, None, ""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _quiet_fake_tensors():
        try:
            with _fake_modules_convert():
                work = workload.prepare(method, dims, params, impl, mode, dtype, device, rotate=1)
            parameters, carried = _describe(work, dims)
            _ignore_live(meter, work)
            with _uncompiled_flex_attention(), meter:
                y = work.call()
            del y
        except Exception as error:
            if not _is_data_dependent(error):
                raise
            untraceable = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    del fake
    return replace(meter.result(), num_parameters=parameters, state_bytes=carried, untraceable=untraceable)


def _trace_shadow(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> Trace | None:
    """The same on meta tensors; None where this engine cannot follow the module."""
    meter = ShadowMeter()
    try:
        work = workload.prepare(method, dims, params, impl, mode, dtype, "meta", rotate=1)
        parameters, carried = _describe(work, dims)
        _ignore_live(meter, work)
        with shadow.CpuAttention(), meter:
            y = work.call()
        del y
    except Exception:  # whatever stopped it, fake tensors give the answer or the reason
        return None
    return replace(meter.result(), num_parameters=parameters, state_bytes=carried)


def _same(one: Trace, other: Trace) -> bool:
    """Whether two engines agree on everything but the size of constants that an operator was given as a number."""
    return not other.untraceable and replace(one, bytes_moved=0, coverage=1.0) == replace(
        other, bytes_moved=0, coverage=1.0
    )


def _describe(work: workload.Workload, dims: Dims) -> tuple[int, int | None]:
    """Trainable elements, and the bytes of a state after all tokens where the mode carries one."""
    carried = None
    if work.mode in ("stream", "decode"):
        state = work.state if work.state is not None else work.module.state_at(dims.batch_size, dims.seq_len)  # type: ignore[operator]
        carried = workload.state_bytes(state)
    return workload.num_parameters(work.module), carried


def _ignore_live(meter: Meter, work: workload.Workload) -> None:
    meter.ignore(list(work.module.parameters()), list(work.module.buffers()), work.inputs, work.grad, work.state)


@contextlib.contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from logging a traceback of an error that is raised anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _uncompiled_flex_attention() -> Iterator[None]:
    """Let FlexAttention reach the dispatcher as one operator: its compiler cannot run under a dispatch mode."""
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@contextlib.contextmanager
def _fake_modules_convert() -> Iterator[None]:
    """Let ``module.to(...)`` work on fake parameters, which torch refuses because they are weakly referenced."""
    original = torch.nn.Module._apply
    converted: dict[int, tuple[Any, Any]] = {}  # keeps tied parameters tied

    def apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
        if recurse:
            for child in module.children():
                apply(child, function)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in converted:
                    with torch.no_grad():
                        new = torch.nn.Parameter(function(parameter), parameter.requires_grad)
                    converted[id(parameter)] = (parameter, new)
                module._parameters[name] = converted[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
        return module

    torch.nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module._apply = original  # type: ignore[method-assign]


def _is_data_dependent(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "DataDependentOutputException",
            "DynamicOutputShapeException",
            "UnsupportedOperatorException",
            "UnsupportedFakeTensorException",
            "GuardOnDataDependentSymNode",
        }
    )
