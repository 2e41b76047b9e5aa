"""What the commands of `python -m intervenable` share: models by name, files to write, and how a fault is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import intervenable as iv

PICTURES = (".png", ".pdf", ".svg")


def load(name: str | None) -> tuple[Any, Any]:
    """A tokenizer and a causal language model: the one that comes with the library, or that of a folder or name."""
    if name is None:
        return iv.load_small_lm()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).train(False)
    except (OSError, ValueError, ImportError) as error:
        raise iv.InputError(
            f"--model {name} is no causal language model that can be loaded. {error}"
        ) from error


def check_file(option: str, path: Path, endings: Sequence[str]) -> None:
    """Refuse a file that could not be written before anything is run for it."""
    if path.suffix not in endings:
        raise iv.InputError(f"{option} {path}: the name must end in {_one_of(endings)}.")
    if path.is_dir():
        raise iv.InputError(f"{option} {path} is a folder. Give the name of a file.")


def check_picture(path: Path) -> None:
    """The same of a picture, which also needs matplotlib."""
    check_file("--out", path, PICTURES)
    _ = iv.plots


def parameters(model: Any) -> str:
    """How many parameters a model has."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def told(work: Callable[[], None]) -> int:
    """Do the work; the result is the exit code: 0, or 2 with the reason as a line on standard error."""
    try:
        work()
    except (iv.IntervenableError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _one_of(endings: Sequence[str]) -> str:
    return endings[0] if len(endings) == 1 else f"one of {', '.join(endings)}"
