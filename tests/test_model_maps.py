"""Every row against the models it describes: hooks of our own, and the arithmetic of the models' source."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product

import pytest
import torch
import transformers
from torch.testing import assert_close
from written_maps import find_map, known_classes

import tiny_models
from intervenable.toy_models import MLPClassifier
from model_maps import COMPONENTS, HeadColumns, columns_of, component_site, sizes_of
from tiny_models import CASES, DECODERS, FEATURES, HIDDEN, MULTIMODAL, RECURRENT, tiny, tiny_inputs

LANGUAGE_CASES = [case for case in CASES if case[0] not in RECURRENT]
POST_NORM = [("bert", None), ("opt", "post_norm"), ("bloom", "post_norm")]
PRE_NORM_CASES = [case for case in LANGUAGE_CASES if case not in POST_NORM]
FLAT = ("opt", "mixtral", "gpt_oss")
LAYER = 1


# Hooks of our own


def map_of(model):
    return find_map([base.__name__ for base in type(model).__mro__], getattr(model, "config", None))


def module_of(model, component, layer=LAYER):
    """The module that a map names, and the site."""
    described = map_of(model)
    site = component_site(described, component)
    inside = (
        [described.blocks, str(layer)] if described.blocks and COMPONENTS[component].scope == "block" else []
    )
    return model.get_submodule(".".join([*inside, site.path]).strip(".")), site


def at(site, args, kwargs, output):
    """What is at a site when its module has run."""
    if site.slot is not None:
        chosen = (args if site.side == "input" else output) if isinstance(site.slot, int) else kwargs
        return chosen[site.slot]
    if site.side == "input":
        return args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
    return output if isinstance(output, torch.Tensor) else output[0]


def read(model, places, grad=False, **inputs):
    """The tensors at `(component, layer)` places, as the hooks saw them, and the model's own output."""
    seen = {}

    def looking(place, site):
        def hook(module, args, kwargs, output):
            value = at(site, args, kwargs, output)
            seen[place] = value if grad else value.detach().clone()

        return hook

    with ExitStack() as stack, torch.set_grad_enabled(grad):
        for place in places:
            module, site = module_of(model, *place)
            handle = module.register_forward_hook(looking(place, site), with_kwargs=True)
            stack.callback(handle.remove)
        output = model(**(inputs or tiny_inputs(model)))
    return seen, output


def reader(family, variant, *components, layer=LAYER, head="lm"):
    """The tensors at some components of one block of a tiny model, `[b, s, ...]`."""
    model = tiny(family, variant=variant, head=head)
    seen, _ = read(model, [(name, layer) for name in components])
    return model, *(unflattened(seen[name, layer]) for name in components)


def unflattened(value, batch=2):
    return value.view(batch, -1, value.shape[-1]) if value.dim() == 2 else value


def block_of(model, layer=LAYER):
    return model.get_submodule(f"{map_of(model).blocks}.{layer}")


# Every class


def family_of(class_name):
    """The family whose config a class takes."""
    config = getattr(transformers, class_name).config_class.__name__
    for name, row in tiny_models._FAMILIES.items():
        if config == (row.config or f"{row.name}Config"):
            return name
    raise AssertionError(class_name)


# Those of T5 are in `test_encoder_decoders.py`, those of Mamba in `test_state_spaces.py`.
MAPPED = [
    name
    for name in known_classes()
    if hasattr(transformers, name) and "T5" not in name and "Mamba" not in name
]
CLASS_CASES = [
    (name, variant) for name in MAPPED for variant in (None, *tiny_models.VARIANTS.get(family_of(name), ()))
]


def inputs_of(model):
    inputs = tiny_inputs(model)
    if type(model).__name__ == "BertForMultipleChoice":  # `[batch, choice, position]`
        return {name: value[:, None] for name, value in inputs.items()}
    return inputs


@pytest.mark.parametrize(("class_name", "variant"), CLASS_CASES)
def test_every_site_of_every_class_exists_and_is_as_wide_as_promised(class_name, variant):
    model = tiny(family_of(class_name), head=class_name, variant=variant)
    described, sizes = map_of(model), sizes_of(model.config)
    # A function computes what is inside a module: no hook sees it.
    names = [name for name in described.components() if not COMPONENTS[name].inside]

    seen, _ = read(model, [(name, LAYER) for name in names], **inputs_of(model))

    assert {"block_input", "block_output", "query_output", "mlp_output", "embedding_output"} <= set(names)
    for name in names:
        value, site = seen[name, LAYER], described.site(name)
        if name != "logits":  # some heads read one pooled position
            assert value.shape[:-1] == ((14,) if site.flat else (2, 7)), name
        width = sizes.width(site.width)
        if site.part is None:
            assert width in (None, value.shape[-1]), name
        assert width is not None or name in ("logits", "expert_choice", "expert_weight")


@pytest.mark.parametrize("module", sorted({family for family, _ in LANGUAGE_CASES}))
def test_every_class_that_transformers_has_for_a_family_is_mapped(module):
    package = getattr(transformers.models, module)
    models = [
        name
        for name in dir(package)
        if isinstance(getattr(package, name), type)
        and issubclass(getattr(package, name), transformers.PreTrainedModel)
        and not name.endswith("PreTrainedModel")
    ]
    assert len(models) >= 3
    assert set(models) <= set(known_classes())


# The stream


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_each_block_reads_what_the_block_below_wrote(family, variant):
    model = tiny(family, variant=variant)
    ends = ["block_input", "block_output"]
    top = [("final_norm_input", 0)] if map_of(model).site("final_norm_input") else []

    seen, _ = read(model, [(name, layer) for name in ends for layer in range(3)] + top)

    for layer in range(2):
        assert torch.equal(seen["block_output", layer], seen["block_input", layer + 1])
    for place in top:
        assert torch.equal(seen["block_output", 2], seen[place])


@pytest.mark.parametrize(("family", "variant"), PRE_NORM_CASES)
def test_a_block_adds_the_contributions_of_attention_and_mlp_to_its_input(family, variant):
    _, before, attention, mlp, after = reader(
        family, variant, "block_input", "attention_contribution", "mlp_contribution", "block_output"
    )
    assert_close(after, before + attention + mlp, atol=1e-5, rtol=1e-5)
    assert (after - before - attention).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "variant", "norms"),
    [
        ("bert", None, ("attention.output.LayerNorm", "output.LayerNorm")),
        ("opt", "post_norm", ("self_attn_layer_norm", "final_layer_norm")),
    ],
)
def test_a_post_norm_block_normalises_after_each_addition(family, variant, norms):
    names = ("block_input", "attention_contribution", "block_mid", "mlp_contribution", "block_output")
    model, before, attention, mid, mlp, after = reader(family, variant, *names)
    first, second = (block_of(model).get_submodule(norm) for norm in norms)

    assert_close(mid, first(before + attention))
    assert_close(after, second(mid + mlp))


def test_blooms_other_residuals_start_after_the_norms():
    names = (
        "attention_input",
        "attention_contribution",
        "block_mid",
        "mlp_input",
        "mlp_output",
        "block_output",
    )
    model, read_by, attention, mid, mlp_input, mlp, after = reader("bloom", "post_norm", *names)
    assert_close(mid, block_of(model).post_attention_layernorm(read_by + attention))
    assert_close(mid, mlp_input)
    assert_close(after, mid + mlp)


SECOND_NORM = {
    "gpt2": "ln_2",
    "gpt_neo": "ln_2",
    "gpt_neox": "post_attention_layernorm",
    "opt": "final_layer_norm",
    "bloom": "post_attention_layernorm",
    "falcon": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
}
FIRST_NORM = {
    "gpt2": "ln_1",
    "gpt_neo": "ln_1",
    "gptj": "ln_1",
    "opt": "self_attn_layer_norm",
    ("falcon", "grouped"): "ln_attn",
}
WITHOUT_PRE_NORM = [*((case) for case in CASES if case[0] == "olmo2"), *POST_NORM[:2]]


def middle(model, seen, layer=LAYER):
    """`block_mid` as its site says to read it."""
    _, site = module_of(model, "block_mid")
    value = seen["block_mid", layer]
    return value + seen[site.plus, layer] if site.plus else value


SEQUENTIAL_CASES = [
    case
    for case in LANGUAGE_CASES
    if case[0] != "gptj"
    and case not in [("gpt_neox", None), *(("falcon", v) for v in (None, "grouped", "one_norm"))]
]


def test_exactly_the_sequential_blocks_have_a_middle():
    with_middle = [
        case for case in LANGUAGE_CASES if map_of(tiny(case[0], variant=case[1])).site("block_mid")
    ]
    assert with_middle == SEQUENTIAL_CASES


@pytest.mark.parametrize(("family", "variant"), SEQUENTIAL_CASES)
def test_the_middle_of_a_block_is_what_its_mlp_reads(family, variant):
    model = tiny(family, variant=variant)
    seen, _ = read(model, [(name, LAYER) for name in ("block_input", "block_mid", "mlp_input")])
    mid, read_by_mlp = middle(model, seen), unflattened(seen["mlp_input", LAYER])

    if (family, variant) in WITHOUT_PRE_NORM or (family, variant) == ("bloom", "post_norm"):
        assert_close(read_by_mlp, mid)
    else:
        norm = block_of(model).get_submodule(SECOND_NORM.get(family, "post_attention_layernorm"))
        assert_close(read_by_mlp, norm(mid))


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_attention_reads_the_normed_input_of_the_block(family, variant):
    model, before, read_by_attention = reader(family, variant, "block_input", "attention_input")
    if (family, variant) in WITHOUT_PRE_NORM:
        assert torch.equal(read_by_attention, before)
    else:
        name = FIRST_NORM.get((family, variant)) or FIRST_NORM.get(family, "input_layernorm")
        assert_close(read_by_attention, block_of(model).get_submodule(name)(before))


@pytest.mark.parametrize(("family", "variant"), SEQUENTIAL_CASES)
def test_replacing_the_middle_everywhere_gives_the_sources_logits(family, variant):
    model = tiny(family, variant=variant)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    places = [("block_mid", LAYER), ("block_input", LAYER)]
    of_base, _ = read(model, places, **base)
    of_source, expected = read(model, places, **source)
    module, site = module_of(model, "block_mid")
    change = middle(model, of_source) - middle(model, of_base)

    def write(module, args, output):
        moved = output + change if isinstance(output, torch.Tensor) else (output[0] + change, *output[1:])
        return moved if site.plus else replaced(output, middle(model, of_source))

    handle = module.register_forward_hook(write)
    with torch.no_grad():
        edited = model(**base)
    handle.remove()

    assert_close(edited.logits, expected.logits, atol=1e-4, rtol=1e-4)


def replaced(output, value):
    return value if isinstance(output, torch.Tensor) else (value, *output[1:])


# What may be read of later positions


@pytest.mark.parametrize("switched_off", [False, True])
@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_a_map_says_whether_positions_read_later_ones(family, variant, switched_off):
    model = tiny(family, variant=variant, head="base")
    if switched_off:
        model.config.is_causal = False
    inputs = tiny_inputs(model)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 74 - changed["input_ids"][:, -1]
    with torch.no_grad():
        before, after = (model(**given).last_hidden_state for given in (inputs, changed))

    assert not torch.equal(before[:, -1], after[:, -1])
    assert torch.equal(before[:, :-1], after[:, :-1]) == map_of(model).causal_at("block_output")


# Attention


def output_projection(model):
    """`[in, out]` weight and bias of the projection that a map says the heads go into."""
    module, _ = module_of(model, "attention_value_output")
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    return weight.detach(), module.bias


def by_heads(model, component, value):
    """`[b, heads, s, head width]`, cut as the map says."""
    _, site = module_of(model, component)
    columns = columns_of(site, sizes_of(model.config), width=value.shape[-1])
    starts = [columns.first_column(head) for head in range(columns.heads)]
    return torch.stack([value[..., start : start + columns.width] for start in starts], dim=1)


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_what_the_heads_send_through_the_output_projection_sums_to_the_attention_output(family, variant):
    model, heads, output = reader(family, variant, "attention_value_output", "attention_output")
    weight, bias = output_projection(model)
    rows = by_heads(model, "attention_value_output", weight.T[None])[0]  # [head, out, head width]

    each = by_heads(model, "attention_value_output", heads) @ rows.mT
    expected = output if bias is None else output - bias

    assert each.shape == (2, 4, 7, HIDDEN)
    assert_close(each.sum(1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_pattern_times_value_heads_is_what_each_head_sends_on(family, variant):
    model = tiny(family, variant=variant, attention="eager")
    places = [("value_output", LAYER), ("attention_value_output", LAYER)]
    seen, output = read(model, places, **tiny_inputs(model), output_attentions=True)

    pattern = output.attentions[LAYER]
    values = by_heads(model, "value_output", seen[places[0]])
    expected = pattern @ values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)

    assert_close(by_heads(model, "attention_value_output", seen[places[1]]), expected, atol=1e-5, rtol=1e-5)


# OLMo 2 normalises all query heads together, so that each of them depends on all columns.
@pytest.mark.parametrize(("family", "variant"), [case for case in LANGUAGE_CASES if case[0] != "olmo2"])
def test_a_heads_pattern_depends_on_the_columns_of_its_query_and_of_its_key_alone(family, variant):
    model = tiny(family, variant=variant, attention="eager")
    places = [("query_output", LAYER), ("key_output", LAYER)]
    seen, output = read(model, places, grad=True, **tiny_inputs(model), output_attentions=True)
    pattern = output.attentions[LAYER]
    fused = seen[places[0]] is seen[places[1]]
    sizes, last = sizes_of(model.config), 6

    for head in range(4):
        queries, keys = (columns_of(module_of(model, name)[1], sizes) for name, _ in places)
        query = columns(queries, head)
        key = columns(keys, head * keys.heads // 4)
        # Weighted, because a row of a pattern sums to one whatever it depends on.
        score = (pattern[0, head, last] * torch.arange(7)).sum()
        to_query, to_key = torch.autograd.grad(score, [seen[place] for place in places], retain_graph=True)

        below = to_key[0, :last].abs().sum(0).nonzero().flatten().tolist()
        here = to_query[0, last].nonzero().flatten().tolist()
        assert below == key
        assert here == (sorted(query + key) if fused else query)


def columns(heads, head):
    start = heads.first_column(head)
    return list(range(start, start + heads.width))


# The MLP

UP = {
    "gpt2": "mlp.c_fc",
    "gpt_neo": "mlp.c_fc",
    "gptj": "mlp.fc_in",
    "gpt_neox": "mlp.dense_h_to_4h",
    "opt": "fc1",
    "bloom": "mlp.dense_h_to_4h",
    "falcon": "mlp.dense_h_to_4h",
    "bert": "intermediate.dense",
}
DOWN = {
    "gpt2": "mlp.c_proj",
    "gpt_neo": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "bloom": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "bert": "output.dense",
}
DENSE_CASES = [case for case in LANGUAGE_CASES if case[0] not in ("mixtral", "gpt_oss")]
EXPERT_CASES = [case for case in LANGUAGE_CASES if case[0] in ("mixtral", "gpt_oss")]


@pytest.mark.parametrize(("family", "variant"), DENSE_CASES)
def test_the_inside_of_an_mlp_follows_its_formula(family, variant):
    names = ("mlp_input", "mlp_pre_activation", "mlp_activation", "mlp_hidden", "mlp_output")
    model, given, pre, activation, hidden, output = reader(family, variant, *names)
    block = block_of(model)

    if family in UP:
        gate, up = block.get_submodule(UP[family])(given), 1.0
    elif family == "phi3":
        gate, up = block.mlp.gate_up_proj(given).chunk(2, dim=-1)
    else:
        gate, up = block.mlp.gate_proj(given), block.mlp.up_proj(given)

    assert_close(pre, gate)
    assert not torch.allclose(activation, pre)
    assert_close(hidden, activation * up)
    assert_close(output, block.get_submodule(DOWN.get(family, "mlp.down_proj"))(hidden))


@pytest.mark.parametrize(("family", "variant"), EXPERT_CASES)
def test_a_mixture_routes_what_its_mlp_reads_and_returns_what_its_experts_give(family, variant):
    names = ("mlp_input", "router_input", "router_output", "expert_input", "expert_output", "mlp_output")
    model, given, routed, scores, entering, leaving, output = reader(family, variant, *names)
    router = block_of(model).mlp.router if family == "gpt_oss" else block_of(model).mlp.gate

    assert torch.equal(routed, given)
    assert torch.equal(entering, given)
    assert torch.equal(leaving, output)
    assert scores.shape == (2, 7, 3)
    assert_close(scores, given @ router.weight.T + getattr(router, "bias", 0.0))


# The ends


@pytest.mark.parametrize(("family", "variant"), [*LANGUAGE_CASES, (MULTIMODAL, None)])
def test_embedding_and_final_norm_are_the_models_own(family, variant):
    model = tiny(family, variant=variant, head="base")
    inputs = tiny_inputs(model)
    norm = [("final_norm_output", 0)] if map_of(model).site("final_norm_output") else []
    seen, output = read(model, [("embedding_output", 0), *norm], **inputs)

    scale = HIDDEN**0.5 if family.startswith("gemma") else 1.0
    table = model.get_input_embeddings().weight.detach()
    assert_close(seen["embedding_output", 0], table[inputs["input_ids"]] * scale)
    for place in norm:
        assert torch.equal(seen[place], output.last_hidden_state)


@pytest.mark.parametrize(("family", "variant"), [*LANGUAGE_CASES, (MULTIMODAL, None)])
def test_logits_are_those_the_model_returns_before_a_soft_cap(family, variant):
    model = tiny(family, variant=variant)
    seen, output = read(model, [("logits", 0)])
    logits = seen["logits", 0]

    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    assert torch.equal(output.logits, logits if cap is None else torch.tanh(logits / cap) * cap)
    assert (cap is None) == (family != "gemma2")


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_CASES)
def test_positions_are_derived_from_the_mask_exactly_where_the_map_says_so(family, variant):
    model = tiny(family, variant=variant)
    derived = map_of(model).positions_derived_from_mask
    padded = tiny_inputs(model, padding="left")
    alone = {
        name: value[1:, 1:] for name, value in padded.items()
    }  # the second row has one position of padding
    filled = {"position_ids": (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    with torch.no_grad():
        expected = model(**alone).logits
        moved = model(**alone, position_ids=torch.arange(3, 9)[None]).logits
        plain, told = (model(**padded, **extra).logits[1:, 1:] for extra in ({}, filled))

    assert_close(told, expected, atol=1e-5, rtol=1e-5)
    ignores_padding = torch.allclose(plain, expected, atol=1e-4)
    if torch.allclose(moved, expected, atol=1e-4):
        assert ignores_padding  # positions are relative, and so right without being derived
    else:
        assert ignores_padding == derived


# Models that are no transformers


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_layer_is_its_own_block(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    seen, (output, _) = read(model, [("block_input", 0), ("block_output", 0)], **inputs)

    assert map_of(model).blocks == ""
    assert map_of(model).components() == ("block_input", "block_output")
    assert torch.equal(seen["block_input", 0], inputs["input"])
    assert torch.equal(seen["block_output", 0], output)
    assert inputs["input"].shape == (2, 7, FEATURES)


def test_a_perceptrons_components_are_its_layers_and_their_nonlinearities():
    torch.manual_seed(0)
    model = MLPClassifier(width=6, layers=3, classes=4)
    names = ("block_input", "mlp_pre_activation", "mlp_activation", "block_output", "logits")
    seen, output = read(
        model, [(name, layer) for name in names for layer in (1, 2)], inputs=torch.randn(5, 6)
    )

    assert set(map_of(model).components()) == set(names)
    assert torch.equal(seen["block_output", 1], seen["block_input", 2])
    assert torch.equal(seen["mlp_pre_activation", 1], model.layers[1].linear(seen["block_input", 1]))
    assert torch.equal(seen["mlp_activation", 1], seen["mlp_pre_activation", 1].relu())
    assert torch.equal(seen["mlp_activation", 1], seen["block_output", 1])
    assert torch.equal(seen["logits", 1], output)


def test_all_decoders_have_the_common_components():
    parts = ("query", "key", "value", "attention_value")
    common = {f"{part}_output" for part in parts} | {f"head_{part}_output" for part in parts}
    common |= {
        "block_input",
        "block_output",
        "attention_input",
        "attention_output",
        "mlp_input",
        "mlp_output",
    }
    common |= {"head_attention_output", "embedding_output", "logits"}
    for family in DECODERS:
        assert common <= set(map_of(tiny(family)).components()), family


def test_heads_lie_side_by_side_where_each_begins_behind_the_one_before():
    found = set()
    for heads, stride, per_group, group_stride in product(
        range(1, 7), (0, 1, 2, 3), (1, 2, 3, 8), (0, 2, 4, 6, 9)
    ):
        columns = HeadColumns(heads, 2, 1, stride, per_group, group_stride)
        beside = [columns.first_column(head) for head in range(heads)] == [1 + 2 * h for h in range(heads)]
        assert columns.contiguous == beside, columns
        found.add(beside)
    assert found == {True, False}
