"""Mistakes about attention matrices: errors of ours, word for word, and before anything runs where that can be."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from declared import hooks_of, wrapped

import intervenable as iv
from tiny_models import tiny, tiny_inputs

NAME = "layer_1.attention_pattern.h.query.key"


def edit(unit="h.query.key", component="attention_pattern", intervention=None, **fields):
    return iv.RepresentationConfig(
        1, component, unit, intervention=intervention or iv.ZeroIntervention(), **fields
    )


def swap(unit="h", **fields):
    return edit(unit, intervention=iv.VanillaIntervention(), **fields)


@contextmanager
def no_run_of(model):
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    yield
    handle.remove()
    assert runs == []


def refused(model, representation, call=(), **options):
    """The error of a call that must not run the model."""
    declared = wrapped(model, representation)
    with no_run_of(model), pytest.raises(iv.IntervenableError) as caught, torch.no_grad():
        declared(tiny_inputs(model), *call, **options)
    return caught.value


# Where


@pytest.mark.parametrize(
    ("representation", "message"),
    [
        (
            edit(where={"heads": 4}),
            f"Head 4 in the base locations of {NAME!r} is out of range for example 0, which has heads 0 to 3 (or -4"
            " to -1).",
        ),
        (
            edit("h", component="rotary_key", where={"heads": 2}),
            "Head 2 in the base locations of 'layer_1.rotary_key.h' is out of range for example 0, which has heads 0"
            " to 1 (or -2 to -1).",
        ),
        (
            edit(where={"queries": [1, 7]}),
            f"Query 7 in the base locations of {NAME!r} is out of range for example 0, which has queries 0 to 6 (or"
            " -7 to -1).",
        ),
        (
            edit(where={"keys": -8}),
            f"Key -8 in the base locations of {NAME!r} is out of range for example 0, which has keys 0 to 6 (or -7 to"
            " -1).",
        ),
    ],
)
def test_a_head_query_or_key_that_is_not_there_is_named(representation, message):
    error = refused(tiny("llama"), representation)
    assert isinstance(error, iv.LocationRangeError)
    assert str(error) == message


def test_queries_and_keys_count_the_real_tokens_of_each_example():
    model = tiny("llama")
    declared = wrapped(model, edit(where={"keys": 6}))
    with no_run_of(model), pytest.raises(iv.LocationRangeError) as caught:
        declared(tiny_inputs(model, padding="left"))
    assert str(caught.value) == (
        f"Key 6 in the base locations of {NAME!r} is out of range for example 1, which has keys 0 to 5 (or -6 to -1)."
    )


HIDDEN = (
    "which the causal mask hides from all queries chosen (the last is {last}): nothing would change. Choose later"
    " queries, or earlier keys."
)


@pytest.mark.parametrize(
    ("representation", "locations", "message"),
    [
        (
            edit(where={"queries": [1, 2], "keys": [3, 0]}),
            None,
            f"The base locations of {NAME!r} name keys 3 for example 0, {HIDDEN.format(last=2)}",
        ),
        (
            edit(component="attention_scores", intervention=iv.KnockoutIntervention()),
            {"base": [[[[0], [1]], [[-1], [2]], [[6], [0, 4, 5]]]]},
            "The base locations of 'layer_1.attention_scores.h.query.key' name keys 4, 5 for example 1,"
            f" {HIDDEN.format(last=2)}",
        ),
    ],
)
def test_a_key_that_no_chosen_query_can_read_is_named(representation, locations, message):
    error = refused(tiny("gpt2"), representation, (None, locations))
    assert isinstance(error, iv.LocationError)
    assert str(error) == message


def test_a_key_ahead_of_a_query_is_fine_where_queries_read_ahead_or_one_of_them_reads_it():
    for family, where in (("bert", {"queries": 1, "keys": 5}), ("gpt2", {"queries": [1, 5], "keys": 5})):
        model = tiny(family)
        with torch.no_grad():
            receipt = wrapped(model, edit(where=where))(tiny_inputs(model)).receipt
        assert all(line.change > 0 for line in receipt)


@pytest.mark.parametrize(
    ("representation", "locations", "message"),
    [
        (
            edit(),
            {"base": [{"querys": 1}]},
            "The locations name 'querys', and unit 'h.query.key' has heads, queries, keys. Did you mean 'queries'?"
            f" (Base locations of {NAME!r}.)",
        ),
        (
            edit(),
            {"base": 3},
            f"The base locations of {NAME!r} are [3], which could be rows or columns of an attention matrix. Name the"
            " levels: {'queries': ..., 'keys': ...}, and 'heads' unless all of them are meant.",
        ),
        (
            edit(),
            {"base": [[[[0]] * 2, [[3]] * 2]]},
            f"The base locations of {NAME!r} must be three lists, heads, queries and keys (unit 'h.query.key'), not"
            " [[[0], [0]], [[3], [3]]].",
        ),
        (
            edit(where={"keys": []}),
            None,
            f"The base locations of {NAME!r} name no keys. Give at least one, or leave 'keys' out for all.",
        ),
        (
            edit(where={"keys": [1, -6]}),
            None,
            f"The base locations of {NAME!r} name keys 1 more than once for example 0. Each can be written once.",
        ),
        (
            edit(),
            {"base": [[[[0]], [[3]], [[1]]]]},
            f"The base locations of {NAME!r} list heads for 1 examples, and the batch has 2.",
        ),
        (
            edit(),
            {"base": torch.ones(2, 7).bool()},
            f"The base locations of {NAME!r} are a mask of shape (2, 7); a mask is for unit 'pos' and has the shape"
            " (2, 7) of the tokens.",
        ),
    ],
)
def test_locations_that_say_nothing_sensible_are_refused(representation, locations, message):
    error = refused(tiny("llama"), representation, (None, locations))
    assert isinstance(error, iv.LocationError)
    assert str(error) == message


# What is declared


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"where": {"head": 1}},
            "The locations name 'head', and unit 'h.query.key' has heads, queries, keys. Did you mean 'heads'?",
        ),
        (
            {"unit": "h.query", "where": {"keys": 1}},
            "The locations name 'keys', and unit 'h.query' has heads, queries.",
        ),
        (
            {"unit": "pos"},
            "unit 'pos' does not fit 'attention_pattern', a matrix of queries by keys for each head: use 'h' or"
            " 'h.query' or 'h.query.key'.",
        ),
        (
            {"unit": "h.pos", "component": "attention_weight"},
            "unit 'h.pos' does not fit 'attention_pattern', a matrix of queries by keys for each head: use 'h' or"
            " 'h.query' or 'h.query.key'.",
        ),
        (
            {"component": "block_output"},
            "unit 'h.query.key' does not fit 'block_output', which has no heads: use 'pos'.",
        ),
        (
            {"component": "rotary_query", "unit": "h.query"},
            "unit 'h.query' does not fit 'rotary_query', which is split into heads: use 'h' or 'h.pos'.",
        ),
        (
            {"unit": "h.query.keys"},
            "Unknown unit 'h.query.keys'. Did you mean 'h.query.key'?"
            "\nAllowed: h, h.pos, h.query, h.query.key, pos.",
        ),
        (
            {"renormalize": "row"},
            "Unknown renormalize 'row'. Did you mean 'rows'?\nAllowed: check, none, rows.",
        ),
        (
            {"component": "attention_scores", "renormalize": "rows"},
            "renormalize is for rows of 'attention_pattern', and not for 'attention_scores'.",
        ),
    ],
)
def test_a_declaration_that_fits_no_matrix_is_refused_when_it_is_made(fields, message):
    with pytest.raises(iv.ConfigError) as caught:
        edit(**fields)
    assert str(caught.value) == message


def test_a_misspelt_component_is_the_only_fault_of_its_declaration():
    with pytest.raises(iv.UnknownNameError, match=r"^Unknown component 'attention_patern'. Did you mean"):
        edit(component="attention_patern")


@pytest.mark.parametrize(("component", "unit"), [("block_output", "pos"), ("attention_pattern", "h")])
def test_a_knockout_of_what_is_no_score_is_refused_when_a_model_is_bound(component, unit):
    with pytest.raises(iv.ConfigError) as caught:
        wrapped(tiny("llama"), edit(unit, component, iv.KnockoutIntervention()))
    assert str(caught.value) == (
        "representation 0: KnockoutIntervention makes scores -inf, which the softmax gives no weight, and"
        f" {component} of layer 1 has no scores. Use it at 'attention_scores', or ZeroIntervention here."
    )


# Where the values come from


@pytest.mark.parametrize("representation", [swap("h"), swap("h.query", where={"queries": 2})])
def test_a_pattern_of_another_length_is_refused(representation):
    model = tiny("llama")
    error = refused(model, representation, ([tiny_inputs(model, length=5)],))
    assert isinstance(error, iv.LocationError)
    assert str(error) == (
        f"'layer_1.attention_pattern.{representation.unit}' would put attention over 5 source positions into"
        " attention over 7 base positions. Locate as many queries and keys in both (unit 'h.query.key'), or choose a"
        " source as long as the base."
    )


def test_as_many_entries_must_be_taken_as_are_given():
    model = tiny("llama")
    taken, given = [[[0]] * 2, [[3]] * 2, [[0, 1, 2]] * 2], [[[0]] * 2, [[4]] * 2, [[0, 1]] * 2]
    error = refused(
        model, swap("h.query.key"), ([tiny_inputs(model, seed=1)], {"sources->base": ([taken], [given])})
    )
    assert str(error) == (
        f"{NAME!r} has 1 x 1 x 3 source units and 1 x 1 x 2 base units for example 0. Give as many, or one source"
        " unit for all."
    )


@pytest.mark.parametrize("shape", [(5, 5), (3, 7, 7), (1, 4, 7, 6)])
@pytest.mark.parametrize("given", ["declared", "with the call"])
def test_a_constant_pattern_of_another_shape_is_refused(given, shape):
    constant = torch.ones(shape)
    declared = given == "declared"
    error = refused(
        tiny("llama"),
        swap(**({"source_representation": constant} if declared else {})),
        **({} if declared else {"source_representations": constant}),
    )
    assert isinstance(error, iv.SourceError)
    assert str(error) == (
        f"The source representation of 'layer_1.attention_pattern.h' has shape {shape}, which broadcasts neither to"
        " its entries, (2, 4, 7, 7), nor to whole matrices of [batch, heads, queries, keys], (2, 4, 7, 7)."
    )


# What is known after the edit alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_that_do_not_sum_to_one_are_named_if_that_is_asked_for(attention):
    model = tiny("llama", attention=attention)
    declared = wrapped(model, edit("h.query", where={"heads": 2, "queries": 3}, renormalize="check"))
    with pytest.raises(iv.EditError) as caught:  # with gradients, too
        declared(tiny_inputs(model))
    assert str(caught.value) == (
        "attention_pattern of layer 1: after the edit the row of query 3 of head 2 in example 0 sums to 0, not to 1."
        " Give a pattern whose rows do, or set renormalize='rows' or 'none'."
    )
    assert hooks_of(model) == {}


def test_rows_that_are_no_numbers_do_not_sum_to_one():
    model = tiny("llama")
    nowhere = edit("h", intervention=lambda base: base * torch.nan, where={"heads": 1}, renormalize="check")
    with pytest.raises(iv.EditError, match="of query 0 of head 1 in example 0 sums to nan, not to 1"):
        wrapped(model, nowhere)(tiny_inputs(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_sum_to_one_and_those_of_padding_pass_the_check(dtype, attention):
    model = tiny("llama", dtype=dtype, attention=attention)
    turned = edit("h", intervention=lambda base: base.roll(1, dims=1), renormalize="check")
    with torch.no_grad():
        output = wrapped(model, turned)(tiny_inputs(model, padding="left"))
    assert all(line.change > 0 for line in output.receipt)
    assert not output.intervened.logits.isnan().any()


def test_keys_of_an_earlier_prompt_in_a_cache_cannot_be_named():
    model = tiny("llama")
    tokens = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        earlier = model(input_ids=tokens[:, :5], use_cache=True).past_key_values
        declared = wrapped(model, edit())
        with no_run_of(model), pytest.raises(iv.LocationError) as caught:
            declared({"input_ids": tokens[:, 5:], "past_key_values": earlier})
    assert str(caught.value) == (
        f"{NAME!r} is a matrix over all keys, and the base brings 5 of them in past_key_values, where they cannot be"
        " named. Give the whole prompt instead."
    )
