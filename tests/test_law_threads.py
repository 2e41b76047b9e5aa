"""Law 6: threads that run different interventions on one model get the serial results."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import by_hand
import pytest
import torch
from declared import at, hooks_of, main_output, wrapped
from test_gradient_checkpointing import gradients, loss_of, training

import intervenable as iv
from tiny_models import HIDDEN, tiny, tiny_inputs

ROUNDS = 15
WORKERS = 4


def together(jobs, rounds=ROUNDS):
    """Run jobs many times, each in a thread of its own and all starting at once; their results, round by round."""
    start = Barrier(len(jobs))

    def repeat(job):
        start.wait()
        return [job() for _ in range(rounds)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(repeat, job) for job in jobs]]


def without_gradients(function):
    def run():
        with torch.no_grad():  # the mode is each thread's own
            return function()

    return run


def swap(model, seed, component, unit="pos"):
    """A call that swaps a component of another prompt in."""
    base, source = tiny_inputs(model, seed=seed), tiny_inputs(model, seed=seed + 10)
    where = [[[seed % 4]] * 2, [[2, 5]] * 2] if unit == "h.pos" else [[seed % 7]] * 2
    declared = wrapped(model, at(model, component, unit))
    return without_gradients(
        lambda: main_output(declared(base, [source], {"sources->base": ([where], [where])}).intervened)
    )


def plain(model, seed):
    inputs = tiny_inputs(model, seed=seed)
    return without_gradients(lambda: main_output(model(**inputs)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "bert"])
def test_swaps_and_plain_runs_in_several_threads_equal_the_serial_ones(family):
    model = tiny(family)
    jobs = [
        swap(model, 0, "block_output"),
        swap(model, 1, "block_output"),  # the same place for another prompt
        swap(model, 2, "head_attention_value_output", "h.pos"),
        plain(model, 0),
    ]
    expected = [job() for job in jobs]

    for results, serial in zip(together(jobs), expected, strict=True):
        assert all(torch.equal(result, serial) for result in results)
    assert hooks_of(model) == {}
    assert not torch.equal(expected[0], expected[3])


def test_one_wrapped_model_may_be_called_in_several_threads():
    model = tiny("llama")
    declared = wrapped(model, at(model, "mlp_output"), at(model, "block_mid"))
    inputs = [tiny_inputs(model, seed=seed) for seed in range(WORKERS)]

    def job(seed):
        where = {"sources->base": ([[[seed], [0, 1]], [[2], [3]]], [[[1], [seed, 6]], [[2], [3]]])}
        return without_gradients(
            lambda: declared(inputs[seed], [inputs[seed - 1]], where).intervened.logits,
        )

    jobs = [job(seed) for seed in range(WORKERS)]
    expected = [run() for run in jobs]
    for results, serial in zip(together(jobs), expected, strict=True):
        assert all(torch.equal(result, serial) for result in results)
    assert hooks_of(model) == {}


def test_readings_and_receipts_belong_to_their_thread():
    model = tiny("gpt2")
    inputs = [tiny_inputs(model, seed=seed) for seed in range(WORKERS)]
    with torch.no_grad():
        seen = [by_hand.seen(model, "block_output", one) for one in inputs]
    declared = wrapped(
        model,
        at(model, "block_output", intervention=iv.CollectIntervention()),
        at(model, "block_output", layer=2, intervention=iv.ZeroIntervention()),
    )

    def job(seed):
        def run():
            output = declared(inputs[seed], unit_locations={"base": [[[seed], [seed]], [[0], [0]]]})
            return output.collected_activations[0][:, 0], [line.fired for line in output.receipt]

        return without_gradients(run)

    for seed, results in enumerate(together([job(seed) for seed in range(WORKERS)])):
        for value, fired in results:
            assert torch.equal(value, seen[seed][:, seed])
            assert fired == [1, 1, 1, 1]


def test_a_call_that_raises_in_one_thread_leaves_the_others_alone():
    model = tiny("llama")
    steady = swap(model, 0, "block_output")
    expected = steady()
    declared = wrapped(model, at(model, "block_output", layer=0, intervention=lambda base: base[:, :0]))
    inputs = tiny_inputs(model)

    def failing():
        with pytest.raises(iv.EditError):
            declared(inputs)

    for results in together([steady, without_gradients(failing), steady, without_gradients(failing)])[::2]:
        assert all(torch.equal(result, expected) for result in results)
    assert hooks_of(model) == {}


def test_padding_is_looked_into_by_one_thread_while_others_run():
    model = tiny("gpt2")
    reference = tiny("gpt2")
    base = tiny_inputs(model, padding="left")

    def job(of):
        declared = wrapped(of, at(of, "block_output"), types=iv.ZeroIntervention)
        return without_gradients(lambda: declared(base, unit_locations={"base": 1}).intervened.logits)

    expected = job(reference)()
    for results in together([job(model) for _ in range(WORKERS)]):
        assert all(torch.equal(result, expected) for result in results)


def test_the_models_own_recording_of_hidden_states_works_in_several_threads():
    model = tiny("llama")
    inputs = [tiny_inputs(model, seed=seed) for seed in range(WORKERS)]
    declared = wrapped(model, at(model, "block_output", layer=0), types=iv.ZeroIntervention)
    with torch.no_grad():
        expected = [declared(one, output_hidden_states=True).intervened.hidden_states for one in inputs]

    def job(seed):
        return without_gradients(
            lambda: declared(inputs[seed], output_hidden_states=True).intervened.hidden_states
        )

    for seed, results in enumerate(together([job(seed) for seed in range(WORKERS)])):
        for hidden in results:
            assert len(hidden) == 4
            assert all(torch.equal(*pair) for pair in zip(hidden, expected[seed], strict=True))


@pytest.mark.parametrize("reentrant", [None, False])
def test_gradients_in_several_threads_are_the_serial_ones(reentrant):
    """Each thread trains a vector of its own; with checkpointing, hooks of all of them are on the model at once."""
    model = training("llama", reentrant)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()  # so that checkpointing has something to do
    inputs = [tiny_inputs(model, seed=seed) for seed in range(WORKERS)]

    def job(seed):
        given = torch.nn.Parameter(torch.full((HIDDEN,), 0.1 * seed))
        addition = iv.AdditionIntervention(source_representation=given)
        declared = wrapped(model, at(model, ("mlp_output", "block_output")[seed % 2], intervention=addition))

        def run():
            loss = loss_of(declared(inputs[seed], unit_locations={"base": seed}).intervened)
            return torch.autograd.grad(loss, given)[0]

        return run

    jobs = [job(seed) for seed in range(WORKERS)]
    expected = [run() for run in jobs]
    for results, serial in zip(together(jobs, rounds=8), expected, strict=True):
        assert all(torch.equal(result, serial) for result in results)
    assert hooks_of(model) == {}
    assert all(gradient is None for gradient in gradients(model))
