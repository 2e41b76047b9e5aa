"""`tokenized`: texts of a causal task as token ids, its answers as tokens, and places as positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from intervenable.errors import InputError, LocationError
from intervenable.position_entries import Entry
from intervenable.position_reading import is_name, resolve
from intervenable.position_resolver import PositionResolver
from intervenable.token_text import TokenView

if TYPE_CHECKING:
    from datasets import Dataset

Labels = Literal["single", "first"]
Take = Literal["all", "first", "last"]
SIDES = {"base": "", "source": "source_"}
"""Columns of texts, and what their token columns begin with."""


def tokenized(
    dataset: Dataset,
    tokenizer: Any,
    *,
    positions: Entry = None,
    take: Take = "last",
    labels: Labels = "single",
    padding: bool | int = True,
) -> Dataset:
    """A data set of texts with what a language model needs added to it: token ids, answers, positions.

    Args:
        dataset: With a column `base`, and where there are sources `source` (a text, or a list of them), `label`,
            `base_label`, `source_label`, as the tasks in words make them.
        tokenizer: Of the model; a `PositionResolver` brings names for positions.
        positions: Where: the name of a place of the task (`"country"`), or whatever `iv.positions` takes (`"last"`,
            `Words("of")`, -2, a list of these), looked up in each text. None adds no positions.
        take: Which tokens of a place: the `"last"` one, where it ends; the `"first"` one, or `"all"`.
        labels: An answer of several tokens is an error (`"single"`), or stands for its `"first"` token.
        padding: True pads to the longest text of the data set, a number to so many tokens, on the side that the
            tokenizer pads on; False leaves the rows as long as they are.

    Returns:
        The data set with `input_ids` and `attention_mask`, `source_input_ids` and `source_attention_mask`, `labels`,
        `base_labels` and `source_labels` as token ids, `base_position` and `source_position` (counting real
        tokens): a number where each example has one, otherwise a list, and of several sources a list each.

    Raises:
        InputError: no column `base`, an answer of several tokens or one that runs into the end of its text, a
            text that is longer than `padding`.
        LocationError: an entry that does not occur in a text.

    Example:
        >>> from intervenable import load_small_lm
        >>> from intervenable.causal import capital_facts
        >>> tokenizer, _ = load_small_lm()
        >>> row = tokenized(capital_facts().counterfactual(1), tokenizer, positions="country")[0]
        >>> row["base"], row["base_position"], tokenizer.decode(row["labels"])
        ('The capital of Mongolia is', 3, ' Budapest')
    """
    resolver = tokenizer if isinstance(tokenizer, PositionResolver) else PositionResolver(tokenizer)
    table: Any = dataset.with_format(None)[:]
    if "base" not in table:
        raise InputError(
            f"The data set has no column 'base' of texts, but {', '.join(table) or 'none'}. Tasks in words make one:"
            " iv.causal.capital_facts().counterfactual(100)."
        )
    _check_options(take, labels, padding)
    texts = _Texts(resolver, (text for side in SIDES for row in table.get(side, ()) for text in _listed(row)))
    added: dict[str, list[Any]] = {}
    encoded = {side: [texts.ids(given) for given in table[side]] for side in SIDES if side in table}
    length = _length(encoded, padding)
    for side, rows in encoded.items():
        ids, masks = f"{SIDES[side]}input_ids", f"{SIDES[side]}attention_mask"
        pairs = [_each(row, lambda one: _padded(one, length, texts.tokenizer)) for row in rows]
        added[ids] = [_each(pair, lambda one: one[0]) for pair in pairs]
        added[masks] = [_each(pair, lambda one: one[1]) for pair in pairs]
    for column, side in (("label", "base"), ("base_label", "base"), ("source_label", "source")):
        if column in table and side in table:
            added[f"{column}s"] = answer_tokens(texts.tokenizer, table[side], table[column], labels)
    if positions is not None:
        for side in encoded:
            places = table.get(f"{side}_places", [None] * len(encoded[side]))
            added[f"{side}_position"] = [
                texts.positions(row, given, where, positions, take)
                for row, (given, where) in enumerate(zip(table[side], places, strict=True))
            ]
        found = [chosen for side in encoded for chosen in added[f"{side}_position"]]
        if all(len(chosen) == 1 and isinstance(chosen[0], int) for chosen in found):
            for side in encoded:
                added[f"{side}_position"] = [chosen[0] for chosen in added[f"{side}_position"]]
    return _with_columns(dataset, added)


def answer_token(tokenizer: Any, text: str, answer: str, labels: Labels = "single") -> int:
    """The token with which a text goes on if an answer follows.

    Raises:
        InputError: the answer is several tokens and not the first is wanted, or it runs into the text.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> tokenizer.decode([answer_token(tokenizer, "The capital of Spain is", " Madrid")])
        ' Madrid'
    """
    [found] = answer_tokens(tokenizer, [text], [answer], labels)
    return int(found)


def answer_tokens(
    tokenizer: Any, texts: Sequence[Any], answers: Sequence[Any], labels: Labels = "single"
) -> list[Any]:
    """For each text the token with which it goes on; where both are lists, a list of tokens."""
    pairs = [
        (row, text, answer)
        for row, (given, answered) in enumerate(zip(texts, answers, strict=True))
        for text, answer in zip(_listed(given), _listed(answered), strict=True)
    ]
    distinct = list(dict.fromkeys((text, answer) for _, text, answer in pairs))
    # Together, and not the answer alone: some tokenizers write a word differently at the beginning of a text.
    alone = _encode(tokenizer, [text for text, _ in distinct])
    whole = _encode(tokenizer, [text + answer for text, answer in distinct])
    known = dict(zip(distinct, zip(alone, whole, strict=True), strict=True))
    tokens = []
    for row, text, answer in pairs:
        before, after = known[text, answer]
        new = after[len(before) :]
        if after[: len(before)] != before or not new:
            raise InputError(
                f"The answer {answer!r} of row {row} runs into the last token of its text {text!r}, so that no token"
                f" begins it. Give it a leading space: {' ' + answer.lstrip()!r}."
            )
        if len(new) > 1 and labels != "first":
            written = ", ".join(repr(tokenizer.decode([token])) for token in new)
            raise InputError(
                f"The answer {answer!r} of row {row} is {len(new)} tokens: {written}. Choose answers of one token, or"
                " have the first stand for them: labels='first'."
            )
        tokens.append(new[0])
    found = iter(tokens)
    return [_each(answered, lambda _: next(found)) for answered in answers]


class _Texts:
    """Texts as tokens, each made once."""

    def __init__(self, resolver: PositionResolver, texts: Iterable[str]) -> None:
        self.tokenizer = cast(Any, resolver.tokenizer)
        self.table = resolver.table
        if not callable(self.tokenizer):
            raise InputError(
                f"{type(self.tokenizer).__name__} does not encode text. Give the model's tokenizer."
            )
        distinct = list(dict.fromkeys(texts))
        knows_letters = bool(getattr(self.tokenizer, "is_fast", False))
        made = self.tokenizer(distinct, **({"return_offsets_mapping": True} if knows_letters else {}))
        spans = made["offset_mapping"] if knows_letters else [None] * len(distinct)
        self._ids = {text: list(ids) for text, ids in zip(distinct, made["input_ids"], strict=True)}
        self._spans = dict(zip(distinct, spans, strict=True))
        self._views: dict[str, TokenView] = {}

    def ids(self, given: str | Sequence[str]) -> Any:
        """Ids of a text, or of each of several."""
        return _each(given, self._ids.__getitem__)

    def positions(self, row: int, given: Any, places: Any, entry: Entry, take: Take) -> Any:
        """The positions that an entry chooses in a text, or in each of several."""
        if isinstance(given, list):
            each = zip(given, places or [None] * len(given), strict=True)
            return [self._chosen(row, text, where, entry, take) for text, where in each]
        return self._chosen(row, given, places, entry, take)

    def _chosen(
        self, row: int, text: str, places: Mapping[str, Any] | None, entry: Entry, take: Take
    ) -> list[int]:
        named = {}
        for name, span in (places or {}).items():
            if span is not None and not is_name(name):
                tokens = self._covering(text, *span)
                named[name] = {"all": tokens, "first": tokens[:1], "last": tokens[-1:]}[take]
        table = replace(self.table, names={**self.table.names, **named})
        try:
            return list(resolve(entry, self._view(text), table))
        except LocationError as error:
            known = f" Places of the task: {', '.join(map(repr, named))}." if named else ""
            raise type(error)(f"Row {row}: {error}{known}") from error

    def _view(self, text: str) -> TokenView:
        if text not in self._views:
            self._views[text] = TokenView(tuple(self._ids[text]), self.tokenizer)
        return self._views[text]

    def _covering(self, text: str, start: int, end: int) -> list[int]:
        """Positions of the tokens that write some characters of a text."""
        spans = self._spans[text]
        if spans is None:  # count the letters of the tokens decoded
            view = self._view(text)
            offset = view.text.find(text)
            found = list(view.covering(start + offset, end + offset)) if offset >= 0 else []
        else:
            found = [place for place, (first, last) in enumerate(spans) if first < end and last > start]
        if not found:
            raise LocationError(
                f"The tokenizer has no token that writes {text[start:end]!r} in {text!r}. Say where by ints or Words."
            )
        return found


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without what stands before and behind each."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _each(given: Any, function: Callable[[Any], Any]) -> Any:
    """A function of one text, its ids, or its answer; or of each of several sources'."""
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    return [function(one) for one in given] if several else function(given)


def _length(encoded: Mapping[str, Sequence[Any]], padding: bool | int) -> int | None:
    """To how many tokens texts are padded; None if they are not."""
    if padding is False:
        return None
    lengths = [
        len(ids) for rows in encoded.values() for row in rows for ids in (row if _nested(row) else [row])
    ]
    longest = max(lengths, default=0)
    if padding is True:
        return longest
    if longest > padding:
        raise InputError(
            f"padding={padding}, and the longest text has {longest} tokens. Give at least as many."
        )
    return padding


def _nested(row: Any) -> bool:
    return bool(row) and isinstance(row[0], list)


def _padded(ids: list[int], length: int | None, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and mask of one text."""
    lacking = 0 if length is None else length - len(ids)
    pad = next(
        (
            token
            for token in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
            if token is not None
        ),
        0,  # behind the mask any token will do
    )
    blank, mask = [pad] * lacking, [0] * lacking
    if getattr(tokenizer, "padding_side", "right") == "left":
        return blank + ids, mask + [1] * len(ids)
    return ids + blank, [1] * len(ids) + mask


def _with_columns(dataset: Dataset, added: Mapping[str, list[Any]]) -> Dataset:
    """The data set without places, which positions stand for now, and with these columns of whole numbers."""
    from datasets import Dataset, Features, Sequence, Value

    gone = [name for name in dataset.column_names if name.endswith("_places") or name in added]
    kept = dataset.with_format(None).remove_columns(gone)
    kinds: dict[str, Any] = {}
    for name, values in added.items():
        kind = Value("int64")
        for _ in range(_depth(values[0])):
            kind = Sequence(kind)
        kinds[name] = kind
    columns: Any = kept[:]
    return Dataset.from_dict({**columns, **added}, features=Features({**kept.features, **kinds}))


def _depth(value: Any) -> int:
    return 1 + _depth(value[0]) if isinstance(value, list) else 0


def _check_options(take: object, labels: object, padding: object) -> None:
    options: tuple[tuple[str, object, tuple[str, ...]], ...] = (
        ("take", take, ("all", "first", "last")),
        ("labels", labels, ("single", "first")),
    )
    for name, value, allowed in options:
        if value not in allowed:
            raise InputError(f"{name}={value!r} is unknown. Allowed: {', '.join(map(repr, allowed))}.")
    if not isinstance(padding, int) or (padding is not True and padding < 0):
        raise InputError(f"padding={padding!r}: give True, False, or a number of tokens.")
