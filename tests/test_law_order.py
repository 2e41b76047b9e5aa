"""Law 7: linked interventions share weights alone, grouped ones a source run; at one place they compose in order."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import permutations

import by_hand
import pytest
import torch
from declared import at, main_output, same_bits, wrapped, writable
from torch.testing import assert_close

import intervenable as iv
from tiny_models import HIDDEN, LANGUAGE_MODELS, tiny, tiny_inputs


@contextmanager
def counted(model):
    """Counts how often each block and the head are run; user hooks see it all."""
    calls = {"runs": 0, 0: 0, 1: 0, 2: 0, "logits": 0}

    def count(name):
        def look(*_):
            calls[name] += 1

        return look

    modules = {"runs": model, "logits": by_hand.module_at(model, "logits")[0]}
    modules |= {layer: by_hand.block_of(model, layer) for layer in range(3)}
    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


def block_output_with(model, declared, *call):
    """What leaves the middle block, which is what the last one reads, in a call."""
    found = []
    handle = by_hand.hook(model, "block_input", lambda value: found.append(value.clone()), layer=2)
    with torch.no_grad():
        declared(*call)
    handle.remove()
    return found[-1]


# Linked


def test_linked_interventions_each_read_their_own_base():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    one = torch.ones(HIDDEN)
    declared = wrapped(
        model,
        at(model, "block_output", intervention_link_key="same", source_representation=one),
        at(model, "block_output", intervention_link_key="same", source_representation=one),
        types=iv.AdditionIntervention,
    )
    with torch.no_grad():
        expected = by_hand.seen(model, "block_output", inputs)
    expected[:, 1:3] += 1
    result = block_output_with(model, declared, inputs, None, {"base": [[[1], [1]], [[2], [2]]]})
    assert_close(result, expected)
    assert len(set(map(id, declared.interventions.values()))) == 1


def test_linked_interventions_at_different_layers_share_their_parameters_and_nothing_else():
    model = tiny("gpt2")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    linked = wrapped(
        model,
        *(
            at(model, "block_output", layer=layer, low_rank_dimension=3, intervention_link_key=0)
            for layer in (0, 2)
        ),
        types=iv.LowRankRotatedSpaceIntervention,
    )
    (learned,) = linked.parameters()  # counted once
    (shared,) = set(linked.interventions.values())
    apart = wrapped(model, *(at(model, "block_output", layer=layer, intervention=shared) for layer in (0, 2)))
    where = {"sources->base": ([[[1]] * 2, [[2]] * 2], [[[4]] * 2, [[5]] * 2])}
    with torch.no_grad():
        expected = main_output(apart(base, [source, source], where).intervened)
    result = main_output(linked(base, [source], where).intervened)

    assert_close(result, expected)
    result.square().sum().backward()
    assert learned.grad.abs().max() > 0


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_linked_low_rank_parts_on_one_place_agree_in_either_order(order):
    model = tiny("gpt2")
    base, sources = tiny_inputs(model, seed=0), [tiny_inputs(model, seed=seed) for seed in (1, 2)]
    torch.manual_seed(0)
    declared = wrapped(
        model,
        *(
            at(
                model,
                "block_output",
                low_rank_dimension=4,
                subspace_partition=[[0, 2], [2, 4]],
                intervention_link_key="parts",
            )
            for _ in order
        ),
        types=iv.LowRankRotatedSpaceIntervention,
    )
    where = {"sources->base": 3}
    parts = [[[part]] * 2 for part in order]
    result = declared(base, [sources[part] for part in order], where, subspaces=parts).intervened.logits
    straight = declared(base, sources, where, subspaces=[[[0]] * 2, [[1]] * 2]).intervened.logits
    assert_close(result, straight, atol=1e-5, rtol=1e-5)
    (learned,) = declared.parameters()
    assert torch.autograd.grad(result.square().sum(), learned)[0].abs().max() > 0


# At one place


def test_several_at_one_place_apply_in_declared_order_each_seeing_the_last():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    edits = {
        "double": lambda base: 2 * base,
        "one": lambda base: base + 1,
        "square": lambda base: base * base,
    }
    with torch.no_grad():
        plain = by_hand.seen(model, "block_output", inputs)
    for order in permutations(edits):
        declared = wrapped(model, *(at(model, "block_output", intervention=edits[name]) for name in order))
        expected = plain.clone()
        for name in order:
            expected[:, 4] = edits[name](expected[:, 4])
        assert_close(block_output_with(model, declared, inputs, None, {"base": 4}), expected)


def test_several_at_one_place_with_positions_that_overlap_in_part():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    declared = wrapped(
        model,
        at(model, "block_output", intervention=lambda base: base + 1),
        at(model, "block_output", intervention=lambda base: base * 3),
        at(model, "block_output", intervention=iv.CollectIntervention()),
    )
    where = {"base": [[[1, 2], [0]], [[2], [0, 5]], [[1, 2], [0, 5]]]}
    with torch.no_grad():
        plain = by_hand.seen(model, "block_output", inputs)
        (reading,) = declared(inputs, unit_locations=where).collected_activations
    expected = torch.stack(
        [
            torch.stack([plain[0, 1] + 1, (plain[0, 2] + 1) * 3]),
            torch.stack([(plain[1, 0] + 1) * 3, plain[1, 5] * 3]),
        ]
    )
    assert_close(reading, expected)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_reading_sees_what_was_declared_before_it_and_not_after(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    for component in ("block_input", "query_output", "mlp_output"):
        with torch.no_grad():
            before, after = wrapped(
                model,
                at(model, component, intervention=iv.CollectIntervention(), name="before"),
                at(model, component, intervention=iv.ZeroIntervention()),
                at(model, component, intervention=iv.CollectIntervention(), name="after"),
            )(inputs, unit_locations={"base": [2]}).collected_activations
        assert before.abs().max() > 0
        assert not after.any()


def test_views_of_one_tensor_compose_in_declared_order():
    """Query, key and value of GPT-2 are columns of one tensor, and heads are columns of those."""
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    by_one = wrapped(
        model,
        at(model, "query_output", intervention=lambda base: base + 1),
        at(model, "head_query_output", "h", intervention=lambda base: base * 2),
        at(model, "value_output", intervention=iv.ZeroIntervention()),
    )

    def change(stream):
        new = stream.clone()
        new[..., :16] += 1
        new[..., 4:8] *= 2
        new[..., 32:] = 0
        return new

    where = {"base": [[list(range(7))] * 2, [[1], [1]], [list(range(7))] * 2]}
    with torch.no_grad():
        result = main_output(by_one(inputs, unit_locations=where).intervened)
        expected = main_output(by_hand.run_with(model, "query_output", change, inputs))
    assert_close(result, expected)


# At different places


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_declared_order_of_different_places_does_not_matter(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    places = [
        ("embedding_output", 1),
        ("block_input", 2),
        ("head_value_output", 1),
        ("mlp_output", 1),
        ("logits", 1),
    ]
    edits = [
        at(model, name, layer=layer, intervention=lambda base, source: (base + source) / 2)
        for name, layer in places
    ]
    with torch.no_grad():
        results = [
            wrapped(model, *order)(base, [source]).intervened
            for order in (edits, edits[::-1], edits[2:] + edits[:2])
        ]
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_input_of_a_block_is_the_output_of_the_one_below(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    above = wrapped(model, at(model, "block_input", layer=2))
    below = wrapped(model, at(model, "block_output", layer=1))
    with torch.no_grad():
        where = {"sources->base": (1, 3)}
        assert same_bits(above(base, [source], where).intervened, below(base, [source], where).intervened)


# Source runs


def test_members_of_a_group_share_one_source_run():
    model = tiny("llama")
    base, sources = tiny_inputs(model), [tiny_inputs(model, seed=seed) for seed in (1, 2)]
    names = ("block_input", "mlp_output", "head_value_output", "query_output")
    grouped = wrapped(
        model, *(at(model, name, group_key=key) for name, key in zip(names, "abba", strict=True))
    )
    apart = wrapped(model, *(at(model, name) for name in names))
    with torch.no_grad(), counted(model) as calls:
        result = grouped(base, sources).intervened
        assert calls["runs"] == 3
        assert calls[0] == 3
        expected = apart(base, [sources[0], sources[1], sources[1], sources[0]]).intervened
        assert calls["runs"] == 6
    assert same_bits(result, expected)


def test_equal_sources_are_run_once():
    model = tiny("llama")
    base, source = tiny_inputs(model), tiny_inputs(model, seed=1)
    copied = {name: value.clone() for name, value in source.items()}
    other = {**source, "attention_mask": torch.ones(2, 7, dtype=torch.int32)}
    declared = wrapped(model, *(at(model, name) for name in ("block_input", "mlp_output", "query_output")))
    with torch.no_grad(), counted(model) as calls:
        for sources, runs in (
            ([source], 1),
            ([source, source, source], 1),
            ([source, copied, dict(source)], 1),
            ([source, base, copied], 2),
            ([source, other, source], 2),
        ):
            calls["runs"] = 0
            declared(base, sources)
            assert calls["runs"] == runs + 1, sources


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_source_run_stops_at_the_highest_place_it_feeds(family):
    model = tiny(family)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    for name in ("embedding_output", "block_input", "query_output", "mlp_output", "block_output"):
        if name not in writable(model):
            continue
        declared = wrapped(model, at(model, name), at(model, "mlp_input", layer=0))
        with torch.no_grad(), counted(model) as calls:
            declared(base, [source])
        reached = 0 if name == "embedding_output" else 1
        assert calls == {"runs": 2, 0: 2, 1: 1 + reached, 2: 1, "logits": 1}, name


def test_a_source_run_that_feeds_the_logits_goes_to_the_end():
    model = tiny("llama")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    with torch.no_grad(), counted(model) as calls:
        result = wrapped(model, at(model, "logits"))(base, [source]).intervened.logits
        assert calls == {"runs": 2, 0: 2, 1: 2, 2: 2, "logits": 2}
        assert torch.equal(result, model(**source).logits)


def test_interventions_without_a_source_run_run_none():
    model = tiny("llama")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    declared = wrapped(
        model,
        at(model, "block_output", intervention=iv.ZeroIntervention()),
        at(model, "mlp_output", source_representation=torch.ones(HIDDEN)),
        at(model, "mlp_output", layer=0),
    )
    with torch.no_grad(), counted(model) as calls:
        declared(base, [None, None, source])
        assert calls["runs"] == 2
        declared(base, [None, None, source], {"base": [None, None, None]})
        assert calls["runs"] == 3
