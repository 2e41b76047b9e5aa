"""Law 4: nothing is silently skipped, and receipts say what was touched, how often and by how much."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, everything, hooks_of, located, main_output, wrapped
from torch import nn

import intervenable as iv
from intervenable import MLPClassifier
from tiny_models import CASES, HIDDEN, tiny, tiny_inputs


class Odd(nn.Module):
    """A model with a part that is never called, one called twice, and one called as it comes."""

    def __init__(self):
        super().__init__()
        self.once = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.times = 1
        self.some = nn.Linear(4, 4)

    def forward(self, values):
        values = self.twice(self.twice(self.once(values)))
        for _ in range(self.times):
            values = self.some(values)
        return values


def odd(path, types=iv.ZeroIntervention):
    model = Odd()
    return model, iv.IntervenableModel(
        iv.IntervenableConfig([iv.RepresentationConfig(None, path)], types), model
    )


@pytest.mark.parametrize("path", ["never.input", "never.output"])
def test_an_intervention_at_a_module_that_is_never_called_raises(path):
    model, declared = odd(path)
    with pytest.raises(iv.NotFiredError) as caught:
        declared(torch.ones(1, 2, 4))
    assert str(caught.value) == (
        f"Each intervention is to be applied once in a run; '{path}.pos' (never) was applied 0 times."
    )
    assert hooks_of(model) == {}


@pytest.mark.parametrize("types", [iv.ZeroIntervention, iv.CollectIntervention])
def test_an_intervention_at_a_module_that_is_called_twice_raises(types):
    model, declared = odd("twice.output", types)
    with pytest.raises(iv.NotFiredError, match=r"'twice.output.pos' \(twice\) was applied 2 times"):
        declared(torch.ones(1, 2, 4))
    assert hooks_of(model) == {}


def test_a_source_that_does_not_reach_the_place_raises():
    model, declared = odd("never.output", iv.VanillaIntervention)
    with pytest.raises(
        iv.NotFiredError, match=r"The source run did not reach the place of 'never.output.pos'"
    ):
        declared(torch.ones(1, 2, 4), [torch.zeros(1, 2, 4)])
    assert hooks_of(model) == {}


def test_every_call_is_checked_anew():
    model, declared = odd("some.output")
    assert declared(torch.ones(1, 2, 4)).receipt[0].fired == 1
    model.times = 0
    with pytest.raises(iv.NotFiredError, match="applied 0 times"):
        declared(torch.ones(1, 2, 4))
    model.times = 3
    with pytest.raises(iv.NotFiredError, match="applied 3 times"):
        declared(torch.ones(1, 2, 4))


def test_all_that_did_not_fire_are_named():
    model = Odd()
    config = [iv.RepresentationConfig(None, path) for path in ("never.output", "once.output", "twice.input")]
    declared = iv.IntervenableModel(iv.IntervenableConfig(config, iv.ZeroIntervention), model)
    with pytest.raises(iv.NotFiredError) as caught:
        declared(torch.ones(1, 2, 4))
    assert "never.output" in str(caught.value)
    assert "twice.input" in str(caught.value)
    assert "once" not in str(caught.value).split(";", 1)[1]


# Receipts


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_every_component_is_written_exactly_once_and_the_norm_of_its_change_is_right(family, variant):
    """Doubling changes an activation by itself; adding a constant, by the constant's norm for each unit."""
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    places = everything(model)
    declared = wrapped(model, *(at(model, *place, intervention=lambda base: base + 1.0) for place in places))
    named = [at(model, *place, name=".".join(place)) for place in places]
    readings = wrapped(model, *named, types=iv.CollectIntervention)
    where = [located(model, *place, "ragged") for place in places]
    with torch.no_grad():
        receipt = declared(inputs, unit_locations={"base": where}).receipt
        output = readings(inputs, unit_locations={"base": where})

    assert [line.fired for line in receipt] == [1] * 2 * len(places)
    for index, place in enumerate(places):
        values = output.collected[".".join(place)]
        there = output.collected_mask.get(".".join(place), torch.ones_like(values, dtype=torch.bool))
        there = there if there.dim() == values.dim() else there[..., None].expand_as(values)
        there = there & (values > -1e30)  # a score under the mask stays as it is
        for example in range(2):
            numbers = int(there[example].sum())
            line = receipt[2 * index + example]
            assert line.example == example
            assert line.change == pytest.approx(numbers**0.5, rel=1e-4), place


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "gru"])
def test_the_change_of_a_swap_is_the_distance_between_base_and_source(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    declared = wrapped(model, at(model, "block_output"))
    with torch.no_grad():
        given, taken = (by_hand.seen(model, "block_output", inputs) for inputs in (base, source))
        receipt = declared(base, [source], {"sources->base": ([[[2], [0, 1]]], [[[3], [5, 6]]])}).receipt
        whole = declared(base, [source]).receipt

    assert receipt[0].change == pytest.approx(float((taken[0, 2] - given[0, 3]).norm()), rel=1e-5)
    assert receipt[1].change == pytest.approx(float((taken[1, :2] - given[1, 5:]).norm()), rel=1e-5)
    assert [line.change for line in whole] == pytest.approx(
        (taken - given).flatten(1).norm(dim=1).tolist(), rel=1e-5
    )


class Words:
    """A tokenizer, as far as receipts need one."""

    def decode(self, ids):
        return f"w{ids[0]}"


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_receipt_names_site_positions_heads_and_tokens(padding):
    model = tiny("llama")
    inputs = tiny_inputs(model, padding=padding)
    declared = iv.IntervenableModel(
        iv.IntervenableConfig(
            [at(model, "block_input"), at(model, "head_value_output", "h.pos"), at(model, "mlp_output")],
            iv.ZeroIntervention,
        ),
        model,
        tokenizer=Words(),
    )
    where = [[[0], [1, -1]], [[[0], [0, 1]], [[2], [3]]], [[4], [-2]]]
    with torch.no_grad():
        receipt = declared(inputs, unit_locations={"base": where}).receipt

    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    last = len(rows[1]) - 1
    assert [line.site for line in receipt[::2]] == [
        "model.layers.1.input",
        "model.layers.1.self_attn.v_proj.output",
        "model.layers.1.mlp.output",
    ]
    assert [line.positions for line in receipt] == [(0,), (1, last), (2,), (3,), (4,), (last - 1,)]
    assert [line.heads for line in receipt] == [None, None, (0,), (0, 1), None, None]
    expected = [[rows[line.example][position] for position in line.positions] for line in receipt]
    assert [line.tokens for line in receipt] == [
        tuple(f"w{token}" for token in tokens) for tokens in expected
    ]
    assert {line.intervention for line in receipt} == {"ZeroIntervention"}
    assert str(receipt).count("model.layers.1.mlp.output") == 2


def test_a_reading_changes_nothing_and_a_left_out_intervention_is_named():
    model = tiny("gpt2")
    declared = wrapped(
        model,
        at(model, "block_output", intervention=iv.CollectIntervention(), name="reading"),
        at(model, "mlp_output", intervention=iv.ZeroIntervention(), name="left out"),
    )
    with torch.no_grad():
        receipt = declared(tiny_inputs(model), unit_locations={"base": [[[1], [1]], None]}).receipt
    assert [(line.name, line.fired, line.change) for line in receipt] == [("reading", 1, 0.0)] * 2
    assert receipt.skipped == ("left out",)


def test_receipts_of_a_perceptron_count_one_position():
    model = MLPClassifier(width=HIDDEN, layers=2, classes=3)
    declared = wrapped(model, at(model, "block_output"), types=iv.ZeroIntervention)
    values = torch.randn(3, HIDDEN)
    output = declared(values, unit_locations={"base": 0})
    hidden = model.layers[1](model.layers[0](values))
    assert [line.change for line in output.receipt] == pytest.approx(hidden.norm(dim=1).tolist(), rel=1e-5)
    assert torch.equal(main_output(output.intervened), model.score(torch.zeros(3, HIDDEN)))
