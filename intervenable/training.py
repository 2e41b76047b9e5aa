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

__all__ = [
    "Batch",
    "EarlyStopping",
    "Evaluation",
    "Examples",
    "TrainingResult",
    "cross_entropy",
    "evaluate",
    "iia",
    "margin",
    "probability",
    "read_examples",
    "train",
]
