"""The jobs of `benchmarks.attention`, and each way to do them: by hand, with this library, with its peers.

A contender prepares what a user would prepare once and returns one call of the job, which gives patterns
`(batch, head, query, key)` or logits. pyvene takes no part: it knows the pattern of GPT-2 alone, as the input
of a dropout that transformers 5 no longer calls, so its edit is made nowhere and nothing says so.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.overhead import MODELS, with_own_modules
from scripts.fetch_smollm2 import smollm2_folder

HEAD = 1


# --- the jobs ---


@dataclass(frozen=True)
class Job:
    """Something that every library is asked to do."""

    name: str
    baseline: str  # the contender that the others are ratios to
    expected: str  # the contender whose result the others are compared with


PLAIN = "plain forward pass"
EAGER = "eager, output_attentions"
BY_HAND = "by hand, eager"
ONE_LAYER = "by hand, eager in one layer"

JOBS: Mapping[str, Job] = {
    job.name: job
    for job in (
        Job("all patterns", EAGER, EAGER),
        Job("one pattern", EAGER, EAGER),
        Job("zero a key", PLAIN, BY_HAND),
        Job("mask a key", PLAIN, BY_HAND),
        Job("untouched", PLAIN, PLAIN),
    )
}
READING = ("all patterns", "one pattern")
EDITING = ("zero a key", "mask a key", "untouched")


@dataclass(frozen=True)
class Case:
    """The model and the inputs of a job."""

    model: PreTrainedModel
    ids: Tensor  # (batch, tokens)

    @property
    def layer(self) -> int:
        return self.model.config.num_hidden_layers // 2

    @property
    def layers(self) -> range:
        return range(self.model.config.num_hidden_layers)

    @property
    def key(self) -> int:
        """The column that is edited: not the first, so that each row keeps a key to read."""
        return self.ids.shape[1] // 2

    @property
    def column(self) -> dict[str, int]:
        """The entries that are edited, in the words of this library."""
        return {"heads": HEAD, "keys": self.key}

    def attention_path(self, layer: int) -> str:
        blocks, attention = (
            ("transformer.h", "attn")
            if isinstance(self.model, GPT2LMHeadModel)
            else ("model.layers", "self_attn")
        )
        return f"{blocks}.{layer}.{attention}"

    def copy(self, *, eager: bool = False) -> PreTrainedModel:
        """The model in modules of its own, over the same weight tensors."""
        model = with_own_modules(self.model)
        if eager:
            model.config._attn_implementation = "eager"
        return model


def load(name: str) -> PreTrainedModel:
    """A model of `benchmarks.overhead`; of its files, an older transformers has to be told the rotary base."""
    if name != "smollm2" or int(transformers_version.partition(".")[0]) >= 5:
        return MODELS[name]()
    config = AutoConfig.from_pretrained(smollm2_folder())
    config.rope_theta = config.rope_parameters["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(
        smollm2_folder(), config=config, torch_dtype=torch.float32
    ).eval()


def case_on(model: PreTrainedModel, batch: int, tokens: int) -> Case:
    """Random prompts without padding."""
    generator = torch.Generator().manual_seed(1)
    return Case(model, torch.randint(model.config.vocab_size, (batch, tokens), generator=generator))


# --- by hand ---

Call = Callable[[], Sequence[Tensor]]
Edit = Callable[[Tensor], Tensor]


def plain(case: Case, job: str) -> Call:
    """The model as it was loaded, nothing read and nothing edited."""
    return lambda: [case.model(case.ids).logits]


def eager_attentions(case: Case, job: str) -> Call:
    """The model with eager attention, asked for all patterns: what `transformers` itself offers."""
    model = case.copy(eager=True)
    if job == "all patterns":
        return lambda: model(case.ids, output_attentions=True).attentions
    if job == "one pattern":
        return lambda: [model(case.ids, output_attentions=True).attentions[case.layer]]
    return lambda: [model(case.ids, output_attentions=True).logits]


def body_attentions(case: Case, job: str) -> Call:
    """The same without the language model head, which no pattern needs."""
    model = case.copy(eager=True).base_model
    if job == "all patterns":
        return lambda: model(case.ids, output_attentions=True).attentions
    return lambda: [model(case.ids, output_attentions=True).attentions[case.layer]]


def zeroed(case: Case, pattern: Tensor) -> Tensor:
    pattern = pattern.clone()
    pattern[:, HEAD, :, case.key] = 0
    return pattern


def masked(case: Case, scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, HEAD, :, case.key] = -torch.inf
    return scores


def attention_by_hand(case: Case, job: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function for the layer of `case`; the other layers get `otherwise`."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        if module.layer_idx != case.layer:
            if scaling is not None:
                options["scaling"] = scaling
            return otherwise(module, query, key, value, attention_mask, **options)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is None:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        else:
            scores = scores + attention_mask[..., : key.shape[-2]]
        if job == "mask a key":
            scores = masked(case, scores)
        pattern = scores.softmax(-1)
        if job == "zero a key":
            pattern = zeroed(case, pattern)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    return attend


@contextmanager
def replacing_eager_attention(case: Case, job: str) -> Iterator[None]:
    """Put `attention_by_hand` where the code of the model finds its eager attention function."""
    code = sys.modules[type(case.model.get_submodule(case.attention_path(0))).__module__]
    attend = attention_by_hand(case, job, code.eager_attention_forward)
    with patch.object(code, "eager_attention_forward", attend):
        yield


def by_hand(case: Case, job: str) -> Call:
    """The model with eager attention, whose attention function is replaced."""
    model = case.copy(eager=True)

    def call() -> list[Tensor]:
        with replacing_eager_attention(case, job):
            return [model(case.ids).logits]

    return call


def by_hand_in_one_layer(case: Case, job: str) -> Call:
    """The model with fused attention, but for the layer that is edited."""
    model = case.copy()
    attend = attention_by_hand(case, job, ALL_ATTENTION_FUNCTIONS["sdpa"])

    def call() -> list[Tensor]:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        try:
            return [model(case.ids).logits]
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]

    return call


# --- the libraries: each prepares what a user would prepare once, and returns one call of the job ---


def intervenable(case: Case, job: str) -> Call:
    import intervenable as iv

    model, inputs = case.copy(), {"input_ids": case.ids}
    if job in READING:
        layers = case.layers if job == "all patterns" else [case.layer]

        def read() -> Sequence[Tensor]:
            cache = iv.collect(model, inputs, "attention_pattern", layers)
            return [cache["attention_pattern", layer] for layer in layers]

        return read
    component, unit, intervention, where = {
        "zero a key": ("attention_pattern", "h.query.key", iv.ZeroIntervention(), case.column),
        "mask a key": ("attention_scores", "h.query.key", iv.KnockoutIntervention(), case.column),
        "untouched": ("attention_pattern", "h", iv.CallableIntervention(lambda base: base), None),
    }[job]
    edit = iv.RepresentationConfig(case.layer, component, unit, intervention=intervention, where=where)
    intervened = iv.IntervenableModel(iv.IntervenableConfig([edit]), model)

    def call() -> list[Tensor]:
        _, output = intervened(inputs)
        return [output.logits]

    return call


def transformer_lens(case: Case, job: str) -> Call:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = case.copy()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    pattern, scores = f"blocks.{case.layer}.attn.hook_pattern", f"blocks.{case.layer}.attn.hook_attn_scores"

    if job == "all patterns":
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in case.layers]

        def read_all() -> list[Tensor]:
            _, cache = bridge.run_with_cache(case.ids, names_filter=names)
            return [cache[name] for name in names]

        return read_all
    if job == "one pattern":

        def read_one() -> list[Tensor]:
            _, cache = bridge.run_with_cache(case.ids, names_filter=pattern, stop_at_layer=case.layer + 1)
            return [cache[pattern]]

        return read_one

    def zero(value: Tensor, hook: Any) -> Tensor:
        return zeroed(case, value)

    def mask(value: Tensor, hook: Any) -> Tensor:
        return masked(case, value)

    def leave(value: Tensor, hook: Any) -> Tensor:
        return value

    hooks = {
        "zero a key": (pattern, zero),
        "mask a key": (scores, mask),
        "untouched": (pattern, leave),
    }[job]
    return lambda: [bridge.run_with_hooks(case.ids, fwd_hooks=[hooks])]


def nnsight(case: Case, job: str) -> Call:
    """Patterns are what an eager attention module returns second; edits go through `.source` to its softmax."""
    from nnsight import NNsight

    model = NNsight(case.copy(eager=True))
    attention = [model.get(case.attention_path(layer)) for layer in case.layers]
    chosen = attention[case.layer]

    if job == "all patterns":

        def read_all() -> Sequence[Tensor]:
            with model.trace(case.ids):
                patterns = [module.output[1] for module in attention].save()
            return patterns  # noqa: RET504 (it has its value when the block has ended)

        return read_all
    if job == "one pattern":

        def read_one() -> Sequence[Tensor]:
            with model.trace(case.ids) as tracer:
                pattern = chosen.output[1].save()
                tracer.stop()
            return [pattern]

        return read_one
    if job == "mask a key":

        def mask() -> list[Tensor]:
            with model.trace(case.ids):
                softmax = chosen.source.attention_interface_1.source.nn_functional_softmax_0
                softmax.input = masked(case, softmax.input)
                logits = model.output.logits.save()
            return [logits]

        return mask

    def edit() -> list[Tensor]:
        with model.trace(case.ids):
            softmax = chosen.source.attention_interface_1.source.nn_functional_softmax_0
            softmax.output = zeroed(case, softmax.output) if job == "zero a key" else softmax.output
            logits = model.output.logits.save()
        return [logits]

    return edit


EASYROUTINE_LLAMA = "hf-internal-testing/tiny-random-LlamaForCausalLM"
"""The one Llama that easyroutine knows by name."""


class NumberTokenizer:
    """As little tokenizer as easyroutine asks for; it costs nothing."""

    def decode(self, token: int) -> str:
        return str(token)


@contextmanager
def loading(model: PreTrainedModel) -> Iterator[None]:
    """Let easyroutine, which loads models from a list of names, load this one."""
    from easyroutine.interpretability import models

    with ExitStack() as stack:
        for name, loaded in (("LlamaForCausalLM", model), ("LlamaTokenizer", NumberTokenizer())):
            original = getattr(models, name)
            stack.enter_context(
                patch.object(original, "from_pretrained", lambda *_, loaded=loaded, **__: loaded)
            )
        yield


def easyroutine(case: Case, job: str) -> Call:
    """Its attention modules take the place of the model's; names of tokens are looked up in each call.

    Before the softmax it has no masking: a column can be given the value minus infinity instead.
    """
    logging.getLogger("easyroutine").setLevel(logging.ERROR)
    from easyroutine.interpretability import ExtractionConfig, HookedModel, Intervention
    from easyroutine.interpretability.hooked_model import HookedModelConfig

    logging.getLogger("easyroutine").setLevel(logging.ERROR)
    with loading(case.copy(eager=True)):
        model = HookedModel(HookedModelConfig(EASYROUTINE_LLAMA, device_map="cpu", torch_dtype=torch.float32))
    inputs = {"input_ids": case.ids, "attention_mask": torch.ones_like(case.ids)}
    heads = range(case.model.config.num_attention_heads)

    if job in ("all patterns", "one pattern"):
        layers = case.layers if job == "all patterns" else [case.layer]
        chosen = [{"layer": layer, "head": "all"} for layer in layers]
        extraction = ExtractionConfig(extract_attn_pattern=True, attn_heads=chosen)

        def read() -> list[Tensor]:
            cache = model(inputs, target_token_positions=["all"], extraction_config=extraction)
            # It keeps one tensor a head; put together only to be compared.
            return [torch.stack([cache[f"pattern_L{layer}H{head}"] for head in heads], 1) for layer in layers]

        return read
    name = f"pattern_L{case.layer}H{HEAD}"
    tokens = case.ids.shape[1]
    edit = {
        "zero a key": Intervention("columns", name, [case.key]),
        # The registered name of the type lacks the letter; the documented one is refused.
        "mask a key": Intervention(
            "colums_pre_softmax",
            name,
            [case.key],
            patching_values=torch.full((tokens, tokens), -torch.inf),
        ),
        "untouched": Intervention("columns", name, [case.key], multiplication_value=1.0),
    }[job]

    def call() -> list[Tensor]:
        cache = model(inputs, target_token_positions=["all", case.key], interventions=[edit])
        return [cache["logits"][:, :tokens]]

    return call


# --- who takes part in what ---


@dataclass(frozen=True)
class Contender:
    """A way to do some of the jobs."""

    label: str
    package: str | None  # what has to be importable
    prepare: Callable[[Case, str], Call]
    jobs: tuple[str, ...] = tuple(JOBS)
    models: tuple[type[PreTrainedModel], ...] = (PreTrainedModel,)
    batches: bool = True  # whether it can work on several prompts at once

    def takes(self, case: Case, job: str) -> bool:
        return (
            job in self.jobs and isinstance(case.model, self.models) and (self.batches or len(case.ids) == 1)
        )


CONTENDERS: Sequence[Contender] = (
    Contender(PLAIN, None, plain, jobs=EDITING),
    Contender(EAGER, None, eager_attentions),
    Contender("eager, without the head", None, body_attentions, jobs=READING),
    Contender(BY_HAND, None, by_hand, jobs=EDITING),
    Contender(ONE_LAYER, None, by_hand_in_one_layer, jobs=EDITING),
    Contender("intervenable", "intervenable", intervenable),
    Contender("TransformerLens", "transformer_lens", transformer_lens),
    Contender("nnsight", "nnsight", nnsight),
    Contender("easyroutine", "easyroutine", easyroutine, models=(LlamaForCausalLM,), batches=False),
)
