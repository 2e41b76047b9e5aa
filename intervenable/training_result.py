"""What a training gives back: how it went, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from intervenable.drawing import Picture

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingResult:
    """How a training went. The trained weights are in the model that was trained."""

    history: tuple[Row, ...] = field(repr=False)
    """A row for each step (`kind` is `"step"`: `step`, `epoch`, `loss`, each metric on its batch, `lr`,
    `temperature`, `gradient_norm`), and one for each evaluation (`"evaluation"`: `step`, `epoch`, `loss`, each
    metric)."""

    final: Mapping[str, float]
    """The loss and each metric with the final weights: on the evaluation data, or on the training data if there are
    none."""

    loss: float
    """The mean loss on the training data in the epoch that the weights are from; what to choose among restarts by."""

    steps: int
    """How many steps were taken."""

    epochs: int
    """How many epochs were begun."""

    stopped_early: bool
    """Whether it ended because it no longer got better; the weights are the best ones then."""

    shortcuts: tuple[str, ...] = field(default=(), repr=False)
    """What was done faster than by plain calls of the model, and why not more."""

    def to_pandas(self) -> pd.DataFrame:
        """The history as a table; what a row does not have is nan.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from intervenable.errors import MissingExtraError

        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(f"Tables need pandas ({error}). Run: pip install pandas") from error
        return pd.DataFrame(list(self.history))

    def plot(self, *, title: str | None = None) -> Picture:
        """Draw loss and metrics over the steps: of the batches as they came, and of the evaluations.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from intervenable.training_plots import plot_history

        return plot_history(self.history, title)
