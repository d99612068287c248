"""``ctxbench new``: the folder of a new method, which passes ``ctxbench check`` as it is written."""

from __future__ import annotations

import importlib.resources
import importlib.util
import keyword
import re
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from ctxbench.cli.common import Common, common_options
from ctxbench.errors import UserError, unknown, unwritable
from ctxbench.registry import discover

TEMPLATE = "my_method"
OWN = "ctxbench.implementations."


@click.command()
@click.argument("name")
@click.option("--from", "source", metavar="METHOD", help="Start from a copy of this method; default: a small window.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder to write into; default: here.")
@common_options
def command(name: str, source: str | None, out: Path, ctx: Common) -> None:
    """Write the folder plug-in NAME: parameters, layer, reference, cost, README and a test.

    The folder works at once; change it step by step and keep `ctxbench check NAME --plugin NAME` green.
    """
    _check_name(name)
    target = out / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{str(target)!r} exists already\n  choose another name, or another folder with --out")
    files = _renamed(_template(), TEMPLATE, name) if source is None else _copied(source, name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            (target / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(target, error, "--out FOLDER") from error
    if ctx.json:
        ctx.emit({"name": name, "path": str(target), "files": sorted(files)})
    elif not ctx.quiet:
        click.echo(f"wrote {target}: {', '.join(sorted(files))}")
        click.echo(f"next: ctxbench check {name} --plugin {target}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise UserError(
            f"malformed name {name!r}\n  accepted: a lower-case identifier of at most 40 characters, no keyword, "
            "such as sliding_window"
        )
    existing = discover().entries
    if name in existing:
        raise UserError(
            f"a method {name!r} exists already, in {existing[name].package}\n  choose another name; `--from {name}` "
            "starts from a copy of it"
        )
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:  # a folder without code has none
        raise UserError(
            f"there is a Python module {name!r} already ({spec.origin})\n  accepted: a name that is free, because "
            f"the folder's own test says `from {name} import METHOD`"
        )


def _template() -> dict[str, str]:
    return _texts(importlib.resources.files("ctxbench.templates") / "method")


def _renamed(files: dict[str, str], old: str, new: str) -> dict[str, str]:
    """Replace the name in paths and texts, and the title written from it."""
    titles = (old.replace("_", " ").capitalize(), new.replace("_", " ").capitalize())
    lower = (titles[0].lower(), titles[1].lower())
    renamed = {}
    for path, text in files.items():
        for before, after in ((old, new), titles, lower):
            text = text.replace(before, after)
        renamed[path.replace(old, new)] = text
    return renamed


def _copied(source: str, name: str) -> dict[str, str]:
    """The files of one of our own methods, its imports of itself made relative and its name changed."""
    registry = discover()
    own = {each: entry for each, entry in registry.entries.items() if entry.origin.startswith(OWN)}
    if source not in own:
        raise unknown("method to start from", source, own)
    module = own[source].origin
    files = _texts(importlib.resources.files(module))
    for path, text in files.items():
        text = text.replace(f"from {module} import", "from . import").replace(f"from {module}.", "from .")
        files[path] = text.replace(f'name="{source}"', f'name="{name}"', 1) if path == "__init__.py" else text
    title = name.replace("_", " ").capitalize()
    files["README.md"] = re.sub(r"\A# .*", f"# {title}, from {source}", files.get("README.md", "# \n"))
    test = f"test_{TEMPLATE}.py"
    return {**files, f"test_{name}.py": _template()[test]}


def _texts(folder: Traversable) -> dict[str, str]:
    return {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.is_file() and entry.name.endswith((".py", ".md"))
    }
