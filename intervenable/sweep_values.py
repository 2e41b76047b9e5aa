"""What a sweep puts where: values read in a run, or constants, cut into the units of its cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from intervenable.unit_index import broadcasts
from intervenable.units import Level, UnitRows, Whole

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
            device = passage.take(site.side, site.slot).device
            index = site.index(Whole(), self._inputs, device)
            value = site.read(passage, index, self._inputs, self._added.get(id(site)))
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
class Edits:
    """What cells put at one place in one passage: those that patch equally many units there."""

    site: BoundSite
    passage: int
    """Which passage, where the model runs the module several times."""

    cells: Tensor
    """`[c]` numbers of the cells."""

    base: Mapping[Level, Tensor]
    """For each level over tokens `[c, b, n]` indices in the run that is patched; `heads` are `[c, n]`."""

    real: Tensor | None
    """`[c, b, n, ...]` with an axis for each level: which of them are meant; None if all are."""

    values: Tensor
    """`[c, b, n, d]`, by heads `[c, b, heads, n, dh]`, of matrices `[c, b, heads, queries, keys]`."""

    first: Tensor
    """`[c]` the first token that a cell changes, a tensor index; `nowhere` if it changes none."""

    nowhere: int
    """The number of tokens."""

    def at(
        self, which: Tensor, groups: Tensor, start: int, shift: int | None = None
    ) -> tuple[UnitRows, Tensor] | None:
        """Units and values of some of the cells in a run that begins at a token, each in rows of its own.

        Args:
            which: `[k]` which cells, as indices into `cells`.
            groups: `[k]` for each of them its group of rows.
            start: The first token of the run.
            shift: The first token of the stream there; None for that of the run.

        Returns:
            None if the run has none of these units.
        """
        level: Level = "queries" if self.site.matrix else "positions"
        tokens = self.base[level][which]
        batch = tokens.shape[1]
        real = None if self.real is None else self.real[which]
        values = self.values[which]
        if start:
            column = (tokens >= start).flatten(0, 1).any(0)
            if not bool(column.any()):
                return None
            if not bool(column.all()):
                keep = column.nonzero().flatten()
                tokens = tokens[..., keep]
                values = values.index_select(values.dim() - 2, keep)
                axis = -2 if self.site.matrix else -1
                real = None if real is None else real.index_select(real.dim() + axis, keep)
            inside = tokens >= start
            if not bool(inside.all()):
                real = self._with(real, inside, values)
            tokens = (tokens - (start if shift is None else shift)).clamp(min=0)
        rows = (groups[:, None] * batch + torch.arange(batch)).flatten()
        filled: dict[Level, Tensor] = {}
        for name, indices in self.base.items():
            if name == "heads":
                filled[name] = indices[which][:, None].expand(-1, batch, -1).flatten(0, 1)
            else:
                filled[name] = (tokens if name == level else indices[which]).flatten(0, 1)
        return UnitRows(rows, filled, None if real is None else real.flatten(0, 1)), values.flatten(0, 1)

    def _with(self, real: Tensor | None, inside: Tensor, values: Tensor) -> Tensor:
        """Which units are meant, those that lie before the run left out."""
        shape = values.shape if self.site.matrix else values.shape[:-1]
        by_token = inside
        if "heads" in self.base:
            by_token = by_token[:, :, None]
        if self.site.matrix:
            by_token = by_token[..., None]
        mask = by_token.expand(shape)
        return mask if real is None else mask & real


def edits_at(
    site: BoundSite,
    passage: int,
    cells: Sequence[tuple[int, Cell]],
    whole: Mapping[Level, Tokens],
    values: Tensor,
    own: Tensor,
    start: Tensor | None,
    known: dict[Any, CellUnits],
) -> list[Edits]:
    """What cells put at one place.

    Args:
        site: The place.
        passage: Which passage.
        cells: The cells that patch there, with their numbers.
        whole: All tokens along each level, for cells that patch them all.
        values: What is put there, as a whole: `[b or 1, s, d]`, by heads `[b or 1, heads, s, dh]`.
        own: What is there in the run that is patched.
        start: `[b]` the first token whose inputs differ between the runs; None if that says nothing.
        known: Those of the cells of other places, which are often the same.
    """
    levels = levels_of(site)
    by_shape: dict[tuple[int, ...], list[tuple[int, Cell]]] = {}
    for number, cell in cells:
        count = len(cell.heads) if cell.heads is not None else site.heads or 0
        widths = [cell.tokens(level, whole[level]).base.shape[1] for level in levels if level != "heads"]
        by_shape.setdefault((count, *widths), []).append((number, cell))
    found = []
    for group in by_shape.values():
        tokens: dict[Level, list[Tokens]] = {
            level: [cell.tokens(level, whole[level]) for _, cell in group]
            for level in levels
            if level != "heads"
        }
        heads = (
            [cell.heads or tuple(range(site.heads or 0)) for _, cell in group] if "heads" in levels else []
        )
        key = (levels, own.shape[0], tuple(heads), *(id(one) for listed in tokens.values() for one in listed))
        if key not in known:
            known[key] = CellUnits.of(levels, heads, tokens, own.shape[0])
        numbers = torch.tensor([number for number, _ in group])
        found.append(_edits(site, passage, numbers, known[key], values, own, start))
    return found


@dataclass(frozen=True, eq=False)
class CellUnits:
    """The units of several cells, of as many each."""

    levels: tuple[Level, ...]
    base: Mapping[Level, Tensor]
    """Indices in the run that is patched, as in `Edits`."""

    source: Mapping[Level, Tensor]
    """Those over tokens in the run that gives the values."""

    real: Tensor
    """`[c, b, n, ...]` with an axis for each level: which of them are meant."""

    position: Tensor
    """Of the same shape: the first token that a unit matters to, a tensor index."""

    all_real: bool

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
        if heads:
            base["heads"] = torch.tensor(heads)
        return cls(levels, base, source, real, position, bool(real.all()))


def _edits(
    site: BoundSite,
    passage: int,
    numbers: Tensor,
    units: CellUnits,
    values: Tensor,
    own: Tensor,
    start: Tensor | None,
) -> Edits:
    heads = units.base.get("heads")
    put = gathered(values.expand(own.shape[0], *values.shape[1:]), units.levels, heads, units.source)
    there = gathered(own, units.levels, heads, units.base)
    differs = put != there
    if not site.matrix:
        differs = differs.any(-1)
    if start is not None:
        # Before the first token that differs there is nothing but rounding, if the model looks back only.
        before = units.position < start[: own.shape[0]].view(1, -1, *[1] * (differs.dim() - 2))
        if bool((before & units.real & differs.cpu()).any()):
            close = (put - there).abs() <= ROUNDING * there.abs().amax(-1, keepdim=True)
            differs = differs & ~(before.to(differs.device) & (close if site.matrix else close.all(-1)))
    nowhere = int(own.shape[-2])
    first = torch.where(differs.cpu() & units.real, units.position, nowhere).flatten(1).amin(1)
    return Edits(
        site, passage, numbers, units.base, None if units.all_real else units.real, put, first, nowhere
    )


def gathered(
    whole: Tensor, levels: Sequence[Level], heads: Tensor | None, tokens: Mapping[Level, Tensor]
) -> Tensor:
    """The units of cells out of a whole activation: `[c, b, n, d]`, by heads `[c, b, heads, n, dh]` and so on."""
    device = whole.device
    examples = torch.arange(whole.shape[0], device=device)
    width = len(levels)
    index: list[Tensor] = [examples.view(1, -1, *[1] * width)]
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
    return whole[tuple(index)]


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
        index = site.index(units, inputs, device)
        old = values if site.kind == "stored" else site.read(passage, index, inputs, added)
        site.write(passage, index, inputs, old, site.protected(old, values.to(old)))


def rows_of(inputs: RunInputs, groups: int, start: int = 0) -> RunInputs:
    """A run of several groups of the same examples, from a token on: what places need to know of it."""
    decoder = inputs.decoder
    return replace(
        inputs,
        batch=inputs.batch * groups,
        length=inputs.length - start,
        attention_mask=None,
        input_ids=None,
        decoder=None if decoder is None else rows_of(decoder, groups, start),
    )
