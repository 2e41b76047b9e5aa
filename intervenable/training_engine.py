"""What gives the logits of some examples: an engine. The plain one calls the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from intervenable.errors import UnsupportedModelError
from intervenable.locations import lists_each_intervention
from intervenable.model import IntervenableModel
from intervenable.signatures import takes
from intervenable.training_data import IGNORED, Examples, Inputs, check_labels
from intervenable.unwrapping import config_of, unwrapped


@dataclass(frozen=True)
class Read:
    """The logits of some examples where their labels are asked for.

    `[b, V]` with labels `[b]`, or `[b, P, V]` with labels `[b, P]`: `logits[i, p]` predicts `labels[i, p]`, which is
    -100 where nothing is asked.
    """

    logits: Tensor
    labels: Tensor


class Engine(Protocol):
    """Gives the logits of examples of one data set, with all interventions applied."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that say which shortcuts are taken."""
        ...

    def step(self, rows: Sequence[int]) -> Read:
        """The logits and labels of these rows, with a graph if gradients are on."""
        ...


class PlainEngine:
    """Calls the model as it is.

    Example:
        >>> import intervenable as iv
        >>> from intervenable.training_data import read_examples
        >>> mlp = iv.MLPClassifier(width=2, layers=1, classes=3)
        >>> model = iv.IntervenableModel([iv.RepresentationConfig(0, "block_output")], mlp)
        >>> rows = {"input_ids": torch.zeros(4, 2), "source_input_ids": torch.ones(4, 2), "labels": [0, 1, 2, 0]}
        >>> PlainEngine(model, read_examples(rows, model)).step([2, 3]).logits.shape
        torch.Size([2, 3])
    """

    notes: tuple[str, ...] = ()

    def __init__(self, model: IntervenableModel, examples: Examples) -> None:
        self.model = model
        self.examples = examples
        self._checked = False

    def step(self, rows: Sequence[int]) -> Read:
        """The logits and labels of these rows."""
        left_out = self.examples.left_out
        if left_out is None:
            return self._read(rows, ())
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(tuple(left_out[row].nonzero().reshape(-1).tolist()), []).append(place)
        reads = [self._read([rows[place] for place in places], groups) for groups, places in alike.items()]
        order = torch.tensor([place for places in alike.values() for place in places]).argsort()
        return joined(reads, order)

    def _read(self, rows: Sequence[int], without: Sequence[int]) -> Read:
        """The logits of rows from whose run these groups of representations are left out."""
        wrapped = self.model.model
        batch = self.examples.batch(rows).to(device_of(self.model))
        options: dict[str, Any] = {"use_cache": False} if takes(wrapped, "use_cache") else {}
        sources, where = batch.sources, batch.unit_locations
        if without and sources is not None:
            sources = [None if group in without else source for group, source in enumerate(sources)]
            skipped = [entry.group in without for entry in self.model._bound]
            where = (
                None if where is None else {key: _skipping(value, skipped) for key, value in where.items()}
            )
        output = self.model(batch.base, sources, where, subspaces=batch.subspaces, **options).intervened
        logits = logits_in(output, wrapped)
        if not self._checked:
            check_labels(self.examples, logits.shape[-1])
            self._checked = True
        return read_at(logits, batch.labels, batch.base, wrapped)


def _skipping(value: Any, skipped: Sequence[bool]) -> Any:
    """Locations that skip some representations; short ones, for all of them, stay as they are."""
    if isinstance(value, tuple):
        return tuple(_skipping(side, skipped) for side in value)
    if not lists_each_intervention({"base": value}):
        return value
    return [None if skip else slot for slot, skip in zip(value, skipped, strict=True)]


def joined(reads: Sequence[Read], order: Tensor) -> Read:
    """Several reads as one, in another order of its rows."""
    if len(reads) == 1:
        return Read(reads[0].logits[order], reads[0].labels[order])
    if reads[0].labels.dim() == 2:
        most = max(read.labels.shape[1] for read in reads)
        reads = [
            Read(
                pad(read.logits, (0, 0, 0, most - read.labels.shape[1])),
                pad(read.labels, (0, most - read.labels.shape[1]), value=IGNORED),
            )
            for read in reads
        ]
    logits = torch.cat([read.logits for read in reads])
    labels = torch.cat([read.labels for read in reads])
    return Read(logits[order.to(logits.device)], labels[order.to(labels.device)])


def device_of(model: IntervenableModel) -> torch.device:
    """Where a model wants its inputs."""
    owners = (model.model.parameters(), model.model.buffers(), model.parameters())
    return next((tensor.device for tensors in owners for tensor in tensors), torch.device("cpu"))


def logits_in(output: Any, model: nn.Module | type) -> Tensor:
    """`[b, V]` or `[b, s, V]` a model's logits, or what it gives first if it has none.

    Raises:
        UnsupportedModelError: there is no such tensor.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, (Mapping, tuple, list)):
        items = output.values() if isinstance(output, Mapping) else output
        logits = next((item for item in items if isinstance(item, Tensor)), None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        name = (model if isinstance(model, type) else type(model)).__name__
        raise UnsupportedModelError(
            f"{name} gives no logits [batch, classes] or [batch, positions, vocabulary] to train on."
        )
    return logits


def read_at(logits: Tensor, labels: Tensor, base: Inputs, model: nn.Module) -> Read:
    """The logits where the labels are asked for: at the last real token, or before each token that has one.

    Shape:
        logits: `(b, V)` or `(b, s, V)`; labels: `(b,)` or `(b, s)`.
    """
    if labels.dim() == 1:
        if logits.dim() == 2:
            return Read(logits, labels)
        return Read(
            logits[torch.arange(len(labels), device=logits.device), last_positions(logits, base)], labels
        )
    labels = labels.to(logits.device)
    if logits.dim() == 2:
        logits = logits[:, None]
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = (labels != IGNORED).any(0).nonzero().reshape(-1)
    return Read(logits[:, asked], labels[:, asked])


def last_positions(logits: Tensor, base: Inputs) -> Tensor:
    """`[b]` the last real position of each example."""
    batch, length = logits.shape[:2]
    mask = base.get("decoder_attention_mask", base.get("attention_mask"))
    if mask is None or mask.shape != (batch, length):
        return torch.full((batch,), length - 1, device=logits.device)
    positions = torch.arange(length, device=mask.device)
    return torch.where(mask.bool(), positions, 0).amax(1).to(logits.device)


def predicts_next(model: nn.Module) -> bool:
    """Whether the logits at a token are about the one after it: so in causal language models."""
    config = config_of(model)
    generates = getattr(unwrapped(model).module, "can_generate", None)
    return bool(callable(generates) and generates() and not getattr(config, "is_encoder_decoder", False))
