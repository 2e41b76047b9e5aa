"""`sweep_alignments`: an alignment for every layer, position and rank, each measured on examples it has not seen."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intervenable._version import __version__
from intervenable.alignment_places import Place, layers_of, read_places
from intervenable.alignment_study import Study, make_study, metric_name, read_seeds
from intervenable.alignment_sweep_result import AlignmentSweep, Rank, random_size
from intervenable.alignment_workers import in_processes
from intervenable.binding import Places
from intervenable.config import RepresentationConfig
from intervenable.config_fields import is_module_path
from intervenable.digests import digest_of_columns, digest_of_weights
from intervenable.errors import ConfigError
from intervenable.progress import Progress, Show
from intervenable.sweep_checkpoints import Checkpoints
from intervenable.training_suffix import shared_records
from interventions import Intervention, LowRankRotatedSpaceIntervention, VanillaIntervention
from model_maps import ALIASES, COMPONENTS


class Job(NamedTuple):
    """The cells of one layer and position, which share what is computed below them."""

    layer: int
    """Which of the layers."""

    position: int
    """Which of the positions."""


class Cell(NamedTuple):
    """What one alignment gave."""

    rank: int
    """Which of the ranks."""

    seed: int
    """Which of the seeds."""

    per_example: list[float]
    loss: float
    shortcuts: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """All that the cells of a sweep are made from; goes to other processes as it is."""

    study: Study
    """Of the first layer and position."""

    layers: tuple[int | None, ...]
    places: tuple[Place, ...]
    ranks: tuple[Rank, ...]
    seeds: tuple[int, ...]
    kind: type[Intervention]

    def __call__(self, job: Job, done: Sequence[tuple[int, int]] = ()) -> Iterator[Cell]:
        """The cells of a layer and a position, but for those that are done."""
        study = replace(self.study, layer=self.layers[job.layer], place=self.places[job.position])
        with shared_records():
            for number, rank in enumerate(self.ranks):
                for index, seed in enumerate(self.seeds):
                    if (number, index) in done or (rank == "full" and index > 0):
                        continue
                    yield self._cell(study, number, index, rank, seed)

    def _cell(self, study: Study, number: int, index: int, rank: Rank, seed: int) -> Cell:
        if rank == "full":
            values = study.measured(study.bound(VanillaIntervention))
            return Cell(number, index, values.tolist(), float("nan"), ())
        size = random_size(rank)
        if size is not None:
            values = study.measured(study.bound(LowRankRotatedSpaceIntervention, seed, size))
            return Cell(number, index, values.tolist(), float("nan"), ())

        def make(own: int) -> Any:
            return study.bound(self.kind, own, rank if isinstance(rank, int) else None)

        trained = study.trained(make, seed)
        values = study.measured(trained.model)
        return Cell(number, index, values.tolist(), trained.loss, trained.shortcuts)


def sweep_alignments(
    model: nn.Module,
    dataset: object,
    evaluation: object,
    *,
    component: str = "block_output",
    layers: int | Sequence[int] | slice | None = None,
    positions: Any = None,
    ranks: Rank | Sequence[Rank] = (1,),
    intervention_type: type[Intervention] = LowRankRotatedSpaceIntervention,
    tokenizer: Any = None,
    seeds: int | Sequence[int] = (0,),
    restarts: int = 1,
    processes: int = 1,
    checkpoint: str | Path | None = None,
    confidence: float = 0.95,
    progress: Show = None,
    **train_options: Any,
) -> AlignmentSweep:
    """Train an alignment for every layer, position and rank, and measure each on examples that it was not trained on.

    Each cell begins with a new intervention that its seed alone decides and is trained by `train`, so a cell gives
    the same in whatever sweep it stands.

    Args:
        model: The model itself; it stays as it is.
        dataset: What alignments are trained on, as in `train`.
        evaluation: What they are measured on: another data set, or a share of the first to put aside.
        component: Where in the layers.
        layers: Which layers; all by default.
        positions: Which positions: an entry or a list of them, or entries by label. An entry is what a call takes
            for a position (an int, `"last"`, words, a list of several for one alignment, a pair `(source, base)`),
            or the name of a column of the data sets that says where it is in each example (in the source:
            `source_<name>`, if that is there). By default the columns `base_position` and `source_position`, or the
            last token without them.
        ranks: How many directions each alignment has; `"full"` swaps the whole vector and trains nothing, nor does
            `"random 8"`, which swaps 8 random directions, others for each seed; None is for interventions without a
            rank, such as `BoundlessRotatedSpaceIntervention`.
        intervention_type: What is trained.
        tokenizer: For positions that are words; and for padding.
        seeds: Seeds of the alignments of each cell; all count in its mean.
        restarts: How many alignments are trained for each seed, of which the one of the lowest loss on the training
            data is kept; restart `r` has the seed `seed + 10000 r`.
        processes: How many processes share the cells. Each has a copy of the model and its share of torch's
            threads; a script that starts them needs the guard `if __name__ == "__main__":`.
        checkpoint: A folder to keep finished cells in. The same call goes on from there after a kill, with the same
            result.
        confidence: Of the intervals, which are over examples and seeds: see `bootstrap_interval`.
        progress: True for a bar, False for none, a function of (done, total); None for a bar if it takes long.
        **train_options: Options of `train`: `epochs`, `lr`, `batch_size`, `metric`, ...

    Raises:
        ConfigError: something in the call cannot be; no alignment was trained.
        DatasetError, LocationError: data that lack something, or a position that is not there in some example.
        StorageError: the checkpoint is of another sweep, is damaged, in use, or cannot be written.

    Example:
        >>> import intervenable as iv
        >>> mlp = iv.MLPClassifier(width=4, layers=2, classes=2)
        >>> source = torch.randn(40, 4)
        >>> rows = {"input_ids": torch.randn(40, 4), "source_input_ids": source, "labels": mlp(source).argmax(-1)}
        >>> sweep = sweep_alignments(mlp, rows, rows, ranks=(2, "full"), epochs=1)
        >>> sweep.iia.shape, sweep.cell(layer=0, rank="full").iia.value
        (torch.Size([2, 1, 2]), 1.0)
    """
    listed = [ranks] if ranks is None or isinstance(ranks, (int, str)) else list(ranks)
    _check_ranks(listed, intervention_type)
    if isinstance(processes, bool) or processes < 1:
        raise ConfigError(f"processes={processes!r}: give a whole number from 1 on.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r}: give a number between 0 and 1, such as 0.95.")
    seeds = read_seeds(seeds)
    study = make_study(
        model, dataset, evaluation, component, None, Place(""), tokenizer, train_options, restarts
    )
    chosen = _layers(model, component, layers)
    study = replace(study, layer=chosen[0])
    places = [replace(study, place=place).located().place for place in read_places(positions, study.dataset)]
    work = Work(study, tuple(chosen), tuple(places), tuple(listed), seeds, intervention_type)
    _check_buildable(work)
    settings = _settings(work, component, confidence)
    table = _Table(work)
    with ExitStack() as stack:
        kept = None
        if checkpoint is not None:
            about = _fingerprint(work, settings)
            kept = stack.enter_context(Checkpoints(checkpoint, about, table.cells))
        shown = stack.enter_context(Progress(table.cells, progress, "alignments"))
        for number in range(table.cells):
            finished = None if kept is None else kept.read(number)
            if finished is not None:
                table.take(number, finished.results, finished.ways)
                shown.advance(computed=False)
        jobs = table.jobs()
        count = min(processes, len(jobs))
        stream = _one_by_one(work, jobs) if count < 2 else in_processes(work, jobs, count)
        for job, cell in stack.enter_context(_closing(stream)):
            number = table.number(job, cell)
            results = {
                "per_example": torch.tensor(cell.per_example),
                "loss": torch.tensor(cell.loss, dtype=torch.float64),
            }
            ways = dict.fromkeys(cell.shortcuts, 1)
            if kept is not None:
                kept.write(number, results, ways)
            table.take(number, results, ways)
            shown.advance()
    return table.result(settings)


class _Table:
    """The cells of a sweep as they come."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.shape = tuple(map(len, (work.layers, work.places, work.ranks, work.seeds)))
        self.cells = (
            self.shape[0] * self.shape[1] * sum(len(self._seeds(rank)) for rank in range(self.shape[2]))
        )
        self.index = [
            (layer, position, rank, seed)
            for layer in range(self.shape[0])
            for position in range(self.shape[1])
            for rank in range(self.shape[2])
            for seed in self._seeds(rank)
        ]
        self.numbers = {place: number for number, place in enumerate(self.index)}
        examples = len(next(iter(work.study.evaluation.values())))
        self.per_example = torch.full((*self.shape, examples), torch.nan)
        self.loss = torch.full(self.shape, torch.nan, dtype=torch.float64)
        self.notes: dict[int, tuple[str, ...]] = {}

    def _seeds(self, rank: int) -> range:
        """The seeds that a rank has cells for: without training one is all."""
        return range(1 if self.work.ranks[rank] == "full" else self.shape[3])

    def number(self, job: Job, cell: Cell) -> int:
        """Which cell it is."""
        return self.numbers[(*job, cell.rank, cell.seed)]

    def take(self, number: int, results: Mapping[str, Tensor], ways: Mapping[str, int]) -> None:
        """Keep what a cell gave."""
        layer, position, rank, seed = self.index[number]
        alike = slice(None) if self.work.ranks[rank] == "full" else seed
        self.per_example[layer, position, rank, alike] = results["per_example"]
        self.loss[layer, position, rank, alike] = results["loss"]
        self.notes[number] = tuple(ways)

    def jobs(self) -> list[tuple[Job, tuple[tuple[int, int], ...]]]:
        """What is still to do, layer by layer, with what of it is done."""
        found = []
        for layer in range(self.shape[0]):
            for position in range(self.shape[1]):
                own = [number for number, place in enumerate(self.index) if place[:2] == (layer, position)]
                done = tuple(self.index[number][2:] for number in own if number in self.notes)
                if len(done) < len(own):
                    found.append((Job(layer, position), done))
        return found

    def result(self, settings: Mapping[str, Any]) -> AlignmentSweep:
        """All cells."""
        notes = dict.fromkeys(note for number in sorted(self.notes) for note in self.notes[number])
        return AlignmentSweep(
            layers=self.work.layers,
            positions=tuple(place.label for place in self.work.places),
            ranks=self.work.ranks,
            seeds=self.work.seeds,
            per_example=self.per_example,
            loss=self.loss,
            shortcuts=tuple(notes),
            settings=settings,
        )


def _one_by_one(work: Work, jobs: Sequence[tuple[Job, Any]]) -> Iterator[tuple[Job, Cell]]:
    for job, done in jobs:
        for cell in work(job, done):
            yield job, cell


@contextmanager
def _closing(stream: Iterator[tuple[Job, Cell]]) -> Iterator[Iterator[tuple[Job, Cell]]]:
    """Run the block with a generator, and end that with it."""
    try:
        yield stream
    finally:
        stream.close()  # type: ignore[attr-defined]  # a generator


# --- what was asked for -----------------------------------------------------------------------------------


def _check_ranks(ranks: Sequence[Any], kind: type[Intervention]) -> None:
    if not ranks or len(set(ranks)) < len(ranks):
        raise ConfigError(f"ranks={list(ranks)!r}: give at least one, and each once.")
    has_rank = "low_rank_dimension" in inspect.signature(kind.__init__).parameters
    for rank in ranks:
        number = isinstance(rank, int) and not isinstance(rank, bool)
        if (
            rank == "full"
            or random_size(rank)
            or (rank is None and not has_rank)
            or (number and rank >= 1 and has_rank)
        ):
            continue
        if has_rank or not (rank is None or number):
            raise ConfigError(
                f"{rank!r} is no rank. Give a number of directions from 1 on, 'full' for all at once, or 'random 8'"
                " for 8 random ones."
            )
        raise ConfigError(
            f"{kind.__name__} has no rank to choose, and {rank!r} is given. Give ranks=None, or 'full'."
        )


def _layers(model: nn.Module, component: str, layers: Any) -> list[int | None]:
    """The layers of a component; a single None if it is in none."""
    name = ALIASES.get(component, component)
    if is_module_path(name) or (name in COMPONENTS and COMPONENTS[name].scope == "model"):
        if layers is not None:
            raise ConfigError(
                f"layers={layers!r} makes no sense for {component!r}, which is outside the layers."
            )
        return [None]
    RepresentationConfig(0, name)  # raises for a name that there is not
    places = Places(model)
    return list(layers_of(places.layers_with(name) if layers is None else layers, places.layers_of(name)))


def _check_buildable(work: Work) -> None:
    """That every layer and rank has an intervention, before any of them is trained."""
    for layer in work.layers:
        for place in work.places:
            study = replace(work.study, layer=layer, place=place)
            for rank in work.ranks:
                size = random_size(rank)
                if rank == "full":
                    study.bound(VanillaIntervention)
                elif size is not None:
                    study.bound(LowRankRotatedSpaceIntervention, work.seeds[0], size)
                else:
                    study.bound(work.kind, work.seeds[0], rank if isinstance(rank, int) else None)


def _settings(work: Work, component: str, confidence: float) -> dict[str, Any]:
    """What is told of a sweep, as JSON has it."""
    return {
        "component": component,
        "intervention": work.kind.__name__,
        "metric": metric_name(work.study.options),
        "confidence": confidence,
        "model": type(work.study.model).__name__,
        "restarts": work.study.restarts,
        "trained_on": len(next(iter(work.study.dataset.values()))),
        "training": {name: told(value) for name, value in work.study.options.items()},
        "version": __version__,
    }


def told(value: Any) -> Any:
    """An option as JSON has it: functions and classes by their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [told(item) for item in value]
    name = getattr(value, "__qualname__", None)
    # An object of a class of its own has an address in its representation, which is another in each process.
    return f"{value.__module__}.{name}" if name else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _fingerprint(work: Work, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the numbers depend on: two sweeps of the same description give the same values."""
    about = {name: value for name, value in settings.items() if name not in ("version", "confidence")}
    places = [(place.label, told_place(place), place.columns, place.units) for place in work.places]
    return about | {
        "layers": list(work.layers),
        "positions": [list(place) for place in places],
        "ranks": list(work.ranks),
        "seeds": list(work.seeds),
        "weights": digest_of_weights(work.study.model),
        "dataset": digest_of_columns(work.study.dataset),
        "evaluation": digest_of_columns(work.study.evaluation),
    }


def told_place(place: Place) -> str:
    """Where a place is, in words that are the same every time."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(place.unit_locations))
