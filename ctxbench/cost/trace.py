"""Exact FLOPs and exact allocator peak of any module at any length, on fake tensors: no memory, no arithmetic."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.nn.modules import activation

from ctxbench import workload
from ctxbench.cost.custom import CustomFunctions
from ctxbench.cost.meter import Meter, Trace
from ctxbench.cost.shadow import MetaCalls, ShadowMeter
from ctxbench.method import Dims, Method, Params

LEAST_PROBE, MOST_MEMORY = 512, 1024
RAGGED = 76  # tokens after the last boundary
RARELY = 50_000  # new objects between two looks of the collector


class Way(NamedTuple):
    """How the fast engine follows a module.

    ``values``: it may make tensors that have values. ``redirect``: those without a device are none (``MetaCalls``).
    """

    values: bool = True
    redirect: bool = False


WAYS = Way(values=False), Way(redirect=True), Way()
# What to trace a series with, by the names under which processes tell each other.
ENGINES = {"fake": None, "meta": WAYS[0], "meta, redirected": WAYS[1], "meta, with values": WAYS[2]}


def trace(
    method: Method, dims: Dims, params: Params, impl: str, mode: str = "forward", dtype: str = "fp32",
    device: str = "cpu",
) -> Trace:  # fmt: skip
    """Trace one call of ``mode``; never allocates the tensors it describes.

    Long cells go to the fast engine (see ``cost.shadow``) when it agrees with fake tensors at a short length.
    """
    subject = (method, params, impl, mode, dtype)
    with _older_objects_uncollected():
        if device == "cpu" and mode != "decode":
            way = _agreement(dims, *subject)
            found = None if way is None else _trace_shadow(dims, *subject, way)
            if found is not None:
                return found
        return _trace_fake(dims, *subject, device)


_AGREED: dict[tuple[Any, ...], tuple[Method, Way | None]] = {}  # the method is kept, so that its id is not used again


def engine(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> str:
    """One of ENGINES once both were compared for a cell of this series in this process; empty before."""
    subject = (method, params, impl, mode, dtype)
    key = _series(dims, *subject)
    return next(name for name, way in ENGINES.items() if way == _AGREED[key][1]) if key in _AGREED else ""


def trust(engine: str, dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> None:
    """Take over what another process found when it compared both engines for a cell of this series."""
    _AGREED[_series(dims, method, params, impl, mode, dtype)] = method, ENGINES[engine]


def _series(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> tuple[Any, ...]:
    return id(method), dims.replace(seq_len=_probe_len(method, params, mode)), params, impl, mode, dtype


def _agreement(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> Way | None:
    """How the fast engine follows a cell; None where it may not be used.

    Both engines trace a probe, which is worth its time for lengths well beyond it. The answer holds for every length.
    """
    subject = (method, params, impl, mode, dtype)
    key = _series(dims, *subject)
    if key not in _AGREED:
        short: Dims = key[1]
        if dims.seq_len <= 2 * short.seq_len:
            return None
        _AGREED[key] = method, _compare(short, *subject)
    return _AGREED[key][1]


def _compare(short: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str) -> Way | None:
    """The first way of the fast engine whose trace is that of fake tensors; None where there is none."""
    subject = (method, params, impl, mode, dtype)
    try:
        fake = _trace_fake(short, *subject, "cpu")
    except Exception:  # a length that the module does not take: its own will say the same, or be traced
        return None
    for way in WAYS:
        probe = _trace_shadow(short, *subject, way)
        if probe is not None and _same(probe, fake):
            return way
    return None


def _probe_len(method: Method, params: Params, mode: str) -> int:
    """Two segments or pieces and a ragged one, and more tokens than the memory that a method is likely to have."""
    segment = method.segment_len(params) if method.segment or mode == "stream" else 0
    memory = int(getattr(params, method.memory_parameter)) if method.memory_parameter else 0
    return max(2 * segment, min(memory, MOST_MEMORY), LEAST_PROBE) + RAGGED


def _trace_fake(dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str, device: str) -> Trace:
    meter = Meter()
    parameters, carried, untraceable = 0, None, ""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _quiet_fake_tensors():
        try:
            with _fake_modules_convert():
                work = workload.prepare(method, dims, params, impl, mode, dtype, device, rotate=1)
            parameters, carried = _describe(work, dims)
            _ignore_live(meter, work)
            with uncompiled_flex_attention(), meter:
                y = work.call()
            del y
        except Exception as error:
            if not _is_data_dependent(error):
                raise
            untraceable = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    del fake
    return replace(meter.result(), num_parameters=parameters, state_bytes=carried, untraceable=untraceable)


def _trace_shadow(
    dims: Dims, method: Method, params: Params, impl: str, mode: str, dtype: str, way: Way = WAYS[-1]
) -> Trace | None:
    """The same on meta tensors; None where this engine cannot follow the module."""
    meter = ShadowMeter(way.values)
    calls = MetaCalls(meter) if way.redirect else contextlib.nullcontext()
    try:
        work = workload.prepare(method, dims, params, impl, mode, dtype, "meta", rotate=1)
        parameters, carried = _describe(work, dims)
        _ignore_live(meter, work)
        with _meta_takes_fast_paths(), CustomFunctions(meter), calls, meter:
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
def _older_objects_uncollected() -> Iterator[None]:
    """Spare the collector all that was there before, and let it look rarely: a long trace makes very many objects."""
    if gc.get_freeze_count():  # somebody else did it, and may rely on it
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(thresholds[0], RARELY) if thresholds[0] else 0, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


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
def uncompiled_flex_attention() -> Iterator[None]:
    """Let FlexAttention reach the dispatcher as one operator: its compiler cannot run under a dispatch mode.

    What is only counted has a backward pass on the CPU too.
    """
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG, flex_attention._validate_device

    def known(q: torch.Tensor, *others: torch.Tensor) -> None:
        if q.device.type != "cpu":
            before[1](q, *others)

    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    flex_attention._validate_device = known  # type: ignore[assignment]
    try:
        yield
    finally:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG, flex_attention._validate_device = before


@contextlib.contextmanager
def _meta_takes_fast_paths() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` choose as on the CPU, where it takes one operator for itself if it can.

    It would not on a device that it does not know, nor while calls are watched.
    """
    before = activation._check_arg_device, torch.overrides.has_torch_function

    def known(tensor: torch.Tensor | None) -> bool:
        return tensor is None or tensor.is_meta or before[0](tensor)

    activation._check_arg_device = known  # type: ignore[assignment]
    torch.overrides.has_torch_function = lambda arguments: False  # type: ignore[assignment]
    try:
        yield
    finally:
        activation._check_arg_device, torch.overrides.has_torch_function = before


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
