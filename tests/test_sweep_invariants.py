"""What every sweep has to fulfil on any model, and that it is a loop of patched runs."""

from __future__ import annotations

import pytest
import torch
from declared import heads_of, main_output, map_of, writable
from sweep_by_hand import ByHand, cells_of
from tiny_registry import build
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable.sweeping import sweep
from model_maps import COMPONENTS
from tiny_models import DECODERS, tiny, tiny_inputs

LENGTH, LAST = 7, -1
DIFFERS = 3
"""The token at which two prompts differ that differ in one alone."""
CASES = (*((family, None) for family in DECODERS), ("falcon", "grouped"), ("gpt_neox", "sequential"))


def metric(logits: Tensor) -> Tensor:
    """Some logits at the last token, for each example."""
    return logits[:, LAST, 3:9]


def prompts(model, differs=None):
    """Two prompts for each of two examples: unlike everywhere, or in some tokens of the answering stack alone."""
    clean, corrupted = (tiny_inputs(model, length=LENGTH, seed=seed) for seed in (0, 1))
    ids = next(key for key in clean if key.endswith("input_ids") and (key[0] == "d" or len(clean) < 3))
    if differs is not None:
        corrupted = {key: value.clone() for key, value in clean.items()}
        corrupted[ids][:, differs] = (corrupted[ids][:, differs] + 5) % 60 + 3
    return clean, corrupted


def unpatched(model, inputs) -> Tensor:
    with torch.no_grad():
        return metric(main_output(model(**inputs)))


def near(values: Tensor, expected: Tensor) -> None:
    assert_close(values, expected.expand_as(values), atol=1e-5, rtol=1e-5)


def stream(model) -> str:
    """The prefix of the stack whose answer is measured."""
    return "decoder_" if map_of(model).stacks else ""


MODELS = [*CASES, ("bert", None), ("t5", None)]


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_equal_prompts_give_the_unpatched_answer_to_the_bit(family, variant):
    model, start = tiny(family, variant=variant), ""
    start = stream(model)
    clean, _ = prompts(model)
    kinds = [f"{start}block_input", f"{start}mlp_contribution", f"{start}attention_contribution"]
    values = sweep(model, clean, dict(clean), kinds, ("layer", "pos"), metric)
    assert (values.values == values.baseline_corrupted).all()
    assert (values.baseline_clean == values.baseline_corrupted).all()
    heads = [f"{start}head_attention_value_output", f"{start}attention_pattern"]
    values = sweep(model, clean, dict(clean), heads, ("layer", "head"), metric)
    assert (values.values == values.baseline_corrupted).all()


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_where_prompts_differ_in_a_token_the_first_stream_at_it_is_all_there_is(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model, DIFFERS)
    values = sweep(model, clean, corrupted, f"{stream(model)}block_input", "pos", metric, layers=0).values
    right, wrong = unpatched(model, clean), unpatched(model, corrupted)
    assert (right - wrong).abs().max() > 1e-3
    near(values[DIFFERS], right)
    others = [position for position in range(len(values)) if position != DIFFERS]
    near(values[others], wrong)


@pytest.mark.parametrize(("family", "variant"), [*CASES, ("t5", None)])
def test_nothing_before_the_first_differing_token_matters_in_a_causal_model(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model, DIFFERS)
    result = sweep(model, clean, corrupted, f"{stream(model)}block_input", ("layer", "pos"), metric)
    near(result.values[:, :DIFFERS], unpatched(model, corrupted))
    moved = (result.values[:, DIFFERS:] - unpatched(model, corrupted)).abs().amax((0, 2, 3))
    assert (moved > 1e-3).any()


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_the_last_mlp_matters_at_the_token_that_is_read_alone(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model)
    component = f"{stream(model)}mlp_contribution"
    values = sweep(model, clean, corrupted, component, "pos", metric, layers=-1).values
    near(values[:-1], unpatched(model, corrupted))
    assert (values[-1] - unpatched(model, corrupted)).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_all_heads_of_a_layer_are_its_attention(family, variant):
    model = tiny(family, variant=variant)
    start = stream(model)
    clean, corrupted = prompts(model)
    heads = sweep(model, clean, corrupted, f"{start}head_attention_value_output", "layer", metric).values
    whole = sweep(model, clean, corrupted, f"{start}attention_output", "layer", metric).values
    near(heads, whole)
    assert (whole - unpatched(model, corrupted)).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_all_rows_of_a_pattern_are_the_pattern(family, variant):
    model = tiny(family, variant=variant)
    component = f"{stream(model)}attention_pattern"
    clean, corrupted = prompts(model)
    length = 5 if stream(model) else LENGTH
    rows = sweep(
        model, clean, corrupted, component, ("layer", "head", "query"), metric, queries=[tuple(range(length))]
    )
    whole = sweep(model, clean, corrupted, component, ("layer", "head"), metric)
    near(rows.values[:, :, 0], whole.values)
    assert (whole.values - unpatched(model, corrupted)).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "variant"), [*CASES, ("t5", None)])
def test_what_no_token_may_read_does_not_matter(family, variant):
    model = tiny(family, variant=variant)
    component = f"{stream(model)}attention_pattern"
    clean, corrupted = prompts(model)
    axes = ("layer", "head", "query", "key")
    values = sweep(
        model, clean, corrupted, component, axes, metric, layers=[1], heads=[2], queries=[1, 3], keys=[2, 4]
    ).values[0, 0]
    wrong = unpatched(model, corrupted)
    near(values[0], wrong)  # token 1 reads neither 2 nor 4
    near(values[1, 1], wrong)  # token 3 does not read 4
    assert (values[1, 0] - wrong).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_logits_are_swept_where_they_are_read(family):
    """Also in a model whose output embedding is one of several modules that make the logits."""
    model = tiny(family)
    clean, corrupted = prompts(model)
    values = sweep(model, clean, corrupted, "logits", "pos", metric).values
    near(values[:-1], unpatched(model, corrupted))
    near(values[-1], unpatched(model, clean))


def test_logits_without_positions_are_swept_as_a_whole():
    made = build("vit", "image-classification")
    clean, corrupted = made.inputs, {name: value + 1 for name, value in made.inputs.items()}
    scores = made.model(**clean).logits[:, 0]
    found = sweep(made.model, clean, corrupted, "logits", (), lambda logits: logits.flatten(1)[:, 0])
    near(found.values, scores)
    with pytest.raises(
        iv.LocationRangeError, match=r"pos 1: .*logits has 1 position\(s\) where the run has 17"
    ):
        sweep(made.model, clean, corrupted, "logits", "pos", lambda logits: logits.flatten(1)[:, 0])


# --- against loops by hand --------------------------------------------------------------------------------

BY_HAND = [(family, None) for family in DECODERS]
UNTOLD = ("expanded_head_key", "expanded_head_value", "final_norm_scale", "router_output")


def by_hand_is_able(component: str) -> bool:
    """Whether the loop can do a component; scores and patterns are told apart below."""
    matrix = COMPONENTS[component].axes == "matrix"
    return component not in UNTOLD and not matrix


def told(logits: Tensor) -> Tensor:
    """All logits of two tokens."""
    return logits[:, [2, LAST]]


def closely(found: Tensor, cells: list[Tensor], logits: Tensor) -> None:
    assert_close(found.flatten(0, -4), torch.stack(cells), rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize(("family", "variant"), BY_HAND)
def test_every_component_is_swept_as_a_loop_by_hand_would(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model, slice(2, None))
    by_hand = ByHand(model, family, variant, clean, corrupted)
    for component in writable(model):
        if not by_hand_is_able(component):
            continue
        axes = {"layer": [1], "pos": [0, 4]}  # before the first token that differs, and behind it
        if COMPONENTS[component].scope == "model":
            del axes["layer"]
        subsets = {"layers": axes.get("layer"), "positions": axes["pos"]}
        result = sweep(model, clean, corrupted, component, tuple(axes), told, **subsets)
        cells = [by_hand.logits(component, cell) for cell in cells_of(**axes)]
        closely(result.values, [told(cell) for cell in cells], cells[0])


FEW = [("gpt2", None), ("llama", None), ("gemma2", None), ("falcon", None)]
AXES = {
    "stream": [("layer",), ("pos", "layer")],
    "heads": [("layer", "head"), ("head", "pos")],
}


@pytest.mark.parametrize(("family", "variant"), FEW)
def test_every_axis_is_swept_as_a_loop_by_hand_would(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model)
    by_hand = ByHand(model, family, variant, clean, corrupted)
    for component in writable(model):
        if not by_hand_is_able(component) or COMPONENTS[component].scope == "model":
            continue
        heads = range(heads_of(model, component))
        for axes in AXES[COMPONENTS[component].axes]:
            every = {"layer": [0, 2], "pos": [1, LENGTH - 1], "head": heads}
            entries = {axis: every[axis] for axis in axes}
            subsets = {"layers": every["layer"] if "layer" in axes else 1}
            if "pos" in axes:
                subsets["positions"] = [1, LAST]
            fixed = {} if "layer" in axes else {"layer": 1}
            result = sweep(model, clean, corrupted, component, axes, told, **subsets)
            cells = [by_hand.logits(component, {**fixed, **cell}) for cell in cells_of(**entries)]
            closely(result.values, [told(cell) for cell in cells], cells[0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("component", ["attention_pattern", "attention_scores", "attention_scores_masked"])
def test_attention_matrices_are_swept_as_a_loop_by_hand_would(family, component):
    model = tiny(family, attention="eager")
    clean, corrupted = prompts(model)
    by_hand = ByHand(model, family, None, clean, corrupted)
    for axes, subsets in (
        ({"layer": range(3), "head": range(4)}, {}),
        ({"head": range(4), "query": [2, 6]}, {"layers": 1, "queries": [2, 6]}),
        ({"head": [1], "query": [6], "key": range(7)}, {"layers": 1, "heads": 1, "queries": 6}),
    ):
        fixed = {} if "layer" in axes else {"layer": 1}
        result = sweep(model, clean, corrupted, component, tuple(axes), told, **subsets)
        cells = [by_hand.logits(component, {**fixed, **cell}) for cell in cells_of(**axes)]
        closely(result.values, [told(cell) for cell in cells], cells[0])


def test_shared_heads_repeated_are_the_shared_head():
    model = tiny("llama")
    clean, corrupted = prompts(model)
    for repeated, shared in (
        ("expanded_head_key", "rotary_key"),
        ("expanded_head_value", "head_value_output"),
    ):
        pairs = sweep(model, clean, corrupted, repeated, ("layer", "head"), told, heads=[(0, 1), (2, 3)])
        one = sweep(model, clean, corrupted, shared, ("layer", "head"), told)
        near(pairs.values, one.values)


def test_the_divisor_of_the_last_norm_is_swept_as_a_loop_by_hand_would():
    model = tiny("llama")
    clean, corrupted = prompts(model)
    by_hand = ByHand(model, "llama", None, clean, corrupted)
    result = sweep(model, clean, corrupted, "final_norm_scale", "pos", told)
    cells = [by_hand.logits("final_norm_scale", cell) for cell in cells_of(pos=range(LENGTH))]
    closely(result.values, [told(cell) for cell in cells], cells[0])
    assert (result.values - result.baseline_corrupted).abs().max() > 1e-2


def test_the_logits_of_a_router_are_swept_as_a_loop_by_hand_would():
    """Weights and chosen experts follow from the logits, so all that the router hands on is the clean run's."""
    model = tiny("mixtral")
    clean, corrupted = prompts(model)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    cells = range(LENGTH)

    def with_router_of(place: int, clean_out: tuple[Tensor, ...] | None) -> tuple[tuple[Tensor, ...], Tensor]:
        seen: list[tuple[Tensor, ...]] = []

        def swap(_module, _args, out):
            seen.append(tuple(part.clone() for part in out))
            if clean_out is None:
                return None
            rows = torch.arange(len(out[0])) % LENGTH == place  # an example's tokens after the other's
            return tuple(
                torch.where(rows[:, None], theirs, own) for theirs, own in zip(clean_out, out, strict=True)
            )

        handle = gate.register_forward_hook(swap)
        try:
            with torch.no_grad():
                logits = main_output(model(**(clean if clean_out is None else corrupted)))
        finally:
            handle.remove()
        return seen[0], logits

    of_clean, _ = with_router_of(0, None)
    expected = [told(with_router_of(place, of_clean)[1]) for place in cells]
    result = sweep(model, clean, corrupted, "router_output", "pos", told, layers=1)
    closely(result.values, expected, unpatched(model, corrupted))
    assert (result.values - result.baseline_corrupted).abs().max() > 1e-4


def test_what_the_loop_by_hand_leaves_out_is_swept_elsewhere():
    """Every writable component is in one of the tests above."""
    for family in DECODERS:
        for component in writable(tiny(family)):
            told_elsewhere = COMPONENTS[component].axes == "matrix" or component in UNTOLD
            assert by_hand_is_able(component) or told_elsewhere, (family, component)
