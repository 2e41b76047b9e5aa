"""Training of alignments: interventions that learn from counterfactuals, and how good they are.

`train` lets the interventions of an `IntervenableModel` learn, `evaluate` measures them on examples.
"""

from __future__ import annotations

from intervenable.training_data import Batch, Examples, read_examples
from intervenable.training_evaluation import Evaluation, evaluate
from intervenable.training_loop import train
from intervenable.training_measures import cross_entropy, iia, margin, probability
from intervenable.training_result import TrainingResult
from intervenable.training_settings import EarlyStopping
from intervenable.training_trainer import Collator, compute_loss, compute_metrics

__all__ = [
    "Batch",
    "Collator",
    "EarlyStopping",
    "Evaluation",
    "Examples",
    "TrainingResult",
    "compute_loss",
    "compute_metrics",
    "cross_entropy",
    "evaluate",
    "iia",
    "margin",
    "probability",
    "read_examples",
    "train",
]
