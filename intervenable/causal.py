"""Causal models: what a network is thought to compute, and data sets to find out whether it does.

`CausalModel` declares variables and how they follow from each other, runs, exchanges variables between runs,
and makes data sets of that. The tasks (`hierarchical_equality`, `capital_facts`, ...) are such models with
inputs that networks take; `tokenized` makes token ids of those in words.
"""

from __future__ import annotations

from intervenable.causal_arithmetic import ArithmeticTask, arithmetic_carry
from intervenable.causal_capitals import CapitalTask, capital_facts
from intervenable.causal_datasets import Counterfactual
from intervenable.causal_equality import EqualityNetwork, EqualityTask, hierarchical_equality
from intervenable.causal_indirect_objects import indirect_objects
from intervenable.causal_logic import boolean_logic
from intervenable.causal_model import CausalModel
from intervenable.causal_prices import price_tagging
from intervenable.causal_tasks import Task, TextTask, VectorTask
from intervenable.causal_texts import Written, filled
from intervenable.causal_tokens import tokenized

__all__ = [
    "ArithmeticTask",
    "CapitalTask",
    "CausalModel",
    "Counterfactual",
    "EqualityNetwork",
    "EqualityTask",
    "Task",
    "TextTask",
    "VectorTask",
    "Written",
    "arithmetic_carry",
    "boolean_logic",
    "capital_facts",
    "filled",
    "hierarchical_equality",
    "indirect_objects",
    "price_tagging",
    "tokenized",
]
