"""The texts of the runs of one call, in which entries of locations are looked up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from intervenable.errors import LocationError
from intervenable.inputs import RunInputs
from intervenable.position_entries import Aligned, Entry
from intervenable.position_reading import NO_NAMES, resolve, resolve_aligned
from intervenable.position_resolver import PositionResolver
from intervenable.token_text import Decodes, TokenView

_MADE = ("_written", "tokens", "special")


class Texts:
    """Looks entries up in the examples of runs; each text is made when it is first needed, and once.

    Args:
        tokenizer: Decodes tokens; a `PositionResolver` brings names too. None where only numbers can be read.
        padding_counts: Whether padding is a token like any other.
    """

    def __init__(self, tokenizer: Decodes | None, padding_counts: bool = False) -> None:
        resolver = tokenizer if isinstance(tokenizer, PositionResolver) else None
        self.tokenizer = tokenizer if resolver is None else resolver.tokenizer
        self.table = NO_NAMES if resolver is None else resolver.table
        self.media = {} if resolver is None else resolver.media
        self.padding_counts = padding_counts
        self._views: dict[tuple[int, int], tuple[RunInputs, TokenView]] = {}
        self._alike: dict[tuple[int, ...], TokenView] = {}
        self._aligned: dict[tuple[int, int, int, int], tuple[Any, ...]] = {}

    def positions(self, entry: Entry, inputs: RunInputs, example: int, where: str) -> tuple[int, ...]:
        """What an entry chooses in one example of a run.

        Raises:
            LocationError: it says nothing sensible, does not occur, or chooses nothing.
        """
        return resolve(entry, self.view(inputs, example), self.table, where)

    def aligned(
        self, entry: Aligned, base: RunInputs, source: RunInputs, example: int, where: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What an alignment pairs in one example: positions of the source, and those of the base.

        Raises:
            LocationError: the runs differ in their number of examples, or nothing is paired.
        """
        if base.batch != source.batch:
            raise LocationError(
                f"{entry!r} in the {where} pairs each base example with a source example of its own, and there are"
                f" {base.batch} and {source.batch}. Give as many."
            )
        key = (id(entry), id(base), id(source), example)
        if key not in self._aligned:
            views = (self.view(base, example), self.view(source, example))
            self._aligned[key] = (entry, resolve_aligned(entry, *views, self.table, where))
        found: tuple[tuple[int, ...], tuple[int, ...]] = self._aligned[key][1]
        return found

    def view(self, inputs: RunInputs, example: int) -> TokenView:
        """One example of a run."""
        key = (id(inputs), example)
        if key not in self._views:
            self._views[key] = (inputs, self._view(inputs, example))
        return self._views[key][1]

    def _view(self, inputs: RunInputs, example: int) -> TokenView:
        real = None if self.padding_counts else inputs.real_positions
        length = inputs.length if real is None else len(real[example])
        if inputs.input_ids is None:
            return TokenView(None, self.tokenizer, example, length, inputs.batch)
        row = inputs.input_ids[example].tolist()
        ids = tuple(row if real is None else (row[index] for index in real[example]))
        view = TokenView(ids, self.tokenizer, example, length, inputs.batch, inputs.media or self.media)
        twin = self._alike.setdefault(ids, view)
        if twin is not view:
            view = replace(twin, example=example, batch=inputs.batch)
            vars(view).update({name: vars(twin)[name] for name in _MADE if name in vars(twin)})
        return view
