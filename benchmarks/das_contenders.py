"""The trainings that `benchmarks.das` compares: by hand, in this library, in pyvene; and what none can do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from transformers import DynamicCache, PreTrainedModel, get_linear_schedule_with_warmup

from benchmarks.das_task import BATCH, LEARNING_RATE, WARMUP, Pairs, Task
from benchmarks.overhead import TOKENS, hooked

Pause = Callable[[], None]
"""What a training calls after each step, so that the others can take theirs."""


@dataclass(frozen=True)
class Learned:
    """What came out of a training."""

    losses: Sequence[float]  # of each step
    basis: Tensor | None = None  # (width, swapped), orthonormal columns
    gradient: Tensor | None = None
    """`(width, directions)` of the first loss with respect to the basis, along the orthonormal matrices."""

    notes: Sequence[str] = ()


Training = Callable[[Pause], Learned]


# --- what all of them share ---


class Adam(torch.optim.Adam):
    """Adam that calls a function after each step, and looks at the gradients before the first."""

    def __init__(self, parameters: Any, pause: Pause, look: Callable[[], None] | None = None) -> None:
        super().__init__(parameters, lr=LEARNING_RATE)
        self.pause, self.look = pause, look

    def step(self, closure: Any = None) -> None:
        if self.look is not None:
            self.look()
            self.look = None
        super().step(closure)
        self.pause()


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises over a tenth of the steps and falls to zero over the others, as pyvene has it."""
    return get_linear_schedule_with_warmup(optimizer, WARMUP * steps, steps)


def along_orthonormal(basis: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient that moves orthonormal columns among the orthonormal ones: `G - B sym(B^T G)`.

    It is the same for every way to write an orthonormal matrix as a function of free numbers that is the identity
    at orthonormal ones, so also for the gradient with respect to the weight of a QR decomposition.

    Shape:
        basis, gradient, result: `(width, directions)`.
    """
    inner = basis.mT @ gradient
    return gradient - basis @ (inner + inner.mT) / 2


class GradientOfBasis:
    """Adds up what flows into each basis that torch's parametrization makes in the first step."""

    def __init__(self, module: nn.Module) -> None:
        self.total: Tensor | float = 0.0
        self._handle = module.parametrizations.weight.register_forward_hook(self._made)

    def _made(self, module: nn.Module, args: Any, basis: Tensor) -> None:
        if basis.requires_grad:
            basis.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self.total = self.total + gradient

    def end(self) -> None:
        self._handle.remove()


class Directions(nn.Module):
    """Columns that torch keeps orthonormal."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        parametrizations.orthogonal(self)
        begin_at(start, self)


def begin_at(start: Tensor, module: nn.Module) -> None:
    """Assign a basis, which torch completes by chance to one of the whole space."""
    torch.manual_seed(0)
    module.weight = start


def last_of(model: PreTrainedModel, block: nn.Module, ids: Tensor) -> Tensor:
    """What a block gives at the last token, from a whole forward pass."""
    kept: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output[:, -1])

    with hooked(block, read):
        model(ids)
    return kept[0]


def logits_with(
    model: PreTrainedModel, block: nn.Module, ids: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """The logits at the last token when what a block gives there is changed."""

    def write(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] = change(output[:, -1])
        return output

    with hooked(block, write):
        return model(ids).logits[:, -1]


def accuracy(task: Task, basis: Tensor) -> Tensor:
    """Whether the swap along a basis gives the answer, for each of the held-out pairs, computed by hand."""
    model = task.copy()
    block = model.model.layers[task.layer]
    found = []
    with torch.no_grad():
        for start in range(0, len(task.held_out), BATCH):
            pairs = task.held_out[start : start + BATCH]
            source = last_of(model, block, pairs.source)
            logits = logits_with(model, block, pairs.base, partial(swapped, source=source, basis=basis))
            found.append(logits.argmax(-1) == pairs.labels)
    return torch.cat(found)


def swapped(base: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    return base + (source - base) @ basis @ basis.mT


# --- by hand ---


def by_hand(task: Task, orthonormal: Callable[[Tensor], nn.Module] = Directions) -> Training:
    """The usual loop: source and base run from end to end, the rotation is one of torch's parametrizations."""
    model = task.copy()

    def train(pause: Pause) -> Learned:
        block = model.model.layers[task.layer]
        directions = orthonormal(task.start)
        gradient = GradientOfBasis(directions)
        optimizer = Adam(directions.parameters(), pause, gradient.end)
        schedule = schedule_of(optimizer, task.steps)
        losses = []
        for pairs in task.batches():
            with torch.no_grad():
                source = last_of(model, block, pairs.source)
            basis = directions.weight[:, : task.swapped]
            logits = logits_with(model, block, pairs.base, partial(swapped, source=source, basis=basis))
            loss = cross_entropy(logits, pairs.labels)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        learned = directions.weight.detach()[:, : task.swapped]
        return Learned(losses, learned, along_orthonormal(task.start, gradient.total))

    return train


# --- the libraries ---


def declared(library: Any, task: Task, model: PreTrainedModel) -> Any:
    """The same words in pyvene and here."""
    if task.whole:
        width = task.start.shape[0]
        parts = [[0, task.swapped], [task.swapped, width]]
        place = library.RepresentationConfig(task.layer, "block_output", "pos", 1, subspace_partition=parts)
        return library.IntervenableModel(
            library.IntervenableConfig([place], library.RotatedSpaceIntervention), model
        )
    place = library.RepresentationConfig(
        task.layer, "block_output", "pos", 1, low_rank_dimension=task.swapped
    )
    return library.IntervenableModel(
        library.IntervenableConfig([place], library.LowRankRotatedSpaceIntervention), model
    )


def intervenable(task: Task, fast: bool = True, memory: str | None = None) -> Training:
    import intervenable as iv

    wrapped = task.copy()

    def train(pause: Pause) -> Learned:
        model = declared(iv, task, wrapped)
        rotation = model.interventions[model.names[0]].rotation
        rotation.weight.data.copy_(task.start)
        gradients: list[Tensor] = []
        look = partial(_look, rotation.weight, gradients)
        result = iv.training.train(
            model,
            {
                "input_ids": task.pairs.base,
                "source_input_ids": task.pairs.source,
                "labels": task.pairs.labels,
            },
            unit_locations={"sources->base": TOKENS - 1},
            subspaces=0 if task.whole else None,
            optimizer=lambda parameters: Adam(parameters, pause, look),
            schedule=schedule_of,
            epochs=task.epochs,
            max_steps=task.steps,
            batch_size=BATCH,
            fast=fast,
            memory=memory,
            seed=task.seed,
            progress=False,
        )
        losses = [row["loss"] for row in result.history if row["kind"] == "step"]
        with torch.no_grad():
            learned = rotation()[:, : task.swapped]
        gradient = along_orthonormal(task.start, gradients[0])
        return Learned(losses, learned, gradient, result.shortcuts)

    return train


def _look(weight: nn.Parameter, gradients: list[Tensor]) -> None:
    assert weight.grad is not None
    gradients.append(weight.grad.clone())


def pyvene(task: Task) -> Training:
    """Its own loop, `train_alignment`, with the loss and the accuracy of its tutorials."""
    import pyvene as pv
    from pyvene.models import intervenable_base
    from tqdm import trange

    wrapped = task.copy()

    def train(pause: Pause) -> Learned:
        model = declared(pv, task, wrapped)
        model.disable_model_gradients()
        (intervention,) = model.interventions.values()
        begin_at(task.start, intervention.rotate_layer)
        gradient = GradientOfBasis(intervention.rotate_layer)
        optimizer = Adam(model.get_trainable_parameters(), pause, gradient.end)
        losses: list[float] = []

        def compute_loss(logits: Tensor, labels: Tensor) -> Tensor:
            loss = cross_entropy(logits[:, -1], labels)
            losses.append(loss.item())
            return loss

        def compute_metrics(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, float]:
            right = (logits[0][:, -1].argmax(-1) == labels[0]).float()
            return {"accuracy": right.mean().item()}

        def collate(pairs: Pairs) -> dict[str, Any]:
            last = [[TOKENS - 1]] * len(pairs)
            batch = {"input_ids": pairs.base, "source_input_ids": pairs.source, "labels": pairs.labels}
            batch |= {"source_0->base.0.pos": last, "source_0->base.1.pos": last}
            return batch | ({"subspaces": [[[0]] * len(pairs)]} if task.whole else {})

        silent = partial(trange, disable=True)  # its progress bar cannot be turned off
        with patch.object(intervenable_base, "trange", silent):
            model.train_alignment(
                task.batches(),  # of all epochs, so that it is one for its loop
                compute_loss,
                compute_metrics,
                collate,
                epochs=1,
                optimizer=optimizer,
                scheduler=schedule_of(optimizer, task.steps),
            )
        learned = intervention.rotate_layer.weight.detach()[:, : task.swapped]
        return Learned(losses, learned, along_orthonormal(task.start, gradient.total))

    return train


# --- what none can do without ---


def suffix_alone(task: Task) -> Training:
    """The blocks above, on the last token alone, forward and backward, with all below them known beforehand.

    Nothing is learned, and no basis is made: the swap is that of the first basis, and its result is the leaf.
    """
    model = task.copy()

    def train(pause: Pause) -> Learned:
        block = model.model.layers[task.layer]
        above = model.model.layers[task.layer + 1 :]
        batches = task.batches()
        prepared = []
        with torch.no_grad():
            for pairs in batches[:2]:
                cache = model(pairs.base[:, :-1], use_cache=True).past_key_values
                known = [(layer.keys, layer.values) for layer in cache.layers]
                source, base = (last_of(model, block, ids) for ids in (pairs.source, pairs.base))
                prepared.append((known, swapped(base, source, task.start[:, : task.swapped]), pairs.labels))
            place = torch.tensor([[TOKENS - 1]])
            turned = model.model.rotary_emb(prepared[0][1][:, None], position_ids=place)
        losses = []
        for step in range(len(batches)):
            known, value, labels = prepared[step % len(prepared)]
            cache = DynamicCache()
            for number in range(task.layer + 1, len(known)):
                cache.update(*known[number], number)
            leaf = value.clone().requires_grad_()
            hidden = leaf[:, None]
            for layer in above:
                hidden = layer(hidden, position_embeddings=turned, past_key_values=cache, use_cache=True)
            logits = model.lm_head(model.model.norm(hidden))[:, -1]
            loss = cross_entropy(logits, labels)
            losses.append(loss.item())
            loss.backward()
            pause()
        return Learned(losses)

    return train


# --- who takes part ---


@dataclass(frozen=True)
class Contender:
    """A way to train an alignment."""

    label: str
    package: str | None  # what has to be importable
    prepare: Callable[[Task], Training]
    learns: bool = True


HAND, OURS, PYVENE, LIMIT = "hooks by hand", "intervenable", "pyvene", "suffix alone"
CONTENDERS: Sequence[Contender] = (
    Contender(HAND, None, by_hand),
    Contender(OURS, "intervenable", intervenable),
    Contender(PYVENE, "pyvene", pyvene),
    Contender(LIMIT, None, suffix_alone, learns=False),
)
