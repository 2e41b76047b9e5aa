"""Price tags as a task: does an amount lie between two others?"""

from __future__ import annotations

import random

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import TextTask
from intervenable.causal_texts import Written, filled
from intervenable.causal_values import Setting
from intervenable.small_lm.tasks import PRICE_BRACKET, PRICE_QUESTION, dollars, is_held_out

CENTS = range(1000)
"""What things may cost, as for the shipped model."""


def price_tagging(*, held_out: bool | None = None) -> TextTask:
    """Does an amount lie between two others? The variables are whether it is above the lower and below the
    upper one.

    `answer = left and right`, where `left = (amount >= low)` and `right = (amount <= high)`, in cents. Prompts
    are those of the shipped model, and of one length for it. Counterfactuals are about `left` if nothing else
    is said, and each answer occurs equally often. The places are `low`, `high` and `amount`.

    Wu et al. (2023), "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca",
    https://arxiv.org/abs/2305.08809.

    Args:
        held_out: True for brackets that the shipped model never saw, False for those it saw, None for both.

    Example:
        >>> row = price_tagging().counterfactual(1)[0]
        >>> row["base"]
        'Please say yes only if it costs between 0.41 and 4.06 dollars, otherwise no. It costs 8.21 dollars. Answer:'
        >>> sorted(row["base_places"])
        ['amount', 'high', 'low']
    """
    truth = [False, True]
    model = CausalModel(
        ["low", "high", "amount", "left", "right", "answer"],
        {
            **dict.fromkeys(("low", "high", "amount"), CENTS),
            **dict.fromkeys(("left", "right", "answer"), truth),
        },
        {"left": ["low", "amount"], "right": ["high", "amount"], "answer": ["left", "right"]},
        {
            "left": lambda low, amount: amount >= low,
            "right": lambda high, amount: amount <= high,
            "answer": lambda left, right: left and right,
        },
    )

    def write(setting: Setting) -> Written:
        words = {name: dollars(setting[name]) for name in ("low", "high", "amount")}
        return filled(f"{PRICE_BRACKET} {PRICE_QUESTION}", words)

    return TextTask(
        model,
        variables=("left",),
        sampler=lambda rng, goal: _prices(rng, held_out),
        write=write,
        answer=lambda setting: " yes" if setting["answer"] else " no",
    )


def _prices(rng: random.Random, held_out: bool | None) -> dict[str, int]:
    """A bracket, and an amount in it, or to one or the other side of it."""
    while True:
        low = rng.randrange(900)
        high = low + rng.randrange(100, 801)
        if high not in CENTS or held_out not in (None, is_held_out(dollars(low), dollars(high))):
            continue
        sides = [range(low, high + 1), range(low), range(high + 1, len(CENTS))]
        inside, *outside = (side for side in sides if side)
        amount = rng.choice(inside if rng.random() < 0.5 or not outside else rng.choice(outside))
        return {"low": low, "high": high, "amount": amount}
