"""A small model to try interventions on without a transformer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class MLPConfig:
    """The sizes of an `MLPClassifier`, under the names that the configs of transformers give them."""

    hidden_size: int
    """Size of the input and of every hidden layer."""

    num_hidden_layers: int
    """Number of hidden layers."""

    num_labels: int
    """Number of classes."""


class MLPBlock(nn.Module):
    """One hidden layer: a linear map and a nonlinearity.

    Shape:
        hidden, result: `(..., width)`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden layer's activations."""
        result: Tensor = self.act(self.linear(hidden))
        return result


class MLPClassifier(nn.Module):
    """A multi-layer perceptron that classifies vectors: blocks of one width, and a linear head.

    Args:
        width: Size of the input and of every hidden layer.
        layers: Number of hidden layers.
        classes: Number of classes.

    Shape:
        inputs: `(batch, width)` or `(batch, positions, width)`.
        result: the same with `classes` as last axis.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import torch
        >>> MLPClassifier(width=4, layers=2, classes=3)(torch.ones(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        for name, size in (("width", width), ("layers", layers), ("classes", classes)):
            if size < 1:
                raise ValueError(f"{name}={size}: it must be 1 or more.")
        self.config = MLPConfig(hidden_size=width, num_hidden_layers=layers, num_labels=classes)
        self.layers = nn.ModuleList(MLPBlock(width) for _ in range(layers))
        self.score = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of each class."""
        hidden = inputs
        for layer in self.layers:
            hidden = layer(hidden)
        result: Tensor = self.score(hidden)
        return result
