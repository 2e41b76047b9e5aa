"""Law 2: nothing of the user's changes, and autograd works through every edit."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import by_hand
import pytest
import torch
from declared import at, everything, is_inside, located, main_output, wrapped, writable
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, FAMILIES, HIDDEN, RECURRENT, tiny, tiny_inputs

IN_PLACE = {"falcon": ("mlp_output", "mlp_contribution")}
"""What the models themselves edit in place after hooks saw it."""


def same(left, right):
    """Deep equality, with tensors bit for bit and of the same types."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# What the user gave


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_sources_locations_and_constants_stay_as_they_were(family, padding):
    if family in RECURRENT and padding:
        pytest.skip("reads vectors, which have no padding")
    model = tiny(family)
    extra = {} if family in RECURRENT else {"padding": padding}
    base, source = tiny_inputs(model, seed=0, **extra), tiny_inputs(model, seed=1, **extra)
    call = {
        "base": base,
        "sources": [source, None],
        "unit_locations": {"sources->base": ([[[0, 1], [-1, 0]], None], [[[1, 2], [0, 3]], [[-1], [0]]])},
        "source_representations": [None, torch.ones(HIDDEN)],
        "subspaces": [None, [[0, 3], [2, 5]]],
    }
    before = copy.deepcopy(call)
    declared = wrapped(
        model,
        at(model, "block_output"),
        at(model, "block_output", intervention=iv.AdditionIntervention()),
    )

    with torch.no_grad():
        declared(**call, output_original_output=True)

    assert same(call, before)
    assert call["sources"][0] is source


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*RECURRENT, "bert")])
def test_the_users_key_value_cache_stays_as_it_was(family):
    model = tiny(family)
    tokens = tiny_inputs(model, length=9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :6], use_cache=True).past_key_values
        expected = model(input_ids=tokens).logits[:, 6:]
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        declared = wrapped(model, at(model, "block_output", intervention=iv.ZeroIntervention()))
        base = {"input_ids": tokens[:, 6:], "past_key_values": cache}
        original, intervened = declared(base, unit_locations={"base": 2}, output_original_output=True)

        assert cache.get_seq_length() == 6
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    assert_close(original.logits, expected, atol=1e-5, rtol=1e-5)
    assert_close(intervened.logits[:, :2], expected[:, :2], atol=1e-5, rtol=1e-5)


def test_a_source_may_be_the_very_object_that_is_the_base():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    before = copy.deepcopy(inputs)
    with torch.no_grad():
        wrapped(model, at(model, "block_output"))(inputs, [inputs], {"sources->base": (1, 2)})
    assert same(inputs, before)


# What the model made


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_no_tensor_of_the_model_is_written_to(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    skipped = (*IN_PLACE.get(family, ()), "block_mid")
    names = [name for name in writable(model) if not is_inside(name) and name not in skipped]
    as_seen, kept = {}, {}

    def keep(name):
        def look(value):
            kept[name], as_seen[name] = value, value.clone()

        return look

    doubled = [
        at(model, component, unit, intervention=lambda base: 2 * base)
        for component, unit in everything(model)
    ]
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            if name not in ("head_attention_output", "final_norm_scale"):
                stack.callback(by_hand.hook(model, name, keep(name)).remove)
        wrapped(model, *doubled)(inputs)

    assert len(kept) > 1
    assert [name for name in kept if not torch.equal(kept[name], as_seen[name])] == []


@pytest.mark.parametrize(("family", "variant"), [("gptj", None), ("falcon", None), ("falcon", "one_norm")])
def test_where_attention_and_mlp_share_a_norm_an_edit_of_one_input_leaves_the_other(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    for edited, other in (("attention_input", "mlp_input"), ("mlp_input", "attention_input")):
        declared = wrapped(
            model,
            at(model, edited, intervention=iv.ZeroIntervention()),
            at(model, other, intervention=iv.CollectIntervention()),
        )
        with torch.no_grad():
            expected = by_hand.seen(model, other, inputs)
            (value,) = declared(inputs).collected_activations
        assert torch.equal(value, expected)


@pytest.mark.parametrize(("family", "variant"), [case for case in CASES if case[0] == "falcon"])
def test_readings_are_of_the_moment_even_where_the_model_edits_in_place_later(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    declared = wrapped(model, at(model, "mlp_output"), types=iv.CollectIntervention)
    with torch.no_grad():
        hidden = by_hand.seen(model, "mlp_hidden", inputs)
        expected = by_hand.block_of(model).mlp.dense_4h_to_h(hidden)
        for locations in (None, {"base": [0, 1, 2, 3, 4, 5, 6]}):
            (value,) = declared(inputs, unit_locations=locations).collected_activations
            assert torch.equal(value, expected)


@pytest.mark.parametrize(("family", "variant"), [case for case in CASES if case[0] == "falcon"])
def test_a_source_is_kept_as_it_was_even_where_the_run_goes_on_and_edits_it_in_place(family, variant):
    model = tiny(family, variant=variant)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    places = [("mlp_output", 1), ("query_output", 2)]
    declared = wrapped(model, *(at(model, name, layer=layer) for name, layer in places))
    with torch.no_grad():
        readings = [
            wrapped(model, at(model, name, layer=layer), types=iv.CollectIntervention)(source)
            for name, layer in places
        ]
        constants = [reading.collected_activations[0] for reading in readings]
        expected = declared(base, source_representations=constants).intervened
        assert torch.equal(declared(base, [source]).intervened.logits, expected.logits)


# Gradients


def gradients(model, output, *others):
    """Gradients of a fixed weighted sum of the outputs, for every parameter of the model and the others."""
    value = main_output(output)
    weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
    parameters = [*model.parameters(), *others]
    return torch.autograd.grad((value * weights).sum(), parameters, allow_unused=True)


def assert_same_gradients(result, expected):
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # Where scores or patterns are edited, a fused kernel's sums are made in another order.
            assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=1e-4)


KINDS = (
    "block_input",
    "block_output",
    "query_output",
    "attention_value_output",
    "mlp_output",
    "embedding_output",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_a_swap_are_those_of_hooks_written_by_hand(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    for component in (name for name in KINDS if name in writable(model)):
        columns = by_hand.columns(family, None, component)
        width = slice(None) if columns is None else columns.flatten()
        value = by_hand.seen(model, component, source)

        def put(stream, value=value, width=width):
            new = stream.clone()
            new[:, 3, width] = value[:, 1, width]
            return new

        expected = gradients(model, by_hand.run_with(model, component, put, base))
        declared = wrapped(model, at(model, component))
        result = gradients(model, declared(base, [source], {"sources->base": (1, 3)}).intervened)
        assert_same_gradients(result, expected)


@pytest.mark.parametrize("form", ["whole", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_identities_at_every_component_are_the_models_own(family, form):
    model = tiny(family, attention="eager")
    inputs = tiny_inputs(model)
    places = everything(model)
    declared = wrapped(model, *(at(model, *place, intervention=lambda base: base * 1.0) for place in places))
    locations = {"base": [located(model, *place, form) for place in places]} if form == "ragged" else None

    result = gradients(model, declared(inputs, unit_locations=locations).intervened)

    assert_same_gradients(result, gradients(model, model(**inputs)))


EDITS = {
    "addition": (iv.AdditionIntervention, lambda base, given: base + given),
    "subtraction": (iv.SubtractionIntervention, lambda base, given: base - given),
    "vanilla": (iv.VanillaIntervention, lambda base, given: given.expand_as(base)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "gru"])
def test_gradients_reach_a_trained_constant(family, edit):
    model = tiny(family)
    inputs = tiny_inputs(model)
    given = torch.nn.Parameter(torch.randn(HIDDEN))
    cls, formula = EDITS[edit]

    def put(stream):
        new = stream.clone()
        new[[0, 1, 1], [1, 0, 4]] = formula(stream[[0, 1, 1], [1, 0, 4]], given)
        return new

    expected = gradients(model, by_hand.run_with(model, "block_output", put, inputs), given)
    declared = wrapped(model, at(model, "block_output", intervention=cls(source_representation=given)))
    result = gradients(model, declared(inputs, unit_locations={"base": [[[1], [0, 4]]]}).intervened, given)

    assert_same_gradients(result, expected)
    assert result[-1].abs().max() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_gradients_reach_a_learned_rotation(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    declared = wrapped(
        model, at(model, "block_output", low_rank_dimension=3), types=iv.LowRankRotatedSpaceIntervention
    )
    (rotation,) = declared.interventions.values()
    (learned,) = rotation.parameters()
    value = by_hand.seen(model, "block_output", source)

    def put(stream):
        new = stream.clone()
        new[:, 3] = rotation(stream[:, 3:4], value[:, 1:2])[:, 0]
        return new

    expected = gradients(model, by_hand.run_with(model, "block_output", put, base), learned)
    result = gradients(model, declared(base, [source], {"sources->base": (1, 3)}).intervened, learned)

    assert_same_gradients(result, expected)
    assert result[-1].abs().max() > 0


@pytest.mark.parametrize("component", ["head_attention_output", "final_norm_scale", "block_mid"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])  # llama's norms round to float32 even in a float64 model
def test_gradients_reach_through_derived_components(family, component):
    """Finite differences in float64, which know nothing of the edit's formula."""
    model = tiny(family).double()
    inputs = tiny_inputs(model)
    width = {"head_attention_output": HIDDEN, "final_norm_scale": 1, "block_mid": HIDDEN}[component]
    given = torch.nn.Parameter(1 + torch.rand(width, dtype=torch.float64))
    unit = "h.pos" if component.startswith("head") else "pos"
    declared = wrapped(
        model,
        at(
            model,
            component,
            unit,
            intervention=lambda base: base * given if component != "block_mid" else base + given,
        ),
    )
    locations = {"base": [[[[1], [2]], [[3], [5]]]] if unit == "h.pos" else [[[3], [5]]]}

    def loss():
        logits = declared(inputs, unit_locations=locations).intervened.logits
        return (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()

    (gradient,) = torch.autograd.grad(loss(), given)
    step = 1e-5
    with torch.no_grad():
        for index in range(min(width, 3)):
            given[index] += step
            above = loss()
            given[index] -= 2 * step
            below = loss()
            given[index] += step
            assert_close(gradient[index], (above - below) / (2 * step), atol=1e-5, rtol=1e-3)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gru"])
def test_gradients_flow_through_a_reading(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    reading = wrapped(model, at(model, "block_output"), types=iv.CollectIntervention)
    (value,) = reading(inputs, unit_locations={"base": [[[1], [0, 4]]]}).collected_activations
    stream = by_hand.seen(model, "block_output", inputs)

    result = torch.autograd.grad(
        value[[0, 1, 1], [0, 0, 1]].sum(), list(model.parameters()), allow_unused=True
    )
    expected = torch.autograd.grad(
        stream[[0, 1, 1], [1, 0, 4]].sum(), list(model.parameters()), allow_unused=True
    )

    assert_same_gradients(result, expected)
    assert torch.equal(value[0, 1], torch.zeros(HIDDEN))  # only the second example has two units


class _InPlace(iv.Intervention):
    """Breaks the rule that an intervention makes a new tensor."""

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return base.mul_(2)


@pytest.mark.parametrize("locations", [None, {"base": 1}], ids=["whole", "located"])
@pytest.mark.parametrize("component", ["block_input", "block_mid", "mlp_output"])
def test_an_intervention_that_works_in_place_has_the_effect_of_one_that_does_not(component, locations):
    model = tiny("llama")
    embeds = torch.randn(2, 5, model.config.hidden_size)
    before = embeds.clone()
    outputs = [
        iv.IntervenableModel(iv.RepresentationConfig(0, component, intervention=intervention), model)(
            {"inputs_embeds": embeds}, unit_locations=locations
        )
        for intervention in (_InPlace(), iv.ScaleIntervention(2.0))
    ]
    assert torch.equal(outputs[0].intervened.logits, outputs[1].intervened.logits)
    assert [line.change for line in outputs[0].receipt] == [line.change for line in outputs[1].receipt]
    assert all(line.change > 0 for line in outputs[0].receipt)
    assert torch.equal(embeds, before)
