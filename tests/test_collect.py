"""Collecting equals hooks written by hand, reads what was asked for and nothing else, and leaves nothing behind."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial

import by_hand
import pytest
import torch
from declared import LAYER, components_of, hooks_of, is_inside, same_bits, wrapped
from torch.testing import assert_close
from transformers import GPT2Config, GPT2Model

import intervenable as iv
from model_maps import COMPONENTS
from tiny_models import CASES, RECURRENT, tiny, tiny_inputs

LAYOUTS = ("gpt2", "gpt_neox", "opt", "falcon", "llama", "mixtral", "phi3", "bert")
"""A family for each way in which components are laid out in tensors."""


def by_hand_at(model, family, variant, places, inputs):
    """What hooks of our own see, in one run, at each `(component, layer)`: its columns, its heads apart."""
    found = {}
    with ExitStack() as stack, torch.no_grad():
        for component, layer in places:
            keep = partial(lambda key, value: found.update({key: value.clone()}), (component, layer))
            stack.callback(by_hand.hook(model, component, keep, layer or 0).remove)
        model(**inputs)
    for (component, layer), value in found.items():
        columns = by_hand.columns(family, variant, component)
        if columns is not None:
            apart = value[..., columns]  # [b, s, heads, width]
            apart = apart.transpose(1, 2) if component.startswith("head_") else apart.flatten(2)
            found[component, layer] = apart
    return found


def stored(model):
    """The components that some module hands over as they are."""
    return [
        name
        for name in components_of(model)
        if not is_inside(name) and not COMPONENTS[name].derived_from and name != "block_mid"
    ]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_every_stored_component_of_every_layer_is_what_a_hook_sees(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    names = stored(model)
    layers = range(1 if family in RECURRENT else 3)
    places = [
        (name, layer) for name in names for layer in (layers if COMPONENTS[name].scope == "block" else [None])
    ]
    cache = iv.collect(model, inputs, names)
    assert sorted(cache, key=str) == sorted(places, key=str)
    for key, expected in by_hand_at(model, family, variant, places, inputs).items():
        assert torch.equal(cache[key], expected), key
        assert len(cache.axes[key]) == expected.dim()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "llama", "mistral", "qwen3", "opt", "bert"])
def test_patterns_are_what_the_model_itself_gives_out(family, attention):
    inputs = tiny_inputs(tiny(family), batch=3)
    with torch.no_grad():
        told = tiny(family, attention="eager")(**inputs, output_attentions=True).attentions
    cache = iv.collect(tiny(family, attention=attention), inputs, "attention_pattern")
    for layer, expected in enumerate(told):
        assert cache.axes["attention_pattern", layer] == ("batch", "head", "query", "key")
        assert_close(cache["attention_pattern", layer], expected, atol=1e-6, rtol=1e-5)


def test_scores_queries_keys_and_values_make_the_pattern_and_what_it_reads():
    model = tiny("llama")
    names = ["attention_scores", "attention_pattern", "rotary_query", "rotary_key", "expanded_head_value"]
    cache = iv.collect(model, tiny_inputs(model), [*names, "head_attention_value_output"], layers=1)
    keys = cache["rotary_key", 1].repeat_interleave(2, 1)
    scores = cache["rotary_query", 1] @ keys.mT / 6**0.5
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    assert_close(cache["attention_scores", 1][..., allowed], scores[..., allowed], atol=1e-5, rtol=1e-5)
    assert bool((cache["attention_scores", 1][..., ~allowed] == -torch.inf).all())
    assert_close(cache["attention_scores", 1].softmax(-1), cache["attention_pattern", 1])
    read = cache["attention_pattern", 1] @ cache["expanded_head_value", 1]
    assert_close(read, cache["head_attention_value_output", 1], atol=1e-5, rtol=1e-5)


def test_block_mid_is_the_input_and_what_attention_adds():
    model = tiny("llama")
    cache = iv.collect(model, tiny_inputs(model), ["block_mid", "block_input", "attention_contribution"])
    for layer in range(3):
        both = cache["block_input", layer] + cache["attention_contribution", layer]
        assert_close(cache["block_mid", layer], both)


# --- positions and groups ---------------------------------------------------------------------------------


def four_tokens():
    """A model whose embeddings of the tokens 0 to 3 are `[0, 1], [2, 3], [4, 5], [6, 7]`."""
    model = GPT2Model(GPT2Config(vocab_size=4, n_positions=4, n_embd=2, n_layer=1, n_head=1)).eval()
    with torch.no_grad():
        model.wte.weight.copy_(torch.arange(8.0).view(4, 2))
    return model, {"input_ids": torch.arange(4)[None]}


def test_groups_come_one_after_the_other_or_as_their_means():
    model, inputs = four_tokens()
    apart = iv.collect(model, inputs, "embedding_output", positions=[(0, 1), (3,)])
    assert apart["embedding_output"].tolist() == [[[0, 1], [2, 3], [6, 7]]]
    assert {label: rows.tolist() for label, rows in apart.by_group("embedding_output").items()} == {
        "(0, 1)": [[[0, 1], [2, 3]]],
        "(3,)": [[[6, 7]]],
    }
    means = iv.collect(model, inputs, "embedding_output", positions=[(0, 1), (3,)], group_means=True)
    assert means["embedding_output"].tolist() == [[[1, 2], [6, 7]]]
    assert means.axes["embedding_output"] == ("batch", "group", "hidden")
    assert means.layouts["embedding_output"].tokens["group"].labels == ("(0, 1)", "(3,)")


def test_groups_may_have_names_and_share_tokens():
    model, inputs = four_tokens()
    cache = iv.collect(
        model, inputs, "embedding_output", positions={"subject": (1, 2), "late": slice(2, None)}
    )
    groups = cache.by_group("embedding_output")
    assert groups["subject"].tolist() == [[[2, 3], [4, 5]]]
    assert groups["late"].tolist() == [[[4, 5], [6, 7]]]
    assert cache.positions["embedding_output"].tolist() == [[1, 2, 2, 3]]


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_count_real_tokens_and_may_differ_between_examples(family, padding):
    model = tiny(family)
    inputs = tiny_inputs(model, batch=3, padding=padding)
    names = ["block_output", "head_value_output", "attention_value_output"]
    cache = iv.collect(model, inputs, names, layers=LAYER, positions=[[0, -1], [2], [-2, 1, 0]])
    whole = iv.collect(model, inputs, names, layers=LAYER)
    assert cache.positions["block_output", 1].tolist() == [[0, 6, -1], [2, -1, -1], [3, 1, 0]]
    for name in names:
        entire, picked = whole.by_example((name, LAYER)), cache.by_example((name, LAYER))
        for rows, some, positions in zip(entire, picked, [[0, 6], [2], [3, 1, 0]], strict=True):
            assert torch.equal(some, rows[..., positions, :])
        at = cache.axes[name, LAYER].index("position")
        assert not cache[name, LAYER].movedim(at, 1)[1, 1:].any()  # what fills up is zero


def test_whole_activations_tell_padding_from_tokens():
    model = tiny("llama")
    inputs = tiny_inputs(model, batch=3, padding="left")
    cache = iv.collect(model, inputs, ["block_output", "attention_pattern"], layers=0)
    assert cache.positions["block_output", 0].tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [-1, 0, 1, 2, 3, 4, 5],
        [-1, -1, 0, 1, 2, 3, 4],
    ]
    alone = {name: value[2:, 2:] for name, value in inputs.items()}
    single = iv.collect(model, alone, ["block_output", "attention_pattern"], layers=0)
    for name in ("block_output", "attention_pattern"):
        assert_close(cache.by_example((name, 0))[2], single[name, 0][0], atol=1e-5, rtol=1e-4)


def test_a_mask_says_positions_too():
    model = tiny("gpt2")
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3] = mask[1, 5] = mask[1, 6] = True
    cache = iv.collect(model, tiny_inputs(model), "block_output", layers=0, positions=mask)
    assert cache.positions["block_output", 0].tolist() == [[3, -1], [5, 6]]


@pytest.mark.parametrize("family", LAYOUTS)
def test_heads_are_those_that_were_asked_for_in_their_order(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    names = ["head_query_output", "head_attention_value_output", "head_attention_output", "attention_pattern"]
    whole, some = (iv.collect(model, inputs, names, LAYER, heads=heads) for heads in (None, [3, 1]))
    assert same_bits(some, iv.collect(model, inputs, names, LAYER, heads=torch.tensor([3, 1])))
    for name in names:
        assert torch.equal(some[name, LAYER], whole[name, LAYER][:, [3, 1]])
        assert some.layouts[name, LAYER].heads == (3, 1)
        assert whole.layouts[name, LAYER].heads is None


def test_heads_positions_queries_and_keys_cut_together():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    whole = iv.collect(model, inputs, ["attention_pattern", "head_query_output"], LAYER)
    pattern = iv.collect(
        model, inputs, "attention_pattern", LAYER, heads=2, queries=[[4], [-1, 2]], keys=(0, 3)
    )
    expected = whole["attention_pattern", LAYER][:, 2:3]
    assert torch.equal(pattern["attention_pattern", LAYER][0, :, :1], expected[0][:, [4]][..., [0, 3]])
    assert torch.equal(pattern["attention_pattern", LAYER][1], expected[1][:, [6, 2]][..., [0, 3]])
    queries = iv.collect(model, inputs, "head_query_output", LAYER, positions=[5, 1], heads=[0, 2])
    assert torch.equal(
        queries["head_query_output", LAYER], whole["head_query_output", LAYER][:, [0, 2]][:, :, [5, 1]]
    )


def test_heads_may_differ_between_layers_and_components():
    model = tiny("llama")
    cache = iv.collect(
        model,
        tiny_inputs(model),
        ["attention_pattern", "head_value_output"],
        heads={0: [1], ("attention_pattern", 1): [3, 0], "head_value_output": 1},
    )
    heads = {key: layout.heads for key, layout in cache.layouts.items()}
    assert heads == {
        ("attention_pattern", 0): (1,),
        ("attention_pattern", 1): (3, 0),
        ("attention_pattern", 2): None,
        ("head_value_output", 0): (1,),
        ("head_value_output", 1): (1,),
        ("head_value_output", 2): (1,),
    }


def test_layers_and_components_may_be_said_in_many_ways():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)

    def keys(*arguments):
        return list(iv.collect(model, inputs, *arguments))

    assert keys("block_output") == [("block_output", layer) for layer in range(3)]
    assert keys("block_output", "all") == keys("block_output")
    assert keys(["block_output", "mlp_output"], -1) == [("block_output", 2), ("mlp_output", 2)]
    assert (
        keys("block_output", slice(1, None))
        == keys("block_output", range(1, 3))
        == keys("block_output", [1, 2])
    )
    assert (
        keys(("block_output", 1))
        == keys([("block_output", 1), ("block_output", -2)])
        == [("block_output", 1)]
    )
    assert keys([("block_output", 1), "logits", "attention_weight"], 0) == [
        ("block_output", 1),
        ("logits", None),
        ("attention_pattern", 0),
    ]
    path = "transformer.h[1].mlp.output"
    assert torch.equal(
        iv.collect(model, inputs, path)[path], iv.collect(model, inputs, "mlp_output", 1)["mlp_output", 1]
    )


def test_token_ids_are_the_ids_themselves():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    cache = iv.collect(
        model, inputs, ["input_ids", "block_output"], 0, positions=[[0], [2, 6]], dtype=torch.bfloat16
    )
    assert cache["input_ids"].tolist() == [
        [inputs["input_ids"][0, 0].item(), 0],
        inputs["input_ids"][1, [2, 6]].tolist(),
    ]
    assert cache.axes["input_ids"] == ("batch", "position")
    assert torch.equal(iv.collect(model, inputs, "input_ids")["input_ids"], inputs["input_ids"])


def test_logits_are_kept_at_the_positions_asked_for_alone():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="left")
    cache = iv.collect(model, inputs, "logits", positions=-1)
    assert cache.axes["logits"] == ("batch", "position", "vocabulary")
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = model(**inputs, position_ids=positions).logits[:, -1:]
    assert torch.equal(cache["logits"], expected)


# --- what a run does and does not -------------------------------------------------------------------------


def test_the_run_ends_with_the_deepest_place_asked_for():
    model = tiny("llama")
    reached = []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: reached.append(layer))
    model.lm_head.register_forward_hook(lambda *_: reached.append("head"))
    iv.collect(model, tiny_inputs(model), ["mlp_output", "attention_pattern"], layers=[0, 1])
    assert reached == [0]  # the run ended in the second block
    reached.clear()
    iv.collect(model, tiny_inputs(model), "logits")
    assert reached == [0, 1, 2, "head"]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_about_the_model_changes(training):
    model = tiny("llama").train(training)
    next(model.parameters()).requires_grad_(False)
    model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_hook(lambda *_: None)
    hooks = hooks_of(model)
    everything = [name for name in components_of(model) if name != "logits"]
    iv.collect(model, tiny_inputs(model), everything)
    with pytest.raises(ZeroDivisionError):
        iv.collect(model, tiny_inputs(model), "block_output", gradients_of=lambda output: 1 / 0)
    iv.collect(
        model, tiny_inputs(model), "block_output", gradients_of=lambda output: output.logits.sum((1, 2))
    )
    assert hooks_of(model) == hooks
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_no_graph_is_kept_and_gradients_of_the_caller_stay_on():
    model = tiny("llama")
    with torch.enable_grad():
        cache = iv.collect(model, tiny_inputs(model), "block_output")
        assert torch.is_grad_enabled()
    assert not any(value.requires_grad for value in cache.values())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom"])
def test_values_share_memory_with_nothing(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    names = [name for name in components_of(model) if not COMPONENTS[name].derived_from]
    first = iv.collect(model, inputs, [*names, "input_ids"])
    kept = {key: value.clone() for key, value in first.items()}
    assert len({value.untyped_storage().data_ptr() for value in first.values()}) == len(first)
    for value in first.values():
        assert value.untyped_storage().nbytes() == value.nbytes  # no slice of something larger
        value.fill_(0)
    again = iv.collect(model, inputs, [*names, "input_ids"])
    assert all(torch.equal(again[key], value) for key, value in kept.items())


def test_half_precision_is_kept_as_it_is_unless_another_type_is_asked_for():
    model = tiny("llama", dtype=torch.bfloat16)
    inputs = tiny_inputs(model, padding="left")
    own = iv.collect(model, inputs, ["block_output", "attention_pattern"], positions=[0, -1], queries=[-1])
    other = iv.collect(
        model,
        inputs,
        ["block_output", "attention_pattern"],
        positions=[0, -1],
        queries=[-1],
        dtype=torch.float32,
    )
    for key, value in own.items():
        assert value.dtype == torch.bfloat16
        assert other[key].dtype == torch.float32
        assert torch.equal(other[key], value.float())
    means = iv.collect(model, inputs, "block_output", positions=[(0, 1)], group_means=True)
    assert means["block_output", 0].dtype == torch.float32


def test_threads_that_collect_at_the_same_time_get_their_own():
    model = tiny("llama")
    alone = {
        seed: iv.collect(model, tiny_inputs(model, seed=seed), ["block_output", "attention_pattern"])
        for seed in range(4)
    }
    found = {}

    def work(seed):
        for _ in range(5):
            found[seed] = iv.collect(
                model, tiny_inputs(model, seed=seed), ["block_output", "attention_pattern"]
            )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(found[seed][key], value) for seed in range(4) for key, value in alone[seed].items()
    )


# --- with interventions -----------------------------------------------------------------------------------


def doubled(component, layer=LAYER):
    return iv.RepresentationConfig(layer, component, intervention=lambda base: base * 2)


@pytest.mark.parametrize(
    "component",
    ["block_output", "block_input", "mlp_hidden", "attention_output", "block_mid", "attention_value_output"],
)
def test_a_reading_sees_what_the_interventions_at_its_place_leave(component):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain = iv.collect(model, inputs, component)
    edited = iv.IntervenableModel([doubled(component)], model)
    after = iv.collect(edited, inputs, component)
    before = iv.collect(edited, inputs, component, observe="before")
    assert_close(after[component, LAYER], plain[component, LAYER] * 2)
    assert torch.equal(before[component, LAYER], plain[component, LAYER])
    assert torch.equal(after[component, 0], plain[component, 0])
    if component != "block_mid":  # which no single hook can change
        handle = by_hand.hook(model, component, lambda value: value * 2)
        expected = by_hand.seen(model, "block_output", inputs, 2)
        handle.remove()
        assert_close(iv.collect(edited, inputs, "block_output", 2)["block_output", 2], expected)


def test_patterns_are_seen_before_and_after_their_edits_too():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    zeroed = iv.IntervenableModel(
        [
            iv.RepresentationConfig(
                1, "attention_pattern", "h", intervention=iv.ZeroIntervention(), where={"heads": 2}
            )
        ],
        model,
    )
    plain = iv.collect(model, inputs, "attention_pattern", 1)["attention_pattern", 1]
    after = iv.collect(zeroed, inputs, "attention_pattern", 1)["attention_pattern", 1]
    before = iv.collect(zeroed, inputs, "attention_pattern", 1, observe="before")["attention_pattern", 1]
    assert_close(before, plain, atol=1e-6, rtol=1e-5)
    assert not after[:, 2].any()
    assert_close(after[:, [0, 1, 3]], plain[:, [0, 1, 3]], atol=1e-6, rtol=1e-5)


def test_sources_and_locations_go_through_to_the_interventions():
    model = tiny("llama")
    base, source = tiny_inputs(model), tiny_inputs(model, seed=1)
    swap = wrapped(model, iv.RepresentationConfig(0, "block_output"))
    cache = iv.collect(
        swap,
        base,
        ["block_output", "logits"],
        [0],
        sources=[source],
        unit_locations={"sources->base": (1, 4)},
    )
    expected = iv.collect(model, base, "block_output", 0)["block_output", 0]
    expected[:, 4] = iv.collect(model, source, "block_output", 0)["block_output", 0][:, 1]
    assert torch.equal(cache["block_output", 0], expected)
    with torch.no_grad():
        _, output = swap(base, [source], {"sources->base": (1, 4)}, use_cache=False)
    assert torch.equal(cache["logits"], output.logits)


def test_interventions_further_on_than_the_readings_are_not_waited_for():
    model = tiny("llama")
    edited = iv.IntervenableModel([doubled("block_output", 0), doubled("block_output", 2)], model)
    cache = iv.collect(edited, tiny_inputs(model), "block_output", 0)
    plain = iv.collect(model, tiny_inputs(model), "block_output", 0)
    assert torch.equal(cache["block_output", 0], plain["block_output", 0] * 2)


def test_a_plain_model_has_no_sources():
    model = tiny("llama")
    with pytest.raises(
        iv.InputError, match="are for interventions, and the model is a plain LlamaForCausalLM"
    ):
        iv.collect(model, tiny_inputs(model), "block_output", sources=[tiny_inputs(model)])


# --- gradients --------------------------------------------------------------------------------------------


def last_logit(output):
    """One number for each example."""
    return output.logits[:, -1, 5]


def by_autograd(model, component, inputs, layer, family):
    """The gradient with respect to a component, through a hook that retains it."""
    held = []

    def keep(value):
        leaf = value.detach().requires_grad_()
        held.append(leaf)
        return leaf * 1

    output = by_hand.run_with(model, component, keep, inputs, layer)
    (gradient,) = torch.autograd.grad(last_logit(output).sum(), held)
    return gradient


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "bloom", "mixtral", "bert"])
def test_gradients_are_those_of_autograd_for_every_example(family, frozen):
    model = tiny(family).requires_grad_(not frozen)
    inputs = tiny_inputs(model, batch=2)
    names = ["embedding_output", "block_input", "mlp_output", "attention_value_output", "block_output"]
    cache = iv.collect(model, inputs, names, gradients_of=last_logit)
    for name in names:
        for layer in range(3) if COMPONENTS[name].scope == "block" else [None]:
            expected = by_autograd(model, name, inputs, layer or 0, family)
            found = cache[f"{name}.gradient", layer]
            assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert cache.axes[f"{name}.gradient", layer] == cache.axes[name, layer]
    with torch.no_grad():
        assert_close(cache["metric"], last_logit(model(**inputs)))
    assert cache["embedding_output.gradient"][1].abs().sum() > 0  # not of the first example alone


def test_gradients_are_cut_to_the_units_asked_for():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="left")
    names = ["block_output", "head_value_output"]
    whole = iv.collect(model, inputs, names, 0, gradients_of=last_logit)
    some = iv.collect(model, inputs, names, 0, positions=[[0, -1], [2]], heads=[1], gradients_of=last_logit)
    rows = {"block_output": slice(None), "head_value_output": slice(1, 2)}
    for name, heads in rows.items():
        for example, positions in enumerate([[0, -1], [2]]):
            expected = whole.by_example((f"{name}.gradient", 0))[example]
            expected = expected[heads] if name.startswith("head_") else expected
            found = some.by_example((f"{name}.gradient", 0))[example]
            assert_close(found, expected[..., positions, :], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "component", ["attention_scores", "attention_pattern", "block_mid", "head_attention_output"]
)
def test_gradients_of_computed_values_predict_what_a_small_change_does(component):
    model = tiny("gpt2", dtype=torch.float64)
    inputs = tiny_inputs(model)
    cache = iv.collect(model, inputs, component, LAYER, gradients_of=last_logit)
    gradient = cache[f"{component}.gradient", LAYER]
    allowed = cache[component, LAYER].isfinite() & (cache[component, LAYER] != 0)
    direction = torch.where(allowed, torch.randn_like(gradient), torch.zeros_like(gradient))
    unit = COMPONENTS[component].units[0]

    def moved(step):
        change = iv.RepresentationConfig(
            LAYER, component, unit, intervention=lambda base: base + step * direction
        )
        with torch.no_grad():
            return last_logit(iv.IntervenableModel([change], model)(inputs).intervened)

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    expected = torch.where(allowed, gradient * direction, torch.zeros_like(gradient)).flatten(1).sum(1)
    assert_close(slope, expected, atol=1e-6, rtol=1e-5)


def test_gradients_see_the_interventions():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    edited = iv.IntervenableModel([doubled("block_output", 1)], model)
    after = iv.collect(edited, inputs, "block_output", 1, gradients_of=last_logit)
    before = iv.collect(edited, inputs, "block_output", 1, gradients_of=last_logit, observe="before")
    assert_close(before["block_output.gradient", 1], 2 * after["block_output.gradient", 1])


def test_gradients_do_not_change_what_the_model_computes():
    model = tiny("llama", attention="eager")
    inputs = tiny_inputs(model)
    seen = []
    names = ["embedding_output", "block_output", "attention_pattern"]
    iv.collect(
        model, inputs, names, gradients_of=lambda output: seen.append(output.logits) or last_logit(output)
    )
    with torch.no_grad():
        assert torch.equal(seen[0], model(**inputs).logits)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda output: output.logits.sum(),
            r"returned shape \(\); return a tensor with one number for each of the 2",
        ),
        (lambda output: 3.0, "returned a float"),
        (lambda output: output.logits[:, -1, 5].detach(), "numbers without a gradient"),
    ],
)
def test_metrics_that_are_none_are_refused(metric, message):
    model = tiny("llama")
    with pytest.raises(iv.InputError, match=message):
        iv.collect(model, tiny_inputs(model), "block_output", gradients_of=metric)


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"components": "block_ouput"},
            iv.UnknownNameError,
            "Unknown component 'block_ouput'. Did you mean 'block_output'?",
        ),
        (
            {"components": []},
            iv.InputError,
            "components is empty. Name what to collect, such as ['block_output'].",
        ),
        ({"components": [3]}, iv.UnknownNameError, "3 names nothing to collect"),
        ({"components": "block_output", "layers": 3}, iv.LayerRangeError, "Layer 3 is out of range"),
        (
            {"components": "block_output", "layers": "last"},
            iv.LayerRangeError,
            "layers='last' is no list of layers.",
        ),
        (
            {"components": "block_output", "positions": 7},
            iv.LocationRangeError,
            "Position 7 in the base locations",
        ),
        ({"components": "block_output", "positions": []}, iv.LocationError, "positions is an empty list."),
        (
            {"components": "block_output", "positions": [[0], [1], [2]]},
            iv.LocationError,
            "Positions are given for 3 examples, and there are 2.",
        ),
        (
            {"components": "block_output", "heads": 1},
            iv.LocationError,
            "heads=1 says nothing here: block_output has",
        ),
        (
            {"components": "attention_pattern", "heads": 4},
            iv.LocationRangeError,
            "Head 4 in the base locations",
        ),
        (
            {"components": "block_output", "queries": 0},
            iv.LocationError,
            "queries and keys are for attention matrices",
        ),
        (
            {"components": "attention_pattern", "positions": 0},
            iv.LocationError,
            "positions say nothing of attention",
        ),
        (
            {"components": "block_output", "observe": "during"},
            iv.UnknownNameError,
            "Unknown observe 'during'.",
        ),
        ({"components": "block_output", "average": "all"}, iv.CacheError, "average='all' is unknown."),
        ({"components": "model.layers[9].mlp.output"}, iv.UnsupportedModelError, "names no module"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_before_the_model_runs(arguments, error, message):
    model = tiny("llama")
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error) as caught:
        iv.collect(model, tiny_inputs(model), **arguments)
    assert message in str(caught.value)
    assert not ran


def test_several_unknown_names_are_listed_together():
    model = tiny("llama")
    with pytest.raises(iv.ConfigError) as caught:
        iv.collect(model, tiny_inputs(model), ["block_ouput", ("block_output", 9)])
    assert "block_ouput" in str(caught.value)
    assert "Layer 9" in str(caught.value)


def test_a_place_that_the_run_does_not_reach_is_said():
    model = tiny("llama")
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(iv.NotFiredError, match=r"did not reach the place of unused\.output"):
        iv.collect(model, tiny_inputs(model), "unused.output")


def test_collecting_leaves_the_inputs_and_the_users_lists_alone():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="left")
    copies = {name: value.clone() for name, value in inputs.items()}
    positions, heads = [[0, 1], [-1]], [0]
    iv.collect(model, inputs, ["block_output", "head_value_output"], positions=positions, heads=heads)
    assert same_bits(inputs, copies)
    assert (positions, heads) == ([[0, 1], [-1]], [0])
