"""Who may import what: torch stays out of listing and planning, and arrows only point down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ctxbench
from ctxbench.registry import discover

HARNESS = Path(ctxbench.__file__).parent
IMPLEMENTATIONS = Path(__import__("ctxbench.implementations", fromlist=["_"]).__file__).parent
FOLDERS = sorted(path.parent for path in IMPLEMENTATIONS.glob("*/__init__.py") if not path.parent.name.startswith("_"))

TASKS = "ctxbench.run.tasks"  # plain data that a child and the supervisor exchange, so meters may return it
HEAVY = ("torch", "pandas", "plotly", "matplotlib", "scipy")
# For every module of the harness, those it must not import: the arrows of docs/architecture.md, from the bottom up.
LAYERS = [
    {"errors", "units", "text", "compiler"},
    {"method", "picks", "axes", "devices"},
    {"cell", "rows", "registry", "suite", "config", "cost", "workload", "env"},
    {"plan", "pace", "shard"},
    {"measure"},
    {"run"},
    {"analysis"},
    {"reports"},
    {"testing"},
    {"cli", "__main__"},
]


def imports(source: Path) -> set[str]:
    """Dotted names a file imports anywhere, relative ones resolved against its own package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
            if node.module == "ctxbench":
                found.update(f"ctxbench.{alias.name}" for alias in node.names)
    return found


def roots(source: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(source)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["list", "impls", "--json"],
        ["describe", "dense"],
        ["plan", "quick"],
        ["new", "--help"],
        ["check", "--help"],
    ],
    ids=" ".join,
)
def test_commands_that_measure_nothing_never_import_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from ctxbench.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_listing_the_methods_waits_for_no_numpy() -> None:
    code = (
        "import sys; from ctxbench.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_method_is_described_without_torch() -> None:
    code = (
        "import sys; from ctxbench.registry import discover; from ctxbench.method import Dims, load\n"
        "from ctxbench.cost import evaluate, total\n"
        "for m in discover():\n"
        "    p = m.params(); dims = Dims(seq_len=1024, num_layers=m.fewest_layers(p), position=m.positions[0])\n"
        "    for mode in m.modes:\n"
        "        m.mode_support(mode, dims, p)\n"
        "        for impl in m.impls:\n"
        "            m.impl_support(impl, mode, dims, p, 'cpu', 'fp32')\n"
        "            m.cost_of(impl.name, mode, dims.causal, dims.position, p)\n"
        "    list(load(m.reach)(dims, p, 100)) if m.reach else None\n"
        "    assert 'torch' not in sys.modules, m.name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_method_imports_the_contract_the_cost_terms_and_the_shared_scaffolding_alone(folder: Path) -> None:
    own = f"ctxbench.implementations.{folder.name}"
    allowed = ("ctxbench.method", "ctxbench.cost", "ctxbench.implementations._shared", own)
    for source in folder.glob("*.py"):
        ours = {name for name in imports(source) if name.startswith("ctxbench")}
        strangers = {name for name in ours if not name.startswith(allowed)}
        assert not strangers, f"{source.name} imports {strangers}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_data_of_a_method_imports_no_torch(folder: Path) -> None:
    for name in ("__init__.py", "params.py", "cost.py"):
        source = folder / name
        if source.exists():
            assert "torch" not in roots(source), source.name


@pytest.mark.parametrize("method", list(discover()), ids=lambda method: method.name)
def test_what_planning_asks_of_a_method_is_in_a_file_without_torch(method) -> None:
    asked = [method.support, method.reach, method.cost, *(impl.support for impl in method.impls)]
    for target in (target for target in asked if isinstance(target, str)):
        module = target.partition(":")[0].removeprefix("ctxbench.implementations.")
        source = IMPLEMENTATIONS / f"{module.replace('.', '/')}.py"
        assert "torch" not in roots(source), f"{target}: move it to params.py"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_reference_fits_on_three_screens(folder: Path) -> None:
    source = folder / "reference.py"
    assert len(source.read_text().splitlines()) <= 150


def test_shared_scaffolding_imports_no_method() -> None:
    for source in (IMPLEMENTATIONS / "_shared").glob("*.py"):
        ours = {name for name in imports(source) if name.startswith("ctxbench.implementations")}
        assert all(name.startswith("ctxbench.implementations._shared") for name in ours), source.name


@pytest.mark.parametrize("name", ["method", "registry", "cell", "rows", "axes", "suite", "plan", "units", "errors"])
def test_modules_that_planning_reads_import_no_heavy_library(name: str) -> None:
    assert not roots(HARNESS / f"{name}.py") & set(HEAVY)


def test_the_harness_names_no_method() -> None:
    """One folder adds one method: no module of the harness imports a method's folder."""
    folders = {f"ctxbench.implementations.{folder.name}" for folder in FOLDERS}
    for source in HARNESS.rglob("*.py"):
        assert not {name for name in imports(source) if any(name.startswith(folder) for folder in folders)}, source


def layer_of(name: str) -> int:
    return next((index for index, layer in enumerate(LAYERS) if name in layer), -1)


@pytest.mark.parametrize(
    "source",
    [s for s in sorted(HARNESS.rglob("*.py")) if "templates" not in s.parts and s.name != "__init__.py"],
    ids=lambda source: str(source.relative_to(HARNESS)),
)
def test_arrows_point_down(source: Path) -> None:
    own = source.relative_to(HARNESS).parts[0].removesuffix(".py")
    level = layer_of(own)
    assert level >= 0, f"{own} has no place in LAYERS"
    if own == "run" or own == "measure":
        assert not roots(source) & {"pandas", "plotly", "matplotlib", "scipy"}, "measuring must run on a bare image"
    for name in imports(source):
        if name.startswith("ctxbench.") and name != TASKS and layer_of(name.split(".")[1]) >= 0:
            assert layer_of(name.split(".")[1]) <= level, f"{own} imports {name}"
