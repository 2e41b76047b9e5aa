"""The names under which files speak of intervention classes: those registered, and those given for one call."""

from __future__ import annotations

from collections.abc import Mapping

import interventions
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from interventions import Intervention
from interventions.registry import names as registered_names

Registry = Mapping[str, type[Intervention]]


class TypeNames:
    """Classes by name and names by class. Nothing is ever imported for a name.

    Args:
        registry: Classes by names that hold for this once, before those of `register_intervention`.

    Raises:
        ConfigError: something in the registry is no intervention class, or has no name.
    """

    def __init__(self, registry: Registry | None) -> None:
        given: object = {} if registry is None else registry
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"registry is a {type(given).__name__}; give a mapping from names to intervention classes."
            )
        for name, cls in given.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"registry has the name {name!r}; names are texts, and not empty.")
            if not (isinstance(cls, type) and issubclass(cls, Intervention)):
                raise ConfigError(f"registry has {cls!r} as {name!r}, which is no subclass of Intervention.")
        self._given: dict[str, type[Intervention]] = dict(given)

    def name_of(self, cls: type[Intervention]) -> str:
        """The name of a class.

        Raises:
            UnknownNameError: it has none.
        """
        for name, given in self._given.items():
            if given is cls:
                return name
        try:
            name = interventions.name_of(cls)
        except interventions.UnknownInterventionError as error:
            raise UnknownNameError(
                f"The intervention class {cls.__name__} has no name to save it under. Make it known with"
                f" register_intervention({cls.__name__}), or give registry={{{cls.__name__!r}: {cls.__name__}}}."
            ) from error
        if name in self._given:
            raise ConfigError(
                f"registry gives the name {name!r} to {self._given[name]!r}, and it is that of {cls!r}."
                " Choose another."
            )
        return name

    def named(self, name: str) -> type[Intervention]:
        """The class of a name.

        Raises:
            UnknownNameError: nobody has made that name known.
        """
        if name in self._given:
            return self._given[name]
        try:
            return interventions.intervention_named(name)
        except interventions.UnknownInterventionError as error:
            known = [*self._given, *registered_names()]
            raise UnknownNameError(
                f"{unknown_name('intervention class', name, known)}\nClasses of your own are made known with"
                f" register_intervention, or for this call with registry={{{name!r}: TheClass}}; none is ever"
                " imported for a name."
            ) from error
