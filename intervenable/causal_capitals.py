"""Capitals of countries as a task: which capital is meant?"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import TextTask
from intervenable.causal_texts import filled
from intervenable.causal_tokens import answer_token, answer_tokens
from intervenable.errors import InputError, UnknownNameError, raise_all, unknown_name
from intervenable.evaluation_mode import evaluating
from intervenable.small_lm.tasks import CAPITAL_PHRASINGS, CAPITALS

if TYPE_CHECKING:
    from torch import nn

BATCH = 16
"""Prompts in a run."""


@dataclass(frozen=True)
class CapitalTask(TextTask):
    """Capitals of countries; see `capital_facts`."""

    countries: tuple[str, ...] = ()
    """Those that prompts are about."""

    phrasings: tuple[str, ...] = ()
    """How prompts ask."""

    capitals: Mapping[str, str] = field(default_factory=lambda: CAPITALS)
    """The capital of each country."""

    def split(self, test: float = 0.25, seed: int = 0) -> tuple[CapitalTask, CapitalTask]:
        """The task for some of the countries and for the others, to train and to test with.

        Args:
            test: Share of the countries to test with, or how many.
            seed: The same seed gives the same split.

        Raises:
            InputError: one of the two would have fewer than two countries.

        Example:
            >>> train, test = capital_facts().split(0.25)
            >>> len(train.countries), len(test.countries), set(train.countries) & set(test.countries)
            (69, 23, set())
        """
        count = round(test * len(self.countries)) if test < 1 else int(test)
        if not 2 <= count <= len(self.countries) - 2:
            raise InputError(
                f"test={test!r} leaves {len(self.countries) - count} countries to train and {count} to test"
                " with. Each needs 2."
            )
        drawn = set(random.Random(seed).sample(self.countries, count))
        return self.only(name for name in self.countries if name not in drawn), self.only(
            name for name in self.countries if name in drawn
        )

    def only(self, countries: Iterable[str]) -> CapitalTask:
        """The task for these countries.

        Raises:
            InputError: fewer than two.
            UnknownNameError: one whose capital is not known here.
        """
        return _capitals(tuple(countries), self.phrasings, self.capitals)

    def apart_in(self, tokenizer: Any) -> CapitalTask:
        """The task for countries whose capitals begin with tokens of their own; the first of several alike is kept.

        Example:
            >>> from intervenable import load_small_lm
            >>> tokenizer, _ = load_small_lm()
            >>> len(capital_facts().apart_in(tokenizer).countries)
            92
        """
        taken: dict[int, str] = {}
        for country in self.countries:
            text = self.phrasings[0].format(country=country)
            taken.setdefault(answer_token(tokenizer, text, f" {self.capitals[country]}", "first"), country)
        return self.only(taken.values())

    def known_by(self, model: nn.Module, tokenizer: Any) -> CapitalTask:
        """The task for countries whose capital a model tells, by its first token, in each of the phrasings.

        Raises:
            InputError: it knows fewer than two.

        Example:
            >>> from intervenable import load_small_lm
            >>> tokenizer, model = load_small_lm()
            >>> len(capital_facts(["Spain", "Italy", "Japan"]).known_by(model, tokenizer).countries)
            3
        """
        apart = self.apart_in(tokenizer)
        known = [
            country
            for country, told in zip(apart.countries, _told(apart, model, tokenizer), strict=True)
            if told
        ]
        return self.only(known)


def capital_facts(
    countries: Iterable[str] | None = None,
    phrasings: Sequence[str] | str = CAPITAL_PHRASINGS[0],
    capitals: Mapping[str, str] = CAPITALS,
) -> CapitalTask:
    """What is the capital of a country? The variable is which capital is meant.

    A source asks about another country in the same phrasing, so that in it everything stands where it stands in the
    base; no pair occurs twice. The place `country` is where the country is written.

    Capitals are what the model adds, which may be no more than the beginning of a name:
    `tokenized(data, tokenizer, labels="first")`. SmolLM2-135M-Instruct tells 65 of these capitals when asked by "The
    capital and largest city of {country} is", and 39 by the shortest phrasing.

    Args:
        countries: Which ones; all that `capitals` has by default.
        phrasings: Prompts with `{country}` in them.
        capitals: The capital of each country; by default those that the shipped model knows.

    Raises:
        UnknownNameError: a country whose capital is not known here.
        InputError: fewer than two countries, or a phrasing without `{country}`.

    Example:
        >>> row = capital_facts().counterfactual(1)[0]
        >>> row["base"], row["source"], row["label"]
        ('The capital of Mongolia is', 'The capital of Hungary is', ' Budapest')
    """
    asked = (phrasings,) if isinstance(phrasings, str) else tuple(phrasings)
    return _capitals(tuple(capitals if countries is None else countries), asked, capitals)


def _capitals(
    countries: tuple[str, ...], phrasings: tuple[str, ...], capitals: Mapping[str, str]
) -> CapitalTask:
    raise_all(
        [
            UnknownNameError(unknown_name("country", name, capitals))
            for name in countries
            if name not in capitals
        ]
    )
    if len(set(countries)) < 2:
        raise InputError(
            f"countries={list(countries)!r}: there must be 2, one for the base and one for the source."
        )
    blank = [phrasing for phrasing in phrasings if "{country}" not in phrasing]
    if blank or not phrasings:
        raise InputError(f"phrasings={list(phrasings)!r}: give prompts, each with {{country}} in it.")
    names = tuple(dict.fromkeys(countries))
    meant = tuple(dict.fromkeys(capitals[name] for name in names))
    model = CausalModel(
        ["country", "phrasing", "capital", "answer"],
        {
            "country": names,
            "phrasing": range(len(phrasings)),
            "capital": meant,
            "answer": [f" {capital}" for capital in meant],
        },
        {"capital": ["country"], "answer": ["capital", "phrasing"]},
        {
            "capital": lambda country: capitals[country],
            "answer": lambda capital, phrasing: f" {capital}",
        },
    )
    return CapitalTask(
        model,
        sampler="uniform",
        balance=False,
        distinct=True,
        shared=("phrasing",),
        another=("country",),
        write=lambda setting: filled(phrasings[setting["phrasing"]], {"country": setting["country"]}),
        answer=lambda setting: str(setting["answer"]),
        countries=names,
        phrasings=phrasings,
        capitals=capitals,
    )


def _told(task: CapitalTask, model: nn.Module, tokenizer: Any) -> list[bool]:
    """For each country whether the model's first token is right in every phrasing."""
    told = [True] * len(task.countries)
    device = next(model.parameters()).device
    for phrasing in task.phrasings:
        texts = [phrasing.format(country=country) for country in task.countries]
        answers = answer_tokens(
            tokenizer, texts, [f" {task.capitals[country]}" for country in task.countries], "first"
        )
        ids = tokenizer(texts)["input_ids"]
        # Prompts of one length need no padding, which models differ in how they take.
        for length in sorted({len(row) for row in ids}):
            rows = [row for row, tokens in enumerate(ids) if len(tokens) == length]
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                given = torch.tensor([ids[row] for row in batch], device=device)
                with torch.no_grad(), evaluating(model):
                    found = model(input_ids=given).logits[:, -1].argmax(-1).tolist()
                for row, token in zip(batch, found, strict=True):
                    told[row] &= token == answers[row]
    return told
