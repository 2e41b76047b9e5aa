"""Sources of other lengths, shared, left out, constant; and sources that are a module's input."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, main_output, same_bits, wrapped
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, FAMILIES, HIDDEN, RECURRENT, tiny, tiny_inputs

LANGUAGE = [case for case in CASES if case[0] not in RECURRENT]


def rows_of(inputs, *rows):
    return {name: value[list(rows)] for name, value in inputs.items()}


def logits(declared, *call, **options):
    with torch.no_grad():
        return main_output(declared(*call, **options).intervened)


# Lengths and batches


@pytest.mark.parametrize("length", [3, 7, 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_may_be_shorter_or_longer_than_the_base(family, length):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, length=length, seed=1)
    with torch.no_grad():
        value = by_hand.seen(model, "block_output", source)

        def put(stream):
            new = stream.clone()
            new[:, [1, 6]] = value[:, [0, -1]]
            return new

        expected = main_output(by_hand.run_with(model, "block_output", put, base))
    declared = wrapped(model, at(model, "block_output"))
    result = logits(declared, base, [source], {"sources->base": ([[[0, -1]] * 2], [[[1, -1]] * 2])})
    assert_close(result, expected)


@pytest.mark.parametrize("component", ["block_output", "head_value_output"])
def test_whole_activations_of_another_length_are_refused(component):
    model = tiny("llama")
    declared = wrapped(model, at(model, component, "h" if component.startswith("head") else "pos"))
    with pytest.raises(iv.LocationError, match=r"would put 3 source positions .* into 7 base positions"):
        declared(tiny_inputs(model), [tiny_inputs(model, length=3, seed=1)])


def test_one_source_unit_goes_to_all_base_units_and_other_counts_are_refused():
    model = tiny("gpt2")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    declared = wrapped(model, at(model, "block_output"))
    result = logits(declared, base, [source], {"sources->base": ([[[2], [5]]], [[[0, 3, 6], [1]]])})
    spelled = logits(declared, base, [source], {"sources->base": ([[[2, 2, 2], [5]]], [[[0, 3, 6], [1]]])})
    assert torch.equal(result, spelled)
    with pytest.raises(iv.LocationError, match="2 source units and 3 base units for example 0"):
        declared(base, [source], {"sources->base": ([[[2, 1], [5]]], [[[0, 3, 6], [1]]])})


@pytest.mark.parametrize("unit", ["pos", "h", "h.pos"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "bert"])
def test_one_source_example_serves_a_whole_batch(family, unit):
    model = tiny(family)
    base, source = tiny_inputs(model, batch=3, seed=0), tiny_inputs(model, batch=3, seed=1)
    component = "block_output" if unit == "pos" else "head_attention_value_output"
    declared = wrapped(model, at(model, component, unit))
    one = {"pos": [[1, 3]], "h": [[0, 2]], "h.pos": [[[0, 2]], [[1, 3]]]}[unit]
    three = {"pos": [[1, 3]] * 3, "h": [[0, 2]] * 3, "h.pos": [[[0, 2]] * 3, [[1, 3]] * 3]}[unit]

    shared = logits(declared, base, [rows_of(source, 1)], {"sources->base": ([one], [three])})
    repeated = logits(declared, base, [rows_of(source, 1, 1, 1)], {"sources->base": ([three], [three])})
    assert_close(shared, repeated, atol=1e-6, rtol=1e-5)
    whole = logits(declared, base, [rows_of(source, 1)])
    assert_close(whole, logits(declared, base, [rows_of(source, 1, 1, 1)]), atol=1e-6, rtol=1e-5)

    with pytest.raises(iv.SourceError, match="base has 3 examples, source 0 has 2"):
        declared(base, [rows_of(source, 0, 1)])


def test_one_source_serves_all_groups():
    model = tiny("llama")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    declared = wrapped(model, *(at(model, name) for name in ("block_input", "mlp_output", "key_output")))
    where = {"sources->base": (1, 4)}
    expected = logits(declared, base, [source] * 3, where)
    assert torch.equal(logits(declared, base, [source], where), expected)
    assert torch.equal(logits(declared, base, source, where), expected)
    with pytest.raises(iv.SourceError, match="2 sources were given for 3 groups"):
        declared(base, [source, source], where)


# Leaving out


@pytest.mark.parametrize("active", [0, 1, 2])
def test_of_three_identical_interventions_any_single_active_one_gives_the_same(active):
    model = tiny("gpt2")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    three = wrapped(model, *(at(model, "block_output") for _ in range(3)))
    one = wrapped(model, at(model, "block_output"))
    expected = logits(one, base, [source], {"sources->base": ([[[1], [2]]], [[[4], [0]]])})

    sources, left, right = [None] * 3, [None] * 3, [None] * 3
    sources[active], left[active], right[active] = source, [[1], [2]], [[4], [0]]
    with torch.no_grad():
        output = three(base, sources, {"sources->base": (left, right)})
        by_source_alone = three(base, sources, {"sources->base": (1, 4)})
    assert torch.equal(output.intervened.logits, expected)
    assert len(output.receipt) == 2
    assert len(output.receipt.skipped) == 2
    assert torch.equal(
        by_source_alone.intervened.logits, logits(one, base, [source], {"sources->base": (1, 4)})
    )


def test_leaving_out_every_intervention_leaves_the_model():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    declared = wrapped(model, at(model, "block_output"), at(model, "mlp_output"))
    with torch.no_grad():
        output = declared(inputs, [None, None], {"sources->base": ([None, None], [None, None])})
        assert same_bits(output.intervened, model(**inputs))
    assert len(output.receipt) == 0


def test_an_intervention_without_its_source_is_an_error_and_not_left_out():
    model = tiny("gpt2")
    declared = wrapped(model, at(model, "block_output"))
    with pytest.raises(iv.SourceError, match=r"needs a source, and source 0 is not given"):
        declared(tiny_inputs(model))


# Constant sources


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2, 1), (2, 3), (3,)])
@pytest.mark.parametrize("given", ["config", "listed", "instance", "call", "call by name", "call as list"])
def test_a_constant_source_broadcasts_wherever_it_is_given(given, leading):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    constant = torch.randn(*leading, HIDDEN)
    where = {"base": [[[1, 0, 5], [6, 2, 3]]]}

    def put(stream):
        new = stream.clone()
        new[0, [1, 0, 5]] = constant.expand(2, 3, HIDDEN)[0]
        new[1, [6, 2, 3]] = constant.expand(2, 3, HIDDEN)[1]
        return new

    with torch.no_grad():
        expected = by_hand.run_with(model, "block_output", put, inputs).logits
    fields, per_call, listed = {}, {}, None
    if given == "config":
        fields = {"source_representation": constant}
    elif given == "instance":
        fields = {"intervention": iv.VanillaIntervention(source_representation=constant)}
    elif given == "listed":
        listed = [constant]
    else:
        values = {"call": constant, "call by name": {"it": constant}, "call as list": [constant]}
        per_call = {"source_representations": values[given]}
    config = iv.IntervenableConfig(
        [at(model, "block_output", name="it", **fields)], intervention_constant_sources=listed
    )
    declared = iv.IntervenableModel(config, model)
    assert torch.equal(logits(declared, inputs, None, where, **per_call), expected)


@pytest.mark.parametrize("shape", [(HIDDEN + 1,), (4, HIDDEN), (3, 1, HIDDEN), (2, 1, 1, HIDDEN)])
def test_a_constant_source_that_does_not_broadcast_is_refused_before_the_model_runs(shape):
    model = tiny("llama")
    declared = wrapped(model, at(model, "block_output"))
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(iv.SourceError, match="does not broadcast"):
        declared(
            tiny_inputs(model),
            unit_locations={"base": [[[1, 0, 5], [6, 2, 3]]]},
            source_representations=torch.zeros(shape),
        )
    handle.remove()
    assert ran == []


@pytest.mark.parametrize("shape", [(6,), (2, 1, 6), (2, 2, 2, 6), (2, 1, 2, 6)])
def test_a_constant_source_for_heads_has_their_axis(shape):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    constant = torch.randn(shape)

    def put(stream):
        new = stream.clone().view(2, 7, 4, 6).transpose(1, 2)
        values = constant.expand(2, 2, 2, 6)
        for row, (heads, positions) in enumerate((((0, 3), (1, 2)), ((2, 1), (6, 0)))):
            for i, head in enumerate(heads):
                for j, position in enumerate(positions):
                    new[row, head, position] = values[row, i, j]
        return new.transpose(1, 2).reshape(2, 7, 24)

    with torch.no_grad():
        expected = by_hand.run_with(model, "attention_value_output", put, inputs).logits
    declared = wrapped(
        model, at(model, "head_attention_value_output", "h.pos", source_representation=constant)
    )
    where = {"base": [[[[0, 3], [2, 1]], [[1, 2], [6, 0]]]]}
    assert torch.equal(logits(declared, inputs, None, where), expected)


def test_what_one_run_read_can_be_the_constant_source_of_the_next():
    model = tiny("gpt2")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    reading = wrapped(model, at(model, "mlp_output", name="it"), types=iv.CollectIntervention)
    swapping = wrapped(model, at(model, "mlp_output", name="it"))
    with torch.no_grad():
        collected = reading(source, unit_locations={"base": [[[1], [4]]]}).collected
    result = logits(swapping, base, None, {"base": [[[3], [2]]]}, source_representations=collected)
    assert torch.equal(
        result, logits(swapping, base, [source], {"sources->base": ([[[1], [4]]], [[[3], [2]]])})
    )


def test_a_constant_of_the_call_wins_over_a_declared_one():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    declared = wrapped(model, at(model, "block_output", source_representation=torch.zeros(HIDDEN)))
    other = wrapped(model, at(model, "block_output", source_representation=torch.ones(HIDDEN)))
    where = {"base": 2}
    result = logits(declared, inputs, None, where, source_representations=torch.ones(HIDDEN))
    assert torch.equal(result, logits(other, inputs, None, where))
    assert not torch.equal(result, logits(declared, inputs, None, where))


# A module's input as its source


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output"])
@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_skipping_a_module_with_the_base_as_source_makes_it_the_identity(family, variant, component):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    module, _ = by_hand.module_at(model, component)
    if component != "block_output" and module.__class__.__name__ in ("Linear", "Conv1D"):
        pytest.skip("a projection, whose input has another width")
    declared = wrapped(model, at(model, component), types=iv.SkipIntervention)

    def skip(module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return given if isinstance(output, torch.Tensor) else (given, *output[1:])

    handle = module.register_forward_hook(skip, with_kwargs=True)
    with torch.no_grad():
        expected = main_output(model(**inputs))
    handle.remove()
    assert torch.equal(logits(declared, inputs, [inputs]), expected)


@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_skipping_a_block_leaves_the_stream_at_the_chosen_positions(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    declared = wrapped(
        model,
        at(model, "block_output", intervention=iv.SkipIntervention()),
        at(model, "block_input", intervention=iv.CollectIntervention()),
        at(model, "block_output", intervention=iv.CollectIntervention()),
    )
    where = {"sources->base": ([[[2, 3]] * 2] * 3, [[[2, 3]] * 2] * 3)}
    with torch.no_grad():
        before, after = declared(inputs, [inputs, None, None], where).collected_activations
    assert torch.equal(before, after)


def test_an_unused_source_is_refused():
    model = tiny("gpt2")
    declared = wrapped(model, at(model, "block_output"), types=iv.ZeroIntervention)
    with pytest.raises(iv.SourceError, match="Source 0 would not be used"):
        declared(tiny_inputs(model), [tiny_inputs(model)])
