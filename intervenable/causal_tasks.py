"""What all ready-made tasks are: a causal model, how its inputs are written, and data sets of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intervenable.causal_datasets import (
    Columns,
    Counterfactual,
    counterfactual_columns,
    draw_counterfactuals,
    factual_columns,
    factual_settings,
    vector_dataset,
)
from intervenable.causal_model import CausalModel
from intervenable.causal_sampling import Sampler
from intervenable.causal_texts import Written, text_dataset
from intervenable.causal_values import Setting, as_numbers

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task(ABC):
    """A causal model with a way to write its inputs down, and data sets drawn from it."""

    model: CausalModel
    """What computes the answers."""

    variables: tuple[str, ...] = ()
    """Which variables counterfactuals are about where nothing else is said; all internal ones if empty."""

    sampler: Sampler = "balanced"
    """How inputs are drawn."""

    balance: bool = True
    """Whether counterfactuals have every pair of answers, without the intervention and with it, equally often where
    nothing else is said."""

    distinct: bool = False
    """Whether no counterfactual occurs twice."""

    shared: tuple[str, ...] = ()
    """Inputs that a source has from its base, such as the phrasing."""

    another: tuple[str, ...] = ()
    """Inputs in which a source differs from its base."""

    def factual(self, n: int, seed: int = 0) -> Dataset:
        """Inputs with their answers.

        Args:
            n: How many.
            seed: The same seed gives the same ones.

        Raises:
            InputError: `n` is not 1 or more.
        """
        settings = factual_settings(self.model, n, seed, self.sampler)
        return self._dataset(factual_columns(settings, self.encoding(seed), self._answer()))

    def counterfactual(
        self,
        n: int,
        variables: str | Sequence[str] | None = None,
        seed: int = 0,
        *,
        subsets: Sequence[Sequence[str]] | None = None,
        batch_size: int = 1,
        balance: bool | None = None,
        filter: Callable[[Counterfactual], bool] | None = None,
    ) -> Dataset:
        """Bases and sources with the answer to the base when variables are as in their sources.

        Args:
            n: How many.
            variables: Which variables, each with a source of its own.
            seed: The same seed gives the same ones.
            subsets: Which of the variables together, `[["WX"], ["YZ"]]` for one at a time; by default every
                combination.
            batch_size: So many consecutive examples are about the same variables.
            balance: Every pair of answers, without the intervention and with it, equally often, to within one; by
                default as the task says.
            filter: Keeps those for which it is true, such as `lambda it: it.result["O"] != it.base["O"]`.

        Raises:
            UnknownNameError: a name that is none of the variables.
            InputError: nothing that was drawn fits, or there are fewer.
        """
        drawn = draw_counterfactuals(
            self.model,
            n,
            (self.variables or None) if variables is None and subsets is None else variables,
            seed,
            subsets=subsets,
            batch_size=batch_size,
            balance=self.balance if balance is None else balance,
            distinct=self.distinct,
            sampler=self.sampler,
            shared=self.shared,
            another=self.another,
            filter=filter,
        )
        return self._dataset(counterfactual_columns(drawn, self.encoding(seed), self._answer()))

    @abstractmethod
    def encoding(self, seed: int = 0) -> Callable[[Setting], Any]:
        """How inputs are written down; what is drawn at random for that is drawn from the seed."""

    @abstractmethod
    def _answer(self) -> Callable[[Setting], Any]: ...

    @abstractmethod
    def _dataset(self, columns: Columns) -> Dataset: ...


@dataclass(frozen=True)
class VectorTask(Task):
    """A task whose inputs are vectors and whose answers are classes, for networks such as `MLPClassifier`."""

    def encoding(self, seed: int = 0) -> Callable[[Setting], list[float]]:
        """How inputs are written: one after the other."""
        return lambda setting: [number for name in self.model.inputs for number in as_numbers(setting[name])]

    def _answer(self) -> Callable[[Setting], int]:
        return self.model.label

    def _dataset(self, columns: Columns) -> Dataset:
        return vector_dataset(columns)


@dataclass(frozen=True)
class TextTask(Task):
    """A task whose inputs are prompts and whose answers are the words that follow; see `tokenized`."""

    write: Callable[[Setting], Written] = lambda setting: Written(str(dict(setting)))
    """The prompt."""

    answer: Callable[[Setting], str] = lambda setting: ""
    """What follows it, with its leading space."""

    def encoding(self, seed: int = 0) -> Callable[[Setting], Written]:
        """How inputs are written: as prompts."""
        return self.write

    def _answer(self) -> Callable[[Setting], str]:
        return self.answer

    def _dataset(self, columns: Columns) -> Dataset:
        return text_dataset(columns)
