"""Direct paths between heads, against runs with everything else held by hooks of our own."""

from __future__ import annotations

from contextlib import ExitStack

import by_hand
import pytest
import torch
from declared import main_output
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable.path_patching import get_act_patch_direct_path, get_act_patch_direct_path_all_sources
from tiny_models import HEADS, KEY_VALUE_HEADS, LAYERS, tiny, tiny_inputs

RECEIVED = {"q": "query_output", "k": "key_output", "v": "value_output"}
CASES = [
    ("gpt2", None),
    ("llama", None),
    ("llama", "full"),
    ("gpt_neox", None),
    ("gpt_neox", "sequential"),
    ("falcon", "grouped"),
    ("gemma2", None),
    ("olmo2", None),
    ("opt", "post_norm"),
    ("mixtral", None),
    ("bert", None),
]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3:6]


def prompts(model, **options):
    return tiny_inputs(model, seed=0, **options), tiny_inputs(model, seed=1, **options)


def seen_by_layer(model, component, inputs) -> list[Tensor]:
    return [by_hand.seen(model, component, inputs, layer) for layer in range(LAYERS)]


class Frozen:
    """One pair of prompts, and what is held at its corrupted value."""

    def __init__(self, model, family, variant) -> None:
        self.model, self.family, self.variant = model, family, variant
        self.clean, self.corrupted = prompts(model)
        with torch.no_grad():
            self.held = {
                name: seen_by_layer(model, name, self.corrupted)
                for name in ("attention_output", "mlp_output")
            }
            self.sent = seen_by_layer(model, "attention_value_output", self.clean)

    def received(self, layer: int, head: int, component: str, receiver: int) -> Tensor:
        """What a later layer computes of the stream if one head alone has its clean output."""
        columns = by_hand.columns(self.family, self.variant, "attention_value_output")[head]
        found: list[Tensor] = []

        def send(value: Tensor) -> Tensor:
            new = value.clone()
            new[..., columns] = self.sent[layer][..., columns]
            return new

        with ExitStack() as stack:

            def put(name, change, at):
                stack.callback(by_hand.hook(self.model, name, change, at).remove)

            put("attention_value_output", send, layer)
            for at in range(LAYERS):
                if at != layer:
                    put(
                        "attention_output", lambda value, at=at: self.held["attention_output"][at].clone(), at
                    )
                put("mlp_output", lambda value, at=at: self.held["mlp_output"][at].clone(), at)
            put(RECEIVED[component], lambda value: found.append(value.clone()), receiver)
            self.model(**self.corrupted)
        return found[0]

    def metric(self, sender: tuple[int, int], receiver: tuple[int, int], component: str) -> Tensor:
        """What the model answers with one path patched."""
        name, (layer, head) = RECEIVED[component], receiver
        columns = by_hand.columns(self.family, self.variant, name)[head]
        with torch.no_grad():
            value = self.received(*sender, component, layer)

            def read(own: Tensor) -> Tensor:
                new = own.clone()
                new[..., columns] = value[..., columns]
                return new

            return metric(main_output(by_hand.run_with(self.model, name, read, self.corrupted, layer)))


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_path_is_what_a_run_with_all_else_held_gives(family, variant, component):
    model = tiny(family, variant=variant)
    frozen = Frozen(model, family, variant)
    sender = (0, 1)
    paths = get_act_patch_direct_path(model, frozen.corrupted, frozen.clean, None, metric, *sender, component)

    heads = HEADS if component == "q" else by_hand.key_value_heads(family, variant)
    assert paths.shape == (LAYERS, heads, 2, 3)
    assert paths[0].isnan().all()
    with torch.no_grad():
        unpatched = metric(main_output(model(**frozen.corrupted)))
    for receiver in [(1, 0), (2, heads - 1)]:
        expected = frozen.metric(sender, receiver, component)
        assert_close(paths[receiver], expected, atol=2e-5, rtol=1e-4)
    assert (paths[1:] - unpatched).abs().max() > 1e-3


def test_what_arrives_is_what_the_head_adds_through_norm_and_projection():
    model = tiny("llama")
    clean, corrupted = prompts(model)
    layer, head, receiver = 0, 2, (2, 1)
    block = model.model.layers[receiver[0]]
    width = slice(head * 6, head * 6 + 6)
    with torch.no_grad():
        sent = [
            by_hand.seen(model, "attention_value_output", x, layer)[..., width] for x in (clean, corrupted)
        ]
        added = (sent[0] - sent[1]) @ model.model.layers[layer].self_attn.o_proj.weight[:, width].T
        stream = by_hand.seen(model, "block_input", corrupted, receiver[0]) + added
        query = block.self_attn.q_proj(block.input_layernorm(stream))

        def read(own: Tensor) -> Tensor:
            new = own.clone()
            new[..., 6:12] = query[..., 6:12]
            return new

        expected = metric(by_hand.run_with(model, "query_output", read, corrupted, receiver[0]).logits)
    paths = get_act_patch_direct_path(model, corrupted, clean, None, metric, layer, head)
    assert_close(paths[receiver], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gpt_neox"])
def test_the_linear_path_keeps_the_divisor_of_the_norm(family):
    model = tiny(family)
    clean, corrupted = prompts(model)
    layer, head, receiver = 0, 1, (2, 3)
    norm = {
        "gpt2": lambda block: block.ln_1,
        "gpt_neox": lambda block: block.input_layernorm,
    }.get(family, lambda block: block.input_layernorm)(by_hand.block_of(model, receiver[0]))
    columns = by_hand.columns(family, None, "attention_value_output")[head]
    targets = by_hand.columns(family, None, "query_output")[receiver[1]]
    with torch.no_grad():
        sent = [by_hand.seen(model, "attention_value_output", x, layer) for x in (clean, corrupted)]
        projection, _ = by_hand.module_at(model, "attention_value_output", layer)
        outputs = []
        for z in sent:
            only = torch.zeros_like(z)
            only[..., columns] = z[..., columns]
            outputs.append(projection(only))
        added = outputs[0] - outputs[1]
        stream = by_hand.seen(model, "block_input", corrupted, receiver[0])
        if isinstance(norm, torch.nn.LayerNorm):
            scale = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            read = norm(stream) + norm.weight * (added - added.mean(-1, keepdim=True)) / scale
        else:
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            weight = 1 + norm.weight if family == "gemma" else norm.weight
            read = norm(stream) + weight * added / (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        query = by_hand.module_at(model, "query_output", receiver[0])[0](read)

        def patch(own: Tensor) -> Tensor:
            new = own.clone()
            new[..., targets] = query[..., targets]
            return new

        expected = metric(by_hand.run_with(model, "query_output", patch, corrupted, receiver[0]).logits)
    linear = get_act_patch_direct_path(model, corrupted, clean, None, metric, layer, head, mode="linear")
    exact = get_act_patch_direct_path(model, corrupted, clean, None, metric, layer, head)
    assert_close(linear[receiver], expected, atol=2e-5, rtol=1e-4)
    assert (linear[receiver] - exact[receiver]).abs().max() > 1e-4


@pytest.mark.parametrize(("family", "variant"), [("gemma2", None), ("opt", "post_norm"), ("bert", None)])
def test_a_stream_that_is_no_sum_has_no_linear_path(family, variant):
    model = tiny(family, variant=variant)
    clean, corrupted = prompts(model)
    with pytest.raises(iv.UnsupportedModelError, match=r"a norm comes between\. Take mode='exact'"):
        get_act_patch_direct_path(model, corrupted, clean, None, metric, 0, 0, mode="linear")


def test_all_senders_at_once_are_the_senders_one_by_one():
    model = tiny("llama")
    clean, corrupted = prompts(model)

    def one(logits: Tensor) -> Tensor:
        return logits[0, -1, 5]

    told: list[tuple[int, int]] = []
    every = get_act_patch_direct_path_all_sources(
        model, corrupted, clean, None, one, "k", progress=lambda done, total: told.append((done, total))
    )
    assert every.shape == (LAYERS, HEADS, LAYERS, KEY_VALUE_HEADS)
    for sender in [(0, 0), (0, 3), (1, 2), (2, 1)]:
        alone = get_act_patch_direct_path(model, corrupted, clean, None, one, *sender, "k")
        assert torch.equal(every[sender].nan_to_num(77), alone.nan_to_num(77))
    reached = torch.tensor([[b > a for b in range(LAYERS)] for a in range(LAYERS)])
    assert torch.equal(every.isfinite().all(-1).all(1), reached)
    assert told[-1] == (LAYERS * HEADS, LAYERS * HEADS)


def test_equal_prompts_have_no_paths_that_matter():
    model = tiny("gpt2")
    clean, _ = prompts(model)
    paths = get_act_patch_direct_path(model, dict(clean), clean, None, metric, 0, 0)
    with torch.no_grad():
        expected = metric(model(**clean).logits)
    assert_close(paths[1:], expected.expand_as(paths[1:]), atol=1e-5, rtol=1e-5)


def test_the_clean_run_may_be_collected_and_be_one_prompt():
    model = tiny("llama")
    clean, corrupted = prompts(model)
    first = {name: value[:1] for name, value in clean.items()}
    twice = {name: value[:1].repeat(2, 1) for name, value in clean.items()}
    cache = iv.collect(model, first, "head_attention_value_output", layers=1)
    expected = get_act_patch_direct_path(model, corrupted, twice, None, metric, 1, -1)
    for given in (first, first["input_ids"], cache):
        found = get_act_patch_direct_path(model, corrupted, given, None, metric, -2, HEADS - 1)
        assert_close(found, expected, equal_nan=True, atol=1e-6, rtol=1e-6)


def test_padded_prompts_have_the_paths_of_each_alone():
    model = tiny("llama")
    clean, corrupted = prompts(model, padding="left")
    together = get_act_patch_direct_path(model, corrupted, clean, None, metric, 0, 0)
    for row in range(2):
        alone = [
            {name: value[row : row + 1, row:] for name, value in inputs.items()}
            for inputs in (corrupted, clean)
        ]
        single = get_act_patch_direct_path(model, *alone, None, metric, 0, 0)
        assert_close(together[:, :, row], single[:, :, 0], equal_nan=True, atol=1e-5, rtol=1e-5)


def test_a_sender_in_the_last_layer_reaches_nothing():
    model = tiny("gpt2")
    clean, corrupted = prompts(model)
    paths = get_act_patch_direct_path(model, corrupted, clean, None, metric, LAYERS - 1, 0)
    assert paths.shape[:2] == (LAYERS, HEADS)
    assert paths.isnan().all()


def test_the_model_is_as_before():
    model = tiny("gpt2")
    clean, corrupted = prompts(model)
    before = {name: value.clone() for name, value in clean.items()}
    get_act_patch_direct_path(model, corrupted, clean, None, metric, 0, 0)
    assert all(torch.equal(before[name], clean[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"src_layer": 3},
            iv.LayerRangeError,
            "src_layer=3 is out of range: LlamaForCausalLM has layers 0 to 2",
        ),
        (
            {"src_head": -5},
            iv.LocationRangeError,
            "src_head=-5 is out of range: LlamaForCausalLM has heads 0 to 3",
        ),
        ({"component": "key"}, iv.UnknownNameError, "Unknown component 'key' of a receiving head"),
        ({"mode": "liner"}, iv.UnknownNameError, "Did you mean 'linear'?"),
        ({"clean_cache": tiny_inputs(tiny("llama"), length=5)}, iv.InputError, "Give prompts of one length"),
        (
            {"clean_cache": tiny_inputs(tiny("llama"), padding="left")},
            iv.InputError,
            "padded in another way than the corrupted one",
        ),
        (
            {"clean_cache": iv.collect(tiny("llama"), tiny_inputs(tiny("llama")), "block_input")},
            iv.MissingActivationError,
            "Not collected: 'head_attention_value_output'",
        ),
        ({"model": iv.IntervenableModel([], tiny("llama"))}, iv.ConfigError, "give the one that"),
        ({"model": tiny("t5")}, iv.UnsupportedModelError, "decoder_head_attention_value_output"),
    ],
)
def test_a_path_that_cannot_be_is_explained(changes, error, words):
    model = tiny("llama")
    clean, corrupted = prompts(model)
    call = {
        "model": model,
        "corrupted_tokens": corrupted,
        "clean_cache": clean,
        "corrupted_cache": None,
        "patching_metric": metric,
        "src_layer": 0,
        "src_head": 0,
    }
    with pytest.raises(error) as caught:
        get_act_patch_direct_path(**{**call, **changes})
    assert words in str(caught.value)
