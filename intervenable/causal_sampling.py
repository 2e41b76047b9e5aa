"""Inputs and interventions of a causal model, drawn at random from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from intervenable.causal_model import CausalModel
from intervenable.causal_values import Setting, same
from intervenable.errors import InputError, UnknownNameError, raise_all, unknown_name

Where = Mapping[str, Any] | Callable[[Mapping[str, Any]], bool] | None
"""What must hold: values by variable, or a function of the values of all variables."""

Draw = Callable[[random.Random, Setting], Setting | None]
"""Draws inputs for whose run certain values are wanted; it may return others or None, and is asked again."""

Sampler = Literal["uniform", "balanced"] | Draw

TRIES = 10_000
"""After so many draws in a row that do not fit it is said that nothing does."""

ATTEMPTS = 50
"""How often a balanced draw begins anew where the children of a variable want different values of it."""


def seeded(seed: int | random.Random) -> random.Random:
    """The generator of a seed; one that is given goes on where it is."""
    return seed if isinstance(seed, random.Random) else random.Random(seed)


def sample_input(
    model: CausalModel, seed: int | random.Random, where: Where, balanced: bool
) -> dict[str, Any]:
    """See `CausalModel.sample_input`."""
    rng = seeded(seed)
    goal = model.checked(where) if isinstance(where, Mapping) else {}
    draw = drawing(model, "balanced" if balanced else "uniform")
    for _ in range(TRIES // ATTEMPTS if balanced and goal else TRIES):
        setting = draw(rng, goal)
        if setting is not None and (where is None or fits(model.run(setting), goal, where)):
            return dict(setting)
    raise InputError(f"Of {TRIES} inputs that were drawn, none fits {where!r}. Is there one?")


def sample_intervention(
    model: CausalModel, seed: int | random.Random, variables: Sequence[str] | None
) -> dict[str, Any]:
    """See `CausalModel.sample_intervention`."""
    rng = seeded(seed)
    names = chosen_variables(model, variables)
    drawn = [name for name in names if rng.random() < 0.5] or [rng.choice(names)]
    return {name: rng.choice(model.domains[name].listed("draw one")) for name in drawn}


def chosen_variables(model: CausalModel, variables: str | Sequence[str] | None) -> tuple[str, ...]:
    """The variables that are set by hand; the internal ones by default.

    Raises:
        UnknownNameError: a name that is none of the variables.
        InputError: there are none, or one twice.
    """
    names = (
        (variables,)
        if isinstance(variables, str)
        else tuple(model.internal if variables is None else variables)
    )
    raise_all(
        [
            UnknownNameError(unknown_name("variable", name, model.variables))
            for name in names
            if name not in model.domains
        ]
    )
    if not names:
        raise InputError(
            "There is nothing between inputs and outputs to set by hand. Name variables:"
            f" {', '.join(map(repr, model.variables))}."
        )
    if len(set(names)) < len(names):
        raise InputError(f"variables={list(names)!r} names one twice. Each has one source.")
    return names


def fits(setting: Setting, goal: Setting, where: Where = None) -> bool:
    """Whether a setting of all variables has the values that are wanted."""
    if callable(where) and not where(setting):
        return False
    return all(same(setting[name], value) for name, value in goal.items())


def drawing(model: CausalModel, sampler: Sampler) -> Draw:
    """What draws inputs.

    Raises:
        InputError: an unknown name, or no function.
    """
    if callable(sampler):
        return sampler
    if sampler == "uniform":
        return lambda rng, goal: _uniform(model, rng, goal)
    if sampler == "balanced":
        return _Balanced(model)
    raise InputError(
        f"sampler={sampler!r} is unknown. Allowed: 'balanced', 'uniform', or a function of a random.Random and the"
        " values that must come out."
    )


def _uniform(model: CausalModel, rng: random.Random, goal: Setting) -> Setting:
    drawn = {}
    for name in model.inputs:
        values = model.domains[name].listed("draw one")
        drawn[name] = goal[name] if name in goal else rng.choice(values)
    return drawn


class _Balanced:
    """Draws an output first and then, child by child, values of the parents that make it, down to the inputs."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.classes = model.possible_classes

    def __call__(self, rng: random.Random, goal: Setting) -> Setting | None:
        wanted = goal or self._output(rng)
        for _ in range(ATTEMPTS):
            drawn = self._drawn(rng, dict(wanted))
            if drawn is not None:
                return _uniform(self.model, rng, drawn)
        return None  # values that can be made one by one, and not together

    def _output(self, rng: random.Random) -> dict[str, Any]:
        name = rng.choice(self.model.outputs)
        if not self.model.parents[name]:
            return {}
        return {name: rng.choice([value for value, rows in self.classes[name].items() if rows])}

    def _drawn(self, rng: random.Random, setting: dict[str, Any]) -> dict[str, Any] | None:
        """Values down to the inputs; None if two children of a variable wanted different ones."""
        for name in reversed(self.model.order):
            if name not in setting or not self.model.parents[name]:
                continue
            rows = self.classes[name].get(setting[name], [])
            known = [parent for parent in self.model.parents[name] if parent in setting]
            if known:
                rows = [row for row in rows if all(same(row[parent], setting[parent]) for parent in known)]
            if not rows:
                return None
            setting |= rng.choice(rows)
        return setting


def possible_values(model: CausalModel, name: str) -> list[Any]:
    """The values that a variable can come to have, and where variables share parents perhaps more.

    Raises:
        InputError: it, or what it depends on, was declared without values.
    """
    if not model.parents[name]:
        return list(model.domains[name].listed("draw one"))
    return [value for value, rows in model.possible_classes[name].items() if rows]
