"""The wheel: one top-level name, every folder of the house inside, nothing else."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("ctxbench", "implementations", "suites", "reports")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "published", "build", "dist", ".*")


def build(source: Path, out: Path, kind: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that no build folder appears in the repository."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*SOURCES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=IGNORED)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_nothing_generic_becomes_importable(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {"ctxbench"}


def test_every_module_of_the_house_is_inside(names: set[str]) -> None:
    for folder in SOURCES:
        prefix = "ctxbench" if folder == "ctxbench" else f"ctxbench/{folder}"
        for source in (ROOT / folder).rglob("*.py"):
            if "__pycache__" not in source.parts and "published" not in source.parts:
                assert f"{prefix}/{source.relative_to(ROOT / folder)}" in names


def test_every_method_folder_with_its_derivation_is_inside(names: set[str]) -> None:
    for pattern in ("*/README.md", "*/*.cpp", "*/*.hpp"):
        for source in (ROOT / "implementations").glob(pattern):
            assert f"ctxbench/implementations/{source.parent.name}/{source.name}" in names


@pytest.mark.parametrize(
    ("folder", "patterns"),
    [
        ("suites", ["*.toml"]),
        ("reports", ["templates/*", "assets/*"]),
        ("ctxbench", ["templates/method/*", "py.typed"]),
    ],
    ids=["suites", "report templates and assets", "the template of a plug-in"],
)
def test_data_is_inside(names: set[str], folder: str, patterns: list[str]) -> None:
    prefix = "ctxbench" if folder == "ctxbench" else f"ctxbench/{folder}"
    found = [path for pattern in patterns for path in (ROOT / folder).glob(pattern) if path.is_file()]
    assert found
    for path in found:
        assert f"{prefix}/{path.relative_to(ROOT / folder)}" in names


def test_no_test_and_no_cache_is_inside(names: set[str]) -> None:
    assert not [name for name in names if "/tests/" in name or name.startswith("tests/")]
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so"))]


def test_entry_points_are_the_command_and_one_for_every_method(wheel: Path) -> None:
    parser = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser.read_string(archive.read(path).decode())
    folders = {path.parent.name for path in (ROOT / "implementations").glob("*/__init__.py")} - {"_shared"}
    assert dict(parser["console_scripts"]) == {"ctxbench": "ctxbench.cli:main"}
    assert dict(parser["ctxbench.methods"]) == {name: f"ctxbench.implementations.{name}" for name in folders}


def test_the_source_archive_builds_the_same_wheel(
    tree: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = build(tree, tmp_path_factory.mktemp("sdist"), "sdist")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    again = build(next(unpacked.iterdir()), tmp_path_factory.mktemp("again"), "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_a_third_party_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """The metadata an installer would leave beside the module is all that discovery needs."""
    (tmp_path / "outsider.py").write_text(
        "from ctxbench.method import Method\nMETHOD = Method('outsider', build=lambda *_: None)\n"
    )
    info = tmp_path / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ctxbench.methods]\noutsider = outsider\nmissing = no_such_module\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ctxbench.registry import discover\nfound = discover()\n"
        "print(found.entries['outsider'].package, found.broken[0].name, found.broken[0].error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.startswith("outsider missing ModuleNotFoundError")
