"""What scores and patterns are in each architecture; the mode by which they are met, and what it leaves behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import by_hand
import pytest
import torch
import transformers
from declared import LAYER, hooks_of, main_output, same_bits, wrapped
from test_gradient_checkpointing import assert_same_gradients, gradients, loss_of, training
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import intervenable as iv
from intervenable.attention_mode import InsideHook
from intervenable.hooks import Hook, hooked
from model_maps import lookup
from tiny_models import CASES, DECODERS, LANGUAGE_MODELS, RECURRENT, tiny, tiny_inputs

LANGUAGE = [case for case in CASES if case[0] not in RECURRENT]
SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SINKS = ("gpt_oss",)
"""Families with a column in the softmax that stands for no key."""


def entry(component, unit=None, intervention=None, layer=LAYER, **fields):
    return iv.RepresentationConfig(layer, component, unit or "h", intervention=intervention, **fields)


def modes():
    """How many modes see the functions of this thread."""
    return torch._C._len_torch_function_stack()


def read(model, inputs, *names, edits=(), layer=LAYER):
    """Whole readings, after the edits."""
    readings = [entry(name, layer=layer, name=name, intervention=iv.CollectIntervention()) for name in names]
    with torch.no_grad():
        collected = wrapped(model, *edits, *readings)(inputs).collected
    return [collected[name] for name in names]


# What is computed


@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_the_pattern_is_the_one_that_eager_models_return(family, variant):
    model = tiny(family, variant=variant, attention="eager")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        returned = model(**inputs, output_attentions=True).attentions
    for layer in (0, 2):
        (pattern,) = read(model, inputs, "attention_pattern", layer=layer)
        assert torch.equal(pattern, returned[layer])
        sums = pattern.sum(-1)
        if family in SINKS:
            assert (sums < 1 - 1e-3).all()
        else:
            assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_edited_patterns_times_values_are_what_each_head_gives(family, variant, attention):
    """Whatever the softmax is of; a sink takes its share and gives nothing."""
    model = tiny(family, variant=variant, attention=attention)
    inputs = tiny_inputs(model)
    names = ("attention_pattern", "expanded_head_value", "head_attention_value_output")
    (plain,) = read(model, inputs, "attention_pattern")
    column = entry("attention_pattern", "h.query.key", iv.ZeroIntervention(), where={"keys": 3})
    pattern, values, given = read(model, inputs, *names, edits=[column])

    assert_close(pattern @ values, given, atol=1e-5, rtol=1e-5)
    assert not pattern[..., 3].any()
    others = [0, 1, 2, 4, 5, 6]
    assert_close(pattern[..., others], plain[..., others], atol=1e-6, rtol=1e-5)
    assert plain[:, :, 3:, 3].abs().min() > 0


SCALES = {"gemma": 6**-0.5, "gemma2": 256**-0.5, "gemma3": 256**-0.5}


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gpt_neox", "gptj", "phi3", "olmo2", "gemma2", "gemma3"]
)
def test_scores_are_products_of_rotated_queries_and_keys(family, attention):
    model = tiny(family, attention=attention)
    inputs = tiny_inputs(model)
    names = ("rotary_query", "rotary_key", "expanded_head_key", "attention_scores", "attention_pattern")
    for layer in (0, 1):
        queries, shared, keys, scores, pattern = read(model, inputs, *names, layer=layer)
        assert torch.equal(keys, shared.repeat_interleave(4 // shared.shape[1], dim=1))
        expected = queries @ keys.transpose(2, 3) * SCALES.get(family, queries.shape[-1] ** -0.5)
        if family == "gemma2":
            cap = model.config.attn_logit_softcapping
            expected = cap * torch.tanh(expected / cap)
        distance = torch.arange(7)[:, None] - torch.arange(7)
        windowed = family == "mistral" or (family in ("gemma2", "gemma3") and layer == 0)
        hidden = (distance < 0) | ((distance >= 4) & windowed)
        assert_close(scores, expected.masked_fill(hidden, -torch.inf), atol=1e-5, rtol=1e-5)
        assert_close(pattern, scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_edited_queries_keys_and_values_are_those_that_are_read(attention):
    """Queries of a head doubled; keys that heads share negated for all of them, and for one; values zeroed."""
    model = tiny("llama", attention=attention)
    inputs = tiny_inputs(model)
    names = ("attention_scores", "attention_pattern", "expanded_head_value", "head_attention_value_output")

    def after(component, intervention, head, position):
        where = {"heads": head, "positions": position}
        return read(model, inputs, *names, edits=[entry(component, "h.pos", intervention, where=where)])

    plain, _, values, _ = read(model, inputs, *names)
    double, negate = iv.ScaleIntervention(2.0), iv.ScaleIntervention(-1.0)
    for component, intervention, head, heads, at in (
        ("rotary_query", double, 1, [1], (4, slice(None))),
        ("rotary_key", negate, 1, [2, 3], (slice(None), 2)),
        ("expanded_head_key", negate, 2, [2], (slice(None), 2)),
    ):
        expected = plain.clone()
        for one in heads:
            cells = expected[:, one, at[0], at[1]]
            factor = 2.0 if intervention is double else -1.0
            expected[:, one, at[0], at[1]] = torch.where(cells.isinf(), cells, cells * factor)
        scores, pattern, same, given = after(
            component, intervention, head, 4 if intervention is double else 2
        )
        assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        assert_close(pattern, expected.softmax(-1), atol=1e-6, rtol=1e-5)
        assert torch.equal(same, values)
        assert_close(given, pattern @ values, atol=1e-5, rtol=1e-5)

    removed = values.clone()
    removed[:, 3, 1] = 0
    _, pattern, edited, given = after("expanded_head_value", iv.ZeroIntervention(), 3, 1)
    assert torch.equal(edited, removed)
    assert_close(given, pattern @ removed, atol=1e-5, rtol=1e-5)
    assert values[:, 3, 1].abs().min() > 0


def test_scores_of_bloom_have_its_bias_for_near_keys():
    model = tiny("bloom")
    inputs = tiny_inputs(model)
    queries, keys, scores = read(model, inputs, "head_query_output", "head_key_output", "attention_scores")
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])  # of four heads, as in the paper
    expected = queries @ keys.transpose(2, 3) / 2 + slopes[:, None, None] * torch.arange(7)
    hidden = torch.ones(7, 7).triu(1).bool()
    assert_close(scores, expected.masked_fill(hidden, -torch.inf), atol=1e-5, rtol=1e-5)


def test_an_edit_leaves_the_share_of_a_sink_alone():
    model = tiny("gpt_oss")
    inputs = tiny_inputs(model)
    (plain,) = read(model, inputs, "attention_pattern")
    knockout = entry("attention_scores", "h.query.key", iv.KnockoutIntervention(), where={"keys": 2})
    (pattern,) = read(model, inputs, "attention_pattern", edits=[knockout])
    removed = plain.clone()
    removed[..., 2] = 0
    assert_close(pattern, removed / (1 - plain[..., 2:3]))  # what is left, the sink in it, makes up one
    assert plain[:, :, 2:, 2].min() > 0
    scaled = entry("attention_pattern", "h", iv.ScaleIntervention(0.5))
    (halved,) = read(model, inputs, "attention_pattern", edits=[scaled])
    assert_close(halved, plain / 2)


def test_queries_of_an_encoder_read_ahead_and_may_be_kept_from_it():
    model = tiny("bert")
    inputs = tiny_inputs(model)
    (plain,) = read(model, inputs, "attention_pattern")
    assert plain[:, :, 0, 6].min() > 0
    ahead = entry(
        "attention_scores", "h.query.key", iv.KnockoutIntervention(), where={"queries": 0, "keys": [5, 6]}
    )
    (pattern,) = read(model, inputs, "attention_pattern", edits=[ahead])
    assert not pattern[:, :, 0, 5:].any()
    assert_close(pattern[:, :, 0, :5], plain[:, :, 0, :5] / plain[:, :, 0, :5].sum(-1, keepdim=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_half_precision_softmax_computes_in_float32(attention):
    model = tiny("llama", dtype=torch.bfloat16, attention=attention)
    inputs = tiny_inputs(model)
    scores, pattern = read(model, inputs, "attention_scores", "attention_pattern")
    assert scores.dtype == torch.bfloat16
    assert torch.equal(pattern.bfloat16(), scores.float().softmax(-1).bfloat16())


def test_dropout_of_a_pattern_comes_after_the_edit_and_is_the_models_own():
    model = tiny("gpt2", attention="eager").train()
    inputs = tiny_inputs(model)
    declared = wrapped(model, entry("attention_pattern", "h", lambda base: base.clone()))
    results = []
    for run in (model, lambda **inputs: declared(inputs).intervened):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(main_output(run(**inputs)))
    assert torch.equal(*results)
    torch.manual_seed(4)
    with torch.no_grad():
        assert not torch.equal(main_output(model(**inputs)), results[0])


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", None), ("llama", "single"), ("qwen2", None), ("falcon", None), ("falcon", "grouped")],
)
def test_a_single_query_of_grouped_heads_has_a_pattern_of_ones(family, variant):
    model = tiny(family, variant=variant, attention="sdpa")
    inputs = tiny_inputs(model, length=1)
    with torch.no_grad():
        expected = model(**inputs).logits
    pattern, plain = read(model, inputs, "attention_pattern", "head_attention_value_output")
    assert torch.equal(pattern, torch.ones(2, 4, 1, 1))
    zero = entry("attention_pattern", "h", iv.ZeroIntervention(), where={"heads": 1})
    (edited,) = read(model, inputs, "head_attention_value_output", edits=[zero])
    plain[:, 1] = 0
    assert_close(edited, plain)
    with torch.no_grad():
        untouched = wrapped(model, entry("attention_pattern", "h", lambda base: base.clone()))(inputs)
    assert_close(untouched.intervened.logits, expected, atol=1e-6, rtol=1e-6)


def test_a_single_query_packed_with_those_it_shares_keys_with_is_unpacked():
    """Transformers do so for heads too wide for the kernel that knows of shared ones."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=260,
        **SMALL,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    inputs = {"input_ids": torch.tensor([[5], [7]])}
    names = ("attention_pattern", "expanded_head_value", "head_attention_value_output")
    pattern, values, given = read(model, inputs, *names)
    assert torch.equal(pattern, torch.ones(2, 4, 1, 1))
    assert_close(given, values)
    scaled = entry("attention_pattern", "h", iv.ScaleIntervention(0.5), where={"heads": 2})
    (edited,) = read(model, inputs, names[2], edits=[scaled])
    given[:, 2] /= 2
    assert_close(edited, given)


# Other forms of attention


@pytest.fixture
def registry(monkeypatch):
    """A registry of maps whose additions are forgotten after the test."""
    monkeypatch.setattr(lookup, "_MAPS", dict(lookup._MAPS))


PLACES = {
    "block_input": iv.Site("", "input"),
    "block_output": iv.Site(""),
    "attention_input": iv.Site("self_attn", "input"),
    "attention_output": iv.Site("self_attn"),
    "value_output": iv.Site("self_attn.v_proj", width="key_value", heads="key_value"),
}


def random_model(cls, config):
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def test_matrices_with_batch_and_heads_as_one_axis_are_met(registry):
    projected = {
        "attention_value_output": iv.Site("self_attn.out_proj", "input", width="query", heads="query")
    }
    iv.register_map(iv.ModelMap(("XGLMForCausalLM",), "model.layers", PLACES | projected))
    config = transformers.XGLMConfig(
        d_model=16, ffn_dim=20, num_layers=2, attention_heads=4, max_position_embeddings=16, **SMALL
    )
    model = random_model(transformers.XGLMForCausalLM, config)
    inputs = tiny_inputs(model, batch=3)
    inputs = {"input_ids": inputs["input_ids"] % 40, "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
        same = wrapped(model, entry("attention_pattern", "h", lambda base: base.clone()))(inputs).intervened
    assert torch.equal(same.logits, expected.logits)
    names = ("attention_pattern", "expanded_head_value", "head_attention_value_output")
    plain, values, _ = read(model, inputs, *names)
    assert torch.equal(plain, expected.attentions[LAYER])
    knockout = entry(
        "attention_scores", "h.query.key", iv.KnockoutIntervention(), where={"heads": 1, "keys": 0}
    )
    pattern, _, given = read(model, inputs, *names, edits=[knockout])
    removed = plain.clone()
    removed[:, 1, :, 0] = 0
    sums = removed.sum(-1, keepdim=True)
    removed = torch.where(sums > 0, removed / sums.where(sums > 0, 1.0), removed)
    assert_close(pattern, removed)
    assert_close(given, removed @ values)


def test_both_softmaxes_of_differential_attention_are_edited(registry):
    iv.register_map(iv.ModelMap(("DiffLlamaForCausalLM",), "model.layers", PLACES))
    config = transformers.DiffLlamaConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        **SMALL,
    )
    model = random_model(transformers.DiffLlamaForCausalLM, config)
    inputs = {"input_ids": torch.randint(3, 40, (2, 7))}
    with torch.no_grad():
        expected = model(**inputs)
        same = wrapped(model, entry("attention_pattern", "h", lambda base: base.clone()))(inputs).intervened
        declared = wrapped(model, entry("attention_pattern", "h", iv.ZeroIntervention()))
        attended = by_hand.hook(model, "attention_output", lambda value: seen.append(value.clone()))
        seen = []
        receipt = declared(inputs).receipt
        attended.remove()
    assert same_bits(same, expected)
    assert not seen[0].any()
    assert [line.fired for line in receipt] == [1, 1]


class Twice(nn.Module):
    """Attention that reads two halves of its values with one pattern, which it computes for each of them anew."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states):
        query, key, value = (
            projection(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        halves = [(query @ key.transpose(2, 3)).softmax(-1) @ half for half in value.chunk(2, -1)]
        return torch.cat(halves, -1).transpose(1, 2).flatten(2)


def test_a_pattern_computed_again_for_other_values_is_shown_once_and_changed_alike():
    torch.manual_seed(0)
    module, given, made = Twice(), torch.randn(2, 5, 8), []

    def act(passage):
        made.append(passage.take("output", None) + torch.randn(2, 2, 5, 5))
        passage.put("output", None, made[-1])

    hook = Hook(module, "output", act, InsideHook("attention_pattern", act, True, 2, 2))
    with torch.no_grad(), hooked([hook], module):
        returned = module(given)
        values = module.v_proj(given).unflatten(-1, (2, 4)).transpose(1, 2)

    (noisy,) = made
    assert_close(returned, (noisy @ values).transpose(1, 2).flatten(2))


class Mixing(nn.Module):
    """Attention of two heads with choices among them that are made by other softmaxes."""

    def __init__(self):
        super().__init__()
        self.project, self.router = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, hidden_states):
        batch, length, _ = hidden_states.shape
        query, key, value = self.project(hidden_states).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        choice = self.router(hidden_states).softmax(-1)
        scores = query @ key.transpose(2, 3)
        experts = scores[..., :3].softmax(-1)  # for each head and query, but not over all keys
        heads = scores.softmax(-1) @ value * experts[..., :1]
        return (heads * choice.transpose(1, 2)[..., None]).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Mixing()

    def forward(self, hidden_states):
        return hidden_states + self.self_attn(hidden_states)


class RoutedHeads(nn.Module):
    """A model of a user's own."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PreTrainedConfig(
            hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_hidden_layers=2
        )
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_other_softmaxes_inside_an_attention_module_are_left_alone(registry):
    places = {
        name: PLACES[name] for name in ("block_input", "block_output", "attention_input", "attention_output")
    }
    iv.register_map(iv.ModelMap(("RoutedHeads",), "blocks", places, causal=False))
    torch.manual_seed(0)
    model, values = RoutedHeads(), torch.randn(2, 5, 8)
    attention = model.blocks[LAYER].self_attn
    found = []
    handle = attention.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
    with torch.no_grad():
        declared = wrapped(
            model,
            entry("attention_pattern", "h.query", iv.ZeroIntervention(), where={"heads": 1, "queries": 2}),
        )
        receipt = declared(values).receipt
        handle.remove()
        (given, edited) = found[0]
        expected = attention(given)
    assert not edited[:, 2, 4:].any()
    expected[:, 2, 4:] = 0
    assert torch.equal(edited, expected)
    assert [line.fired for line in receipt] == [1, 1]


# What edits compute themselves


def test_products_and_softmaxes_of_other_edits_in_the_module_are_no_attention():
    model = tiny("llama")
    inputs = tiny_inputs(model)

    def like_attention(base):
        """As a softmax between two products would look."""
        heads = base.view(2, 7, 4, 6).transpose(1, 2)
        return ((heads @ heads.transpose(2, 3)).softmax(-1) @ heads).transpose(1, 2).flatten(2)

    places = [
        iv.RepresentationConfig(LAYER, "attention_value_output", intervention=like_attention),
        entry("head_attention_output", "h", lambda base: base * 2),
    ]
    inside = [
        entry(name, "h", lambda base: base * 1.5) for name in ("expanded_head_key", "attention_pattern")
    ]
    with torch.no_grad():
        together = wrapped(model, *places, *inside)(inputs)
        (pattern,) = read(model, inputs, "attention_pattern", edits=inside)
        (beside,) = read(model, inputs, "attention_pattern", edits=[*inside, *places])
    assert [line.fired for line in together.receipt] == [1] * 8
    assert torch.equal(pattern, beside)
    assert modes() == 0


def test_a_users_hook_on_the_module_is_outside_of_the_mode():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    attention = model.model.layers[LAYER].self_attn
    depths = []
    handles = [
        attention.register_forward_hook(lambda *_: depths.append(modes())),
        attention.register_forward_pre_hook(lambda *_: depths.append(modes())),
        attention.o_proj.register_forward_hook(lambda *_: depths.append(modes())),
    ]
    with torch.no_grad():
        wrapped(model, entry("attention_pattern", "h", iv.ZeroIntervention()))(inputs)
    for handle in handles:
        handle.remove()
    assert depths == [0, 1, 0]  # the module is entered, its own module has run, it has been left


# What is left behind


def refuse(error):
    def intervention(base):
        raise error

    return intervention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("error", [ArithmeticError("no"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize(
    "component", ["attention_pattern", "attention_scores", "rotary_query", "expanded_head_value"]
)
def test_after_an_edit_that_raises_inside_the_module_no_hook_and_no_mode_is_left(component, error, attention):
    model = tiny("llama", attention=attention)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)
        others = [entry(component, "h", iv.CollectIntervention(), layer=layer) for layer in (0, 1, 2)]
        declared = wrapped(model, *others, entry(component, "h", refuse(error)))
        with pytest.raises(type(error)):
            declared(inputs)
        assert modes() == 0
        assert hooks_of(model) == {}
        assert same_bits(model(**inputs), expected)


class Forgiving(Block):
    """Goes on without what its attention cannot give."""

    def forward(self, hidden_states):
        try:
            return super().forward(hidden_states)
        except ArithmeticError:
            return hidden_states


def test_a_model_that_gets_over_an_error_goes_on_without_the_mode(registry):
    places = {name: PLACES[name] for name in ("block_input", "block_output", "attention_input")}
    iv.register_map(iv.ModelMap(("RoutedHeads",), "blocks", places, causal=False))
    model = RoutedHeads()
    model.blocks[0] = Forgiving()
    depths = []
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: depths.append(modes()))
    declared = wrapped(model, entry("attention_pattern", "h", refuse(ArithmeticError()), layer=0))
    with pytest.raises(iv.NotFiredError), torch.no_grad():
        declared(torch.randn(2, 5, 8))
    handle.remove()
    assert depths == [0]


@pytest.mark.parametrize(
    "place", ["attention_input", "query_output", "attention_value_output", "attention_output"]
)
def test_after_an_edit_that_raises_beside_it_no_mode_is_left(place):
    model = tiny("llama")
    declared = wrapped(
        model,
        entry("attention_pattern", "h", iv.ZeroIntervention()),
        iv.RepresentationConfig(LAYER, place, intervention=refuse(ArithmeticError("no"))),
    )
    with pytest.raises(ArithmeticError):
        declared(tiny_inputs(model))
    assert modes() == 0
    assert hooks_of(model) == {}


@pytest.mark.parametrize("component", ["attention_pattern", "attention_scores", "rotary_key"])
def test_a_source_run_that_stops_inside_the_module_goes_no_further_and_leaves_no_mode(component):
    model = tiny("llama")
    base, source = tiny_inputs(model), tiny_inputs(model, seed=1)
    calls = []
    handles = [
        model.model.layers[LAYER].self_attn.o_proj.register_forward_hook(lambda *_: calls.append("out")),
        model.model.layers[LAYER].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("in")),
    ]
    with torch.no_grad():
        output = wrapped(model, entry(component, "h", iv.VanillaIntervention(), name="it"))(base, [source])
        assert calls == ["in", "in", "out"]
        assert modes() == 0
        for handle in handles:
            handle.remove()
        (expected,) = read(model, source, component)
        (plain,) = read(model, base, component)
        change = torch.where(plain == expected, 0.0, expected - plain).flatten(1).norm(dim=1)
    assert [line.change for line in output.receipt] == pytest.approx(change.tolist(), rel=1e-5)
    assert hooks_of(model) == {}


class Counting(TorchFunctionMode):
    """A mode of the user's."""

    def __init__(self):
        super().__init__()
        self.softmaxes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.softmaxes += func in (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)
        return func(*args, **(kwargs or {}))


def test_modes_of_the_users_go_on_around_ours():
    model = tiny("llama", attention="eager")
    inputs = tiny_inputs(model)
    declared = wrapped(model, entry("attention_pattern", "h", iv.ZeroIntervention()))
    with torch.no_grad():
        expected = declared(inputs).intervened
        with Counting() as counting:
            assert modes() == 1
            assert same_bits(declared(inputs).intervened, expected)
            assert modes() == 1
            assert counting.softmaxes == 3
            with pytest.raises(ArithmeticError):
                wrapped(model, entry("attention_pattern", "h", refuse(ArithmeticError())))(inputs)
            assert modes() == 1
        with torch.device("cpu"):
            assert same_bits(declared(inputs).intervened, expected)
            assert modes() == 1
    with torch.inference_mode():
        assert same_bits(declared(inputs).intervened, expected)
    assert modes() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_threads_with_different_edits_get_the_serial_results(attention):
    model = tiny("llama", attention=attention)
    inputs = tiny_inputs(model)
    edits = [
        entry("attention_pattern", "h", iv.ZeroIntervention(), where={"heads": 1}),
        entry("attention_scores", "h.query.key", iv.KnockoutIntervention(), where={"keys": 1}),
        entry("rotary_query", "h", iv.ScaleIntervention(2.0), where={"heads": 3}),
    ]
    several = [wrapped(model, edit) for edit in edits]
    jobs = [*(lambda one=one: one(inputs).intervened for one in several), lambda: model(**inputs)]
    start = Barrier(len(jobs))

    def repeat(job):
        start.wait()
        with torch.no_grad():
            return [main_output(job()) for _ in range(10)], modes()

    with torch.no_grad():
        expected = [main_output(job()) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = [future.result() for future in [pool.submit(repeat, job) for job in jobs]]
    for (results, left), serial in zip(found, expected, strict=True):
        assert left == 0
        assert all(torch.equal(result, serial) for result in results)
    assert not torch.equal(expected[0], expected[3])
    assert hooks_of(model) == {}


@pytest.mark.parametrize(
    "component", ["attention_pattern", "attention_scores", "rotary_key", "expanded_head_value"]
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_layers_meet_an_edit_inside_attention_again(family, reentrant, component):
    if family == "gpt2" and component == "rotary_key":
        component = "expanded_head_key"

    def run(model):
        factor = nn.Parameter(torch.tensor(0.8))

        def edit(base):
            if component == "attention_scores":  # of which the masked ones are no factors of a gradient
                return base + factor * torch.arange(7)
            return base * factor

        edits = [entry(component, "h", edit, layer=layer) for layer in (0, 1)]
        loss_of(wrapped(model, *edits)(tiny_inputs(model)).intervened).backward()
        return gradients(model, factor)

    model = training(family, reentrant)
    result = run(model)
    assert modes() == 0
    assert hooks_of(model) == {}
    assert_same_gradients(result, run(training(family)))
    assert result[-1].abs() > 1e-3


def test_hooks_left_for_a_backward_that_never_comes_let_no_mode_into_other_calls():
    model = training("llama", reentrant=False)
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    output = wrapped(model, entry("attention_pattern", "h", iv.ZeroIntervention()))(inputs)
    assert hooks_of(model) != {}
    assert same_bits(model(**inputs), expected)
    assert modes() == 0
    del output
    assert hooks_of(model) == {}


# Where it cannot be seen


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@pytest.mark.parametrize("component", ["attention_pattern", "attention_scores", "rotary_query"])
def test_a_kernel_that_shows_nothing_is_refused_when_a_model_is_bound(component, implementation):
    model = tiny("llama")
    model.config._attn_implementation = implementation
    with pytest.raises(iv.UnsupportedModelError) as caught:
        wrapped(model, entry(component, "h", iv.CollectIntervention()))
    assert str(caught.value) == (
        f"representation 0: {component} cannot be seen under attn_implementation={implementation!r}, a kernel that"
        " computes attention as a whole. Load the model with 'sdpa' or 'eager', or call"
        " model.set_attn_implementation('sdpa')."
    )
    wrapped(model, iv.RepresentationConfig(LAYER, "attention_output"))  # what modules hand over can be had


@pytest.mark.parametrize("family", RECURRENT)
def test_models_without_attention_say_so_when_they_are_bound(family):
    model = tiny(family)
    with pytest.raises(iv.UnsupportedModelError, match=r"attention_pattern.*") as caught:
        wrapped(model, entry("attention_pattern", "h", iv.CollectIntervention(), layer=0))
    assert "attention" in str(caught.value)


@pytest.mark.parametrize(
    "family", [name for name in LANGUAGE_MODELS if name not in DECODERS or name == "gpt2"]
)
def test_models_without_rotations_say_so_when_they_are_bound(family):
    with pytest.raises(iv.UnsupportedModelError, match="it has no rotary embedding"):
        wrapped(tiny(family), entry("rotary_query", "h", iv.CollectIntervention()))
