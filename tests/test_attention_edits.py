"""Edits of scores and patterns, against attention written out from queries, keys and values."""

from __future__ import annotations

import by_hand
import pytest
import torch
from attention_by_hand import offsets_of, put, run_written_out
from declared import LAYER, main_output, wrapped
from torch.testing import assert_close

import intervenable as iv
from tiny_models import tiny, tiny_inputs

MODELS = [("llama", None), ("llama", "full"), ("gpt2", None), ("bert", None)]
"""Grouped heads, a key for each head, fused projections, and queries that read ahead."""
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def edit(component, unit="h.query.key", intervention=None, **fields):
    return iv.RepresentationConfig(LAYER, component, unit, intervention=intervention, **fields)


def masked(change):
    """A change of scores, to leave the mask as it is."""
    return lambda score: score if score == -torch.inf else change(score)


def rows_divided(change):
    """Divide the rows that a change touched by their sums; those without mass stay zero."""

    def changed(matrix):
        new = change(matrix)
        sums = new.sum(-1, keepdim=True)
        touched = (new != matrix).any(-1, keepdim=True)
        return torch.where(touched & (sums > 0), new / sums.where(sums > 0, 1.0), new)

    return changed


def zero(value):
    return value * 0


UNIFORM = torch.arange(1, 8).float().reciprocal()[:, None].expand(7, 7).tril()
"""Each query reads all keys up to itself alike."""

CASES = {
    "a column zeroed after the softmax": (
        edit("attention_pattern", intervention=iv.ZeroIntervention(), where={"keys": 1}),
        lambda at: {"pattern": put(at, zero, keys=[1])},
    ),
    "a column knocked out before the softmax": (
        edit("attention_scores", intervention=iv.KnockoutIntervention(), where={"keys": 1}),
        lambda at: {"scores": put(at, lambda score: -torch.inf, keys=[1])},
    ),
    "the only key of the first query knocked out": (
        edit("attention_scores", intervention=iv.KnockoutIntervention(), where={"heads": [0, 2], "keys": 0}),
        lambda at: {"scores": put(at, lambda score: -torch.inf, heads=[0, 2], keys=[0])},
    ),
    "rows of all heads zeroed": (
        edit("attention_pattern", "h.query", iv.ZeroIntervention(), where={"queries": [3, 5]}),
        lambda at: {"pattern": put(at, zero, queries=[3, 5])},
    ),
    "scores of two heads halved": (
        edit("attention_scores", "h", iv.ScaleIntervention(0.5), where={"heads": [1, 3]}),
        lambda at: {"scores": put(at, masked(lambda score: score * 0.5), heads=[1, 3])},
    ),
    "scores of a row scaled by zero, which removes no key": (
        edit("attention_scores", "h.query", iv.ScaleIntervention(0.0), where={"queries": 4}),
        lambda at: {"scores": put(at, masked(zero), queries=[4])},
    ),
    "a number added to a few scores": (
        edit(
            "attention_scores",
            intervention=iv.AdditionIntervention(source_representation=torch.tensor(1.5)),
            where={"heads": 2, "queries": [3, 4], "keys": [0, 2]},
        ),
        lambda at: {"scores": put(at, masked(lambda s: s + 1.5), heads=[2], queries=[3, 4], keys=[0, 2])},
    ),
    "a pattern squared by a function, and its rows divided by their sums": (
        edit(
            "attention_pattern",
            "h",
            lambda base: base**2,
            where={"heads": -1},
            renormalize="rows",
        ),
        lambda at: {"pattern": rows_divided(put(at, lambda p: p**2, heads=[3]))},
    ),
    "the first column zeroed and rows divided, the first one being left without mass": (
        edit("attention_pattern", intervention=iv.ZeroIntervention(), where={"keys": 0}, renormalize="rows"),
        lambda at: {"pattern": rows_divided(put(at, zero, keys=[0]))},
    ),
    "no query reads itself": (
        edit("attention_pattern", intervention=iv.ZeroIntervention(), where={"keys": "self"}),
        lambda at: {"pattern": put(at, zero, chosen=lambda query, key: query == key)},
    ),
    "two queries read nothing but themselves": (
        edit(
            "attention_pattern",
            intervention=iv.ScaleIntervention(0.25),
            where={"heads": 1, "queries": [2, 4], "keys": "others"},
        ),
        lambda at: {
            "pattern": put(
                at, lambda p: p * 0.25, heads=[1], queries=[2, 4], chosen=lambda query, key: query != key
            )
        },
    ),
}


def compared(family, variant, attention, inputs, representation, changes, call=()):
    """The same edit by hand and by us: outputs of the block's attention and of the model, at real tokens."""
    reference = tiny(family, variant=variant, attention="eager")
    model = tiny(family, variant=variant, attention=attention)
    found = []
    with torch.no_grad():
        plain = main_output(reference(**inputs))
        expected, seen = run_written_out(reference, inputs, **changes)
        declared = wrapped(model, representation)
        handle = by_hand.hook(model, "attention_output", lambda value: found.append(value.clone()))
        result = main_output(declared(inputs, *call).intervened)
        handle.remove()
    real = inputs["attention_mask"].bool()
    assert_close(found[-1][real], seen.output[-1][real], **CLOSE)
    assert_close(result[real], expected[real], **CLOSE)
    assert (result - plain)[real].abs().max() > 1e-4, "the edit changed nothing"


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
@pytest.mark.parametrize("case", CASES)
def test_an_edit_of_attention_is_that_of_the_formula_written_out(case, family, variant, attention, padding):
    representation, by_formula = CASES[case]
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model, padding=padding)
    if padding:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    compared(family, variant, attention, inputs, representation, by_formula(offsets_of(inputs)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_a_pattern_swapped_in_from_a_source_is_the_sources(family, variant, attention):
    model = tiny(family, variant=variant, attention="eager")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    with torch.no_grad():
        _, there = run_written_out(model, source)
    for component, matrix in (("attention_pattern", there.pattern[0]), ("attention_scores", there.scores[0])):

        def swapped(value, matrix=matrix):
            new = value.clone()
            new[:, 2] = matrix[:, 2]
            return new

        name = component.removeprefix("attention_")
        representation = edit(component, "h", iv.VanillaIntervention(), where={"heads": 2})
        compared(family, variant, attention, base, representation, {name: swapped}, ([source],))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_entries_of_a_source_go_to_other_queries_and_keys(family, variant, attention):
    """Prompts of different lengths; each example has locations of its own."""
    model = tiny(family, variant=variant, attention="eager")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1, length=5)
    with torch.no_grad():
        _, there = run_written_out(model, source)
    taken = [[[0], [3]], [[4], [2, 3]], [[1, 2], [0]]]
    given = [[[1], [3]], [[5], [4, 6]], [[2, 3], [1]]]

    def moved(value):
        new, old = value.clone(), there.pattern[0]
        new[0, 1, 5, 2], new[0, 1, 5, 3] = old[0, 0, 4, 1], old[0, 0, 4, 2]
        new[1, 3, 4, 1], new[1, 3, 6, 1] = old[1, 3, 2, 0], old[1, 3, 3, 0]
        return new

    call = ([source], {"sources->base": ([taken], [given])})
    representation = edit("attention_pattern", intervention=iv.VanillaIntervention())
    compared(family, variant, attention, base, representation, {"pattern": moved}, call)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["whole matrices", "located"])
def test_a_constant_may_be_given_for_whole_matrices_or_for_what_is_located(shape, attention):
    model = tiny("llama", attention="eager")
    inputs = tiny_inputs(model)

    def put_in(value):
        new = value.clone()
        new[:, 2, 3:5] = UNIFORM[3:5]
        return new

    constant = UNIFORM if shape == "whole matrices" else UNIFORM[3:5]
    representation = edit(
        "attention_pattern",
        "h.query",
        iv.VanillaIntervention(),
        source_representation=constant,
        where={"heads": 2, "queries": [3, 4]},
        renormalize="check",
    )
    compared("llama", None, attention, inputs, representation, {"pattern": put_in})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_the_masked_scores_are_the_softmaxs_true_input(family, variant, attention):
    """Without protection, a score of zero under the mask lets a query read ahead."""
    model = tiny(family, variant=variant, attention="eager")
    inputs = tiny_inputs(model)

    def opened(value):
        new = value.clone()
        new[:, 1, 2, 5] = 0
        return new

    representation = edit(
        "attention_scores_masked",
        intervention=iv.ZeroIntervention(),
        where={"heads": 1, "queries": 2, "keys": slice(5, 6)},
    )
    compared(family, variant, attention, inputs, representation, {"scores": opened})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_what_is_read_is_what_the_formula_computes(family, variant, padding, attention):
    reference = tiny(family, variant=variant, attention="eager")
    model = tiny(family, variant=variant, attention=attention)
    inputs = tiny_inputs(model, padding=padding)
    if padding == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    names = ("attention_scores", "attention_pattern", "expanded_head_value")
    readings = wrapped(
        model,
        *(iv.RepresentationConfig(LAYER, name, "h", name=name) for name in names),
        types=iv.CollectIntervention,
    )
    with torch.no_grad():
        _, seen = run_written_out(reference, inputs)
        collected = readings(inputs).collected
    real = inputs["attention_mask"].bool()
    for example in range(2):
        rows = real[example]
        for name, expected in zip(names, (seen.scores[0], seen.pattern[0], seen.values[0]), strict=True):
            assert_close(collected[name][example][:, rows], expected[example][:, rows], **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_gradients_through_an_edited_pattern_are_those_of_the_formula(family, variant, attention):
    reference = tiny(family, variant=variant, attention="eager")
    model = tiny(family, variant=variant, attention=attention)
    inputs = tiny_inputs(model)
    weight, other = (torch.nn.Parameter(torch.tensor(0.7)) for _ in range(2))

    def scaled(matrix):
        factor = torch.ones(7, 7)
        factor[2:5, 1] = 0
        return matrix * factor + matrix * (1 - factor) * weight

    def loss(logits):
        return (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()

    expected, _ = run_written_out(reference, inputs, pattern=scaled)
    loss(expected).backward()
    representation = edit(
        "attention_pattern", intervention=lambda base: base * other, where={"queries": [2, 3, 4], "keys": 1}
    )
    loss(main_output(wrapped(model, representation)(inputs).intervened)).backward()

    assert weight.grad.abs() > 1e-3
    assert_close(other.grad, weight.grad, atol=1e-4, rtol=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_are_numbers_where_a_query_is_left_without_keys(attention):
    model = tiny("llama", attention=attention)
    knockout = edit("attention_scores", intervention=iv.KnockoutIntervention(), where={"keys": 0})
    logits = wrapped(model, knockout)(tiny_inputs(model)).intervened.logits
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert model.model.layers[LAYER].self_attn.q_proj.weight.grad.abs().max() > 0


def test_the_formula_written_out_is_the_models_own():
    for family, variant in MODELS:
        model = tiny(family, variant=variant, attention="eager")
        inputs = tiny_inputs(model)
        with torch.no_grad():
            result, _ = run_written_out(model, inputs)
            assert_close(result, main_output(model(**inputs)), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("intervention", [iv.ZeroIntervention(), iv.ScaleIntervention(0.0)])
def test_the_change_of_scores_leaves_out_those_under_the_mask(intervention, attention):
    model = tiny("llama", attention=attention)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        _, seen = run_written_out(tiny("llama", attention="eager"), inputs)
        receipt = wrapped(model, edit("attention_scores", "h", intervention))(inputs).receipt
    norms = seen.scores[0].masked_fill(seen.scores[0] == -torch.inf, 0.0).flatten(1).norm(dim=1)
    assert [line.change for line in receipt] == pytest.approx(norms.tolist(), rel=1e-5)
