"""`evaluate`: how good the interventions of a model are, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intervenable.alignment_statistics import bootstrap_interval
from intervenable.errors import ConfigError, MetricError
from intervenable.evaluation_mode import evaluating
from intervenable.model import IntervenableModel
from intervenable.training_data import read_examples
from intervenable.training_engine import Engine, Read, device_of
from intervenable.training_measures import Measure, read_metrics, values_of
from intervenable.training_processes import Processes
from intervenable.training_settings import whole_from_one
from intervenable.training_suffix import make_engine
from intervenable.wave_budget import bytes_of


@dataclass(frozen=True)
class Evaluation:
    """The mean of a metric over examples, and between which bounds it lies.

    Example:
        >>> f"{Evaluation('iia', 0.9312, 0.88, 0.97, torch.ones(60))}"
        '0.93 [0.88, 0.97] of 60'
    """

    metric: str
    """Its name."""

    value: float
    """The mean over the examples."""

    low: float
    """Lower bound of the confidence interval."""

    high: float
    """Upper bound of the confidence interval."""

    per_example: Tensor = field(repr=False)
    """`[N]` what each example gave."""

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.per_example)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] of {self.count}"


def evaluate(
    model: IntervenableModel,
    dataset: object,
    *,
    unit_locations: Any = None,
    subspaces: Any = None,
    metric: str | Measure = "iia",
    batch_size: int = 32,
    fast: bool = True,
    memory: int | str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure the interventions of a model on counterfactuals, with a bootstrap interval over the examples.

    Model and interventions are in evaluation mode meanwhile, and as before afterwards.

    Args:
        model: Whose interventions.
        dataset, unit_locations, subspaces, fast, memory: As in `train`.
        metric: A name, or a function of (logits, labels) that gives a value for each example.
        batch_size: How many examples go through the model at once.
        confidence: Of the interval.
        seed: Of the bootstrap.

    Raises:
        DatasetError: the data set lacks a column, or has labels that the model has no logits for.
        ConfigError, MetricError: a metric that there is not, or that gives no value for each example.

    Example:
        >>> import intervenable as iv
        >>> mlp = iv.MLPClassifier(width=2, layers=1, classes=2)
        >>> swap = iv.IntervenableModel([iv.RepresentationConfig(0, "block_output")], mlp)
        >>> inputs = torch.randn(20, 2)
        >>> answers = mlp(inputs).argmax(-1)
        >>> rows = {"input_ids": torch.randn(20, 2), "source_input_ids": inputs, "labels": answers}
        >>> print(evaluate(swap, rows))  # the whole layer is the source's, and so is the answer
        1.00 [0.84, 1.00] of 20
    """
    if not isinstance(model, IntervenableModel):
        raise ConfigError(
            f"model is a {type(model).__name__}. Give an IntervenableModel: IntervenableModel(config, model)."
        )
    if isinstance(metric, (Mapping, list, tuple)):
        raise ConfigError("evaluate measures one metric. Call it for each, or give train several.")
    if not whole_from_one(batch_size):
        raise ConfigError(f"batch_size={batch_size!r}: give a whole number from 1 on.")
    measures = read_metrics(metric)
    budget = None if memory is None else bytes_of(memory)
    examples = read_examples(dataset, model, unit_locations=unit_locations, subspaces=subspaces)
    processes = Processes(device_of(model))
    with torch.no_grad(), evaluating(model.model):
        engine = make_engine(model, examples, fast=fast, memory=budget)
        found = measured(model, engine, range(len(examples)), measures, batch_size, processes)
    ((name, values),) = found.items()
    low, high = bootstrap_interval(values, confidence, seed)
    return Evaluation(name, float(values.mean()), float(low), float(high), values)


def measured(
    model: IntervenableModel,
    engine: Engine,
    rows: Sequence[int],
    measures: Mapping[str, Measure],
    batch_size: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """What measures give for each of these rows, `[N]` by name.

    Raises:
        MetricError: a measure gives something else than numbers.
    """
    found = torch.zeros(len(measures), len(rows), dtype=torch.float64)
    own = processes.part(range(len(rows)))
    with torch.no_grad(), evaluating(model), evaluating(model.model):
        for start in range(0, len(own), batch_size):
            places = own[start : start + batch_size]
            read = engine.step([rows[place] for place in places])
            for index, (name, measure) in enumerate(measures.items()):
                found[index, places] = values_of(measure, read, name).double().cpu()
    processes.add([found])
    return dict(zip(measures, found.float(), strict=True))


def check_each(measure: Measure, read: Read, name: str) -> None:
    """That a measure gives a value for each example.

    Raises:
        MetricError: it gives one for all.
    """
    if values_of(measure, read, name).dim() == 0:
        raise MetricError(
            f"{name} gives one value for a batch. To be averaged it is to give one for each example."
        )
