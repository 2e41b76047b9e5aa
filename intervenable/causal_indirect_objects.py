"""Indirect objects as a task: which of two people is given something?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import TextTask
from intervenable.causal_texts import Written, filled
from intervenable.causal_values import Setting
from intervenable.errors import InputError
from intervenable.small_lm.tasks import INDIRECT_OBJECT_PHRASINGS, NAMES, OBJECTS, PLACES, is_held_out

ALSO_KNOWN = {"first": "first_person", "second": "second_person"}
"""Places whose names differ from the words in the phrasing."""


def indirect_objects(
    phrasings: Sequence[str] | str = INDIRECT_OBJECT_PHRASINGS, *, held_out: bool | None = None
) -> TextTask:
    """Who is given something? The variable is which of two people, the one named first or the one named second.

    Of two people one is named again, and gives; the other one receives. `receiver` is "first" or "second", and the
    `answer` is the name in that place: with `receiver` from a source that names other people, the answer is a
    person of the base. With `answer` from a source it is a person of the source. A source has the phrasing of
    its base. The places are `first_person`, `second_person`, `giver`, `place` and `object`. Both the shipped
    model and SmolLM2 have each name as one token; SmolLM2-135M-Instruct answers 52 of 60 prompts rightly.

    Wang et al. (2022), "Interpretability in the Wild", https://arxiv.org/abs/2211.00593.

    Args:
        phrasings: Prompts with `{first}`, `{second}`, `{giver}`, and, where wanted, `{place}` and `{object}`.
        held_out: True for pairs of names, and of place and object, that the shipped model never saw, False for those
            it saw, None for both.

    Raises:
        InputError: a phrasing without one of the three people.

    Example:
        >>> row = indirect_objects().counterfactual(1, seed=1)[0]
        >>> row["base"]
        'Brian and Jane went to the office, and Jane gave a phone to'
        >>> row["source"]
        'Max and Hannah went to the office, and Max gave a phone to'
        >>> row["base_label"], row["label"]
        (' Brian', ' Jane')
    """
    asked = (phrasings,) if isinstance(phrasings, str) else tuple(phrasings)
    people = ("{first}", "{second}", "{giver}")
    if not asked or any(person not in phrasing for phrasing in asked for person in people):
        raise InputError(f"phrasings={list(asked)!r}: give prompts, each with {', '.join(people)} in it.")
    model = CausalModel(
        ["first", "second", "named_again", "phrasing", "place", "object", "receiver", "answer"],
        {
            **dict.fromkeys(("first", "second", "answer"), NAMES),
            **dict.fromkeys(("named_again", "receiver"), ("first", "second")),
            "phrasing": range(len(asked)),
            "place": PLACES,
            "object": OBJECTS,
        },
        {
            "receiver": ["named_again"],
            "answer": ["first", "second", "receiver", "phrasing", "place", "object"],
        },
        {
            "receiver": lambda named_again: "second" if named_again == "first" else "first",
            "answer": lambda first, second, receiver, *_: first if receiver == "first" else second,
        },
    )

    def draw(rng: random.Random, goal: Setting) -> dict[str, Any]:
        while True:
            first, second = rng.sample(NAMES, 2)
            place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
            kinds = {is_held_out(*sorted((first, second))), is_held_out(place, thing)}
            if held_out is None or kinds == {held_out}:
                break
        drawn: dict[str, Any] = {"first": first, "second": second, "place": place, "object": thing}
        drawn |= {"named_again": rng.choice(("first", "second")), "phrasing": rng.randrange(len(asked))}
        return {**drawn, **{name: value for name, value in goal.items() if name in drawn}}

    def write(setting: Setting) -> Written:
        words = {name: setting[name] for name in ("first", "second", "place", "object")}
        written = filled(asked[setting["phrasing"]], {**words, "giver": setting[setting["named_again"]]})
        # "first" alone is a position that everyone knows.
        places = {ALSO_KNOWN.get(name, name): span for name, span in written.places.items()}
        return Written(written.text, places)

    return TextTask(
        model,
        variables=("receiver",),
        sampler=draw,
        balance=False,
        shared=("phrasing",),
        write=write,
        answer=lambda setting: f" {setting['answer']}",
    )
