"""The C++ compiler of this machine: which one native kernels are made with, and what a run's manifest says of it."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess

NAMES = ("c++", "g++", "clang++")  # looked for in this order, unless CXX names one


def command() -> tuple[str, ...] | None:
    """The program and the words that CXX puts behind it, such as those of ``ccache g++``; None where there is none."""
    named = os.environ.get("CXX", "").strip()
    for words in [_words(named)] if named else [(name,) for name in NAMES]:
        program = shutil.which(words[0])
        if program:
            return (program, *words[1:])
    return None


def looked_for() -> str:
    """What ``command`` looks for, for messages."""
    return os.environ.get("CXX", "").strip() or ", ".join(NAMES)


@functools.cache
def version(words: tuple[str, ...]) -> str:
    """What the compiler says of itself, its first line; empty where it does not answer."""
    try:
        done = subprocess.run([*words, "--version"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").partition("\n")[0].strip()


def _words(named: str) -> tuple[str, ...]:
    """CXX as a shell reads it, or a path that has blanks in it."""
    if shutil.which(named):
        return (named,)
    try:
        return tuple(shlex.split(named)) or (named,)
    except ValueError:  # a quote that is not closed
        return (named,)
