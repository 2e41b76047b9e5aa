"""What every alignment of a sweep or a comparison is made from: a place, data to train on, data to measure on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from intervenable.alignment_places import Place, with_units
from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.errors import ConfigError
from intervenable.model import IntervenableModel
from intervenable.training_columns import Columns, read_columns
from intervenable.training_evaluation import evaluate
from intervenable.training_loop import order_of, train
from intervenable.training_measures import read_loss, read_metrics
from interventions import Intervention
from interventions.temperature import Tempered

OURS = (
    "model",
    "dataset",
    "evaluation",
    "unit_locations",
    "subspaces",
    "seed",
    "checkpoint",
    "checkpoint_every",
    "progress",
)
"""Arguments of `train` that are not passed through."""
MEASURING = ("metric", "batch_size", "fast", "memory")
"""Options of a training that are for a measurement too."""
ANSWER_LOSS = "answer loss"
"""The loss of the answers alone, without what a method adds to it."""
RESTART = 10_000
"""Restart `r` of seed `s` has the seed `s + 10000 r`."""


@dataclass(frozen=True)
class Trained:
    """An alignment that was trained."""

    model: IntervenableModel
    """The intervention in the model."""

    loss: float
    """The loss of the answers on the training data, at the end; NaN where nothing was trained."""

    shortcuts: tuple[str, ...] = ()
    """What could be left out of the computation."""


@dataclass(frozen=True)
class Study:
    """What alignments at one place are trained and measured with."""

    model: nn.Module
    component: str
    layer: int | None
    place: Place
    dataset: Columns = field(repr=False)
    evaluation: Columns = field(repr=False)
    tokenizer: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `train`."""

    restarts: int = 1
    """How many alignments are trained for each seed; the one of the lowest training loss is kept."""

    def located(self) -> Study:
        """The same with the place looked up in every example.

        Raises:
            LocationError, DatasetError: it is not there, or not everywhere of the same size.
        """
        data = {"dataset": self.dataset, "evaluation": self.evaluation}
        place = with_units(self.place, data, self.model, self.component, self.layer, self.tokenizer)
        return replace(self, place=place)

    def bound(
        self, make: type[Intervention] | Intervention, seed: int = 0, rank: int | None = None
    ) -> IntervenableModel:
        """The model with an intervention at the place; new ones begin as the seed says, whatever was made before."""
        fields: dict[str, Any] = {"max_number_of_units": self.place.units}
        if isinstance(make, Intervention):
            fields["intervention"] = make
        else:
            fields |= {"intervention_type": make, "low_rank_dimension": rank}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = IntervenableConfig(RepresentationConfig(self.layer, self.component, **fields))
            return IntervenableModel(config, self.model, self.tokenizer)

    def trained(
        self,
        make: Callable[[int], IntervenableModel],
        seed: int,
        options: Callable[[IntervenableModel], Mapping[str, Any]] | None = None,
    ) -> Trained:
        """Train what `make` gives for a seed; of several restarts the one of the lowest loss on the training data."""
        rows, unit_locations = self.place.of(self.dataset)
        best: tuple[float, Trained] | None = None
        for restart in range(self.restarts):
            own = seed + RESTART * restart
            model = make(own)
            given = {**self.options, **(options(model) if options else {})}
            if not any(isinstance(each, Tempered) for each in model.interventions.values()):
                given.pop("temperature", None)  # for others of a comparison
            metrics = {
                **read_metrics(given.get("metric", "iia")),
                ANSWER_LOSS: read_loss(self.options.get("loss", "cross_entropy")),
            }
            result = train(
                model,
                rows,
                unit_locations=unit_locations,
                seed=own,
                progress=False,
                **{**given, "metric": metrics},
            )
            found = Trained(model, result.final[ANSWER_LOSS], result.shortcuts)
            if best is None or result.final["loss"] < best[0]:
                best = result.final["loss"], found
        assert best is not None
        return best[1]

    def measured(self, model: IntervenableModel) -> Tensor:
        """`[examples]` what the metric gives for each example that is measured."""
        rows, unit_locations = self.place.of(self.evaluation)
        options = {name: self.options[name] for name in MEASURING if name in self.options}
        return evaluate(model, rows, unit_locations=unit_locations, **options).per_example


def make_study(
    model: nn.Module,
    dataset: object,
    evaluation: object,
    component: str,
    layer: int | None,
    place: Place,
    tokenizer: Any,
    options: Mapping[str, Any],
    restarts: int,
) -> Study:
    """A study from what a user gave, checked.

    Raises:
        ConfigError: a model that is bound already, an option that `train` has not, or one that cannot be shared.
        DatasetError: no data set.
    """
    if isinstance(model, IntervenableModel) or not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}. Give the model itself: each alignment gets its own intervention."
        )
    if restarts < 1:
        raise ConfigError(f"restarts={restarts!r}: give a whole number from 1 on.")
    _check_options(options)
    rows = read_columns(dataset, "dataset")
    if isinstance(evaluation, float):
        rows, held_out = split(rows, evaluation)
    else:
        held_out = read_columns(evaluation, "evaluation")
    return Study(model, component, layer, place, rows, held_out, tokenizer, dict(options), restarts)


def split(columns: Columns, share: float) -> tuple[Columns, Columns]:
    """Columns of the examples to train on, and of a share of them to put aside, drawn once for all.

    Raises:
        ConfigError: a share that leaves nothing on one side.
    """
    count = len(next(iter(columns.values())))
    aside = round(share * count)
    if not 0 < aside < count:
        raise ConfigError(
            f"evaluation={share!r}: give another data set, or a share of the {count} examples that leaves some on"
            " both sides."
        )
    order = order_of(count, 0, 0)
    return picked(columns, sorted(order[aside:])), picked(columns, sorted(order[:aside]))


def picked(columns: Columns, rows: Sequence[int]) -> Columns:
    """Some examples."""
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def read_seeds(seeds: Any) -> tuple[int, ...]:
    """Seeds from what a user gave.

    Raises:
        ConfigError: none, one twice, or something else.
    """
    found = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found)
    if not found or not whole or len(set(found)) < len(found):
        raise ConfigError(f"seeds={seeds!r}: give whole numbers from 0 on, each once, such as range(5).")
    return found


def metric_name(options: Mapping[str, Any]) -> str:
    """What is measured."""
    return next(iter(read_metrics(options.get("metric", "iia"))))


def _check_options(options: Mapping[str, Any]) -> None:
    allowed = [name for name in inspect.signature(train).parameters if name not in OURS]
    for name in options:
        if name in OURS:
            raise ConfigError(f"{name} is not an option here: each alignment is trained with its own.")
        if name not in allowed:
            near = get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Training has no option {name!r}.{hint}\nAllowed: {', '.join(allowed)}.")
    if isinstance(options.get("optimizer"), Optimizer):
        raise ConfigError(
            "optimizer is an object, which belongs to one set of parameters. Give its name, its class or a function"
            " of the parameters: each alignment gets its own."
        )
    if options.get("include_model"):
        raise ConfigError(
            "include_model trains the model itself, which all alignments share. Use train for that."
        )
    if isinstance(options.get("metric"), (Mapping, list, tuple)):
        raise ConfigError("An alignment has one figure. Give one metric, such as 'iia'.")
