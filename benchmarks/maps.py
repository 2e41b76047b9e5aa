"""What it costs to find out where the components of a model are, and to prove it, beside the time to load the model.

Each model is built from the config of a published one on the meta device, so that nothing but the config is needed;
`load` is that time, or with a folder the time to load its weights. Then come its tiny twin, the map inferred on it,
the laws that it is held to, its towers that read no text, the columns fitted to the model, and the same map a second
time, from the folder in which it is kept. Registered rows are left aside: every map is found out. CPU time on one
thread; the fastest of the rounds.

Example:
    python -m benchmarks.maps                               # published sizes, some minutes
    python -m benchmarks.maps --quick                       # three of them, one round
    python -m benchmarks.maps --models "Llama 3 70B" path/to/a/folder --markdown
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.published_models import published
from intervenable.map_cache import VARIABLE, KeptMap, keep, look_up
from intervenable.map_fitting import fitted
from intervenable.map_inference import infer_map
from intervenable.map_inputs import example_inputs
from intervenable.map_making import proved_map
from intervenable.map_towers import with_towers
from intervenable.map_twin import twin_of
from intervenable.map_verification import check_map

MODELS = (
    "GPT-2 XL",
    "Pythia 12B",
    "Gemma 3 27B",
    "Llama 3 70B",
    "Mixtral 8x22B",
    "Jamba 52B",
    "Qwen3-Next 80B",
    "DeepSeek V3 671B",
    "Falcon 180B",
    "Kimi Linear 48B",
    "T5 11B",
    "BERT large",
    "Qwen2-VL 7B",
    "BLIP-2 2.7B",
    "Granite 4 H small",
    "Swin large",
)
"""Those of `PUBLISHED` that are measured."""

QUICK = ("GPT-2 XL", "Pythia 12B", "BERT large")
STEPS = ("load", "twin", "infer", "prove", "towers", "fit", "kept")


@dataclass(frozen=True)
class Times:
    """CPU seconds of each step for one model, and how many components it has then."""

    model: str
    load: float
    twin: float
    infer: float
    prove: float
    towers: float
    fit: float
    kept: float
    components: int

    @property
    def new(self) -> float:
        """Seconds for a map that is not kept yet."""
        return self.twin + self.infer + self.prove + self.towers + self.fit


def measured(name: str, rounds: int) -> Times:
    """The fastest round of each step for one model.

    Args:
        name: One of `MODELS`, or a folder with a model.
        rounds: How often each step is done.
    """
    seconds: dict[str, float] = dict.fromkeys(STEPS, float("inf"))
    result: dict[str, Any] = {}

    def timed(step: str, work: Callable[[], Any]) -> None:
        for _ in range(rounds):
            start = process_time()
            result[step] = work()
            seconds[step] = min(seconds[step], process_time() - start)

    timed("load", lambda: _loaded(name))
    model = result["load"]
    timed("twin", lambda: twin_of(model))
    twin = result["twin"]
    inputs = example_inputs(twin)
    timed("infer", lambda: infer_map(twin, inputs))
    timed("prove", lambda: check_map(twin, result["infer"], inputs).map)
    timed("towers", lambda: with_towers(twin, result["prove"], proved_map))
    timed("fit", lambda: fitted(result["towers"], twin, model))
    with empty_cache():
        keep(model, KeptMap(result["fit"]))
        timed("kept", lambda: look_up(model).kept)
    assert result["kept"].map == result["fit"]
    return _times(name, seconds, len(result["fit"].components()))


@contextmanager
def empty_cache() -> Iterator[None]:
    """Within, maps are kept in a new folder."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def _times(name: str, seconds: Mapping[str, float], components: int) -> Times:
    return Times(name, components=components, **{step: seconds[step] for step in STEPS})


def _loaded(name: str) -> nn.Module:
    if name not in MODELS:
        loaded: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name)
        return loaded
    return published(name)


def as_table(times: Sequence[Times], markdown: bool) -> str:
    """The times in milliseconds, one model a row, and their sums."""
    head = ["model", "components", *STEPS[:-1], "new map", "kept map", "new : kept"]
    rows = [_row(one.model, str(one.components), one) for one in times]
    total = _times("all", {step: sum(getattr(one, step) for one in times) for step in STEPS}, 0)
    rows.append(_row("all", "", total))
    if markdown:
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[at]) for line in [head, *rows]) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *rows]
    )


def _row(name: str, components: str, times: Times) -> list[str]:
    steps = [f"{1000 * getattr(times, step):.0f} ms" for step in STEPS[:-1]]
    return [
        name,
        components,
        *steps,
        f"{1000 * times.new:.0f} ms",
        f"{1000 * times.kept:.0f} ms",
        f"{times.new / times.kept:.0f}x",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every map is new within 2 seconds and kept within 50 ms, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME_OR_DIR", help=f"of {', '.join(MODELS)}; or folders"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help=f"one round of {', '.join(QUICK)}")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds there as well")
    options = parser.parse_args(arguments)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    names = options.models or (QUICK if options.quick else MODELS)
    unknown = [name for name in names if name not in MODELS and not Path(name).is_dir()]
    if unknown:
        parser.error(f"{', '.join(unknown)}: neither a folder nor one of {', '.join(MODELS)}")
    rounds = 1 if options.quick else options.rounds
    measured(QUICK[0], 1)  # what is imported and warmed up once is no model's
    times = []
    for name in names:
        times.append(measured(name, rounds))
        print(f"{name}: {times[-1].new:.2f} s", file=sys.stderr, flush=True)
    print(as_table(times, options.markdown))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in times], indent=1) + "\n", encoding="utf-8")
    slow = [one.model for one in times if one.new > 2.0 or one.kept > 0.05]
    if slow:
        print(f"Beyond 2 s for a new map or 50 ms for a kept one: {', '.join(slow)}.", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
