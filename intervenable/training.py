"""Training of alignments: interventions that learn from counterfactuals, and how good they are.

`train` lets the interventions of an `IntervenableModel` learn, `evaluate` measures them on examples.
`sweep_alignments` trains one for each layer, position and rank; `compare_methods` puts the ways to find one beside
each other, each with its controls.
"""

from __future__ import annotations

from intervenable.alignment_comparison import compare_methods
from intervenable.alignment_comparison_result import MethodComparison
from intervenable.alignment_statistics import bootstrap_difference, bootstrap_interval
from intervenable.alignment_sweep import sweep_alignments
from intervenable.alignment_sweep_result import AlignmentSweep
from intervenable.training_data import Batch, Examples, read_examples
from intervenable.training_evaluation import Evaluation, evaluate
from intervenable.training_loop import train
from intervenable.training_measures import cross_entropy, iia, margin, probability
from intervenable.training_result import TrainingResult
from intervenable.training_settings import EarlyStopping
from intervenable.training_trainer import Collator, compute_loss, compute_metrics

__all__ = [
    "AlignmentSweep",
    "Batch",
    "Collator",
    "EarlyStopping",
    "Evaluation",
    "Examples",
    "MethodComparison",
    "TrainingResult",
    "bootstrap_difference",
    "bootstrap_interval",
    "compare_methods",
    "compute_loss",
    "compute_metrics",
    "cross_entropy",
    "evaluate",
    "iia",
    "margin",
    "probability",
    "read_examples",
    "sweep_alignments",
    "train",
]
