"""`compare_methods`: several ways to find an alignment at one place, each with its controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from intervenable._version import __version__
from intervenable.alignment_comparison_result import CONTROLS, ControlResult, MethodComparison, MethodResult
from intervenable.alignment_controls import shuffled_sources, untrained_like
from intervenable.alignment_features import read_autoencoder
from intervenable.alignment_methods import METHODS, Found, Given, random_subspace, unpatched, width_of
from intervenable.alignment_places import BASE_COLUMN, SOURCE_COLUMN, Place
from intervenable.alignment_study import Study, make_study, metric_name, read_seeds
from intervenable.alignment_sweep import told
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.progress import Progress, Show
from intervenable.training_suffix import shared_records


def compare_methods(
    model: nn.Module,
    dataset: object,
    evaluation: object,
    *,
    component: str = "block_output",
    layer: int | None = None,
    unit_locations: Any = None,
    rank: int = 1,
    methods: Sequence[str] = ("full", "pca", "dbm", "boundless", "das"),
    sae: Any = None,
    controls: Sequence[str] = ("random", "shuffled", "untrained"),
    untrained_model: nn.Module | None = None,
    seeds: int | Sequence[int] = (0,),
    restarts: int = 1,
    sparsity: float = 0.1,
    tokenizer: Any = None,
    confidence: float = 0.95,
    progress: Show = None,
    **train_options: Any,
) -> MethodComparison:
    """Find an alignment at one place by several methods, and hold each against what it should be better than.

    Methods: `full` swaps the whole vector; `pca` the largest principal components; `dbm` learns which dimensions to
    swap; `boundless` a rotation and how many of its directions; `das` a subspace of `rank` directions; `sae` which
    features of an autoencoder. Where a method learns how much to swap, swapping everything costs `sparsity`, and in
    the end each coordinate is swapped in full or not at all.

    Controls: `random` swaps a random subspace of the size that the method has; `shuffled` is the method trained on
    data in which each base and its label have the source of another example; `untrained` is the method on a model
    with fresh weights. All are measured on the same examples, which were not trained on. A control that makes no
    sense for a method (random subspaces for the whole vector, shuffled labels where none are used) is left out.

    Args:
        model: The model itself; it stays as it is.
        dataset: What is trained on, as in `train`.
        evaluation: What is measured on: another data set, or a share of the first to put aside.
        component: Where in the layer.
        layer: Which layer; None for components outside the layers.
        unit_locations: Where, as in `train`; by default the columns `base_position` and `source_position`, or the
            last token without them.
        rank: Directions of `pca` and `das`.
        methods: Which methods, in the order of the table.
        sae: An autoencoder for the method `sae`, which is added if it is not among the methods: a module or mapping
            with `W_enc`, `b_enc`, `W_dec`, `b_dec` and perhaps `threshold`, or an intervention that is one.
        controls: Which controls.
        untrained_model: The model for `untrained`, the same for all seeds; by default one with fresh weights for each
            seed is made of the model's configuration.
        seeds: Seeds; all count in the means.
        restarts: How many alignments are trained for each seed, of which the one of the lowest loss on the training
            data is kept; restart `r` has the seed `seed + 10000 r`.
        sparsity: What swapping everything adds to the loss of `dbm`, `boundless` and `sae`.
        tokenizer: For positions that are words; and for padding.
        confidence: Of the intervals, which are over examples and seeds: see `bootstrap_interval`.
        progress: True for a bar, False for none, a function of (done, total); None for a bar if it takes long.
        **train_options: Options of `train`: `epochs`, `lr`, `batch_size`, `metric`, ... Masks and boundaries learn
            ten times as fast as rotations, unless `optimizer` is a function.

    Raises:
        ConfigError: something in the call cannot be; nothing was trained.
        DatasetError, LocationError: data that lack something, or a position that is not there in some example.

    Example:
        >>> import intervenable as iv
        >>> mlp = iv.MLPClassifier(width=4, layers=2, classes=2)
        >>> source = torch.randn(40, 4)
        >>> rows = {"input_ids": torch.randn(40, 4), "source_input_ids": source, "labels": mlp(source).argmax(-1)}
        >>> found = compare_methods(mlp, rows, rows, layer=0, rank=2, methods=("full", "das"), epochs=1)
        >>> found.names, found["full"].iia.value, sorted(found["das"].controls)
        (('full', 'das'), 1.0, ['random', 'shuffled', 'untrained'])
    """
    names = _names("method", methods, METHODS)
    wanted = _names("control", controls, CONTROLS, least=0)
    if sae is not None and "sae" not in names:
        names = (*names, "sae")
    if "sae" in names and sae is None:
        raise ConfigError("The method 'sae' needs an autoencoder: give sae=..., or leave the method out.")
    if not sparsity >= 0:
        raise ConfigError(f"sparsity={sparsity!r}: give a number from 0 on.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r}: give a number between 0 and 1, such as 0.95.")
    seeds = read_seeds(seeds)
    place = Place("the place", unit_locations)
    study = make_study(
        model, dataset, evaluation, component, layer, place, tokenizer, train_options, restarts
    )
    if unit_locations is None:
        columns = (
            (BASE_COLUMN, SOURCE_COLUMN) if SOURCE_COLUMN in study.dataset else (BASE_COLUMN, BASE_COLUMN)
        )
        by_columns = BASE_COLUMN in study.dataset
        place = (
            replace(place, columns=columns)
            if by_columns
            else replace(place, unit_locations={"sources->base": "last"})
        )
        study = replace(study, place=place)
    study = study.located()
    width = width_of(study)
    if not 1 <= rank <= width:
        raise ConfigError(
            f"rank={rank!r}: give a number of directions from 1 to {width}, the width of the activation."
        )
    given = Given(rank, float(sparsity), None if sae is None else read_autoencoder(sae))
    settings = {
        "component": component,
        "layer": layer,
        "rank": rank,
        "metric": metric_name(study.options),
        "confidence": confidence,
        "seeds": list(seeds),
        "restarts": restarts,
        "sparsity": float(sparsity),
        "model": type(model).__name__,
        "trained_on": len(next(iter(study.dataset.values()))),
        "training": {name: told(value) for name, value in study.options.items()},
        "version": __version__,
    }
    comparison = _Comparison(study, given, names, wanted, seeds, untrained_model, confidence)
    with shared_records(), Progress(comparison.total, progress, "methods", " alignments") as shown:
        return comparison.run(settings, shown.advance)


class _Comparison:
    """One comparison as it is made."""

    def __init__(
        self,
        study: Study,
        given: Given,
        names: Sequence[str],
        controls: Sequence[str],
        seeds: Sequence[int],
        untrained: nn.Module | None,
        confidence: float,
    ) -> None:
        self.study, self.given, self.names, self.seeds = study, given, names, seeds
        self.controls, self.untrained, self.confidence = controls, untrained, confidence
        self.found: dict[str, list[Found]] = {}
        self.seconds: dict[str, float] = {}
        self.held: dict[tuple[str, str], list[Found]] = {}
        if "untrained" in controls and untrained is None:
            untrained_like(study.model, seeds[0])  # that one can be made is known before anything is trained

    @property
    def total(self) -> int:
        """How many alignments there are to find."""
        own = sum(len(self._seeds(name)) for name in self.names)
        return own + sum(len(list(self._seeds_of(control, name))) for control, name in self._pairs())

    def run(self, settings: Mapping[str, Any], advance: Callable[[], object]) -> MethodComparison:
        """All methods, then their controls."""
        for name in self.names:
            start = perf_counter()
            self.found[name] = []
            for seed in self._seeds(name):
                self.found[name].append(METHODS[name].find(self.study, seed, self.given))
                advance()
            self.seconds[name] = perf_counter() - start
        for control in self.controls:
            for seed in self.seeds:
                self._hold(control, seed, advance)
        notes = dict.fromkeys(
            note
            for runs in (*self.found.values(), *self.held.values())
            for found in runs
            for note in found.shortcuts
        )
        return MethodComparison(
            tuple(self._result(name) for name in self.names),
            unpatched(self.study)[None],
            settings,
            tuple(notes),
        )

    def _hold(self, control: str, seed: int, advance: Callable[[], object]) -> None:
        """One control of all methods with one seed."""
        names = [
            name for each, name in self._pairs() if each == control and seed in self._seeds_of(control, name)
        ]
        if not names:
            return
        study = self.study
        if control == "shuffled":
            study = replace(study, dataset=shuffled_sources(study.dataset, seed))
        elif control == "untrained":
            model = untrained_like(study.model, seed) if self.untrained is None else self.untrained
            study = replace(study, model=model)
        for name in names:
            if control == "random":
                own = self.found[name][min(self.seeds.index(seed), len(self.found[name]) - 1)]
                held = random_subspace(study, own.size, seed)
            else:
                held = METHODS[name].find(study, seed, self.given)
            self.held.setdefault((name, control), []).append(held)
            advance()

    def _seeds(self, name: str) -> Sequence[int]:
        """The seeds that a method is run with."""
        return self.seeds if METHODS[name].draws else self.seeds[:1]

    def _seeds_of(self, control: str, name: str) -> Sequence[int]:
        """The seeds that a control of a method is run with."""
        fresh = control == "random" or (control == "untrained" and self.untrained is None)
        return self.seeds if fresh else self._seeds(name)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """The controls that make sense, with their methods."""
        for control in self.controls:
            for name in self.names:
                method = METHODS[name]
                if {"random": method.chooses, "shuffled": method.learns, "untrained": True}[control]:
                    yield control, name

    def _result(self, name: str) -> MethodResult:
        controls = {
            control: ControlResult(**_stacked(self.held[name, control]))
            for control in self.controls
            if (name, control) in self.held
        }
        return MethodResult(
            name=name,
            seconds=self.seconds[name],
            controls=controls,
            confidence=self.confidence,
            **_stacked(self.found[name]),
        )


def _stacked(found: Sequence[Found]) -> dict[str, Any]:
    return {
        "per_example": torch.stack([each.per_example for each in found]),
        "size": torch.tensor([each.size for each in found], dtype=torch.float64),
        "loss": torch.tensor([each.loss for each in found], dtype=torch.float64),
    }


def _names(kind: str, given: Any, table: Mapping[str, object], least: int = 1) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in table:
            raise UnknownNameError(unknown_name(kind, name, table))
    if len(names) < least or len(set(names)) < len(names):
        raise ConfigError(f"{kind}s={list(names)!r}: give {'at least one, and ' if least else ''}each once.")
    return names
