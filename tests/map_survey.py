"""The map of one architecture after another, inferred and verified on tiny models; and the page that reports it.

python tests/map_survey.py                            # every type of every task, docs/architectures.md written anew
python tests/map_survey.py --no-page                  # the same, for the tests that hold them to it
python tests/map_survey.py --task masked-lm           # the types of one task, to the terminal
python tests/map_survey.py --only mamba t5            # these types, in every task that has them
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import torch
from map_survey_records import KeptRecords
from tiny_registry import TASKS, UNBUILDABLE_FOR, build, model_types
from torch import nn

from intervenable.binding import Places
from intervenable.map_inference import infer_map
from intervenable.map_layers import blocks_at
from intervenable.map_making import proved_map
from intervenable.map_towers import with_towers
from intervenable.map_verification import check_map, proved
from intervenable.map_verification_result import Verification
from intervenable.maps import described_by
from model_maps import COMPONENTS, ModelMap

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

SECONDS = 120
"""How long one type may take."""


@dataclass(frozen=True)
class Record:
    """What became of the map of one type."""

    task: str
    model_type: str
    stacks: Mapping[str, int] = field(default_factory=dict)
    """Prefix of each stack -> how many blocks it has."""
    components: tuple[str, ...] = ()
    """What is offered: every law holds."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What was inferred and breaks a law -> which, in words."""
    laws: Mapping[str, str] = field(default_factory=dict)
    """The same, as names of laws and layers."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """What the architecture does not have, or not where it could be told -> why."""
    seconds: float = 0.0
    """How long it took to infer and verify."""
    error: str = ""
    """What ended the survey of this type, if something did."""

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than in what the laws say of a whole model: one that draws random numbers."""
        return bool(self.error) and not self.error.startswith("MapError")


def survey(model_type: str, task: str) -> Record:
    """Infer the map of a tiny model of this type, and look at its laws."""
    tiny = build(model_type, task)
    begun = time.process_time()
    found = infer_map(tiny.model, tiny.inputs)
    verified = proved(tiny.model, found, tiny.inputs)
    if verified.refused:  # nothing that is left was told by that alone
        again = check_map(tiny.model, verified.map, tiny.inputs).refused
        assert not again, f"refused when looked at again: {again}"
    whole = with_towers(tiny.model, verified.map, proved_map)
    towers = tuple(name for name in whole.components() if name not in verified.map.components())
    _check_found(tiny.model, whole, towers)
    verified = replace(
        verified,
        map=whole,
        components=(*verified.components, *towers),
        absent={**verified.absent, **_absent_in_towers(whole, verified.map)},
    )
    return recorded(task, model_type, tiny.model, verified, time.process_time() - begun)


def _check_found(model: nn.Module, whole: ModelMap, components: Sequence[str]) -> None:
    """That the parts of a map that were proved on modules inside a model are found from the model."""
    with described_by(model, whole):
        places = Places(model)
        for name in components:
            for layer in range(places.layers_of(name)):
                if whole.site(name, layer) is not None:
                    places.at(name, layer)


def _absent_in_towers(whole: ModelMap, main: ModelMap) -> Mapping[str, str]:
    """Why the towers that were joined to a map lack what they lack."""
    joined = whole.stacks.keys() - main.stacks.keys()
    return {
        name: whole.reason(name)
        for name, known in COMPONENTS.items()
        if known.prefix in joined and whole.site(name) is None
    }


def recorded(
    task: str, model_type: str, model: nn.Module, verified: Verification, seconds: float = 0.0
) -> Record:
    """A verification as a record."""
    laws: dict[str, str] = {}
    for name in verified.refused:
        broken: dict[str, list[int | None]] = {}
        for finding in verified.findings:
            if finding.component == name and not finding.passed:
                broken.setdefault(finding.law, []).append(finding.layer)
        laws[name] = ", ".join(law + _of_layers(layers) for law, layers in broken.items()) or "nothing told"
    return Record(
        task,
        model_type,
        dict(_stacks(model, verified.map)),
        verified.components,
        dict(verified.refused),
        laws,
        dict(verified.absent),
        seconds,
    )


def _of_layers(layers: Sequence[int | None]) -> str:
    numbers = sorted({layer for layer in layers if layer is not None})
    return f"@{'/'.join(map(str, numbers))}" if numbers else ""


def _stacks(model: nn.Module, found: ModelMap) -> Iterator[tuple[str, int]]:
    paths = {"": found.blocks, **found.stacks} if found.blocks is not None else dict(found.stacks)
    for prefix, path in paths.items():
        yield prefix, len(blocks_at(model, path)) if path else 1


# --- a process for each type ------------------------------------------------------------------------------


class Asker:
    """Asks about one type after another, each in a process of its own: one that crashes or hangs is a record too.

    A process that has imported everything and done nothing else is forked for each type, which takes no time.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def ask(
        self, function: Callable[..., Record], model_type: str, task: str, seconds: float = SECONDS
    ) -> Record:
        """What a function finds about a type."""
        self._ours.send((function, model_type, task, seconds))
        answer: Record | str = self._ours.recv()
        return answer if isinstance(answer, Record) else Record(task, model_type, error=answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._ours.close()


def _serve(theirs: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # transformers imports what its models stand on with the first of them: seconds, in each process without this.
    importlib.import_module("transformers.models.llava.modeling_llava")
    context = multiprocessing.get_context("fork")
    while True:
        function, model_type, task, seconds = theirs.recv()
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=_answer, args=(writer, function, model_type, task))
        child.start()
        writer.close()
        try:
            theirs.send(reader.recv() if reader.poll(seconds) else f"no answer after {seconds:g} seconds")
        except EOFError:
            child.join()
            theirs.send(f"the process ended with code {child.exitcode}")
        child.kill()
        child.join()
        reader.close()


def _answer(writer: Connection, function: Callable[..., Record], model_type: str, task: str) -> None:
    try:
        writer.send(function(model_type, task))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames[:-5:-1]]
        text = f"{type(error).__name__}: {error}"[:500].replace("\n", " ")
        writer.send(f"{text} [{' < '.join(places)}]")


def kept_records() -> list[Record]:
    """The records of an earlier survey that still hold: those of types that were answered for."""
    found = (Record(**{**one, "components": tuple(one["components"])}) for one in KeptRecords())
    return [record for record in found if not record.failed]


def survey_all(wanted: Sequence[tuple[str, str]], jobs: int = 2) -> Iterator[Record]:
    """The records of (task, type)s, in order."""
    idle: SimpleQueue[Asker] = SimpleQueue()
    askers = [Asker() for _ in range(jobs)]
    for asker in askers:
        idle.put(asker)

    def record_of(pair: tuple[str, str]) -> Record:
        asker = idle.get()
        try:
            return asker.ask(survey, pair[1], pair[0])
        finally:
            idle.put(asker)

    with ThreadPoolExecutor(jobs) as pool, contextlib.ExitStack() as stack:
        for asker in askers:
            stack.callback(asker.close)
        yield from pool.map(record_of, wanted)


# --- the page ---------------------------------------------------------------------------------------------

GROUPS: Mapping[str, tuple[str, ...]] = {
    "blocks": ("block_input", "block_output"),
    "middle": ("block_mid",),
    "attention": ("attention_input", "attention_output", "attention_contribution"),
    "q k v z": ("head_query_output", "head_key_output", "head_value_output", "head_attention_value_output"),
    "scores": ("attention_scores", "attention_pattern"),
    "MLP": ("mlp_input", "mlp_output", "mlp_contribution"),
    "neurons": ("mlp_hidden",),
    "experts": ("router_output", "expert_output"),
    "mixer": ("mixer_input", "mixer_output"),
    "ends": ("embedding_output", "final_norm_input", "final_norm_output"),
}
"""The columns of the page, and the components that each stands for."""

TITLES = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "seq2seq-lm": "Encoder-decoders",
    "image-text-to-text": "Images and text",
    "image-classification": "Images",
    "zero-shot": "Towers of images and of text",
    "audio-classification": "Sounds",
    "ctc": "Sounds to characters",
    "speech-seq2seq": "Speech to text",
}

HEAD = """# Architectures

Written by `make maps-page`; `make maps` holds every type to it. Each type that transformers registers for a task
is made tiny and random, its map is inferred from structure and numbers, and every component of the map is held to
every law that can be looked at ([how](components-and-interventions.md)). In a cell: *yes*, all components of the
group are offered; *part*, some; *no*, none, and the reason is below the table; empty, the architecture has no such
thing to place. A model of several stacks has a row for each. The laws judge tiny models on the CPU in fp32.

| column | components |
| --- | --- |
{columns}
"""

NOTHING_TO_PLACE = (
    "has no",
    "have no",
    "no experts",
    "no layer",
    "does not mix",
    "by attention alone",
    "no cross",
    "not route",
)
"""Words of reasons that say that there is no such thing."""


def page(records: Sequence[Record]) -> str:
    """The page about what was found."""
    columns = "\n".join(
        f"| {group} | {', '.join(f'`{name}`' for name in names)} |" for group, names in GROUPS.items()
    )
    lines = [HEAD.format(columns=columns).rstrip(), ""]
    for task, title in TITLES.items():
        found = [record for record in records if record.task == task]
        if found:
            lines += _section(task, title, found)
    return "\n".join(lines).rstrip() + "\n"


def _section(task: str, title: str, found: Sequence[Record]) -> list[str]:
    blocks, views, scores = (sum(_offers(record, group) for record in found) for group in _COUNTED)
    missing = UNBUILDABLE_FOR[task]
    return [
        f"## {title}",
        "",
        f"{len(found)} types of {len(found) + len(missing)} that are registered: blocks in **{blocks}**, all four"
        f" views by heads in **{views}**, scores and patterns in **{scores}**; no component that breaks a law is"
        " offered.",
        "",
        "| type | stack | layers | " + " | ".join(GROUPS) + " |",
        "| --- " * (len(GROUPS) + 3) + "|",
        *(row for record in found for row in _rows(record)),
        "",
        *_gaps(found),
        *(f"- {name}: no tiny model, {reason}." for name, reason in sorted(missing.items())),
        "",
    ]


_COUNTED = ("blocks", "q k v z", "scores")


def _offers(record: Record, group: str) -> bool:
    """Whether some stack of a model has everything in a group."""
    return any(_cell(record, prefix, group) == "yes" for prefix in record.stacks)


def _rows(record: Record) -> Iterator[str]:
    if not record.stacks:
        yield f"| {record.model_type} | " + " | " * (len(GROUPS) + 1) + " |"
    for number, (prefix, layers) in enumerate(record.stacks.items()):
        cells = [_cell(record, prefix, group) for group in GROUPS]
        name = record.model_type if number == 0 else ""
        yield "| " + " | ".join([name, prefix, str(layers), *cells]) + " |"
    if any(name.startswith("cross_") for name in record.components):
        cells = [_cell(record, "cross", group) if group in _OF_CROSS else "" for group in GROUPS]
        yield "| " + " | ".join(["", "cross", "", *cells]) + " |"


_OF_CROSS = ("middle", "attention", "q k v z", "scores")


def _cell(record: Record, prefix: str, group: str) -> str:
    names = [f"{prefix}_{word}" if prefix else word for word in GROUPS[group]]
    offered = [name in record.components for name in names]
    if all(offered):
        return "yes"
    if any(offered):
        return "part"
    reasons = [record.refused.get(name) or record.absent.get(name, "") for name in names]
    there = any(reason and not any(word in reason for word in NOTHING_TO_PLACE) for reason in reasons)
    return "no" if there else ""


def _gaps(found: Sequence[Record]) -> Iterator[str]:
    """The reasons of what is not offered, each once, with the types and components that it holds for."""
    shown = {name for names in GROUPS.values() for name in names}
    reasons: dict[str, dict[str, list[str]]] = {}
    for record in found:
        if record.error:
            yield f"- {record.model_type}: {record.error}"
        for name, why in (*record.refused.items(), *record.absent.items()):
            if COMPONENTS[name].word in shown and COMPONENTS[name].prefix in ("", "cross", *record.stacks):
                text = _NUMBERS.sub("", why).partition(";")[0].strip()
                reasons.setdefault(text, {}).setdefault(record.model_type, []).append(name)
    for why, types in sorted(reasons.items(), key=lambda item: -len(item[1])):
        if any(word in why for word in NOTHING_TO_PLACE):
            continue
        named = sorted({name for names in types.values() for name in names})
        yield f"- {', '.join(f'`{name}`' for name in named)}: {why}. ({len(types)}: {', '.join(types)})"


_NUMBERS = re.compile(r", off by \S+ where \S+ is allowed| in layers? \d+(?:(?:, | to )\d+)*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Survey what has not been surveyed yet, show what was found, and write the page if it was all types."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=None, help="the types of these tasks")
    parser.add_argument("--only", nargs="*", default=None, help="these types, to the terminal")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    parser.add_argument("--json", type=Path, help="a file to which each record is added in a line")
    options = parser.parse_args(arguments)
    wanted = [
        (task, model_type)
        for task in options.task or TASKS
        for model_type in model_types(task)
        if options.only is None or model_type in options.only
    ]
    whole = options.only is None and options.task is None
    kept = KeptRecords().cleared() if whole else None
    records = {(record.task, record.model_type): record for record in kept_records()} if whole else {}
    for record in survey_all([pair for pair in wanted if pair not in records], options.jobs):
        records[record.task, record.model_type] = record
        print(line(record), flush=True)
        if kept is not None:
            kept.add(asdict(record))
        if options.json:
            with options.json.open("a") as file:
                print(json.dumps(asdict(record)), file=file)
    if whole and not options.no_page:
        PAGE.write_text(page([records[pair] for pair in wanted]))


def line(record: Record) -> str:
    """A record in a line of the terminal."""
    stacks = " ".join(f"{prefix or 'blocks'}:{count}" for prefix, count in record.stacks.items())
    refused = "; ".join(f"{name} {law}" for name, law in record.laws.items())
    said = record.error or f"{len(record.components)} of {len(COMPONENTS)} {stacks}" + (
        f" REFUSED {refused}" if refused else ""
    )
    return f"{record.task:20} {record.model_type:26} {record.seconds:5.2f} s  {said}"


if __name__ == "__main__":
    main()
