"""A data set of counterfactuals as tensors, row by row what a call of an `IntervenableModel` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from intervenable.errors import DatasetError
from intervenable.inputs import PER_TOKEN, TOKENS
from intervenable.model import IntervenableModel
from intervenable.signatures import forward_signature, takes
from intervenable.training_columns import Columns, as_tensors, depth, missing_columns, plain, read_columns
from intervenable.training_places import Places, given_places, places_of_columns
from intervenable.unwrapping import config_of
from interventions import VanillaIntervention

IGNORED = -100
"""The label of a token that is not asked for, as in transformers."""
SOURCE = "source_"
"""How the columns of the source begin."""
RESERVED = ("labels", "label", "base", "source", "subspaces")
"""Columns that are no inputs of the model, whatever it takes."""

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Some examples: the arguments of a call, and its labels."""

    rows: tuple[int, ...]
    """Which examples they are."""

    base: Inputs
    """Inputs of the base."""

    sources: list[Inputs | None] | None
    """Inputs for each group of representations; None if none of them takes any."""

    unit_locations: Any
    """Where, for these examples."""

    subspaces: Any
    """Which coordinates, for these examples."""

    labels: Tensor
    """`[b]`, or `[b, length]` with -100 where nothing is asked."""

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""

        def moved(inputs: Inputs) -> Inputs:
            return {key: value.to(device) for key, value in inputs.items()}

        sources = (
            None if self.sources is None else [None if one is None else moved(one) for one in self.sources]
        )
        return replace(self, base=moved(self.base), sources=sources, labels=self.labels.to(device))


Locate: TypeAlias = Callable[[Batch], Any]
"""What makes unit locations for a batch."""


@dataclass(frozen=True)
class Examples:
    """A data set as tensors on the CPU: row i is example i, padded to the longest.

    Made by `read_examples`.
    """

    name: str
    """What messages call it."""

    base: Inputs
    """`[N, ...]` inputs of the base, by the names that the model gives them."""

    sources: tuple[Inputs | None, ...]
    """`[N, ...]` inputs of the source of each group of representations; None for a group without one."""

    labels: Tensor
    """`[N]` answers, or `[N, length]` tokens with -100 where nothing is asked."""

    places: Places | Locate
    """Where, for all examples, or what makes it for a batch."""

    subspaces: Any
    """None, ids for all, or `[representations][N][ids]`."""

    left_out: Tensor | None = None
    """`[N, groups]` which groups are to be left out of an example's run, where the base as their source would undo
    what other groups did; None if there are none."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unit_locations(self) -> Any:
        """Where, for all examples, as in a call; what makes it for a batch, if that was given."""
        return self.places.unit_locations if isinstance(self.places, Places) else self.places

    def batch(self, rows: Sequence[int]) -> Batch:
        """The arguments of a call for these rows, cut to the longest of them."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        base, cut = _cut({key: value[index] for key, value in self.base.items()})
        labels = self.labels[index]
        sources: list[Inputs | None] = [
            None if one is None else _cut({key: value[index] for key, value in one.items()})[0]
            for one in self.sources
        ]
        found = Batch(
            tuple(map(int, rows)),
            base,
            list(sources) if any(one is not None for one in sources) else None,
            None,
            _chosen(self.subspaces, rows, len(self)),
            labels[:, cut] if cut is not None and labels.dim() == 2 else labels,
        )
        if isinstance(self.places, Places):
            return replace(found, unit_locations=self.places.of(found.rows))
        return replace(found, unit_locations=self.places(found))


def read_examples(
    dataset: object,
    model: IntervenableModel,
    *,
    unit_locations: Any = None,
    subspaces: Any = None,
    name: str = "dataset",
) -> Examples:
    """Read a data set, checked against the model that it is for.

    Args:
        dataset: A `datasets.Dataset`, a list of dicts, a mapping of columns, or a torch `Dataset` of dicts, with the
            columns `input_ids`, `source_input_ids` (if an intervention takes a source) and `labels`.
        model: What its examples go to.
        unit_locations, subspaces: As in a call; None for those of the columns.
        name: What to call it in messages.

    Raises:
        DatasetError: a column that is missing or has unusable values; the message names the row.
        LocationError, SubspaceError: locations or subspaces that do not fit the examples.

    Example:
        >>> import intervenable as iv
        >>> mlp = iv.MLPClassifier(width=2, layers=1, classes=2)
        >>> model = iv.IntervenableModel([iv.RepresentationConfig(0, "block_output")], mlp)
        >>> rows = {"input_ids": [[0.0, 1.0]], "source_input_ids": [[1.0, 0.0]], "labels": [1]}
        >>> examples = read_examples(rows, model)
        >>> examples.base, examples.sources, examples.labels
        ({'inputs': tensor([[0., 1.]])}, ({'inputs': tensor([[1., 0.]])},), tensor([1]))
    """
    columns = read_columns(dataset, name)
    reader = _Reader(columns, model, name)
    keys = reader.input_columns()
    base_rows = {key: as_tensors(columns[key], key, name) for key in keys}
    masks = reader.source_masks()
    sources = reader.sources(base_rows, masks)
    labels = reader.labels(base_rows)
    made = reader.padded(base_rows, "", labels)
    places = (
        unit_locations
        if callable(unit_locations)
        else given_places(unit_locations, model, len(labels), masks)
        if unit_locations is not None
        else places_of_columns(columns, model, name, masks)
    )
    return Examples(
        name,
        {key: value for key, value in made.items() if key != "labels"},
        tuple(None if one is None else reader.padded(one, SOURCE) for one in sources),
        made["labels"] if "labels" in made else torch.stack(labels),
        places,
        _subspaces(columns, model, name) if subspaces is None else subspaces,
        None if masks is None or _apart(model, subspaces is not None or "subspaces" in columns) else ~masks,
    )


def _apart(model: IntervenableModel, by_parts: bool) -> bool:
    """Whether no group undoes what another did by writing the base's own values: in parts of one basis."""
    entries = model._bound
    if len({entry.group for entry in entries}) == 1:
        return True
    places = {(entry.config.layer, entry.config.component) for entry in entries}
    shared = len({id(entry.intervention) for entry in entries}) == 1
    coordinates = all(type(entry.intervention) is VanillaIntervention for entry in entries)
    return len(places) == 1 and by_parts and (shared or coordinates)


class _Reader:
    """What a data set's columns mean for one model."""

    def __init__(self, columns: Columns, model: IntervenableModel, name: str) -> None:
        self.columns = columns
        self.model = model
        self.name = name
        self.wrapped = model.model
        self.config = config_of(model.model)
        tokenizer = model.tokenizer
        pads = [getattr(owner, "pad_token_id", None) for owner in (tokenizer, self.config)]
        self.pad = next((pad for pad in pads if isinstance(pad, int)), 0)
        self.side = getattr(tokenizer, "padding_side", "right")

    # --- inputs -------------------------------------------------------------------------------------------

    def input_columns(self) -> list[str]:
        """The columns that are inputs of the base, the main one first."""
        parameters = forward_signature(self.wrapped).parameters
        named = [key for key in self.columns if key in parameters and key not in RESERVED]
        main = "input_ids" if "input_ids" in self.columns else None
        mains = (
            getattr(self.wrapped, "main_input_name", None),
            "inputs_embeds",
            next(iter(parameters), None),
        )
        main = main or next((key for key in mains if key in named), None)
        if main is None:
            raise missing_columns(["input_ids"], self.columns, self.name, ", the inputs of the base")
        return [main, *(key for key in named if key != main)]

    def key(self, column: str) -> str:
        """The model's own name of an input: what has no tokens calls `input_ids` what it takes first."""
        if column != "input_ids" or takes(self.wrapped, column):
            return column
        return next(iter(forward_signature(self.wrapped).parameters), column)

    def padded(
        self, rows: Mapping[str, list[Tensor]], prefix: str, labels: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The inputs of one run as tensors `[N, ...]`, by the model's names, with a mask if lengths differ.

        Labels of tokens are padded with them.
        """
        main = next(iter(rows))
        lengths = _lengths(rows[main])
        tokens = {key: value for key, value in rows.items() if key in PER_TOKEN}
        if labels is not None and labels[0].dim() == 1:
            tokens["labels"] = labels
        if len(set(lengths)) > 1 and main in PER_TOKEN and "attention_mask" not in rows:
            tokens["attention_mask"] = [torch.ones(length, dtype=torch.long) for length in lengths]
        first = _first_of_each(tokens, main)
        for key, values in tokens.items():
            for index, (row, length) in enumerate(zip(values, _lengths(tokens[first[key]]), strict=True)):
                if row.dim() and len(row) != length:
                    raise DatasetError(
                        f"{prefix}{key} of row {index} of {self.name} has {len(row)} values, and its"
                        f" {prefix}{first[key]} {length}."
                    )
        left = self.side == "left" or _begins_masked(tokens.get("attention_mask"))
        fills = {"input_ids": self.pad, "decoder_input_ids": self.pad, "labels": IGNORED}
        found = {}
        for key, values in {**rows, **tokens}.items():
            if key in tokens:
                values = _equally_long(values, max(_lengths(tokens[first[key]])), fills.get(key, 0), left)
            shapes = {tuple(row.shape) for row in values}
            if len(shapes) > 1:
                raise DatasetError(
                    f"{prefix}{key} of {self.name} has rows of different shapes:"
                    f" {', '.join(map(str, sorted(shapes)))}."
                )
            stacked = torch.stack(values)
            found[self.key(key)] = stacked if key in ("labels", "attention_mask") else self._typed(stacked)
        return found

    def _typed(self, values: Tensor) -> Tensor:
        if values.is_floating_point() or not self._reads_ids():
            weight = next((p for p in self.wrapped.parameters() if p.is_floating_point()), None)
            return values.to(torch.float32 if weight is None else weight.dtype)
        return values.long()

    def _reads_ids(self) -> bool:
        return any(isinstance(module, nn.Embedding) for module in self.wrapped.modules()) or hasattr(
            self.wrapped, "get_input_embeddings"
        )

    # --- sources ------------------------------------------------------------------------------------------

    def sources(
        self, base: Mapping[str, list[Tensor]], masks: Tensor | None
    ) -> list[dict[str, list[Tensor]] | None]:
        """For each group of representations the rows of its source; None for a group that takes none."""
        fed, needed = groups_with_sources(self.model)
        groups = 1 + max((entry.group for entry in self.model._bound), default=-1)
        main = next(iter(base))
        found: list[dict[str, list[Tensor]] | None] = [None] * groups
        if not fed or (not needed and SOURCE + main not in self.columns):
            return found
        if SOURCE + main not in self.columns:
            taker = next(e for e in self.model._bound if e.group in needed)
            why = f", and {taker.name!r} ({type(taker.intervention).__name__}) takes a source"
            raise missing_columns([SOURCE + main], self.columns, self.name, why)
        keys = [key for key in base if SOURCE + key in self.columns]
        values = {key: self.columns[SOURCE + key] for key in keys}
        grouped = depth(values[main][0]) > base[main][0].dim()
        if not grouped:
            rows = {key: as_tensors(column, SOURCE + key, self.name) for key, column in values.items()}
            listed = [rows] * groups
        else:
            counts = {len(row) for row in values[main]}
            if counts not in ({groups}, {len(fed)}):
                raise DatasetError(
                    f"{SOURCE + main!r} of {self.name} has {', '.join(map(str, sorted(counts)))} sources for an"
                    f" example, and the model has {groups} group{'s' * (groups > 1)} of interventions"
                    f" ({', '.join(self.model.names)}). Give one source, or one for each group."
                )
            order = sorted(fed) if counts == {len(fed)} else range(groups)
            by_group = {
                group: {
                    key: as_tensors([row[number] for row in column], SOURCE + key, self.name)
                    for key, column in values.items()
                }
                for number, group in enumerate(order)
            }
            listed = [by_group.get(group, {}) for group in range(groups)]
        for group in fed:
            rows = listed[group]
            self._check_width(base[main], rows[main], main)
            if masks is not None:
                rows = {
                    key: [
                        own if bool(masks[index, group]) else base[key][index]
                        for index, own in enumerate(column)
                    ]
                    for key, column in rows.items()
                }
            found[group] = rows
        return found

    def _check_width(self, base: Sequence[Tensor], source: Sequence[Tensor], main: str) -> None:
        """That vectors of sources are as wide as those of bases."""
        for index, (one, other) in enumerate(zip(base, source, strict=True)):
            if one.dim() != other.dim() or (one.is_floating_point() and one.shape[-1:] != other.shape[-1:]):
                raise DatasetError(
                    f"{SOURCE + main} of row {index} of {self.name} has the shape {tuple(other.shape)}, and {main}"
                    f" {tuple(one.shape)}. Both go to the same model, and are to be equally wide."
                )

    def source_masks(self) -> Tensor | None:
        """`[N, groups]` whether a group's variable is intervened on; None if all are."""
        if "source_mask" not in self.columns:
            return None
        groups = 1 + max((entry.group for entry in self.model._bound), default=-1)
        rows = as_tensors(self.columns["source_mask"], "source_mask", self.name)
        mask = (
            torch.stack([row.reshape(-1).bool() for row in rows])
            if len({r.numel() for r in rows}) == 1
            else None
        )
        if mask is None or mask.shape[1] not in (1, groups):
            counts = ", ".join(map(str, sorted({row.numel() for row in rows})))
            raise DatasetError(
                f"source_mask of {self.name} has {counts} values for an example, and the model has {groups}"
                f" group{'s' * (groups > 1)} of interventions. Give one for each group."
            )
        return None if bool(mask.all()) else mask.expand(-1, groups)

    # --- labels -------------------------------------------------------------------------------------------

    def labels(self, base: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """The labels: whole numbers, one for each example or one for each of its tokens.

        Raises:
            DatasetError: they are something else; the message names the row.
        """
        if "labels" not in self.columns:
            raise missing_columns(["labels"], self.columns, self.name)
        rows = as_tensors(self.columns["labels"], "labels", self.name)
        if all(row.dim() == 1 and len(row) == 1 for row in rows) and any(
            len(row) != 1 for row in next(iter(base.values()))
        ):
            rows = [row[0] for row in rows]
        if len({row.dim() for row in rows}) > 1 or rows[0].dim() > 1:
            dims = sorted({tuple(row.shape) for row in rows})[:3]
            raise DatasetError(
                f"labels of {self.name} have the shapes {', '.join(map(str, dims))}. Give an answer for each example,"
                f" or one for each of its tokens ({IGNORED} where none is asked)."
            )
        lengths = [row.numel() for row in rows]
        flat = torch.cat([row.reshape(-1) for row in rows])

        def row_of(place: Tensor) -> int:
            return next(index for index, end in enumerate(accumulate(lengths)) if int(place) < end)

        halves = (flat != flat.round()).nonzero() if flat.is_floating_point() else flat.new_zeros(0)
        if len(halves):
            raise DatasetError(
                f"The label of row {row_of(halves[0])} of {self.name} is {flat[halves[0]].item()}, not a whole"
                " number."
            )
        wrong = ((flat < 0) & (flat != IGNORED)).nonzero()
        if len(wrong):
            raise DatasetError(
                f"The label of row {row_of(wrong[0])} of {self.name} is {int(flat[wrong[0]])}. Labels are classes or"
                f" token ids from 0 on, or {IGNORED} for tokens that are not asked for."
            )
        if bool((flat == IGNORED).any()):
            unasked = next((index for index, row in enumerate(rows) if bool((row == IGNORED).all())), None)
            if unasked is not None:
                raise DatasetError(
                    f"No label of row {unasked} of {self.name} is asked for: all are {IGNORED}."
                )
        return [row.long() for row in rows] if flat.dtype != torch.long else rows


def groups_with_sources(model: IntervenableModel) -> tuple[set[int], set[int]]:
    """The groups that a source run would feed, and those among them that cannot do without."""
    takers = [
        entry
        for entry in model._bound
        if entry.intervention.accepts_source
        and entry.constant is None
        and entry.intervention.source_representation is None
    ]
    return {entry.group for entry in takers}, {
        entry.group for entry in takers if entry.intervention.needs_source
    }


def check_labels(examples: Examples, classes: int) -> None:
    """That every label is one of so many.

    Raises:
        DatasetError: one is not; the message names its row.
    """
    labels = examples.labels
    wrong = (labels >= classes).reshape(len(labels), -1).any(1).nonzero().reshape(-1)
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(
            f"The label of row {row} of {examples.name} is {int(labels[row].max())}, and the model gives logits for"
            f" {classes} (0 to {classes - 1})."
        )


def _subspaces(columns: Columns, model: IntervenableModel, name: str) -> Any:
    """The subspaces of the columns as in a call: `[representations][N][ids]`; None if there are none."""
    if columns.get("subspaces") is None:
        return None
    count = len(model._bound)
    rows = [plain(row) for row in columns["subspaces"]]
    found: list[list[Any]] = [[] for _ in range(count)]
    for index, row in enumerate(rows):
        if isinstance(row, int):
            row = [[row]] * count
        elif isinstance(row, list) and row and all(isinstance(item, int) for item in row):
            row = [row] * count
        if not isinstance(row, list) or len(row) != count:
            raise DatasetError(
                f"subspaces of row {index} of {name} is {row!r}; the model has {count}"
                f" representation{'s' * (count > 1)}. Give a list of ids for each, [representations][ids]."
            )
        for ids, item in zip(found, row, strict=True):
            ids.append([item] if isinstance(item, int) else item)
    return [None if all(item is None for item in ids) else ids for ids in found]


def _chosen(subspaces: Any, rows: Sequence[int], count: int) -> Any:
    """The subspaces of these rows: of the full form those rows, of any other all of it."""
    if not isinstance(subspaces, (list, tuple)) or all(isinstance(item, int) for item in subspaces):
        return subspaces
    return [
        [ids[row] for row in rows] if isinstance(ids, (list, tuple)) and len(ids) == count else ids
        for ids in subspaces
    ]


def _lengths(rows: Sequence[Tensor]) -> list[int]:
    return [len(row) if row.dim() else 0 for row in rows]


def _first_of_each(tokens: Mapping[str, list[Tensor]], main: str) -> dict[str, str]:
    """For each input of tokens the one whose length it has: those of a decoder have one of their own.

    What lies beside a picture or a sound, which has no tokens, is as long as it is.
    """
    of_decoder = [key for key in tokens if key.startswith("decoder")]
    found = {}
    for key in tokens:
        if key in of_decoder or (key == "labels" and of_decoder):
            found[key] = of_decoder[0]
        else:
            found[key] = main if main in tokens else key
    return found


def _begins_masked(masks: Sequence[Tensor] | None) -> bool:
    return masks is not None and any(len(mask) and not bool(mask[0]) for mask in masks)


def _equally_long(rows: Sequence[Tensor], length: int, fill: int, left: bool) -> list[Tensor]:
    found = []
    for row in rows:
        missing = length - len(row)
        padding = row.new_full((missing, *row.shape[1:]), fill)
        found.append(torch.cat([padding, row] if left else [row, padding]) if missing else row)
    return found


def _cut(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], slice | None]:
    """The inputs without positions that are padding in every row, and where they were cut."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not any(key in inputs for key in TOKENS):
        return inputs, None
    real = mask.bool().any(0).nonzero().reshape(-1)
    if not len(real):
        return inputs, None
    cut = slice(int(real[0]), int(real[-1]) + 1)
    if cut == slice(0, mask.shape[1]):
        return inputs, None
    tokens = [key for key in inputs if key in PER_TOKEN and not key.startswith("decoder")]
    return {key: value[:, cut] if key in tokens else value for key, value in inputs.items()}, cut
