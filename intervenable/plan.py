"""One call, checked and laid out before anything runs: which runs feed which edits, at which units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import interventions
from intervenable.binding import BoundRepresentation
from intervenable.errors import (
    EditError,
    IntervenableError,
    LocationError,
    SourceError,
    SubspaceError,
    SubspaceRangeError,
    raise_listed,
)
from intervenable.inputs import RunInputs, read_inputs
from intervenable.locations import RelativeTo, Subject, lists_each_intervention, read_locations
from intervenable.token_text import Decodes
from intervenable.unit_index import broadcasts
from intervenable.units import Level, Skipped, Slot, Units, Whole
from interventions import SubspacePerPosition
from interventions.fixed import CoordinatewiseIntervention
from interventions.subspaces import select


@dataclass(frozen=True)
class Edit:
    """One intervention of a call: what it is given, and where its result goes."""

    bound: BoundRepresentation
    units: Units | Whole
    """Its units in the base run."""

    from_source: bool = False
    """Whether it is given what a source run captured for it."""

    constant: Tensor | None = None
    """Its constant source, where there is one and no source run feeds it."""

    subspaces: Any = None
    """Its subspaces in this call."""


@dataclass(frozen=True)
class Capture:
    """What a source run keeps for one intervention."""

    bound: BoundRepresentation
    units: Units | Whole


@dataclass
class SourceRun:
    """One run of one source, for all interventions that it feeds."""

    inputs: RunInputs
    captures: list[Capture] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Which sources of the call this is."""
        return ", ".join(f"source {group}" for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """All that one call does."""

    base: RunInputs
    edits: tuple[Edit, ...]
    source_runs: tuple[SourceRun, ...]
    skipped: tuple[BoundRepresentation, ...]


def make_plan(
    bound: Sequence[BoundRepresentation],
    model: nn.Module,
    base: object,
    sources: object,
    unit_locations: object,
    source_representations: object,
    subspaces: object,
    relative_to: RelativeTo,
    tokenizer: Decodes | None = None,
) -> Plan:
    """Check one call against the bound representations and lay out its runs. No model is run.

    Raises:
        InputError, SourceError, LocationError, SubspaceError: what is wrong with the call.
    """
    base_inputs = read_inputs(base, model, "base")
    constants = _constants(bound, source_representations)
    by_group = _sources_by_group(bound, sources, constants)
    each = lists_each_intervention(unit_locations)
    needed = {entry.group for entry in bound if _takes_a_run(entry, constants)}
    inputs = {
        group: read_inputs(source, model, f"source {group}")
        for group, source in enumerate(by_group)
        if source is not None and group in needed
    }
    _check_batches(base_inputs, inputs)
    feeds = [inputs.get(entry.group) if _takes_a_run(entry, constants) else None for entry in bound]
    source_slots, base_slots = read_locations(
        unit_locations, _subjects(bound), base_inputs, feeds, relative_to, tokenizer
    )
    chosen = _subspaces(bound, subspaces)

    edits: list[Edit] = []
    runs: list[SourceRun] = []
    skipped: list[BoundRepresentation] = []
    faults: list[IntervenableError] = []
    for entry, feed, source_slot, slot, ids in zip(
        bound, feeds, source_slots, base_slots, chosen, strict=True
    ):
        constant = constants.get(entry.index)
        waits = entry.intervention.needs_source and _takes_a_run(entry, constants) and feed is None
        if isinstance(slot, Skipped) or (waits and sources is not None and not each):
            skipped.append(entry)
            continue
        try:
            if waits:
                raise _missing_source(entry, sources)
            _check_subspaces(entry, ids, base_inputs.of(entry.site.stack).batch)
            _check_units(entry, slot, base_inputs)
            if feed is not None:
                _run_for(runs, feed, entry.group).captures.append(
                    Capture(entry, _fed_from(entry, source_slot, slot, feed, base_inputs))
                )
            if constant is not None:
                _check_constant(entry, constant, slot, base_inputs)
        except IntervenableError as error:
            faults.append(error)
            continue
        edits.append(Edit(entry, slot, feed is not None, constant, ids))
    raise_listed(faults, "the call")
    return Plan(base_inputs, tuple(edits), tuple(runs), tuple(skipped))


def _subjects(bound: Sequence[BoundRepresentation]) -> list[Subject]:
    return [
        Subject(
            entry.name,
            entry.config.unit,
            entry.site.heads,
            not entry.intervention.collects,
            entry.config.where,
            entry.site.causal,
            entry.site.stack,
            entry.site.key_stack,
        )
        for entry in bound
    ]


def _run_for(runs: list[SourceRun], inputs: RunInputs, group: int) -> SourceRun:
    """The run of this source: one that would compute the same serves."""
    run = next((run for run in runs if run.inputs.same_as(inputs)), None)
    if run is None:
        run = SourceRun(inputs)
        runs.append(run)
    if group not in run.groups:
        run.groups.append(group)
    return run


# --- sources ----------------------------------------------------------------------------------------------


def _sources_by_group(
    bound: Sequence[BoundRepresentation], sources: object, constants: Mapping[int, Tensor]
) -> list[object]:
    """For each group its source or None, in the order in which groups first appear in the configuration."""
    groups = 1 + max((entry.group for entry in bound), default=-1)
    if sources is None:
        return [None] * groups
    listed = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    takers = [entry for entry in bound if _takes_a_run(entry, constants)]
    if len(listed) == 1 and groups != 1:
        fed = {entry.group for entry in takers}
        if listed[0] is not None and not fed:
            raise SourceError("Source 0 would not be used: no intervention here takes one. Leave it out.")
        return [listed[0] if group in fed else None for group in range(groups)]
    if len(listed) != groups:
        raise SourceError(
            f"{len(listed)} sources were given for {groups} groups"
            f" ({'; '.join(_members(bound, group) for group in range(groups))}). Give one for each, None for a group"
            " without one, or a single source for all."
        )
    for group, source in enumerate(listed):
        if source is not None and not any(entry.group == group for entry in takers):
            why = "takes no source"
            if any(entry.group == group and entry.intervention.accepts_source for entry in bound):
                why = "has a constant source already"
            raise SourceError(
                f"Source {group} would not be used: {_members(bound, group)} {why}. Put None in its place."
            )
    return listed


def _missing_source(entry: BoundRepresentation, sources: object) -> SourceError:
    return SourceError(
        f"{entry.name!r} ({type(entry.intervention).__name__}) needs a source, and source {entry.group} is"
        f" {'None' if sources is not None else 'not given'}. Give one, or a constant source_representation;"
        " to skip the intervention, put None in its locations."
    )


def _takes_a_run(entry: BoundRepresentation, constants: Mapping[int, Tensor]) -> bool:
    """Whether a source run would feed this intervention: it can take a source and has no constant one."""
    intervention = entry.intervention
    return (
        intervention.accepts_source
        and entry.index not in constants
        and intervention.source_representation is None
    )


def _members(bound: Sequence[BoundRepresentation], group: int) -> str:
    return ", ".join(entry.name for entry in bound if entry.group == group)


def _constants(bound: Sequence[BoundRepresentation], given: object) -> dict[int, Tensor]:
    """The constant source of each representation that has one; those of the call win over the declared ones."""
    constants = {entry.index: entry.constant for entry in bound if entry.constant is not None}
    if given is None:
        return constants
    if isinstance(given, Tensor):
        chosen: dict[int, Any] = {entry.index: given for entry in bound if entry.intervention.accepts_source}
        if not chosen:
            raise SourceError(
                "source_representations would not be used: no intervention here takes a source. Leave it out."
            )
    elif isinstance(given, Mapping):
        names = {entry.name: entry.index for entry in bound}
        unknown = [name for name in given if name not in names]
        if unknown:
            raise SourceError(
                f"source_representations names {', '.join(map(repr, unknown))}, which no representation is called."
                f" Allowed: {', '.join(names)}."
            )
        chosen = {names[name]: value for name, value in given.items()}
    elif isinstance(given, (list, tuple)):
        if len(given) != len(bound):
            raise SourceError(
                f"source_representations has {len(given)} entries for {len(bound)} representations."
                " Give one for each, None where there is none."
            )
        chosen = dict(enumerate(given))
    else:
        raise SourceError(
            f"source_representations is a {type(given).__name__}. Give a tensor, a list with one for each"
            " representation, or a mapping from names."
        )
    for index, value in chosen.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise SourceError(
                f"The source representation of {bound[index].name!r} is a {type(value).__name__}, not a tensor."
            )
        if not bound[index].intervention.accepts_source:
            raise SourceError(
                f"The source representation of {bound[index].name!r} would not be used:"
                f" {type(bound[index].intervention).__name__} takes no source."
            )
        constants[index] = value
    return constants


def _check_batches(base: RunInputs, sources: Mapping[int, RunInputs]) -> None:
    for group, source in sources.items():
        if source.batch not in (1, base.batch):
            raise SourceError(
                f"Base and source differ in batch size: base has {base.batch} examples, source {group} has"
                f" {source.batch}. Give each base example its source example, or one for all."
            )


# --- units ------------------------------------------------------------------------------------------------


def _check_units(entry: BoundRepresentation, slot: Slot, base: RunInputs) -> None:
    """What the layout that an intervention sees asks of its units, and what they ask of the run."""
    sees = entry.intervention.sees
    past = base.kwargs.get("past_key_values")
    if entry.site.matrix and past is not None and past.get_seq_length() > 0:
        raise LocationError(
            f"{entry.name!r} is a matrix over all keys, and the base brings {past.get_seq_length()} of them in"
            " past_key_values, where they cannot be named. Give the whole prompt instead."
        )
    if sees == "raw" and isinstance(slot, Units):
        raise LocationError(
            f"{entry.name!r} ({type(entry.intervention).__name__}) sees whole activations (sees='raw'):"
            " leave its locations out."
        )
    if sees != "concatenated" or entry.intervention.embed_dim is None:
        return
    expected = entry.config.max_number_of_units
    base = base.of(entry.site.stack)
    level = "heads" if entry.site.by_heads else "positions"
    counts = (
        {count[0] for count in slot.counts} if isinstance(slot, Units) else {entry.site.heads or base.length}
    )
    if counts != {expected}:
        raise LocationError(
            f"{entry.name!r} ({type(entry.intervention).__name__}) sees the {level} of an example as one vector and"
            f" is made for {expected} (max_number_of_units), not for {', '.join(map(str, sorted(counts)))}."
        )


def _fed_from(
    entry: BoundRepresentation, source: Slot, base: Slot, source_inputs: RunInputs, base_inputs: RunInputs
) -> Units | Whole:
    """The units of the source, once it is sure that there is one for each unit of the base, or one for all."""
    if isinstance(source, Skipped):
        raise LocationError(
            f"{entry.name!r} has base locations and None for its source locations."
            " Give both, or None in both to skip it."
        )
    _check_examples(entry, source_inputs, base_inputs)
    _check_pair(entry, source, base, source_inputs, base_inputs)
    return source


def _check_examples(entry: BoundRepresentation, source: RunInputs, base: RunInputs) -> None:
    """That a source has as many pictures or sounds as the base, or one for all."""
    if entry.site.stack in (None, "encoder", "decoder"):
        return
    have, want = source.of(entry.site.stack).batch, base.of(entry.site.stack).batch
    if have not in (1, want):
        raise SourceError(
            f"{entry.name!r} is in the {entry.site.stack} tower, which has {want} examples in the base and {have} in"
            " the source. Give as many, or one for all."
        )


def _check_pair(
    entry: BoundRepresentation, source: Slot, base: Slot, source_inputs: RunInputs, base_inputs: RunInputs
) -> None:
    """That the source has a unit for each unit of the base, or one for all."""
    if isinstance(source, Units) and isinstance(base, Units):
        counts = source.counts * (base_inputs.of(entry.site.stack).batch if len(source) == 1 else 1)
        for example, (have, want) in enumerate(zip(counts, base.counts, strict=True)):
            if any(h not in (1, w) for h, w in zip(have, want, strict=True)):
                raise LocationError(
                    f"{entry.name!r} has {_counts(have)} source units and {_counts(want)} base units for example"
                    f" {example}. Give as many, or one source unit for all."
                )
        if entry.site.matrix:
            whole = [level for level in ("queries", "keys") if level not in base.levels]
            _check_lengths(entry, source_inputs, base_inputs, whole)
        return
    if entry.site.matrix:
        if isinstance(source, Units) or isinstance(base, Units):
            raise LocationError(
                f"{entry.name!r} has locations on one side and the whole matrix on the other. Give both, or neither."
            )
        _check_lengths(entry, source_inputs, base_inputs, ("queries", "keys"))
        return
    stack = entry.site.stack
    have_all = source_inputs.of(stack).length if isinstance(source, Whole) else None
    want_all = base_inputs.of(stack).length if isinstance(base, Whole) else None
    if entry.config.unit == "h" and not (isinstance(source, Whole) and isinstance(base, Whole)):
        return
    if have_all is None and isinstance(source, Units):
        have_all = max(count[-1] for count in source.counts)
    if want_all is None and isinstance(base, Units):
        want_all = max(count[-1] for count in base.counts)
    if have_all not in (1, want_all):
        hint = " Locate both sides with 'sources->base'." if isinstance(source, Whole) else ""
        raise LocationError(
            f"{entry.name!r} would put {have_all} source positions"
            f"{' (the whole source)' if isinstance(source, Whole) else ''} into {want_all} base positions"
            f"{' (the whole base)' if isinstance(base, Whole) else ''}.{hint}"
        )


def _check_lengths(
    entry: BoundRepresentation, source: RunInputs, base: RunInputs, levels: Sequence[str]
) -> None:
    """That whole rows or matrices of attention come from a source as long as the base."""
    for level in levels:
        stack = entry.site.key_stack if level == "keys" else entry.site.stack
        have, want = source.of(stack).length, base.of(stack).length
        if have != want:
            raise LocationError(
                f"{entry.name!r} would put attention over {have} source positions into attention over {want} base"
                " positions. Locate as many queries and keys in both (unit 'h.query.key'), or choose a source as long"
                " as the base."
            )


def _counts(counts: tuple[int, ...]) -> str:
    return " x ".join(map(str, counts))


def _check_constant(entry: BoundRepresentation, constant: Tensor, slot: Slot, base: RunInputs) -> None:
    """That a constant source broadcasts to the units it goes to, as far as they are known before the run."""
    width = entry.site.width
    if entry.site.matrix:
        _check_constant_matrix(entry, constant, slot, base)
        return
    if width is None or entry.intervention.sees == "raw":
        return
    base = base.of(entry.site.stack)
    shape: list[int | None] = [base.batch]
    if isinstance(slot, Units):
        shape += [max(count[level] for count in slot.counts) for level in range(len(slot.counts[0]))]
        if slot.positions is None:
            shape.append(base.length)
    else:
        shape += [entry.site.heads] * entry.site.by_heads + [base.length]
    if entry.intervention.sees == "concatenated":
        units = shape.pop(1)
        width *= units or 1
    shape.append(width)
    given = list(constant.shape)
    while len(given) > len(shape) and given[0] == 1:
        given.pop(0)
    own = len(given) <= len(shape) and given[-1:] == [width]
    if not own or any(g not in (1, s) for g, s in zip(reversed(given), reversed(shape), strict=False)):
        raise SourceError(
            f"The source representation of {entry.name!r} has shape {tuple(constant.shape)}, which does not broadcast"
            f" to its units, {tuple(shape)}. The last axis must be {width}, the others as they are or 1."
        )


def _check_constant_matrix(entry: BoundRepresentation, constant: Tensor, slot: Slot, base: RunInputs) -> None:
    """That a constant source broadcasts to the located entries of the matrices, or to the matrices as a whole."""
    queries, keys = (base.of(stack).length for stack in (entry.site.stack, entry.site.key_stack))
    whole = (base.batch, entry.site.heads or 0, queries, keys)
    located: tuple[int, ...] = whole
    if isinstance(slot, Units):
        counts = {name: max(map(len, rows)) for name, rows in slot.levels.items()}
        located = (
            base.batch,
            *(counts.get(n, size) for n, size in zip(_MATRIX_LEVELS, whole[1:], strict=True)),
        )
    if not any(broadcasts(constant.shape, shape) for shape in (located, whole)):
        raise SourceError(
            f"The source representation of {entry.name!r} has shape {tuple(constant.shape)}, which broadcasts neither"
            f" to its entries, {located}, nor to whole matrices of [batch, heads, queries, keys], {whole}."
        )


_MATRIX_LEVELS: tuple[Level, ...] = ("heads", "queries", "keys")


# --- subspaces --------------------------------------------------------------------------------------------


def _subspaces(bound: Sequence[BoundRepresentation], given: Any) -> list[Any]:
    """For each representation its subspaces: one set of ids for all, or `[interventions][batch][ids]`."""
    if given is None:
        return [None] * len(bound)
    value = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(value, (int, SubspacePerPosition)):
        return [value] * len(bound)
    if not isinstance(value, (list, tuple)):
        raise SubspaceError(
            f"subspaces is a {type(given).__name__}. Give an id, a list of ids for all, or the full form"
            " [interventions][examples][ids]."
        )
    if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [list(value)] * len(bound)
    if len(value) != len(bound):
        raise SubspaceError(
            f"subspaces has {len(value)} entries for {len(bound)} representations"
            f" ({', '.join(entry.name for entry in bound)}). Give one for each, None for all coordinates."
        )
    for entry, item in zip(bound, value, strict=True):
        if item is None or isinstance(item, SubspacePerPosition) or hasattr(item, "tolist"):
            continue
        if not isinstance(item, (list, tuple)) or any(isinstance(row, int) for row in item):
            raise SubspaceError(
                f"The subspaces of {entry.name!r} are {item!r}; in the full form they list the ids of each example,"
                f" [[...], ...]. One flat list of ids, without more, is for all interventions."
            )
    return list(value)


def _check_subspaces(entry: BoundRepresentation, ids: Any, batch: int) -> None:
    """What the intervention has to say, and for one of any width what the width here has."""
    intervention, width = entry.intervention, entry.site.width
    if ids is None:
        return
    with _named(entry):
        intervention.check_subspaces(ids, batch)
        if (
            width is not None
            and intervention.subspace_size is None
            and intervention.sees == "per_unit"
            and isinstance(intervention, CoordinatewiseIntervention)
        ):
            select(ids, size=width, partition=intervention.subspace_partition, batch=batch)


# --- errors of interventions, named -----------------------------------------------------------------------


@contextmanager
def _named(entry: BoundRepresentation) -> Iterator[None]:
    """Raise what an intervention raises as a member of our tree, with its name."""
    try:
        yield
    except interventions.InterventionError as error:
        raise error_of(error, entry) from error


def error_of(error: interventions.InterventionError, entry: BoundRepresentation) -> IntervenableError:
    """The member of our tree that an intervention's error is."""
    message = f"{entry.name!r}: {error}"
    if isinstance(error, interventions.SubspaceIndexError):
        return SubspaceRangeError(message)
    if isinstance(error, interventions.SubspaceError):
        return SubspaceError(message)
    if isinstance(error, (interventions.MissingSourceError, interventions.UnusedSourceError)):
        return SourceError(message)
    return EditError(message)
