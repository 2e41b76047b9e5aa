"""What can go wrong in an intervention, as small errors that are also the matching builtin.

    InterventionError
    ├── InterventionArgumentError   (ValueError)   a constructor argument that cannot work
    ├── InterventionShapeError      (ValueError)   tensors whose sizes or dtypes do not fit
    ├── MissingSourceError          (ValueError)   a source is needed and none was given
    ├── UnusedSourceError           (ValueError)   a source was given where none is used
    ├── SubspaceError               (ValueError)   `subspaces` or a partition that means nothing
    │   └── SubspaceIndexError      (IndexError)   an id or a dimension out of range
    ├── UnknownInterventionError    (LookupError)  a name the registry does not have
    └── DuplicateInterventionError  (ValueError)   a name the registry already has

>>> issubclass(SubspaceIndexError, IndexError) and issubclass(SubspaceIndexError, ValueError)
True
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InterventionError(Exception):
    """Anything an intervention refuses to do; the root of this package's errors."""


class InterventionArgumentError(InterventionError, ValueError):
    """A constructor argument that cannot work, found when the intervention is made."""


class InterventionShapeError(InterventionError, ValueError):
    """Tensors whose sizes or dtypes do not fit each other or the intervention."""


class MissingSourceError(InterventionError, ValueError):
    """An intervention that needs a source was called without one."""


class UnusedSourceError(InterventionError, ValueError):
    """A source was given to an intervention whose formula has none."""


class SubspaceError(InterventionError, ValueError):
    """`subspaces` or a `subspace_partition` that means nothing here."""


class SubspaceIndexError(SubspaceError, IndexError):
    """A subspace id or a dimension that does not exist."""


class UnknownInterventionError(InterventionError, LookupError):
    """A name that the registry does not have; the message lists the names it does have."""

    def __init__(self, kind: str, name: str, allowed: Iterable[str], next_step: str) -> None:
        names = sorted(allowed)
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(names) or "none yet"
        super().__init__(f"Unknown {kind} {name!r}.{hint}\nAllowed: {listed}.\n{next_step}")


class DuplicateInterventionError(InterventionError, ValueError):
    """A name that the registry already gives to something else."""
