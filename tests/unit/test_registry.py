"""Discovery: three ways in, and no plug-in that can take the others down."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ctxbench import registry
from ctxbench.errors import PluginError, UserError
from ctxbench.method import Method
from ctxbench.registry import Broken, Entry, Registry, discover, import_plugin, reload

PLUGINS = Path(__file__).parents[1] / "plugins"
BROKEN = {
    "raises": "RuntimeError: planted at import",
    "exits": "SystemExit: 3",
    "no_method": "must define METHOD",
    "bad_name": "lower-case identifier",
}


def named(name: str, family: str = "other") -> Entry:
    return Entry(Method(name, build=lambda *_: None, family=family), f"package.{name}", "package")


@pytest.fixture
def three() -> Registry:
    entries = {"a": named("a", "sparse"), "b": named("b", "sparse"), "c": named("c")}
    return Registry(entries, [Broken("ill", "package.ill", "RuntimeError: planted")])


def test_our_own_methods_are_found_by_entry_point() -> None:
    found = discover()
    assert "dense" in found.names()
    assert found.broken == []
    assert found.entries["dense"].origin == "ctxbench.implementations.dense"


@pytest.mark.parametrize("route", ["folder", "file", "module"])
def test_every_route_leads_to_the_method(route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from ctxbench.method import Method\nMETHOD = Method('routed', build=lambda *_: None)\n"
    if route == "folder":
        target = PLUGINS / "folder"
        path, name = str(target), "folder_plugin"
    else:
        target = tmp_path / f"routed_{route}.py"
        target.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        path, name = (str(target), "routed") if route == "file" else (target.stem, "routed")
    found = discover([path])
    assert found[name].name == name
    assert found.entries[name].origin == f"plugin:{path}"
    assert reload(found.entries[name].origin).name == name


def test_a_plugin_of_one_path_is_imported_once() -> None:
    path = str(PLUGINS / "folder")
    assert import_plugin(path) is import_plugin(path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_skipped(name: str) -> None:
    found = discover([str(PLUGINS / "broken" / f"{name}.py"), str(PLUGINS / "folder")])
    assert [(broken.name, BROKEN[name] in broken.error) for broken in found.broken] == [(name, True)]
    assert {"dense", "folder_plugin"} <= set(found.names())
    with pytest.raises(PluginError, match="could not be loaded"):
        found[name]


def test_a_syntax_error_is_listed(tmp_path: Path) -> None:
    target = tmp_path / "torn.py"
    target.write_text("METHOD = (\n")
    assert "SyntaxError" in discover([str(target)]).broken[0].error


def test_a_file_without_a_method_is_named_as_it_was_given(tmp_path: Path) -> None:
    target = tmp_path / "mine.py"
    target.write_text("METHOD = 3\n")
    assert f"{target} must define METHOD" in discover([str(target)]).broken[0].error


def test_an_import_that_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "IMPORT_LIMIT_S", 1)
    found = discover([str(PLUGINS / "broken" / "hangs.py")])
    assert "the import did not end within 1 s" in found.broken[0].error
    assert "dense" in found.names()


def test_a_limit_inside_a_limit_keeps_the_outer_one() -> None:
    def nested() -> None:
        with registry.time_limit(1, "the outer block"):
            with pytest.raises(TimeoutError, match="the inner block"), registry.time_limit(0.2, "the inner block"):
                time.sleep(30)
            time.sleep(30)

    with pytest.raises(TimeoutError, match="the outer block"):
        nested()


def test_a_failed_import_leaves_no_module_behind() -> None:
    before = set(sys.modules)
    discover([str(PLUGINS / "broken" / "raises.py")])
    assert {name for name in set(sys.modules) - before if name.startswith("ctxbench_plugin")} == set()


@pytest.mark.parametrize(
    "path", ["nowhere/at/all.py", "no_such_module_here", "nowhere", ".", str(PLUGINS / "broken" / "syntax.txt")]
)
def test_a_path_that_is_no_plugin_is_an_error_that_says_what_is(path: str) -> None:
    with pytest.raises(PluginError, match=r"accepted: a folder with __init__\.py"):
        discover([path])


def test_two_plugins_of_one_name_are_an_error(tmp_path: Path) -> None:
    target = tmp_path / "again.py"
    target.write_text("from ctxbench.method import Method\nMETHOD = Method('dense', build=lambda *_: None)\n")
    with pytest.raises(PluginError, match=r"two plug-ins claim the name 'dense'(.|\n)*rename one of them"):
        discover([str(target)])


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("all", "abc"),
        ("a", "a"),
        ("c,a", "ac"),
        ("all,-b", "ac"),
        ("-b", "ac"),
        ("family:sparse", "ab"),
        ("family:sparse,c,-a", "bc"),
        (" a , b ", "ab"),
    ],
)
def test_selections(three: Registry, spec: str, names: str) -> None:
    assert [method.name for method in three.select(spec)] == list(names)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("densee", "unknown method 'densee'"),
        ("family:spars", "did you mean 'sparse'"),
        ("a,-a", "the selection is empty"),
        ("", "the selection is empty"),
        ("ill", "'ill' could not be loaded\n  RuntimeError: planted"),
    ],
)
def test_wrong_selections(three: Registry, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        three.select(spec)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"did you mean 'dense'\?\n  accepted: .*dense"):
        discover()["dens"]
