"""``python -m ctxbench`` is the same program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["run", "--help"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_failure(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "ctxbench", *arguments],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (Exit.OK, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("arguments", [["list"], ["run", "--help"]], ids=" ".join)
def test_output_for_which_there_is_no_room_is_an_error_of_the_environment(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ctxbench", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == Exit.ENVIRONMENT
    assert done.stderr.startswith("error: cannot write the output: No space left on device")
