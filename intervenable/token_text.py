"""Tokens as text: which characters of an example each of its tokens makes, and which tokens correspond."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, Literal, Protocol

from intervenable.errors import LocationError

LOST = "\ufffd"
"""What decoders put where bytes are no character, which those of half a character are not."""

CONTEXT = 4
"""How many tokens before one decide how it is written: spaces at the beginning of a text are often dropped."""

Span = tuple[int, int]
Unequal = Literal["last", "skip", "error"]


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Any) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class TokenView:
    """The real tokens of one example, counted from 0, as whoever chooses among them sees them.

    Text, tokens and spans are made when they are first looked at.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> view = TokenView(tuple(tokenizer("The capital of Spain")["input_ids"]), tokenizer)
        >>> view.text, view.tokens[3], view.spans[3], view.covering(15, 20)
        ('The capital of Spain', ' Spain', (14, 20), (3,))
    """

    ids: tuple[int, ...] | None
    """Token ids; None if the model is given something else."""

    tokenizer: Decodes | None = field(default=None, repr=False, compare=False)
    """What decodes them; None if there is none."""

    example: int = 0
    """Which example of the batch it is."""

    length: int = -1
    """How many tokens there are; by default as many as ids."""

    batch: int | None = None
    """How many examples there are, where that is known."""

    media: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """The ids that stand for pictures and sounds in the model, by medium; none if no model is known."""

    def __post_init__(self) -> None:
        if self.length < 0:
            object.__setattr__(self, "length", len(self.ids or ()))

    def __len__(self) -> int:
        return self.length

    @property
    def text(self) -> str:
        """All tokens decoded together, special ones too."""
        return self._written[0]

    @property
    def spans(self) -> tuple[Span, ...]:
        """For each token the characters of the text that it makes, all or in part, as start and end."""
        return self._written[1]

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Each token decoded by itself."""
        decode, ids = self._decoding()
        texts = {token: decode([token]) for token in dict.fromkeys(ids)}
        return tuple(texts[token] for token in ids)

    @cached_property
    def special(self) -> tuple[int, ...]:
        """Positions of the tokenizer's special tokens."""
        _, ids = self._decoding()
        special = set(getattr(self.tokenizer, "all_special_ids", None) or ())
        return tuple(position for position, token in enumerate(ids) if token in special)

    def covering(self, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that make the characters from `start` up to `end`, all or some of them."""
        return tuple(
            position
            for position, (first, last) in enumerate(self.spans)
            if first < end and last > start and first < last
        )

    @cached_property
    def _written(self) -> tuple[str, tuple[Span, ...]]:
        return token_spans(*self._decoding())

    def _decoding(self) -> tuple[Callable[[Sequence[int]], str], tuple[int, ...]]:
        if self.ids is None:
            raise LocationError(
                f"Example {self.example} has no token ids, and so no text to look in. Say where by ints."
            )
        if self.tokenizer is None:
            raise LocationError(
                f"There is no tokenizer to tell the text of example {self.example}. Give one:"
                " IntervenableModel(config, model, tokenizer=...), or say where by ints."
            )
        return decoder(self.tokenizer), self.ids


def decoder(tokenizer: Decodes) -> Callable[[Sequence[int]], str]:
    """How a tokenizer writes ids, without cosmetics that would move characters."""
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        plain: Any = tokenizer
        return lambda ids: str(plain.decode(list(ids), clean_up_tokenization_spaces=False))
    return lambda ids: tokenizer.decode(list(ids))


def token_spans(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
    """The text of tokens, and for each the characters that it makes as start and end.

    A character of several tokens (bytes of an emoji) belongs to each of them; a token that makes none has an empty
    span. Nothing but decoding is asked of the tokenizer: a token's characters are those that its window of tokens
    has more with it than without it.

    Args:
        decode: Text of ids.
        ids: Ids of one text.
    """
    text = decode(ids)
    spans = _by_windows(decode, ids)
    if not _tile(spans, len(text)):
        spans = _by_prefixes(decode, ids, text)
    return text, tuple(spans)


def _by_windows(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[Span]:
    spans: list[Span] = []
    begin, whole, done, before = (
        0,
        0,
        0,
        "",
    )  # window, tokens before `whole` make whole characters, `done` of them
    seams = [0]  # between these tokens no character is divided
    while whole < len(ids):
        step, now = _until_whole(decode, ids, begin, whole, before)
        spans += [(done + start, done + end) for start, end in step]
        done += max(len(now) - len(before), 0)
        before, whole = now, whole + len(step)
        seams.append(whole)
        if whole - begin > 3 * CONTEXT:
            begin = max((seam for seam in seams if seam <= whole - CONTEXT), default=begin)
            seams = [seam for seam in seams if seam >= begin]
            before = decode(ids[begin:whole])
    return spans


def _until_whole(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], begin: int, whole: int, before: str
) -> tuple[list[Span], str]:
    """Spans, counted from the end of `before`, of the tokens from `whole` on up to where a character ends."""
    known = 0  # characters that are certain so far
    half: list[Span] = []  # tokens so far: what was certain before each, and what with it
    for end in range(whole + 1, len(ids) + 1):
        now = decode(ids[begin:end])
        new = now[len(before) :]
        if not now.endswith(LOST) or end == len(ids):
            break
        certain = len(new.rstrip(LOST))
        half.append((known, max(known, certain)))
        known = max(known, certain)
    if end == len(ids) and now.endswith(LOST):  # the text ends within a character
        certain = len(new.rstrip(LOST))
        half.append((known, max(known, certain)))
        return _lost(half, max(known, certain), len(new)), now
    lost = len(new[known:]) - len(new[known:].lstrip(LOST)) if half else 0
    return [*_lost(half, known, known + lost), (known + lost, len(new))], now


def _lost(half: Sequence[Span], known: int, end: int) -> list[Span]:
    """Spans of tokens that ended within characters, of which the last ones from `known` to `end` never got whole."""
    if end <= known:
        return [(start, certain + 1) for start, certain in half]
    waiting = [index for index, (_, certain) in enumerate(half) if certain == known]
    spans = [(start, certain + 1) for start, certain in half]
    alike = len(waiting) == end - known
    for place, index in enumerate(waiting):
        start = half[index][0]
        spans[index] = (
            (max(start, known + place) if place else start, known + place + 1) if alike else (start, end)
        )
    return spans


def _tile(spans: Sequence[Span], length: int) -> bool:
    """Whether spans go from the beginning to the end without a gap."""
    reached = 0
    for start, end in spans:
        if not start <= reached <= max(end, reached) or end < start:
            return False
        reached = max(reached, end)
    return reached == length


def _by_prefixes(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> list[Span]:
    """Spans by decoding from the beginning each time: slow, for decoders that look far back."""
    spans: list[Span] = []
    known = 0
    for end in range(1, len(ids) + 1):
        now = decode(ids[:end])
        certain = _common(now.rstrip(LOST), text) if end < len(ids) else len(text)
        divided = now.endswith(LOST) and end < len(ids)
        certain = max(known, certain)
        spans.append((known, min(certain + divided, len(text))))
        known = certain
    return spans


def _common(left: str, right: str) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def align(
    base_ids: Sequence[int], source_ids: Sequence[int], unequal: Unequal = "last"
) -> tuple[tuple[int, int], ...]:
    """Pairs of positions of two token sequences that correspond: `(base position, source position)`.

    Runs of tokens that both have are paired one to one, and so are different runs of one length in the same place.
    Tokens that only one of them has are left out.

    Args:
        base_ids: Tokens of the base.
        source_ids: Tokens of the source.
        unequal: What becomes of different runs of unequal length: their `last` tokens are paired, they are left out
            (`skip`), or it is an `error`.

    Raises:
        LocationError: `unequal` is unknown, or it is `"error"` and there is such a run.

    Example:
        >>> align([5, 6, 7, 8], [5, 9, 9, 7, 8])
        ((0, 0), (1, 2), (2, 3), (3, 4))
    """
    if unequal not in ("last", "skip", "error"):
        raise LocationError(f"unequal={unequal!r} is unknown. Allowed: 'last', 'skip', 'error'.")
    return tuple(_pairs(list(base_ids), list(source_ids), unequal))


def _pairs(base: list[int], source: list[int], unequal: Unequal) -> Iterator[tuple[int, int]]:
    matcher = SequenceMatcher(None, base, source, autojunk=False)
    for kind, start, end, there, to in matcher.get_opcodes():
        if end - start == to - there:
            yield from zip(range(start, end), range(there, to), strict=True)
        elif unequal == "error":
            raise LocationError(
                f"From base position {start} on there are {end - start} tokens where the source has {to - there}"
                f" (from position {there} on). unequal='last' pairs the last ones, unequal='skip' leaves such tokens"
                " out."
            )
        elif kind == "replace" and unequal == "last":
            yield end - 1, to - 1
