"""How tensors at module paths are laid out: which axis counts examples and which tokens, found out by running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from intervenable.errors import UnsupportedModelError
from intervenable.hooks import hooked
from intervenable.inputs import RunInputs
from intervenable.passage import Passage
from intervenable.sites import BoundSite, StreamAxes, hook_at
from intervenable.sweep_grids import is_path
from intervenable.sweep_values import Place
from intervenable.wave_inputs import WaveInputs

MORE = (2, 6)
"""By how many tokens runs are longer that tell the axis of tokens; the second where the first is padded away."""


def with_layouts(
    model: nn.Module, run: RunInputs, sites: Mapping[Place, BoundSite]
) -> dict[Place, BoundSite]:
    """The same places, those given as module paths with the axes that they have.

    Raises:
        UnsupportedModelError: a tensor without an axis over tokens.
    """
    paths = {place: site for place, site in sites.items() if is_path(site.component)}
    if not paths or run.time_first:
        return dict(sites)
    inputs = WaveInputs(run, model)
    plain, double = (_shapes(inputs, paths, groups) for groups in (1, 2))
    try:
        longer = _shapes(inputs.longer(MORE[0]), paths, 1)
        if any(longer.get(place) == shape for place, shape in plain.items()):
            longer = _shapes(inputs.longer(MORE[1]), paths, 1)
    except Exception:  # a model's own code, which may be made for prompts of one length
        return dict(sites)
    found = {
        place: replace(site, axes=_axes(site, plain[place], double[place], longer[place]))
        for place, site in paths.items()
        if place in plain and place in longer  # what is not reached is told of when it is read
    }
    return {**sites, **found}


def _shapes(
    inputs: WaveInputs, sites: Mapping[Place, BoundSite], groups: int
) -> dict[Place, tuple[int, ...]]:
    """The shape of what passes at each place first."""
    found: dict[Place, tuple[int, ...]] = {}

    def look(place: Place, site: BoundSite) -> Callable[[Passage], None]:
        def act(passage: Passage) -> None:
            found.setdefault(place, tuple(passage.take(site.side, site.slot).shape))

        return act

    with hooked([hook_at(site, look(place, site)) for place, site in sites.items()], inputs.model):
        inputs.call(groups, keep=1)
    return found


def _axes(
    site: BoundSite, plain: tuple[int, ...], double: tuple[int, ...], longer: tuple[int, ...]
) -> StreamAxes | None:
    rows = [axis for axis, (a, b) in enumerate(zip(plain, double, strict=True)) if a != b]
    tokens = [axis for axis, (a, b) in enumerate(zip(plain, longer, strict=True)) if a != b]
    if len(rows) != 1 or len(tokens) != 1 or double[rows[0]] != 2 * plain[rows[0]]:
        raise UnsupportedModelError(
            f"{site.label} has shape {plain}: no one axis counts its examples and no one its tokens, so that it"
            " cannot be swept."
        )
    if (rows[0], tokens[0]) == (0, 1) and len(plain) == 3:
        return None
    return StreamAxes(rows[0], tokens[0])
