"""Where SmolLM2 keeps which capital is meant: an alignment for every layer, at the country and at the last token.

    python -m scripts.capital_map

Alignments are trained on pairs of some countries and measured on pairs of others. The swap of the whole vector
stands beside them, and random subspaces of the same rank, as the alignments were before training. Finished cells are
kept in the folder, so that a run that was ended goes on from there. The picture goes to
`docs/images/smollm2_das_map.png`, the figures to the folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import intervenable as iv
from scripts.fetch_smollm2 import smollm2_folder

if TYPE_CHECKING:
    from datasets import Dataset

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "smollm2_das_map.png"
PHRASING = "The capital and largest city of {country} is"
TEST_COUNTRIES = 20
POSITIONS = {"the country": "base_position", "last token": "last"}


def pairs(tokenizer: Any, train: int, test: int) -> tuple[Dataset, Dataset]:
    """Pairs of the countries to train with, and pairs of those to test with.

    Args:
        tokenizer: Of SmolLM2.
        train: How many to train with.
        test: How many to test with.
    """
    capitals = json.loads((ROOT / "scripts" / "smollm2_capitals.json").read_text(encoding="utf-8"))
    tasks = iv.causal.capital_facts(phrasings=PHRASING, capitals=capitals).split(TEST_COUNTRIES)
    first, second = (
        iv.causal.tokenized(
            task.counterfactual(count, seed=seed), tokenizer, positions="country", labels="first"
        )
        for seed, (task, count) in enumerate(zip(tasks, (train, test), strict=True))
    )
    return first, second


class LikeTheSource:
    """How far the next token's distribution is from the one that the model itself gives for the source.

    A loss on the label alone is satisfied once the label is ahead, by whatever pushes it: soon nothing more is
    learned. This one asks for the whole answer.

    Args:
        lm: The model.
        dataset: Pairs; every source is answered once.
    """

    def __init__(self, lm: torch.nn.Module, dataset: Dataset) -> None:
        first = dict(zip(dataset["labels"], range(len(dataset)), strict=True))
        rows = dataset.select(list(first.values()))
        ids, mask = (torch.tensor(rows[f"source_{name}"]) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            logits = lm(input_ids=ids, attention_mask=mask).logits
        self.answers = logits[torch.arange(len(ids)), mask.sum(1) - 1].log_softmax(-1)
        self.row = {label: row for row, label in enumerate(first)}

    def __repr__(self) -> str:
        return "LikeTheSource()"  # a checkpoint knows it by this

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = self.answers[[self.row[label] for label in labels.tolist()]]
        return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)


def sweeps(
    lm: torch.nn.Module, train: Dataset, test: Dataset, options: argparse.Namespace
) -> tuple[iv.training.AlignmentSweep, iv.training.AlignmentSweep]:
    """Alignments as trained, beside the whole vector; and the same as they were before training."""
    common: dict[str, Any] = {
        "layers": options.layers,
        "positions": POSITIONS,
        "processes": options.processes,
        "batch_size": 32,
        "progress": lambda done, total: print(f"{done} of {total}", flush=True),
    }
    learned = iv.training.sweep_alignments(
        lm,
        train,
        test,
        ranks=(options.rank, "full"),
        loss=LikeTheSource(lm, train),
        lr=options.lr,
        epochs=options.epochs,
        checkpoint=options.folder / "learned",
        **common,
    )
    # A learning rate of nothing leaves each basis as its seed made it.
    random = iv.training.sweep_alignments(
        lm,
        train.select(range(2)),
        test,
        ranks=options.rank,
        lr=0.0,
        epochs=1,
        checkpoint=options.folder / "random",
        **common,
    )
    return learned, random


def draw(learned: iv.training.AlignmentSweep, random: iv.training.AlignmentSweep) -> Any:
    """Both positions of the three side by side."""
    rank = learned.ranks[0]
    maps = {
        f"DAS, rank {rank}": learned.iia[:, :, 0],
        "whole vector": learned.iia[:, :, 1],
        f"random, rank {rank}": random.iia[:, :, 0],
    }
    return iv.plots.heat_map(
        torch.cat(list(maps.values()), dim=1),
        row_labels=learned.layers,
        column_labels=[f"{name}\n{position}" for name in maps for position in POSITIONS],
        title="Which capital: countries that no alignment was trained on",
        value_label="IIA",
        limits=(0, 1),
        show_values=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=256, help="directions of each alignment (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (%(default)s)")
    parser.add_argument("--pairs", type=int, default=384, help="pairs to train with (%(default)s)")
    parser.add_argument("--test", type=int, default=100, help="pairs to test with (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="how often each is seen (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help="which layers (all)")
    parser.add_argument("--processes", type=int, default=2, help="how many share the work (%(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "capital_map", help="%(default)s")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="%(default)s")
    options = parser.parse_args()

    begun = time.monotonic()
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    learned, random = sweeps(lm, *pairs(tokenizer, options.pairs, options.test), options)
    learned.save(options.folder / "learned.safetensors")
    random.save(options.folder / "random.safetensors")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(learned, random).savefig(options.picture, dpi=160, bbox_inches="tight")
    print(learned.to_pandas().to_string(index=False))
    print(random.to_pandas().to_string(index=False))
    used = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    print(f"{time.monotonic() - begun:.0f} s, of which processors worked {used:.0f} s")
    print(options.picture)


if __name__ == "__main__":
    main()
