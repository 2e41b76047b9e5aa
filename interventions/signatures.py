"""How a function wants to be called: `(base)`, `(base, source)` or `(base, source, subspaces)`.

Looked at once, when an intervention class or a `CallableIntervention` is made; never again while a model
runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from interventions.errors import InterventionArgumentError

OFFERED = ("source", "subspaces")
"""What may be handed to a function besides the base, in the order of its positions."""


@dataclass(frozen=True)
class CallPattern:
    """Which of `source` and `subspaces` a function takes after the base, and how."""

    positional: tuple[str, ...]
    """Those given by position, in this order."""
    keyword: tuple[str, ...]
    """Those given by name."""

    def takes(self, name: str) -> bool:
        """Return whether the function is given `name` at all."""
        return name in self.positional or name in self.keyword

    def arguments(self, source: Any, subspaces: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments to call the function with, after the base."""
        if self.positional == OFFERED:
            return (source, subspaces), {}
        offered = {"source": source, "subspaces": subspaces}
        return tuple(offered[name] for name in self.positional), {
            name: offered[name] for name in self.keyword
        }


def pattern_of_method(method: Callable[..., object]) -> CallPattern:
    """Return how to call an intervention's `forward` (looked up on the class, so with `self`).

    Every parameter that can hold the source or the subspaces gets them, whether it has a default or not.

    >>> pattern_of_method(lambda self, base, source=None, subspaces=None: base).positional
    ('source', 'subspaces')
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return _pattern(parameters, optional=True)


def pattern_of_function(function: Callable[..., object]) -> CallPattern:
    """Return how to call a plain function of tensors.

    A second parameter gets the source if it is required, or is called `source` with None as default; a third
    gets the subspaces likewise. So `torch.relu`, `nn.GELU()` and `functional.dropout(input, p=0.5)` are
    functions of the base.

    Raises:
        InterventionArgumentError: The function takes no argument, or requires others than these three.

    >>> pattern_of_function(lambda base, source: source - base).positional
    ('source',)
    """
    inspected = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(inspected).parameters.values())
    except (TypeError, ValueError):  # built in C without a signature, like torch.relu
        return CallPattern((), ())
    if not parameters or parameters[0].kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ):
        raise InterventionArgumentError(
            f"{function!r} takes no positional argument. Give a function of (base), (base, source) or"
            f" (base, source, subspaces)."
        )
    pattern = _pattern(parameters, optional=False)
    others = [
        p.name
        for p in parameters[1 + len(pattern.positional) :]
        if _required(p) and p.name not in pattern.keyword
    ]
    if others:
        raise InterventionArgumentError(
            f"{function!r} also requires {', '.join(map(repr, others))}. Give a function of (base),"
            f" (base, source) or (base, source, subspaces); fix the rest with functools.partial."
        )
    return pattern


def _pattern(parameters: list[inspect.Parameter], *, optional: bool) -> CallPattern:
    positional: list[str] = []
    keyword: list[str] = []
    by_position = True
    rest = (
        parameters[1:]
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
        else parameters
    )
    for parameter in rest:
        missing = [name for name in OFFERED if name not in (*positional, *keyword)]
        if not missing:
            break
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional += missing if optional and by_position else []
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            keyword += missing if optional else []
        else:
            named = parameter.name in missing
            wanted = optional or _required(parameter) or (named and parameter.default is None)
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keyword += [parameter.name] if named and wanted else []
            elif by_position and wanted:
                positional.append(parameter.name if named else missing[0])
            else:
                by_position = False
                keyword += [parameter.name] if named and wanted else []
    return CallPattern(tuple(positional), tuple(keyword))


def _required(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
