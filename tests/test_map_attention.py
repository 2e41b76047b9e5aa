"""Attention found by structure and numbers: against rows that people wrote, hand-made layers, and hooks by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_registry import build
from torch import nn
from written_maps import find_map

from intervenable.attention_mode import InsideHook
from intervenable.hooks import Hook, hooked
from intervenable.map_attention import WORDS, attention_sites
from intervenable.map_attention_heads import head_columns
from intervenable.map_trace import trace
from intervenable.site_binding import live_width
from model_maps import AttentionHeads, HeadColumns, ModelMap, Site, columns_of, sizes_of
from tiny_models import CASES, ENCODER_DECODER_CASES, RECURRENT, tiny, tiny_inputs

PLACED = WORDS[:6]
WRITTEN = tuple(case for case in CASES if case[0] not in RECURRENT)


def found_in(model, inputs, blocks, *, cross=False):
    """The attention of each block of a list."""
    paths = [f"{blocks}.{layer}" for layer in range(len(model.get_submodule(blocks)))]
    return attention_sites(model, inputs, trace(model, inputs), paths, cross=cross)


@functools.cache
def found_in_type(model_type, blocks):
    """The attention of each block of a tiny model of a type."""
    made = build(model_type)
    return found_in(made.model, made.inputs, blocks)


def laid_out(columns):
    """First column of each head and the width of one."""
    return columns and ([columns.first_column(head) for head in range(columns.heads)], columns.width)


def row_of(model):
    return find_map([cls.__name__ for cls in type(model).__mro__], model.config)


def differences(model, row, found, blocks, prefix=""):
    """Where what was found is not what a person wrote."""
    sizes, wrong = sizes_of(model.config), []
    for layer, one in enumerate(found):
        for word in PLACED:
            wanted, site = row.site(f"{prefix}{word}", layer), one.sites.get(word)
            assert wanted is not None
            if site is None:
                wrong.append((layer, word, one.absent[word]))
                continue
            module = model.get_submodule(f"{blocks}.{layer}.{wanted.path}")
            columns = laid_out(columns_of(wanted, sizes, width=live_width(module, wanted.side)))
            written = (wanted.path, wanted.side, wanted.slot, wanted.flat, wanted.axes, columns)
            if written != (site.path, site.side, site.slot, site.flat, site.axes, laid_out(site.columns)):
                wrong.append((layer, word, wanted, site))
    return wrong


@pytest.mark.parametrize(("family", "variant"), WRITTEN)
def test_every_row_that_a_person_wrote_is_found_again(family, variant):
    model = tiny(family, variant=variant)
    row = row_of(model)
    found = found_in(model, tiny_inputs(model), row.blocks)

    assert differences(model, row, found, row.blocks) == []
    assert {one.sites["attention_input"].read_only for one in found} == {""}
    for word in ("rotary_query", "rotary_key"):
        assert all((word in one.absent) == (word in row.absent) for one in found)


@pytest.mark.parametrize(("family", "variant"), ENCODER_DECODER_CASES[:2])
def test_an_encoder_a_decoder_and_its_look_at_the_encoder_are_told_apart(family, variant):
    model = tiny(family, variant=variant)
    row, inputs = row_of(model), tiny_inputs(model)

    for stack in ("encoder", "decoder"):
        blocks = row.stacks[stack]
        assert differences(model, row, found_in(model, inputs, blocks), blocks, f"{stack}_") == []
    blocks = row.stacks["decoder"]
    assert differences(model, row, found_in(model, inputs, blocks, cross=True), blocks, "cross_") == []
    (reason,) = {
        why
        for one in found_in(model, inputs, row.stacks["encoder"], cross=True)
        for why in one.absent.values()
    }
    assert reason == "it does not attend to another stack"


# Columns worked out on paper from the code of each model, for 4 query heads.
LAYOUTS = {
    # Each of four slices of the matrix has its queries, values and keys.
    ("codegen", "transformer.h", "query_output"): ([0, 24, 48, 72], 8),
    ("codegen", "transformer.h", "key_output"): ([16, 40, 64, 88], 8),
    ("codegen", "transformer.h", "value_output"): ([8, 32, 56, 80], 8),
    # Queries, then keys, then values, two heads of these.
    ("phi3", "model.layers", "key_output"): ([32, 40], 8),
    ("phi3", "model.layers", "value_output"): ([48, 56], 8),
    # One key-value head for all.
    ("gpt_bigcode", "transformer.h", "key_output"): ([32], 8),
    # Latent: the part of the keys that heads share comes from elsewhere.
    ("deepseek_v3", "model.layers", "query_output"): ([0, 12, 24, 36], 12),
    ("deepseek_v3", "model.layers", "key_output"): ([0, 18, 36, 54], 8),
    ("deepseek_v3", "model.layers", "value_output"): ([8, 26, 44, 62], 10),
    # A gate lies beside each head's queries.
    ("qwen3_next", "model.layers", "query_output"): ([0, 32, 64, 96], 16),
    # A norm over all heads lies between.
    ("olmo2", "model.layers", "key_output"): ([0, 8], 8),
}


@pytest.mark.parametrize(("model_type", "blocks", "word"), LAYOUTS)
def test_columns_are_those_worked_out_on_paper(model_type, blocks, word):
    found = found_in_type(model_type, blocks)

    columns = [laid_out(one.sites[word].columns) for one in found if word in one.sites]

    assert columns
    assert all(one == LAYOUTS[model_type, blocks, word] for one in columns)


def test_layers_without_attention_say_so():
    found = found_in_type("qwen3_next", "model.layers")

    assert [one.path for one in found] == [None, None, None, "self_attn"]
    assert set(found[0].absent) == set(WORDS)
    assert (
        found[0].absent["query_output"]
        == "it computes no attention: no softmax lies between two products there"
    )


REFUSED = {
    (
        "bitnet",
        "head_attention_output",
    ): "self_attn.attn_sub_norm divides all heads by one number before they are"
    " projected, so that what one adds depends on the others",
    ("diffllama", "value_output"): "it multiplies its pattern with values 2 times",
    ("jetmoe", "query_output"): "no linear module hands over what its queries are made of",
    ("deepseek_v4", "attention_value_output"): "the heads are not apart in what self_attn.o_a_proj reads",
}


@pytest.mark.parametrize(("model_type", "word"), REFUSED)
def test_what_cannot_be_told_apart_is_refused_with_its_reason(model_type, word):
    found = found_in_type(model_type, "model.layers")

    assert {one.absent.get(word) for one in found} == {REFUSED[model_type, word]}
    assert not any(word in one.sites for one in found)


def test_keys_that_a_convolution_makes_are_read_behind_it():
    found = found_in_type("inkling_text", "model.layers")

    assert {one.sites["key_output"].path for one in found} == {"self_attn.k_sconv"}
    assert {one.sites["query_output"].path for one in found} == {"self_attn.q_proj"}


def test_a_norm_of_all_heads_before_their_projection_is_given_pattern_times_values():
    made = build("bitnet")
    made.model.set_attn_implementation("eager")
    found = found_in(made.model, made.inputs, "model.layers")
    seen = {}
    layer = made.model.model.layers[1].self_attn
    layer.attn_sub_norm.register_forward_pre_hook(lambda _, given: seen.update(given=given[0]))
    layer.v_proj.register_forward_hook(lambda _, __, made: seen.update(values=made))
    with torch.no_grad():
        pattern = made.model(**made.inputs, output_attentions=True).attentions[1]

    site = found[1].sites["attention_value_output"]
    firsts, width = laid_out(site.columns)
    values = seen["values"].unflatten(-1, (-1, width)).transpose(1, 2)
    by_heads = pattern @ values.repeat_interleave(len(firsts) // values.shape[1], 1)
    assert (site.path, site.side) == ("self_attn.attn_sub_norm", "input")
    for head, first in enumerate(firsts):
        torch.testing.assert_close(seen["given"][..., first : first + width], by_heads[:, head])


# --- layers made by hand ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention over 2 key-value heads of 3 query heads each; `order` says which column of `mixed` is which."""

    def __init__(self, order, make=nn.Linear):
        super().__init__()
        self.mixed = make(12, 40)
        self.back = make(24, 12)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x):
        rows, length, _ = x.shape
        columns = self.mixed(x)[..., self.order]
        q, k, v = columns.split([24, 8, 8], -1)
        q = q.view(rows, length, 6, 4).transpose(1, 2)
        k, v = (one.view(rows, length, 2, 4).transpose(1, 2).repeat_interleave(3, 1) for one in (k, v))
        pattern = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.back((pattern @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.look = Attention(**kwargs)

    def forward(self, x):
        return x + self.look(self.norm(x))


def stacked(**kwargs):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Block(**kwargs) for _ in range(2))

    def forward(x):
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    return model, {"x": torch.randn(2, 5, 12)}


def columns_from(starts, width=4):
    return [start + offset for start in starts for offset in range(width)]


GROUPED = [*columns_from((0, 4, 8, 20, 24, 28)), *columns_from((12, 32)), *columns_from((16, 36))]
"""For each key-value head: its three queries, its key, its value."""


@pytest.mark.parametrize(
    ("order", "query", "key", "value"),
    [
        (list(range(40)), [0, 4, 8, 12, 16, 20], [24, 28], [32, 36]),
        (GROUPED, [0, 4, 8, 20, 24, 28], [12, 32], [16, 36]),
        ([*range(16, 40), *range(8, 16), *range(8)], [16, 20, 24, 28, 32, 36], [8, 12], [0, 4]),
    ],
    ids=["queries first", "groups", "values first"],
)
def test_columns_of_hand_made_layouts_are_found(order, query, key, value):
    model, inputs = stacked(order=order)
    for one in found_in(model, inputs, "layers"):
        assert one.path == "look"
        assert one.absent.keys() == {"rotary_query", "rotary_key"}
        assert laid_out(one.sites["query_output"].columns) == (query, 4)
        assert laid_out(one.sites["key_output"].columns) == (key, 4)
        assert laid_out(one.sites["value_output"].columns) == (value, 4)
        assert one.sites["attention_input"].attention.key_value == 2


def test_heads_whose_columns_are_interleaved_are_refused():
    by_channel = [6 * channel + head for head in range(6) for channel in range(4)]
    model, inputs = stacked(order=[*by_channel, *range(24, 40)])
    (one, _) = found_in(model, inputs, "layers")

    assert one.absent["query_output"] == "the columns of its heads are interleaved"
    assert "key_output" in one.sites


class Rounded(nn.Module):
    """A linear map that keeps its matrix in whole numbers, as quantised ones do."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "numbers", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        )

    def forward(self, x):
        return x @ (self.numbers.to(x.dtype) / 127).T


class Adapted(nn.Module):
    """A linear map with a small one beside it, as adapters are."""

    def __init__(self, *sizes):
        super().__init__()
        self.base_layer = nn.Linear(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2), nn.Linear(2, sizes[1])

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("make", [Rounded, Adapted])
def test_linear_maps_of_other_classes_count(make):
    model, inputs = stacked(order=GROUPED, make=make)
    (one, _) = found_in(model, inputs, "layers")

    assert laid_out(one.sites["key_output"].columns) == ([12, 32], 4)
    assert one.sites["key_output"].path == "look.mixed"
    assert one.sites["attention_value_output"].path == "look.back"


def test_a_model_whose_parameters_are_frozen_is_read_all_the_same():
    model, inputs = stacked(order=GROUPED)
    free = found_in(model, inputs, "layers")
    model.requires_grad_(False)

    assert found_in(model, inputs, "layers") == free


def test_the_model_is_left_as_it_was():
    made = build("llama")
    model, inputs = made.model, made.inputs
    before = model(**inputs).logits
    flags = [parameter.requires_grad for parameter in model.parameters()]

    found_in(model, inputs, "model.layers")

    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, before)


# --- what a change of one head's columns moves ------------------------------------------------------------


def scores_of(model, inputs, block, one, changed=None):
    """The scores of a block's attention, maybe after a change to a slice of a module's output."""
    site = one.sites["attention_input"]
    seen = []
    module = block.get_submodule(site.path)
    inside = InsideHook(
        "attention_scores_masked",
        lambda passage: seen.append(passage.take("output", None).clone()),
        False,
        site.attention.query,
        site.attention.key_value,
    )
    handles = []
    if changed is not None:
        where, first, width = changed

        def change(_module, _args, output):
            output = output.clone()
            output[..., first : first + width] += 1.5
            return output

        handles = [block.get_submodule(where.path).register_forward_hook(change)]
    with torch.no_grad(), hooked([Hook(module, "output", inside.act, inside)], model):
        model(**inputs)
    for handle in handles:
        handle.remove()
    (scores,) = seen
    return scores


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [
        ("llama", "model.layers"),
        ("codegen", "transformer.h"),
        ("falcon", "transformer.h"),
        ("deepseek_v3", "model.layers"),
    ],
)
@pytest.mark.parametrize("word", ["query_output", "key_output"])
def test_the_columns_of_a_head_move_the_scores_of_that_head_alone(model_type, blocks, word):
    made = build(model_type)
    (one, *_) = found_in(made.model, made.inputs, blocks)
    block = made.model.get_submodule(f"{blocks}.0")
    site = one.sites[word]
    before = scores_of(made.model, made.inputs, block, one)
    group = before.shape[1] // site.columns.heads
    for head in range(site.columns.heads):
        changed = (site, site.columns.first_column(head), site.columns.width)
        after = scores_of(made.model, made.inputs, block, one, changed)
        moved = [
            index for index in range(before.shape[1]) if not torch.allclose(before[:, index], after[:, index])
        ]
        assert moved == list(range(head * group, (head + 1) * group))


def test_scores_and_pattern_are_seen_where_positions_come_first():
    made = build("xlnet")
    (one, *_) = found_in(made.model, made.inputs, "transformer.layer")
    site = one.sites["attention_input"]
    module = made.model.transformer.layer[0].get_submodule(site.path)
    seen = []
    inside = InsideHook(
        "attention_pattern", lambda p: seen.append(p.take("output", None)), False, 4, 4, time_first=True
    )
    with torch.no_grad(), hooked([Hook(module, "output", inside.act, inside)], made.model):
        made.model(**made.inputs)

    (pattern,) = seen
    assert site.axes == (1, 0)
    assert pattern.shape == (2, 4, 7, 7)
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 7), atol=1e-5)


def pattern_in(model, inputs, block, one):
    """What a block's attention shows of its pattern."""
    site = one.sites["attention_input"]
    seen = []
    heads = (site.attention.query, site.attention.key_value, site.axes == (1, 0))
    inside = InsideHook("attention_pattern", lambda p: seen.append(p.take("output", None)), False, *heads)
    hook = Hook(block.get_submodule(site.path), "output", inside.act, inside)
    with torch.no_grad(), hooked([hook], model):
        model(**inputs)
    (pattern,) = seen
    return pattern


def test_a_softmax_that_is_a_module_of_its_own_belongs_to_the_attention_around_it():
    made = build("cpmant")  # it puts a prompt before the tokens and masks what the softmax returns
    found = found_in(made.model, made.inputs, "cpmant.encoder.layers")
    attention = made.model.cpmant.encoder.layers[1].self_att.self_attention
    seen = {}
    attention.attention_out.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    attention.project_v.register_forward_hook(lambda _, __, made: seen.update(values=made))

    pattern = pattern_in(made.model, made.inputs, made.model.cpmant.encoder.layers[1], found[1])

    assert {one.path for one in found} == {"self_att.self_attention"}
    assert {one.sites["query_output"].path for one in found} == {"self_att.self_attention.project_q"}
    values = seen["values"].unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close((pattern @ values).transpose(1, 2).flatten(2), seen["read"])


def test_the_matrices_inside_a_module_lie_as_what_it_is_given():
    given = Site("look", "input", axes=(1, 0), attention=AttentionHeads(4, 4))
    known = ModelMap(classes=("Hers",), blocks="layers", sites={"attention_input": given})

    inside = known.site("attention_pattern")

    assert inside is not None
    assert (inside.path, inside.axes, inside.attention) == ("look", (1, 0), AttentionHeads(4, 4))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_of_torch_s_own_layers_is_seen_inside_its_one_function(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 7, 16)
    inputs = {"src": x if batch_first else x.transpose(0, 1)}
    (one, _) = found_in(model, inputs, "layers")
    module, site = model.layers[0].self_attn, one.sites["attention_input"]
    seen = []
    inside = InsideHook(
        "attention_pattern", lambda p: seen.append(p.take("output", None)), False, 4, 4, not batch_first
    )
    with torch.no_grad(), hooked([Hook(module, "output", inside.act, inside)], model):
        model(**inputs)

    projected = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    query, key, _ = (part.view(2, 7, 4, 4).transpose(1, 2) for part in projected.chunk(3, -1))
    wanted = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    assert (one.path, site.path, site.axes) == ("self_attn", "self_attn", None if batch_first else (1, 0))
    assert site.read_only.startswith("the module is given it as several inputs")
    assert "attention_pattern" not in one.absent
    torch.testing.assert_close(seen[0], wanted)


# --- layouts ----------------------------------------------------------------------------------------------


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    width=st.integers(1, 5),
    start=st.integers(0, 9),
    gap=st.integers(0, 4),
    group_gap=st.integers(0, 6),
)
def test_a_regular_layout_is_told_from_its_columns(groups, per_group, width, start, gap, group_gap):
    stride = width + gap
    firsts = [
        start + group * (per_group * stride + group_gap) + head * stride
        for group in range(groups)
        for head in range(per_group)
    ]
    found = head_columns([list(range(first, first + width)) for first in firsts])

    assert isinstance(found, HeadColumns)
    assert laid_out(found) == (firsts, width)


def test_heads_without_order_or_of_several_widths_have_no_layout():
    assert head_columns([[0], [5], [1]]) == "the columns of its heads follow no regular order"
    assert head_columns([[0, 1], [2]]) == "its heads differ in width"
