"""``python -m ctxbench`` is the same program."""

from __future__ import annotations

import subprocess
import sys

from ctxbench import __version__
from ctxbench.errors import Exit


def ctxbench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ctxbench", *arguments], capture_output=True, text=True, check=False)


def test_the_module_is_the_command() -> None:
    done = ctxbench("--version")
    assert (done.returncode, done.stdout) == (Exit.OK, f"ctxbench, version {__version__}\n")


def test_the_module_reports_errors_as_the_command_does() -> None:
    done = ctxbench("rnu")
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("error: unknown command 'rnu'; did you mean 'run'?")
