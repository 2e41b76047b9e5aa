"""Finding maps and sites by name, and what the errors say."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
from written_maps import WRITTEN_MAPS

import model_maps
from model_maps import (
    COMPONENTS,
    PREFIXED,
    WORDS,
    AbsentComponentError,
    ModelMap,
    Site,
    UnknownNameError,
    UnmappedModelError,
    Variant,
    component_site,
    find_map,
    is_head_component,
    known_classes,
    lookup,
    register_map,
)


@pytest.fixture
def registry(monkeypatch):
    """A registry whose additions are forgotten after the test."""
    monkeypatch.setattr(lookup, "_MAPS", dict(lookup._MAPS))


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """The maps that were written by hand are known, to have some to look up."""
    monkeypatch.setattr(lookup, "_MAPS", {**lookup._MAPS, **WRITTEN_MAPS})


def test_the_first_known_name_wins():
    assert find_map(["Mine", "GPT2LMHeadModel", "LlamaForCausalLM"]).blocks == "transformer.h"
    assert find_map(iter(["LlamaForCausalLM", "GPT2LMHeadModel"])).blocks == "model.layers"


def test_an_unmapped_class_says_the_ways_out():
    with pytest.raises(UnmappedModelError) as caught:
        find_map(["LlamaForCausalML", "Module", "object"])
    assert str(caught.value) == (
        "No map describes LlamaForCausalML. The nearest class that has one is 'LlamaForCausalLM'.\n"
        "Write a ModelMap and register_map() it (classes with the same layout can share one), or name the"
        " place by its module path, such as 'model.layers[3].mlp.output', instead of a component."
    )


def test_an_unmapped_class_like_no_other_gets_no_hint():
    with pytest.raises(UnmappedModelError, match=r"^No map describes Zz\.\nWrite a ModelMap"):
        find_map(["Zz"])
    with pytest.raises(UnmappedModelError, match=r"^No map describes a model without a class name\."):
        find_map([])


def test_a_misspelt_component_gets_the_nearest_name():
    with pytest.raises(UnknownNameError) as caught:
        component_site(find_map(["GRU"]), "block_ouput")
    assert str(caught.value) == (
        "Unknown component 'block_ouput' in the map of GRU. Did you mean 'block_output'?\n"
        "Allowed: block_input, block_output."
    )


def test_an_absent_component_says_why():
    with pytest.raises(AbsentComponentError) as caught:
        component_site(find_map(["MLPClassifier"]), "mlp_hidden")
    assert str(caught.value) == (
        "MLPClassifier has no 'mlp_hidden': its blocks are a linear map and a nonlinearity, nothing else.\n"
        "It has: block_input, block_output, logits, mlp_activation, mlp_pre_activation."
    )


@pytest.mark.parametrize(
    ("name", "component", "reason"),
    [
        (
            "GPTJForCausalLM",
            "block_mid",
            "it adds attention and MLP in parallel, so there is no stream between them",
        ),
        ("GPT2LMHeadModel", "expert_output", "its MLP is dense: it has no router and no experts"),
        (
            "MixtralForCausalLM",
            "mlp_hidden",
            "the weights of all its experts are fused, so no module hands over the inside of one",
        ),
        ("LlamaModel", "logits", "it is the bare stack of blocks, without a head"),
        (
            "BertModel",
            "final_norm_scale",
            "each of its blocks ends in a norm and none follows the last block",
        ),
    ],
)
def test_the_reason_fits_the_architecture(name, component, reason):
    with pytest.raises(AbsentComponentError) as caught:
        component_site(find_map([name]), component)
    assert str(caught.value).startswith(f"{name} has no {component!r}: {reason}.\nIt has: ")


def test_a_view_by_heads_is_found_where_the_whole_is():
    maps = find_map(["LlamaForCausalLM"])
    assert component_site(maps, "head_key_output") == component_site(maps, "key_output")
    assert component_site(maps, "head_attention_output").path == "self_attn.o_proj"
    assert component_site(maps, "final_norm_scale").path == "model.norm"
    assert component_site(maps, "mlp_contribution") == component_site(maps, "mlp_output")


def test_the_middle_of_a_sequential_block_is_written_through_the_attention():
    site = component_site(find_map(["LlamaForCausalLM"]), "block_mid")
    assert (site.path, site.side, site.plus) == ("self_attn", "output", "block_input")
    sandwich = component_site(find_map(["Gemma2ForCausalLM"]), "block_mid")
    assert (sandwich.path, sandwich.plus) == ("post_attention_layernorm", "block_input")


def test_a_class_cannot_be_described_twice_by_accident(registry):
    other = ModelMap(classes=("LlamaForCausalLM", "New"), blocks="layers", sites={"block_output": Site("")})
    with pytest.raises(ValueError, match="describes") as caught:
        register_map(other)
    assert str(caught.value) == (
        "Another map already describes LlamaForCausalLM.\n"
        "Pass replace=True to put this one in its place, or give the class another name."
    )
    assert "New" not in known_classes()

    register_map(other, replace=True)
    assert find_map(["LlamaForCausalLM"]).blocks == "layers"
    assert "New" in known_classes()
    register_map(other)  # the same map again is no conflict


def test_a_map_refuses_names_that_are_no_components():
    with pytest.raises(ValueError, match="which is no component") as caught:
        ModelMap(classes=("A", "B"), blocks="h", sites={"mlp_ouput": Site("mlp")})
    first, second = str(caught.value).splitlines()
    assert first == "The map of A, B names 'mlp_ouput', which is no component. Did you mean 'mlp_output'?"
    assert second == f"Allowed: {', '.join(sorted(WORDS))}. {PREFIXED}"


@pytest.mark.parametrize("classes", [(), "TinyGPT"])
def test_a_map_says_which_classes_it_describes(classes):
    with pytest.raises(ValueError, match=r"it must name the classes that the map describes"):
        ModelMap(classes=classes, blocks="h", sites={"mlp_output": Site("mlp")})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": "inptu"}, "side of the Site at 'mlp' is 'inptu'.\nAllowed: 'input', 'output'."),
        ({"heads": "keys"}, "heads of the Site at 'mlp' is 'keys'.\nAllowed: 'query', 'key_value', None."),
        ({"path": 3}, "path of a Site is 3; it must be a module path, or '' for the module itself."),
    ],
    ids=["side", "heads", "path"],
)
def test_a_site_refuses_what_its_fields_cannot_say(fields, message):
    with pytest.raises(ValueError, match="Site") as caught:
        Site(**{"path": "mlp", **fields})
    assert str(caught.value) == message


def test_only_a_map_can_be_registered():
    with pytest.raises(TypeError, match=r"takes a ModelMap, not a str\. That of a model is iv\.model_map"):
        register_map("TinyGPT")


def test_a_list_of_components_has_each_word_once_with_its_prefixes():
    stacks = {"encoder": "encoder.layers", "decoder": "decoder.layers"}
    sites = {f"{stack}_{word}": Site(word) for stack in stacks for word in ("mlp_output", "attention_output")}
    two = ModelMap(("Two",), None, {**sites, "logits": Site("head")}, stacks=stacks)
    with pytest.raises(UnknownNameError) as caught:
        component_site(two, "decodr_mlp_output")
    first, listed = str(caught.value).splitlines()
    assert (
        first == "Unknown component 'decodr_mlp_output' in the map of Two. Did you mean 'decoder_mlp_output'?"
    )
    assert listed.startswith("Allowed: logits; with encoder_ or decoder_ before it: ")
    words = listed.removesuffix(".").split(": ")[-1].split(", ")
    assert {f"{stack}_{word}" for stack in stacks for word in words} | {"logits"} == set(two.components())


def test_variants_apply_in_order_and_only_where_the_config_calls_for_them():
    plain = ModelMap(
        classes=("A",),
        blocks="h",
        sites={"block_output": Site(""), "mlp_output": Site("mlp")},
        absent={"block_mid": "no"},
        sequential=False,
        variants=(
            Variant("post_norm", True, sites={"block_mid": Site("norm")}, sequential=True),
            Variant("bare", True, absent={"mlp_output": "none", "block_mid": "again"}, sequential=False),
        ),
    )
    assert plain.for_config(None).site("block_mid") is None
    assert plain.for_config(SimpleNamespace(post_norm=False)).reason("block_mid") == "no"

    post = plain.for_config(SimpleNamespace(post_norm=True))
    assert post.site("block_mid") == Site("norm")
    assert post.sequential
    assert "block_mid" not in post.absent

    both = plain.for_config(SimpleNamespace(post_norm=True, bare=True))
    assert both.components() == ("block_output",)
    assert both.reason("block_mid") == "again"
    assert both.reason("mlp_contribution") == "none"
    assert not both.sequential


def test_a_map_can_be_copied_and_pickled_and_is_read_only():
    for name in ("OPTForCausalLM", "GRU"):
        original = find_map([name])
        assert copy.deepcopy(original) == original
        assert pickle.loads(pickle.dumps(original)) == original
    with pytest.raises(TypeError):
        original.sites["block_output"] = Site("elsewhere")


@pytest.mark.parametrize("name", sorted(WRITTEN_MAPS))
def test_every_component_is_either_placed_or_explained(name):
    plain = find_map([name])
    fields = {variant.field: variant.value for variant in lookup._MAPS[name].variants}
    for described in (plain, *(find_map([name], SimpleNamespace(**{k: v})) for k, v in fields.items())):
        for component in COMPONENTS:
            placed, why = described.site(component), described.reason(component)
            assert (placed is None) == bool(why), component
            assert why != "its map does not place it", component
            assert not why.endswith(".")


def test_only_components_with_a_head_axis_have_head_units():
    assert {name for name in WORDS if is_head_component(name)} == {
        "head_query_output",
        "head_key_output",
        "head_value_output",
        "head_attention_value_output",
        "head_attention_output",
        "rotary_query",
        "rotary_key",
        "expanded_head_key",
        "expanded_head_value",
    }


def test_exported_names_are_sorted_and_exist():
    assert model_maps.__all__ == sorted(model_maps.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(model_maps, name) for name in model_maps.__all__)
