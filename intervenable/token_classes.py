"""Classes of tokens beside text, such as those that stand for an image, by the markers around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intervenable.errors import LocationError
from intervenable.token_text import TokenView

Marker = int | str
Markers = tuple[Marker, Marker | None, Marker]
"""Start marker, special token (None if there is none), end marker of a class of tokens; ids, or texts of tokens."""


@dataclass(frozen=True)
class TokensOfClass:
    """Positions of a class of tokens in one example, and of its markers."""

    all: Sequence[int]
    """All of them; the markers too, if start and end are told by different ones."""

    markers: Sequence[int] = ()
    """Markers that are neither in the class nor text."""

    start: Sequence[int] = ()
    """Where each span begins."""

    end: Sequence[int] = ()
    """Where each span ends."""

    special: Sequence[int] = ()
    """The special tokens in the spans."""

    @property
    def last(self) -> Sequence[int]:
        """The last token of each span before its end."""
        return [place - 1 for place in self.end if place]


def tokens_of_class(view: TokenView, name: str, markers: Markers, where: str = "") -> TokensOfClass:
    """Find the tokens of a class in one example.

    Args:
        view: The example.
        name: What the class is called.
        markers: What tells it.
        where: What is being read, for messages.

    Raises:
        LocationError: a span begins and does not end.
    """
    start, special, end = markers
    starts, ends = _marked(view, start), _marked(view, end)
    if start == end:
        spans = [(starts[0], starts[-1])] if starts else []
        inside, outside = starts[1:-1] or starts, starts
    else:
        spans = _spans(starts, ends)
        inside, outside = [place for first, last in spans for place in range(first, last + 1)], []
        if starts and starts[-1] > max(ends, default=-1):
            raise LocationError(
                f"The tokens of class {name!r}{where} begin in example {view.example} and do not end: there is no"
                f" {end!r} after the last {start!r}."
            )
    within = set(inside)
    return TokensOfClass(
        all=inside,
        markers=outside,
        start=[first for first, _ in spans],
        end=[last for _, last in spans],
        special=() if special is None else [place for place in _marked(view, special) if place in within],
    )


def _spans(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Each end marker with the first start marker since the one before."""
    spans: list[tuple[int, int]] = []
    after = 0
    for end in ends:
        begins = [start for start in starts if after <= start < end]
        if begins:
            spans.append((begins[0], end))
        after = end + 1
    return spans


def _marked(view: TokenView, marker: Marker) -> list[int]:
    """Where a marker stands."""
    if isinstance(marker, int):
        return [place for place, token in enumerate(view.ids or ()) if token == marker]
    return [place for place, token in enumerate(view.tokens) if marker in (token, token.strip())]
