"""C++ sources to libraries, once on a machine and for its own instructions; no torch: planning asks whether it works.

What was compiled is kept under a name that holds the source, the headers, the compiler and its version, the flags and
the machine's instructions, so nothing stale is loaded, not from a home that several machines share either. A file ends
with its own digest: one that was cut short or changed is made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ctxbench import compiler

FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip
"""Sums in any order, but infinities and NaN keep their meaning."""
HERE = Path(__file__).parent
PROBE = HERE / "probe.cpp"


def library(source: Path) -> Path:
    """The source compiled, from the cache where it was compiled before.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source, or no folder can be written; the message has its
            own words and what to do.
    """
    words = compiler.command()
    if words is None:
        raise RuntimeError(missing())
    name = f"{source.stem}-{_key(source, words)}.so"
    folders, refused = list(_folders()), []
    for folder, private in folders:
        if _whole(folder / name) and (not private or _own(folder)):
            return folder / name
    for folder, private in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if private and not _own(folder):
                raise PermissionError(errno.EPERM, "it is somebody else's")
            with tempfile.TemporaryDirectory(dir=folder) as made:  # several processes may compile at once
                target = Path(made) / name
                _compile(words, source, target)
                target.replace(folder / name)
            return folder / name
        except OSError as error:
            refused.append(f"{folder} ({error.strerror or error})")
    raise RuntimeError(
        f"native kernels cannot be kept in {' or '.join(refused)}: let XDG_CACHE_HOME name a folder that can be written"
    )


def missing() -> str:
    """What to say where there is no compiler."""
    looked = compiler.looked_for()
    return f"native kernels need a C++ compiler, found none ({looked}): install g++ or let CXX name one"


def refusal() -> str:
    """Why kernels cannot be made here, in a line; empty where they can: a small one is made to see."""
    words = compiler.command()
    return missing() if words is None else _refusal(words)


@functools.cache
def _refusal(words: tuple[str, ...]) -> str:
    try:
        library(PROBE)
    except RuntimeError as error:
        first, *rest = str(error).splitlines()
        telling = next((line.strip() for line in rest if "error" in line), "".join(rest[-1:]))
        return f"{first} {telling}; let CXX name another compiler" if rest else first
    return ""


def _compile(words: tuple[str, ...], source: Path, target: Path) -> None:
    done = subprocess.run(
        [*words, *FLAGS, f"-I{HERE}", str(source), "-o", str(target)],
        capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip()[-2000:] or f"exit code {done.returncode}"
        raise RuntimeError(f"{' '.join(words)} could not compile {source.name}:\n{said}")
    with target.open("r+b") as file:  # what follows the last section is nobody's
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)


def _whole(path: Path) -> bool:
    """Whether a library ends with the digest of what comes before it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _key(source: Path, words: tuple[str, ...]) -> str:
    text = "".join(path.read_text() for path in (source, *sorted(HERE.glob("*.hpp"))))
    told = "\0".join((text, *words, compiler.version(words), *FLAGS, _instructions()))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _folders() -> Iterator[tuple[Path, bool]]:
    """The user's cache; then, for users who have none that can be written, a private folder where all may write."""
    with contextlib.suppress(RuntimeError):  # nobody knows a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxbench" / "native", False
    yield Path(tempfile.gettempdir()) / f"ctxbench-native-{os.getuid()}", True


def _own(folder: Path) -> bool:
    """Whether nobody else can have put into a folder what is run from it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


@functools.cache
def _instructions() -> str:
    """What tells apart machines that need other code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
