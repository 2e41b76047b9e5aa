"""What a sweep puts where: values read in a run, or constants, cut into the units of its cells."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import ModelMismatchError, NotFiredError, UnsupportedModelError
from intervenable.inputs import RunInputs
from intervenable.passage import Passage
from intervenable.runs import gather_added
from intervenable.sites import BoundSite, hook_at
from intervenable.sweep_axes import Tokens
from intervenable.sweep_cells import Cell, levels_of
from intervenable.unit_index import UnitIndex, broadcasts
from intervenable.units import Level, UnitRows

Place = tuple[str, int | None]
"""A component and its layer."""

ROUNDING = 1e-5
"""Values before the first token that differs are equal; kernels may round them differently, by no more than this."""


class Reader:
    """Hooks that keep, at each of several places, all that passes there.

    Args:
        sites: The places.
        inputs: The run they are read in.
        now: Says which call of a block is on, if anybody counts them.
    """

    def __init__(
        self, sites: Mapping[Place, BoundSite], inputs: RunInputs, now: Callable[[], int] | None = None
    ) -> None:
        self.values: dict[Place, list[Tensor]] = {place: [] for place in sites}
        """What passed at each place, one for each passage; `[b, s, d]`, by heads `[b, heads, s, dh]`."""
        self.calls: dict[tuple[int, int], int] = {}
        """For each place (by identity) and passage the call of a block that was on."""
        self._now = now
        self._inputs = inputs
        added, gathering = gather_added(tuple(sites.values()), inputs)
        self._added = added
        self.hooks = [*gathering, *(hook_at(site, self._keep(place, site)) for place, site in sites.items())]

    def _keep(self, place: Place, site: BoundSite) -> Callable[[Passage], None]:
        def act(passage: Passage) -> None:
            value = site.read_whole(passage, self._inputs, self._added.get(id(site)))
            if value.dim() < 3:
                raise UnsupportedModelError(
                    f"{site.label} has shape {tuple(value.shape)} in {type(passage.module).__name__}, without an axis"
                    " over tokens: it cannot be swept."
                )
            if self._now is not None:
                self.calls[id(site), len(self.values[place])] = self._now()
            # Some models go on in place in what they hand on.
            self.values[place].append(value.detach().clone())

        return act

    def check(self, run: str) -> None:
        """That every place was reached.

        Raises:
            NotFiredError: one was not.
        """
        missing = [place for place, values in self.values.items() if not values]
        if missing:
            component, layer = missing[0]
            reached = (place for place, values in self.values.items() if values and place[0] == component)
            there = sorted(number for _, number in reached if number is not None)
            raise NotFiredError(
                f"The {run} did not reach {component}{'' if layer is None else f' of layer {layer}'}."
                f"{f' Layers that it reached: {there}.' if there else ''} Leave it out: layers=..."
            )


# --- constants --------------------------------------------------------------------------------------------


def constant_like(own: Tensor, value: Tensor | float, site: BoundSite) -> Tensor:
    """A constant as if it had been read at a place: `[b, s, d]`, by heads `[b, heads, s, dh]`.

    Args:
        own: What is there in the run that is patched.
        value: A number or a tensor that broadcasts to it.
        site: The place.

    Raises:
        ModelMismatchError: a tensor that does not fit.
    """
    if not isinstance(value, Tensor):
        return own.new_full((), float(value)).expand(own.shape)
    if not broadcasts(value.shape, own.shape):
        raise ModelMismatchError(
            f"value has shape {tuple(value.shape)}, which does not broadcast to {site.label}: {tuple(own.shape)}."
        )
    while value.dim() > own.dim():
        value = value[0]
    fitting: Tensor = value.to(own).expand(own.shape)
    return fitting


def mean_of(value: Tensor, site: BoundSite, inputs: RunInputs) -> Tensor:
    """The mean over all examples and their real tokens; of attention matrices over the examples alone."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    if site.matrix:
        return wide.mean(0, keepdim=True).to(value.dtype)
    real = inputs.real_positions
    if real is None or value.shape[-2] != inputs.length:
        axes = (0, wide.dim() - 2)
        return wide.mean(axes, keepdim=True).to(value.dtype)
    mask = torch.zeros(value.shape[0], value.shape[-2], dtype=torch.bool, device=value.device)
    for example, row in enumerate(real):
        mask[example, row] = True
    by_token = wide if wide.dim() == 3 else wide.transpose(1, 2)
    mean = by_token[mask].mean(0)
    shape = (1, 1, -1) if wide.dim() == 3 else (1, mean.shape[0], 1, mean.shape[1])
    return mean.view(shape).to(value.dtype)


# --- cells at one place -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CellUnits:
    """The units of several cells, of as many each."""

    levels: tuple[Level, ...]
    base: Mapping[Level, Tensor]
    """For each level over tokens `[c, b, n]` indices in the run that is patched; `heads` are `[c, n]`."""

    source: Mapping[Level, Tensor]
    """Those over tokens in the run that gives the values."""

    real: Tensor
    """`[c, b, n, ...]` with an axis for each level: which of them are meant."""

    position: Tensor
    """Of the same shape: the first token that a unit matters to, a tensor index."""

    all_real: bool
    aligned: bool
    """Whether the units have the same indices in both runs."""
    _located: dict[tuple[tuple[int, ...], int, int], Located | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        levels: tuple[Level, ...],
        heads: Sequence[tuple[int, ...]],
        tokens: Mapping[Level, Sequence[Tokens]],
        batch: int,
    ) -> CellUnits:
        """The units of cells that patch these heads and tokens."""
        # Where the model makes one example of several rows of its inputs (code books), the first tells of all.
        base = {level: torch.stack([one.base[:batch] for one in listed]) for level, listed in tokens.items()}
        source = {
            level: torch.stack([one.source[:batch] for one in listed]) for level, listed in tokens.items()
        }
        masks = {level: torch.stack([one.real[:batch] for one in listed]) for level, listed in tokens.items()}
        sizes = [len(heads[0]) if level == "heads" else base[level].shape[2] for level in levels]
        cells = len(next(iter(base.values())))
        real = torch.ones(cells, batch, *sizes, dtype=torch.bool)
        for level, mask in masks.items():
            real &= _spread(mask, levels, level)
        along: Level = "queries" if "queries" in levels else "positions"
        position = _spread(base[along], levels, along).expand(real.shape)
        aligned = all(torch.equal(base[level], indices) for level, indices in source.items())
        if heads:
            base["heads"] = torch.tensor(heads)
        return cls(levels, base, source, real, position, bool(real.all()), aligned)

    def located(self, which: tuple[int, ...], start: int, shift: int) -> Located | None:
        """Those of some cells in a run that begins at a token; the same object each time.

        Args:
            which: Which cells.
            start: The first token of the run.
            shift: The first token of the stream.

        Returns:
            None if the run has none of them.
        """
        key = (which, start, shift)
        if key not in self._located:
            self._located[key] = self._locate(*key)
        return self._located[key]

    def _locate(self, which: tuple[int, ...], start: int, shift: int) -> Located | None:
        batch = self.real.shape[1]
        base: dict[Level, Tensor] = dict(self.base)
        real = None if self.all_real else self.real
        index = kept = None
        if which != tuple(range(len(self.real))):
            index = torch.tensor(which)
            base = {level: indices[index] for level, indices in base.items()}
            real = None if real is None else real[index]
        if start:
            along: Level = "queries" if "queries" in self.levels else "positions"
            axis = 2 + self.levels.index(along)
            tokens = base[along]
            column = (tokens >= start).flatten(0, 1).any(0)
            if not bool(column.any()):
                return None
            if not bool(column.all()):
                kept = column.nonzero().flatten()
                tokens = tokens[..., kept]
                real = None if real is None else real.index_select(axis, kept)
            inside = tokens >= start
            if not bool(inside.all()):
                shape = list(self.real.shape)
                shape[0], shape[axis] = inside.shape[0], inside.shape[2]
                mask = _spread(inside, self.levels, along).expand(shape)
                real = mask if real is None else mask & real
            base[along] = (tokens - shift).clamp(min=0)
        filled = {level: _by_row(level, indices, batch) for level, indices in base.items()}
        return Located(index, kept, filled, None if real is None else real.flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Located:
    """Units of some cells in a run that begins at a token."""

    which: Tensor | None
    """The cells, as indices; None for all."""

    kept: Tensor | None
    """Which units of theirs along the tokens are in the run; None if all are."""

    filled: Mapping[Level, Tensor]
    """For each level `[c * b, n]` indices in the run."""

    real: Tensor | None
    """`[c * b, n, ...]` which of them are meant; None if all are."""

    indices: dict[Hashable, UnitIndex] = field(default_factory=dict)
    """What is known of them as indices into streams."""


def _by_row(level: Level, indices: Tensor, batch: int) -> Tensor:
    if level == "heads":  # they are the same for all examples
        indices = indices[:, None].expand(-1, batch, -1)
    return indices.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Edits:
    """What cells put at one place in one passage: those that patch equally many units there."""

    site: BoundSite
    passage: int
    """Which passage, where the model runs the module several times."""

    cells: tuple[int, ...]
    """Numbers of the cells."""

    units: CellUnits
    """Which units they patch."""

    values: Tensor
    """`[c, b, n, d]`, by heads `[c, b, heads, n, dh]`, of matrices `[c, b, heads, queries, keys]`."""

    first: tuple[int, ...]
    """The first token that each cell changes, a tensor index; `nowhere` if it changes none."""

    nowhere: int
    """The number of tokens."""

    @property
    def base(self) -> Mapping[Level, Tensor]:
        """For each level over tokens `[c, b, n]` indices in the run that is patched; `heads` are `[c, n]`."""
        return self.units.base

    @property
    def real(self) -> Tensor | None:
        """`[c, b, n, ...]` with an axis for each level: which of them are meant; None if all are."""
        return None if self.units.all_real else self.units.real

    def at(
        self, which: Sequence[int], groups: Sequence[int], start: int, shift: int | None = None
    ) -> tuple[UnitRows, Tensor] | None:
        """Units and values of some of the cells in a run that begins at a token, each in rows of its own.

        Args:
            which: Which cells, as indices into `cells`.
            groups: For each of them its group of rows.
            start: The first token of the run.
            shift: The first token of the stream there; None for that of the run.

        Returns:
            None if the run has none of these units.
        """
        located = self.units.located(tuple(which), start, start if shift is None else shift)
        if located is None:
            return None
        values, batch = self.values, self.values.shape[1]
        if located.which is not None:
            values = values[located.which.to(values.device)]
        if located.kept is not None:
            values = values.index_select(values.dim() - 2, located.kept.to(values.device))
        rows = groups if batch == 1 else [group * batch + i for group in groups for i in range(batch)]
        units = UnitRows(torch.tensor(rows), located.filled, located.real, located.indices)
        return units, values.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Patches:
    """What cells are to put at one place in one passage, before it is looked at."""

    site: BoundSite
    passage: int
    cells: tuple[int, ...]
    units: CellUnits

    values: Tensor
    """What is put there, as a whole: `[b or 1, s, d]`, by heads `[b or 1, heads, s, dh]`."""

    own: Tensor
    """What is there in the run that is patched."""

    @property
    def kind(self) -> Hashable:
        """The same for those that can be looked at together."""
        values, own = self.values, self.own
        return (
            id(self.units),
            self.site.matrix,
            values.shape,
            values.dtype,
            values.device,
            own.shape,
            own.dtype,
            own.device,
        )


def patches_at(
    site: BoundSite,
    passage: int,
    cells: Sequence[tuple[int, Cell]],
    whole: Mapping[Level, Tokens],
    values: Tensor,
    own: Tensor,
    known: dict[Any, CellUnits],
) -> list[Patches]:
    """What cells put at one place.

    Args:
        site: The place.
        passage: Which passage.
        cells: The cells that patch there, with their numbers.
        whole: All tokens along each level, for cells that patch them all.
        values: What is put there, as a whole: `[b or 1, s, d]`, by heads `[b or 1, heads, s, dh]`.
        own: What is there in the run that is patched.
        known: The units of the cells of other places, which are often the same.
    """
    levels = levels_of(site)
    over_tokens: list[Level] = [level for level in levels if level != "heads"]
    every = tuple(range(site.heads or 0))
    by_shape: dict[tuple[int, ...], list[tuple[int, tuple[int, ...], list[Tokens]]]] = {}
    for number, cell in cells:
        heads = cell.heads or every
        tokens = [cell.tokens(level, whole[level]) for level in over_tokens]
        shape = (len(heads), *(one.base.shape[1] for one in tokens))
        by_shape.setdefault(shape, []).append((number, heads, tokens))
    found = []
    for group in by_shape.values():
        by_cell = [heads for _, heads, _ in group] if "heads" in levels else []
        key = (levels, own.shape[0], tuple(by_cell), *(id(one) for _, _, tokens in group for one in tokens))
        if key not in known:
            listed = zip(*(tokens for _, _, tokens in group), strict=True)
            by_level = {level: list(column) for level, column in zip(over_tokens, listed, strict=True)}
            known[key] = CellUnits.of(levels, by_cell, by_level, own.shape[0])
        numbers = tuple(number for number, _, _ in group)
        found.append(Patches(site, passage, numbers, known[key], values, own))
    return found


def edits_together(patches: Sequence[Patches], start: Tensor | None) -> list[Edits]:
    """What cells put at several places of one kind.

    Args:
        patches: All of one kind.
        start: `[b]` the first token whose inputs differ between the runs; None if that says nothing.
    """
    one = patches[0]
    units, batch = one.units, one.own.shape[0]
    heads = units.base.get("heads")
    wide = [patch.values.expand(batch, *patch.values.shape[1:]) for patch in patches]
    owns = [patch.own for patch in patches]
    if len(patches) > 1 and units.aligned and _alike(wide[0], owns[0]):
        both = gathered(_stacked([*wide, *owns]), units.levels, heads, units.base, several=True)
        put, there = both[: len(wide)], both[len(wide) :]
    else:
        put = gathered(_stacked(wide), units.levels, heads, units.source, several=True)
        there = gathered(_stacked(owns), units.levels, heads, units.base, several=True)
    differs = put != there
    if not one.site.matrix:
        differs = differs.any(-1)
    nowhere = int(one.own.shape[-2])

    def first_of(differs: Tensor) -> list[list[int]]:
        changes = differs.cpu() if units.all_real else differs.cpu() & units.real
        found: list[list[int]] = torch.where(changes, units.position, nowhere).flatten(2).amin(2).tolist()
        return found

    first = first_of(differs)
    if start is not None and min(map(min, first)) < int(start.max()):
        # Before the first token that differs there is nothing but rounding, if the model looks back only.
        before = units.position < start[:batch].view(1, -1, *[1] * (differs.dim() - 3))
        close = (put - there).abs() <= ROUNDING * there.abs().amax(-1, keepdim=True)
        rounded = before.to(differs.device) & (close if one.site.matrix else close.all(-1))
        first = first_of(differs & ~rounded)
    return [
        Edits(patch.site, patch.passage, patch.cells, units, values, tuple(tokens), nowhere)
        for patch, values, tokens in zip(patches, put.unbind(), first, strict=True)
    ]


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


def gathered(
    whole: Tensor,
    levels: Sequence[Level],
    heads: Tensor | None,
    tokens: Mapping[Level, Tensor],
    *,
    several: bool = False,
) -> Tensor:
    """The units of cells out of a whole activation: `[c, b, n, d]`, by heads `[c, b, heads, n, dh]` and so on.

    Of `several` activations one behind the other, with an axis for them before the rest.
    """
    device = whole.device
    width = len(levels)
    examples = torch.arange(whole.shape[1 if several else 0], device=device)
    index: list[Any] = [examples.view(1, -1, *[1] * width)]
    for number, level in enumerate(levels):
        shape = [1] * width
        if level == "heads":
            assert heads is not None
            shape[number] = heads.shape[1]
            index.append(heads.to(device).view(len(heads), 1, *shape))
        else:
            one = tokens[level].to(device)
            shape[number] = one.shape[2]
            index.append(one.view(*one.shape[:2], *shape))
    return whole[(slice(None), *index) if several else tuple(index)]


def _spread(tokens: Tensor, levels: Sequence[Level], level: Level) -> Tensor:
    """`[c, b, n]` along the axis of its level among all levels."""
    shape = [1] * len(levels)
    shape[list(levels).index(level)] = tokens.shape[2]
    return tokens.view(*tokens.shape[:2], *shape)


# --- writing ----------------------------------------------------------------------------------------------


def write_at(
    site: BoundSite,
    parts: Sequence[tuple[UnitRows, Tensor]],
    passage: Passage,
    inputs: RunInputs,
    added: Tensor | None,
) -> None:
    """Put values into units as they pass.

    Args:
        site: Where.
        parts: The units with their rows, and the values.
        passage: What passes.
        inputs: The run, of as many examples as there are rows.
        added: For a site that is read as a sum the stream to add.
    """
    device = passage.take(site.side, site.slot).device
    for units, values in parts:
        index = _index_of(site, units, inputs, device)
        old = values if site.kind == "stored" else site.read(passage, index, inputs, added)
        site.write(passage, index, inputs, old, site.protected(old, values.to(old)))


def _index_of(site: BoundSite, units: UnitRows, inputs: RunInputs, device: torch.device) -> UnitIndex:
    """Units as an index into the stream at a place: that of the layer before, in other rows, where it is alike."""
    lengths = (inputs.of(site.stack).length, inputs.of(site.key_stack).length)
    key = (site.component, site.columns, site.stack, site.key_stack, lengths, device)
    known: UnitIndex | None = units.indices.get(key)
    if known is not None:
        return known.in_rows(units.rows.to(device))
    index = site.index(units, inputs, device)
    units.indices[key] = index
    return index


def rows_of(inputs: RunInputs, groups: int, start: int = 0) -> RunInputs:
    """A run of several groups of the same examples, from a token on: what places need to know of it."""
    decoder = inputs.decoder
    return replace(
        inputs,
        batch=inputs.batch * groups,
        groups=inputs.groups * groups,
        length=inputs.length - start,
        attention_mask=None,
        input_ids=None,
        decoder=None if decoder is None else rows_of(decoder, groups, start),
    )
