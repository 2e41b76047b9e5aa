"""`PositionResolver`: a tokenizer with names for positions, and what it chooses shown token by token."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import torch

from intervenable.errors import InputError, LocationError
from intervenable.media_tokens import media_tokens
from intervenable.position_entries import Entry, Span, checked_pivots
from intervenable.position_reading import NameTable, is_name, resolve
from intervenable.token_classes import Markers
from intervenable.token_text import Decodes, TokenView, decoder

Inputs = Any
"""A text or a list of texts; what a tokenizer returns; ids of one example `[s]` or of several `[b, s]`."""


class PositionResolver:
    """A tokenizer together with names for positions; goes wherever a tokenizer goes.

    Args:
        tokenizer: Encodes and decodes text; may be None where only numbers are used.
        names: What further names stand for: an entry, or a function of a `TokenView`.
        pivots: Positions or tokens that divide an example into `inputs-partition-0`, `inputs-partition-1`, ...
        classes: Classes of tokens beside text, each as (start marker, special token or None, end marker), by id or by
            text. A class `image` brings the names `all-image`, `start-image`, `end-image`, `last-image`,
            `special-image` and `random-image-3`; any class brings `all-text` and `random-text-3`.
        seed: Seed of random names.
        generator: Draws them instead.
        model: Its config says which tokens `"image"`, `"audio"` and `"text"` name; without one the tokenizer or
            processor does, or the classes.

    Raises:
        LocationError: a name that has a meaning already, or something else that says nothing sensible.

    Example:
        >>> from intervenable import Words, load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> resolver = PositionResolver(tokenizer, names={"country": Words("Spain")}, pivots=["of"])
        >>> resolver.positions("The capital of Spain is", ["country", "last"])
        [3, 4]
        >>> resolver.groups(["inputs-partition-0", "inputs-partition-1", 0], "The capital of Spain is")
        [((0, 1), (3, 4), (0,))]
    """

    def __init__(
        self,
        tokenizer: Decodes | None,
        names: Mapping[str, Entry] | None = None,
        pivots: Sequence[int | str] | int | str = (),
        classes: Mapping[str, Markers] | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        model: object = None,
    ) -> None:
        taken = [name for name in names or () if is_name(name)]
        if taken:
            raise LocationError(
                f"The name {taken[0]!r} has a meaning already, which does not change. Give another name."
            )
        marked = {name: _checked_markers(name, markers) for name, markers in (classes or {}).items()}
        self.tokenizer = tokenizer
        self.media = media_tokens(model)
        self.table = NameTable(dict(names or {}), checked_pivots(pivots), marked, seed, generator)

    def decode(self, token_ids: Any) -> str:
        """Text of token ids.

        Raises:
            LocationError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise LocationError(
                "This PositionResolver has no tokenizer. Give it one: PositionResolver(tokenizer)."
            )
        return decoder(self.tokenizer)(token_ids)

    def views(self, inputs: Inputs) -> list[TokenView]:
        """Each example as those who choose among its tokens see it; padding is not seen.

        Raises:
            InputError: not a form of inputs that has token ids.
        """
        rows = self._rows(inputs)
        return [
            TokenView(tuple(row), self.tokenizer, example, batch=len(rows), media=self.media)
            for example, row in enumerate(rows)
        ]

    def positions(self, inputs: Inputs, entry: Entry) -> list[Any]:
        """The positions that an entry chooses, counted in real tokens: a list for each example, or the one list.

        Raises:
            LocationError: it says nothing sensible, does not occur, or chooses nothing.
            LocationRangeError: it names a position that an example does not have.
        """
        found = [list(resolve(entry, view, self.table)) for view in self.views(inputs)]
        return found[0] if _is_single(inputs) else found

    def groups(self, requests: Sequence[Entry], inputs: Inputs) -> list[tuple[tuple[int, ...], ...]]:
        """For each example the positions of each request, in the order of the requests.

        Here a tuple `(a, b)` is the half-open range from `a` up to `b`, and an int is a group of one.

        Raises:
            LocationError: a request says nothing sensible, does not occur, or chooses nothing.
            LocationRangeError: it names a position that an example does not have.
        """
        if isinstance(requests, (str, tuple)) or not isinstance(requests, Sequence):
            raise LocationError(f"{requests!r} is no list of requests. Give one: [{requests!r}].")
        entries = [_as_range(request) for request in requests]
        return [tuple(resolve(entry, view, self.table) for entry in entries) for view in self.views(inputs)]

    def explain(
        self, inputs: Inputs, entry: Entry, file: TextIO | None = None
    ) -> list[list[tuple[int, str]]]:
        """Print the tokens that an entry chooses, an example a line, in brackets where they stand.

        Args:
            inputs: A text, texts, or what a tokenizer made of them.
            entry: What to choose.
            file: Where to print; standard output if None.

        Returns:
            For each example the positions and their tokens.

        Raises:
            LocationError: as `positions` would.

        Example:
            >>> from intervenable import load_small_lm
            >>> tokenizer, _ = load_small_lm()
            >>> rows = PositionResolver(tokenizer).explain("The capital of Spain is", "Spain")
            example 0: The capital of[ Spain] is
              3  ' Spain'
        """
        rows = []
        for view in self.views(inputs):
            chosen = resolve(entry, view, self.table)
            rows.append([(position, view.tokens[position]) for position in chosen])
            (file or sys.stdout).write(f"{_shown(view, chosen)}\n")
        return rows

    def _rows(self, inputs: Inputs) -> list[list[int]]:
        if isinstance(inputs, Mapping):
            return _real(inputs)
        texts = [inputs] if isinstance(inputs, str) else inputs
        if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
            tokenizer: Any = self.tokenizer
            if not callable(tokenizer):
                raise InputError(
                    f"{type(tokenizer).__name__} does not encode text. Give token ids instead of {inputs!r}."
                )
            return [list(tokenizer(text)["input_ids"]) for text in texts]
        return _listed(inputs)

    def __repr__(self) -> str:
        named = ", ".join(map(repr, self.table.names))
        return f"PositionResolver({type(self.tokenizer).__name__}{f', names={{{named}}}' if named else ''})"


def positions(tokenizer: Decodes | None, inputs: Inputs, entry: Entry, model: object = None) -> list[Any]:
    """The positions that an entry chooses in a text, counted in tokens from 0; a list for each of several texts.

    Args:
        tokenizer: A tokenizer, or a `PositionResolver`.
        inputs: A text, texts, or what a tokenizer made of them.
        entry: A name (`"last"`), a part of the text, an object such as `Words`, an int, a slice, or a list of them.
        model: Its config says which tokens `"image"` and `"text"` name, where the tokenizer does not.

    Raises:
        LocationError: it says nothing sensible, does not occur, or chooses nothing.
        LocationRangeError: it names a position that an example does not have.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> positions(tokenizer, "The capital of Spain is", "Spain")
        [3]
        >>> positions(tokenizer, ["The capital of Spain is", "Spain"], ["Spain", "last"])
        [[3, 4], [0, 0]]
    """
    resolver = (
        tokenizer if isinstance(tokenizer, PositionResolver) else PositionResolver(tokenizer, model=model)
    )
    return resolver.positions(inputs, entry)


def _checked_markers(name: str, markers: Any) -> Markers:
    if name == "text" or not name.isidentifier():
        raise LocationError(f"{name!r} cannot be a class of tokens: give a word other than 'text'.")
    if not isinstance(markers, (tuple, list)) or len(markers) != 3 or None in (markers[0], markers[2]):
        raise LocationError(
            f"The class {name!r} is given by {markers!r}. Give three markers, (start, special or None, end)."
        )
    start, special, end = markers
    return start, special, end


def _as_range(request: Entry) -> Entry:
    if not isinstance(request, tuple):
        return request
    if len(request) != 2 or not all(isinstance(bound, int) for bound in request):
        raise LocationError(
            f"The request {request!r} is no half-open range (a, b). Write a list for a set of positions:"
            f" {list(request)!r}."
        )
    return Span(*request)


def _shown(view: TokenView, chosen: Sequence[int]) -> str:
    """A line with the text, chosen tokens in brackets, and a line for each of these."""
    picked = set(chosen)
    parts, run = [], False
    for position, (start, end) in enumerate(view.spans):
        if (position in picked) != run:
            parts.append("]" if run else "[")
            run = not run
        drawn = view.spans[position - 1][1] if position else 0
        parts.append(view.text[max(start, drawn) : end])
    text = "".join(parts) + "]" * run
    lines = [f"  {position}  {view.tokens[position]!r}" for position in chosen]
    return "\n".join([f"example {view.example}: {text}", *lines])


def _is_single(inputs: Inputs) -> bool:
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    if hasattr(ids, "ndim"):
        return bool(ids.ndim == 1)
    return isinstance(ids, str) or (bool(ids) and isinstance(ids[0], int))


def _real(inputs: Any) -> list[list[int]]:
    """Ids of the real tokens of what a tokenizer returned."""
    if "input_ids" not in inputs:
        raise InputError(f"The inputs have no input_ids, but {', '.join(inputs.keys()) or 'nothing'}.")
    rows = _listed(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    if mask is None:
        return rows
    masks = _listed(mask)
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise InputError("The attention_mask of the inputs has another shape than their input_ids.")
    return [
        [token for token, real in zip(row, marks, strict=True) if real]
        for row, marks in zip(rows, masks, strict=True)
    ]


def _listed(ids: Any) -> list[list[int]]:
    """Ids as lists, one for each example."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        if all(isinstance(value, int) for value in values):
            return [list(values)]
        if all(isinstance(row, Sequence) and all(isinstance(value, int) for value in row) for row in values):
            return [list(row) for row in values]
    raise InputError(f"{ids!r} is no text and no token ids. Give a text, texts, or what a tokenizer returns.")
