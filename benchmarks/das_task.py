"""The alignments that `benchmarks.das` trains: a model, pairs of prompts, and a basis to begin with.

Prompts have 8 tokens, of which the last decides what comes next: "Now the old friend of my uncle depends" goes on
with " on", and "... consists" with " of". What is looked for at the last token of the middle layer is which of the
verbs it is, so that the answer after the base becomes that after the source. A model that knows no words gets
random tokens, as few different ones at the end, and its own answer after the source is the one to come to.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.overhead import TOKENS, smollm2, tiny_llama, with_own_modules
from intervenable.training_loop import order_of  # the others get the batches that ours makes of a seed
from scripts.fetch_smollm2 import smollm2_folder

MODELS = {"tiny-llama": tiny_llama, "smollm2": smollm2}
BATCH = 32
LEARNING_RATE = 1e-2
WARMUP = 0.1
"""The share of the steps over which the learning rate rises."""

DISTINCT, RECURRING = "all prompts distinct", "56 prompts"
DATA = (DISTINCT, RECURRING)
"""No prompt comes twice, neither as base nor as source; or all pairs are made of a few prompts, as in data sets
that are made by hand. What is kept of a prompt is of use once in an epoch in the one, and often in the other."""

FEW = 56
PAIRS = 256
HELD_OUT = 128
RANKS: Mapping[str, int | None] = {"rank 4": 4, "full rank": None}
"""How many directions are learned; None: a rotation of the whole space, of which the first half is swapped."""


@dataclass(frozen=True)
class Pairs:
    """Base and source prompts, and what the model should say after the base."""

    base: Tensor  # (pairs, TOKENS)
    source: Tensor  # (pairs, TOKENS)
    labels: Tensor  # (pairs,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int] | slice) -> Pairs:
        return Pairs(self.base[rows], self.source[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    """One alignment to train."""

    model: PreTrainedModel  # its weights do not require gradients
    data: str
    pairs: Pairs
    held_out: Pairs
    start: Tensor  # (width, directions), orthonormal columns
    swapped: int  # how many of the directions, from the first on
    steps: int
    taken: int | None = None
    """After how many of the steps the others stop; None for all."""

    seed: int = 0

    @property
    def layer(self) -> int:
        return int(self.model.config.num_hidden_layers) // 2

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pairs) // BATCH

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.steps_per_epoch)

    @property
    def whole(self) -> bool:
        """Whether the basis is of the whole space."""
        return self.start.shape[0] == self.start.shape[1]

    def batches(self) -> list[Pairs]:
        """The batches of the steps that the others take, in order."""
        orders = (order_of(len(self.pairs), self.seed, epoch) for epoch in range(self.epochs))
        rows = list(itertools.chain.from_iterable(orders))
        return [
            self.pairs[rows[step * BATCH : (step + 1) * BATCH]] for step in range(self.taken or self.steps)
        ]

    def copy(self) -> PreTrainedModel:
        """The model in modules of its own, over the same weight tensors."""
        return with_own_modules(self.model)


def task_on(
    name: str, model: PreTrainedModel, data: str, rank: str, *, pairs: int = PAIRS, steps: int, seed: int = 0
) -> Task:
    model.requires_grad_(False)
    train, held_out = (verb_pairs if name == "smollm2" else random_pairs)(model, data, pairs)
    width, directions = model.config.hidden_size, RANKS[rank]
    generator = torch.Generator().manual_seed(2 + seed)
    start = torch.linalg.qr(torch.randn(width, directions or width, generator=generator))[0]
    return Task(model, data, train, held_out, start, directions or width // 2, steps, seed)


# --- prompts ---

VERBS: Mapping[str, str] = {
    "wanted": " to",
    "lived": " in",
    "depends": " on",
    "consists": " of",
    "suffers": " from",
    "deals": " with",
    "waited": " for",
}
"""Verbs, and what comes after them."""

ADJECTIVES = ("old", "young", "tall", "kind", "happy", "clever", "quiet", "strange")
PEOPLE = ("friend", "teacher", "doctor", "neighbor", "partner", "student", "boss", "nurse")
RELATIVES = ("uncle", "mother", "father", "sister", "brother", "wife", "son", "daughter")
PROMPT = "Now the {} {} of my {} {}"


def verb_pairs(model: PreTrainedModel, data: str, pairs: int) -> tuple[Pairs, Pairs]:
    """Pairs to train on and pairs to test with, which share no prompt; base and source have different verbs."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    chance = random.Random(1)
    prompts = list(itertools.product(ADJECTIVES, PEOPLE, RELATIVES, VERBS))
    chance.shuffle(prompts)

    def of(chosen: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> Pairs:
        base, source = (
            torch.tensor([tokenizer(PROMPT.format(*pair[side]))["input_ids"] for pair in chosen])
            for side in (0, 1)
        )
        labels = torch.tensor([tokenizer(VERBS[source[-1]])["input_ids"][0] for _, source in chosen])
        return Pairs(base, source, labels)

    held_out = of(paired(prompts[:1024], HELD_OUT))
    rest = prompts[1024:]
    if data == DISTINCT:
        return of(paired(rest, pairs)), held_out
    few = list(itertools.permutations(rest[:FEW], 2))
    chance.shuffle(few)
    return of([pair for pair in few if pair[0][-1] != pair[1][-1]][:pairs]), held_out


def paired(prompts: Sequence[tuple[str, ...]], count: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Pairs of neighbours that differ in their last word; none is in two pairs."""
    left = iter(prompts)
    found = ((one, other) for one, other in zip(left, left, strict=False) if one[-1] != other[-1])
    return list(itertools.islice(found, count))


def random_pairs(model: PreTrainedModel, data: str, pairs: int) -> tuple[Pairs, Pairs]:
    """Pairs of random tokens to train on and to test with; the label is the model's own answer after the source."""
    generator = torch.Generator().manual_seed(1)

    def prompts(count: int) -> Tensor:
        tokens = torch.randint(model.config.vocab_size, (count, TOKENS), generator=generator)
        tokens[:, -1] = torch.randint(len(VERBS), (count,), generator=generator)
        return tokens

    def of(base: Tensor, source: Tensor) -> Pairs:
        with torch.no_grad():
            return Pairs(base, source, model(source).logits[:, -1].argmax(-1))

    held_out = of(prompts(HELD_OUT), prompts(HELD_OUT))
    if data == DISTINCT:
        return of(prompts(pairs), prompts(pairs)), held_out
    few = prompts(FEW)
    chosen = torch.combinations(torch.arange(FEW))
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:pairs]]
    return of(few[chosen[:, 0]], few[chosen[:, 1]]), held_out
