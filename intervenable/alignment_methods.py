"""The methods that a comparison holds against each other: how each finds an alignment at one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from intervenable.alignment_features import FeatureMaskIntervention, active_part
from intervenable.alignment_study import Study
from intervenable.model import IntervenableModel
from intervenable.training_data import read_examples
from intervenable.training_engine import device_of
from intervenable.training_loop import prepared
from intervenable.training_measures import Measure, read_loss
from intervenable.training_schedules import BOUNDLESS, OPTIMIZERS
from interventions import (
    BoundlessRotatedSpaceIntervention,
    CollectIntervention,
    Intervention,
    LowRankRotatedSpaceIntervention,
    PCARotatedSpaceIntervention,
    SigmoidMaskIntervention,
    VanillaIntervention,
)
from interventions.autoencoders import LatentIntervention
from interventions.subspaces import Subspaces

SHARES_FASTER = 10
"""How many times the learning rate of a rotation masks and boundaries have, as in pyvene's boundless tutorials."""
FASTEST_BOUNDARY = 0.01
"""The highest learning rate of a boundary, which is there too; it is a share, and 1 is everything."""
HARD = 1e-3
"""A temperature at which shares that are far from a half are 0 or 1."""
AT_ONCE = 64
"""Examples in a run that collects activations."""


@dataclass(frozen=True)
class Found:
    """What a method found with one seed."""

    per_example: Tensor
    """`[examples]` what the metric gave for each example that is measured."""

    size: int
    """How many coordinates are swapped."""

    loss: float
    """The loss of the answers on the training data; NaN where nothing was trained."""

    shortcuts: tuple[str, ...] = ()
    """What could be left out of the computation."""


@dataclass(frozen=True)
class Given:
    """What methods need beside a study."""

    rank: int
    """Directions of PCA and DAS."""

    sparsity: float
    """What swapping everything adds to the loss, where a method learns how much to swap."""

    sae: LatentIntervention | None = None
    """The autoencoder whose features are chosen among."""


@dataclass(frozen=True)
class Method:
    """One method."""

    find: Callable[[Study, int, Given], Found]
    """Finds an alignment with a seed."""

    learns: bool
    """Whether it sees the labels, so that shuffling them means something."""

    draws: bool
    """Whether the seed changes anything."""

    chooses: bool = True
    """Whether it chooses a subspace, so that a random one can be held against it."""


def full(study: Study, seed: int, given: Given) -> Found:
    """Swap the whole vector."""
    return Found(study.measured(study.bound(VanillaIntervention)), width_of(study), float("nan"))


def pca(study: Study, seed: int, given: Given) -> Found:
    """Swap the largest principal components of the activations of the training data, bases and sources alike."""
    swap = PCARotatedSpaceIntervention.fit(activations(study), given.rank)
    return Found(study.measured(study.bound(swap)), given.rank, float("nan"))


def das(study: Study, seed: int, given: Given) -> Found:
    """Learn a subspace of a given rank: distributed alignment search."""
    trained = study.trained(lambda own: study.bound(LowRankRotatedSpaceIntervention, own, given.rank), seed)
    return Found(study.measured(trained.model), given.rank, trained.loss, trained.shortcuts)


def boundless(study: Study, seed: int, given: Given) -> Found:
    """Learn a rotation, and how many of its directions to swap."""
    return _sized(study, seed, given, lambda own: study.bound(BoundlessRotatedSpaceIntervention, own))


def dbm(study: Study, seed: int, given: Given) -> Found:
    """Learn which dimensions to swap, as they are: differential binary masking.

    De Cao et al. (2020), "How Do Decisions Emerge across Layers in Neural Models? Interpretation with Differentiable
    Masking", https://arxiv.org/abs/2004.14992.
    """
    width = width_of(study)
    return _sized(
        study, seed, given, lambda own: study.bound(SigmoidMaskIntervention(width, sees="concatenated"), own)
    )


def sae(study: Study, seed: int, given: Given) -> Found:
    """Learn which features of an autoencoder to swap, among those that differ between examples."""
    assert given.sae is not None
    rows = activations(study)
    features = active_part(given.sae, rows.reshape(-1, rows.shape[-1] // study.place.units))
    return _sized(study, seed, given, lambda own: study.bound(FeatureMaskIntervention(features), own))


METHODS: Mapping[str, Method] = {
    "full": Method(full, learns=False, draws=False, chooses=False),
    "pca": Method(pca, learns=False, draws=False),
    "dbm": Method(dbm, learns=True, draws=True),
    "boundless": Method(boundless, learns=True, draws=True),
    "das": Method(das, learns=True, draws=True),
    "sae": Method(sae, learns=True, draws=True),
}


def random_subspace(study: Study, size: int, seed: int) -> Found:
    """Swap a random subspace: what `das` of that rank begins with."""
    width = width_of(study)
    if size < 1:
        return Found(unpatched(study), 0, float("nan"))
    if size >= width:
        return Found(study.measured(study.bound(VanillaIntervention)), width, float("nan"))
    swap = study.bound(LowRankRotatedSpaceIntervention, seed, size)
    return Found(study.measured(swap), size, float("nan"))


def unpatched(study: Study) -> Tensor:
    """`[examples]` what the metric gives where nothing is swapped."""
    return study.measured(study.bound(_Nothing()))


class _Nothing(Intervention):
    """Leaves the base as it is."""

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        return base


# --- those that learn how much to swap --------------------------------------------------------------------


def _sized(study: Study, seed: int, given: Given, make: Callable[[int], IntervenableModel]) -> Found:
    """Train with a price on what is swapped, then swap each coordinate in full or not at all."""
    trained = study.trained(make, seed, lambda model: _options(study, model, given.sparsity))
    size = _hardened(_only(trained.model))
    return Found(study.measured(trained.model), size, trained.loss, trained.shortcuts)


def _options(study: Study, model: IntervenableModel, sparsity: float) -> dict[str, Any]:
    """Options of a training in which shares learn too, and cost something."""
    intervention = _only(model)
    answers: Measure = read_loss(study.options.get("loss", "cross_entropy"))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return answers(logits, labels) + sparsity * _share(intervention).to(logits.device)

    options: dict[str, Any] = {"loss": loss}
    fastest = float("inf")
    if isinstance(intervention, BoundlessRotatedSpaceIntervention):
        fastest = FASTEST_BOUNDARY
        width = intervention.rotation.weight.shape[0]
        # At 50, where narrow vectors would begin otherwise, all their coordinates have the same share.
        options["temperature"] = study.options.get("temperature") or (
            min(BOUNDLESS[0], width / 8),
            BOUNDLESS[1],
        )
    given = study.options.get("optimizer", "adam")
    kind = OPTIMIZERS.get(given, given) if isinstance(given, str) else given
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        lr, decay = study.options.get("lr", 1e-3), study.options.get("weight_decay", 0.0)

        def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
            shares = [each for each in parameters if each.dim() < 2]
            rest = [each for each in parameters if each.dim() >= 2]
            groups: list[dict[str, Any]] = (
                [{"params": rest, "weight_decay": decay}] if decay else [{"params": rest}]
            )
            groups.append({"params": shares, "lr": min(lr * SHARES_FASTER, fastest)})
            return kind([group for group in groups if group["params"]], lr=lr)  # type: ignore[call-arg]

        options["optimizer"] = optimizer
    return options


def _share(intervention: Intervention) -> Tensor:
    """The share of the coordinates that is swapped, from 0 to 1."""
    if isinstance(intervention, BoundlessRotatedSpaceIntervention):
        return intervention.intervention_boundaries.sum()  # not clamped, so that it comes back from beyond 1
    return intervention.mask_weights().mean()  # type: ignore[operator, no-any-return]  # a mask


@torch.no_grad()
def _hardened(intervention: Intervention) -> int:
    """Make each share 0 or 1, whichever it is nearer to, and return how many are 1."""
    weights = intervention.mask_weights()  # type: ignore[operator]  # all that come here have shares
    size = int((weights > 0.5).sum())
    if isinstance(intervention, BoundlessRotatedSpaceIntervention):
        size = min(max(size, round(1e-3 * len(weights))), len(weights))
        intervention.intervention_boundaries.fill_(size / len(weights))
    else:
        mask: Tensor = intervention.mask  # type: ignore[assignment]
        mask.copy_(torch.where(weights > 0.5, 1.0, -1.0))
    intervention.set_temperature(HARD)  # type: ignore[operator]
    return size


def _only(model: IntervenableModel) -> Intervention:
    return next(iter(model.interventions.values()))


# --- activations ------------------------------------------------------------------------------------------


def width_of(study: Study) -> int:
    """How wide the activation is, all positions of an example together."""
    width = study.bound(VanillaIntervention)._bound[0].site.width
    return int(activations(study).shape[-1]) if width is None else width * study.place.units


def activations(study: Study) -> Tensor:
    """`[2 * examples, width]` activations of the training data at the place: of the bases, then of the sources."""
    swap = study.bound(VanillaIntervention)
    reading = study.bound(CollectIntervention)
    rows, unit_locations = study.place.of(study.dataset)
    examples = read_examples(rows, swap, unit_locations=unit_locations)
    found: list[list[Tensor]] = [[], []]
    with torch.no_grad(), prepared(reading, training=False):
        for start in range(0, len(examples), AT_ONCE):
            batch = examples.batch(range(start, min(start + AT_ONCE, len(examples)))).to(device_of(reading))
            sides = _sides(batch.unit_locations)
            inputs = (batch.base, batch.sources[0] if batch.sources else batch.base)
            for index, (one, where) in enumerate(zip(inputs, sides, strict=True)):
                collected = reading(one, None, where).collected
                values = next(iter(collected.values())).float().cpu()
                found[index].append(values.reshape(len(batch.rows), -1))
    return torch.cat([*found[0], *found[1]])


def _sides(unit_locations: Any) -> tuple[Any, Any]:
    """The locations of the base, and those of the source, each for a run of its own."""
    if unit_locations is None:
        return None, None
    ((_, value),) = unit_locations.items()
    source, base = value if isinstance(value, tuple) else (value, value)
    return {"base": base}, {"base": source}
