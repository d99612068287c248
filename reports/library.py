"""The chart library for pages of one kind of trace: what such a page never runs is left out.

The installed plotly package brings one bundle for all kinds of charts. A page unpacks, reads and starts it before its
first chart, so what is left out is time for every reader, and two thirds of the size of the page.
"""

from __future__ import annotations

import importlib.resources
import itertools
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

KINDS = re.compile(r"(\.register\(\[)(?:\w+\(\),){20,}\w+\(\)(\]\))")  # what the bundle adds to its core
OPENING = "var Plotly=(()=>{"
# Strings, templates, comments and regular expressions: brackets and names in them mean nothing.
_LITERAL = re.compile(
    r'"(?:[^"\\\n]|\\[\s\S])*"' r"|'(?:[^'\\\n]|\\[\s\S])*'"
    r"|`(?:[^`\\$]|\\[\s\S]|\$(?!\{)|\$\{(?:[^{}`]|`(?:[^`\\]|\\[\s\S])*`|\{[^{}`]*\})*\})*`"
    r"|/\*[\s\S]*?\*/|//[^\n]*"
    r"|(?:(?<=[(,=:\[!&|?{};+\-*%~^<>\n])|(?<=return)|(?<=case)|(?<=typeof))"
    r"/(?![*/])(?:[^/\\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/"
)  # fmt: skip
_FUNCTION = re.compile(r"(?:async )?function\*? ?([\w$]+)\(|class ([\w$]+)")
_WRAPPER = re.compile(r"(?:var |,)([\w$]+)=\(\w+(?:,\w+)+\)=>\(\)=>\{")  # (module, ...) => () => its exports, once
_DECLARED = re.compile(r"(?:var |,)([\w$]+)(?=[=,;])")
_EXPORTS = re.compile(r"[\w$]+\(([\w$]+),\{")
_NAME = re.compile(r"(?<![.\w$])[A-Za-z_$][\w$]*")


@lru_cache(maxsize=1)
def installed() -> str:
    """The installed plotly package's own bundle."""
    return (importlib.resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def core(bundle: str) -> str:
    """The bundle with its core alone, which draws ``scatter``: no other kind of trace, and nothing only they need.

    The bundle is one function of statements: modules, each wrapped so that it runs when it is first asked for, and
    the functions and variables they share. Kept is what the last statement, which returns the library, names, what
    that names, and so on; a name that means something else there keeps a little too much, never too little. A bundle
    of another form stays as it is.
    """
    lean, found = KINDS.subn(r"\1\2", bundle)
    if found != 1:
        return bundle
    plain = _LITERAL.sub(lambda literal: '""'.ljust(len(literal[0])), lean)
    start = plain.find(OPENING) + len(OPENING)
    wrappers = _WRAPPER.findall(plain[start : start + 10_000])
    statements = list(_statements(plain, start)) if start >= len(OPENING) else []
    if len(plain) != len(lean) or not statements or len(wrappers) != 2:
        return lean
    kept = _reached(plain, statements, "|".join(map(re.escape, wrappers)))
    return lean[:start] + "".join(lean[statements[i] : statements[i + 1]] for i in kept) + lean[statements[-1] :]


def _statements(plain: str, start: int) -> Iterator[int]:
    """Where the statements of the function whose body starts at ``start`` begin, and where the last one ends.

    Nothing where the brackets do not match, for then a literal was misread.
    """
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype=np.uint32)
    steps = np.isin(codes, [ord(c) for c in "([{"]).astype(np.int8) - np.isin(codes, [ord(c) for c in ")]}"])
    depths = np.cumsum(steps, dtype=np.int32)
    inside = depths[start - 1]
    if depths[-1] or depths.min() < 0:
        return
    end = start + int(np.argmax(depths[start:] < inside))
    ends = np.flatnonzero((depths[start:end] == inside) & np.isin(codes[start:end], [ord(";"), ord("}")])) + start
    begin = start
    yield begin
    for at in map(int, ends):
        if plain[at] == ";" or _FUNCTION.match(plain, begin):  # a declaration ends with its body
            begin = at + 1
            yield begin
    if begin < end:
        yield end


def _reached(plain: str, statements: list[int], wrappers: str) -> list[int]:
    """Indices of the statements that are needed, in order."""
    module = re.compile(rf"var (?:[\w$]+,)*([\w$]+)=(?:{wrappers})\(")
    spans = list(itertools.pairwise(statements))
    owners: dict[str, list[int]] = {}
    reached = set()
    for i, span in enumerate(spans):
        # Of a module its own name counts: who needs its variables runs it first.
        match = module.match(plain, *span) or _FUNCTION.match(plain, *span) or _EXPORTS.match(plain, *span)
        names = [name for name in match.groups() if name] if match else _DECLARED.findall(plain, *span)
        for name in names:
            owners.setdefault(name, []).append(i)
        if not names:
            reached.add(i)
    waiting = list(reached)
    while waiting:
        for name in set(_NAME.findall(plain, *spans[waiting.pop()])):
            for owner in owners.pop(name, ()):
                if owner not in reached:
                    reached.add(owner)
                    waiting.append(owner)
    return sorted(reached)
