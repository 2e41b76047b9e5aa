"""Positions as people say them -> positions of one example. The only file that knows what names mean."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from intervenable.chat_roles import messages
from intervenable.errors import LocationError, LocationRangeError
from intervenable.position_entries import (
    Aligned,
    Entry,
    Except,
    PerExample,
    Regex,
    Role,
    Sampled,
    Segment,
    Span,
    Words,
)
from intervenable.position_media import NAMES as MEDIA_NAMES
from intervenable.position_media import positions_of_medium
from intervenable.token_classes import Markers, TokensOfClass, tokens_of_class
from intervenable.token_text import TokenView, align


@dataclass(frozen=True)
class NameTable:
    """What names mean beyond those that everyone knows."""

    names: Mapping[str, Entry] = field(default_factory=dict)
    """Entries by name."""

    pivots: tuple[int | str, ...] = ()
    """What divides an example into the parts of `inputs-partition-i`."""

    classes: Mapping[str, Markers] = field(default_factory=dict)
    """Classes of tokens beside text (`image`) by name."""

    seed: int = 0
    """Seed of what is drawn."""

    generator: torch.Generator | None = None
    """What draws instead."""


NO_NAMES = NameTable()
GROUP_NAME = re.compile(r"(random-)?(all|special|inputs-partition|start|end|text|image|audio|video)(-|$)")
"""Names that stand for groups of tokens, more or fewer of them."""
NAMES = ("all", "first", "last", "special")
PATTERNS = ("last-n", "inputs-partition-i", "random-inputs-partition-i-n")
_COUNTED = re.compile(r"last-(\d+)")
_PARTITION = re.compile(r"(random-)?inputs-partition-(\d+)(?(1)(?:-(\d+))?)")
_CLASS = re.compile(r"(all|start|end|last|special)-(\w+)")
_RANDOM = re.compile(r"(random)-(\w+?)(?:-(\d+))?")
_ALWAYS_NAMES = re.compile(r"all-text|(all|start|end|last|special)-image|random-(text|image)(-\d+)?")


def is_name(text: str) -> bool:
    """Whether everyone knows this name, so that it cannot be given another meaning."""
    patterns = (_COUNTED, _PARTITION, _ALWAYS_NAMES)
    return text in NAMES or any(pattern.fullmatch(text) for pattern in patterns)


def resolve(entry: Entry, view: TokenView, table: NameTable = NO_NAMES, where: str = "") -> tuple[int, ...]:
    """The positions of one example that an entry chooses, counted from 0.

    Args:
        entry: What a user wrote; see `position_entries`.
        view: The example.
        table: What names mean.
        where: What the entry is about, for messages: `"base locations of 'layer_3.block_output.pos'"`.

    Raises:
        LocationError: it says nothing sensible, does not occur, or chooses nothing.
        LocationRangeError: it names a position that the example does not have.
    """
    return _Reading(view, table, f" in the {where}" if where else "").chosen(entry)


def resolve_aligned(
    entry: Aligned, base: TokenView, source: TokenView, table: NameTable = NO_NAMES, where: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The positions of the source and of the base that an alignment pairs, in the same order.

    Raises:
        LocationError: one of the two has no tokens, or nothing that was chosen has a counterpart.
    """
    wanted = resolve(entry.entry, base, table, where)
    if base.ids is None or source.ids is None:
        raise LocationError(f"Example {base.example} has no token ids to align by. Say where by ints.")
    counterpart = dict(align(base.ids, source.ids, entry.unequal))
    paired = [position for position in wanted if position in counterpart]
    if not paired:
        raise LocationError(
            f"{entry!r} chooses nothing for example {base.example}: none of its positions"
            f" {', '.join(map(str, wanted))} has a counterpart in the source."
        )
    return tuple(counterpart[position] for position in paired), tuple(paired)


class _Reading:
    """Entries of one example being read."""

    def __init__(self, view: TokenView, table: NameTable, where: str) -> None:
        self.view = view
        self.table = table
        self.where = where
        self.example = f"example {view.example}"
        self.within: tuple[str, ...] = ()  # names whose meaning is being read

    def chosen(self, entry: Entry) -> tuple[int, ...]:
        """Positions of an entry, at least one."""
        found = tuple(self._read(entry))
        if not found:
            raise LocationError(
                f"{entry!r}{self.where} chooses nothing for {self.example}, which has {self._there()}."
            )
        return found

    def _read(self, entry: Entry) -> Sequence[int]:
        for kinds, reader in self._READERS:
            if isinstance(entry, kinds):
                return reader(self, entry)
        if callable(entry):
            return self._called(entry)
        return (self._index(entry),)

    def _there(self) -> str:
        size = len(self.view)
        return f"positions 0 to {size - 1} (or -{size} to -1)" if size else "no positions"

    def _unreadable(self, entry: Entry, hint: str) -> LocationError:
        return LocationError(f"{entry!r}{self.where} is not a position. {hint}")

    # --- numbers ---------------------------------------------------------------------------------------

    def _index(self, entry: Any) -> int:
        try:
            if isinstance(entry, (bool, torch.Tensor)) and getattr(entry, "dtype", torch.bool) is torch.bool:
                raise TypeError
            position = operator.index(entry)
        except TypeError:
            raise self._unreadable(
                entry,
                "Give an int (-1 is the last), a slice, a name such as 'last', a part of the text, or a list of"
                " them.",
            ) from None
        size = len(self.view)
        if not -size <= position < size:
            raise LocationRangeError(
                f"Position {position}{self.where} is out of range for {self.example}, which has {self._there()}."
            )
        return position % size

    def _slice(self, entry: slice) -> Sequence[int]:
        return range(len(self.view))[entry]

    def _range(self, entry: range) -> Sequence[int]:
        return [self._index(position) for position in entry]

    def _span(self, entry: Span) -> Sequence[int]:
        size = len(self.view)
        start, stop = (bound + size if bound < 0 else bound for bound in (entry.start, entry.stop))
        if not (0 <= start <= size and 0 <= stop <= size):
            raise LocationRangeError(
                f"{entry!r}{self.where} is out of range for {self.example}, which has {self._there()}; the stop,"
                f" which is left out, may be {size}."
            )
        return range(start, stop)

    def _list(self, entry: Sequence[Entry]) -> Sequence[int]:
        return [position for item in entry for position in self.chosen(item)]

    def _tuple(self, entry: tuple[Entry, ...]) -> Sequence[int]:
        bounds = ", ".join(map(repr, entry))
        raise self._unreadable(
            entry,
            "A tuple is a (source, base) pair of whole locations. Write a list for a set of positions, and"
            f" Span({bounds if len(entry) == 2 else 'start, stop'}) for a half-open range.",
        )

    def _nothing(self, entry: None) -> Sequence[int]:
        raise self._unreadable(entry, "Write 'all' for all of them.")

    # --- text ------------------------------------------------------------------------------------------

    def _text(self, entry: Entry) -> str:
        """The text of the example, in which an entry is looked for."""
        if self.view.ids is not None and self.view.tokenizer is not None:
            return self.view.text
        sought = f"{entry!r}{self.where} is looked for in the text of {self.example}"
        if self.view.ids is None:
            raise LocationError(f"{sought}, which has no token ids and so no text. Say where by ints.")
        near = get_close_matches(entry, NAMES, n=1) if isinstance(entry, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LocationError(
            f"{sought}, and there is no tokenizer to tell it.{hint} Give one: IntervenableModel(config, model,"
            " tokenizer=...), or say where by ints."
        )

    def _words(self, entry: Words) -> Sequence[int]:
        text, found, place = self._text(entry.text), [], 0
        while (place := text.find(entry.text, place)) >= 0:
            found.append((place, place + len(entry.text)))
            place += len(entry.text)
        if not found:
            raise LocationError(
                f"{entry.text!r}{self.where} does not occur in the text of {self.example}, {_shortened(text)}."
                f"{_nearest(entry.text, text)}"
            )
        return self._occurring(entry, found, repr(entry.text))

    def _regex(self, entry: Regex) -> Sequence[int]:
        text = self._text(entry)
        spans = [match.span(entry.group) for match in re.finditer(entry.pattern, text)]
        found = [(start, end) for start, end in spans if end > start]
        if not found:
            raise LocationError(
                f"The pattern {entry.pattern!r}{self.where} matches nothing in the text of {self.example},"
                f" {_shortened(text)}."
            )
        return self._occurring(entry, found, f"The pattern {entry.pattern!r}")

    def _occurring(self, entry: Words | Regex, found: Sequence[tuple[int, int]], what: str) -> Sequence[int]:
        count = len(found)
        which = entry.occurrence
        if which is None:
            if count > 1:
                kind, wanted = type(entry).__name__, entry.text if isinstance(entry, Words) else entry.pattern
                places = ", ".join(_surrounded(self.view.text, *span) for span in found[:4])
                raise LocationError(
                    f"{what}{self.where} occurs {count} times in {self.example}: {places}{', ...' * (count > 4)}. Say"
                    f" which: {kind}({wanted!r}, occurrence=0) (to {count - 1}; -1 is the last), or occurrence='all'."
                )
        elif which != "all":
            if not -count <= which < count:
                raise LocationRangeError(
                    f"Occurrence {which} of {what}{self.where} is out of range for {self.example}, which has"
                    f" occurrences 0 to {count - 1} (or -{count} to -1)."
                )
            found = [found[which]]
        taken: dict[int, None] = {}
        for start, end in found:
            tokens = self.view.covering(*_trimmed(self.view.text, start, end))
            part = {"all": tokens, "first": tokens[:1], "last": tokens[-1:]}[entry.take]
            taken.update(dict.fromkeys(part))
        return tuple(taken)

    def _role(self, entry: Role) -> Sequence[int]:
        text = self._text(entry)
        spans = [span for role, span in messages(self.view.tokenizer, text) if role == entry.role]
        if not spans:
            raise LocationError(
                f"Nobody speaks as {entry.role!r} in the text of {self.example}, {_shortened(text)}."
            )
        if entry.turn is not None:
            if not -len(spans) <= entry.turn < len(spans):
                raise LocationRangeError(
                    f"Turn {entry.turn} of {entry.role!r}{self.where} is out of range for {self.example}, which has"
                    f" turns 0 to {len(spans) - 1} (or -{len(spans)} to -1)."
                )
            spans = [spans[entry.turn]]
        tokens = [token for span in spans for token in self.view.covering(*_trimmed(text, *span))]
        return tuple(dict.fromkeys(tokens))

    # --- parts of other entries ------------------------------------------------------------------------

    def _segment(self, entry: Segment) -> Sequence[int]:
        pivots = self.table.pivots if entry.pivots is None else entry.pivots
        dropped = {place for pivot in pivots if isinstance(pivot, str) for place in self._tokens_like(pivot)}
        cuts = {self._index(pivot) for pivot in pivots if not isinstance(pivot, str)} | dropped
        bounds = [0, *sorted(cuts), len(self.view)]
        count = len(bounds) - 1
        if not -count <= entry.index < count:
            raise LocationRangeError(
                f"Segment {entry.index}{self.where} is out of range for {self.example}, which its pivots"
                f" {', '.join(map(repr, pivots)) or '(none)'} divide into segments 0 to {count - 1}."
            )
        start, stop = bounds[entry.index % count], bounds[entry.index % count + 1]
        return [position for position in range(start, stop) if position not in dropped]

    def _tokens_like(self, pivot: str) -> Sequence[int]:
        tokens = self.view.tokens
        alike = [
            place for place, token in enumerate(tokens) if pivot == token or pivot.strip() == token.strip()
        ]
        return alike or self._words(Words(pivot, occurrence="all"))

    def _sampled(self, entry: Sampled) -> Sequence[int]:
        candidates = self.chosen(entry.of)
        if entry.count > len(candidates):
            raise LocationError(
                f"{entry!r}{self.where} draws {entry.count} of the {len(candidates)} positions there are in"
                f" {self.example}."
            )
        generator = entry.generator or (self.table.generator if entry.seed is None else None)
        if generator is not None:
            order = torch.randperm(len(candidates), generator=generator, device=generator.device)
            drawn = order[: entry.count].tolist()
        else:
            seed = self.table.seed if entry.seed is None else entry.seed
            drawn = random.Random(f"{seed}/{self.view.example}").sample(range(len(candidates)), entry.count)
        return [candidates[place] for place in sorted(drawn)]

    def _except(self, entry: Except) -> Sequence[int]:
        left_out = set(self.chosen(entry.exclude))
        return [position for position in self.chosen(entry.of) if position not in left_out]

    def _per_example(self, entry: PerExample) -> Sequence[int]:
        count = len(entry.entries)
        batch = self.view.batch
        if self.view.example >= count or (batch is not None and batch != count):
            examples = self.view.example + 1 if batch is None else batch
            raise LocationError(
                f"PerExample{self.where} has {count} entries, and the batch has {examples} examples. Give one for"
                " each."
            )
        return self.chosen(entry.entries[self.view.example])

    def _aligned(self, entry: Aligned) -> Sequence[int]:
        raise LocationError(
            f"{entry!r}{self.where} is about a source and a base together: give it for both of them, as"
            " {'sources->base': ...} without a pair."
        )

    def _called(self, entry: Callable[[TokenView], Entry]) -> Sequence[int]:
        made = entry(self.view)
        if callable(made):
            raise self._unreadable(entry, "It returned another function; return ints, a slice or a list.")
        return self._read(made)

    # --- names -----------------------------------------------------------------------------------------

    def _named(self, entry: str) -> Sequence[int]:
        if entry in self.table.names:
            return self._meaning(entry)
        known = {"all": slice(None), "first": 0, "last": -1}
        if entry in known:
            return self._read(known[entry])
        if entry == "special":
            return self.view.special
        if entry in MEDIA_NAMES:
            return positions_of_medium(self.view, entry, self.table.classes, self.where)
        if counted := _COUNTED.fullmatch(entry):
            return self._from_the_end(int(counted[1]))
        if part := _PARTITION.fullmatch(entry):
            segment = Segment(int(part[2]))
            return self._read(Sampled(segment, int(part[3] or 1)) if part[1] else segment)
        of_class = _RANDOM.fullmatch(entry) or _CLASS.fullmatch(entry)
        if of_class and (of_class[2] in self.table.classes or _ALWAYS_NAMES.fullmatch(entry)):
            return self._of_class(entry, *of_class.groups())
        return self._in_text(entry)

    def _from_the_end(self, count: int) -> Sequence[int]:
        if count == 0:
            raise LocationError(
                f"'last-0'{self.where} is no position: 'last' is the last one, 'last-2' that before."
            )
        return (self._index(-count),)

    def _meaning(self, name: str) -> Sequence[int]:
        if name in self.within:
            raise LocationError(f"The name {name!r} stands for itself: {' -> '.join((*self.within, name))}.")
        self.within = (*self.within, name)
        found = self._read(self.table.names[name])
        self.within = self.within[:-1]
        return found

    def _of_class(self, entry: str, what: str, name: str, count: str | None = None) -> Sequence[int]:
        if not self.table.classes or (name != "text" and name not in self.table.classes):
            raise LocationError(
                f"{entry!r}{self.where} speaks of classes of tokens, and {'no such' if self.table.classes else 'no'}"
                " class is known. Declare it: PositionResolver(tokenizer, classes={'image': (start, special, end)})."
            )
        if what == "random":
            return self._read(Sampled(f"all-{name}", int(count or 1)))
        if name == "text":
            others = [self._class(other) for other in self.table.classes]
            taken = {place for other in others for place in (*other.all, *other.markers)}
            return [place for place in range(len(self.view)) if place not in taken]
        found: Sequence[int] = getattr(self._class(name), what)
        return found

    def _class(self, name: str) -> TokensOfClass:
        return tokens_of_class(self.view, name, self.table.classes[name], self.where)

    def _in_text(self, entry: str) -> Sequence[int]:
        if not entry:
            raise self._unreadable(entry, "Give a name such as 'last', or a part of the text.")
        if entry in self._text(entry):
            return self._words(Words(entry))
        names = [*self.table.names, *NAMES]
        names += [*self.view.media, "text"] if self.view.media else []
        for name, markers in self.table.classes.items():
            kinds = (
                "all",
                "start",
                "end",
                "last",
                "random",
                *(("special",) if markers[1] is not None else ()),
            )
            names += [f"{kind}-{name}" for kind in kinds]
        names += ["all-text", "random-text"] if self.table.classes else []
        text = self.view.text
        near = get_close_matches(entry, names, n=1, cutoff=0.7)
        hint = f" Did you mean {near[0]!r}?" if near else _nearest(entry, text)
        raise LocationError(
            f"{entry!r}{self.where} is no name, and does not occur in the text of {self.example},"
            f" {_shortened(text)}.{hint}\nNames: {', '.join((*sorted(names), *PATTERNS))}."
        )

    # The first that fits is taken: a bool is an int, and a list may hold anything.
    _READERS: Sequence[tuple[type | tuple[type, ...], Callable[[Any, Any], Sequence[int]]]] = (
        (str, _named),
        (slice, _slice),
        (range, _range),
        (list, _list),
        (tuple, _tuple),
        (Span, _span),
        (Words, _words),
        (Regex, _regex),
        (Segment, _segment),
        (Role, _role),
        (Sampled, _sampled),
        (Except, _except),
        (PerExample, _per_example),
        (Aligned, _aligned),
        (type(None), _nothing),
    )


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A part of a text without the spaces at its ends, which tokenizers put to either side; all space stays."""
    part = text[start:end]
    if not part.strip():
        return start, end
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _shortened(text: str, width: int = 80) -> str:
    return repr(text) if len(text) <= width else f"{text[:width]!r}..."


def _surrounded(text: str, start: int, end: int, width: int = 12) -> str:
    before, after = text[max(start - width, 0) : start], text[end : end + width]
    return repr(
        f"{'...' * (start > width)}{before}[{text[start:end]}]{after}{'...' * (end + width < len(text))}"
    )


def _nearest(wanted: str, text: str) -> str:
    """A hint at the words of a text that are most like what was looked for."""
    words = [word.strip(".,;:!?\"'()[]") for word in text.split()]
    size = max(len(wanted.split()), 1)
    phrases = list(dict.fromkeys(" ".join(words[at : at + size]) for at in range(len(words) - size + 1)))
    alike = {phrase.lower(): phrase for phrase in phrases}
    near = get_close_matches(wanted.strip().lower(), alike, n=1)
    return f" Did you mean {alike[near[0]]!r}?" if near else ""
