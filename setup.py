"""What pyproject.toml cannot compute: the package list and one entry point per method folder."""

from pathlib import Path

from setuptools import find_packages, setup

MAPPED = ("implementations", "suites", "reports")  # folders that become ctxbench.<folder>


def packages() -> list[str]:
    found = find_packages(include=["ctxbench", "ctxbench.*"])
    for folder in MAPPED:
        found.append(f"ctxbench.{folder}")
        found += [f"ctxbench.{folder}.{name}" for name in find_packages(folder)]
    return sorted(set(found))


def methods() -> list[str]:
    folders = (path.parent.name for path in Path("implementations").glob("*/__init__.py"))
    return [f"{name} = ctxbench.implementations.{name}" for name in sorted(folders) if not name.startswith("_")]


setup(
    packages=packages(),
    entry_points={"console_scripts": ["ctxbench = ctxbench.cli:main"], "ctxbench.methods": methods()},
)
