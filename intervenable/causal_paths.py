"""Along which paths of a causal model a change would be felt."""

from __future__ import annotations

from intervenable.causal_model import CausalModel, Paths
from intervenable.causal_values import Setting, same


def live_paths(model: CausalModel, inputs: Setting) -> Paths:
    """See `CausalModel.live_paths`."""
    actual = model.run(inputs)
    live = {name: _felt(model, name, inputs, actual) for name in model.variables if model.children[name]}
    paths: Paths = {}
    longest: list[tuple[str, ...]] = [(name,) for name in model.variables]
    while longest := [(*path, child) for path in longest for child in live.get(path[-1], ())]:
        paths[len(longest[0])] = longest
    return paths


def _felt(model: CausalModel, name: str, inputs: Setting, actual: Setting) -> list[str]:
    """The children that some value of a variable would change."""
    values = model.domains[name].listed("find out what it changes")
    others = [model.run({**inputs, name: value}) for value in values]
    return [
        child
        for child in model.children[name]
        if any(not same(other[child], actual[child]) for other in others)
    ]
