"""Every difference from pyvene that the migration page lists, held by a test without pyvene.

The page names these tests, one for each row, and this file checks that the two lists are the same.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import HEAD_DIM, HEADS, tiny, tiny_inputs

PAGE = Path(__file__).parent.parent / "docs" / "migration-from-pyvene.md"


# --- a model whose output is the edited activation --------------------------------------------------------


class Line(nn.Module):
    """A model that hands its input through one place, `at`, and returns what it is there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.at = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.at.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.at(inputs)
        return result


AT = "at.output"


def on_line(
    interventions: Any,
    base: Tensor,
    sources: list[Tensor] | None = None,
    locations: Any = None,
    entry: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """What the interventions (classes or instances), all at the one place, make of the base."""
    listed = interventions if isinstance(interventions, list) else [interventions]
    representations = []
    for one in listed:
        field = "intervention_type" if isinstance(one, type) else "intervention"
        representations.append(iv.RepresentationConfig(component=AT, **{field: one}, **(entry or {})))
    model = iv.IntervenableModel(representations, Line(base.shape[-1]))
    with torch.no_grad():
        result: Tensor = model(base, sources, locations, **options).intervened
    return result


BASE = torch.arange(1.0, 13.0).reshape(1, 3, 4)
SOURCE = 10 * BASE


def entering(model: nn.Module, path: str) -> tuple[list[Tensor], Any]:
    """What goes into a module in the end, kept by a hook of the test's own, and the handle of that hook."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    return kept, model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)


def zeroed_positions(base: Tensor, locations: Any) -> list[list[int]]:
    """Which positions of each example zeroing at some locations clears."""
    result = on_line(iv.ZeroIntervention, base, None, locations)
    return [(row == 0).all(-1).nonzero().flatten().tolist() for row in result]


# --- declaring --------------------------------------------------------------------------------------------


def test_a_configuration_declares_nothing_by_itself():
    first, second = iv.IntervenableConfig(), iv.IntervenableConfig()
    assert first.representations == []
    first.add_intervention({"layer": 1})
    assert len(first.representations) == 1
    assert second.representations == []


def test_untyped_representations_take_the_type_of_the_configuration():
    config = iv.IntervenableConfig(
        [
            iv.RepresentationConfig(0),
            iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention),
            iv.RepresentationConfig(2, intervention=iv.CollectIntervention()),
        ],
        iv.AdditionIntervention,
    )
    made = iv.IntervenableModel(config, tiny("gpt2")).interventions.values()
    kinds = [iv.AdditionIntervention, iv.ZeroIntervention, iv.CollectIntervention]
    assert [type(one) for one in made] == kinds


def test_representations_are_added_whatever_they_bring():
    config = iv.IntervenableConfig([iv.RepresentationConfig(0)], iv.AdditionIntervention)
    config.add_intervention(iv.RepresentationConfig(1, intervention=iv.ZeroIntervention()))
    config.add_intervention([2, "mlp_output"])
    made = iv.IntervenableModel(config, tiny("gpt2")).interventions.values()
    kinds = [iv.AdditionIntervention, iv.ZeroIntervention, iv.AdditionIntervention]
    assert [type(one) for one in made] == kinds


class Doubler:
    def __call__(self, base: Tensor) -> Tensor:
        return base * 2

    def method(self, base: Tensor) -> Tensor:
        return base * 2


@pytest.mark.parametrize(
    "double",
    [Doubler(), Doubler().method, functools.partial(torch.mul, other=2), lambda base: base * 2],
    ids=["object", "bound method", "partial", "lambda"],
)
def test_any_callable_is_an_intervention(double):
    assert_close(on_line(double, BASE), BASE * 2)


def test_a_function_is_given_what_it_has_parameters_for():
    locations = {"sources->base": 0}
    expected = BASE.clone()
    expected[:, 0] = SOURCE[:, 0] - BASE[:, 0]
    assert_close(on_line(lambda base, source: source - base, BASE, [SOURCE], locations), expected)
    assert_close(on_line(torch.relu, -BASE), torch.zeros_like(BASE))
    assert_close(on_line(nn.LayerNorm(4), BASE), nn.LayerNorm(4)(BASE).detach())


def test_wrapped_models_print():
    model = iv.IntervenableModel(
        [iv.RepresentationConfig(intervention_type=iv.ZeroIntervention)], tiny("gpt2")
    )
    assert "ZeroIntervention" in str(model)
    assert "GPT2LMHeadModel" in str(model)
    assert "ZeroIntervention" in str(model.config)


def test_contradicting_types_are_an_error():
    entry = iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention)
    with pytest.raises(iv.ConfigError, match=r"ZeroIntervention.*VanillaIntervention"):
        iv.IntervenableConfig([entry], [iv.VanillaIntervention])


def test_an_unknown_component_is_an_error_with_the_nearest_name():
    with pytest.raises(iv.ConfigError, match=r"'mlp_ouput'.*\n?.*Did you mean 'mlp_output'"):
        iv.RepresentationConfig(0, "mlp_ouput")


@pytest.mark.parametrize(
    ("part", "swapped"),
    [([1, 3], [1, 2]), (iv.IndexSet([1, 3]), [1, 3]), (slice(1, 4), [1, 2, 3]), (range(0, 4, 3), [0, 3])],
)
def test_two_ints_of_a_partition_are_a_range_and_an_index_set_is_a_set(part, swapped):
    swap = iv.VanillaIntervention(embed_dim=4, subspace_partition=[part])
    result = on_line(swap, BASE, [SOURCE], {"sources->base": 0}, subspaces=0)
    assert (result != BASE)[0, 0].nonzero().flatten().tolist() == swapped


def test_the_fields_by_position_leave_out_the_hidden_one():
    constant = torch.ones(4)
    entry = iv.RepresentationConfig(
        0, "block_output", "pos", 1, None, None, None, None, None, None, None, constant, 8, "mine"
    )
    assert entry.source_representation is constant
    assert (entry.latent_dim, entry.name) == (8, "mine")
    with pytest.raises(iv.ConfigError, match="hidden_source_representation"):
        iv.RepresentationConfig(0, hidden_source_representation=True)


def test_names_are_readable_and_may_be_given():
    entries = [
        iv.RepresentationConfig(1, "mlp_output"),
        iv.RepresentationConfig(1, "head_value_output", "h.pos", name="head values"),
        iv.RepresentationConfig(0),
        iv.RepresentationConfig(0),
    ]
    names = [
        "layer_1.mlp_output.pos",
        "head values",
        "layer_0.block_output.pos#0",
        "layer_0.block_output.pos#1",
    ]
    assert list(iv.IntervenableModel(entries, tiny("gpt2")).interventions) == names


def test_older_names_are_accepted_with_a_warning():
    with pytest.warns(iv.RenamedWarning, match="intervenable_layer"):
        assert iv.RepresentationConfig(intervenable_layer=2).layer == 2
    with pytest.warns(iv.RenamedWarning, match="GET_LOC"):
        assert iv.GET_LOC is iv.get_loc
    with pytest.warns(iv.RenamedWarning, match="build_intervenable_model"):
        assert iv.build_intervenable_model is iv.IntervenableModel
    with pytest.warns(iv.RenamedWarning, match="RepresentationConfig"):
        assert iv.IntervenableRepresentationConfig is iv.RepresentationConfig


def test_use_fast_has_no_effect_and_says_so():
    base = torch.ones(2, 3, 4)
    with pytest.warns(iv.IntervenableWarning, match="use_fast"):
        model = iv.IntervenableModel(
            [iv.RepresentationConfig(component=AT, intervention_type=iv.ZeroIntervention)],
            Line(4),
            use_fast=True,
        )
    cleared = (model(base, None, {"base": [[[0], [2]]]}).intervened == 0).all(-1)
    assert cleared.nonzero().tolist() == [[0, 0], [1, 2]]


def test_wrapping_changes_nothing_about_the_model():
    model = tiny("gpt2").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    iv.IntervenableModel([iv.RepresentationConfig(1)], model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- models and components --------------------------------------------------------------------------------


def test_a_projection_wider_than_the_stream_is_edited_whole():
    model = tiny("qwen3")
    inputs = tiny_inputs(model)
    seen, handle = entering(model, "model.layers.1.self_attn.q_norm")
    entry = iv.RepresentationConfig(1, "query_output", intervention_type=iv.ZeroIntervention)
    iv.IntervenableModel([entry], model)(inputs, None, {"base": 3})
    handle.remove()
    query = seen[0].flatten(2)
    assert model.config.hidden_size != HEADS * HEAD_DIM
    assert query[:, 3].abs().max() == 0
    assert query[:, 2].abs().max() > 0


def test_heads_are_as_wide_as_the_model_says():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    seen, handle = entering(model, "model.layers.1.self_attn.o_proj")
    entry = iv.RepresentationConfig(
        1, "head_attention_value_output", "h", intervention_type=iv.ZeroIntervention
    )
    iv.IntervenableModel([entry], model)(inputs, None, {"base": [2]})
    handle.remove()
    by_heads = seen[0].unflatten(-1, (HEADS, HEAD_DIM))
    assert by_heads[:, :, 2].abs().max() == 0
    assert (by_heads[:, :, [0, 1, 3]].abs() > 0).all()


@pytest.mark.parametrize(
    ("family", "module", "start"),
    [
        ("gpt_neo", "transformer.h.1.attn.attention.v_proj", 4),
        ("qwen2", "model.layers.1.self_attn.v_proj", 4),
        ("gemma", "model.layers.1.self_attn.v_proj", 6),
        # Query, key and value of each head side by side.
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value", 20),
    ],
)
def test_components_that_tables_list_or_lack_are_reached(family, module, start):
    model = tiny(family)
    inputs = tiny_inputs(model)
    outputs: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda *call: outputs.append(call[-1]))
    entry = iv.RepresentationConfig(1, "head_value_output", "h", intervention_type=iv.CollectIntervention)
    (head,) = iv.IntervenableModel([entry], model)(inputs, None, {"base": [1]}).collected.values()
    handle.remove()
    assert_close(head[:, 0], outputs[0][..., start : start + head.shape[-1]])


def test_heads_are_units_of_head_components_alone():
    with pytest.raises(iv.ConfigError, match="head_value_output"):
        iv.RepresentationConfig(0, "value_output", "h.pos")
    with pytest.raises(iv.ConfigError, match=r"'h' or 'h\.pos'"):
        iv.RepresentationConfig(0, "head_value_output", "pos")


def test_a_fused_projection_is_always_split():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    entries = [
        iv.RepresentationConfig(1, name, intervention_type=iv.CollectIntervention)
        for name in ("query_output", "key_output", "value_output")
    ]
    outputs: list[Tensor] = []
    fused = model.get_submodule("transformer.h.1.attn.c_attn")
    handle = fused.register_forward_hook(lambda *call: outputs.append(call[-1]))
    collected = iv.IntervenableModel(entries, model)(inputs).collected
    handle.remove()
    assert [tuple(part.shape) for part in collected.values()] == [(2, 7, 16)] * 3
    assert_close(torch.cat(list(collected.values()), -1), outputs[0])


def test_attention_weights_are_read_and_written():
    model = tiny("gpt2", attention="eager")
    inputs = tiny_inputs(model)
    truth = model(**inputs, output_attentions=True).attentions[1]
    reader = iv.RepresentationConfig(
        1, "attention_weight", "h", intervention=iv.CollectIntervention(), name="read"
    )
    writer = iv.RepresentationConfig(
        1, "attention_weight", "h", intervention=iv.ZeroIntervention(), name="write"
    )
    both = iv.IntervenableModel([reader, writer], model)(inputs, output_attentions=True)
    assert_close(both.collected["read"], truth, rtol=0, atol=0)
    assert not both.intervened.attentions[1].any()
    assert_close(both.intervened.attentions[0], model(**inputs, output_attentions=True).attentions[0])


# --- running ----------------------------------------------------------------------------------------------


def test_hooks_of_others_stay():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    seen, handle = entering(model, "transformer.h.2")
    zero = iv.IntervenableModel([iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)], model)
    zero(inputs, None, {"base": 0})
    model(**inputs)
    handle.remove()
    assert len(seen) == 2
    assert seen[0][:, 0].abs().max() == 0
    assert seen[1][:, 0].abs().max() > 0


def test_hidden_states_are_recorded_during_and_after_a_call():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    before = model(**inputs, output_hidden_states=True).hidden_states
    zero = iv.IntervenableModel([iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)], model)
    during = zero(inputs, None, {"base": 0}, output_hidden_states=True).intervened.hidden_states
    after = model(**inputs, output_hidden_states=True).hidden_states
    assert len(before) == len(during) == len(after) == 4
    assert during[2][:, 0].abs().max() == 0
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


class Keywords(nn.Module):
    """A model that calls its block by keyword, with the hidden states not first."""

    class Block(nn.Module):
        def forward(self, weights: Tensor, hidden_states: Tensor) -> Tensor:
            return weights * hidden_states

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.block(weights=torch.full_like(inputs, 3.0), hidden_states=inputs)
        return result


def test_hidden_states_are_found_among_keywords():
    entry = iv.RepresentationConfig(component="block.input", intervention=lambda base: base + 1)
    result = iv.IntervenableModel([entry], Keywords())(BASE, None, {"base": 1}).intervened
    expected = 3 * BASE
    expected[:, 1] += 3
    assert_close(result, expected)


def test_nothing_of_the_users_is_written_to():
    model = tiny("llama")  # whose first block is given the embeddings themselves
    base, source = (
        model.model.embed_tokens(tiny_inputs(model, seed=seed)["input_ids"]).detach() for seed in (0, 1)
    )
    constant = torch.ones(16)
    kept = [tensor.clone() for tensor in (base, source, constant)]
    locations = {"sources->base": ([[[0], [1]], [[2], [3]]], [[[0], [1]], [[2], [3]]])}
    entries = [
        iv.RepresentationConfig(0, "block_input", name="swap"),
        iv.RepresentationConfig(0, "block_input", intervention_type=iv.AdditionIntervention),
    ]
    wrapped = iv.IntervenableModel(entries, model)
    values = {"swap": constant}
    output = wrapped(
        {"inputs_embeds": base},
        [None, {"inputs_embeds": source}],
        locations,
        values,
        output_original_output=True,
    )
    assert not torch.equal(output.intervened.logits, output.original.logits)
    assert all(torch.equal(tensor, old) for tensor, old in zip((base, source, constant), kept, strict=True))
    assert locations == {"sources->base": ([[[0], [1]], [[2], [3]]], [[[0], [1]], [[2], [3]]])}
    assert list(values) == ["swap"]


@pytest.mark.parametrize(
    ("family", "own", "others"),
    [
        ("gptj", "attn", "mlp"),  # one norm feeds both
        ("olmo2", "self_attn", "post_attention_layernorm"),  # the stream itself goes in
    ],
)
def test_an_edit_of_an_input_reaches_that_module_alone(family, own, others):
    model = tiny(family)
    inputs = tiny_inputs(model)
    block = {"gptj": "transformer.h.1", "olmo2": "model.layers.1"}[family]
    entry = iv.RepresentationConfig(1, "attention_input", intervention_type=iv.ZeroIntervention)
    wrapped = iv.IntervenableModel([entry], model)
    if family == "gptj":
        seen, handle = entering(model, f"{block}.{others}")
        output = wrapped(inputs, None, {"base": 3}, output_original_output=True)
        handle.remove()
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(output.intervened.logits, output.original.logits)
        return
    # After attention over a cleared input, OLMo 2 adds the stream as it was.
    stream, first = entering(model, block)
    added, second = entering(model, f"{block}.mlp")
    contribution: list[Tensor] = []
    third = model.get_submodule(f"{block}.{others}").register_forward_hook(
        lambda *call: contribution.append(call[-1].detach().clone())
    )
    wrapped(inputs, None, {"base": 3})
    for handle in (first, second, third):
        handle.remove()
    assert_close(added[0], stream[0] + contribution[0])


def test_a_list_of_sources_keeps_its_length():
    sources = [SOURCE]
    result = on_line([iv.VanillaIntervention, iv.AdditionIntervention], BASE, sources, {"sources->base": 1})
    assert len(sources) == 1
    assert_close(result[:, 1], 2 * SOURCE[:, 1])


def test_the_batch_is_read_from_the_tokens():
    model = tiny("gpt2")
    tokens = tiny_inputs(model, batch=3)["input_ids"]
    base = {"position_ids": torch.arange(7)[None], "input_ids": tokens}
    entry = iv.RepresentationConfig(1, intervention_type=iv.CollectIntervention)
    (reading,) = iv.IntervenableModel([entry], model)(base, None, {"base": 2}).collected.values()
    assert reading.shape == (3, 1, 16)


def test_an_intervention_without_its_source_is_an_error():
    with pytest.raises(iv.SourceError, match="needs a source"):
        on_line(iv.VanillaIntervention, BASE, None, {"base": 0})
    with pytest.raises(iv.SourceError, match="needs a source"):
        on_line(iv.VanillaIntervention, BASE)
    swaps = [iv.VanillaIntervention(), iv.VanillaIntervention()]
    only_second = ([None, [[1]]], [None, [[1]]])
    result = on_line(swaps, BASE, [None, SOURCE], {"sources->base": only_second})
    assert_close(result[:, 1], SOURCE[:, 1])


def test_the_pair_is_always_original_and_intervened():
    entries = [
        iv.RepresentationConfig(component=AT, intervention_type=iv.CollectIntervention, name="before"),
        iv.RepresentationConfig(component=AT, intervention_type=iv.ZeroIntervention),
        iv.RepresentationConfig(component=AT, intervention_type=iv.CollectIntervention, name="after"),
    ]
    output = iv.IntervenableModel(entries, Line(4))(BASE, None, {"base": 2}, output_original_output=True)
    original, intervened = output
    assert torch.equal(original, BASE)
    assert intervened[:, 2].abs().max() == 0
    assert list(output.collected) == ["before", "after"]
    assert torch.equal(output.collected["before"], BASE[:, 2:])
    assert output.collected["after"].abs().max() == 0


def test_options_of_the_model_reach_both_runs_of_the_base():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    zero = iv.IntervenableModel([iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)], model)
    original, intervened = zero(
        inputs, None, {"base": 3}, output_original_output=True, labels=inputs["input_ids"], logits_to_keep=0
    )
    assert original.loss == model(**inputs, labels=inputs["input_ids"]).loss
    assert intervened.loss != original.loss


def test_without_interventions_the_plain_output_is_the_intervened_one():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    original, intervened = iv.IntervenableModel([], model)(inputs)
    assert original is None
    assert torch.equal(intervened.logits, model(**inputs).logits)


# --- locations --------------------------------------------------------------------------------------------


ONES = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("locations", "cleared"),
    [
        ({"base": 1}, [[1], [1]]),
        ({"base": [0, 1]}, [[0, 1], [0, 1]]),
        ({"base": [0, 1, 2]}, [[0, 1, 2], [0, 1, 2]]),
        ({"sources->base": [0, 1]}, [[0, 1], [0, 1]]),
        ({"base": [[[0], [2]]]}, [[0], [2]]),
    ],
)
def test_a_list_is_a_set_of_positions(locations, cleared):
    assert zeroed_positions(ONES, locations) == cleared


def test_only_a_tuple_is_a_pair_and_base_alone_has_none():
    assert zeroed_positions(ONES, {"sources->base": (0, 1)}) == [[1], [1]]
    swapped = on_line(iv.VanillaIntervention, BASE, [SOURCE], {"sources->base": (0, 2)})
    assert_close(swapped[:, 2], SOURCE[:, 0])
    with pytest.raises(iv.LocationError, match="no source side"):
        zeroed_positions(ONES, {"base": (0, 1)})


def test_short_locations_leave_nothing_behind():
    entry = iv.RepresentationConfig(component=AT, intervention_type=iv.ZeroIntervention)
    model = iv.IntervenableModel([entry], Line(3))
    model(ONES, None, {"base": 1})
    result = model(ONES, None, {"base": [[[0], [2]]]}).intervened
    assert (result == 0).all(-1).nonzero().tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize(
    ("locations", "cleared"),
    [
        ({"base": -1}, [[3], [3]]),
        ({"base": [slice(1, 3)]}, [[1, 2], [1, 2]]),
        ({"base": torch.tensor([[True, False, False, True], [False, True, False, False]])}, [[0, 3], [1]]),
        ({"base": [[[0, -1, 2], [1]]]}, [[0, 2, 3], [1]]),
    ],
    ids=["negative", "slice", "mask", "ragged"],
)
def test_positions_may_be_negative_slices_masks_and_ragged(locations, cleared):
    assert zeroed_positions(ONES, locations) == cleared


def test_none_is_the_whole_activation():
    assert zeroed_positions(ONES, {"base": None}) == [[0, 1, 2, 3]] * 2
    assert zeroed_positions(ONES, None) == [[0, 1, 2, 3]] * 2


def test_a_short_location_of_heads_and_positions_means_positions_of_every_head():
    model = tiny("llama")
    seen, handle = entering(model, "model.layers.1.self_attn.o_proj")
    entry = iv.RepresentationConfig(
        1, "head_attention_value_output", "h.pos", intervention_type=iv.ZeroIntervention
    )
    iv.IntervenableModel([entry], model)(tiny_inputs(model), None, {"base": 3})
    handle.remove()
    assert (seen[0] == 0).all(-1).nonzero().tolist() == [[0, 3], [1, 3]]


def test_positions_count_the_real_tokens_of_each_example():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="left")  # the second example has one position of padding
    seen, handle = entering(model, "model.layers.2")
    entry = iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)
    wrapped = iv.IntervenableModel([entry], model)

    def cleared(locations: Any, **options: Any) -> list[list[int]]:
        wrapped(inputs, None, {"base": locations}, **options)
        return (seen[-1] == 0).all(-1).nonzero().tolist()

    assert cleared(0) == [[0, 0], [1, 1]]
    assert cleared([[[2], [2]]]) == [[0, 2], [1, 3]]
    assert cleared(2, relative_to="tensor") == [[0, 2], [1, 2]]
    handle.remove()


def test_a_position_is_written_once():
    with pytest.raises(iv.LocationError, match="more than once"):
        zeroed_positions(ONES, {"base": [1, 1]})
    with pytest.raises(iv.LocationError, match="more than once"):
        zeroed_positions(ONES, {"base": [1, -3]})
    entry = iv.RepresentationConfig(component=AT, intervention_type=iv.CollectIntervention)
    (reading,) = iv.IntervenableModel([entry], Line(4))(BASE, None, {"base": [1, 1]}).collected.values()
    assert torch.equal(reading, BASE[:, [1, 1]])


def test_lists_in_one_list_are_refused():
    with pytest.raises(iv.LocationError, match=r"\[interventions\]\[examples\]\[positions\]"):
        zeroed_positions(ONES, {"base": [[0, 1], [2, 3]]})


def test_one_source_unit_serves_several_base_units():
    result = on_line(iv.VanillaIntervention, BASE, [SOURCE], {"sources->base": ([[[1]]], [[[0, 2]]])})
    assert_close(result, torch.stack([SOURCE[:, 1], BASE[:, 1], SOURCE[:, 1]], 1))
    with pytest.raises(iv.LocationError, match="2 source units and 3 base units"):
        on_line(iv.VanillaIntervention, BASE, [SOURCE], {"sources->base": ([[[0, 1]]], [[[0, 1, 2]]])})


# --- sources, groups, links -------------------------------------------------------------------------------


def test_group_keys_are_anything_in_any_order_and_optional():
    entries = [
        iv.RepresentationConfig(component=AT, group_key="b"),
        iv.RepresentationConfig(component=AT, group_key=7),
        iv.RepresentationConfig(component=AT, group_key="b"),
        iv.RepresentationConfig(component=AT),
    ]
    base = torch.zeros(1, 4, 2)
    sources = [torch.full((1, 4, 2), value) for value in (1.0, 2.0, 3.0)]
    locations = {"sources->base": ([[[0]], [[1]], [[2]], [[3]]],) * 2}
    result = iv.IntervenableModel(entries, Line(2))(base, sources, locations).intervened
    assert result[0, :, 0].tolist() == [1, 2, 1, 3]


def test_a_source_that_nobody_takes_is_an_error():
    with pytest.raises(iv.SourceError, match="would not be used"):
        on_line(iv.ZeroIntervention, BASE, [SOURCE], {"base": 0})


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 4)])
def test_constant_sources_broadcast_as_tensors_do(shape):
    constant = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    base = torch.randn(2, 3, 4)
    entry = {"source_representation": constant}
    assert_close(on_line(iv.AdditionIntervention, base, entry=entry), base + constant)
    assert_close(
        on_line(iv.VanillaIntervention, base, source_representations=constant), constant.expand(2, 3, 4)
    )


def test_trainable_interventions_use_a_constant_source():
    swap = iv.LowRankRotatedSpaceIntervention(4, 2, source_representation=torch.zeros(4))
    swap.rotation.weight.data = torch.eye(4)[:, :2]
    result = on_line(swap, BASE, None, {"base": 0})
    assert_close(result[0, 0], torch.tensor([0.0, 0.0, 3.0, 4.0]))


def test_source_representations_by_name_must_fit_the_names():
    entries = [iv.RepresentationConfig(component=AT, name=name) for name in ("first", "second")]
    model = iv.IntervenableModel(entries, Line(4))
    values = {"first": torch.zeros(4), "second": torch.ones(4)}
    locations = {"base": [[[0]], [[1]]]}
    result = model(BASE, None, locations, source_representations=values).intervened
    assert result[0, :2].tolist() == [[0.0] * 4, [1.0] * 4]
    mixed = model(BASE, [SOURCE], {"sources->base": 2}, {"first": torch.zeros(4)}).intervened
    assert torch.equal(mixed[:, 2], SOURCE[:, 2])
    with pytest.raises(iv.SourceError, match="'thrid'"):
        model(BASE, None, locations, source_representations={**values, "thrid": torch.ones(4)})
    with pytest.raises(iv.SourceError, match=r"'second'.*needs a source"):
        model(BASE, None, locations, source_representations={"first": torch.zeros(4)})


def test_linked_interventions_share_weights_and_nothing_else():
    entries = [
        iv.RepresentationConfig(
            component=AT, intervention_type=iv.AdditionIntervention, intervention_link_key="one"
        )
        for _ in range(2)
    ]
    model = iv.IntervenableModel(entries, Line(4))
    result = model(BASE, None, {"base": [[[1]], [[2]]]}, source_representations=torch.ones(4)).intervened
    expected = BASE.clone()
    expected[:, 1:] += 1
    assert_close(result, expected)
    first, second = model.interventions.values()
    assert first is second


# --- subspaces --------------------------------------------------------------------------------------------


def test_ids_belong_to_examples():
    base = torch.ones(2, 2, 3)
    result = on_line(iv.ZeroIntervention, base, subspaces=[[[0], [1]]])
    assert result.tolist() == [[[0, 1, 1]] * 2, [[1, 0, 1]] * 2]
    result = on_line(iv.ZeroIntervention, base, subspaces=[iv.SubspacePerPosition([[0], [1]])])
    assert result.tolist() == [[[0, 1, 1], [1, 0, 1]]] * 2


def test_ids_that_do_not_exist_or_come_twice_are_errors():
    with pytest.raises(iv.SubspaceRangeError, match="4"):
        on_line(iv.VanillaIntervention(embed_dim=4), BASE, [SOURCE], subspaces=[1, 4])
    with pytest.raises(iv.SubspaceError, match="twice"):
        on_line(iv.VanillaIntervention, BASE, [SOURCE], subspaces=[1, 1])
    with pytest.raises(iv.ConfigError, match="twice"):
        iv.RepresentationConfig(component=AT, subspace_partition=[[0, 1, 2, 1]])


def test_ids_of_a_low_rank_rotation_may_differ_between_examples():
    base, source = torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
    swap = iv.LowRankRotatedSpaceIntervention(3, 2)
    swap.rotation.weight.data = torch.eye(3)[:, :2]
    result = on_line(swap, base, [source], {"sources->base": 0}, subspaces=[[[0], [0, 1]]])
    assert_close(result[:, 0], torch.tensor([[1.0, 0, 0], [1, 1, 0]]))


@pytest.mark.parametrize(
    "kind",
    [
        iv.SigmoidMaskIntervention,
        iv.SigmoidMaskRotatedSpaceIntervention,
        iv.BoundlessRotatedSpaceIntervention,
    ],
)
def test_soft_masks_keep_to_the_chosen_coordinates(kind):
    swap = kind(4)
    if hasattr(swap, "rotation"):
        swap.rotation.weight.data = torch.eye(4)
    result = on_line(swap, BASE, [SOURCE], {"sources->base": 0}, subspaces=[1, 2])
    assert (result != BASE)[0, 0].tolist() == [False, True, True, False]


# --- interventions ----------------------------------------------------------------------------------------


class Shifted(iv.Intervention):
    """A class of a user's own: needs no `__init__`, no flags, no `**kwargs`."""

    seen: tuple[int, ...] = ()

    def forward(self, base: Tensor) -> Tensor:
        self.seen = tuple(base.shape)
        return base + torch.tensor([1.0, 0.0, 0.0, 0.0])


def test_a_class_of_ones_own_sees_one_vector_for_each_unit():
    shift = Shifted()
    result = on_line(shift, BASE, None, {"base": [0, 2]})
    assert shift.seen == (1, 2, 4)
    assert (result - BASE)[0, :, 0].tolist() == [1, 0, 1]


def test_one_base_class_serves_all_interventions():
    class Mean(iv.Intervention):
        def forward(self, base: Tensor, source: Tensor) -> Tensor:
            return (base + source) / 2

    assert not Shifted.needs_source
    assert Mean.needs_source
    assert_close(on_line(Mean, BASE, [SOURCE]), (BASE + SOURCE) / 2)
    assert_close(on_line(Mean, BASE, source_representations=torch.zeros(4)), BASE / 2)


@pytest.mark.parametrize("positions", [[0], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_noise_goes_to_any_number_of_positions_and_is_new_for_each_example(positions):
    base = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    noise = iv.NoiseIntervention(std=2.0, seed=0)
    model = Line(4).to(torch.bfloat16)
    entry = iv.RepresentationConfig(component=AT, intervention=noise)
    with torch.no_grad():
        result = iv.IntervenableModel([entry], model)(base, None, {"base": positions}).intervened
    assert result.dtype == torch.bfloat16
    assert (result[0] != 0).any(-1).nonzero().flatten().tolist() == positions
    assert not torch.equal(result[0], result[1])


def test_the_fixed_noise_begins_as_pyvenes():
    noise = iv.NoiseIntervention(seed=1, shape="fixed")
    result = on_line(noise, torch.zeros(2, 3, 3), None, {"base": 1})
    assert_close(result[:, 1], torch.tensor([[0.2187, -0.0824, -0.0711]] * 2), atol=1e-4, rtol=0)


def test_boundless_masks_sit_between_the_coordinates():
    swap = iv.BoundlessRotatedSpaceIntervention(4, temperature=0.1)
    swap.rotation.weight.data = torch.eye(4)
    expected = torch.tensor([0.99331, 0.99331, 0.00669, 0.0000003])
    assert_close(swap.mask_weights().detach(), expected, atol=1e-5, rtol=0)
    result = on_line(swap, BASE, [SOURCE], {"sources->base": 0})
    assert_close(result[:, 0], BASE[:, 0] + expected * (SOURCE - BASE)[:, 0], atol=1e-3, rtol=0)


def test_boundless_rotations_take_batches_and_heads():
    model = tiny("gpt2")
    base, source = (tiny_inputs(model, batch=3, seed=seed) for seed in (0, 1))
    entry = iv.RepresentationConfig(
        1, "head_value_output", "h", 2, intervention_type=iv.BoundlessRotatedSpaceIntervention
    )
    output = iv.IntervenableModel([entry], model)(
        base, [source], {"sources->base": [0, 2]}, output_original_output=True
    )
    assert not torch.equal(output.intervened.logits, output.original.logits)


@pytest.mark.parametrize(
    "kind",
    [
        iv.SigmoidMaskIntervention,
        iv.SigmoidMaskRotatedSpaceIntervention,
        iv.BoundlessRotatedSpaceIntervention,
    ],
)
def test_every_soft_mask_has_a_temperature_to_set(kind):
    swap = kind(4)
    soft = swap.mask_weights()
    swap.set_temperature(0.5)
    assert float(swap.temperature) == 0.5
    assert not swap.temperature.requires_grad
    if kind is not iv.SigmoidMaskIntervention:  # whose mask starts at 0
        assert not torch.equal(swap.mask_weights(), soft)


def test_autoencoders_swap_all_latents_unless_told_which():
    encoder = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    decoder = torch.tensor([[1.0, 0], [0, 1], [10, 0], [0, 10]])
    swap = iv.JumpReLUAutoencoderIntervention(2, 4, W_enc=encoder, W_dec=decoder)
    base, source = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 3.0]]])
    assert on_line(swap, base, [source])[0, 0].tolist() == [22, 33]
    assert on_line(swap, base, [source], subspaces=[0, 1])[0, 0].tolist() == [12, 13]
    trained = iv.AutoencoderIntervention(2, 3)
    whole = trained.encode(source) @ trained.decoder.weight.mT + trained.decoder.bias
    assert_close(on_line(trained, base, [source]), whole.detach())


def test_what_an_autoencoder_cannot_express_may_be_kept():
    swap = iv.AutoencoderIntervention(4, 2, error="keep")
    assert torch.equal(on_line(swap, BASE, [BASE], {"sources->base": 1}), BASE)


def test_principal_components_leave_the_rest_and_are_not_trained():
    swap = iv.PCARotatedSpaceIntervention(torch.tensor([[0.6, 0.8, 0, 0]]))
    base, source = torch.tensor([[[1.0, 0, 5, 6]]]), torch.tensor([[[0.0, 1, 7, 8]]])
    assert_close(on_line(swap, base, [source])[0, 0], torch.tensor([1.12, 0.16, 5, 6]))
    assert not list(swap.parameters())


class InFloat32(iv.Intervention):
    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        return (base + source).float() / 2


@pytest.mark.parametrize(
    "swap",
    [
        InFloat32(),
        iv.SigmoidMaskIntervention(4),
        iv.PCARotatedSpaceIntervention(torch.eye(4)[:2]),
        iv.JumpReLUAutoencoderIntervention(4, 3),
        iv.RotatedSpaceIntervention(4),
    ],
    ids=lambda swap: type(swap).__name__,
)
def test_results_have_the_dtype_of_the_base(swap):
    base, source = BASE.to(torch.bfloat16), SOURCE.to(torch.bfloat16)
    entry = iv.RepresentationConfig(component=AT, intervention=swap)
    model = iv.IntervenableModel([entry], Line(4).to(torch.bfloat16))
    result = model(base, [source], {"sources->base": 0}).intervened
    assert result.dtype == torch.bfloat16
    assert not torch.equal(result, base)


def test_a_rotation_is_one_plain_weight():
    swap = iv.LowRankRotatedSpaceIntervention(2, 1)
    assert list(swap.state_dict()) == ["rotation.weight"]
    swap.rotation.weight.data = torch.tensor([[6.0], [8.0]])  # any length: its direction counts
    result = on_line(swap, torch.tensor([[[1.0, 0.0]]]), [torch.tensor([[[0.0, 1.0]]])])
    assert_close(result[0, 0], torch.tensor([1.12, 0.16]))


def test_a_module_called_by_keyword_can_be_skipped():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    entry = iv.RepresentationConfig(1, "attention_output", intervention_type=iv.SkipIntervention)
    went_in, first = entering(model, "model.layers.1.self_attn")
    stream, second = entering(model, "model.layers.1")
    after, third = entering(model, "model.layers.1.post_attention_layernorm")
    iv.IntervenableModel([entry], model)(inputs, [inputs])
    for handle in (first, second, third):
        handle.remove()
    assert_close(after[-1], stream[-1] + went_in[-1])


def test_a_function_that_writes_in_place_has_to_return():
    def forgets(base: Tensor) -> None:
        base.zero_()

    def returns(base: Tensor) -> Tensor:
        return base.zero_()

    with pytest.raises(iv.EditError, match="in place and returned None"):
        on_line(forgets, BASE)
    assert on_line(returns, BASE).abs().max() == 0
    assert torch.equal(on_line(lambda base: None, BASE), BASE)


# --- readings and helpers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[1], [0, 3, 5]])
def test_a_reading_has_every_unit_whole(positions):
    model = tiny("gpt2")
    entry = iv.RepresentationConfig(1, "block_output", "pos", 1, intervention_type=iv.CollectIntervention)
    (reading,) = iv.IntervenableModel([entry], model)(
        tiny_inputs(model), None, {"base": positions}
    ).collected.values()
    assert reading.shape == (2, len(positions), 16)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_head_of_any_language_model_makes_distributions(family):
    model = tiny(family)
    output = model(**tiny_inputs(model), output_hidden_states=True)
    last = output.hidden_states[-1]
    assert_close(iv.embed_to_distrib(model, last), output.logits.softmax(-1))
    assert_close(iv.embed_to_distrib(model, last[0, 0], log=True), output.logits[0, 0].log_softmax(-1))


def test_get_loc_takes_positions_alone_and_lists():
    assert iv.get_loc((2, 3), batch_size=2) == [[[[2], [2]], [[3], [3]]]]
    assert iv.get_loc(4, batch_size=2) == [[[4], [4]]]
    assert iv.get_loc(([1, 2], [0, 3]), batch_size=1) == [[[[1, 2]], [[0, 3]]]]


# --- the page ---------------------------------------------------------------------------------------------


def rows_of_the_page() -> list[list[str]]:
    """The cells of every row of the page whose last cell names a test."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if row[-1].startswith("`test_")]


def promises_of_this_file() -> set[str]:
    names = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), flags=re.MULTILINE)
    return {name for name in names if not name.startswith("test_the_page_")}


def test_the_page_has_a_test_for_every_row_and_a_row_for_every_test():
    named = [row[-1].strip("`") for row in rows_of_the_page()]
    assert len(named) == len(set(named)), "two rows name one test"
    assert set(named) == promises_of_this_file()


def test_the_page_says_what_either_does_and_why_in_every_row():
    for row in rows_of_the_page():
        assert len(row) == 4, row
        assert all(len(cell) > 5 for cell in row), row
