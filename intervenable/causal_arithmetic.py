"""Addition of two numbers of two digits, with the carry as a variable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import TextTask, VectorTask
from intervenable.causal_texts import Written, filled
from intervenable.causal_values import Setting
from intervenable.errors import InputError

DIGITS = range(10)
INPUTS = ("tens_a", "ones_a", "tens_b", "ones_b")


@dataclass(frozen=True)
class ArithmeticTask(VectorTask):
    """Addition with digits as vectors; see `arithmetic_carry`."""

    def encoding(self, seed: int = 0) -> Callable[[Setting], list[float]]:
        """How inputs are written: ten numbers a digit, of which one is 1."""
        return lambda setting: [float(setting[name] == digit) for name in INPUTS for digit in DIGITS]

    def in_words(self, template: str = "{a} + {b} =") -> TextTask:
        """The same task with prompts; the places are `a` and `b`, and the answer is the sum after a space.

        Args:
            template: A prompt with `{a}` and `{b}`.

        Raises:
            InputError: the template lacks one of them.

        Example:
            >>> row = arithmetic_carry().in_words().factual(1)[0]
            >>> row["base"], row["label"]
            ('66 + 4 =', ' 70')
        """
        if "{a}" not in template or "{b}" not in template:
            raise InputError(f"template={template!r}: give a prompt with {{a}} and {{b}} in it.")

        def write(setting: Setting) -> Written:
            numbers = {name: str(10 * setting[f"tens_{name}"] + setting[f"ones_{name}"]) for name in "ab"}
            return filled(template, numbers)

        return TextTask(
            self.model,
            variables=self.variables,
            sampler=self.sampler,
            balance=self.balance,
            write=write,
            answer=lambda setting: f" {setting['sum']}",
        )


def arithmetic_carry() -> ArithmeticTask:
    """The sum of two numbers from 0 to 99; the variable is whether the ones carry over to the tens.

    `carry = (ones_a + ones_b >= 10)`, `ones = (ones_a + ones_b) mod 10`, `tens = tens_a + tens_b + carry` and
    `sum = 10 tens + ones`. A network is given four digits, ten numbers each, and answers one of 200 classes.
    Counterfactuals are about `carry` if nothing else is said: with another carry the sum changes by 10. Each
    input is drawn by itself.

    The algorithm is that of Quirke and Barez (2024), "Understanding Addition in Transformers",
    https://arxiv.org/abs/2310.13121.

    Example:
        >>> task = arithmetic_carry()
        >>> base = {"tens_a": 1, "ones_a": 2, "tens_b": 3, "ones_b": 4}
        >>> carries = {"tens_a": 0, "ones_a": 9, "tens_b": 0, "ones_b": 9}
        >>> task.model.run(base)["sum"], task.model.interchange(base, {"carry": carries})["sum"]
        (46, 56)
    """
    model = CausalModel(
        [*INPUTS, "carry", "tens", "ones", "sum"],
        {
            **dict.fromkeys(INPUTS, DIGITS),
            "carry": [False, True],
            "tens": range(20),
            "ones": DIGITS,
            "sum": range(200),
        },
        {
            "carry": ["ones_a", "ones_b"],
            "tens": ["tens_a", "tens_b", "carry"],
            "ones": ["ones_a", "ones_b"],
            "sum": ["tens", "ones"],
        },
        {
            "carry": lambda a, b: a + b >= 10,
            "tens": lambda a, b, carry: a + b + carry,
            "ones": lambda a, b: (a + b) % 10,
            "sum": lambda tens, ones: 10 * tens + ones,
        },
    )
    return ArithmeticTask(model, variables=("carry",), sampler="uniform", balance=False)
