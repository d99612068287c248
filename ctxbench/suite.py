"""Suites: named tables of axes and limits in TOML, and how defaults, suite, project and flags become one configuration.

A suite has the sections ``[suite]`` (title, description), ``[axes]``, ``[params]`` (``"method.name" = value`` or a list
of values, or ``name = ...`` for every method that has the parameter), ``[limits]`` and ``[protocol]``. The same four
sections may stand under ``[tool.ctxbench]`` of the ``pyproject.toml`` in the working directory.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ctxbench.errors import UserError, unknown

Value = bool | int | float | str
Values = Value | list[Value]
Sizes = int | str | list[int | str]
Names = str | list[str]
_Section = TypeVar("_Section", bound=msgspec.Struct)


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a suite is for."""

    title: str = ""
    description: str = ""


class Axes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The axes whose product is the plan; None leaves an axis to the layer below.

    ``auto`` is the method's or the device's own choice: its preferred direction and position, its fewest layers, a
    feed-forward network of 4 d_model, fp32 on CPU and bf16 on CUDA.
    """

    methods: Names | None = None
    impls: Names | None = None
    seq_len: Sizes | None = None
    memory: Sizes | None = None
    mode: Names | None = None
    dtype: Names | None = None
    device: Names | None = None
    batch_size: Sizes | None = None
    d_model: Sizes | None = None
    num_heads: Sizes | None = None
    num_layers: Sizes | None = None
    d_ff: Sizes | None = None
    causal: bool | str | list[bool] | None = None
    position: Names | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run stops: seconds (or ``10m``), bytes (or ``80%`` of what is available), FLOPs a call."""

    budget: float | str | None = None
    cell_timeout: float | str | None = None
    memory_limit: int | str | None = None
    max_flops: float | None = None


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a cell is measured. ``threads`` 0 means all cores the process may use."""

    processes: int | None = None
    precision: float | str | None = None
    min_samples: int | None = None
    sample_budget: float | str | None = None
    sample_cap: float | str | None = None
    gate: bool | None = None
    seed: int | None = None
    threads: int | None = None


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of configuration: a suite file, ``[tool.ctxbench]``, the defaults, or the flags."""

    suite: About = About()
    axes: Axes = Axes()
    params: dict[str, Values] = {}
    limits: Limits = Limits()
    protocol: Protocol = Protocol()

    @property
    def title(self) -> str:
        """What the suite measures, in one line."""
        return self.suite.title


DEFAULTS = Suite(
    axes=Axes(
        methods="all",
        impls="all",
        seq_len="1k..4k",
        mode="forward",
        dtype="auto",
        device="auto",
        batch_size=1,
        d_model=256,
        num_heads=4,
        num_layers="auto",
        d_ff="auto",
        causal="auto",
        position="auto",
    ),
    limits=Limits(budget="auto", cell_timeout="60s", memory_limit="80%"),
    protocol=Protocol(
        processes=3, precision="5%", min_samples=10, sample_budget=0.5, sample_cap=15.0, gate=True, seed=0, threads=0
    ),
)
SECTIONS: dict[str, type[msgspec.Struct]] = {"axes": Axes, "limits": Limits, "protocol": Protocol}


class Layer(msgspec.Struct, frozen=True):
    """Values and where they come from."""

    origin: str
    values: Suite


def names() -> list[str]:
    """Suites that ship with ctxbench."""
    folder = resources.files("ctxbench.suites")
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_suite(name: str) -> Suite:
    """Read a shipped suite by name, or a file by its path.

    Raises:
        UserError: for an unknown name, a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        try:
            return parse_suite(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(
                f"cannot read the suite {name!r}: {error.strerror}\n  accepted: a .toml file, or {', '.join(names())}"
            ) from None
    if name not in names():
        raise unknown("suite", name, names(), "a path to a .toml file is accepted too; see `ctxbench list suites`")
    return parse_suite((resources.files("ctxbench.suites") / f"{name}.toml").read_bytes(), name)


def parse_suite(text: bytes, source: str) -> Suite:
    """Read the text of a suite; ``source`` is named in errors."""
    return _convert(_toml(text, source), f"suite {source}")


def load_project(folder: Path) -> Suite | None:
    """``[tool.ctxbench]`` of the ``pyproject.toml`` in ``folder``, None where there is none."""
    path = folder / "pyproject.toml"
    if not path.is_file():
        return None
    table = _toml(path.read_bytes(), "pyproject.toml").get("tool", {}).get("ctxbench")
    return None if table is None else _convert(table, "[tool.ctxbench] in pyproject.toml")


def layers(suite: str | None, flags: Suite, folder: Path | None = None) -> tuple[str, list[Layer]]:
    """Name of the suite in force, and all layers: defaults < suite < ``[tool.ctxbench]`` < flags.

    Without a suite, flags that choose methods or lengths take the axes they leave open and the limits from
    ``scaling``; anything else is ``quick``.
    """
    if suite is None:
        suite = "scaling" if flags.axes.methods is not None or flags.axes.seq_len is not None else "quick"
    stack = [Layer("default", DEFAULTS), Layer(f"suite {suite}", load_suite(suite))]
    project = load_project(folder or Path.cwd())
    if project is not None:
        stack.append(Layer("pyproject.toml", project))
    return suite, [*stack, Layer("flag", flags)]


def merge(stack: list[Layer]) -> tuple[Suite, dict[str, str]]:
    """The last layer that sets a key wins; also says, for every dotted key, which layer that was."""
    origins: dict[str, str] = {}
    sections = {
        name: _merge_section(kind, [(layer.origin, getattr(layer.values, name)) for layer in stack], name, origins)
        for name, kind in SECTIONS.items()
    }
    params: dict[str, Values] = {}
    for layer in stack:
        for key, value in layer.values.params.items():
            params[key] = value
            origins[f"params.{key}"] = layer.origin
    return Suite(params=params, **sections), origins  # type: ignore[arg-type]


def items(suite: Suite) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, unset ones left out."""
    for section in SECTIONS:
        values = getattr(suite, section)
        for name in SECTIONS[section].__struct_fields__:
            value = getattr(values, name)
            if value is not None:
                yield f"{section}.{name}", value
    for key, value in suite.params.items():
        yield f"params.{key}", value


def _merge_section(
    kind: type[_Section], parts: list[tuple[str, _Section]], section: str, origins: dict[str, str]
) -> _Section:
    chosen = {}
    for origin, part in parts:
        for name in kind.__struct_fields__:
            value = getattr(part, name)
            if value is not None:
                chosen[name] = value
                origins[f"{section}.{name}"] = origin
    return kind(**chosen)


def _toml(text: bytes, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is not TOML: {error}\n  accepted: UTF-8 text as described at toml.io") from None


def _convert(table: dict[str, Any], source: str) -> Suite:
    try:
        return msgspec.convert(table, Suite)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {error}{_accepted(str(error))}") from None


def _accepted(message: str) -> str:
    """What a section accepts, for the error that names a wrong key."""
    wrong = re.search(r"unknown field `([^`]*)`(?: - at `\$\.?(\w*))?", message)
    if wrong is None:
        return "\n  see `ctxbench describe quick` for a suite that works"
    kinds: dict[str, type[msgspec.Struct]] = {**SECTIONS, "suite": About, "": Suite}
    kind = kinds.get(wrong[2] or "", Suite)
    accepted = sorted(kind.__struct_fields__)
    close = difflib.get_close_matches(wrong[1], accepted, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint}\n  accepted: {', '.join(accepted)}"
