"""Bad input gets an error that says what was given, what is allowed and what to do, before the model is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import intervenable as iv
from intervenable.maps import map_of
from model_maps import COMPONENTS, WORDS
from tiny_models import HEADS, HIDDEN, KEY_VALUE_HEADS, LAYERS, MLP, tiny, tiny_inputs

NAME = "layer_0.block_output.pos"
LLAMA, GPT2 = tiny("llama"), tiny("gpt2")
BASE, SOURCE = tiny_inputs(LLAMA), tiny_inputs(LLAMA, seed=1)
AT_1 = {"sources->base": 1}
ALL_COMPONENTS = ", ".join(sorted(WORDS))


def bound(
    entries: Any = None, types: Any = iv.VanillaIntervention, model: nn.Module = LLAMA
) -> iv.IntervenableModel:
    entries = iv.RepresentationConfig(0) if entries is None else entries
    return iv.IntervenableModel(iv.IntervenableConfig(entries, types), model)


def swap(*args: Any, **kwargs: Any) -> iv.IntervenableOutput:
    return bound()(*args, **kwargs)


def halves(base):
    return base[..., : HIDDEN // 2]


def doubles_precision(base):
    return base.double()


def counts(base):
    return base.numel()


def forgets(base):
    base.zero_()


def nothing():
    return None


class Halves(iv.Intervention):
    def forward(self, base):
        return halves(base)


class Forgets(iv.Intervention):
    def forward(self, base):
        return None


class Case(NamedTuple):
    """One piece of bad input."""

    name: str
    do: Callable[[], Any]
    error: type[iv.IntervenableError]
    builtin: type[Exception]
    message: str


def linked(first: iv.RepresentationConfig, second: iv.RepresentationConfig) -> iv.IntervenableModel:
    return bound([first, second], iv.LowRankRotatedSpaceIntervention)


DECLARED = [
    Case(
        "unknown component",
        lambda: bound({"component": "block_ouput"}),
        iv.UnknownNameError,
        LookupError,
        f"representation 0: Unknown component 'block_ouput'. Did you mean 'block_output'?\nAllowed:"
        f" {ALL_COMPONENTS}. In a model of several stacks with encoder_, decoder_, cross_, vision_, audio_ or text_"
        " before it."
        " A module path ending in .input or .output is a component too.",
    ),
    Case(
        "module path that leads nowhere",
        lambda: bound({"component": "model.layers[0].mpl.output"}),
        iv.UnsupportedModelError,
        LookupError,
        "representation 0: 'model.layers[0].mpl.output' names no module: model.layers.0 has no part 'mpl'. Did you"
        " mean 'mlp'?\nIt has: self_attn, mlp, input_layernorm, post_attention_layernorm.",
    ),
    Case(
        "module path past the last layer",
        lambda: bound({"component": "model.layers[3].mlp.output"}),
        iv.UnsupportedModelError,
        LookupError,
        "representation 0: 'model.layers[3].mlp.output' names no module: model.layers has no part '3'.\nIt has:"
        " 0, 1, 2.",
    ),
    Case(
        "layer out of range",
        lambda: bound({"layer": LAYERS}),
        iv.LayerRangeError,
        IndexError,
        f"representation 0: Layer {LAYERS} is out of range: LlamaForCausalLM has layers 0 to {LAYERS - 1}.",
    ),
    Case(
        "negative layer out of range",
        lambda: bound({"layer": -LAYERS - 1}),
        iv.LayerRangeError,
        IndexError,
        f"representation 0: Layer {-LAYERS - 1} is out of range: LlamaForCausalLM has layers 0 to {LAYERS - 1}.",
    ),
    Case(
        "layer of a component outside the blocks",
        lambda: bound({"component": "logits", "layer": 0}),
        iv.ConfigError,
        ValueError,
        "representation 0: layer 0 makes no sense: a model has one 'logits'. Leave layer out.",
    ),
    Case(
        "unit h for a component without heads",
        lambda: bound({"component": "value_output", "unit": "h"}),
        iv.ConfigError,
        ValueError,
        "representation 0: unit 'h' does not fit 'value_output', which has no heads: use 'pos', or the component"
        " 'head_value_output'.",
    ),
    Case(
        "unit pos for a component with heads",
        lambda: bound({"component": "head_value_output"}),
        iv.ConfigError,
        ValueError,
        "representation 0: unit 'pos' does not fit 'head_value_output', which is split into heads: use 'h' or"
        " 'h.pos'.",
    ),
    Case(
        "unknown unit",
        lambda: bound({"unit": "token"}),
        iv.UnknownNameError,
        LookupError,
        "representation 0: Unknown unit 'token'.\nAllowed: h, h.pos, h.query, h.query.key, pos.",
    ),
    Case(
        "component that the architecture lacks",
        lambda: bound({"component": "router_output"}, model=GPT2),
        iv.UnsupportedModelError,
        LookupError,
        "representation 0: GPT2LMHeadModel has no 'router_output': its MLP is dense: it has no router and no"
        f" experts.\nIt has: {', '.join(sorted(map_of(tiny('gpt2')).components()))}.",
    ),
    Case(
        "architecture without a map",
        lambda: bound(model=nn.Sequential(nn.Linear(2, 2))),
        iv.UnsupportedModelError,
        LookupError,
        "No map describes Sequential, and none could be made. What Sequential runs on cannot be guessed: it needs"
        " 'input'.\nCall iv.model_map(model, example_inputs=...) once with inputs that it runs on, write a ModelMap"
        " and register_map() it, or name the place by its module path, such as 'model.layers[3].mlp.output'.",
    ),
    Case(
        "intervention together with a type",
        lambda: bound({"intervention": iv.ZeroIntervention(), "intervention_type": iv.ScaleIntervention}),
        iv.ConfigError,
        ValueError,
        "representation 0: Both an intervention (ZeroIntervention) and an intervention_type (ScaleIntervention)"
        " were given; give one of the two.",
    ),
    Case(
        "function that takes nothing",
        lambda: bound({"intervention": nothing}),
        iv.ConfigError,
        ValueError,
        f"representation 0: {nothing!r} takes no positional argument. Give a function of (base), (base, source) or"
        " (base, source, subspaces).",
    ),
    Case(
        "linked pair of different shapes",
        lambda: linked(
            iv.RepresentationConfig(0, low_rank_dimension=2, intervention_link_key=0),
            iv.RepresentationConfig(0, "mlp_hidden", low_rank_dimension=2, intervention_link_key=0),
        ),
        iv.ConfigError,
        ValueError,
        f"representation 1: it is linked to representation 0 by the key 0, which is made for {HIDDEN} columns, and"
        f" mlp_hidden of layer 0 gives it {MLP}. Linked representations must have one shape.",
    ),
    Case(
        "linked pair of different ranks",
        lambda: linked(
            iv.RepresentationConfig(0, low_rank_dimension=2, intervention_link_key="a"),
            iv.RepresentationConfig(1, low_rank_dimension=3, intervention_link_key="a"),
        ),
        iv.ConfigError,
        ValueError,
        "representation 1: it is linked to representation 0 by the key 'a', whose low_rank_dimension is 2, and asks"
        " for 3.",
    ),
    Case(
        "linked pair of different classes",
        lambda: bound(
            [{"intervention_link_key": 1}, {"intervention_link_key": 1}],
            [iv.ZeroIntervention, iv.ScaleIntervention],
        ),
        iv.ConfigError,
        ValueError,
        "representation 1: it is linked to representation 0 by the key 1, which is a ZeroIntervention, and asks"
        " for a ScaleIntervention.",
    ),
    Case(
        "intervention for another model size",
        lambda: bound({"intervention": iv.RotatedSpaceIntervention(24)}),
        iv.ModelMismatchError,
        ValueError,
        f"representation 0: RotatedSpaceIntervention was made for embed_dim=24, and block_output of layer 0 is"
        f" {HIDDEN} wide here (1 unit(s) of {HIDDEN}, concatenated). Was it declared for a model of another size?",
    ),
    Case(
        "constant source for another model size",
        lambda: bound({"source_representation": torch.ones(24)}),
        iv.ModelMismatchError,
        ValueError,
        f"representation 0: its source_representation has shape (24,), and block_output of layer 0 is {HIDDEN} wide"
        f" here: the last axis must be {HIDDEN}.",
    ),
    Case(
        "partition for another model size",
        lambda: bound({"subspace_partition": [[0, 8], [8, 24]]}),
        iv.ConfigError,
        ValueError,
        "representation 0: VanillaIntervention: Part [8, 24] names dimension 16; dimensions are 0 to 15.",
    ),
    Case(
        "config for another model",
        lambda: iv.IntervenableModel(iv.IntervenableConfig([], model_type="GPT2LMHeadModel"), LLAMA),
        iv.ModelMismatchError,
        ValueError,
        "The configuration is for GPT2LMHeadModel, and the model is a LlamaForCausalLM. Give a model of that"
        " class, or leave model_type out.",
    ),
    Case(
        "rank that is missing",
        lambda: bound({"layer": 0}, iv.LowRankRotatedSpaceIntervention),
        iv.ConfigError,
        ValueError,
        "representation 0: LowRankRotatedSpaceIntervention needs low_rank_dimension, which the representation"
        " does not give. Give it there, or pass an instance as `intervention`:"
        " LowRankRotatedSpaceIntervention(low_rank_dimension=...).",
    ),
    Case(
        "width that cannot be known",
        lambda: bound({"component": "model.layers[0].mlp.act_fn.output"}, iv.SigmoidMaskIntervention),
        iv.ConfigError,
        ValueError,
        "representation 0: SigmoidMaskIntervention needs embed_dim, which the representation does not gi"
        "ve (the width of model.layers[0].mlp.act_fn.output cannot be told without a run). Pass an insta"
        "nce as `intervention`: SigmoidMaskIntervention(embed_dim=...).",
    ),
    Case(
        "setting that the intervention does not take",
        lambda: bound({"latent_dim": 3}, iv.ZeroIntervention),
        iv.ConfigError,
        ValueError,
        "representation 0: ZeroIntervention takes no latent_dim.",
    ),
    Case(
        "name that another has by default",
        lambda: bound([{"layer": 0}, {"layer": 1, "name": NAME}]),
        iv.ConfigError,
        ValueError,
        f"The name '{NAME}' is also the default name of another representation; choose another.",
    ),
    Case(
        "expert of a component",
        lambda: bound({"moe_key": 1}),
        iv.ConfigError,
        ValueError,
        "representation 0: moe_key=1: a component is of all experts at once. Leave it out; to switch an expert off"
        " use iv.experts.switched_off, and name one that is a module by its path.",
    ),
    Case(
        "model given by name",
        lambda: iv.IntervenableModel({"layer": 0}, "gpt2"),
        iv.ConfigError,
        ValueError,
        "model is a str, not a torch module. Give the configuration and the model itself: IntervenableModel(config,"
        " model).",
    ),
    Case(
        "nothing where a config belongs",
        lambda: iv.IntervenableModel(None, LLAMA),
        iv.ConfigError,
        ValueError,
        "representations are RepresentationConfigs, dicts or positional lists, one or a list of them, not of type"
        " NoneType.",
    ),
]

INPUTS = [
    Case(
        "text for a base",
        lambda: swap("The capital of Spain is", [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "base is a str. Give a mapping of the model's inputs (what the tokenizer returns with"
        " return_tensors='pt'), a tensor, or a tuple of tensors.",
    ),
    Case(
        "list of ids for a base",
        lambda: swap([1, 2, 3], [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "base is a list. Give a mapping of the model's inputs (what the tokenizer returns with"
        " return_tensors='pt'), a tensor, or a tuple of tensors.",
    ),
    Case(
        "tokenizer output without tensors",
        lambda: swap(BatchEncoding({"input_ids": [[3, 4]], "attention_mask": [[1, 1]]}), [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "input_ids of base is a list, not a tensor: tokenize with return_tensors='pt'.",
    ),
    Case(
        "mask that is no tensor",
        lambda: swap({"input_ids": BASE["input_ids"], "attention_mask": [[1] * 7] * 2}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "attention_mask of base is a list, not a tensor: tokenize with return_tensors='pt'.",
    ),
    Case(
        "ids without a batch",
        lambda: swap({"input_ids": BASE["input_ids"][0]}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "The input of base has shape (7,); a batch axis is needed (for one example, [1, ...]).",
    ),
    Case(
        "ids that are no whole numbers",
        lambda: swap({"input_ids": torch.ones(2, 7)}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "input_ids of base are torch.float32; ids are whole numbers. Vectors go in as inputs_embeds.",
    ),
    Case(
        "empty batch",
        lambda: swap({"input_ids": BASE["input_ids"][:0]}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "The input of base has shape (0, 7): there is nothing in it to run. Give at least one example of at"
        " least one position.",
    ),
    Case(
        "empty examples",
        lambda: swap(BASE, [{"input_ids": BASE["input_ids"][:, :0]}], AT_1),
        iv.InputError,
        ValueError,
        "The input of source 0 has shape (2, 0): there is nothing in it to run. Give at least one example of at"
        " least one position.",
    ),
    Case(
        "base without the input the model takes",
        lambda: swap({"attention_mask": BASE["attention_mask"]}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "base has no input_ids or inputs_embeds, which LlamaForCausalLM needs. Given: attention_mask.",
    ),
    Case(
        "base with nothing in it",
        lambda: swap({}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "base has no input_ids or inputs_embeds, which LlamaForCausalLM needs. Given: nothing.",
    ),
    Case(
        "slip in the name of an input",
        lambda: swap(
            {"input_ids": BASE["input_ids"], "attention_maks": BASE["attention_mask"]}, [SOURCE], AT_1
        ),
        iv.InputError,
        ValueError,
        "base has 'attention_maks', which LlamaForCausalLM does not take. Did you mean 'attention_mask'?",
    ),
    Case(
        "mask of another shape",
        lambda: swap({"input_ids": BASE["input_ids"], "attention_mask": torch.ones(2, 3)}, [SOURCE], AT_1),
        iv.InputError,
        ValueError,
        "The attention_mask of base has shape (2, 3), and its tokens (2, 7).",
    ),
    Case(
        "input given twice",
        lambda: swap(BASE, [SOURCE], AT_1, input_ids=BASE["input_ids"]),
        iv.InputError,
        ValueError,
        "input_ids was given in the base and beside it; give one of the two.",
    ),
    Case(
        "slip in the name of an option",
        lambda: swap(BASE, [SOURCE], AT_1, use_cahce=False),
        iv.InputError,
        ValueError,
        "the call has 'use_cahce', which LlamaForCausalLM does not take. Did you mean 'use_cache'?",
    ),
    Case(
        "option of pyvene that would be swallowed",
        lambda: swap(BASE, [SOURCE], AT_1, intervention_additional_kwargs={}),
        iv.NotAvailableError,
        NotImplementedError,
        "intervention_additional_kwargs is not available. Give an intervention what it needs when it is made,"
        " or set it as an attribute of model.interventions[name] before the call.",
    ),
]

SOURCES = [
    Case(
        "no source",
        lambda: swap(BASE, None, AT_1),
        iv.SourceError,
        ValueError,
        f"'{NAME}' (VanillaIntervention) needs a source, and source 0 is not given. Give one, or a constant"
        " source_representation; to skip the intervention, put None in its locations.",
    ),
    Case(
        "too many sources",
        lambda: swap(BASE, [SOURCE, SOURCE], AT_1),
        iv.SourceError,
        ValueError,
        f"2 sources were given for 1 groups ({NAME}). Give one for each, None for a group without one, or a single"
        " source for all.",
    ),
    Case(
        "too few sources",
        lambda: bound([{"layer": 0, "name": "a"}, {"layer": 1, "name": "b"}, {"layer": 2, "name": "c"}])(
            BASE, [SOURCE, SOURCE], AT_1
        ),
        iv.SourceError,
        ValueError,
        "2 sources were given for 3 groups (a; b; c). Give one for each, None for a group without one, or a single"
        " source for all.",
    ),
    Case(
        "wrong number of sources for groups",
        lambda: bound(
            [{"group_key": 1, "name": "a"}, {"group_key": 2, "name": "b"}, {"group_key": 1, "name": "c"}]
        )(BASE, [SOURCE] * 3, AT_1),
        iv.SourceError,
        ValueError,
        "3 sources were given for 2 groups (a, c; b). Give one for each, None for a group without one, or a single"
        " source for all.",
    ),
    Case(
        "source of a wrong type",
        lambda: swap(BASE, ["The capital of Italy is"], AT_1),
        iv.InputError,
        ValueError,
        "source 0 is a str. Give a mapping of the model's inputs (what the tokenizer returns with"
        " return_tensors='pt'), a tensor, or a tuple of tensors.",
    ),
    Case(
        "batch sizes that do not match",
        lambda: swap(BASE, [tiny_inputs(LLAMA, batch=3)], AT_1),
        iv.SourceError,
        ValueError,
        "Base and source differ in batch size: base has 2 examples, source 0 has 3. Give each base example its"
        " source example, or one for all.",
    ),
    Case(
        "source that nothing would use",
        lambda: bound(types=iv.ZeroIntervention)(BASE, [SOURCE], {"base": 1}),
        iv.SourceError,
        ValueError,
        f"Source 0 would not be used: {NAME} takes no source. Put None in its place.",
    ),
    Case(
        "source beside a constant one",
        lambda: swap(BASE, [SOURCE], AT_1, torch.ones(HIDDEN)),
        iv.SourceError,
        ValueError,
        f"Source 0 would not be used: {NAME} has a constant source already. Put None in its place.",
    ),
    Case(
        "constant source that cannot broadcast to the width",
        lambda: swap(BASE, None, {"base": 1}, torch.ones(24)),
        iv.SourceError,
        ValueError,
        f"The source representation of '{NAME}' has shape (24,), which does not broadcast to its units, (2, 1,"
        " 16). The last axis must be 16, the others as they are or 1.",
    ),
    Case(
        "constant source that cannot broadcast to the batch",
        lambda: swap(BASE, None, {"base": [0, 1]}, torch.ones(3, 2, HIDDEN)),
        iv.SourceError,
        ValueError,
        f"The source representation of '{NAME}' has shape (3, 2, 16), which does not broadcast to its units,"
        " (2, 2, 16). The last axis must be 16, the others as they are or 1.",
    ),
    Case(
        "constant source that nothing would use",
        lambda: bound(types=iv.ZeroIntervention)(BASE, None, {"base": 1}, torch.ones(HIDDEN)),
        iv.SourceError,
        ValueError,
        "source_representations would not be used: no intervention here takes a source. Leave it out.",
    ),
    Case(
        "constant source under a name that none has",
        lambda: swap(BASE, None, {"base": 1}, {"layer_0.block_output": torch.ones(HIDDEN)}),
        iv.SourceError,
        ValueError,
        f"source_representations names 'layer_0.block_output', which no representation is called. Allowed: {NAME}.",
    ),
    Case(
        "wrong number of constant sources",
        lambda: swap(BASE, None, {"base": 1}, [None, torch.ones(HIDDEN)]),
        iv.SourceError,
        ValueError,
        "source_representations has 2 entries for 1 representations. Give one for each, None where there is none.",
    ),
    Case(
        "constant source that is no tensor",
        lambda: swap(BASE, None, {"base": 1}, ["ones"]),
        iv.SourceError,
        ValueError,
        f"The source representation of '{NAME}' is a str, not a tensor.",
    ),
    Case(
        "constant sources of a wrong type",
        lambda: swap(BASE, None, {"base": 1}, "ones"),
        iv.SourceError,
        ValueError,
        "source_representations is a str. Give a tensor, a list with one for each representation, or a mapping from"
        " names.",
    ),
]

LOCATIONS = [
    Case(
        "position out of range",
        lambda: swap(BASE, [SOURCE], {"sources->base": (0, 7)}),
        iv.LocationRangeError,
        IndexError,
        f"Position 7 in the base locations of '{NAME}' is out of range for example 0, which has positions 0 to"
        " 6 (or -7 to -1).",
    ),
    Case(
        "source position out of range",
        lambda: swap(BASE, [tiny_inputs(LLAMA, length=3)], {"sources->base": 5}),
        iv.LocationRangeError,
        IndexError,
        f"Position 5 in the source locations of '{NAME}' is out of range for example 0, which has positions 0"
        " to 2 (or -3 to -1).",
    ),
    Case(
        "position that is padding",
        lambda: swap(tiny_inputs(LLAMA, padding="right"), [SOURCE], {"sources->base": 6}),
        iv.LocationRangeError,
        IndexError,
        f"Position 6 in the base locations of '{NAME}' is out of range for example 1, which has positions 0 to"
        " 5 (or -6 to -1).",
    ),
    Case(
        "head out of range",
        lambda: bound({"component": "head_value_output", "unit": "h"}, iv.ZeroIntervention)(
            BASE, unit_locations={"base": [KEY_VALUE_HEADS]}
        ),
        iv.LocationRangeError,
        IndexError,
        "Head 2 in the base locations of 'layer_0.head_value_output.h' is out of range for example 0, which has"
        " heads 0 to 1 (or -2 to -1).",
    ),
    Case(
        "wrong number of locations",
        lambda: swap(BASE, [SOURCE], {"sources->base": [[[0], [0]], [[1], [1]]]}),
        iv.LocationError,
        ValueError,
        f"The source locations have 2 entries for 1 interventions ({NAME}). Give one for each, None to skip.",
    ),
    Case(
        "locations for a wrong number of examples",
        lambda: swap(BASE, [SOURCE], {"sources->base": (0, [[[0], [0], [0]]])}),
        iv.LocationError,
        ValueError,
        f"The base locations of '{NAME}' list positions for 3 examples, and the batch has 2.",
    ),
    Case(
        "different numbers of source and base positions",
        lambda: swap(BASE, [SOURCE], {"sources->base": ([0, 1], [0, 1, 2])}),
        iv.LocationError,
        ValueError,
        f"'{NAME}' has 2 source units and 3 base units for example 0. Give as many, or one source unit for all.",
    ),
    Case(
        "whole source of another length",
        lambda: swap(BASE, [tiny_inputs(LLAMA, length=5)]),
        iv.LocationError,
        ValueError,
        f"'{NAME}' would put 5 source positions (the whole source) into 7 base positions (the whole base)."
        " Locate both sides with 'sources->base'.",
    ),
    Case(
        "duplicate positions to write",
        lambda: swap(BASE, [SOURCE], {"sources->base": ([0, 1], [3, -4])}),
        iv.LocationError,
        ValueError,
        f"The base locations of '{NAME}' name positions 3 more than once for example 0. Each can be written once.",
    ),
    Case(
        "duplicate heads to write",
        lambda: bound({"component": "head_query_output", "unit": "h.pos"}, iv.ZeroIntervention)(
            BASE, unit_locations={"base": iv.get_loc(([1, 1 - HEADS], 0), batch_size=2)}
        ),
        iv.LocationError,
        ValueError,
        "The base locations of 'layer_0.head_query_output.h.pos' name heads 1 more than once for example 0."
        " Each can be written once.",
    ),
    Case(
        "wrong number of units for one joint vector",
        lambda: bound({"low_rank_dimension": 2}, iv.LowRankRotatedSpaceIntervention)(
            BASE, [SOURCE], {"sources->base": [0, 1]}
        ),
        iv.LocationError,
        ValueError,
        f"'{NAME}' (LowRankRotatedSpaceIntervention) sees the positions of an example as one vector and is made"
        " for 1 (max_number_of_units), not for 2.",
    ),
    Case(
        "base locations for a skipped source",
        lambda: swap(BASE, [SOURCE], {"sources->base": ([None], [[[0], [0]]])}),
        iv.LocationError,
        ValueError,
        f"'{NAME}' has base locations and None for its source locations. Give both, or None in both to skip it.",
    ),
    Case(
        "position as a float",
        lambda: swap(BASE, [SOURCE], {"sources->base": 1.0}),
        iv.LocationError,
        ValueError,
        "1.0 among the source locations is not a position: give ints (-1 is the last), slices, names such as 'last',"
        " or parts of the text.",
    ),
    Case(
        "position as a bool",
        lambda: swap(BASE, [SOURCE], {"sources->base": True}),
        iv.LocationError,
        ValueError,
        "True among the source locations is not a position: give ints (-1 is the last), slices, names such as 'last',"
        " or parts of the text.",
    ),
    Case(
        "list where locations are named",
        lambda: swap(BASE, [SOURCE], [[[1]]]),
        iv.LocationError,
        ValueError,
        "unit_locations is a list. Give a mapping with the key 'sources->base' (a position, or a pair of source and"
        " base locations) or 'base' (base locations alone).",
    ),
    Case(
        "serial locations",
        lambda: swap(BASE, [SOURCE], {"source_0->base": 1}),
        iv.LocationError,
        ValueError,
        "unit_locations has the keys 'source_0->base'. Allowed: 'sources->base' or 'base', one of them. Arrow keys"
        " between sources belong to the serial mode.",
    ),
]

SUBSPACES = [
    Case(
        "dimension out of range",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=[3, HIDDEN]),
        iv.SubspaceRangeError,
        IndexError,
        f"'{NAME}': Subspace id 16 is out of range: the ids of its 16 dimensions are 0 to 15.",
    ),
    Case(
        "dimension out of range of an intervention of any width",
        lambda: bound({"intervention": iv.ZeroIntervention()}, iv.VanillaIntervention)(
            BASE, unit_locations={"base": 1}, subspaces=HIDDEN
        ),
        iv.SubspaceRangeError,
        IndexError,
        f"'{NAME}': Subspace id 16 is out of range: the ids of its 16 dimensions are 0 to 15.",
    ),
    Case(
        "part out of range",
        lambda: bound({"subspace_partition": [[0, 8], [8, 16]]})(
            BASE, [SOURCE], AT_1, subspaces=[[[0], [2]]]
        ),
        iv.SubspaceRangeError,
        IndexError,
        f"'{NAME}': Subspace id 2 for example 1 is out of range: the ids of its 2 parts are 0 to 1.",
    ),
    Case(
        "latent direction out of range",
        lambda: bound({"low_rank_dimension": 3}, iv.LowRankRotatedSpaceIntervention)(
            BASE, [SOURCE], AT_1, subspaces=3
        ),
        iv.SubspaceRangeError,
        IndexError,
        f"'{NAME}': Subspace id 3 is out of range: the ids of its 3 dimensions are 0 to 2.",
    ),
    Case(
        "negative dimension",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=-1),
        iv.SubspaceRangeError,
        IndexError,
        f"'{NAME}': Subspace id -1 is out of range: the ids of its 16 dimensions are 0 to 15.",
    ),
    Case(
        "dimension given twice",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=[[[0], [1, 1]]]),
        iv.SubspaceError,
        ValueError,
        f"'{NAME}': Subspace id 1 is given twice for example 1; name each dimension once.",
    ),
    Case(
        "subspaces for a wrong number of examples",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=[[[0]]]),
        iv.SubspaceError,
        ValueError,
        f"'{NAME}': subspaces has ids for 1 examples, but there are 2. Give one list for each example, or one"
        " flat list of ids for all.",
    ),
    Case(
        "subspaces for a wrong number of interventions",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=[[[0], [1]], [[0], [1]]]),
        iv.SubspaceError,
        ValueError,
        f"subspaces has 2 entries for 1 representations ({NAME}). Give one for each, None for all coordinates.",
    ),
    Case(
        "subspaces as text",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces="first"),
        iv.SubspaceError,
        ValueError,
        "subspaces is a str. Give an id, a list of ids for all, or the full form [interventions][examples][ids].",
    ),
    Case(
        "subspace ids as text",
        lambda: swap(BASE, [SOURCE], AT_1, subspaces=["first"]),
        iv.SubspaceError,
        ValueError,
        f"The subspaces of '{NAME}' are 'first'; in the full form they list the ids of each example, [[...],"
        " ...]. One flat list of ids, without more, is for all interventions.",
    ),
    Case(
        "subspaces for an intervention without any",
        lambda: bound({"intervention": torch.relu})(BASE, unit_locations={"base": 1}, subspaces=0),
        iv.SubspaceError,
        ValueError,
        f"'{NAME}': subspaces=0 was given, but CallableIntervention.forward takes no subspaces. Add the"
        " parameter, or leave them out.",
    ),
]

BEFORE_ANY_RUN = [*DECLARED, *INPUTS, *SOURCES, *LOCATIONS, *SUBSPACES]

IN_THE_RUN = [
    Case(
        "callable that returns another shape",
        lambda: bound({"intervention": halves})(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': {halves!r} returned (2, 1, 8) torch.float32 for an activation of (2, 1, 16) torch.float32."
        " Return a tensor of the same shape and dtype, or None to leave it as it is.",
    ),
    Case(
        "callable that returns another dtype",
        lambda: bound({"intervention": doubles_precision})(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': {doubles_precision!r} returned (2, 1, 16) torch.float64 for an activation of (2, 1, 16)"
        " torch.float32. Return a tensor of the same shape and dtype, or None to leave it as it is.",
    ),
    Case(
        "callable that returns no tensor",
        lambda: bound({"intervention": counts})(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': {counts!r} returned a int for an activation of (2, 1, 16) torch.float32. Return a tensor of the"
        " same shape and dtype, or None to leave it as it is.",
    ),
    Case(
        "callable that edits in place and returns nothing",
        lambda: bound({"intervention": forgets})(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': {forgets!r} changed its argument in place and returned None, so the change would be lost."
        " Return the new activation.",
    ),
    Case(
        "class that returns another shape",
        lambda: bound(types=Halves)(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': Halves returned shape (2, 1, 8) for units of shape (2, 1, 16). Return a tensor of that shape.",
    ),
    Case(
        "class that returns nothing",
        lambda: bound(types=Forgets)(BASE, unit_locations={"base": 1}),
        iv.EditError,
        ValueError,
        f"'{NAME}': Forgets returned a NoneType for units of shape (2, 1, 16). Return a tensor of that shape.",
    ),
]


class Runs:
    """Counts forward passes of both models, by hooks of the test's own."""

    def __init__(self) -> None:
        self.count = 0
        self.handles = [model.register_forward_pre_hook(self.see) for model in (LLAMA, GPT2)]

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.count += 1


@pytest.fixture
def runs():
    counter = Runs()
    yield counter
    for handle in counter.handles:
        handle.remove()


@pytest.mark.parametrize("case", BEFORE_ANY_RUN, ids=lambda case: case.name)
def test_bad_input_is_refused_before_any_run(case, runs):
    with pytest.raises(case.error) as caught:
        case.do()
    assert type(caught.value) in (case.error, *case.error.__subclasses__())
    assert isinstance(caught.value, case.builtin)
    assert str(caught.value) == case.message
    assert runs.count == 0


@pytest.mark.parametrize("case", IN_THE_RUN, ids=lambda case: case.name)
def test_what_only_the_run_can_tell_is_refused_there(case, runs):
    with pytest.raises(case.error) as caught:
        case.do()
    assert isinstance(caught.value, case.builtin)
    assert str(caught.value) == case.message
    assert runs.count == 1


def test_faults_of_several_interventions_are_listed_together(runs):
    model = bound([{"layer": 0, "name": "a"}, {"layer": 1, "name": "b"}, {"layer": 2, "name": "c"}])
    with pytest.raises(iv.SubspaceError) as caught:
        model(BASE, [SOURCE], AT_1, subspaces=[[[0], [HIDDEN]], None, [[1, 1], [0]]])
    assert str(caught.value) == (
        "2 faults in the call:"
        "\n- 'a': Subspace id 16 for example 1 is out of range: the ids of its 16 dimensions are 0 to 15."
        "\n- 'c': Subspace id 1 is given twice for example 0; name each dimension once."
    )
    with pytest.raises(iv.SourceError) as caught:
        model(BASE, None, {"base": 1}, {"b": torch.ones(3)}, subspaces=0)
    assert str(caught.value) == (
        "3 faults in the call:"
        "\n- 'a' (VanillaIntervention) needs a source, and source 0 is not given. Give one, or a constant"
        " source_representation; to skip the intervention, put None in its locations."
        "\n- The source representation of 'b' has shape (3,), which does not broadcast to its units, (2, 1, 16). The"
        " last axis must be 16, the others as they are or 1."
        "\n- 'c' (VanillaIntervention) needs a source, and source 2 is not given. Give one, or a constant"
        " source_representation; to skip the intervention, put None in its locations."
    )
    assert runs.count == 0


def test_the_counting_of_runs_counts(runs):
    swap(BASE, [SOURCE], AT_1)
    assert runs.count == 2


@pytest.mark.parametrize("case", BEFORE_ANY_RUN + IN_THE_RUN, ids=lambda case: case.name)
def test_messages_end_as_sentences_and_are_no_dumps(case):
    assert case.message.endswith((".", "?"))
    assert len(case.message) < 1000


def test_after_bad_input_the_model_works_as_before():
    with torch.no_grad():
        before = LLAMA(**BASE).logits
        for case in IN_THE_RUN:
            with pytest.raises(case.error):
                case.do()
        assert torch.equal(LLAMA(**BASE).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in LLAMA.modules())


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        (iv.ConfigError, (ValueError,)),
        (iv.UnknownNameError, (iv.ConfigError, LookupError)),
        (iv.LayerRangeError, (iv.ConfigError, IndexError)),
        (iv.ModelMismatchError, (iv.ConfigError,)),
        (iv.UnsupportedModelError, (LookupError,)),
        (iv.InputError, (ValueError,)),
        (iv.SourceError, (iv.InputError,)),
        (iv.LocationError, (ValueError,)),
        (iv.LocationRangeError, (iv.LocationError, IndexError)),
        (iv.SubspaceError, (ValueError,)),
        (iv.SubspaceRangeError, (iv.SubspaceError, IndexError)),
        (iv.EditError, (ValueError,)),
        (iv.NotFiredError, (RuntimeError,)),
        (iv.NotAvailableError, (NotImplementedError,)),
    ],
)
def test_the_tree_of_errors_is_as_drawn(error, parents):
    assert issubclass(error, (iv.IntervenableError, *parents))
    assert all(issubclass(error, parent) for parent in (iv.IntervenableError, *parents))
    assert error.__doc__


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "falcon"])
def test_every_component_that_an_architecture_lacks_is_refused_with_the_reason(family):
    model = tiny(family)
    found = map_of(model)
    for component in sorted(set(COMPONENTS) - set(found.components())):
        unit = COMPONENTS[component].units[0]
        with pytest.raises(iv.UnsupportedModelError) as caught:
            bound({"component": component, "unit": unit}, model=model)
        start, reason, rest = str(caught.value).split(":", 2)
        assert start == "representation 0"
        assert reason == f" {type(model).__name__} has no {component!r}"
        assert len(rest.splitlines()[0].split()) > 3
