"""Law 2 with gradient checkpointing: backward runs blocks again, and has to meet the same edits."""

from __future__ import annotations

import gc

import by_hand
import pytest
import torch
from declared import at, everything, hooks_of, main_output, same_bits, wrapped
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import HIDDEN, LANGUAGE_MODELS, tiny, tiny_inputs

EDITED = ("block_input", "block_output", "head_value_output", "mlp_output", "attention_output")


def training(family, reentrant=None):
    """A tiny model in train mode without dropout; checkpointed if `reentrant` is True or False."""
    model = tiny(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.disable_input_require_grads()  # a hook of theirs, not needed where parameters are trained
    return model


def loss_of(output):
    value = main_output(output)
    return (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum()


def gradients(model, *others):
    return [None if p.grad is None else p.grad.clone() for p in (*model.parameters(), *others)]


def assert_same_gradients(result, expected, times=1):
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, times * theirs, atol=1e-5 * times, rtol=1e-4)


def edited(model, given):
    """The model with a swap, and with a trained vector added, in several places of the middle block."""
    return wrapped(
        model,
        *(at(model, component) for component in EDITED),
        at(model, "block_output", intervention=iv.AdditionIntervention(source_representation=given)),
    )


def call(declared, model):
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    places = [[[3], [5]] if ".h" not in name else [[[0], [-1]], [[3], [5]]] for name in declared.names]
    return declared(base, [source], {"sources->base": (places, places)})


def plain_gradients(family, given):
    """Gradients without checkpointing."""
    model = training(family)
    given = nn.Parameter(given.detach().clone())
    loss_of(call(edited(model, given), model).intervened).backward()
    return gradients(model, given)


def vector():
    return nn.Parameter(torch.linspace(-1, 1, HIDDEN))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_gradients_are_those_without_checkpointing_and_no_hook_is_left(family, reentrant):
    model, given = training(family, reentrant), vector()
    blocks = [by_hand.block_of(model, layer) for layer in range(3)]
    before, functions = hooks_of(model), [block._gradient_checkpointing_func for block in blocks]
    output = call(edited(model, given), model)

    loss_of(output.intervened).backward()

    assert_same_gradients(gradients(model, given), plain_gradients(family, given))
    assert given.grad.abs().max() > 0
    assert hooks_of(model) == before
    assert [block._gradient_checkpointing_func for block in blocks] == functions


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "gemma2"])
def test_gradients_through_every_component_are_those_without_checkpointing(family):
    def run(model):
        representations = [
            at(model, component, unit, intervention=lambda base: base * 0.9)
            for component, unit in everything(model)
        ]
        loss_of(wrapped(model, *representations)(tiny_inputs(model)).intervened).backward()
        return gradients(model)

    model = training(family, reentrant=False)
    assert_same_gradients(run(model), run(training(family)))
    assert hooks_of(model) == {}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_those_of_a_hook_written_by_hand_without_checkpointing(family, reentrant):
    by_hands, model = training(family), training(family, reentrant)
    inputs = tiny_inputs(model)

    def put(stream):
        new = stream.clone()
        new[:, 3] = 0
        return new

    loss_of(by_hand.run_with(by_hands, "mlp_output", put, inputs)).backward()
    declared = wrapped(model, at(model, "mlp_output"), types=iv.ZeroIntervention)
    loss_of(declared(inputs, unit_locations={"base": 3}).intervened).backward()

    assert_same_gradients(gradients(model), gradients(by_hands))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_until_backward_the_hooks_are_inert_for_every_other_call(family, reentrant):
    model, given = training(family, reentrant), vector()
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    output = call(edited(model, given), model)

    other = model(**inputs)
    assert same_bits(other, expected)
    loss_of(other).backward()  # runs the blocks again as well
    own = gradients(model)
    model.zero_grad()
    loss_of(output.intervened).backward()
    assert_same_gradients(gradients(model, given), plain_gradients(family, given))

    model.zero_grad()
    loss_of(model(**inputs)).backward()
    assert_same_gradients(own, gradients(model))
    assert hooks_of(model) == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_calls_that_wait_for_backward_do_not_meet(reentrant):
    model = training("llama", reentrant)
    first, second = vector(), nn.Parameter(torch.randn(HIDDEN))
    outputs = [call(edited(model, given), model) for given in (first, second)]

    for output, given in zip(reversed(outputs), (second, first), strict=True):
        model.zero_grad()
        loss_of(output.intervened).backward()
        assert_same_gradients(gradients(model, given), plain_gradients("llama", given))
    assert hooks_of(model) == {}


def test_hooks_go_with_an_output_that_is_dropped_without_backward():
    model, given = training("llama", reentrant=False), vector()
    output = call(edited(model, given), model)
    assert hooks_of(model) != {}

    del output
    gc.collect()

    assert hooks_of(model) == {}


def test_hooks_survive_a_backward_that_retains_the_graph():
    model, given = training("llama", reentrant=False), vector()
    loss = loss_of(call(edited(model, given), model).intervened)

    loss.backward(retain_graph=True)
    loss.backward()

    assert_same_gradients(gradients(model, given), plain_gradients("llama", given), times=2)
    del loss
    gc.collect()
    assert hooks_of(model) == {}


def test_a_backward_that_raises_leaves_no_hook_once_the_output_is_gone():
    model, given = training("gpt2", reentrant=False), vector()
    output = call(edited(model, given), model)
    value = main_output(output.intervened)

    def fail(gradient):
        raise RuntimeError("no gradient today")

    handle = model.get_input_embeddings().weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="no gradient today"):
        value.sum().backward()
    handle.remove()
    del value, output
    gc.collect()
    assert hooks_of(model) == {}


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
def test_without_a_backward_to_come_no_hook_stays(mode):
    model, given = training("llama", reentrant=False), vector()
    if mode == "eval":
        model.eval()
    guard = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with guard():
        output = call(edited(model, given), model)
    assert hooks_of(model) == {}
    assert main_output(output.intervened).shape == (2, 7, 72)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_go_when_the_run_itself_raises(reentrant):
    model = training("llama", reentrant)

    class Refuses(iv.Intervention):
        def forward(self, base):
            raise ArithmeticError("refused")

    with pytest.raises(ArithmeticError, match="refused"):
        wrapped(model, at(model, "mlp_output"), types=Refuses)(tiny_inputs(model))
    assert hooks_of(model) == {}


def calls_in_backward(model, declared, layer):
    """How often a part of a block is run by backward."""
    calls = []
    output = declared(tiny_inputs(model)).intervened
    handle = by_hand.block_of(model, layer).mlp.register_forward_pre_hook(lambda *_: calls.append(layer))
    loss_of(output).backward()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize(("reentrant", "runs"), [(False, [1, 1, 1]), (True, [1, 0, 1])])
def test_blocks_stay_checkpointed_but_for_those_edited_inside_under_the_reentrant_form(reentrant, runs):
    model = training("llama", reentrant)
    declared = wrapped(model, at(model, "mlp_output"), types=iv.ZeroIntervention)
    assert [calls_in_backward(model, declared, layer) for layer in range(3)] == runs


def test_a_loss_on_a_reading_alone_meets_the_edits_too():
    def run(model):
        given = vector()
        declared = wrapped(
            model,
            at(
                model,
                "mlp_output",
                layer=0,
                intervention=iv.AdditionIntervention(source_representation=given),
            ),
            at(model, "block_output", intervention=iv.CollectIntervention()),
        )
        (reading,) = declared(tiny_inputs(model)).collected_activations
        gc.collect()
        reading.square().sum().backward()
        return gradients(model, given)

    model = training("llama", reentrant=False)
    assert_same_gradients(run(model), run(training("llama")))
    gc.collect()
    assert hooks_of(model) == {}
