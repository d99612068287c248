"""The contract between ctxbench and an architecture. Importing this module imports no torch.

A method is mathematics, an impl is who computes it. The smallest method is a name and a build function::

    METHOD = Method(name="mine", build=build)

where ``build(dims, params, impl, device, dtype)`` returns an ``nn.Module``. The module is called in two ways:

* ``module(x)`` with ``x: [B, T, d_model]`` computes a whole sequence and returns ``y: [B, T, d_model]``
  (or ``Output(y)``);
* ``module(x, state)`` continues from ``state`` and returns ``Output(y, new_state)``. State is a value: a pytree
  (tuples, named tuples, dicts) of tensors and ints; nothing is kept on the module and nothing is mutated.

A module that can continue also has ``init_state(batch_size) -> State`` (before the first token) and
``state_at(batch_size, context) -> State``, a state of the shapes and dtypes that follow ``context`` tokens, with random
contents: decoding at 128k must be measurable without computing 128k tokens first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ctxbench.picks import Choice, Pick

MODES = ("forward", "train", "stream", "decode")
MODE_HELP = {
    "forward": "one whole sequence, no gradients",
    "train": "forward and backward of one whole sequence",
    "stream": "a sequence segment by segment, state carried",
    "decode": "one token at context length T",
}
ROPE = ("rope", "rope_linear", "rope_ntk", "rope_yarn", "rope_yarn_rotation")
POSITIONS = ("none", "transformer_xl", "t5", "alibi", *ROPE)
POSITION_HELP = {
    "none": "no encoding",
    "transformer_xl": "learned relative positions: a term of its own in every score",
    "t5": "a learned bias by head and bucket of distances",
    "alibi": "a fixed bias that falls with the distance",
    "rope": "queries and keys are rotated by their positions",
    "rope_linear": "RoPE, all frequencies divided by target over original length",
    "rope_ntk": "RoPE with a larger base: fast frequencies stay, slow ones are divided",
    "rope_yarn": "YaRN, its ramp from kept to divided frequencies linear in the channel, as the released code has it",
    "rope_yarn_rotation": "YaRN, its ramp linear in the number of turns, as the paper's equation has it",
}
DTYPES = ("fp32", "bf16", "fp16", "fp64")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


class Output(NamedTuple):
    """What a module returns: ``y: [B, T, d_model]`` and, when a state came in, the state after these tokens."""

    y: Any
    state: Any = None


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    citation: str
    link: str = ""
    section: str = ""


@dataclass(frozen=True)
class Support:
    """Yes, or no with the reason a user reads in the row."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Support(True)


def no(reason: str) -> Support:
    """Build the answer *no*; the reason is a full clause without a full stop."""
    return Support(False, reason)


@dataclass(frozen=True)
class Dims:
    """The sizes that every method shares, so that every comparison is at equal width, heads and depth.

    Attributes:
        seq_len: tokens of the sequence (``decode``: tokens already in the context).
        d_ff: width of the feed-forward network; 0 drops it and isolates the mixing.
        causal: a token sees only itself and earlier tokens.
        position: one of POSITIONS.
    """

    seq_len: int
    batch_size: int = 1
    d_model: int = 256
    num_heads: int = 4
    num_layers: int = 1
    d_ff: int = 1024
    causal: bool = True
    position: str = "none"

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "d_model", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if self.d_ff < 0:
            raise ValueError(f"d_ff must be 0 (no feed-forward network) or more, received {self.d_ff}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, received {self.d_model} and {self.num_heads}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, received {self.position!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    def replace(self, **changes: Any) -> Dims:
        """Copy with some sizes changed."""
        return dataclasses.replace(self, **changes)


def param(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    source: str = "",
) -> Any:
    """Declare one hyper-parameter of a method: its default, meaning, unit, range and where the default comes from."""
    metadata = {"help": help, "unit": unit, "low": low, "high": high, "choices": choices, "source": source}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Params:
    """Hyper-parameters of one method: subclass as a frozen dataclass whose fields are declared with :func:`param`."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            expected = type(spec.default)
            if expected is not type(value) and not (expected is float and type(value) is int):
                raise ValueError(f"{spec.name} must be of type {expected.__name__}, received {value!r}")
            if meta.get("choices") and value not in meta["choices"]:
                raise ValueError(
                    f"{spec.name} must be one of {', '.join(map(str, meta['choices']))}, received {value!r}"
                )
            low, high = meta.get("low"), meta.get("high")
            # Negated, so that NaN is refused too.
            if not (low is None or value >= low) or not (high is None or value <= high):
                allowed = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{spec.name} must be {allowed}, received {value!r}")

    def replace(self, **changes: Any) -> Params:
        """Copy with some values changed; unknown names raise ValueError."""
        known = [spec.name for spec in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"no parameter {name!r}; this method has {', '.join(known) or 'none'}")
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they appear in a row."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Impl:
    """One implementation of a method.

    Attributes:
        name: ``reference``, ``blocked``, ``triton``, ``as_written``, ...
        run: ``"module:attribute"`` of what this impl puts at the method's seam; the method's own ``build`` reads it.
        needs: distributions this impl imports, checked without importing them.
        devices: device types it runs on.
        dtypes, modes, positions: what it runs in and takes; empty means all that the device, or the method, has.
        without: why it lacks some of the method's modes or positions, each a clause without a full stop.
        support: ``f(dims, params, device, dtype) -> Support`` or its ``"module:attribute"``, for anything finer.
        defects: for ``as_written`` only: what the literal sketch gets wrong, as ``{probe: explanation}``. A probe is
            one of ``agreement, causality, batch_independence, receptive_field, state``. Such an impl is not compared
            with the reference; the gate demands instead that exactly these probes fail.
        counts_as: the impl whose formulas it shares; by default it has its own. note: one sentence for the report.
    """

    name: str
    run: str = ""
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    support: Callable[..., Support] | str | None = None
    defects: Mapping[str, str] = field(default_factory=dict)
    counts_as: str = ""
    note: str = ""


@dataclass(frozen=True)
class Equivalence:
    """At ``params`` the method computes the same function as ``other``; the conformance kit checks it.

    Weights are copied by name; every weight of ``other`` must exist here. ``when`` is the sentence the docs print.
    """

    when: str
    other: str
    params: Mapping[str, Any]
    other_params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A statement of the source documents about the method, and what is true of it."""

    claimed: str
    verdict: str
    true: str


@dataclass(frozen=True)
class Method:
    """One architecture: data only. Everything but ``name`` and ``build`` is optional.

    Attributes:
        build: ``build(dims, params, impl, device, dtype) -> nn.Module`` or its ``"module:attribute"``.
        params: a :class:`Params` subclass; ``variants``: settings to be checked beside each value of a choice alone.
        memory_parameter: the parameter that ``--memory`` sweeps: the method's budget of extra token slots a layer.
        modes: the modes the method has; ``without`` says for each other mode why not.
        causal: values of ``Dims.causal`` it accepts, preferred first; empty means it makes no claim and is not probed.
        positions: values of ``Dims.position`` it accepts, preferred first; ``without_positions``: why not another.
        support: ``f(dims, params, mode) -> Support`` for combinations that have no meaning.
        layers: ``f(params) -> int``, the fewest there can be; ``discrete``: rounding below one changes what it picks.
        segment: parameter that holds the segment length of ``stream``; without one, streams use 512 tokens.
        cost: ``"module:attribute"`` of ``f(impl, mode, causal, position, params) -> ctxbench.cost.Cost``.
        picks: the table of ``--impls auto``, first line first; ``portable`` and then the oracle follow the last one.
        reach: ``f(dims, params, i) -> range | set``: what may influence output ``i``; a range promises its ends do.
        equals: declared equivalences; ``claims``: audited statements of the source documents.
    """

    name: str
    build: Callable[..., Any] | str
    title: str = ""
    family: str = "other"
    idea: str = ""
    paper: Paper | None = None
    params: type[Params] = Params
    variants: tuple[Mapping[str, Any], ...] = ()
    memory_parameter: str | None = None
    modes: tuple[str, ...] = ("forward", "train")
    without: Mapping[str, str] = field(default_factory=dict)
    causal: tuple[bool, ...] = ()
    positions: tuple[str, ...] = ("none",)
    without_positions: Mapping[str, str] = field(default_factory=dict)
    impls: tuple[Impl, ...] = (Impl("reference"),)
    picks: tuple[Pick, ...] = ()
    support: Callable[..., Support] | str | None = None
    layers: Callable[[Any], int] | None = None
    discrete: bool = False
    segment: str | None = None
    cost: Callable[..., Any] | str | None = None
    reach: Callable[..., Any] | str | None = None
    equals: tuple[Equivalence, ...] = ()
    deviations: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", self.name):
            raise ValueError(
                f"a method's name must be a lower-case identifier of at most 40 characters, received {self.name!r}"
            )
        names = [impl.name for impl in self.impls]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"method {self.name!r} must have at least one impl and no two of one name, received {names}"
            )
        for mode in (*self.modes, *self.without):
            if mode not in MODES:
                raise ValueError(f"method {self.name!r} names the mode {mode!r}; the modes are {', '.join(MODES)}")
        for position in (*self.positions, *self.without_positions):
            if position not in POSITIONS:
                known = ", ".join(POSITIONS)
                raise ValueError(f"method {self.name!r} names the position {position!r}; the positions are {known}")
        fields = {spec.name for spec in dataclasses.fields(self.params)}
        for role, name in (("memory_parameter", self.memory_parameter), ("segment", self.segment)):
            if name is not None and name not in fields:
                raise ValueError(f"method {self.name!r}: {role} {name!r} is not one of its parameters")
        for variant in self.variants:
            self.params().replace(**variant)
        for pick in self.picks:
            self._check_pick(pick)

    def _check_pick(self, pick: Pick) -> None:
        """A line of the table must speak of what there is and its impl has; a sketch with defects is never picked."""
        sound = {impl.name: impl for impl in self.impls if not impl.defects}
        sizes, impl = {each.name for each in dataclasses.fields(Dims)} | {"head_dim"}, sound.get(pick.impl, Impl(""))
        modes = [mode for mode in self.modes if mode in (impl.modes or MODES)]
        for what, given, known in (
            ("impl", (pick.impl,), sound), ("device", pick.devices, impl.devices),
            ("dtype", pick.dtypes, impl.dtypes or DTYPES), ("mode", pick.modes, modes), ("size", pick.sizes, sizes),
        ):  # fmt: skip
            for name in sorted(set(given) - set(known)):
                problem = f"a pick of {pick.impl} names the {what} {name!r}; accepted are {', '.join(sorted(known))}"
                raise ValueError(f"method {self.name!r}: {problem}")

    def impl(self, name: str) -> Impl:
        """Return the impl of that name; KeyError where there is none."""
        for impl in self.impls:
            if impl.name == name:
                return impl
        raise KeyError(name)

    @property
    def oracle(self) -> str:
        """Name of the impl that all others are compared with: ``reference``, or the first one."""
        names = [impl.name for impl in self.impls]
        return "reference" if "reference" in names else names[0]

    @property
    def portable(self) -> str:
        """Name of the fast path that runs everywhere: ``blocked``, or the oracle where there is none."""
        return "blocked" if any(impl.name == "blocked" for impl in self.impls) else self.oracle

    def pick(
        self, mode: str, dims: Dims, params: Params, device: str, dtype: str, capability: int | None = None,
        without: Sequence[str] = (),
    ) -> Choice:  # fmt: skip
        """The impl that ``auto`` means for a cell: that of the first line of ``picks`` that holds and can run there.

        ``capability`` is that of the CUDA device, times ten, None where unknown; ``without`` names impls to leave out.
        Where nothing can run, the answer is the portable impl, and its own ``impl_support`` says why not.
        """
        closing = tuple(Pick(name, why=f"{what} path") for name, what in self._everywhere if name not in without)
        passed: list[str] = []
        for line in (*self.picks, *closing):
            if not line.speaks(mode, device.partition(":")[0], dtype, dims.causal):
                continue
            objection = line.objection(dims, capability)
            if line.impl in without:
                objection = "left out by name"
            if not objection:
                answer = self.impl_support(self.impl(line.impl), mode, dims, params, device, dtype)
                if answer:
                    return Choice(line.impl, line.why, line.measured, tuple(passed))
                objection = answer.reason or "not supported"
            if f"{line.impl}: {objection}" not in passed:
                passed.append(f"{line.impl}: {objection}")
        return Choice(self.portable, "nothing that auto knows runs here", False, tuple(passed))

    @property
    def _everywhere(self) -> tuple[tuple[str, str], ...]:
        """What every table ends with: impls and what they are."""
        oracle = (self.oracle, "the reference's")
        return (oracle,) if self.portable == self.oracle else ((self.portable, "the portable fast"), oracle)

    def fewest_layers(self, params: Params) -> int:
        """The fewest layers the method can have with these parameters."""
        return self.layers(params) if self.layers else 1

    def segment_len(self, params: Params) -> int:
        """Tokens a call of ``stream`` mode takes."""
        return int(getattr(params, self.segment)) if self.segment else 512

    def mode_support(self, mode: str, dims: Dims, params: Params) -> Support:
        """Whether the mathematics has this mode, direction, position and size."""
        if mode not in self.modes:
            return no(self.without.get(mode, f"{self.name} has no {mode} mode"))
        if self.causal and dims.causal not in self.causal:
            return no(f"{self.name} has no {'causal' if dims.causal else 'bidirectional'} form")
        if dims.position not in self.positions:
            taken = f"{self.name} takes the positions {', '.join(self.positions)}, not {dims.position}"
            return no(self.without_positions.get(dims.position, taken))
        if dims.position in ROPE and dims.head_dim % 2:
            return no(f"{dims.position} turns pairs of channels and needs an even head width, received {dims.head_dim}")
        fewest = self.fewest_layers(params)
        if dims.num_layers < fewest:
            return no(f"{self.name} needs at least {fewest} layers with these parameters, received {dims.num_layers}")
        check = load(self.support)
        return check(dims, params, mode) if check else YES

    def impl_support(self, impl: Impl, mode: str, dims: Dims, params: Params, device: str, dtype: str) -> Support:
        """Whether this impl can run this cell here: packages, device, dtype, mode, then its own answer."""
        device_type = device.partition(":")[0]
        missing = [name for name in impl.needs if not _installed(name, tuple(sys.path))]
        if missing:
            return no(f"needs the package {', '.join(missing)}, which is not installed")
        if device_type not in impl.devices:
            return no(f"{impl.name} runs on {', '.join(impl.devices)}, not on {device_type}")
        if impl.dtypes and dtype not in impl.dtypes:
            return no(f"{impl.name} computes in {', '.join(impl.dtypes)}, not in {dtype}")
        taken = ("has the modes", impl.modes, mode), ("takes the positions", impl.positions, dims.position)
        for says, known, wanted in taken:
            if known and wanted not in known:
                why = f": {impl.without[wanted]}" if wanted in impl.without else ""
                return no(f"{impl.name} {says} {', '.join(known)}, not {wanted}{why}")
        check = load(impl.support)
        return check(dims, params, device, dtype) if check else YES

    def cost_of(self, impl: str, mode: str, causal: bool, position: str, params: Params) -> Any:
        """The closed forms of one impl in one mode, or None where the method declares none; each is built once."""
        function = load(self.cost)
        counted = next((one.counts_as for one in self.impls if one.name == impl and one.counts_as), impl)
        return _built(function, counted, mode, causal, position, params) if function else None

    def make(self, dims: Dims, params: Params, impl: str, device: str, dtype: Any) -> Any:
        """Build the module; ``dtype`` is a torch dtype."""
        build = load(self.build)
        return build(dims, params, impl, device, dtype)


@functools.lru_cache(maxsize=1024)
def _built(function: Callable[..., Any], *structure: Any) -> Any:
    """What a cost function says of one structure."""
    return function(*structure)


@functools.cache
def _installed(distribution: str, path: tuple[str, ...]) -> bool:
    """Whether there is a distribution of that name, or a module for it; folders that several share are neither.

    ``path`` is where Python looks for it, ``sys.path``: an answer is kept for as long as that stays the same.
    """
    if any(importlib.metadata.distributions(name=distribution, path=list(path))):
        return True
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    return spec is not None and spec.loader is not None and spec.origin is not None


def load(target: Callable[..., Any] | str | None) -> Any:
    """Resolve ``"module:attribute"``; anything else is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ValueError(f"expected 'module:attribute', received {target!r}")
    return getattr(importlib.import_module(module), attribute)
