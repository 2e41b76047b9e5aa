"""What `transformers.Trainer` needs to train the interventions of an `IntervenableModel`: a collator and a loss.

model.disable_model_gradients()
trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(folder, remove_unused_columns=False, ...),
    train_dataset=dataset,
    data_collator=iv.training.Collator(model),
    compute_loss_func=iv.training.compute_loss,
    compute_metrics=iv.training.compute_metrics,
)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from intervenable.errors import DatasetError, InputError
from intervenable.model import IntervenableModel
from intervenable.output import IntervenableOutput
from intervenable.signatures import takes
from intervenable.training_data import IGNORED, Batch, read_examples
from intervenable.training_engine import last_positions, logits_in, predicts_next


class Collator:
    """Makes batches for an `IntervenableModel` of the rows of a data set.

    A batch has the arguments of a call, and `labels` that say what the logits at the same place predict:
    `[b, length]` with -100 where nothing is asked, or `[b]` for what reads no tokens.

    Args:
        model: What the batches go to.
        unit_locations, subspaces: As in a call, the same for all examples; None: as the columns say.

    Raises:
        DatasetError: when called on rows without the columns that `train` needs too.

    Example:
        >>> import intervenable as iv
        >>> mlp = iv.MLPClassifier(width=2, layers=1, classes=2)
        >>> model = iv.IntervenableModel([iv.RepresentationConfig(0, "block_output")], mlp)
        >>> row = {"input_ids": [0.0, 1.0], "source_input_ids": [1.0, 0.0], "labels": 1}
        >>> sorted(Collator(model)([row, row]))
        ['base', 'labels', 'sources', 'subspaces', 'unit_locations']
    """

    def __init__(
        self, model: IntervenableModel, *, unit_locations: Any = None, subspaces: Any = None
    ) -> None:
        self.model = model
        self.unit_locations = unit_locations
        self.subspaces = subspaces

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows."""
        try:
            examples = read_examples(
                list(rows),
                self.model,
                unit_locations=self.unit_locations,
                subspaces=self.subspaces,
                name="the batch",
            )
        except DatasetError as error:
            if any("input_ids" in row for row in rows):
                raise
            raise DatasetError(
                f"{error} A Trainer removes what the model does not take by name, unless it is told not to:"
                " TrainingArguments(remove_unused_columns=False)."
            ) from error
        batch = examples.batch(range(len(examples)))
        found = {
            "base": batch.base,
            "sources": batch.sources,
            "unit_locations": batch.unit_locations,
            "subspaces": batch.subspaces,
            "labels": self._aligned(batch),
        }
        if takes(self.model.model, "use_cache"):
            found["use_cache"] = False
        return found

    def _aligned(self, batch: Batch) -> Tensor:
        labels, tokens = batch.labels, batch.base.get("input_ids", batch.base.get("inputs_embeds"))
        if labels.dim() == 2:
            if not predicts_next(self.model.model):
                return labels
            return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
        if tokens is None:
            return labels
        spread = labels.new_full(tokens.shape[:2], IGNORED)
        spread[torch.arange(len(labels)), last_positions(tokens, batch.base)] = labels
        return spread


def compute_loss(
    outputs: IntervenableOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The cross-entropy of the labels that a `Collator` makes: their sum over the number of items, or their mean.

    Shape:
        logits: `(b, V)` or `(b, length, V)`; labels: `(b,)` or `(b, length)`.

    Raises:
        InputError: no labels, or of another length than the logits.
    """
    if labels is None:
        raise InputError(
            "There are no labels. Give the Trainer iv.training.Collator(model) as data_collator."
        )
    logits = logits_in(outputs.intervened, type(outputs.intervened))
    if labels.dim() == 2 and logits.dim() == 2:
        labels = labels.amax(1)  # of a classifier: the one that is no -100
    elif labels.dim() == 1 and logits.dim() == 3:
        logits = logits[:, -1]
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"The labels have shape {tuple(labels.shape)}, and the logits {tuple(logits.shape)}. Give the Trainer"
            " iv.training.Collator(model) as data_collator."
        )
    asked = labels != IGNORED
    sums = functional.cross_entropy(logits[asked].float(), labels[asked].to(logits.device), reduction="sum")
    return sums / (asked.sum() if num_items_in_batch is None else num_items_in_batch)


def compute_metrics(predictions: Any) -> dict[str, float]:
    """The IIA of what a `Trainer` predicted with batches of a `Collator`: the share of right examples."""
    logits = predictions.predictions
    if isinstance(logits, Mapping):
        logits = logits["logits"] if "logits" in logits else next(iter(logits.values()))
    answers, labels = np.asarray(logits).argmax(-1), np.asarray(predictions.label_ids)
    if labels.ndim > answers.ndim:
        labels = labels.max(-1)
    right = (answers == labels) | (labels == IGNORED)
    return {"iia": float(right.reshape(len(right), -1).all(1).mean())}
