"""Laws of sweeps: nothing is left behind, threads and budgets change no value, no shortcut is believed unchecked."""

from __future__ import annotations

import copy

import pytest
import torch
from declared import hooks_of
from patched_by_hand import ByHand, batch, grid, logits_with, near, prompts, told
from test_law_threads import plain, together
from torch import nn

from intervenable import ConfigError, InexactError, MetricError, UnsupportedModelError, wave, wave_plan
from intervenable.sweeping import sweep
from tiny_models import tiny

LAYERS, LENGTH, DIFFERS = 3, 6, 2
ALL, LATER = "all tokens", "later tokens alone"


@pytest.fixture(params=[ALL, LATER])
def leaving_out(request, monkeypatch):
    """Waves that compute all tokens, as of tiny models, and such as begin at the first token that they change."""
    if request.param == ALL:
        monkeypatch.setattr(wave_plan, "WORTH", torch.inf)
    else:
        for name in ("WORTH", "READ", "OVERHEAD"):  # and one wave for each token
            monkeypatch.setattr(wave_plan, name, 0.0)
    return request.param


def pair(*lengths):
    clean = prompts(*(lengths or (LENGTH, LENGTH)))
    return clean, prompts(*map(len, clean), seed=1, like=clean, start=DIFFERS)


def jobs_of(model, family, component="block_input", axes=("layer", "pos"), **options):
    """A sweep, and the loop by hand for streams."""
    clean, corrupted = pair()
    inputs = batch(clean), batch(corrupted)
    return (
        lambda: sweep(model, *inputs, component, axes, told(inputs[1]), **options),
        ByHand(model, family, corrupted, clean),
    )


def by_layer_and_token(by_hand, layers=range(LAYERS)):
    return grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), layers, range(LENGTH))


def ways(result):
    """How the cells were computed."""
    return " ".join(result.shortcuts)


ONE_BY_ONE = "in a forward pass of its own"

# --- nothing is left --------------------------------------------------------------------------------------


def state_of(model):
    """Whatever of a model a sweep could change, but hooks."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        [(name, p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()],
        {name: id(getattr(module, "forward", None).__func__) for name, module in model.named_modules()},
        model.training,
        repr(model.config),
    )


def assert_same(model, before):
    after = state_of(model)
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]
    assert hooks_of(model) == {}


def failing_after(count):
    """A metric that fails at one of its later calls, and the list of its calls."""
    calls = []

    def metric(logits):
        calls.append(1)
        if len(calls) > count:
            raise RuntimeError("enough")
        return logits[:, -1, 5]

    return metric, calls


@pytest.mark.parametrize("component", ["block_input", "head_value_output", "attention_pattern", "block_mid"])
def test_a_sweep_leaves_no_trace_in_the_model(component, leaving_out):
    model = tiny("llama")
    clean, corrupted = map(batch, pair())
    with torch.no_grad():
        before, logits = state_of(model), model(**clean).logits
    axes = ("layer", "head") if "head" in component or "pattern" in component else ("layer", "pos")
    sweep(model, clean, corrupted, component, axes, lambda z: z[:, -1])
    assert_same(model, before)
    with torch.no_grad():
        assert torch.equal(model(**clean).logits, logits)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_metric_that_fails_leaves_no_trace_either(part, leaving_out):
    model = tiny("gpt2")
    clean, corrupted = map(batch, pair())
    before = state_of(model)
    metric, calls = failing_after(torch.inf)
    sweep(model, clean, corrupted, metric=metric)
    with pytest.raises(MetricError, match="enough"):
        sweep(model, clean, corrupted, metric=failing_after(int(part * len(calls)))[0])
    assert_same(model, before)


def test_a_model_that_fails_leaves_no_trace_either(leaving_out):
    model = tiny("gpt2")
    clean, corrupted = map(batch, pair())
    before = state_of(model)
    runs = []

    def broken(*_):
        runs.append(1)
        if len(runs) > 3:
            raise RuntimeError("out of order")

    handle = model.transformer.h[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of order"):
        sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    handle.remove()
    assert_same(model, before)


def test_the_users_tensors_stay_as_they_are(leaving_out):
    model = tiny("llama")
    clean, corrupted = (batch(rows, "left") for rows in pair(6, 4))
    value = {layer: torch.randn(16) for layer in range(LAYERS)}
    given = [*clean.values(), *corrupted.values(), *value.values()]
    copies, versions = copy.deepcopy(given), [one._version for one in given]
    sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    sweep(model, clean, corrupted, metric=lambda z: z.zero_()[:, -1])  # a metric may write into what it gets
    sweep(model, clean, None, metric=lambda z: z[:, -1], value=value)
    assert all(torch.equal(one, other) for one, other in zip(given, copies, strict=True))
    assert [one._version for one in given] == versions
    assert clean.keys() == {"input_ids", "attention_mask"}


def test_a_metric_that_writes_into_the_logits_changes_no_other_cell(leaving_out):
    model = tiny("llama")
    clean, corrupted = map(batch, pair())

    def rude(logits):
        value = logits[:, -1].clone()
        logits.fill_(7.0)
        return value

    polite = sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    assert torch.equal(sweep(model, clean, corrupted, metric=rude).values, polite.values)


def test_hooks_of_other_people_stay_and_act(leaving_out):
    model = tiny("gpt2")
    sweeping, by_hand = jobs_of(model, "gpt2")
    without = sweeping().values
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    hooks = hooks_of(model)
    result = sweeping()
    assert hooks_of(model) == hooks
    near(result.values, by_layer_and_token(by_hand))
    assert (result.values - without).abs().max() > 0.1
    handle.remove()
    near(sweeping().values, without)


def test_gradients_are_neither_made_nor_switched_off(leaving_out):
    model = tiny("llama")
    clean, corrupted = map(batch, pair())
    result = sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    assert torch.is_grad_enabled()
    assert not result.values.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the same values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["block_input", "attention_output"])
def test_two_sweeps_are_equal_to_the_bit(component, leaving_out):
    sweeping, _ = jobs_of(tiny("llama"), "llama", component)
    one, other = sweeping(), sweeping()
    assert torch.equal(one.values, other.values)
    assert one.shortcuts == other.shortcuts
    fresh, _ = jobs_of(tiny("llama"), "llama", component)
    assert torch.equal(fresh().values, one.values)


def test_sweeps_in_several_threads_equal_the_serial_ones(leaving_out):
    model = tiny("llama")
    clean, corrupted = map(batch, pair())
    reads = told(corrupted)
    sweeps = [
        lambda: sweep(model, clean, corrupted, "block_input", ("layer", "pos"), reads).values,
        lambda: sweep(model, clean, corrupted, "head_value_output", ("layer", "head"), reads).values,
        lambda: (
            sweep(
                model, corrupted, clean, "attention_pattern", ("layer", "head"), reads, layers=[0, 2]
            ).values
        ),
    ]
    jobs = [*sweeps, plain(model, 0)]
    expected = [job() for job in jobs]
    for results, serial in zip(together(jobs, rounds=2), expected, strict=True):
        for result in results:
            near(result, serial)
    assert hooks_of(model) == {}


def test_threads_may_all_be_the_first_to_sweep_a_model(leaving_out):
    model = tiny("bloom")
    sweeping, by_hand = jobs_of(model, "bloom", layers=[0, 2])
    expected = by_layer_and_token(by_hand, [0, 2])
    for results in together([lambda: sweeping().values] * 3, rounds=1):
        near(results[0], expected)
    assert hooks_of(model) == {}


TOLERANCES = {torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_other_types(family, dtype, leaving_out):
    model = tiny(family, dtype=dtype)
    sweeping, by_hand = jobs_of(model, family)
    result = sweeping()
    near(result.values.double(), by_layer_and_token(by_hand).double(), TOLERANCES[dtype])
    assert ONE_BY_ONE not in ways(result)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_kinds_of_attention(family, attention, leaving_out):
    model = tiny(family, attention=attention)
    sweeping, by_hand = jobs_of(model, family)
    result = sweeping()
    near(result.values, by_layer_and_token(by_hand))
    assert model.config._attn_implementation == attention
    assert ONE_BY_ONE not in ways(result)


def test_what_was_learnt_serves_batches_of_any_size(leaving_out):
    """A model is looked at once; sweeps of other numbers of examples and tokens go by what was found."""
    model = tiny("bloom")
    for lengths in ((6,), (6, 6), (6, 6, 6), (9, 9), (6, 4, 5, 6), (4,)):
        clean, corrupted = pair(*lengths)
        inputs = batch(clean), batch(corrupted)
        result = sweep(model, *inputs, metric=told(inputs[1]), layers=[0, 2], positions=[-1, 3])
        by_hand = ByHand(model, "bloom", corrupted, clean)
        last = {example: [length - 1] for example, length in enumerate(lengths)}
        near(
            result.values,
            grid(lambda layer, at, b=by_hand: b.cell("block_input", [layer], at), [0, 2], [last, [3]]),
        )
        assert ONE_BY_ONE not in ways(result)


# --- budgets ----------------------------------------------------------------------------------------------


def test_small_budgets_give_the_same_values_in_more_waves(leaving_out, monkeypatch):
    model = tiny("llama")
    _, by_hand = jobs_of(model, "llama")
    expected = by_layer_and_token(by_hand)
    clean, corrupted = map(batch, pair())
    with pytest.raises(
        ConfigError, match=r"memory=1000 bytes is too little for one cell of 2 example"
    ) as caught:
        sweep(model, clean, corrupted, metric=told(corrupted), memory="1KB")
    enough = int(str(caught.value).rpartition("Give memory=")[2].split(" ")[0])
    counts = []
    usual = wave.Waves.run
    monkeypatch.setattr(
        wave.Waves, "run", lambda self, one: counts[-1].append(len(one.cells)) or usual(self, one)
    )
    for memory in (enough, 5 * enough, None):
        counts.append([])
        near(sweep(model, clean, corrupted, metric=told(corrupted), memory=memory).values, expected)
    tight, middle, roomy = (counts[0], counts[1], counts[2])
    cells = LAYERS * (LENGTH - DIFFERS)
    assert sum(tight) == sum(middle) == sum(roomy) == cells
    assert len(tight) > len(middle) >= len(roomy)


# --- shortcuts that are wrong -----------------------------------------------------------------------------


def test_the_check_finds_an_engine_that_is_wrong(monkeypatch, leaving_out):
    usual = wave.Waves.run
    monkeypatch.setattr(wave.Waves, "run", lambda self, one: usual(self, one) + 1e-2)
    sweeping, _ = jobs_of(tiny("llama"), "llama")
    sweeping()  # nobody asks
    for check in (True, 18, 2):
        sweeping, _ = jobs_of(tiny("llama"), "llama", exact_check=check, positions=[2, 3, 4, 5])
        with pytest.raises(
            InexactError, match=r"block_input, layer \d, pos \d: .* with shortcuts and .* without"
        ):
            sweeping()


def test_the_check_finds_nothing_in_an_engine_that_is_right(leaving_out):
    sweeping, by_hand = jobs_of(tiny("llama"), "llama", exact_check=True)
    near(sweeping().values, by_layer_and_token(by_hand))


class Wrapped(nn.Module):
    """A block with something done around it."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type


class MixesRows(Wrapped):
    """What an example becomes depends on the others in its batch."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.block(hidden_states + 0.3 * hidden_states.mean(0, keepdim=True), *args, **kwargs)


class MixesManyRows(Wrapped):
    """The same in batches larger than those that a model is looked at with: each wave has to prove itself."""

    def forward(self, hidden_states, *args, **kwargs):
        if len(hidden_states) > 6:
            hidden_states = hidden_states + 0.3 * hidden_states.mean(0, keepdim=True)
        return self.block(hidden_states, *args, **kwargs)


class Counts(Wrapped):
    """What it does depends on how many rows there are."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.block(hidden_states * (1 + 0.01 * hidden_states.shape[0]), *args, **kwargs)


class InPlace(Wrapped):
    """Writes into what it is given."""

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states.mul_(0.9)
        return self.block(hidden_states, *args, **kwargs)


class Twice(Wrapped):
    """Runs its block twice."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.block(self.block(hidden_states, *args, **kwargs), *args, **kwargs)


class ForgetsItsCache(Wrapped):
    """Goes on without what was kept, and nothing tells of it."""

    def forward(self, hidden_states, *args, **kwargs):
        kwargs["past_key_values"] = None
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"][..., -hidden_states.shape[1] :]
        return self.block(hidden_states, *args, **kwargs)


def slow(model, clean, corrupted, path, layers=range(LAYERS)):
    """`[layer, pos, b, 2, V]` a loop over the inputs of blocks, with whole batches."""
    reads, seen = told(corrupted), {}

    def at(layer):
        if layer not in seen:

            def look(value):
                seen[layer] = value.clone()
                return value

            logits_with(model, clean, [(path.format(layer), "input", look)])
        return seen[layer]

    def cell(layer, pos):
        other = at(layer)

        def change(value):
            new = value.clone()
            new[:, pos] = other[:, pos]
            return new

        return reads(logits_with(model, corrupted, [(path.format(layer), "input", change)]))

    return grid(cell, layers, range(LENGTH))


@pytest.mark.parametrize("kind", [MixesRows, MixesManyRows, Counts, InPlace, ForgetsItsCache])
@pytest.mark.parametrize("where", [0, 2])
def test_blocks_that_spoil_a_shortcut_spoil_no_value(kind, where, leaving_out):
    model = tiny("llama")
    model.model.layers[where] = kind(model.model.layers[where])
    clean, corrupted = map(batch, pair())
    result = sweep(model, clean, corrupted, "model.layers[{layer}].input", metric=told(corrupted))
    near(result.values, slow(model, clean, corrupted, "model.layers.{}"))
    if kind is MixesRows:
        assert ONE_BY_ONE in ways(result)


def test_a_block_that_runs_twice_is_patched_each_time(leaving_out):
    """The list has the blocks; what they run inside is called twice, and both passages get their own values."""
    model = tiny("llama")
    model.config.use_cache = False  # with one, its second passage would see the keys of the first
    model.model.layers[1] = Twice(model.model.layers[1])
    clean, corrupted = map(batch, pair())
    result = sweep(model, clean, corrupted, "model.layers[{layer}].input", metric=told(corrupted))
    near(result.values, slow(model, clean, corrupted, "model.layers.{}"))
    inner = sweep(model, clean, corrupted, "model.layers[1].block.mlp.output", "pos", told(corrupted)).values
    passages = []

    def look(value):
        passages.append(value.clone())
        return value

    place = ("model.layers.1.block.mlp", "output")
    logits_with(model, clean, [(*place, look)])

    def cell(pos):
        put = iter(passages)

        def change(value):
            new = value.clone()
            new[:, pos] = next(put)[:, pos]
            return new

        return told(corrupted)(logits_with(model, corrupted, [(*place, change)]))

    assert len(passages) == 2
    near(inner, grid(cell, range(LENGTH)))


class Backwards(nn.ModuleList):
    """Blocks that run from the last to the first."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])

    def __getitem__(self, index):
        if isinstance(index, slice):  # what the model loops over
            return list(super().__iter__())[index][::-1]
        return super().__getitem__(index)


def test_blocks_may_run_in_another_order_than_they_are_listed(leaving_out):
    model = tiny("llama")
    usual = slow(model, *map(batch, pair()), "model.layers.{}")
    model.model.layers = Backwards(model.model.layers)
    clean, corrupted = map(batch, pair())
    order = []
    handles = [
        model.model.layers[i].register_forward_hook(lambda *_, i=i: order.append(i)) for i in range(LAYERS)
    ]
    with torch.no_grad():
        model(**clean)
    for handle in handles:
        handle.remove()
    assert order == [2, 1, 0]
    result = sweep(model, clean, corrupted, metric=told(corrupted))
    expected = slow(model, clean, corrupted, "model.layers.{}")
    near(result.values, expected)
    assert (expected - usual).abs().max() > 0.1


def test_the_same_block_may_be_listed_twice(leaving_out):
    model = tiny("gpt2")
    model.config.use_cache = False
    model.transformer.h[2] = model.transformer.h[0]
    clean, corrupted = map(batch, pair())
    result = sweep(model, clean, corrupted, metric=told(corrupted), layers=1)
    near(result.values, slow(model, clean, corrupted, "transformer.h.{}", [1]))


class Positions(nn.Module):
    """A model without caches, whose blocks come in a list of their own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(72, 8)
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 72)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for step in self.steps:
            hidden = hidden + torch.tanh(step(hidden.cumsum(1)))
        return self.head(hidden)


def test_any_module_with_logits_can_be_swept_by_path():
    model = Positions().eval()
    clean, corrupted = ({"input_ids": batch(rows)["input_ids"]} for rows in pair())
    result = sweep(model, clean, corrupted, "steps[{layer}].output", metric=lambda z: z[:, [1, -1]])
    seen = {}

    def cell(layer, pos):
        def keep(module, args, output):
            seen[layer] = output.clone()

        handle = model.steps[layer].register_forward_hook(keep)
        with torch.no_grad():
            model(**clean)
        handle.remove()

        def change(module, args, output):
            new = output.clone()
            new[:, pos] = seen[layer][:, pos]
            return new

        handle = model.steps[layer].register_forward_hook(change)
        with torch.no_grad():
            logits = model(**corrupted)
        handle.remove()
        return logits[:, [1, -1]]

    near(result.values, grid(cell, range(3), range(LENGTH)))


def test_models_in_training_mode_are_refused():
    model = tiny("gpt2").train()
    clean, corrupted = map(batch, pair())
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel is in training mode.*model.eval\(\)"):
        sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    assert model.training


def test_models_without_logits_are_refused():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, input_ids):
            return self.part(input_ids[..., None].float()).sum()

    clean, corrupted = ({"input_ids": batch(rows)["input_ids"]} for rows in pair())
    with pytest.raises(UnsupportedModelError, match="Sums gives no logits"):
        sweep(Sums().eval(), clean, corrupted, "part.output", "pos", lambda z: z[:, -1])
