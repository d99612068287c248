"""Triton's interpreter without what it does again and again, for the programs that hold kernels against float64.

Where TRITON_INTERPRET is 1, which must be set before kernels are imported; elsewhere nothing here does anything.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from fractions import Fraction
from typing import Any

import torch

from ctxbench.implementations._shared import cells_table, lines, relative_tiles, tiles
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations._shared.relative_table import Stair
from ctxbench.implementations.memorizing import search_tiles
from ctxbench.implementations.memory_bank import gate_tiles
from ctxbench.implementations.routing import gathered_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_RUNS = itertools.count()


def mine() -> bool:
    """Whether this process does the next run: where several share a program's, each has a number, ``SHARE=2/16``."""
    own, of = map(int, os.environ.get("SHARE", "0/1").split("/"))
    return next(_RUNS) % of == own


def spare() -> None:
    """Put NumPy under ``triton.language`` once a launch, and once for each module that device functions come from.

    The interpreter would do so for each of their thousands of calls, a third of its time.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        there: set[str] = set()

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            if self.fn.__module__ not in there:
                there.add(self.fn.__module__)
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*arguments, **named)

        interpreter.InterpretedFunction.__call__ = call
        _describe_once()
        check_integers(False)


def _describe_once() -> None:
    """Make the description of a dtype and of a shape once, not again for every tensor: another sixth of the time."""
    from triton.language import core
    from triton.runtime import interpreter

    block, numpy_of = core.block_type.__init__, interpreter._get_np_dtype
    no_sizes = core.tuple([]), core.constexpr(1)
    known: dict[tuple[int, tuple[Any, ...]], dict[str, Any]] = {}  # each keeps its element's type, so that ids stay

    def described(self: Any, element_ty: Any, shape: Any) -> None:
        key = id(element_ty), tuple(getattr(size, "value", size) for size in shape)
        if key not in known:
            block(self, element_ty, shape)
            sizes = core.tuple([core.constexpr(size) for size in self.shape])
            known[key] = dict(self.__dict__, _sizes=(sizes, core.constexpr(self.numel)))
        self.__dict__.update(known[key])

    def made(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = getattr(type, "_sizes", no_sizes)

    kinds: dict[str, Any] = {}

    def kind(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in kinds:
            kinds[name] = numpy_of(dtype)
        return kinds[name]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = described, made, kind


def check_integers(wanted: bool) -> None:
    """Whether every sum and product of integers is held against 32 bits, which takes another third.

    What overflows does so in whatever dtype, so the programs that run cases in two of them ask for it in one.
    """
    if INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        object.__setattr__(interpreter_builder.options, "sanitize_overflow", wanted)


class Counted:
    """What interpreted launches multiply, load and store, each held against the closed form of ``tiles``."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        if INTERPRETED:
            self._watch()

    def all_of(self, *kernels: str) -> None:
        """Fail unless each of them was launched: ``dq`` of whatever module, or ``gathered.dq``."""
        launched = set(self.launches) | {name.rpartition(".")[2] for name in self.launches}
        assert launched >= set(kernels), launched

    def _watch(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

        run, load, store, dot = (
            InterpretedFunction.run,
            *(getattr(interpreter_builder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")),
        )

        def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self.loaded += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return load(pointers, mask, *rest)

        def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stored += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return store(pointers, value, mask, *rest)

        def counting_dot(*operands: Any) -> Any:
            a, b, *_ = operands
            self.volumes.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
            return dot(*operands)

        interpreter_builder.create_masked_load = counting_load
        interpreter_builder.create_masked_store = counting_store
        interpreter_builder.create_dot = counting_dot

        def counting_run(function: Any, *arguments: Any, **options: Any) -> None:
            self.volumes, self.loaded, self.stored = [], 0, 0
            run(function, *arguments, **options)
            given = dict(zip(function.arg_names, arguments, strict=False)) | options
            module = function.fn.__module__.rpartition(".")[2]
            work = expected(module, function.__name__, given)
            if work is not None:
                products = len(self.volumes)
                if "CHUNK" in given:  # of tiles with all channels
                    rows, columns = (given.get(name, given.get("SIDE")) for name in ("ROWS", "COLUMNS"))
                    products = Fraction(sum(self.volumes), rows * columns * given["WIDTH"])
                received = products, self.loaded, self.stored
                assert received == work[2:], (function.__name__, received, work)
                self.launches.append(f"{module}.{function.__name__.removesuffix('_kernel').rpartition('_')[2]}")

        InterpretedFunction.run = counting_run


def expected(module: str, name: str, given: dict[str, Any]) -> tiles.Work | None:
    """The closed form of one launch from its arguments; None for kernels that have none."""
    if module == "gathered":
        return of_gathered(name.removesuffix("_kernel"), given)
    if module == "choosing":
        return of_choosing(name, given)
    if module == "search":
        return of_search(name, given)
    if module == "gate":
        batch, tokens, width = given["READ"].shape
        return gate_tiles.gated(
            name.removesuffix("_kernel"), given["ROWS"], given["COLUMNS"], given["DEPTH"], tokens, width,
            given["READ"].element_size(), batch=batch, keep=bool(given.get("KEEP")),
        )  # fmt: skip
    if module == "decode_kernels":
        return of_decode(name, given)
    if module in ("relative_kernels", "relative_backward"):
        return of_relative(name.removesuffix("_kernel").removeprefix("relative_"), given)
    if module == "cells":
        return pooled(name, given)
    if name == "turn_kernel":
        x = given["X"]
        heads = given["count"], given["HEADS"]
        return tiles.turned(given["T"], x.shape[3], x.element_size(), *heads)
    if module not in ("flash", "flash_bias", "flash_lists", "flash_turned"):
        return None
    q, chosen = given["Q"], Config(given["ROWS"], given["COLUMNS"], 0, 0)
    batch, heads, queries, width = q.shape
    kernel = name.removesuffix("_kernel").removeprefix("listed_")
    if module == "flash_lists":
        keys, size, blocks = given["S"], given["size"], given["LISTED"]
        last = -(-(queries if kernel == "dkv" else keys) // size) - 1
        rows = (given["OFFSETS"].diff(dim=1).flatten().cumsum(0)[None] <= torch.arange(blocks.numel())[:, None]).sum(1)
        rows %= given["OFFSETS"].shape[1] - 1  # of each entry: the row that lists it
        apart = Counter((blocks * size + given["ahead"] - rows * size).tolist())
        lasting = int((rows == given["OFFSETS"].shape[1] - 2).sum())
        return tiles.listed(
            kernel, chosen, queries, keys, size, blocks.numel(), int((blocks == last).sum()), width, q.element_size(),
            heads=heads, batch=batch, bias=given.get("BIAS", lines.TABLE), farthest=given["farthest"], apart=apart,
            lasting=lasting,
        )  # fmt: skip
    kinds = [(given["LOW"], given["HIGH"], given["BIAS"], given["KNOWN"])] if kernel == "dkv" else given["KINDS"]
    ranges = []
    for described, (low, high, bias, known) in zip(given.get("ranges", [given.get("keys")]), kinds, strict=True):
        _group, keys, *bounds, _every, ahead, _since = described[8:]
        low, high = (lines.Placed(kind, *line) for kind, line in zip((low, high), bounds, strict=True))
        ranges.append(tiles.Keys(keys, low, high, bias, ahead, bool(known)))
    work = tiles.attended(
        "forward" if kernel == "turned" else kernel, chosen, queries, ranges, width, q.element_size(),
        heads=batch * heads, group=given.get("GROUP", 1), farthest=given["farthest"],
        through_lse=bool(given.get("THROUGH_LSE")),
    )  # fmt: skip
    return work + tiles.turned(queries, width, q.element_size(), batch * heads) if kernel == "turned" else work


def of_relative(kernel: str, given: dict[str, Any]) -> tiles.Work:
    """The same for the kernels of the relative term."""
    bounds = {name: given.get(name, 0) for name in Stair._fields if name not in ("band", "causal")}
    stair = Stair(**bounds | {"band": int(given["BAND"]), "causal": int(given["CAUSAL"])})
    operand = given["K"]
    batch, heads, count, width = operand.shape
    of_entries = kernel == "dkv" and given["FAR"]
    one = relative_tiles.Launch(
        given["T"], 0 if of_entries else given["S"], count if of_entries else given.get("entries", 0) * given["FAR"],
        given["distances"], width, operand.element_size(), given["SIDE"], stair,
    )  # fmt: skip
    return relative_tiles.launched(
        kernel, one, heads=batch * heads, of_entries=of_entries, split=bool(given.get("SPLIT")),
        parts=given.get("splits", 1),
    )  # fmt: skip


def of_decode(name: str, given: dict[str, Any]) -> tiles.Work:
    """The same for the parts of a decoding step, or for their merging, whose launch has no keys to see."""
    if name == "merge_kernel":
        parts, batch, heads, queries, width = given["PARTIAL"].shape
        itemsize = given["OUT"].element_size()
        return tiles.decoded(1, 1, queries, parts, 1, width, itemsize, heads=batch * heads)[1]
    batch, heads, queries, width = given["Q"].shape
    return tiles.decoded(
        given["ROWS"], given["COLUMNS"], queries, given["keys"], given["chunk"], width, given["Q"].element_size(),
        heads=batch * heads // given["GROUP"], group=given["GROUP"],
    )[0]  # fmt: skip


def pooled(name: str, given: dict[str, Any]) -> tiles.Work:
    """The closed form of one launch of the pooling kernels: cells of each level, and the tokens that they hold."""
    sources, counts = given["sources"], tuple(count for _, count in given["levels"])
    B, H, _, D = sources[0][0].shape
    return cells_table.moved(
        name.removesuffix("_kernel"), given["T"], counts, len(sources) * B * H * D, sources[0][0].element_size()
    )  # fmt: skip


def of_gathered(kernel: str, given: dict[str, Any]) -> tiles.Work:
    """The same for attention inside clusters, head by head from where their runs begin."""
    chosen = Config(given["ROWS"], given["COLUMNS"], 0, 0)
    lengths = (given[name].diff(dim=1).tolist() for name in ("QUERY_BEGINS", "KEY_BEGINS"))
    work = tiles.Work()
    for queries, keys in zip(*lengths, strict=True):
        work += gathered_tiles.gathered(
            kernel, chosen, list(zip(queries, keys, strict=True)), given["K"].shape[3], given["K"].element_size(),
            earlier=given["EARLIER"], without_self=given["WITHOUT_SELF"], by_slot=given["BY_SLOT"],
        )  # fmt: skip
    return work


def of_choosing(name: str, given: dict[str, Any]) -> tiles.Work:
    """The same for the kernels that choose tokens of clusters and add up what these give."""
    if name == "taken_kernel":
        rows = given["SIMILARITY"].numel() // given["T"]
        return gathered_tiles.taken(given["T"], given["w"], given["SIMILARITY"].element_size()) * rows
    if name == "nearest_kernel":
        batch, heads, tokens, width = given["X"].shape
        sizes = tokens, given["centroids"], width, given["X"].element_size()
        return gathered_tiles.nearest(given["ROWS"], given["COLUMNS"], *sizes) * (batch * heads)
    parts, out = given["PARTS"], given["OUT"]
    batch, heads, tokens, width = out.shape
    one = gathered_tiles.added(tokens, given["N"], width, parts.element_size(), out.element_size())
    return one * (batch * heads)


def of_search(name: str, given: dict[str, Any]) -> tiles.Work:
    """The same for the search of the memory and its gradient, which follows what was picked."""
    batch, heads, queries, width = given["OUT"].shape
    sizes = width, given["OUT"].element_size()
    if name == "gradient_kernel":
        picked = int((given["WEIGHTS"] > 0).sum())
        return search_tiles.gradient(batch * heads * queries, given["TOP"], picked, *sizes)
    one = search_tiles.searched(
        given["ROWS"], given["COLUMNS"], queries, given["N"], given["TOP"], given["past"], given["length"],
        given["most"], *sizes, keep=given["KEEP"],
    )  # fmt: skip
    return one * (batch * heads)
