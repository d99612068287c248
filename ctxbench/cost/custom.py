"""Custom autograd functions from memory: for the tracer's fast engine one call of ``forward`` or ``backward`` is one.

What such a function does follows from its arguments and, backward, from what it saved. Where it shows more (tensors
changed in place, attributes that are neither plain values nor tensors), its operators are followed one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import Function, FunctionCtx, _SingleLevelFunction

from ctxbench.cost.meter import tensors_in

_unheard = torch._C.DisableTorchFunction  # asking a tensor for its shape would be a call of a function mode, too
_heard = torch._C._EnableTorchFunction


class CustomFunctions:
    """Within it, custom functions are recalled by a meter: it replaces their ``forward`` and ``backward``.

    Every function is met when it is first applied.
    """

    def __init__(self, meter: Any):
        self.meter = meter
        self._replaced: dict[Any, dict[str, Any]] = {}  # function -> what stood in its own namespace
        self._shows_more = False  # the call being watched asked for what is not written down

    def __enter__(self) -> CustomFunctions:
        self._apply, self._materialize = Function.__dict__["apply"], FunctionCtx.set_materialize_grads
        apply, materialize = self._apply.__func__, self._materialize

        def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if cls not in self._replaced:
                self._replace(cls)
            return apply(cls, *args, **kwargs)

        def noted(ctx: Any, value: bool) -> None:
            self._shows_more = True
            materialize(ctx, value)

        Function.apply = classmethod(applied)  # type: ignore[assignment, method-assign]
        FunctionCtx.set_materialize_grads = noted  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        Function.apply, FunctionCtx.set_materialize_grads = self._apply, self._materialize  # type: ignore[method-assign]
        for cls, own in self._replaced.items():
            for name in ("forward", "backward"):
                delattr(cls, name)
            for name, value in own.items():
                setattr(cls, name, value)

    def _replace(self, cls: Any) -> None:
        own = {name: cls.__dict__[name] for name in ("forward", "backward") if name in cls.__dict__}
        forward, backward = cls.forward, cls.backward
        apart = cls.setup_context is not _SingleLevelFunction.setup_context
        plain = apart or cls.vjp is not Function.vjp or getattr(cls, "boxed_grads_call", False)
        self._replaced[cls] = own
        cls.forward = staticmethod(forward if plain else self._remembering(forward, self._forward))
        cls.backward = staticmethod(backward if plain else self._remembering(backward, self._backward))

    def _remembering(self, function: Callable[..., Any], recall: Callable[..., Any]) -> Callable[..., Any]:
        what = id(function)

        def remembered(ctx: Any, *args: Any) -> Any:
            if what in self.meter.passed or torch.is_grad_enabled():
                return function(ctx, *args)
            with _unheard():
                return recall(what, function, ctx, args)

        return remembered

    def _forward(self, what: int, function: Callable[..., Any], ctx: Any, args: Any) -> Any:
        ran = False

        def run() -> Any:
            nonlocal ran
            ran, self._shows_more = True, False
            with _heard():
                out = function(ctx, *args)
            if ctx.dirty_tensors or self._shows_more:
                self.meter.passes(what)
            return out, ctx.to_save, ctx.non_differentiable, tuple(ctx.__dict__.items())

        form = _twice(args), ctx.needs_input_grad
        out, saved, fixed, attributes = self.meter.recall(what, args, run, form)
        if not ran:
            if saved:
                ctx.save_for_backward(*saved)
            if fixed:
                ctx.mark_non_differentiable(*fixed)
            ctx.__dict__.update(attributes)
        return out

    def _backward(self, what: int, function: Callable[..., Any], ctx: Any, args: Any) -> Any:
        saved = ctx.saved_tensors
        operands = (args, saved, tuple(ctx.__dict__.items()))

        def run() -> Any:
            with _heard():
                return function(ctx, *args)

        return self.meter.recall(what, operands, run, (_twice(operands), ctx.needs_input_grad))


def _twice(args: Any) -> tuple[int, ...]:
    """Which tensors share a storage, as the number of the first that has it: a function can ask that."""
    first: dict[int, int] = {}
    return tuple(
        first.setdefault(tensor.untyped_storage()._cdata, number) for number, tensor in enumerate(tensors_in(args))
    )
