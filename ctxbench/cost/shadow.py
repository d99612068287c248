"""The tracer's fast engine: meta tensors, and a memory of what calls did to operands of given shapes.

A meta tensor has no device to pretend to be, so torch would choose other kernels than on the CPU: fused attention would
fall apart into its plain form. Here it is sent to the CPU's own operator. Whatever else might differ is not trusted but
compared: ``trace`` uses this engine only for a cell of which both engines say the same at a short length.

A loop over blocks repeats itself thousands of times. What a call makes of meta tensors depends on their shapes, strides
and types and on its other arguments, so the second time its results are made, and its work counted, from memory. This
holds for single operators, and where no gradients are recorded for whole functions of torch.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ctxbench.cost.meter import Meter, Trace, Traits, Work, tensors_in
from ctxbench.cost.outcomes import New, NotRemembered, Operand, Outcome, Several, metadata, recipe_of
from ctxbench.cost.rules import META, RULES

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Functions that always give a view: no work and no storage, so no meter need see them.
_VIEWS = frozenset(
    function
    for name in """
        transpose permute expand unsqueeze squeeze select narrow split chunk unbind diagonal as_strided view view_as
        unflatten movedim swapaxes t
    """.split()  # noqa: SIM905
    for function in (getattr(torch.Tensor, name, None), getattr(torch, name, None))
    if function is not None
) | {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
_DIFFERENTIATES = frozenset({torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad})
_BASIC = frozenset({int, slice, type(None), type(Ellipsis)})
_READ, _WRITE = torch.Tensor.__getitem__, torch.Tensor.__setitem__
_Tensor, _empty, _no_dispatch = torch.Tensor, torch.empty_strided, torch._C._DisableTorchDispatch
_grad_enabled = torch.is_grad_enabled

# Functions that change what is no part of a tensor's shape, stride and type.
_CHANGES_FORM = frozenset({"set_", "requires_grad_", "detach_", "share_memory_"})


PATIENCE = 1024  # outcomes of one function after which those must have been met again on average


# Operators that always give a view: no work and no storage, so that they may pass the meter by.
_UNSEEN = """
    alias as_strided detach expand permute select.int slice.Tensor split.Tensor split_with_sizes squeeze squeeze.dim
    squeeze.dims t transpose.int unbind.int unfold unsqueeze view diagonal
""".split()  # noqa: SIM905


class NotShadowed(Exception):
    """A call whose kernel on the CPU is not known here; fake tensors decide."""


class ShadowMeter(Meter):
    """A meter for meta tensors that remembers the outcomes of calls whose results are new tensors or their operands."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[Any, Outcome] = {}
        self._outcomes: dict[Any, list[Outcome]] = defaultdict(list)  # the same, by what was called
        self._log: list[Work] = []  # of the calls that are being watched
        self._watching = self._depth = 0
        self.passed: set[Any] = set()  # what is never remembered

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps every call of this mode against its compiler, which would double what one costs.

        A module that compiles itself is then followed by fake tensors alone.
        """
        return False

    def __enter__(self) -> ShadowMeter:
        """Let views go from autograd straight to their kernels: half of what a training step dispatches are views.

        Nobody else in the process sees them meanwhile either.
        """
        if not self._depth:
            self._passing = torch.library.Library("aten", "IMPL")
            for name in _UNSEEN:
                self._passing.impl(name, torch.library.fallthrough_kernel, "Python")
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._passing._destroy()

    def result(self) -> Trace:
        """What was seen so far."""
        for seen in self._seen.values():
            for work in seen.works:
                self._add(work, seen.again)
            seen.again = 0
        return super().result()

    def recall(self, what: Any, args: Any, kwargs: Any, run: Callable[..., Any], form: Any = None) -> Any:
        """The results of ``run``, which calls ``what`` on these arguments; ``form`` stands for further ones."""
        key = self._key(what, form, args, kwargs)
        if key is None:
            return run()
        seen = self._seen.get(key)
        if seen is None:
            return self._watch(key, args, kwargs, run)
        with _no_dispatch():
            return self._again(seen, args, kwargs)

    def _again(self, seen: Outcome, args: Any, kwargs: Any) -> Any:
        """Count a remembered call and make its results; no mode may see how."""
        seen.again += 1
        if self._watching:
            self._log += seen.works
        highest = self.live + seen.rise
        if highest > self.peak:
            self.peak = highest
        recipe = seen.recipe
        kind = type(recipe)
        if kind is New:
            return self._new(recipe)
        if kind is Operand and recipe.number == 0 and args and type(args[0]) is _Tensor:
            return args[0]
        return self._make(recipe, tensors_in(args) + tensors_in(kwargs))

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._is_torch_function_mode_enabled():  # asking a tensor for its shape would be such a call, too
            with torch._C.DisableTorchFunction():
                return self.dispatched(operator, args, kwargs or {})
        return self.dispatched(operator, args, kwargs or {})

    def dispatched(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Pass an operator on and count it, from memory where it was met before."""
        what, key = id(operator), None  # its own hash is slow
        if what not in self.passed:
            key = self._key(what, None, args, kwargs)
            if key is not None:
                seen = self._seen.get(key)
                if seen is not None:
                    return self._again(seen, args, kwargs)
        traits = self._traits.get(what) or self._learn(operator)
        if traits.idle:
            if operator is _UNSAFE_VIEW:  # whose own recipe for meta tensors is slow
                return args[0].view(args[1])
            return operator(*args, **kwargs)
        if traits.composite:
            return super().dispatched(operator, args, kwargs)
        if key is None:
            return self._run(traits, args, kwargs)
        return self._watch(key, args, kwargs, lambda: self._run(traits, args, kwargs))

    @staticmethod
    def _key(what: Any, form: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        seen = metadata(args)
        if not kwargs:
            return None if seen is None else (what, form, seen)
        named = metadata(kwargs.items())
        return None if seen is None or named is None else (what, form, seen, named)

    def _watch(self, key: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Run a call for the first time; remember it if it can be."""
        live, peak, start = self.live, self.peak, len(self._log)
        self.peak, self._watching = live, self._watching + 1
        try:
            out = run()
        finally:
            rise, works = self.peak - live, tuple(self._log[start:])
            self.peak, self._watching = max(self.peak, peak), self._watching - 1
            if not self._watching:
                self._log.clear()
        what, form = key[:2]
        try:
            recipe, fresh = recipe_of(out, tensors_in(args) + tensors_in(kwargs))
            if not works or getattr(what, "__name__", "").partition(".")[0] in _CHANGES_FORM:
                raise NotRemembered
        except NotRemembered:
            self.passed.add(what)
            return out
        # Nothing but the results may have stayed, and an operand that was written may not have been resized.
        if self.live - live == fresh and (fresh or key == self._key(what, form, args, kwargs)):
            self._seen[key] = Outcome(recipe, works, rise)
            self._outcomes[what].append(self._seen[key])
            if len(self._outcomes[what]) % PATIENCE == 0:
                self._reconsider(what)
        return out

    def _reconsider(self, what: Any) -> None:
        """Stop remembering what rarely comes again."""
        outcomes = self._outcomes[what]
        if sum(outcome.again for outcome in outcomes) < len(outcomes):
            self.passed.add(what)

    def _make(self, recipe: Any, known: list[torch.Tensor]) -> Any:
        """Results by their recipe; ``known`` as when it was written."""
        kind = type(recipe)
        if kind is New:
            known.append(self._new(recipe))
            return known[-1]
        if kind is Several:
            return recipe.kind([self._make(item, known) for item in recipe.items])
        return known[recipe.number] if kind is Operand else recipe

    def _new(self, recipe: New) -> torch.Tensor:
        shape, stride, dtype, size = recipe
        out = _empty(shape, stride, dtype=dtype, device=META)
        self._own(out.untyped_storage(), size)
        return out

    def _call(self, traits: Traits, args: Any, kwargs: Any) -> Any:
        if traits.in_place and args[0].device.type == "meta":  # nothing would happen, slowly
            return args[0]
        rule = RULES.get(id(traits.operator))
        if rule is not None:
            out = rule(*args, **kwargs)
            if out is not None:
                return out
        return super()._call(traits, args, kwargs)

    def _add(self, work: Work, times: int = 1) -> None:
        super()._add(work, times)
        if self._watching:
            self._log.append(work)


class MetaCalls(TorchFunctionMode):
    """Stands before the dispatcher: sends attention to the CPU's operator, and spares it what needs no metering.

    With ``redirect``, tensors that are made without a device are meta tensors too: a module that makes its masks on
    the CPU is then followed, as long as it does not read them.
    """

    def __init__(self, meter: ShadowMeter, redirect: bool = False):
        super().__init__()
        self.meter, self.redirected = meter, _device_constructors() if redirect else ()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _VIEWS or (function is _READ and _is_basic(args[1])):
            return function(*args, **kwargs)
        if function in _DIFFERENTIATES:
            with self._in_the_engine():
                return function(*args, **kwargs)
        if function is scaled_dot_product_attention:
            function = _attend
        elif function in self.redirected and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if function in self.meter.passed or (_grad_enabled() and _records(args, kwargs)):
            return function(*args, **kwargs)
        if function is _WRITE:
            extent = _extent(args[1], args[0].shape)
            if extent is not None:
                return self.meter.recall(_WRITE, args[::2], kwargs, lambda: function(*args), extent)
        return self.meter.recall(function, args, kwargs, lambda: function(*args, **kwargs))

    @contextlib.contextmanager
    def _in_the_engine(self) -> Iterator[None]:
        """Keep the mode on in the backward passes of functions; torch has it off while one of its calls is handled."""
        run = torch.autograd._engine_run_backward

        def run_watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        torch.autograd._engine_run_backward = run_watched
        try:
            yield
        finally:
            torch.autograd._engine_run_backward = run


def _records(args: Any, kwargs: Any) -> bool:
    """Whether gradients of a call would be recorded."""
    for value in args:
        if isinstance(value, _Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (tuple, list)) and _records(value, None):
            return True
    return bool(kwargs) and _records(tuple(kwargs.values()), None)


def _is_basic(index: Any) -> bool:
    """Whether an index gives a view."""
    return _BASIC.issuperset(map(type, index)) if type(index) is tuple else type(index) in _BASIC


def _extent(index: Any, shape: torch.Size) -> tuple[Any, ...] | None:
    """How much of each axis an index of integers and slices takes, None for any other: where it begins is no matter."""
    items = index if type(index) is tuple else (index,)
    found: list[Any] = []
    if len(items) > len(shape):
        return None
    for item, size in zip(items, shape, strict=False):
        if type(item) is slice:
            try:
                found.append((len(range(*item.indices(size))), item.step))
            except (TypeError, RuntimeError):  # a bound that is a tensor
                return None
        elif type(item) is int and -size <= item < size:
            found.append(None)
        else:
            return None
    return tuple(found)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    fused = q.dim() == k.dim() == v.dim() == 4 and q.shape[3] == k.shape[3] == v.shape[3] and not dropout_p
    if (
        not fused
        or enable_gqa
        or (attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() not in (2, 4)))
    ):
        raise NotShadowed("attention that the fused CPU kernel does not take")
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch converts it before the kernel
        attn_mask = torch.where(
            attn_mask,
            torch.scalar_tensor(0.0, dtype=q.dtype, device=q.device),
            torch.scalar_tensor(float("-inf"), dtype=q.dtype, device=q.device),
        )
    out: torch.Tensor = FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out
