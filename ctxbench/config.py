"""The configuration of a run: merged layers with every text parsed, every name checked and every problem reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ctxbench import suite as suites
from ctxbench.axes import parse_size, parse_sizes
from ctxbench.devices import cuda_present, parse_devices, torch_version
from ctxbench.errors import EnvironmentUnusable, UserError, unknown
from ctxbench.method import DTYPES, MODES, POSITIONS
from ctxbench.registry import Registry
from ctxbench.suite import Layer, Limits, Suite, Values
from ctxbench.units import parse_bytes, parse_fraction, parse_seconds

AUTO = "auto"
SUPPORTED = "supported"  # of a method's impls, those that run here
BUDGET_S = {"cpu": 600.0, "cuda": 540.0}
_T = TypeVar("_T")


class Protocol(msgspec.Struct, frozen=True, kw_only=True):
    """How cells are measured, parsed; see ``ctxbench.suite.Protocol``."""

    processes: int
    precision: float
    min_samples: int
    sample_budget: float
    sample_cap: float
    gate: bool
    seed: int
    threads: int


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a plan follows from. None on an axis means the method's own choice.

    ``memory_limit`` is bytes by device, ``capability`` the compute capability of CUDA devices, times ten; a device
    that cannot be asked has no entry. ``origins`` says for every
    dotted key which layer set it, ``merged`` holds the texts as they were written. ``shard`` is a part of the
    plan, such as ``2/8``; empty for all of it.
    """

    suite: str
    methods: list[str]
    impls: list[str]
    seq_len: list[int]
    memory: list[int | None]
    mode: list[str]
    device: list[str]
    dtype: list[str | None]
    batch_size: list[int]
    d_model: list[int]
    num_heads: list[int]
    num_layers: list[int | None]
    d_ff: list[int | None]
    causal: list[bool | None]
    position: list[str | None]
    params: dict[str, dict[str, list[Any]]]
    budget_s: float
    cell_timeout_s: float
    memory_limit: dict[str, int]
    max_flops: float | None
    protocol: Protocol
    merged: dict[str, Any]
    origins: dict[str, str]
    shard: str = ""
    capability: dict[str, int] = {}

    @property
    def comparable(self) -> dict[str, Any]:
        """What two sessions in one folder must agree on; limits may differ."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("suite", "budget_s", "cell_timeout_s", "memory_limit", "max_flops", "merged", "origins"):
            del plain[name]
        if not self.capability:  # nothing was asked, as in runs of versions that could not ask
            del plain["capability"]
        return plain


def resolve(suite: str, stack: list[Layer], registry: Registry) -> Config:
    """Parse and check the merged layers.

    Raises:
        UserError: lists every problem at once, with the key and the layer it comes from.
    """
    merged, origins = suites.merge(stack)
    return _Resolver(merged, origins, registry).config(suite)


def change_limits(config: Config, limits: Limits) -> Config:
    """A stored configuration with other limits; the memory limit is taken anew from what is available now.

    Raises:
        UserError: for a malformed limit.
    """
    changes: dict[str, Any] = {}
    if limits.budget is not None:
        changes["budget_s"] = _seconds(limits.budget)
    if limits.cell_timeout is not None:
        changes["cell_timeout_s"] = _seconds(limits.cell_timeout)
    if limits.max_flops is not None:
        changes["max_flops"] = limits.max_flops
    text = config.merged.get("limits.memory_limit") if limits.memory_limit is None else limits.memory_limit
    found = {device: _bytes(text, memory_available(device)) for device in config.device}
    changes["memory_limit"] = {device: limit for device, limit in found.items() if limit is not None}
    return msgspec.structs.replace(config, **changes)


def require_devices(config: Config) -> None:
    """Refuse to run on a device that is not here.

    Raises:
        EnvironmentUnusable: names the device and what is missing.
    """
    wanted = [name for name in config.device if name.startswith("cuda")]
    if wanted and not cuda_present():
        why = "the installed torch is built for CPU only" if "+cpu" in torch_version() else "no NVIDIA driver was found"
        raise EnvironmentUnusable(
            f"the device {wanted[0]!r} is not usable here: {why}\n  accepted on this machine: cpu\n"
            "  leave --device out, or see `ctxbench doctor`"
        )


def memory_available(device: str) -> int | None:
    """Bytes a run may count on: what the kernel or the container's limit leaves on CPU, all of a CUDA device's."""
    if device == "cpu":
        import psutil

        return min([psutil.virtual_memory().available, *_container_headroom()])
    try:
        import pynvml

        pynvml.nvmlInit()
        index = int(device.partition(":")[2] or 0)
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).total)
    except Exception:  # no package, no driver, no such device: the limit stays unknown and the child's OOM decides
        return None


def compute_capability(device: str) -> int | None:
    """Compute capability of a CUDA device, times ten: 90 is 9.0; None where there is none to ask."""
    if device == "cpu":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        index = int(device.partition(":")[2] or 0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(index))
        return 10 * int(major) + int(minor)
    except Exception:  # no package, no driver, no such device: a table then says that it is unknown
        return None


def _container_headroom() -> list[int]:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return [int(Path(limit).read_text()) - int(Path(used).read_text())]
        except (OSError, ValueError):  # not this version of cgroups, or "max"
            continue
    return []


class _Resolver:
    """Collects problems while it parses, so that a user sees all of them at once."""

    def __init__(self, merged: Suite, origins: dict[str, str], registry: Registry):
        self.merged, self.origins, self.registry = merged, origins, registry
        self.problems: list[str] = []

    def config(self, suite: str) -> Config:
        axes, limits, protocol = self.merged.axes, self.merged.limits, self.merged.protocol
        methods: list[str] = self._try("axes.methods", lambda: self._methods(axes.methods), [])
        devices = self._try("axes.device", lambda: parse_devices(_list(axes.device)), ["cpu"])
        heads = self._sizes("axes.num_heads", axes.num_heads)
        widths = self._sizes("axes.d_model", axes.d_model)
        self._check_heads(widths, heads)
        config = Config(
            suite=suite,
            methods=methods,
            impls=self._try("axes.impls", lambda: self._impls(_list(axes.impls)), []),
            seq_len=self._sizes("axes.seq_len", axes.seq_len),
            memory=[None] if axes.memory is None else self._sizes("axes.memory", axes.memory, zero=True),
            mode=self._choices("axes.mode", axes.mode, MODES),
            device=devices,
            dtype=self._choices("axes.dtype", axes.dtype, DTYPES, auto=True),
            batch_size=self._sizes("axes.batch_size", axes.batch_size),
            d_model=widths,
            num_heads=heads,
            num_layers=self._sizes("axes.num_layers", axes.num_layers, auto=True),
            d_ff=self._sizes("axes.d_ff", axes.d_ff, auto=True, zero=True),
            causal=self._try("axes.causal", lambda: _causal(axes.causal), []),
            position=self._choices("axes.position", axes.position, POSITIONS, auto=True),
            params=self._params(methods),
            budget_s=self._budget(limits.budget, devices),
            cell_timeout_s=self._try("limits.cell_timeout", lambda: _seconds(limits.cell_timeout), 60.0),
            memory_limit=self._memory_limit(limits.memory_limit, devices),
            max_flops=limits.max_flops,
            protocol=Protocol(
                processes=self._at_least("protocol.processes", protocol.processes, 1),
                precision=self._try("protocol.precision", lambda: _fraction(protocol.precision), 0.05),
                min_samples=self._at_least("protocol.min_samples", protocol.min_samples, 1),
                sample_budget=self._try("protocol.sample_budget", lambda: _seconds(protocol.sample_budget), 0.5),
                sample_cap=self._try("protocol.sample_cap", lambda: _seconds(protocol.sample_cap), 15.0),
                gate=protocol.gate is not False,
                seed=self._at_least("protocol.seed", protocol.seed, 0),
                threads=self._at_least("protocol.threads", protocol.threads, 0),
            ),
            capability={device: found for device in devices if (found := compute_capability(device)) is not None},
            merged=dict(suites.items(self.merged)),
            origins=self.origins,
        )
        if limits.max_flops is not None and limits.max_flops <= 0:
            self._problem("limits.max_flops", f"must be above 0, received {limits.max_flops}")
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError(f"{len(self.problems)} problems in the configuration\n- " + "\n- ".join(self.problems))
        return config

    def _problem(self, key: str, message: str) -> None:
        origin = self.origins.get(key, "default")
        self.problems.append(f"{message}\n  where: {key}, set by {origin}")

    def _try(self, key: str, parse: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return parse()
        except UserError as error:
            self._problem(key, str(error))
            return otherwise

    def _at_least(self, key: str, value: int | None, least: int) -> int:
        if value is None or value < least:
            self._problem(key, f"{key.partition('.')[2]} must be at least {least}, received {value}")
            return least
        return value

    def _sizes(self, key: str, value: Any, auto: bool = False, zero: bool = False) -> list[Any]:
        def parse() -> list[Any]:
            if auto and value == AUTO:
                return [None]
            found: set[int] = set()
            for part in _list(value):
                text = str(part)
                found.update((0,) if zero and text.strip() == "0" else parse_sizes(text))
            if not found:
                raise UserError("the axis is empty")
            return sorted(found)

        return self._try(key, parse, [])

    def _choices(self, key: str, value: Any, accepted: Sequence[str], auto: bool = False) -> list[Any]:
        def parse() -> list[Any]:
            chosen: list[Any] = []
            for name in _list(value):
                if name not in (*accepted, *((AUTO,) if auto else ())):
                    raise unknown(key.partition(".")[2], str(name), [*accepted, *((AUTO,) if auto else ())])
                choice = None if name == AUTO and auto else name
                if choice not in chosen:
                    chosen.append(choice)
            if not chosen:
                raise UserError(f"the axis is empty\n  accepted: {', '.join(accepted)}")
            return chosen

        return self._try(key, parse, [])

    def _methods(self, value: Any) -> list[str]:
        return [method.name for method in self.registry.select(",".join(_list(value)))]

    def _impls(self, chosen: list[str]) -> list[str]:
        known = {impl.name for method in self.registry for impl in method.impls}
        for name in chosen:
            if name.removeprefix("-") not in {*known, "all", AUTO, SUPPORTED}:
                raise unknown("impl", name, [*known, "all", AUTO, SUPPORTED], "see `ctxbench list impls`")
        if not chosen:
            raise UserError("the axis is empty")
        return chosen

    def _check_heads(self, widths: list[int], heads: list[int]) -> None:
        for width in widths:
            for head in heads:
                if width % head:
                    self._problem(
                        "axes.num_heads", f"d_model must be a multiple of num_heads, received {width} and {head}"
                    )

    def _params(self, methods: list[str]) -> dict[str, dict[str, list[Any]]]:
        """Values by method and parameter; a key that names its method wins over one that names none."""
        found: dict[str, dict[str, list[Any]]] = {}
        for key, values in sorted(self.merged.params.items(), key=lambda item: "." in item[0]):
            self._try(f"params.{key}", lambda key=key, values=values: self._param(key, values, methods, found), None)  # type: ignore[misc]
        return found

    def _param(self, key: str, values: Values, methods: list[str], found: dict[str, dict[str, list[Any]]]) -> None:
        owner, dot, name = key.rpartition(".")
        holders = [self.registry[owner]] if dot else [self.registry[method] for method in methods]
        fields = {
            holder.name: {spec.name: spec.default for spec in dataclasses.fields(holder.params)} for holder in holders
        }
        having = [method for method, specs in fields.items() if name in specs]
        if not having:
            accepted = {spec for specs in fields.values() for spec in specs}
            raise unknown(f"parameter of {owner}" if dot else "axis or parameter", name, accepted)
        for method in having:
            default = fields[method][name]
            texts = values if isinstance(values, list) else [values]
            converted = [item for text in texts for item in _parameter(text, default, key)]
            for value in converted:
                try:
                    self.registry[method].params(**{name: value})
                except ValueError as error:
                    raise UserError(f"{method}: {error}") from None
            found.setdefault(method, {})[name] = converted

    def _budget(self, value: Any, devices: list[str]) -> float:
        if value == AUTO:
            return min(BUDGET_S[device.partition(":")[0]] for device in devices)
        return self._try("limits.budget", lambda: _seconds(value), BUDGET_S["cpu"])

    def _memory_limit(self, value: Any, devices: list[str]) -> dict[str, int]:
        limits: dict[str, int] = {}
        for device in devices:
            available = memory_available(device)
            limit = self._try("limits.memory_limit", lambda total=available: _bytes(value, total), None)  # type: ignore[misc]
            if limit is not None:
                limits[device] = limit
        return limits


def _list(value: Any) -> list[Any]:
    """A comma-separated text, a single value or a list as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _causal(value: Any) -> list[bool | None]:
    words: dict[Any, bool | None] = {True: True, False: False, "true": True, "false": False, AUTO: None}
    chosen: list[bool | None] = []
    for item in _list(value):
        if item not in words:
            raise unknown("value of causal", str(item), ["true", "false", AUTO])
        if words[item] not in chosen:
            chosen.append(words[item])
    return chosen


def _seconds(value: Any) -> float:
    return parse_seconds(str(value))


def _fraction(value: Any) -> float:
    return parse_fraction(str(value))


def _bytes(value: Any, available: int | None) -> int | None:
    if isinstance(value, str) and value.strip().endswith("%") and available is None:
        parse_bytes(value, 1)
        return None
    return parse_bytes(str(value), available)


def _parameter(value: Any, default: Any, key: str) -> list[Any]:
    """One value, or the sizes of a range, in the type the parameter's default has."""
    if isinstance(default, bool):
        words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
        if isinstance(value, bool):
            return [value]
        if str(value).lower() not in words:
            raise UserError(f"malformed value {value!r} of {key}\n  accepted: true or false")
        return [words[str(value).lower()]]
    if isinstance(default, int):
        if isinstance(value, (bool, float)):
            raise UserError(f"malformed value {value!r} of {key}\n  accepted: a whole number, or a size such as 1k")
        parts = [part.strip() for part in str(value).split(",")]
        sizes = [int(part) if part.lstrip("-").isdigit() else part for part in parts]
        return [size for part in sizes for size in ([part] if isinstance(part, int) else _range(part))]
    if isinstance(default, float):
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            raise UserError(f"malformed value {value!r} of {key}\n  accepted: a number") from None
    return [part.strip() for part in str(value).split(",")]


def _range(text: str) -> list[int]:
    return list(parse_sizes(text)) if ".." in text else [parse_size(text)]
