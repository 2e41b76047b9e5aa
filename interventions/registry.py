"""Names for interventions and functions, so that files can speak of them without holding code.

Nothing is ever imported because of a name: what is not registered is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from interventions.base import Intervention
from interventions.errors import (
    DuplicateInterventionError,
    InterventionArgumentError,
    UnknownInterventionError,
)

C = TypeVar("C", bound=type[Intervention])

_classes: dict[str, type[Intervention]] = {}
_callables: dict[str, Callable[..., Any]] = {}


@overload
def register_intervention(cls: C, *, name: str | None = None) -> C: ...
@overload
def register_intervention(cls: None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register_intervention(cls: C | None = None, *, name: str | None = None) -> C | Callable[[C], C]:
    """Make a class known under its own name, or under `name`; also as a decorator.

    Raises:
        InterventionArgumentError: `cls` is no subclass of Intervention.
        DuplicateInterventionError: Another class has that name, or the class has another name.

    Example:
        >>> @register_intervention(name="doctest/identity")
        ... class Identity(Intervention):
        ...     def forward(self, base):
        ...         return base
        >>> intervention_named("doctest/identity") is Identity
        True
    """
    if cls is None:
        return lambda decorated: register_intervention(decorated, name=name)
    given: object = cls
    if not (isinstance(given, type) and issubclass(given, Intervention)):
        raise InterventionArgumentError(
            f"{cls!r} is no subclass of Intervention; register functions with register_callable."
        )
    _register(_classes, "intervention", cls.__name__ if name is None else name, cls)
    return cls


def intervention_named(name: str) -> type[Intervention]:
    """Return the class registered under `name`.

    Raises:
        UnknownInterventionError: No class has that name.

    Example:
        >>> intervention_named("ZeroIntervention")
        <class 'interventions.fixed.ZeroIntervention'>
    """
    if name not in _classes:
        raise UnknownInterventionError(
            "intervention", name, _classes, "Classes of your own are made known with register_intervention."
        )
    return _classes[name]


def names() -> tuple[str, ...]:
    """Return the names of all registered classes.

    >>> "ZeroIntervention" in names()
    True
    """
    return tuple(_classes)


def name_of(cls: type[Intervention]) -> str:
    """Return the name under which a class is registered.

    Raises:
        UnknownInterventionError: The class is not registered.

    Example:
        >>> from interventions import VanillaIntervention
        >>> name_of(VanillaIntervention)
        'VanillaIntervention'
    """
    for name, registered in _classes.items():
        if registered is cls:
            return name
    raise UnknownInterventionError(
        "intervention class", cls.__name__, _classes, f"Make it known: register_intervention({cls.__name__})."
    )


def register_callable(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a plain function known under `name`, so that a `CallableIntervention` of it can be saved.

    Raises:
        DuplicateInterventionError: Another function has that name, or the function has another name.

    Example:
        >>> import torch
        >>> register_callable("doctest/tanh", torch.tanh) is callable_named("doctest/tanh")
        True
    """
    if not callable(function):
        raise InterventionArgumentError(f"{function!r} cannot be called; register a function under {name!r}.")
    _register(_callables, "function", name, function)
    return function


def callable_named(name: str) -> Callable[..., Any]:
    """Return the function registered under `name`.

    Raises:
        UnknownInterventionError: No function has that name.
    """
    if name not in _callables:
        raise UnknownInterventionError(
            "function", name, _callables, "Functions are made known with register_callable."
        )
    return _callables[name]


def name_of_callable(function: Callable[..., Any]) -> str:
    """Return the name under which a function is registered.

    Raises:
        UnknownInterventionError: The function is not registered.
    """
    for name, registered in _callables.items():
        if registered == function:  # equal bound methods need not be identical
            return name
    raise UnknownInterventionError(
        "function",
        getattr(function, "__name__", repr(function)),
        _callables,
        'Only registered functions can be saved: register_callable("a/name", function).',
    )


def _register(table: dict[str, Any], kind: str, name: str, value: object) -> None:
    if not name:
        raise InterventionArgumentError(f"name={name!r} is no name for {value!r}; give one to find it by.")
    if table.get(name, value) != value:
        raise DuplicateInterventionError(
            f"The {kind} name {name!r} is taken by {table[name]!r}. Register {value!r} under another name."
        )
    others = [other for other, registered in table.items() if registered == value and other != name]
    if others:
        raise DuplicateInterventionError(f"{value!r} is already registered as {others[0]!r}; use that name.")
    table[name] = value
