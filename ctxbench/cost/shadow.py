"""The tracer's fast engine: meta tensors, and a memory of what calls did to operands of given shapes.

A meta tensor has no device to pretend to be, so torch would choose other kernels than on the CPU: fused attention would
fall apart into its plain form. Here it is sent to the CPU's own operator. Whatever else might differ is not trusted but
compared: ``trace`` uses this engine only for a cell of which both engines say the same at a short length.

A loop over blocks repeats itself thousands of times. What an operator makes of meta tensors depends on their shapes,
strides and types and on its other arguments, so the second time its results are made, and its work counted, from
memory. Custom autograd functions are remembered as a whole (see ``cost.custom``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ctxbench.cost.meter import Meter, Trace, Traits, Work, tensors_in
from ctxbench.cost.outcomes import Memory, New, NotRemembered, Operand, Outcome, Several, metadata, recipe_of, shapes
from ctxbench.cost.rules import META, RULES

_UNSAFE_VIEW, _DETACH = torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_DIFFERENTIATES = frozenset({torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad})
_WRITE = torch.Tensor.__setitem__
_Tensor, _empty = torch.Tensor, torch.empty_strided
_unheard, _no_dispatch = torch._C.DisableTorchFunction, torch._C._DisableTorchDispatch
_grad_enabled, _hears = torch.is_grad_enabled, torch._C._is_torch_function_mode_enabled

_OLD = frozenset({Operand, type(None)})  # recipes that make no tensor

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

    def __init__(self, makes_values: bool = True) -> None:
        """``makes_values``: whether tensors with values may be made."""
        super().__init__()
        self._makes_values = makes_values
        self._seen: dict[Any, Memory] = {}  # by what was called (operators by their id), then how
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

        Nobody else in the process sees them meanwhile either. Attention is sent to the CPU's operator.
        """
        if not self._depth:
            self._passing = torch.library.Library("aten", "IMPL")
            for name in _UNSEEN:
                self._passing.impl(name, torch.library.fallthrough_kernel, "Python")
            self._passing.impl("scaled_dot_product_attention", _attend, "AutogradMeta")
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
        for outcomes in self._seen.values():
            self._settle(outcomes)
        return super().result()

    def _settle(self, outcomes: Memory) -> None:
        """Count what was met again."""
        for seen in outcomes.values():
            for work in seen.works:
                super()._add(work, seen.again)
            seen.again = 0

    def recall(self, what: Any, args: Any, run: Callable[..., Any], form: Any) -> Any:
        """The results of ``run``, which calls ``what`` on these arguments; ``form`` stands for further ones."""
        outcomes = self._seen.get(what)
        if outcomes is None:
            outcomes = self._seen[what] = Memory(metadata)
        key = outcomes.key(args, None, form)
        if key is None:
            return run()
        seen = outcomes.get(key)
        if seen is None:
            return self._watch(what, key, args, None, run, form)
        if type(seen.recipe) in _OLD:
            return self._again(seen, args)
        with _no_dispatch():  # no mode may see how results are made
            return self._again(seen, args)

    def _again(self, seen: Outcome, args: Any, kwargs: Any = None) -> Any:
        """Count a remembered call and make its results."""
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
        if recipe is None:
            return None
        if kind is Operand and recipe.number == 0 and args and type(args[0]) is _Tensor:
            return args[0]
        return self._make(recipe, _operands(args, kwargs))

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _hears():  # asking a tensor for its shape would be a call of that mode, too
            with _unheard():
                return self.dispatched(operator, args, kwargs)
        return self.dispatched(operator, args, kwargs)

    def dispatched(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Pass an operator on and count it, from memory where it was met before."""
        outcomes = self._seen.get(id(operator))  # its own hash is slow
        if outcomes is not None:
            key = outcomes.key(args, kwargs)
            seen = outcomes.get(key)
            if seen is not None:
                return self._again(seen, args, kwargs)
        elif operator is _DETACH:  # what torch does to each result that it keeps for the backward pass
            return args[0].detach()
        elif operator is _UNSAFE_VIEW:  # whose own recipe for meta tensors is slow
            return args[0].view(args[1])
        elif id(operator) not in self._traits:
            self._learn(operator)
            return self.dispatched(operator, args, kwargs)
        else:
            key = None
        kwargs, traits = kwargs or {}, self._traits[id(operator)]
        if traits.idle:
            return operator(*args, **kwargs)
        if traits.composite:
            return super().dispatched(operator, args, kwargs)
        if key is None:
            return self._run(traits, args, kwargs)
        return self._watch(id(operator), key, args, kwargs, lambda: self._run(traits, args, kwargs))

    def _learn(self, operator: Any) -> Traits:
        traits = super()._learn(operator)
        if not traits.idle and not traits.composite:
            self._seen[id(operator)] = Memory(shapes if traits.in_place else metadata)
        return traits

    def _watch(self, what: Any, key: Any, args: Any, kwargs: Any, run: Callable[..., Any], form: Any = None) -> Any:
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
        outcomes = self._seen.get(what)
        if outcomes is None:  # passed by since
            return out
        try:
            recipe, fresh = recipe_of(out, _operands(args, kwargs))
            if not works:
                raise NotRemembered
        except NotRemembered:
            self.passes(what)
            return out
        # Nothing but the results may have stayed, and an operand that was written may not have been resized.
        if self.live - live == fresh and (fresh or key == outcomes.key(args, kwargs, form)):
            outcomes[key] = Outcome(recipe, works, rise)
            if len(outcomes) % PATIENCE == 0 and sum(seen.again for seen in outcomes.values()) < len(outcomes):
                self.passes(what)  # it rarely comes again
        return out

    def passes(self, what: Any) -> None:
        """Never remember this again."""
        if what in self._seen:
            self._settle(self._seen.pop(what))
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
        out = _empty(recipe.shape, recipe.stride, dtype=recipe.dtype, device=META)
        self._own(out.untyped_storage(), recipe.size)
        return out

    def _call(self, traits: Traits, args: Any, kwargs: Any) -> Any:
        if traits.in_place and args[0].device.type == "meta":  # nothing would happen, slowly
            return args[0]
        rule = RULES.get(id(traits.operator))
        if rule is not None:
            out = rule(*args, **kwargs)
            if out is not None:
                return out
        out = super()._call(traits, args, kwargs)
        if not self._makes_values and not all(made.is_meta or not made.dim() for made in tensors_in(out)):
            raise NotShadowed(f"{traits.name} makes values")
        return out

    def _add(self, work: Work, times: int = 1) -> None:
        super()._add(work, times)
        if self._watching:
            self._log.append(work)


class MetaCalls(TorchFunctionMode):
    """Makes tensors without a device meta tensors, too.

    A module that makes its masks on the CPU is then followed, as long as it does not read them. Such a mask may be
    written row by row: a write is remembered as a whole, by how much it takes.
    """

    def __init__(self, meter: ShadowMeter):
        super().__init__()
        self.meter, self._constructors = meter, _device_constructors()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _WRITE and not (_grad_enabled() and any(map(_records, args))):
            extent = _extent(args[1], args[0].shape)
            if extent is not None:
                return self.meter.recall(_WRITE, args[::2], lambda: function(*args), extent)
        kwargs = kwargs or {}
        if function in _DIFFERENTIATES:
            with self._in_the_engine():
                return function(*args, **kwargs)
        if function in self._constructors and kwargs.get("device") is None:
            kwargs["device"] = META
        return function(*args, **kwargs)

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


def _operands(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """All tensors among the arguments of a call."""
    return tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)


def _records(value: Any) -> bool:
    """Whether gradients of what is done with a value would be recorded."""
    return isinstance(value, _Tensor) and value.requires_grad


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
