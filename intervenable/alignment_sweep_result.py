"""What a sweep of alignments gives: an accuracy for each layer, position and rank, with the interval around it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from intervenable.alignment_statistics import Estimate
from intervenable.errors import ConfigError, StorageError, UnknownNameError, unknown_name
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd

    from intervenable.drawing import Picture

Rank = int | str | None
"""How many directions; `"full"` for a swap of the whole vector, `"random 8"` for 8 random directions, which nothing
trains; None for what has no rank to choose."""

SWEEP = FileKind(
    "intervenable.AlignmentSweep",
    version=1,
    file_name="alignments.safetensors",
    noun="a sweep of alignments",
    writer="AlignmentSweep.save",
    remedy="Run the sweep again.",
)
AXES = ("layer", "pos", "rank")
MOST_SHOWN = 3


class AlignmentCell(NamedTuple):
    """One alignment of a sweep."""

    layer: int | None
    pos: str
    rank: Rank
    iia: Estimate
    loss: float

    def __str__(self) -> str:
        place = f"layer {self.layer}, {self.pos!r}" if self.layer is not None else repr(self.pos)
        return f"{place}, {rank_label(self.rank)}: {self.iia}"


@dataclass(frozen=True, eq=False)
class AlignmentSweep:
    """How often each alignment of a sweep gave the counterfactual answer to examples that it was not trained on.

    Everything is made from what each example gave under each seed: the mean over both is the figure of a cell, and
    its interval tells how far it depends on them.

    Example:
        >>> right = torch.tensor([[1.0] * 40, [1.0] * 20 + [0.0] * 20]).reshape(2, 1, 1, 1, 40)
        >>> sweep = AlignmentSweep(
        ...     layers=(0, 1), positions=("last",), ranks=(2,), seeds=(0,), per_example=right,
        ...     loss=torch.tensor([0.1, 0.7]).reshape(2, 1, 1, 1),
        ... )
        >>> print(sweep.top(1)[0])
        layer 0, 'last', rank 2: 1.00 [0.91, 1.00]
    """

    layers: tuple[int | None, ...]
    """Layers; a single None for a component outside the blocks."""

    positions: tuple[str, ...]
    """A name for each position."""

    ranks: tuple[Rank, ...]
    """Directions of each alignment."""

    seeds: tuple[int, ...]
    """Seeds of the alignments of a cell."""

    per_example: Tensor
    """`[layers, positions, ranks, seeds, examples]` what each example gave: 1 where the answer was right."""

    loss: Tensor
    """`[layers, positions, ranks, seeds]` the last loss of training; NaN where nothing was trained."""

    shortcuts: tuple[str, ...] = ()
    """What could be left out of the computation, and what had to be done the long way."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the sweep, as JSON has it: component, intervention, options of training."""

    def __post_init__(self) -> None:
        for name in ("layers", "positions", "ranks", "seeds", "shortcuts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "settings", dict(self.settings))
        wanted = tuple(map(len, (self.layers, self.positions, self.ranks, self.seeds)))
        if tuple(self.per_example.shape[:-1]) != wanted or tuple(self.loss.shape) != wanted:
            raise ConfigError(
                f"There are {wanted} layers, positions, ranks and seeds, and values of shape"
                f" {tuple(self.per_example.shape)} for examples and {tuple(self.loss.shape)} for losses. Both begin"
                " with the former axes."
            )

    # -- looking

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `iia`."""
        return AXES

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """For each axis a name of each entry."""
        component = str(self.settings.get("component", ""))
        return {
            "layer": tuple(component if layer is None else str(layer) for layer in self.layers),
            "pos": self.positions,
            "rank": tuple(map(rank_label, self.ranks)),
        }

    @property
    def iia(self) -> Tensor:
        """`[layers, positions, ranks]` mean over seeds and examples: the interchange intervention accuracy."""
        return self.per_example.double().mean((-1, -2))

    @property
    def by_seed(self) -> Tensor:
        """`[layers, positions, ranks, seeds]` the same for each seed."""
        return self.per_example.double().mean(-1)

    @property
    def low(self) -> Tensor:
        """`[layers, positions, ranks]` the lower end of the interval of each cell."""
        return self._intervals[0]

    @property
    def high(self) -> Tensor:
        """`[layers, positions, ranks]` the upper end of the interval of each cell."""
        return self._intervals[1]

    @property
    def confidence(self) -> float:
        """With which confidence a mean lies in its interval."""
        return float(self.settings.get("confidence", 0.95))

    @property
    def metric(self) -> str:
        """What the figure of a cell is."""
        return str(self.settings.get("metric", "iia"))

    @cached_property
    def _cells(self) -> list[AlignmentCell]:
        cells = []
        axes = (enumerate(self.layers), enumerate(self.positions), enumerate(self.ranks))
        for (a, layer), (b, pos), (c, rank) in product(*axes):
            estimate = Estimate.of(self.per_example[a, b, c], self.confidence)
            loss = self.loss[a, b, c].double().mean().item()
            cells.append(AlignmentCell(layer, pos, rank, estimate, loss))
        return cells

    @cached_property
    def _intervals(self) -> Tensor:
        ends = torch.tensor([[cell.iia.low, cell.iia.high] for cell in self._cells], dtype=torch.float64)
        return ends.T.reshape(2, len(self.layers), len(self.positions), len(self.ranks))

    def cell(self, *, layer: int | None = None, pos: str | None = None, rank: Rank = None) -> AlignmentCell:
        """One cell, of axes with a single entry by themselves.

        Raises:
            UnknownNameError: there is no such layer, position or rank.
            ConfigError: an axis of several entries was left out.
        """
        wanted = dict(zip(AXES, (layer, pos, rank), strict=True))
        at = []
        for axis, entries in zip(AXES, (self.layers, self.positions, self.ranks), strict=True):
            entry: Any = wanted[axis]
            if entry is None and len(entries) > 1:
                raise ConfigError(
                    f"There are {len(entries)} entries of {axis!r}. Name one: {axis}={entries[0]!r}."
                )
            if entry is not None and entry not in entries:
                raise UnknownNameError(unknown_name(axis, entry, map(str, entries)))
            at.append(0 if entry is None else entries.index(entry))
        return self._cells[(at[0] * len(self.positions) + at[1]) * len(self.ranks) + at[2]]

    def top(self, k: int = 10) -> tuple[AlignmentCell, ...]:
        """The `k` cells of the highest accuracy, in order; of equal ones the first."""
        return tuple(sorted(self._cells, key=lambda cell: -cell.iia.value)[:k])

    def to_pandas(self, *, by_seed: bool = False) -> pd.DataFrame:
        """A table with a row for each cell: `layer`, `pos`, `rank`, `iia`, `low`, `high`, `loss`, `examples`.

        Args:
            by_seed: A row for each seed instead, with a column `seed`; its interval is over the examples alone.
        """
        import pandas as pd

        examples = self.per_example.shape[-1]
        columns = ["layer", "pos", "rank", "iia", "low", "high", "loss", "examples"]
        if not by_seed:
            means = [[*cell[:3], *cell.iia, cell.loss, examples] for cell in self._cells]
            return pd.DataFrame(means, columns=columns)
        values, losses = self.per_example.flatten(0, 2), self.loss.flatten(0, 2)
        rows = [
            [
                *cell[:3],
                seed,
                *Estimate.of(values[number, index], self.confidence),
                losses[number, index].item(),
                examples,
            ]
            for number, cell in enumerate(self._cells)
            for index, seed in enumerate(self.seeds)
        ]
        return pd.DataFrame(rows, columns=[*columns[:3], "seed", *columns[3:]])

    def plot(self, **options: Any) -> Picture:
        """Draw the accuracy: a heat map of layers by positions for each rank, with the intervals where there is room.

        Over a single position (or layer) it is a curve for each rank, with bars for the intervals. Options: `title`,
        `limits`, `marks`, `show_values`, `across`; `plot_alignments` in `intervenable.alignment_plots` says more.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from intervenable.alignment_plots import plot_alignments

        return plot_alignments(self, **options)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{len(entries)} {name}{'' if len(entries) == 1 else 's'}"
            for name, entries in (
                ("layer", self.layers),
                ("position", self.positions),
                ("rank", self.ranks),
                ("seed", self.seeds),
            )
        )
        lines = [f"AlignmentSweep of {self.settings.get('component', 'alignments')}: {sizes}"]
        lines.append(
            f"  {self.metric} over {self.per_example.shape[-1]} examples, with intervals of {self.confidence:.0%};"
            " the highest:"
        )
        lines += [f"    {cell}" for cell in self.top(MOST_SHOWN)]
        lines += [f"  {sentence}" for sentence in self.shortcuts[:MOST_SHOWN]]
        if len(self.shortcuts) > MOST_SHOWN:
            lines.append(f"  and {len(self.shortcuts) - MOST_SHOWN} more shortcuts of some cells.")
        return "\n".join(lines)

    # -- files

    def save(self, path: str | Path) -> Path:
        """Write the result to a file `*.safetensors`, or into a folder; return the file.

        It is written at once or not at all, and the same result gives the same bytes.

        Raises:
            StorageError: it could not be written, or `settings` holds what JSON has no form for.
        """
        content = {
            name: getattr(self, name)
            for name in ("layers", "positions", "ranks", "seeds", "shortcuts", "settings")
        }
        tensors = {"per_example": self.per_example, "loss": self.loss}
        return write_tensors(SWEEP.file_at(path), SWEEP, tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> AlignmentSweep:
        """The result that `save` has written there.

        Raises:
            StorageError: a damaged file, or one of another kind.
            FileNotFoundError: no file.
        """
        file = SWEEP.file_at(path)
        tensors, content = read_tensors(file, SWEEP)
        try:
            return cls(**{**content, **tensors})
        except (TypeError, ConfigError, AttributeError) as error:
            raise StorageError(f"{file} is not {SWEEP.noun} ({error}). {SWEEP.remedy}") from error


def rank_label(rank: Rank) -> str:
    """What is written for a rank.

    Example:
        >>> rank_label(4), rank_label("full"), rank_label("random 4"), rank_label(None)
        ('rank 4', 'full vector', 'random, rank 4', 'learned')
    """
    if rank is None:
        return "learned"
    randomly = random_size(rank)
    if randomly is not None:
        return f"random, rank {randomly}"
    return "full vector" if rank == "full" else f"rank {rank}"


def random_size(rank: object) -> int | None:
    """How many random directions a rank asks for; None if it asks for others.

    Example:
        >>> random_size("random 8"), random_size(8), random_size("random")
        (8, None, None)
    """
    found = re.fullmatch(r"random ([1-9][0-9]*)", rank) if isinstance(rank, str) else None
    return int(found[1]) if found else None
