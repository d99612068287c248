"""Text from rows and plug-ins without the characters that act instead of being read."""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_MARKS = frozenset("\u200c\u200d")  # joiners that scripts and emoji need


def printable(text: str) -> str:
    """The text without control characters, lone surrogates and overrides of the writing direction.

    Letters keep their own direction; only the invisible commands that would turn the text around them are dropped.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in _KEPT or c in _MARKS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
