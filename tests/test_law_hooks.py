"""Law 3: after a call, returned or raised, our hooks are gone and everything else is as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import by_hand
import pytest
import torch
from declared import at, everything, hooks_of, main_output, same_bits, wrapped
from torch import nn

import intervenable as iv
from tiny_models import FAMILIES, LANGUAGE_MODELS, tiny, tiny_inputs


class Refuses(iv.Intervention):
    """Raises, to see what is left behind."""

    def forward(self, base):
        raise ArithmeticError("refused")


def state_of(model):
    """All that a call could leave changed, apart from tensors."""
    config = getattr(model, "config", None)
    return {
        "hooks": hooks_of(model),
        "training": {path: module.training for path, module in model.named_modules()},
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "config": None if config is None else config.to_dict(),
        "attention": getattr(config, "_attn_implementation", None),
        "forwards": {path: module.__dict__.get("forward") for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
    }


def bits_of(model):
    return {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def assert_same_bits(model, bits):
    state = model.state_dict(keep_vars=True)
    assert state.keys() == bits.keys()
    for name, (identity, value) in bits.items():
        assert id(state[name]) == identity, name
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_a_model_and_calling_it_changes_nothing_about_it(family, training):
    model = tiny(family).train(training)
    next(model.parameters()).requires_grad_(False)
    main = by_hand.block_of(model)
    main.eval()  # a part in another mode than the whole
    before, bits = state_of(model), bits_of(model)

    declared = wrapped(model, *(at(model, component, unit) for component, unit in everything(model)))
    assert state_of(model) == before
    with torch.no_grad():
        declared(tiny_inputs(model), [tiny_inputs(model, seed=1)], output_original_output=True)

    assert state_of(model) == before
    assert_same_bits(model, bits)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_intervention_that_raises_everything_is_as_before(family):
    model = tiny(family)
    before, bits = state_of(model), bits_of(model)
    places = everything(model)
    expected = main_output(model(**tiny_inputs(model)))
    for component, unit in (places[0], places[len(places) // 2], places[-1]):
        declared = wrapped(model, at(model, component, unit), types=Refuses)
        with pytest.raises(ArithmeticError, match="refused"):
            declared(tiny_inputs(model))
        assert state_of(model) == before
    assert_same_bits(model, bits)
    assert torch.equal(main_output(model(**tiny_inputs(model))), expected)


def failing_on(model, seed):
    """Let the last block raise for the inputs of one seed. Returns the handles."""
    marked = main_output(model.get_input_embeddings()(tiny_inputs(model, seed=seed)["input_ids"]))
    state = {}
    embeddings = model.get_input_embeddings()

    def look(module, args, output):
        state["fail"] = torch.equal(output, marked)

    def fail(module, args):
        if state.get("fail"):
            raise MemoryError("out of memory, say")

    return [
        embeddings.register_forward_hook(look),
        by_hand.block_of(model, 2).register_forward_pre_hook(fail),
    ]


@pytest.mark.parametrize("failing", ["source", "base"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "bert"])
def test_after_a_model_that_raises_everything_is_as_before(family, failing):
    model = tiny(family)
    handles = failing_on(model, seed=1 if failing == "source" else 0)
    before = state_of(model)
    declared = wrapped(model, at(model, "block_output", layer=2), at(model, "mlp_output", layer=0))
    with pytest.raises(MemoryError, match="out of memory"):
        declared(tiny_inputs(model, seed=0), [tiny_inputs(model, seed=1)])
    assert state_of(model) == before
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == {}


def test_an_interrupt_from_the_keyboard_leaves_no_hook():
    model = tiny("llama")

    def interrupt(base):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapped(model, at(model, "mlp_output", intervention=interrupt))(tiny_inputs(model))
    assert hooks_of(model) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_users_hooks_fire_in_and_after_the_calls_and_see_edited_values(family):
    model = tiny(family)
    block = by_hand.block_of(model)
    seen, entered = [], []
    handles = [
        block.register_forward_hook(lambda m, args, out: seen.append(main_output(out).clone())),
        block.register_forward_pre_hook(lambda m, args, kwargs: entered.append(1), with_kwargs=True),
    ]
    before = hooks_of(model)
    declared = wrapped(model, at(model, "block_input"), types=iv.ZeroIntervention)
    with torch.no_grad():
        model(**tiny_inputs(model))
        declared(tiny_inputs(model))
        model(**tiny_inputs(model))

    assert hooks_of(model) == before
    assert len(seen) == len(entered) == 3
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    for handle in handles:
        handle.remove()


def test_the_users_hooks_that_edit_go_on_editing():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    handle = by_hand.hook(model, "mlp_output", lambda value: value * 2)
    with torch.no_grad():
        declared = wrapped(model, at(model, "block_output", intervention=lambda base: base))
        expected = model(**inputs)
        assert same_bits(declared(inputs).intervened, expected)
        assert same_bits(model(**inputs), expected)
    handle.remove()
    assert not same_bits(model(**inputs), expected)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_hidden_states_and_attentions_are_recorded_as_before_after_runs_that_stopped_early(family):
    model = tiny(family, attention="eager")
    base, source = tiny_inputs(model), tiny_inputs(model, seed=1)
    options = {"output_hidden_states": True, "output_attentions": True}
    swap = wrapped(model, at(model, "mlp_input", layer=0))
    with torch.no_grad():
        expected = model(**base, **options)
        swap(base, [source])
        assert same_bits(model(**base, **options), expected)
        original, intervened = swap(base, [source], output_original_output=True, **options)
        assert same_bits(original, expected)
        assert len(intervened.hidden_states) == 4
        assert len(intervened.attentions) == 3
        assert torch.equal(intervened.hidden_states[0], expected.hidden_states[0])
        assert not torch.equal(intervened.hidden_states[1], expected.hidden_states[1])
        assert same_bits(model(**base, **options), expected)
    assert sum(len(hidden) for hidden in expected.hidden_states) == 8


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_first_call_that_records_may_be_an_intervened_one(family):
    """Transformers put hooks of their own on a model at the first call that records."""
    recorded, plain = tiny(family, attention="eager"), tiny(family, attention="eager")
    base, source = tiny_inputs(plain), tiny_inputs(plain, seed=1)
    options = {"output_hidden_states": True, "output_attentions": True}
    swap = wrapped(recorded, at(recorded, "block_output", layer=0))
    with torch.no_grad():
        swap(base, [source], **options)
        swap(base, [source], {"sources->base": 2})
        assert same_bits(recorded(**base, **options), plain(**base, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_stays(attention):
    model = tiny("llama", attention=attention)
    with torch.no_grad():
        wrapped(model, at(model, "head_value_output", "h"))(tiny_inputs(model), [tiny_inputs(model, seed=1)])
    assert model.config._attn_implementation == attention


def test_a_wrapped_model_is_no_part_of_the_wrapper():
    model = tiny("gpt2")
    declared = wrapped(
        model, at(model, "block_output", low_rank_dimension=2), types=iv.LowRankRotatedSpaceIntervention
    )
    learned = sum(p.numel() for p in declared.parameters())
    assert learned == 32
    declared.train()
    declared.requires_grad_(False)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model not in list(declared.modules())


def test_no_reference_to_a_model_is_kept_once_the_user_drops_it():
    model = tiny("gpt2")
    inputs = tiny_inputs(model, padding="left")
    declared = wrapped(model, at(model, "block_output"))
    with torch.no_grad():
        output = declared(inputs, [inputs], {"sources->base": 1})
    alive = weakref.ref(model)
    del model, declared, output
    gc.collect()
    assert alive() is None


def test_a_model_can_still_be_copied_after_it_was_wrapped_and_run():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        wrapped(model, at(model, "block_output"))(inputs, [inputs])
        assert same_bits(copy.deepcopy(model)(**inputs), model(**inputs))


def test_a_model_in_train_mode_runs_in_train_mode():
    model = tiny("gpt2").train()
    modes = []
    handles = [
        module.register_forward_hook(lambda module, *_: modes.append(module.training))
        for module in model.modules()
        if isinstance(module, nn.Dropout)
    ]
    inputs = tiny_inputs(model, padding="left")
    with torch.no_grad():
        wrapped(model, at(model, "block_output"))(inputs, [inputs], {"sources->base": 1})
    for handle in handles:
        handle.remove()
    assert model.training
    assert modes.count(True) >= 10
