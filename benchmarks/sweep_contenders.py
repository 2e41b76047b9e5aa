"""The sweeps of `benchmarks.sweep`, and each way to run them: by hand, with this library, with its peers.

A contender prepares what a user would prepare once and returns one call of the whole sweep, from the prompts
to the table of numbers: `[layers, positions]` for the residual stream, `[layers, heads]` for the heads. A cell
costs all but this library as much as its neighbour, so they can be asked for some of the layers only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel

from benchmarks.overhead import with_own_modules
from scripts.fetch_smollm2 import smollm2_folder

RESIDUAL, HEADS = "residual", "heads"
SWEEPS = (RESIDUAL, HEADS)
"""The stream that goes into a block, by layer and position; what a head gives, by layer and head."""

# --- the prompts ---


@dataclass(frozen=True)
class Pair:
    """Two prompts of as many tokens, and what the model would go on with after each."""

    name: str
    clean: str
    corrupted: str
    answer: str  # after the clean prompt
    other: str  # after the corrupted one
    tokens: int
    differing: tuple[int, ...]  # the positions at which they differ


PAIRS: Mapping[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair("5 tokens", "The capital of Italy is", "The capital of Spain is", " Rome", " Madrid", 5, (3,)),
        Pair(
            "14 tokens",
            "When Mary and John went to the store, John gave a drink to",
            "When Mary and John went to the store, Mary gave a drink to",
            " Mary",
            " John",
            14,
            (9,),
        ),
        Pair(
            "differing at once",
            "Rome is in Italy and Paris is in",
            "Paris is in France and Rome is in",
            " France",
            " Italy",
            8,
            (0, 3, 5),
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """A sweep that every library is asked to run."""

    model: PreTrainedModel
    clean: Tensor  # (batch, tokens)
    corrupted: Tensor  # (batch, tokens)
    answer: int
    other: int
    sweep: str
    sampled: int | None = None
    """In how many of the layers the peers and the hooks patch; None for all."""

    @property
    def layers(self) -> range:
        return range(self.model.config.num_hidden_layers)

    @property
    def positions(self) -> range:
        return range(self.corrupted.shape[1])

    @property
    def heads(self) -> range:
        return range(self.model.config.num_attention_heads)

    @property
    def columns(self) -> range:
        """The second axis of the result."""
        return self.positions if self.sweep == RESIDUAL else self.heads

    @property
    def cells(self) -> int:
        return len(self.layers) * len(self.columns)

    @property
    def rows(self) -> Sequence[int]:
        """The layers in which the peers and the hooks patch, evenly spread."""
        every = len(self.layers)
        count = min(self.sampled or every, every)
        return [(2 * number + 1) * every // (2 * count) for number in range(count)]

    def metric(self, logits: Tensor) -> Tensor:
        """The logit difference at the last token, averaged over the prompts."""
        return (logits[:, -1, self.answer] - logits[:, -1, self.other]).mean()

    def block_path(self, layer: int) -> str:
        blocks = "transformer.h" if isinstance(self.model, GPT2LMHeadModel) else "model.layers"
        return f"{blocks}.{layer}"

    def site_path(self, layer: int) -> str:
        """The module whose input is patched: a block, or the projection that mixes the heads."""
        if self.sweep == RESIDUAL:
            return self.block_path(layer)
        mixing = "attn.c_proj" if isinstance(self.model, GPT2LMHeadModel) else "self_attn.o_proj"
        return f"{self.block_path(layer)}.{mixing}"

    def place(self, column: int) -> tuple[slice | int, ...]:
        """Where in that input, `[batch, position, width]`, a cell of the column writes."""
        if self.sweep == RESIDUAL:
            return (slice(None), column)
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return (slice(None), slice(None), slice(column * width, (column + 1) * width))

    def copy(self) -> PreTrainedModel:
        """The model in modules of its own, over the same weight tensors."""
        return with_own_modules(self.model)


def case_on(name: str, model: PreTrainedModel, pair: Pair, sweep: str) -> Case:
    """The prompts in the tokens of SmolLM2; a model that knows no words gets tokens that differ at those places."""
    if name == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
        clean, corrupted = (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in (pair.clean, pair.corrupted)
        )
        answer, other = (tokenizer(text)["input_ids"][0] for text in (pair.answer, pair.other))
        return Case(model, clean, corrupted, answer, other, sweep)
    return random_case(model, 1, pair.tokens, pair.differing, sweep)


def random_case(
    model: PreTrainedModel, batch: int, tokens: int, differing: Sequence[int], sweep: str
) -> Case:
    """Random prompts whose tokens differ at the given positions and nowhere else."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
    corrupted = clean.clone()
    places = list(differing)
    corrupted[:, places] = (corrupted[:, places] + 1) % model.config.vocab_size
    return Case(model, clean, corrupted, 1, 2, sweep)


def resized(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A model of the same sizes but for the number of layers, with random weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return type(model)(config).eval()


# --- by hand ---

Call = Callable[[], Tensor]


@contextmanager
def pre_hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def inputs_of(model: nn.Module, case: Case, ids: Tensor) -> list[Tensor]:
    """What goes into the site in each layer, from one run."""
    kept: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0].clone())

    with pre_hooked({model.get_submodule(case.site_path(layer)): read for layer in case.layers}):
        model(ids)
    return kept


def patched_by_hand(model: nn.Module, case: Case, clean: Sequence[Tensor], layer: int, column: int) -> Tensor:
    """One cell: the corrupted run with the clean value at one place."""
    place = case.place(column)

    def write(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = args[0].clone()
        value[place] = clean[layer][place]
        return (value, *args[1:])

    with pre_hooked({model.get_submodule(case.site_path(layer)): write}):
        return case.metric(model(case.corrupted).logits)


def by_hand(case: Case) -> Call:
    """The usual loop: the clean run is kept, and each cell is a forward pass with a hook."""
    model = case.copy()

    def call() -> Tensor:
        clean = inputs_of(model, case, case.clean)
        return torch.tensor(
            [
                [patched_by_hand(model, case, clean, layer, column).item() for column in case.columns]
                for layer in case.rows
            ]
        )

    return call


# --- the libraries ---


def intervenable(case: Case, memory: str | None = None) -> Call:
    import intervenable as iv

    model = case.copy()
    component, axes = {
        RESIDUAL: ("block_input", ("layer", "pos")),
        HEADS: ("head_attention_value_output", ("layer", "head")),
    }[case.sweep]
    clean, corrupted = {"input_ids": case.clean}, {"input_ids": case.corrupted}

    def call() -> Tensor:
        swept = iv.patching.sweep(
            model,
            clean,
            corrupted,
            component=component,
            axes=axes,
            metric=case.metric,
            memory=memory,
            progress=False,
        )
        return swept.values

    return call


def transformer_lens(case: Case) -> Call:
    """Its own sweeps, with the one activation that they patch kept from the clean run."""
    from pandas import DataFrame
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = case.copy()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    sweep, activation = {
        RESIDUAL: (patching.get_act_patch_resid_pre, "hook_resid_pre"),
        HEADS: (patching.get_act_patch_attn_head_out_all_pos, "attn.hook_z"),
    }[case.sweep]
    names = [f"blocks.{layer}.{activation}" for layer in case.rows]
    index = [(layer, column) for layer in case.rows for column in case.columns]
    chosen = {"index_axis_names": None, "index_df": DataFrame(index)} if case.sampled else {}

    def call() -> Tensor:
        _, cache = bridge.run_with_cache(case.clean, names_filter=names)
        with patch.object(patching, "tqdm", lambda cells: cells):  # its progress bar cannot be turned off
            values = sweep(bridge, case.corrupted, cache, case.metric, **chosen)
        return values.view(len(case.rows), len(case.columns))

    return call


def pyvene(case: Case) -> Call:
    """The loop of its tutorials: a model for each layer, and both prompts in each cell."""
    import pyvene as pv

    model = case.copy()
    component, unit = {
        RESIDUAL: ("block_input", "pos"),
        HEADS: ("head_attention_value_output", "h"),
    }[case.sweep]
    base, source = {"input_ids": case.corrupted}, {"input_ids": case.clean}

    def call() -> Tensor:
        values = torch.empty(len(case.rows), len(case.columns))
        for row, layer in enumerate(case.rows):
            config = pv.IntervenableConfig(
                [pv.RepresentationConfig(layer, component, unit, 1)], pv.VanillaIntervention
            )
            intervened = pv.IntervenableModel(config, model)
            for column in case.columns:
                _, output = intervened(base, [source], {"sources->base": column})
                values[row, column] = case.metric(output.logits)
        return values

    return call


def nnsight(case: Case) -> Call:
    """A trace that keeps the clean values, and a trace for each cell."""
    from nnsight import NNsight

    model = NNsight(case.copy())
    sites = [model.get(case.site_path(layer)) for layer in case.layers]

    def call() -> Tensor:
        with model.trace(case.clean):
            clean = [site.input for site in sites].save()
        values = torch.empty(len(case.rows), len(case.columns))
        for row, layer in enumerate(case.rows):
            site = sites[layer]
            for column in case.columns:
                place = case.place(column)
                with model.trace(case.corrupted):
                    site.input[place] = clean[layer][place]
                    value = case.metric(model.output.logits).save()
                values[row, column] = value
        return values

    return call


# --- who takes part ---


@dataclass(frozen=True)
class Contender:
    """A way to run a sweep."""

    label: str
    package: str | None  # what has to be importable
    prepare: Callable[[Case], Call]
    fresh: bool = False
    """Whether it is prepared anew for each call, so that nothing can be remembered of the model."""


HOOKS, OURS = "hooks by hand", "intervenable"
CONTENDERS: Sequence[Contender] = (
    Contender(HOOKS, None, by_hand),
    Contender(OURS, "intervenable", intervenable),
    Contender("intervenable, first time", "intervenable", intervenable, fresh=True),
    Contender("TransformerLens", "transformer_lens", transformer_lens),
    Contender("pyvene", "pyvene", pyvene),
    Contender("nnsight", "nnsight", nnsight),
)
