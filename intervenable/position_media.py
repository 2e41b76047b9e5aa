"""The positions of pictures, films and sounds in a prompt, and those of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intervenable.errors import LocationError
from intervenable.media_tokens import MEDIA, media_tokens
from intervenable.token_classes import Markers, tokens_of_class
from intervenable.token_text import TokenView

NAMES = (*MEDIA, "text")
"""Names of the positions that stand for each medium, and of all others."""

_PICTURES = {"image": "pictures", "video": "films", "audio": "sounds"}


def positions_of_medium(
    view: TokenView, name: str, classes: Mapping[str, Markers], where: str = ""
) -> Sequence[int]:
    """Where a prompt has tokens of a medium; of `text` where it has any others.

    What stands for a medium the model says, else the tokenizer, else a class of tokens that is declared.

    Args:
        view: The example.
        name: One of `NAMES`.
        classes: The classes of tokens that are declared.
        where: What is being read, for messages.

    Raises:
        LocationError: there are no such tokens in the model, or none in the prompt.
    """
    if view.ids is None:
        raise LocationError(
            f"{name!r}{where} is told by token ids, and example {view.example} has none: what goes through a tower"
            " is not tokens. Say where by ints."
        )
    known = view.media or media_tokens(view.tokenizer)
    if name != "text":
        found = _of_medium(view, name, known, classes, where)
        if not found:
            raise LocationError(
                f"{name!r}{where} chooses nothing for example {view.example}: its {len(view)} tokens are all text."
            )
        return found
    if not known and not classes:
        raise LocationError(
            f"'text'{where} is what is no picture and no sound, and the model has no tokens for these. Say 'all' for"
            " all tokens, and Words('text') to look for the word."
        )
    others = {place for medium in known for place in _with_ids(view, known[medium])}
    for other, markers in classes.items():
        of_class = tokens_of_class(view, other, markers, where)
        others.update(of_class.all, of_class.markers)
    return [place for place in range(len(view)) if place not in others]


def _of_medium(
    view: TokenView,
    name: str,
    known: Mapping[str, tuple[int, ...]],
    classes: Mapping[str, Markers],
    where: str,
) -> Sequence[int]:
    if name in known:
        return _with_ids(view, known[name])
    if name in classes:
        of_class = tokens_of_class(view, name, classes[name], where)
        return of_class.all if classes[name][1] is None else of_class.special
    there = f" It has some for {', '.join(_PICTURES[medium] for medium in known)}." if known else ""
    raise LocationError(
        f"{name!r}{where} stands for the tokens of {_PICTURES[name]}, and the model has none.{there} Say"
        f" Words({name!r}) to look for the word."
    )


def _with_ids(view: TokenView, ids: Sequence[int]) -> list[int]:
    return [place for place, token in enumerate(view.ids or ()) if token in ids]
