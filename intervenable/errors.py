"""Everything that this library raises, as one tree.

    IntervenableError
    ├── ConfigError (ValueError)              what was declared cannot be
    │   ├── UnknownNameError (LookupError)    a component, unit, type or name that no table has
    │   ├── LayerRangeError (IndexError)      a layer that the model does not have
    │   └── ModelMismatchError                declared for another model, or another size of it
    ├── UnsupportedModelError (LookupError)   no map, or no such component in this architecture
    ├── MapError (ValueError)                 a map that is wrong about a model, or that cannot be looked at
    ├── InputError (ValueError)               the base or a source is not what the model takes
    │   ├── SourceError                       wrong number, batch size or shape of sources
    │   └── DatasetError                      a data set without a column that is needed, or with a wrong value
    ├── LocationError (ValueError)            unit locations that say nothing sensible
    │   └── LocationRangeError (IndexError)   a position or head that does not exist
    ├── SubspaceError (ValueError)            subspaces that say nothing sensible
    │   └── SubspaceRangeError (IndexError)   a coordinate or part that does not exist
    ├── EditError (ValueError)                an intervention gave back something unusable
    ├── CacheError (ValueError)               activations that cannot be joined, averaged or cut as asked
    │   └── MissingActivationError (KeyError) an activation that was not collected
    ├── StorageError (ValueError)             a file that is damaged, none of ours, or cannot be written
    │   └── MissingFileError (FileNotFoundError)   a file or a folder that is not there
    ├── NotFiredError (RuntimeError)          an intervention ran another number of times than planned
    ├── TrainingError (RuntimeError)          a loss or a gradient that is no number
    ├── NotAvailableError (NotImplementedError)   known, and not there yet
    └── MissingExtraError (ImportError)   a feature needs a package that is not installed

Warnings: `IntervenableWarning`; for old names `RenamedWarning`, which is also a `DeprecationWarning`; for compiled
models, whose runs with interventions are not, `CompiledModelWarning`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from model_maps import ALIASES, PREFIXED, WORDS, in_short


class IntervenableError(Exception):
    """Root of every error that this library raises on purpose."""


class ConfigError(IntervenableError, ValueError):
    """What was declared cannot be; the message lists every fault found."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults) or (message,)


class UnknownNameError(ConfigError, LookupError):
    """A name that no table has; the message lists the names it does have."""


class LayerRangeError(ConfigError, IndexError):
    """A layer that the model does not have."""


class ModelMismatchError(ConfigError):
    """The declaration is for another model, or for another size of it."""


class UnsupportedModelError(IntervenableError, LookupError):
    """The architecture has no map, or has no such component."""


class MapError(IntervenableError, ValueError):
    """A map that is wrong about a model, as the laws that it breaks show; or a model on which no law can be seen."""


Fault = ConfigError | UnsupportedModelError
"""What can be wrong with a declaration."""


class InputError(IntervenableError, ValueError):
    """The base or a source is not what the model takes."""


class SourceError(InputError):
    """Sources of a wrong number, batch size or shape."""


class DatasetError(InputError):
    """A data set without a column that is needed, or with a value that cannot be used; the message names the row."""


class LocationError(IntervenableError, ValueError):
    """Unit locations that cannot be read or do not fit."""


class LocationRangeError(LocationError, IndexError):
    """A position or a head that does not exist."""


class SubspaceError(IntervenableError, ValueError):
    """Subspaces that cannot be read or do not fit."""


class SubspaceRangeError(SubspaceError, IndexError):
    """A coordinate or a part of a partition that does not exist."""


class EditError(IntervenableError, ValueError):
    """An intervention gave back something that cannot be written where it belongs."""


class CacheError(IntervenableError, ValueError):
    """Activations that cannot be joined, averaged or cut in the way that was asked."""


class MissingActivationError(CacheError, KeyError):
    """An activation that was not collected; the message says what was, and how to have it."""

    __str__ = Exception.__str__  # that of KeyError would show the message in quotes


class StorageError(IntervenableError, ValueError):
    """A file that is damaged, was not written by this library, or cannot be written."""


class MissingFileError(StorageError, FileNotFoundError):
    """A file or a folder that is not there."""


class NotFiredError(IntervenableError, RuntimeError):
    """An intervention ran another number of times than its plan says."""


class TrainingError(IntervenableError, RuntimeError):
    """A training that cannot go on: its loss or its gradients are no numbers."""


class MetricError(IntervenableError, ValueError):
    """A metric gave no number, or numbers of another shape than before."""


class InexactError(IntervenableError, RuntimeError):
    """A shortcut gave something else than the plain way."""


class NotAvailableError(IntervenableError, NotImplementedError):
    """Something that is known and not there yet."""


class MissingExtraError(IntervenableError, ImportError):
    """A feature needs a package that is not installed; the message says which extra brings it."""


class IntervenableWarning(UserWarning):
    """Root of every warning of this library."""


class CompiledModelWarning(IntervenableWarning):
    """A model is compiled, and its runs with interventions use its modules as they were written."""


class RenamedWarning(IntervenableWarning, DeprecationWarning):
    """An old name was used; the message says the new one."""


def unknown_name(
    kind: str, name: object, allowed: Iterable[str], where: str = "", listed: Iterable[str] | None = None
) -> str:
    """The message for a name that a table does not have: the name, the nearest match, the names it has.

    Where these are too many to list, `listed` says which to list.
    """
    names = sorted(allowed)
    near = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    place = f" {where}" if where else ""
    shown = names if listed is None else sorted(listed)
    return f"Unknown {kind} {name!r}{place}.{hint}\nAllowed: {', '.join(shown)}."


def unknown_component(name: object, there: Iterable[str], owner: str = "") -> str:
    """The message for a component that no model has: the name, the nearest, and those to choose from.

    Args:
        name: What was given.
        there: The components of the model at hand; all that there are if none is.
        owner: The model, if one is at hand.
    """
    names = tuple(there)
    near = get_close_matches(str(name), [*names, *ALIASES], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if owner:
        return f"Unknown component {name!r}.{hint}\n{owner} has: {in_short(names)}."
    return (
        f"Unknown component {name!r}.{hint}\nAllowed: {in_short(WORDS)}. {PREFIXED}"
        " A module path ending in .input or .output is a component too."
    )


def each_named(error: Fault, place: str) -> list[Fault]:
    """The faults of an error one by one, each with the place that it is about in front."""
    if isinstance(error, ConfigError) and len(error.faults) > 1:
        return [ConfigError(f"{place}: {text}") for text in error.faults]
    named = type(error)(f"{place}: {error}")
    named.__cause__ = error.__cause__
    return [named]


def listing(texts: Sequence[str], where: str) -> str:
    """Several faults as one message, a point for each."""
    points = [text.replace("\n", "\n  ") for text in texts]
    return "\n".join([f"{len(texts)} faults in {where}:", *(f"- {point}" for point in points)])


def raise_all(faults: Sequence[Fault]) -> None:
    """Raise what was found: the one fault as it is, several as one error that lists them.

    It is of their class if they have one in common, and a `ConfigError` otherwise.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        texts = [str(fault) for fault in faults]
        kinds = {type(fault) for fault in faults}
        message = listing(texts, "the configuration")
        if kinds == {UnsupportedModelError}:
            raise UnsupportedModelError(message)
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind(message, texts)


def raise_listed(faults: Sequence[IntervenableError], where: str) -> None:
    """Raise what was found in a call: the one fault as it is, several as one error that lists them.

    It is of the class that they have in common, or else of that of the first.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        first = type(faults[0])
        common = next(cls for cls in first.__mro__ if all(isinstance(fault, cls) for fault in faults))
        kind = common if issubclass(common, IntervenableError) and issubclass(common, ValueError) else first
        raise kind(listing([str(fault) for fault in faults], where))
