"""What it costs to find out and to prove the map of every type of model in `transformers`, each of its default size.

Each is built from the default config of its type on the meta device, for the first task that it has a class for;
then its map is made as for a model that is seen for the first time, without the folder in which maps are kept. CPU
time on one thread, the fastest of some runs where the first takes long. A type whose default config builds no model,
or for which no map is made, is counted with the reason.

Example:
    python -m benchmarks.maps_of_types                        # all, about ten minutes
    python -m benchmarks.maps_of_types --types llama t5 vit
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.maps import empty_cache
from intervenable.map_making import make_map

TASKS = (
    "CausalLM",
    "Seq2SeqLM",
    "ImageTextToText",
    "MaskedLM",
    "SpeechSeq2Seq",
    "CTC",
    "ImageClassification",
    "AudioClassification",
    "ZeroShotImageClassification",
    "MultimodalLM",
)
LIMIT = 2.0
"""Seconds that a map may take."""

AGAIN = 0.7 * LIMIT
"""Seconds from which on other runs tell whether the machine was busy."""

ROUNDS = 4


@dataclass(frozen=True)
class Made:
    """How long the map of one type took, and how many components it has; or why there is none."""

    type: str
    seconds: float
    components: int
    why: str = ""


def class_of(config: Any) -> type[nn.Module] | None:
    """The class of the first task that a config is for, or of the model without a head."""
    for name in (*(f"AutoModelFor{task}" for task in TASKS), "AutoModel"):
        known = getattr(transformers, name)._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def made(name: str) -> Made | None:
    """Make the map of one type; None if `transformers` has no class for it.

    Args:
        name: Its `model_type`.
    """
    try:
        config = transformers.CONFIG_MAPPING[name]()
        cls: Any = class_of(config)
        if cls is None:
            return None
        with torch.device("meta"):
            model = cls._from_config(config)
    except Exception as error:  # whatever its code raises: such a config is of no model
        return Made(name, 0.0, 0, f"its default config builds no model ({type(error).__name__})")
    try:
        seconds, components = _timed(lambda: len(make_map(model).components()))
        for _ in range(ROUNDS - 1):
            if seconds > AGAIN:
                seconds = min(seconds, _timed(lambda: len(make_map(model).components()))[0])
    except Exception as error:  # one that draws random numbers may do so in one run and not in another
        return Made(name, 0.0, 0, str(error).splitlines()[0])
    return Made(name, seconds, components)


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    with empty_cache():
        start = process_time()
        result = work()
        return process_time() - start, result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every map that is made takes at most 2 seconds, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", metavar="MODEL_TYPE", help="default: all that transformers has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds there as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.types or () if name not in transformers.CONFIG_MAPPING]
    if unknown:
        parser.error(f"{', '.join(unknown)}: transformers {transformers.__version__} has no such type")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    made("gpt2")  # what is imported and warmed up once is no type's
    found = []
    for name in options.types or sorted(transformers.CONFIG_MAPPING):
        one = made(name)
        if one is not None:
            found.append(one)
            print(f"{name}: {one.why or f'{one.seconds:.2f} s'}", file=sys.stderr, flush=True)
    print(summary(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    return 1 if any(one.seconds > LIMIT for one in found) else 0


def summary(found: Sequence[Made]) -> str:
    """How many maps were made, how long they took, and the slowest of them."""
    maps = sorted((one for one in found if not one.why), key=lambda one: -one.seconds)
    lines = [f"{len(maps)} maps of {len(found)} types, {sum(one.seconds for one in maps):.0f} s of CPU time"]
    if maps:
        middle = maps[len(maps) // 2].seconds
        beyond = sum(one.seconds > LIMIT for one in maps)
        lines.append(f"median {middle:.2f} s, slowest {maps[0].seconds:.2f} s, {beyond} beyond {LIMIT:g} s")
    lines += [f"{one.seconds:6.2f} s  {one.components:4d} components  {one.type}" for one in maps[:10]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
