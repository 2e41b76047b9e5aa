"""Law 5: a batch equals its examples one by one, and padding on either side equals none."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, everything, heads_of, main_output, wrapped
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, FEATURES, PAD, RECURRENT, VOCABULARY, tiny, tiny_inputs

LANGUAGE = [case for case in CASES if case[0] not in RECURRENT]
EACH_LAYOUT = ("gpt2", "gpt_neox", "opt", "falcon", "llama", "mixtral", "bert", "gru")
"""A family for each way in which components are laid out in tensors."""
LENGTHS = (7, 5, 6)
SOURCE_LENGTHS = (4, 7, 6)
BFLOAT16 = 0.05
"""How far apart two roundings of one bfloat16 computation may end up here, relative to the largest logit."""


def halfway(base, source):
    """An edit that depends on both, and through which every other edit still shows."""
    return (base + source) / 2


def prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def batch_of(rows, padding):
    """One batch of prompts, as a tokenizer would pad them."""
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(rows):
        where = slice(longest - len(prompt), longest) if padding == "left" else slice(0, len(prompt))
        tokens[row, where], mask[row, where] = prompt, 1
    return {"input_ids": tokens, "attention_mask": mask}


def real(values, rows, padding):
    """What a padded batch gives for the real tokens of each prompt."""
    longest = values.shape[1]
    return [
        value[longest - len(prompt) :] if padding == "left" else value[: len(prompt)]
        for value, prompt in zip(values, rows, strict=True)
    ]


def ragged(model, component, unit, positions, examples):
    """Locations that differ between examples, in number too."""
    last = heads_of(model, component) - 1
    rows = {"h": [[0], [last], list(range(last + 1))], "pos": positions, "query": positions, "key": KEYS}
    levels = [[rows[level][example] for example in examples] for level in unit.split(".")]
    return levels[0] if len(levels) == 1 else levels


TAKEN = [[0], [1, -1], [-2]]
GIVEN = [[-1], [-3, 0], [2]]
KEYS = [[0], [1, 0], [1]]
"""Positions that one of the queries in each of them reads at least."""


def locations(model, places, examples):
    return {
        "sources->base": tuple(
            [ragged(model, *place, positions, examples) for place in places] for positions in (TAKEN, GIVEN)
        )
    }


def rows_of(inputs, row):
    return {name: value[row : row + 1] for name, value in inputs.items()}


# Batches


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_batch_with_ragged_locations_equals_its_examples_one_by_one(family, variant):
    model = tiny(family, variant=variant)
    base, source = tiny_inputs(model, batch=3, seed=0), tiny_inputs(model, batch=3, seed=1)
    places = everything(model)
    declared = wrapped(model, *(at(model, *place, intervention=halfway) for place in places))
    with torch.no_grad():
        together = main_output(declared(base, [source], locations(model, places, [0, 1, 2])).intervened)
        assert (together - main_output(model(**base))).abs().max() > 1e-2
        for row in range(3):
            call = rows_of(base, row), [rows_of(source, row)], locations(model, places, [row])
            alone = main_output(declared(*call).intervened)
            assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EACH_LAYOUT)
def test_each_component_alone_in_a_batch_equals_its_examples_one_by_one(family):
    model = tiny(family)
    base, source = tiny_inputs(model, batch=3, seed=0), tiny_inputs(model, batch=3, seed=1)
    for place in everything(model):
        declared = wrapped(model, at(model, *place))
        with torch.no_grad():
            output = declared(base, [source], locations(model, [place], [0, 1, 2]))
            together = main_output(output.intervened)
            changes = [line.change for line in output.receipt]
            for row in range(3):
                call = rows_of(base, row), [rows_of(source, row)], locations(model, [place], [row])
                alone = declared(*call)
                assert_close(
                    together[row : row + 1],
                    main_output(alone.intervened),
                    atol=1e-5,
                    rtol=1e-5,
                    msg=str(place),
                )
                assert changes[row] == pytest.approx(alone.receipt[0].change, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", EACH_LAYOUT)
def test_readings_of_a_batch_are_those_of_its_examples_filled_up_with_zeros(family):
    model = tiny(family)
    inputs = tiny_inputs(model, batch=3)
    for component, unit in everything(model):
        declared = wrapped(model, at(model, component, unit, name="it"), types=iv.CollectIntervention)
        where = [ragged(model, component, unit, GIVEN, [0, 1, 2])]
        with torch.no_grad():
            output = declared(inputs, unit_locations={"base": where})
            together, mask = output.collected["it"], output.collected_mask.get("it")
            for row in range(3):
                alone = {"base": [ragged(model, component, unit, GIVEN, [row])]}
                expected = declared(rows_of(inputs, row), unit_locations=alone).collected["it"][0]
                mine = together[row] if mask is None else together[row][mask[row]]
                assert_close(
                    mine.flatten(), expected.flatten(), atol=1e-5, rtol=1e-5, msg=f"{component} {unit}"
                )
                if mask is not None:
                    assert not together[row][~mask[row]].any()


@pytest.mark.parametrize("unit", ["pos", "h.pos"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon", "llama"])
def test_examples_with_fewer_units_are_not_touched_by_what_fills_them_up(family, unit):
    """An edit that tells the units of an example apart, as filled-up places are a unit once more."""
    model = tiny(family)
    inputs = tiny_inputs(model, batch=3)
    component = "query_output" if unit == "pos" else "head_query_output"
    columns = by_hand.columns(family, None, component)
    heads = [[0], [3], [1, 2]]
    positions = [[4], [2, 0], [6, 1, 3]]

    def number(base):
        return base + torch.arange(base.shape[-2])[:, None].float() + 1

    def change(stream):
        new = stream.clone()
        for row in range(3):
            width = columns.flatten() if unit == "pos" else columns[heads[row]].flatten()
            for index, position in enumerate(positions[row]):
                new[row, position, width] += index + 1
        return new

    where = [positions] if unit == "pos" else [[heads, positions]]
    with torch.no_grad():
        declared = wrapped(model, at(model, component, unit, intervention=number))
        result = declared(inputs, unit_locations={"base": where}).intervened
        expected = by_hand.run_with(model, component, change, inputs)
    assert_close(main_output(result), main_output(expected))


# Padding


def alone(declared, model, places, bases, sources):
    """Each prompt by itself, without padding."""
    results = []
    for row, (base, source) in enumerate(zip(bases, sources, strict=True)):
        call = batch_of([base], "right"), [batch_of([source], "right")], locations(model, places, [row])
        results.append(main_output(declared(*call).intervened)[0])
    return results


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_padding_on_either_side_equals_no_padding(family, variant, padding):
    model = tiny(family, variant=variant)
    every_position = (
        "h",
        "h.query",
    )  # of heads, or of the keys that queries read: of one length in base and source
    places = [place for place in everything(model) if place[1] not in every_position]
    declared = wrapped(model, *(at(model, *place, intervention=halfway) for place in places))
    bases, sources = prompts(LENGTHS, seed=0), prompts(SOURCE_LENGTHS, seed=1)
    with torch.no_grad():
        expected = alone(declared, model, places, bases, sources)
        call = batch_of(bases, padding), [batch_of(sources, padding)], locations(model, places, [0, 1, 2])
        original, intervened = declared(*call, output_original_output=True)

        for row, mine in enumerate(real(main_output(intervened), bases, padding)):
            assert_close(mine, expected[row], atol=1e-5, rtol=1e-4)
        for row, mine in enumerate(real(main_output(original), bases, padding)):
            assert_close(mine, main_output(model(bases[row][None]))[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left")])
def test_base_and_source_may_be_padded_on_different_sides(sides):
    model = tiny("gpt2")
    places = [("block_output", "pos"), ("head_value_output", "h.pos")]
    declared = wrapped(model, *(at(model, *place) for place in places))
    bases, sources = prompts(LENGTHS, seed=0), prompts(SOURCE_LENGTHS, seed=1)
    with torch.no_grad():
        expected = alone(declared, model, places, bases, sources)
        call = batch_of(bases, sides[0]), [batch_of(sources, sides[1])], locations(model, places, [0, 1, 2])
        result = main_output(declared(*call).intervened)
    for row, mine in enumerate(real(result, bases, sides[0])):
        assert_close(mine, expected[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "bloom", "falcon", "bert"])
def test_padding_equals_no_padding_to_bfloat16_rounding(family, padding):
    model = tiny(family, dtype=torch.bfloat16)
    places = [("block_output", "pos"), ("head_value_output", "h.pos"), ("mlp_output", "pos")]
    declared = wrapped(model, *(at(model, *place, intervention=halfway) for place in places))
    bases, sources = prompts(LENGTHS, seed=0), prompts(SOURCE_LENGTHS, seed=1)
    with torch.no_grad():
        expected = alone(declared, model, places, bases, sources)
        call = batch_of(bases, padding), [batch_of(sources, padding)], locations(model, places, [0, 1, 2])
        result = main_output(declared(*call).intervened)
    for row, mine in enumerate(real(result, bases, padding)):
        scale = expected[row].abs().max()
        assert (mine - expected[row]).abs().max() <= BFLOAT16 * scale


def test_without_position_ids_gpt2_itself_is_wrong_under_left_padding():
    """That the tests above can fail."""
    model = tiny("gpt2")
    rows = prompts(LENGTHS, seed=0)
    with torch.no_grad():
        plain = real(model(**batch_of(rows, "left")).logits, rows, "left")
        expected = model(rows[1][None]).logits[0]
    assert (plain[1] - expected).abs().max() > 0.1


def calls_of(model, declared, *call):
    """The keyword inputs of every run of the model in one call."""
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        output = declared(*call)
    handle.remove()
    return seen, output


@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_position_ids_are_filled_in_for_left_padding_alone_and_only_where_the_mask_is_not_enough(
    family, variant
):
    model = tiny(family, variant=variant)
    declared = wrapped(model, at(model, "block_output"), types=iv.ZeroIntervention)
    rows = prompts(LENGTHS, seed=0)
    for padding in ("right", "left", "left"):
        seen, _ = calls_of(model, declared, batch_of(rows, padding))
    filled = seen[-1].get("position_ids")

    assert len(seen) == 1  # how the model counts positions was found out before
    assert "position_ids" not in calls_of(model, declared, batch_of(rows, "right"))[0][-1]
    if family in ("opt", "bloom"):
        assert filled is None
    if family in ("gpt2", "gpt_neo", "bert"):
        assert filled.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert"])
def test_position_ids_of_the_callers_are_respected(family):
    model = tiny(family)
    rows = prompts(LENGTHS, seed=0)
    inputs = batch_of(rows, "left")
    inputs["position_ids"] = torch.arange(7).flip(0).expand(3, 7) + 2
    declared = wrapped(model, at(model, "block_output", intervention=lambda base: base))
    seen, output = calls_of(model, declared, inputs)
    with torch.no_grad():
        assert torch.equal(output.intervened.logits, model(**inputs).logits)
    assert seen[0]["position_ids"] is inputs["position_ids"]


def test_positions_count_real_tokens_or_on_request_the_tensors():
    model = tiny("gpt2")
    rows = prompts(LENGTHS, seed=0)
    inputs = batch_of(rows, "left")
    declared = wrapped(model, at(model, "block_output", layer=2), types=iv.ZeroIntervention)

    def cleared(unit_locations, **options):
        found = []
        handle = by_hand.module_at(model, "final_norm_input")[0].register_forward_pre_hook(
            lambda m, args: found.append((args[0] == 0).all(-1))
        )
        with torch.no_grad():
            output = declared(inputs, unit_locations={"base": unit_locations}, **options)
        handle.remove()
        return [row.nonzero().flatten().tolist() for row in found[-1]], output.receipt

    tokens, receipt = cleared([0, -1])
    assert tokens == [[0, 6], [2, 6], [1, 6]]
    assert [line.positions for line in receipt] == [(0, 6), (0, 4), (0, 5)]
    assert cleared([0, -1], relative_to="tensor")[0] == [[0, 6]] * 3
    assert cleared([2], relative_to="tensor")[0] == [[2], [2], [2]]
    assert cleared(inputs["attention_mask"].bool())[0] == [
        [0, 1, 2, 3, 4, 5, 6],
        [2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
    ]
    with pytest.raises(iv.LocationRangeError, match=r"Position 5 .* example 1, which has positions 0 to 4"):
        declared(inputs, unit_locations={"base": 5})


# Models that read vectors


@pytest.mark.parametrize("family", RECURRENT)
def test_right_padding_of_a_recurrent_net_changes_nothing_before_it(family):
    model = tiny(family)
    rows = [torch.randn(length, FEATURES) for length in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=9.0)
    declared = wrapped(model, at(model, "block_input", intervention=lambda base: -base))
    where = [[0, 3], [1], [5, 2]]
    with torch.no_grad():
        together = declared({"input": padded}, unit_locations={"base": [where]}).intervened[0]
        for row, values in enumerate(rows):
            expected = declared({"input": values[None]}, unit_locations={"base": [[where[row]]]}).intervened[
                0
            ][0]
            assert_close(together[row, : len(values)], expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_net_with_time_first_equals_one_with_the_batch_first(layers):
    first = torch.nn.GRU(FEATURES, 16, num_layers=layers, batch_first=True)
    second = torch.nn.GRU(FEATURES, 16, num_layers=layers)
    second.load_state_dict(first.state_dict())
    inputs, source = torch.randn(2, 3, 7, FEATURES)
    where = {"sources->base": ([[[0], [1], [2, 3]]], [[[6], [5], [0, 1]]])}
    for component in ("block_input", "block_output"):
        one, other = (wrapped(model, at(model, component)) for model in (first, second))
        with torch.no_grad():
            expected = one({"input": inputs}, [{"input": source}], where).intervened[0]
            turned = {"input": inputs.transpose(0, 1)}, [{"input": source.transpose(0, 1)}]
            assert_close(other(*turned, where).intervened[0].transpose(0, 1), expected)
