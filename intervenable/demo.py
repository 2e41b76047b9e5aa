"""`python -m intervenable demo`: one swap, what it did, and a map of where the answer comes from.

It tells the main story of the library on any causal language model that has a map, with the public names alone, and
so reads as an example too. The commands are the one place in the library that prints.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import intervenable as iv
from intervenable.command_line import check_picture, load, parameters, told

DEPTH = 0.8
"""Where the last token is swapped by default, as a share of the layers. Late enough for a fact to have reached the
last token, early enough for the layers above to have something left to do."""


@dataclass(frozen=True)
class Prompts:
    """Two prompts as the model gets them, and which token of the one stands for which of the other."""

    tokenizer: Any
    base: Any
    source: Any
    partners: list[int | None]
    """For each position of the base that of the source, or None if there is none."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of the demo."""
    parser.add_argument(
        "--model",
        metavar="NAME_OR_DIR",
        help="a causal language model: a folder, or a name on the Hugging Face hub (default: the small one"
        " that comes with the library)",
    )
    parser.add_argument(
        "--base", default="The capital of Spain is", help="the prompt to run (default: %(default)s)"
    )
    parser.add_argument(
        "--source",
        default="The capital of Italy is",
        help="the prompt to take values from (default: %(default)s)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help=f"where to swap the last token (default: at {DEPTH:.0%}% of the depth)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/heat_map.png"),
        metavar="FILE",
        help="the picture to write: .png, .pdf or .svg (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Tell the story; the result is the exit code: 0, or 2 with the reason on standard error."""

    def work() -> None:
        check_picture(options.out)
        tell(*load(options.model), options)

    return told(work)


def tell(tokenizer: Any, model: Any, options: argparse.Namespace) -> None:
    """One swap with its receipt, then the swap of every block output at every token."""
    prompts = read_prompts(tokenizer, options.base, options.source)
    layers = count_layers(model)
    layer = int(DEPTH * layers) if options.layer is None else options.layer
    print(f"model   {type(model).__name__}, {layers} layers, {parameters(model)} parameters")
    print(f"base    {options.base!r}")
    print(f"source  {options.source!r}")

    swap = swap_at(layer, tokenizer, model)
    layer %= layers  # it is in range, or the line above has raised
    last = ([[[prompts.source["input_ids"].shape[1] - 1]]], [[[prompts.base["input_ids"].shape[1] - 1]]])
    with torch.inference_mode():
        output = swap(prompts.base, [prompts.source], {"sources->base": last}, output_original_output=True)
        goal = next_token(model(**prompts.source).logits)[0]
    before, after = next_token(output.original.logits)[0], next_token(output.intervened.logits)[0]

    print(f"\nThe output of layer {layer} at the last token of the base is replaced by that of the source.\n")
    print(side_by_side(tokenizer, before, after))
    print(f"\nWhat was touched:\n\n{output.receipt}\n")

    answer = int(goal.argmax())
    word = tokenizer.decode([answer])
    if answer == int(before.argmax()):
        raise iv.InputError(
            f"Both prompts are answered with {word!r}, so a map would not show where the answer comes from."
            " Choose a --source that the model answers differently."
        )
    print(pairing(prompts))
    print(f"Swapping each of {layers} layers at each of {len(prompts.partners)} tokens ...", flush=True)
    values = sweep(prompts, model, layers, answer)
    figure = iv.plots.heat_map(
        values,
        column_labels=column_labels(prompts),
        title=f"One block output, taken from “{shortened(options.source)}”",
        value_label=f"probability of “{word}”",
        marks=[(layer, values.shape[1] - 1)],
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)
    print(f"\nWhere a swap makes {word!r} most likely:\n\n{best_places(prompts, values)}")
    print(f"\nThe map of all of them, with the swap from above framed: {options.out}")


# --- the prompts ------------------------------------------------------------------------------------------


def read_prompts(tokenizer: Any, base: str, source: str) -> Prompts:
    """Tokenize both, and pair their tokens: a shared beginning from the front, the rest from the back."""
    base_inputs, source_inputs = (tokenizer(text, return_tensors="pt") for text in (base, source))
    ours, theirs = base_inputs["input_ids"][0].tolist(), source_inputs["input_ids"][0].tolist()
    for option, tokens in (("--base", ours), ("--source", theirs)):
        if not tokens:
            raise iv.InputError(f"{option} is empty. Give a text for the model to continue.")
    if ours == theirs:
        raise iv.InputError(f"--base and --source are both {base!r}. Give two prompts that differ.")
    # The last tokens are partners in any case: that is where the next token is read.
    ends = min(len(ours), len(theirs)) - 1
    shared = next((index for index in range(ends) if ours[index] != theirs[index]), ends)
    longer = len(theirs) - len(ours)
    partners = [
        position if position < shared else position + longer if position + longer >= shared else None
        for position in range(len(ours))
    ]
    return Prompts(tokenizer, base_inputs, source_inputs, partners)


def count_layers(model: Any) -> int:
    """How many blocks the model has: the name of a representation says which one is the last."""
    [name] = swap_at(-1, None, model).names
    return int(name.split(".")[0].removeprefix("layer_")) + 1


# --- the swaps --------------------------------------------------------------------------------------------


def swap_at(layer: int, tokenizer: Any, model: Any) -> iv.IntervenableModel:
    """The model with the output of one layer taken from the source."""
    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(layer, "block_output", "pos", 1)], iv.VanillaIntervention
    )
    return iv.IntervenableModel(config, model, tokenizer=tokenizer)


def sweep(prompts: Prompts, model: Any, layers: int, answer: int) -> Tensor:
    """The probability of the answer after the swap of each layer at each token: `[layers, positions]`.

    The positions of a layer are the examples of one batch.
    """
    pairs = [(theirs, ours) for ours, theirs in enumerate(prompts.partners) if theirs is not None]
    base, source = (
        {name: value.expand(len(pairs), -1) for name, value in inputs.items()}
        for inputs in (prompts.base, prompts.source)
    )
    locations = ([[[theirs] for theirs, _ in pairs]], [[[ours] for _, ours in pairs]])
    values = torch.full((layers, len(prompts.partners)), torch.nan)
    for layer in range(layers):
        swap = swap_at(layer, prompts.tokenizer, model)
        with torch.inference_mode():
            _, swapped = swap(base, [source], {"sources->base": locations})
        values[layer, [ours for _, ours in pairs]] = next_token(swapped.logits)[:, answer].cpu()
    return values


def next_token(logits: Tensor) -> Tensor:
    """The distribution of the token that follows, `[batch, vocabulary]`."""
    return logits[:, -1].float().softmax(-1)


# --- how it is told ---------------------------------------------------------------------------------------


def side_by_side(tokenizer: Any, before: Tensor, after: Tensor, count: int = 5) -> str:
    """The most likely tokens of two distributions in two columns."""
    columns = [
        [
            f"{token:<16} {value:6.1%}"
            for token, value in iv.top_vals(tokenizer, values, count, return_results=True)
        ]
        for values in (before, after)
    ]
    lines = [f"{'before':<27} after", *(f"{left:<27} {right}" for left, right in zip(*columns, strict=True))]
    return "\n".join(f"  {line}" for line in lines)


def pairing(prompts: Prompts) -> str:
    """Which tokens change places, and which have none to change with."""
    ours, theirs = texts(prompts.tokenizer, prompts.base), texts(prompts.tokenizer, prompts.source)
    pairs = [
        f"{theirs[partner]!r} for {text!r}"
        for text, partner in zip(ours, prompts.partners, strict=True)
        if partner is not None and theirs[partner] != text
    ]
    told = f"Token by token, the source has {', '.join(pairs) or 'the same'}."
    if len(ours) == len(theirs):
        return told
    told += (
        f"\nThe prompts have different lengths, {len(ours)} and {len(theirs)} tokens: their shared beginning is"
        " paired from the front, the rest from the back."
    )
    alone = [text for text, partner in zip(ours, prompts.partners, strict=True) if partner is None]
    unused = [text for index, text in enumerate(theirs) if index not in prompts.partners]
    if alone:
        told += f"\nThe source has nothing for {', '.join(map(repr, alone))}: grey in the map."
    if unused:
        told += f"\nThe base has no place for {', '.join(map(repr, unused))} of the source."
    return told


def best_places(prompts: Prompts, values: Tensor) -> str:
    """For each run of layers the token at which a swap does most."""
    best, where = values.nan_to_num(-1.0).max(dim=1)
    words = texts(prompts.tokenizer, prompts.base)
    lines = []
    for position, run in groupby(range(len(where)), key=where.tolist().__getitem__):
        layers = list(run)
        low, high = best[layers].min().item(), best[layers].max().item()
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        share = f"{high:.1%}" if len(layers) == 1 else f"{low:.1%} to {high:.1%}"
        lines.append(f"  {which:<18} at {words[position]!r:<16} {share}")
    return "\n".join(lines)


def column_labels(prompts: Prompts) -> list[str]:
    """The tokens of the base; where the source has another, that one below."""
    ours = iv.plots.token_labels(prompts.tokenizer, prompts.base["input_ids"][0])
    theirs = iv.plots.token_labels(prompts.tokenizer, prompts.source["input_ids"][0])
    return [
        text if partner is None or theirs[partner] == text else f"{text}\n← {theirs[partner]}"
        for text, partner in zip(ours, prompts.partners, strict=True)
    ]


def texts(tokenizer: Any, inputs: Any) -> list[str]:
    return [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"… {text[2 - length :]}"
