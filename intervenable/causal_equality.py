"""Hierarchical equality: are two pairs alike in whether their members are equal?"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import VectorTask
from intervenable.causal_values import Setting
from intervenable.errors import InputError
from intervenable.toy_models import MLPClassifier

SYMBOLS = 20
"""How many different things there are where each example has vectors of its own."""

MARGIN = 0.25
"""Different vectors differ by at least this much, all coordinates together."""

SHIFT = 8.0
"""What is added to every neuron of a distributed code, so that none is ever cut off at zero."""


@dataclass(frozen=True)
class EqualityTask(VectorTask):
    """Hierarchical equality with its vectors; see `hierarchical_equality`."""

    width: int = 4
    """Coordinates of a vector."""

    entities: int | None = None
    """How many vectors there are in all; None if each example has new ones."""

    def encoding(self, seed: int = 0) -> Callable[[Setting], list[float]]:
        """How inputs are written: the four vectors one after the other."""
        if self.entities is not None:
            table = _vectors(random.Random("hierarchical equality"), self.entities, self.width)
            return lambda setting: [number for name in "WXYZ" for number in table[setting[name]]]
        rng = random.Random(f"vectors/{seed}")

        def fresh(setting: Setting) -> list[float]:
            things = list(dict.fromkeys(setting[name] for name in "WXYZ"))
            table = dict(zip(things, _vectors(rng, len(things), self.width), strict=True))
            return [number for name in "WXYZ" for number in table[setting[name]]]

        return fresh

    def solved_by_hand(self, *, distributed: bool = False, seed: int = 0) -> EqualityNetwork:
        """A network that solves the task exactly, with weights made by hand, and where its variables are.

        It takes the absolute differences of both pairs, adds them up to one neuron a pair that is 1 where the
        members are equal and 0 elsewhere, and compares these.

        Args:
            distributed: Spread the two neurons over all of them, by an orthogonal matrix, and read them back
                above: the variables are one direction each that no single neuron is.
            seed: Of that matrix.

        Example:
            >>> task = hierarchical_equality()
            >>> network = task.solved_by_hand()
            >>> data = task.factual(50).with_format("torch")
            >>> bool((network.model(data["input_ids"][:]).argmax(-1) == data["labels"][:]).all())
            True
            >>> network.layer, network.neurons
            (1, {'WX': (0,), 'YZ': (1,)})
        """
        return _solved(self.width, distributed, seed)


@dataclass(frozen=True)
class EqualityNetwork:
    """A network whose insides are known."""

    model: MLPClassifier
    """Takes `[batch, 4 * width]`, gives the logits of different and alike."""

    layer: int
    """Whose `block_output` holds both variables."""

    neurons: Mapping[str, tuple[int, ...]]
    """For each variable the neurons of that layer that hold it; none where it is spread."""

    directions: Mapping[str, Tensor]
    """For each variable the unit vector `[4 * width]` along which that layer holds it."""


def hierarchical_equality(width: int = 4, entities: int | None = None) -> EqualityTask:
    """Two pairs of vectors: is it the same in both whether their members are equal?

    `O = (WX == YZ)`, where `WX = (W == X)` and `YZ = (Y == Z)`. A network is given the four vectors one after
    the other and answers 1 if so. Each value of each variable occurs equally often.

    Geiger et al. (2023), "Relational Reasoning and Generalization Using Nonsymbolic Neural Networks",
    https://arxiv.org/abs/2006.07968; the alignment is that of Geiger et al. (2024), "Finding Alignments Between
    Interpretable Causal Variables and Distributed Neural Representations", https://arxiv.org/abs/2303.02536.

    Args:
        width: Coordinates of a vector; they lie between -1 and 1.
        entities: How many vectors there are in all. None: each example has new ones, so that nothing can be
            learned by heart.

    Raises:
        InputError: a width below 1, or fewer than two entities.

    Example:
        >>> task = hierarchical_equality()
        >>> task.model.run({"W": 3, "X": 3, "Y": 1, "Z": 2})["O"]
        False
        >>> data = task.counterfactual(10, "WX")
        >>> len(data[0]["input_ids"]), sorted(data["labels"])
        (16, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    if width < 1:
        raise InputError(f"width={width}: a vector has 1 coordinate or more.")
    if entities is not None and entities < 2:
        raise InputError(f"entities={entities}: there are at least 2, or None for new ones in each example.")
    if entities is not None:
        _vectors(random.Random(0), entities, width)  # there is room for them
    symbols = range(SYMBOLS if entities is None else entities)
    truth = [False, True]
    model = CausalModel(
        ["W", "X", "Y", "Z", "WX", "YZ", "O"],
        {**dict.fromkeys("WXYZ", symbols), "WX": truth, "YZ": truth, "O": truth},
        {"WX": ["W", "X"], "YZ": ["Y", "Z"], "O": ["WX", "YZ"]},
        dict.fromkeys(("WX", "YZ", "O"), lambda left, right: left == right),
    )
    return EqualityTask(model, width=width, entities=entities)


def _vectors(rng: random.Random, count: int, width: int) -> list[list[float]]:
    """So many vectors, no two of them close together."""
    drawn: list[list[float]] = []
    for _ in range(1000 * count):
        vector = [rng.uniform(-1, 1) for _ in range(width)]
        distances = (sum(abs(a - b) for a, b in zip(vector, other, strict=True)) for other in drawn)
        if all(distance >= MARGIN for distance in distances):
            drawn.append(vector)
        if len(drawn) == count:
            return drawn
    raise InputError(
        f"There is no room for {count} vectors of {width} coordinates {MARGIN} apart. Give a larger width."
    )


def _solved(width: int, distributed: bool, seed: int) -> EqualityNetwork:
    size = 4 * width
    model = MLPClassifier(size, layers=4 if distributed else 3, classes=2)
    model.requires_grad_(False).train(False)
    for parameter in model.parameters():
        parameter.zero_()
    differences, pairs, *spread, compared = (
        module for module in model.layers.modules() if isinstance(module, nn.Linear)
    )

    one = torch.eye(width)
    pair = torch.cat([torch.cat([one, -one], 1), torch.cat([-one, one], 1)])
    differences.weight.copy_(torch.eye(2).kron(pair))  # (w - x)+, (x - w)+, (y - z)+, (z - y)+

    pairs.weight[0, : 2 * width] = -1 / MARGIN  # WX = (1 - |w - x| / margin)+
    pairs.weight[1, 2 * width :] = -1 / MARGIN
    pairs.bias[:2] = 1

    reading = torch.eye(size)[:2]  # the rows that read WX and YZ
    code = torch.eye(size)
    if distributed:
        code, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
        spread[0].weight.copy_(code)
        spread[0].bias.fill_(SHIFT)
        reading = code.T[:2]
    compared.weight[:2] = torch.stack([reading[0] - reading[1], reading[1] - reading[0]])
    if distributed:
        compared.bias[:2] = -SHIFT * compared.weight[:2].sum(1)

    model.score.weight[0, :2], model.score.weight[1, :2] = 1.0, -1.0  # |WX - YZ| is 0 or 1
    model.score.bias.copy_(torch.tensor([-0.5, 0.5]))
    return EqualityNetwork(
        model,
        layer=2 if distributed else 1,
        neurons={"WX": () if distributed else (0,), "YZ": () if distributed else (1,)},
        directions={"WX": code[:, 0].clone(), "YZ": code[:, 1].clone()},
    )
