"""Texts on pictures: tokens that can be read on an axis, and fonts that have their letters. Without any drawing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from textwrap import fill

from intervenable.optional_matplotlib import font_manager

LONGEST = 18
"""Letters of the longest token that is written out on an axis."""
LETTER_PER_POINT = 0.0075
"""Inches that a letter takes for each point of its size."""

_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥", " ": "␣", "\N{NO-BREAK SPACE}": "␣"})


def token_label(text: str) -> str:
    r"""One token as a label: without the space before a word, and with spaces and line breaks visible.

    Example:
        >>> [token_label(text) for text in (" Spain", "\n\n", " ", "two words")]
        ['Spain', '↵↵', '␣', 'two words']
    """
    bare = text.strip(" ")
    if not bare.strip():
        bare = text.translate(_VISIBLE)
    return "".join(
        letter if letter.isprintable() else _escaped(letter)
        for letter in bare.replace("\n", "↵").replace("\t", "⇥")
    )


def clipped(text: str, longest: int = LONGEST) -> str:
    """A text with its middle left out if it is longer than that.

    Example:
        >>> clipped("Donaudampfschifffahrtsgesellschaft")
        'Donaudamp…llschaft'
    """
    if len(text) <= longest:
        return text
    front = longest // 2
    return f"{text[:front]}…{text[len(text) - (longest - 1 - front) :]}"


def wrapped(text: str, inches: float, points: float) -> str:
    """A text in as many lines as it takes to be no longer than that, in letters of that size."""
    return fill(text, max(12, int(inches / (points * LETTER_PER_POINT))), break_long_words=False)


def drawable(text: str) -> str:
    r"""The text with letters that no installed font has written as escapes, such as `\u6771`."""
    return "".join(letter if _family(letter) else _escaped(letter) for letter in text)


def families_of(texts: Iterable[str]) -> list[str]:
    """The fonts that these texts need, the usual one first."""
    return list(dict.fromkeys([_fonts()[0][0], *map(_family, dict.fromkeys("".join(texts)))]))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


@lru_cache(maxsize=4096)
def _family(letter: str) -> str:
    """The first font that has a letter; empty if none has."""
    if letter.isascii():
        return _fonts()[0][0]
    for name, path in _fonts():
        if font_manager.get_font(path).get_char_index(ord(letter)):
            return name
    return ""


@lru_cache(maxsize=1)
def _fonts() -> list[tuple[str, str]]:
    """Name and file of the upright fonts: the usual one, those made for many scripts, the others."""
    path = font_manager.findfont(font_manager.FontProperties())
    usual = (font_manager.get_font(path).family_name, path)
    others = [
        (entry.name, entry.fname)
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and "Last Resort" not in entry.name  # whose glyphs are boxes
    ]
    others.sort(key=lambda font: (not font[0].startswith(("Noto Sans", "Arial Unicode")), font))
    return [usual, *others]
