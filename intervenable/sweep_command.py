"""`python -m intervenable sweep`: a patching sweep from the shell, with its table, picture and files."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import intervenable as iv
from intervenable.command_line import check_file, check_picture, load, parameters, told
from intervenable.sweep_text import told_cells, told_runs

Made = Callable[[Any, Any, Any], iv.metrics.Metric]
METRICS: Mapping[str, Made] = {
    "logit_difference": iv.metrics.logit_difference,
    "logit": lambda tokenizer, answer, _: iv.metrics.logit(tokenizer, answer),
    "probability": lambda tokenizer, answer, _: iv.metrics.probability(tokenizer, answer),
    "log_probability": lambda tokenizer, answer, _: iv.metrics.log_probability(tokenizer, answer),
    "rank": lambda tokenizer, answer, _: iv.metrics.rank(tokenizer, answer),
    "loss": lambda tokenizer, answer, _: iv.metrics.loss(tokenizer, answer),
    "kl_divergence": lambda *_: iv.metrics.kl_divergence(),
}
"""Metrics by name, made of a tokenizer, the answer to the clean prompt and that to the corrupted one."""
RUNS = ("clean", "corrupted")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of a sweep."""
    prompts = parser.add_argument_group("what is run")
    prompts.add_argument(
        "--model",
        metavar="NAME_OR_DIR",
        help="a causal language model: a folder, or a name on the Hugging Face hub (default: the small one that comes"
        " with the library)",
    )
    prompts.add_argument(
        "--clean", default="The capital of Spain is", metavar="TEXT", help="default: %(default)s"
    )
    prompts.add_argument(
        "--corrupted", default="The capital of Italy is", metavar="TEXT", help="default: %(default)s"
    )

    patched = parser.add_argument_group("what is patched")
    patched.add_argument(
        "--component",
        action="append",
        metavar="NAME",
        help="what is patched: block_input, attention_output, mlp_output, head_attention_value_output, ..., or a"
        ' module path such as "model.layers[{layer}].mlp.output"; may be given several times (default: block_input)',
    )
    patched.add_argument(
        "--axes",
        default="layer,pos",
        metavar="A,B",
        help="what is varied, of layer, pos, head, query, key; the rest is patched as a whole (default: %(default)s)",
    )
    for axis, what in (("layers", "layers"), ("positions", "tokens"), ("heads", "heads")):
        example = "0,3-5,-1" if axis != "positions" else '"0-2,Spain,last"'
        words = ", or words" if axis == "positions" else ""
        patched.add_argument(
            f"--{axis}",
            metavar="LIST",
            help=f"which {what}, as numbers and ranges{words}: {example} (default: all)",
        )
    patched.add_argument(
        "--window",
        metavar="AXIS=N",
        help="patch N neighbours together: layer=3 or layer=3,pos=2 (default: one)",
    )
    patched.add_argument(
        "--direction",
        choices=("denoise", "noise"),
        help="denoise: clean values into the corrupted run; noise: the other way (default: denoise, and noise where"
        " --value is not source)",
    )
    patched.add_argument(
        "--value",
        default="source",
        metavar="WHAT",
        help="what is put in: source (that of the other run), zero, mean, or a number (default: %(default)s)",
    )

    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--metric",
        default="logit_difference",
        choices=sorted(METRICS),
        metavar="NAME",
        help=", ".join(METRICS),
    )
    measured.add_argument(
        "--answer",
        metavar="TEXT",
        help='the token that answers the clean prompt, as " Madrid" (default: what the model says)',
    )
    measured.add_argument(
        "--other",
        metavar="TEXT",
        help="the one that answers the corrupted prompt (default: what the model says)",
    )

    way = parser.add_argument_group("how")
    way.add_argument(
        "--memory", metavar="SIZE", help="what the rows of a pass may take beyond a plain one (default: 1GB)"
    )
    way.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="keep finished work there; the same command goes on after a stop",
    )
    way.add_argument(
        "--exact-check",
        nargs="?",
        type=int,
        const=16,
        default=0,
        metavar="N",
        help="compute N random cells once more without any shortcut (without N: 16)",
    )
    way.add_argument("--no-progress", action="store_true", help="draw no progress bar")

    files = parser.add_argument_group("what is written")
    files.add_argument(
        "--out",
        type=Path,
        default=Path("out/sweep.png"),
        metavar="FILE",
        help="the picture: .png, .pdf or .svg (default: %(default)s)",
    )
    files.add_argument("--no-picture", action="store_true", help="draw none")
    files.add_argument("--normalized", action="store_true", help="0 is the corrupted run, 1 the clean one")
    files.add_argument("--title", metavar="TEXT", help="that of the picture (default: what was patched)")
    files.add_argument(
        "--save", type=Path, metavar="FILE", help="the whole result, for SweepResult.load: .safetensors"
    )
    files.add_argument("--csv", type=Path, metavar="FILE", help="a table with a row for each cell: .csv")


def run(options: argparse.Namespace) -> int:
    """Run the sweep and tell of it.

    The result is the exit code: 0; 2 with the reason on standard error; 130 after an interrupt from the keyboard.
    """
    try:
        return told(lambda: tell(options))
    except KeyboardInterrupt:
        kept = options.checkpoint is not None and options.checkpoint.exists()
        more = f" The same command goes on from what is in {options.checkpoint}." if kept else ""
        print(f"\nstopped.{more}", file=sys.stderr)
        return 130


def tell(options: argparse.Namespace) -> None:
    """The prompts with their answers, the sweep, what it found, and where it was written."""
    check(options)
    asked = read_options(options)
    tokenizer, model = load(options.model)
    clean, corrupted = (read_prompt(tokenizer, f"--{name}", getattr(options, name)) for name in RUNS)
    if options.clean == options.corrupted:
        raise iv.InputError(
            f"--clean and --corrupted are both {options.clean!r}. Give two prompts that differ."
        )
    if clean["input_ids"].shape != corrupted["input_ids"].shape:
        asked["align"] = "auto"
    said = [answer_to(model, inputs) for inputs in (clean, corrupted)]
    print(f"model      {type(model).__name__}, {parameters(model)} parameters")
    for name, token in zip(RUNS, said, strict=True):
        print(f"{name:<10} {getattr(options, name)!r}, answered with {tokenizer.decode([token])!r}")
    if "align" in asked:
        print(
            "The prompts have different lengths: tokens are paired by what they share, from the front and the back."
        )

    metric = read_metric(options, tokenizer, *said)
    print(flush=True)
    begun = perf_counter()
    result = iv.patching.sweep(model, clean, corrupted, metric=metric, tokenizer=tokenizer, **asked)
    seconds = perf_counter() - begun
    print(told_runs(result, options.metric))
    print(f"\n{told_cells(result)}\n")
    cells = sum(values.numel() for values in result.results.values())
    print(f"{cells} cells in {seconds:.1f} s.")
    for sentence in result.shortcuts:
        print(f"  {sentence}")
    write(options, result)


# --- what was asked for -----------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Refuse what could not be done in the end before anything is run for it."""
    if not options.no_picture:
        check_picture(options.out)
    if options.save is not None:
        check_file("--save", options.save, [".safetensors"])
    if options.csv is not None:
        check_file("--csv", options.csv, [".csv"])
    if options.exact_check < 0:
        raise iv.InputError(f"--exact-check {options.exact_check}: give a number of cells, 0 or more.")
    if options.checkpoint is not None and options.checkpoint.is_file():
        raise iv.InputError(f"--checkpoint {options.checkpoint} is a file. Give the name of a folder.")


def read_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `sweep` that come from the command line."""
    return {
        "component": options.component or "block_input",
        "axes": [axis.strip() for axis in options.axes.split(",")],
        "layers": read_list("--layers", options.layers),
        "positions": read_list("--positions", options.positions, words=True),
        "heads": read_list("--heads", options.heads),
        "window": read_window(options.window),
        "direction": options.direction,
        "value": read_value(options.value),
        "memory": options.memory,
        "exact_check": options.exact_check,
        "checkpoint": options.checkpoint,
        "progress": False if options.no_progress else None,
    }


def read_list(option: str, text: str | None, words: bool = False) -> list[int | str] | None:
    """Numbers and ranges, and words where they say something: `0,3-5,-1`.

    Example:
        >>> read_list("--positions", "0-2, Spain, -1", words=True)
        [0, 1, 2, 'Spain', -1]
    """
    if text is None:
        return None
    found: list[int | str] = []
    for part in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"-?\d+", part):
            found.append(int(part))
        elif (span := re.fullmatch(r"(\d+)-(\d+)", part)) and int(span[1]) <= int(span[2]):
            found.extend(range(int(span[1]), int(span[2]) + 1))
        elif words and part and not span:
            found.append(part)
        else:
            allowed = (
                "numbers, ranges and words, as 0-2,Spain,-1" if words else "numbers and ranges, as 0,3-5,-1"
            )
            raise iv.InputError(f"{option} {text!r}: {part!r} cannot be read. Give {allowed}.")
    return found


def read_window(text: str | None) -> dict[str, int] | None:
    """How many neighbours are patched together, by axis: `layer=3,pos=2`.

    Example:
        >>> read_window("layer=3,pos=2")
        {'layer': 3, 'pos': 2}
    """
    if text is None:
        return None
    parts = [re.fullmatch(r"\s*(\w+)=(\d+)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise iv.InputError(
            f"--window {text!r} cannot be read. Give an axis and a number, as layer=3 or layer=3,pos=2."
        )
    return {part[1]: int(part[2]) for part in parts if part}


def read_value(text: str) -> str | float:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def read_prompt(tokenizer: Any, option: str, text: str) -> Any:
    """A prompt as the model gets it."""
    inputs = tokenizer(text, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise iv.InputError(f"{option} is empty. Give a text for the model to continue.")
    return inputs


def answer_to(model: Any, inputs: Any) -> int:
    """The most likely next token."""
    with torch.inference_mode():
        return int(model(**inputs).logits[0, -1].argmax())


def read_metric(options: argparse.Namespace, tokenizer: Any, clean: int, corrupted: int) -> iv.metrics.Metric:
    """The metric, of the tokens that were given or else of those that the model says."""
    answer = clean if options.answer is None else options.answer
    other = corrupted if options.other is None else options.other
    if options.metric == "logit_difference" and answer == other:
        word = tokenizer.decode([answer]) if isinstance(answer, int) else answer
        raise iv.InputError(
            f"Both prompts are answered with {word!r}, so there is no difference to measure. Give prompts that are"
            " answered differently, --answer and --other, or another --metric."
        )
    return METRICS[options.metric](tokenizer, answer, other)


# --- what is written --------------------------------------------------------------------------------------


def write(options: argparse.Namespace, result: iv.patching.SweepResult) -> None:
    """The files that were asked for; the picture last, since it is what may be impossible."""
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        print(f"result   {result.save(options.save)}")
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        result.to_pandas().to_csv(options.csv, index=False)
        print(f"table    {options.csv}")
    if not options.no_picture:
        figure = result.plot(normalized=options.normalized, title=options.title)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=150)
        print(f"picture  {options.out}")
