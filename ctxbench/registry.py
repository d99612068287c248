"""Which methods exist: entry points of group ``ctxbench.methods``, and ``--plugin PATH``. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

from ctxbench.errors import PluginError, unknown
from ctxbench.method import Method

GROUP = "ctxbench.methods"
IMPORT_LIMIT_S = 20


@dataclass(frozen=True)
class Entry:
    """A registered method and how another process can load it again."""

    method: Method
    origin: str  # "package.module" for an entry point, "plugin:PATH" for --plugin
    package: str  # distribution, or the path


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded; it is listed with its error and skipped."""

    name: str
    origin: str
    error: str


@dataclass
class Registry:
    """All methods by name, and the plug-ins that failed."""

    entries: dict[str, Entry] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)

    def __getitem__(self, name: str) -> Method:
        if name in self.entries:
            return self.entries[name].method
        for broken in self.broken:
            if broken.name == name:
                raise PluginError(f"method {name!r} could not be loaded\n  {broken.error}")
        raise unknown("method", name, self.entries, "see `ctxbench list methods`")

    def get(self, name: str) -> Method | None:
        """The method as it is installed here, or None."""
        entry = self.entries.get(name)
        return entry.method if entry else None

    def __iter__(self) -> Iterator[Method]:
        return (entry.method for _, entry in sorted(self.entries.items()))

    def names(self) -> list[str]:
        """Names of all loadable methods, sorted."""
        return sorted(self.entries)

    def select(self, spec: str) -> list[Method]:
        """Methods of ``all``, ``a,b``, ``family:NAME`` and ``-a`` (without a), in registry order.

        Raises:
            UserError: for an unknown method or family, or an empty selection.
        """
        chosen: set[str] = set()
        parts = [part.strip() for part in spec.split(",") if part.strip()]
        if parts and parts[0].startswith("-"):
            chosen.update(self.entries)
        for part in parts:
            if part == "all":
                chosen.update(self.entries)
            elif part.startswith("family:"):
                families = {method.family for method in self}
                family = part.removeprefix("family:")
                if family not in families:
                    raise unknown("family", family, families)
                chosen.update(method.name for method in self if method.family == family)
            elif part.startswith("-"):
                chosen.discard(self[part[1:]].name)
            else:
                chosen.add(self[part].name)
        if not chosen:
            raise unknown("selection of methods", spec, [*self.entries, "all"], "the selection is empty")
        return [method for method in self if method.name in chosen]


def discover(plugins: Sequence[str] = ()) -> Registry:
    """Load every entry point and every ``--plugin`` path.

    Entry points that fail are recorded in ``broken``; a ``--plugin`` path that does not exist, and a name that two
    sources claim, raise PluginError.
    """
    registry = Registry()
    packages: dict[int, str] = {}  # a distribution reads its metadata again each time it is asked for its name
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if id(point.dist) not in packages:
            packages[id(point.dist)] = point.dist.name if point.dist else "?"
        package = packages[id(point.dist)]
        _add(registry, point.name, point.value, package, partial(importlib.import_module, point.value))
    for path in plugins:
        _add(registry, Path(path).stem, f"plugin:{path}", path, partial(import_plugin, path))
    return registry


def reload(origin: str) -> Method:
    """Load one method again from an entry's ``origin``, in another process."""
    module = import_plugin(origin[7:]) if origin.startswith("plugin:") else importlib.import_module(origin)
    return _method_of(module, origin)


def import_plugin(path: str) -> ModuleType:
    """Import a folder with an ``__init__.py``, a ``.py`` file or a dotted module as a plug-in.

    Raises:
        PluginError: when there is nothing to import at ``path``.
    """
    location = Path(path).expanduser()
    if not location.exists():
        if "/" not in path and not path.endswith(".py"):
            with contextlib.suppress(ModuleNotFoundError, ValueError):
                if importlib.util.find_spec(path) is not None:
                    return importlib.import_module(path)
        raise PluginError(
            f"no plug-in at {path!r}\n  accepted: a folder with __init__.py, a .py file, or an importable module name\n"
            "  `ctxbench new NAME` writes a folder to start from"
        )
    source = location / "__init__.py" if location.is_dir() else location
    if not source.is_file() or source.suffix != ".py":
        raise PluginError(f"{path!r} is not a plug-in\n  accepted: a folder with __init__.py, or a .py file")
    digest = hashlib.blake2b(str(source.resolve()).encode(), digest_size=4).hexdigest()
    name = f"ctxbench_plugin_{location.stem.replace('-', '_').replace('.', '_')}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    folders = [str(location.resolve())] if location.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _add(registry: Registry, name: str, origin: str, package: str, load: Callable[[], ModuleType]) -> None:
    try:
        with time_limit(IMPORT_LIMIT_S, "the import"):
            method = _method_of(load(), origin.removeprefix("plugin:"))
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a plug-in may raise anything, SystemExit included
        registry.broken.append(Broken(name, origin, f"{type(error).__name__}: {error}"))
        return
    if method.name in registry.entries:
        other = registry.entries[method.name]
        raise PluginError(
            f"two plug-ins claim the name {method.name!r}\n  received: {other.origin} ({other.package}) and {origin} "
            f"({package})\n  rename one of them, or leave one out"
        )
    registry.entries[method.name] = Entry(method, origin, package)


def _method_of(module: ModuleType, source: str) -> Method:
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise TypeError(f"{source} must define METHOD = ctxbench.method.Method(...), found {method!r}")
    return method


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError when the block does not end in time; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"{what} did not end within {seconds} s")

    started, previous = time.monotonic(), signal.signal(signal.SIGALRM, expire)
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:  # a limit around this one keeps its own end
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - started)), interval)
