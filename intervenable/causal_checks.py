"""What can be wrong with the declaration of a causal model, and the order in which its variables are computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intervenable.causal_values import Domain
from intervenable.errors import ConfigError, Fault, UnknownNameError, unknown_name


def checked_names(variables: Sequence[str]) -> tuple[str, ...]:
    """The names of the variables.

    Raises:
        ConfigError: none, one twice, or something else.
    """
    names = tuple(variables)
    if not names:
        raise ConfigError("A causal model without variables says nothing. Name at least one.")
    given: tuple[object, ...] = names
    wrong = [name for name in given if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is no name of a variable. Give texts.")
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ConfigError(f"The variable {twice[0]!r} is listed twice. Each may occur once.")
    return names


def strangers(variables: tuple[str, ...], given: Mapping[str, Any]) -> list[Fault]:
    """Names in the tables that are none of the variables."""
    faults: list[Fault] = []
    for table in ("values", "parents", "functions", "timesteps", "equiv_classes", "pos"):
        for name in given[table] or ():
            if name not in variables:
                faults.append(UnknownNameError(unknown_name("variable", name, variables, f"in `{table}`")))
    for name, parents in given["parents"].items():
        for parent in parents:
            if parent not in variables:
                where = f"among the parents of {name!r}"
                faults.append(UnknownNameError(unknown_name("variable", parent, variables, where)))
    return faults


def read_domains(
    variables: tuple[str, ...], values: Mapping[str, Sequence[Any] | None]
) -> tuple[dict[str, Domain], list[Fault]]:
    """What each variable may be, and what is wrong with that."""
    domains: dict[str, Domain] = {}
    faults: list[Fault] = []
    for name in variables:
        try:
            domains[name] = Domain(name, values.get(name))
        except ConfigError as error:
            faults.append(error)
    return domains, faults


def unfit_functions(
    parents: Mapping[str, tuple[str, ...]], functions: Mapping[str, Callable[..., Any]]
) -> list[Fault]:
    """What is wrong with the functions: one is missing, or takes another number of parents."""
    faults: list[Fault] = []
    for name, above in parents.items():
        taken = ", ".join(above)
        if name not in functions:
            if above:
                faults.append(
                    ConfigError(
                        f"Variable {name!r} has parents and no function. Give one that takes ({taken})."
                    )
                )
            continue
        if not callable(functions[name]):
            faults.append(
                ConfigError(
                    f"The function of {name!r} is {functions[name]!r}. Give one that takes ({taken})."
                )
            )
            continue
        try:
            signature = inspect.signature(functions[name])
        except (TypeError, ValueError):  # some built-in functions do not say what they take
            continue
        try:
            signature.bind(*above)
        except TypeError:
            faults.append(
                ConfigError(
                    f"The function of {name!r} takes {signature}, and {name!r} has {len(above)} parents. Give one"
                    f" that takes ({taken})."
                )
            )
    return faults


def topological(parents: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The variables so that each comes after its parents, otherwise as they were declared.

    Raises:
        ConfigError: they depend on each other in a circle.
    """
    done: dict[str, None] = {}
    while len(done) < len(parents):
        ready = [
            name for name in parents if name not in done and all(parent in done for parent in parents[name])
        ]
        if not ready:
            raise ConfigError(f"The variables depend on each other in a circle: {_circle(parents, done)}.")
        done.update(dict.fromkeys(ready))
    return tuple(done)


def _circle(parents: Mapping[str, tuple[str, ...]], done: Mapping[str, None]) -> str:
    """One of the circles, from parent to child."""
    path = [next(name for name in parents if name not in done)]
    while path[-1] not in path[:-1]:
        path.append(next(parent for parent in parents[path[-1]] if parent not in done))
    return " -> ".join(reversed(path[path.index(path[-1]) :]))


def longest_paths(parents: Mapping[str, tuple[str, ...]], order: Sequence[str]) -> dict[str, int]:
    """For each variable the length of the longest path to it; for outputs that of the longest of all."""
    steps: dict[str, int] = {}
    for name in order:
        steps[name] = 1 + max((steps[parent] for parent in parents[name]), default=-1)
    end = max(steps.values())
    inner = {parent for above in parents.values() for parent in above}
    return {name: steps[name] if name in inner else end for name in parents}


def checked_timesteps(parents: Mapping[str, tuple[str, ...]], timesteps: Mapping[str, int]) -> dict[str, int]:
    """Time steps that were given.

    Raises:
        ConfigError: a variable without one, or a parent that is not computed before its child.
    """
    missing = [name for name in parents if name not in timesteps]
    if missing:
        raise ConfigError(
            f"No time step for {', '.join(map(repr, missing))}. Give one for each variable, or none."
        )
    for name, above in parents.items():
        for parent in above:
            if timesteps[parent] >= timesteps[name]:
                raise ConfigError(
                    f"{parent!r} is computed at step {timesteps[parent]} and its child {name!r} at {timesteps[name]}."
                    " Parents come first."
                )
    return {name: timesteps[name] for name in parents}
