"""Prompts of a causal model, where in them its variables are written, and data sets of them."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from intervenable.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Written:
    """A text, and which of its characters write what."""

    text: str
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Start and end by name; of a name that is written several times, the first time."""


def filled(template: str, words: Mapping[str, str]) -> Written:
    """A template with words in its braces.

    Raises:
        InputError: braces around a name that no word has.

    Example:
        >>> filled("The capital of {country} is", {"country": "Spain"})
        Written(text='The capital of Spain is', places={'country': (15, 20)})
    """
    text = ""
    places: dict[str, tuple[int, int]] = {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is None:
            continue
        if name not in words:
            raise InputError(
                f"{template!r} asks for {{{name}}}. Allowed: {', '.join(f'{{{word}}}' for word in words)}."
            )
        places.setdefault(name, (len(text), len(text) + len(words[name])))
        text += words[name]
    return Written(text, places)


def text_dataset(columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """The columns of factual or counterfactual examples whose inputs are `Written`, as a data set of texts.

    `input_ids` becomes `base` and `base_places`, `source_input_ids` becomes `source` and `source_places`, and labels
    lose their `s`: what `tokenized` makes of them has the names and numbers that training takes.
    """
    from datasets import Dataset

    named: dict[str, Any] = {}
    for side, column in (("base", "input_ids"), ("source", "source_input_ids")):
        if column in columns:
            named[side] = [_texts(written) for written in columns[column]]
            named[f"{side}_places"] = [_places(written) for written in columns[column]]
    for label in ("label", "base_label", "source_label"):
        if f"{label}s" in columns:
            named[label] = list(columns[f"{label}s"])
    rest = {name: list(columns[name]) for name in ("intervention_id", "source_mask") if name in columns}
    return Dataset.from_dict({**named, **rest})


def _texts(written: Written | Sequence[Written]) -> str | list[str]:
    return written.text if isinstance(written, Written) else [one.text for one in written]


def _places(written: Written | Sequence[Written]) -> Any:
    if isinstance(written, Written):
        return {name: list(span) for name, span in written.places.items()}
    return [_places(one) for one in written]
