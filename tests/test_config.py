"""What users declare: the forms in which they may, the faults they are told of, and JSON there and back."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.locations import LEVELS
from interventions.registry import callable_named
from model_maps import COMPONENTS
from tiny_models import LAYERS, tiny, tiny_inputs

POSITIONAL = (0, "block_output", "pos", 1)
NO_FORM = (
    "representations are RepresentationConfigs, dicts or positional lists, one or a list of them, not of type"
    " int."
)


def doubled(base):
    return 2 * base


@iv.register_intervention(name="tests/config/add-number")
class AddNumber(iv.Intervention):
    """A class of a user's own, with an argument of its own."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number = number

    def forward(self, base):
        return base + self.number


iv.register_callable("tests/config/doubled", doubled)


# --- forms ------------------------------------------------------------------------------------------------


def test_fields_may_be_given_by_position_as_in_pyvene():
    entry = iv.RepresentationConfig(2, "head_query_output", "h.pos", 3, group_key=0)

    assert (entry.layer, entry.component, entry.unit) == (2, "head_query_output", "h.pos")
    assert (entry.max_number_of_units, entry.group_key) == (3, 0)


def test_every_field_may_be_given_by_position_in_the_documented_order():
    values = {
        "layer": 1,
        "component": "mlp_output",
        "unit": "pos",
        "max_number_of_units": 2,
        "low_rank_dimension": 3,
        "intervention_type": iv.LowRankRotatedSpaceIntervention,
        "intervention": None,
        "subspace_partition": [[0, 1], [1, 3]],
        "group_key": "g",
        "intervention_link_key": 7,
        "moe_key": 4,
        "source_representation": torch.arange(4.0),
        "latent_dim": 5,
        "name": "mine",
        "where": "last",
        "renormalize": "none",
    }
    assert set(values) == set(iv.RepresentationConfig.model_fields)
    assert iv.RepresentationConfig(*values.values()) == iv.RepresentationConfig(**values)


def test_defaults_are_pyvenes_but_for_the_layer():
    entry = iv.RepresentationConfig()

    assert (entry.component, entry.unit, entry.max_number_of_units) == ("block_output", "pos", 1)
    assert entry.renormalize == "none"
    others = set(iv.RepresentationConfig.model_fields) - {
        "component",
        "unit",
        "max_number_of_units",
        "renormalize",
    }
    assert all(getattr(entry, name) is None for name in others)
    model = iv.IntervenableModel(iv.IntervenableConfig(entry), tiny("gpt2"))
    assert model.names == ("layer_0.block_output.pos",)


@pytest.mark.parametrize(
    "written",
    [
        [iv.RepresentationConfig(*POSITIONAL)],
        iv.RepresentationConfig(*POSITIONAL),
        {"layer": 0, "component": "block_output"},
        [{"layer": 0, "component": "block_output", "unit": "pos"}],
        [0, "block_output", "pos", 1],
        (0, "block_output", "pos", 1),
        [[0, "block_output", "pos", 1]],
        [(0, "block_output")],
        (iv.RepresentationConfig(0),),
    ],
)
def test_one_representation_may_be_written_in_many_forms(written):
    expected = iv.IntervenableConfig(representations=[iv.RepresentationConfig(layer=0)])
    assert iv.IntervenableConfig(written) == expected
    assert iv.IntervenableModel(written, tiny("gpt2")).config == expected


def test_several_forms_mix_in_one_list():
    config = iv.IntervenableConfig([iv.RepresentationConfig(0), {"layer": 1}, [2, "mlp_output"]])
    assert [(entry.layer, entry.component) for entry in config.representations] == [
        (0, "block_output"),
        (1, "block_output"),
        (2, "mlp_output"),
    ]


def test_a_positional_list_may_hold_lists_itself():
    partition = [[0, 1], [1, 3]]
    config = iv.IntervenableConfig([0, "block_output", "pos", 1, None, None, None, partition])
    assert config.representations[0].subspace_partition == partition


def test_a_dict_of_the_configs_fields_is_a_config():
    model = iv.IntervenableModel(
        {"representations": {"layer": 1}, "intervention_types": "ZeroIntervention"}, tiny("gpt2")
    )
    assert isinstance(model.interventions["layer_1.block_output.pos"], iv.ZeroIntervention)


def test_whole_numbers_may_be_numpys():
    assert iv.RepresentationConfig(np.int64(2)).layer == 2
    assert iv.RepresentationConfig(torch.tensor(2)).layer == 2


def test_types_of_representations_win_over_the_default_and_a_list_has_one_each():
    own = iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention)
    plain = iv.RepresentationConfig(1)
    config = iv.IntervenableConfig([own, plain], iv.AdditionIntervention)
    assert [config.type_of(index) for index in range(2)] == [iv.ZeroIntervention, iv.AdditionIntervention]

    # A typed representation may stand before or after an untyped one.
    config = iv.IntervenableConfig([plain, own])
    assert [config.type_of(index) for index in range(2)] == [iv.VanillaIntervention, iv.ZeroIntervention]

    config = iv.IntervenableConfig([plain, own], [iv.ScaleIntervention, None])
    assert [config.type_of(index) for index in range(2)] == [iv.ScaleIntervention, iv.ZeroIntervention]


@pytest.mark.parametrize("function", [doubled, torch.relu, nn.ReLU(), "bound", "partial"])
def test_any_callable_is_an_intervention(function):
    import functools

    chosen = {"bound": AddNumber().forward, "partial": functools.partial(torch.add, other=1.0)}
    function = chosen.get(function, function) if isinstance(function, str) else function
    model = iv.IntervenableModel(iv.RepresentationConfig(0, intervention=function), tiny("gpt2"))
    assert isinstance(model.interventions["layer_0.block_output.pos"], iv.CallableIntervention)


def test_shorter_text_shows_what_was_declared():
    assert (
        repr(iv.RepresentationConfig(3, "mlp_output"))
        == "RepresentationConfig(layer=3, component='mlp_output')"
    )


# --- old names --------------------------------------------------------------------------------------------


def test_old_names_of_a_representation_are_taken_with_a_warning():
    with pytest.warns(iv.RenamedWarning) as warned:
        entry = iv.RepresentationConfig(
            intervenable_layer=1,
            intervenable_representation_type="mlp_output",
            intervenable_unit="pos",
            intervenable_low_rank_dimension=4,
        )
    assert entry == iv.RepresentationConfig(1, "mlp_output", "pos", low_rank_dimension=4)
    assert [str(item.message) for item in warned] == [
        "RepresentationConfig: 'intervenable_layer' is now called 'layer'.",
        "RepresentationConfig: 'intervenable_representation_type' is now called 'component'.",
        "RepresentationConfig: 'intervenable_unit' is now called 'unit'.",
        "RepresentationConfig: 'intervenable_low_rank_dimension' is now called 'low_rank_dimension'.",
    ]
    assert {item.filename for item in warned} == {__file__}


def test_old_names_of_a_config_are_taken_with_a_warning_also_from_a_dict():
    fields = {
        "intervenable_representations": [{"intervenable_layer": 1}],
        "intervenable_interventions_type": iv.ZeroIntervention,
        "intervenable_model_type": "GPT2LMHeadModel",
    }
    with pytest.warns(iv.RenamedWarning) as warned:
        model = iv.IntervenableModel(fields, tiny("gpt2"))
    assert model.config == iv.IntervenableConfig(
        [iv.RepresentationConfig(1)], iv.ZeroIntervention, model_type="GPT2LMHeadModel"
    )
    assert {item.filename for item in warned} == {__file__}
    assert issubclass(iv.RenamedWarning, DeprecationWarning)


def test_the_old_class_name_leads_to_the_new_class():
    with pytest.warns(iv.RenamedWarning, match="^'IntervenableRepresentationConfig' is now called"):
        old = iv.IntervenableRepresentationConfig
    assert old is iv.RepresentationConfig


def test_an_old_and_its_new_name_together_are_refused():
    with pytest.warns(iv.RenamedWarning), pytest.raises(iv.ConfigError) as caught:
        iv.RepresentationConfig(layer=1, intervenable_layer=1)
    assert str(caught.value) == (
        "Both 'intervenable_layer' and its new name 'layer' were given; give one of the two."
    )
    with pytest.warns(iv.RenamedWarning), pytest.raises(iv.ConfigError) as caught:
        iv.RepresentationConfig(1, intervenable_layer=1)
    assert str(caught.value) == "RepresentationConfig was given layer both by position and by name."


def test_use_fast_is_taken_with_a_warning():
    with pytest.warns(iv.IntervenableWarning) as warned:
        config = iv.IntervenableConfig([iv.RepresentationConfig(0)], use_fast=True)
    assert str(warned[0].message) == (
        "IntervenableConfig: 'use_fast' has no effect: every path is fast here, with locations of any shape."
    )
    assert config == iv.IntervenableConfig([iv.RepresentationConfig(0)])


def test_new_names_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iv.IntervenableConfig([{"layer": 0}], iv.ZeroIntervention, "parallel", "GPT2LMHeadModel")


# --- faults -----------------------------------------------------------------------------------------------


def faults_of(make) -> tuple[str, ...]:
    with pytest.raises(iv.ConfigError) as caught:
        make()
    return caught.value.faults


def test_all_faults_of_a_representation_are_reported_at_once():
    with pytest.raises(iv.ConfigError) as caught:
        iv.RepresentationConfig("first", "block_ouput", "positions", 0, layr=1, name="a/b", latent_dim=True)
    assert str(caught.value).startswith(
        "7 faults in the configuration:\n- layer is 'first'; it must be a whole number."
    )
    layer, component, unit, units, latent, name, unknown = caught.value.faults
    assert layer == "layer is 'first'; it must be a whole number."
    assert component.startswith("Unknown component 'block_ouput'. Did you mean 'block_output'?\nAllowed: ")
    assert unit == "Unknown unit 'positions'.\nAllowed: h, h.pos, h.query, h.query.key, pos."
    assert units == "max_number_of_units is 0; it must be 1 or more."
    assert latent == "latent_dim is True; it must be a whole number."
    assert name == "name is 'a/b'; it must be a text, not empty and without '/'."
    assert unknown.startswith("Unknown field 'layr'. Did you mean 'layer'?\nAllowed: component, group_key, ")


def test_faults_of_one_field_do_not_hide_those_between_others():
    assert faults_of(lambda: iv.RepresentationConfig(1, "logits", "h", 0)) == (
        "max_number_of_units is 0; it must be 1 or more.",
        "layer 1 makes no sense: a model has one 'logits'. Leave layer out.",
        "unit 'h' does not fit 'logits', which has no heads: use 'pos'.",
    )


def test_all_faults_of_a_config_are_reported_at_once():
    def make():
        iv.IntervenableConfig(
            [{"layer": 0.5}, iv.RepresentationConfig(1), [2, "mlp_outptu", "pos", -1]],
            mode="paralel",
            intervention_types=[iv.ZeroIntervention, "ZeroInterventio", None],
        )

    faults = faults_of(make)
    assert faults[0] == "representation 0: layer is 0.5; it must be a whole number."
    assert faults[1].startswith(
        "representation 2: Unknown component 'mlp_outptu'. Did you mean 'mlp_output'?"
    )
    assert faults[2] == "representation 2: max_number_of_units is -1; it must be 1 or more."
    assert faults[3].startswith("Unknown intervention 'ZeroInterventio'. Did you mean 'ZeroIntervention'?")
    assert faults[4] == "Unknown mode 'paralel'. Did you mean 'parallel'?\nAllowed: parallel."
    assert len(faults) == 5


def test_faults_between_representations_are_reported_with_those_of_other_fields():
    def make():
        twice = [iv.RepresentationConfig(0, name="a"), iv.RepresentationConfig(1, name="a")]
        iv.IntervenableConfig(twice, mode="x", intervention_constant_sources=[None])

    assert faults_of(make) == (
        "Unknown mode 'x'.\nAllowed: parallel.",
        "intervention_constant_sources has 1 entries for 2 representations: give one for each, None where there is"
        " none.",
        "Names must be unique, and 'a' is given more than once.",
    )


def test_all_faults_found_in_a_model_are_reported_at_once():
    config = iv.IntervenableConfig(
        [
            iv.RepresentationConfig(40),
            iv.RepresentationConfig(0, "router_output"),
            iv.RepresentationConfig(
                0, low_rank_dimension=99, intervention_type="LowRankRotatedSpaceIntervention"
            ),
            iv.RepresentationConfig(
                0, intervention_type="ZeroIntervention", source_representation=torch.ones(16)
            ),
        ]
    )
    faults = faults_of(lambda: iv.IntervenableModel(config, tiny("gpt2")))
    assert faults[0] == (
        f"representation 0: Layer 40 is out of range: GPT2LMHeadModel has layers 0 to {LAYERS - 1}."
    )
    assert faults[1].startswith("representation 1: GPT2LMHeadModel has no 'router_output'")
    assert faults[2] == (
        "representation 2: LowRankRotatedSpaceIntervention: low_rank_dimension=99 is out of range; give a whole"
        " number from 1 to 16 (embed_dim=16)."
    )
    assert faults[3] == (
        "representation 3: ZeroIntervention uses no source, so its source_representation would be ignored."
        " Leave it out."
    )
    assert len(faults) == 4


def test_one_fault_keeps_its_class_and_several_of_a_kind_theirs():
    assert isinstance(iv.ConfigError("x"), ValueError)
    with pytest.raises(iv.UnknownNameError):
        iv.IntervenableConfig([{"component": "block"}])
    with pytest.raises(iv.UnknownNameError):
        iv.RepresentationConfig(component="block", unit="x")
    with pytest.raises(IndexError):
        iv.IntervenableModel([{"layer": 40}, {"layer": 41}], tiny("gpt2"))
    with pytest.raises(iv.UnsupportedModelError):
        iv.IntervenableModel([{"component": "router_output"}, {"component": "router_input"}], tiny("gpt2"))


def test_a_model_without_a_map_is_one_fault_however_many_representations_there_are():
    with pytest.raises(iv.UnsupportedModelError) as caught:
        iv.IntervenableModel([{"layer": 0}, {"layer": 1}], nn.Sequential(nn.Linear(2, 2)))
    assert str(caught.value).startswith("No map describes Sequential, and none could be made.")
    assert str(caught.value).count("No map") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: iv.RepresentationConfig(
                intervention=iv.ZeroIntervention(), intervention_type="ZeroIntervention"
            ),
            "Both an intervention (ZeroIntervention) and an intervention_type (ZeroIntervention) were given; give one"
            " of the two.",
        ),
        (
            lambda: iv.RepresentationConfig(intervention=doubled, low_rank_dimension=2),
            "low_rank_dimension is for an intervention that is to be made of intervention_type, and doubled is made"
            " already: leave it out.",
        ),
        (
            lambda: iv.RepresentationConfig(intervention=iv.ZeroIntervention),
            "The class ZeroIntervention was given where an instance is meant; classes go into `intervention_type`.",
        ),
        (
            lambda: iv.RepresentationConfig(intervention_type=iv.ZeroIntervention()),
            "An instance of ZeroIntervention was given where a class is meant; instances go into `intervention`.",
        ),
        (
            lambda: iv.RepresentationConfig(intervention_type=dict),
            "<class 'dict'> is not an intervention class: give a subclass of Intervention or the name of a"
            " registered one.",
        ),
        (
            lambda: iv.RepresentationConfig(intervention=3),
            "3 is neither an intervention nor a function of (base), (base, source) or (base, source, subspaces).",
        ),
        (
            lambda: iv.IntervenableConfig(
                [{"intervention_type": "ZeroIntervention"}], [iv.VanillaIntervention]
            ),
            "representation 0 says ZeroIntervention and intervention_types says VanillaIntervention: give one of the"
            " two.",
        ),
        (
            lambda: iv.IntervenableConfig([{"intervention": doubled}], [iv.VanillaIntervention]),
            "representation 0 has an intervention of its own and intervention_types says VanillaIntervention: put"
            " None there.",
        ),
        (
            lambda: iv.IntervenableConfig([{"layer": 0}], [None]),
            "representation 0 has no intervention, and intervention_types says None for it.",
        ),
        (
            lambda: iv.IntervenableConfig([{"layer": 0}], None),
            "intervention_types is None: give an intervention class, or leave it out for VanillaIntervention.",
        ),
        (
            lambda: iv.IntervenableConfig([{"layer": 0}], [iv.ZeroIntervention, iv.ZeroIntervention]),
            "intervention_types has 2 entries for 1 representations: give one class for all or one for each.",
        ),
        (
            lambda: iv.IntervenableConfig(
                [{"source_representation": [1.0]}], intervention_constant_sources=[torch.ones(1)]
            ),
            "representation 0 has a source_representation and an entry in intervention_constant_sources: give one of"
            " the two.",
        ),
        (
            lambda: iv.RepresentationConfig(0, layer=0),
            "RepresentationConfig was given layer both by position and by name.",
        ),
        (
            lambda: iv.IntervenableConfig([], None, None, None, None),
            "IntervenableConfig takes at most 4 positional fields (representations, intervention_types, mode,"
            " model_type), not 5.",
        ),
        (
            lambda: iv.RepresentationConfig(subspace_partition=[[3, 1]]),
            "Part [3, 1] is the empty range from 3 up to 1. For the two dimensions themselves write"
            " IndexSet([3, 1]).",
        ),
        (
            lambda: iv.RepresentationConfig(group_key={}),
            "{} cannot be a key: give a text, a number or a tuple of them.",
        ),
        (
            lambda: iv.RepresentationConfig(source_representation="ones"),
            "'ones' is no constant source: give a tensor, nested lists of numbers, or a mapping of dtype, shape and"
            " values.",
        ),
        (
            lambda: iv.RepresentationConfig(0, "h[0].mlp.output"),
            "layer 0 makes no sense with the module path 'h[0].mlp.output', which names its layer itself: leave layer"
            " out.",
        ),
        (
            lambda: iv.IntervenableConfig(5),
            NO_FORM,
        ),
        (
            lambda: iv.IntervenableConfig([iv.RepresentationConfig(0), 5]),
            "representation 1: 5 is no RepresentationConfig, no dict of its fields and no list of them.",
        ),
        (
            lambda: iv.IntervenableConfig([], model_type=3),
            "model_type is 3; it must be a model class or its name.",
        ),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(make, message):
    with pytest.raises(iv.ConfigError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: iv.IntervenableConfig([{"layer": 0}], mode="serial"),
            "mode='serial' is not available yet. Allowed: 'parallel'.",
        ),
        (
            lambda: iv.RepresentationConfig(0, unit="t"),
            "Unit 't' (steps of a recurrent net) is not available yet. Allowed: pos, h, h.pos, h.query, h.query.key.",
        ),
        (
            lambda: iv.IntervenableConfig([{"layer": 0}, {"unit": "t"}]),
            "representation 1: Unit 't' (steps of a recurrent net) is not available yet. Allowed: pos, h, h.pos,"
            " h.query, h.query.key.",
        ),
    ],
)
def test_what_is_known_and_not_there_yet_says_so(make, message):
    with pytest.raises(iv.NotAvailableError) as caught:
        make()
    assert str(caught.value) == message
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("given", [nn.Linear, "Linear"])
def test_the_model_type_is_checked_when_a_model_is_bound(given):
    declared = iv.IntervenableConfig([], model_type=given)
    assert declared.model_type == "Linear"
    iv.IntervenableModel(declared, nn.Linear(2, 2))
    with pytest.raises(iv.ModelMismatchError) as caught:
        iv.IntervenableModel(declared, nn.Tanh())
    assert str(caught.value) == (
        "The configuration is for Linear, and the model is a Tanh. Give a model of that class, or leave model_type"
        " out."
    )


def test_a_model_type_may_be_a_base_of_the_models_class():
    from transformers import GPT2LMHeadModel, PreTrainedModel

    for declared in (GPT2LMHeadModel, PreTrainedModel, "GPT2LMHeadModel"):
        iv.IntervenableModel(iv.IntervenableConfig([{"layer": 0}], model_type=declared), tiny("gpt2"))


# --- add_intervention -------------------------------------------------------------------------------------


def test_add_intervention_appends_in_place_in_any_form():
    config = iv.IntervenableConfig([{"layer": 0}], iv.ZeroIntervention)
    config.add_intervention({"layer": 1})
    config.add_intervention([iv.RepresentationConfig(2, intervention=doubled), [0, "mlp_output"]])
    config.add_intervention((1, "mlp_output"))

    assert [(entry.layer, entry.component) for entry in config.representations] == [
        (0, "block_output"),
        (1, "block_output"),
        (2, "block_output"),
        (0, "mlp_output"),
        (1, "mlp_output"),
    ]
    assert [config.type_of(index) for index in range(5)] == [
        iv.ZeroIntervention,
        iv.ZeroIntervention,
        None,
        iv.ZeroIntervention,
        iv.ZeroIntervention,
    ]


def test_add_intervention_extends_lists_that_have_one_entry_each():
    config = iv.IntervenableConfig(
        [{"layer": 0}], [iv.AdditionIntervention], intervention_constant_sources=[torch.ones(16)]
    )
    config.add_intervention([{"layer": 1}, {"layer": 2, "intervention_type": iv.ZeroIntervention}])
    assert [config.type_of(index) for index in range(3)] == [
        iv.AdditionIntervention,
        iv.VanillaIntervention,
        iv.ZeroIntervention,
    ]
    assert_close(config.constant_of(0), torch.ones(16))
    assert config.constant_of(1) is None
    assert config.constant_of(2) is None


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([{"layer": 1}, {"layer": "x"}], "representation 2: layer is 'x'; it must be a whole number."),
        ([{"layer": 1, "name": "first"}], "Names must be unique, and 'first' is given more than once."),
        (
            5,
            NO_FORM,
        ),
    ],
)
@pytest.mark.parametrize("types", [iv.ZeroIntervention, [iv.ZeroIntervention]])
def test_add_intervention_that_fails_changes_nothing(added, message, types):
    config = iv.IntervenableConfig([{"layer": 0, "name": "first"}], types)
    before = copy.deepcopy(config)
    with pytest.raises(iv.ConfigError) as caught:
        config.add_intervention(added)
    assert str(caught.value) == message
    assert config == before


# --- values, not shared state -----------------------------------------------------------------------------


def test_a_representation_is_frozen():
    entry = iv.RepresentationConfig(0)
    with pytest.raises(ValidationError, match="frozen"):
        entry.layer = 1
    assert entry.layer == 0


def test_defaults_are_not_shared_between_configs():
    first, second = iv.IntervenableConfig(), iv.IntervenableConfig()
    first.add_intervention({"layer": 0})
    first.representations.append(iv.RepresentationConfig(1))
    assert second.representations == []
    assert iv.IntervenableConfig().representations == []


def test_the_users_own_lists_stay_as_they_are():
    representations, types = [{"layer": 0}], [iv.ZeroIntervention]
    partition = [[0, 1], [1, 3]]
    config = iv.IntervenableConfig(representations, types)
    config.add_intervention({"layer": 1, "subspace_partition": partition})
    assert representations == [{"layer": 0}]
    assert types == [iv.ZeroIntervention]
    assert partition == [[0, 1], [1, 3]]


def test_the_config_is_read_once():
    language_model = tiny("gpt2")
    base = tiny_inputs(language_model)
    constant = torch.ones(16)
    config = iv.IntervenableConfig([iv.RepresentationConfig(0, source_representation=constant)])
    model = iv.IntervenableModel(config, language_model)
    expected = model(base, unit_locations={"base": 1}).intervened.logits

    config.add_intervention({"layer": 1, "intervention_type": iv.ZeroIntervention})
    config.representations.append(iv.RepresentationConfig(2))
    config.intervention_types = iv.ZeroIntervention
    constant.zero_()

    assert_close(model(base, unit_locations={"base": 1}).intervened.logits, expected, rtol=0, atol=0)
    assert model.names == ("layer_0.block_output.pos",)
    assert len(model.config.representations) == 1


def test_what_was_assigned_to_a_config_is_checked_when_it_is_bound():
    config = iv.IntervenableConfig([{"layer": 0}])
    config.intervention_types = iv.ZeroIntervention()
    with pytest.raises(
        iv.ConfigError, match=r"^An instance of ZeroIntervention was given where a class is meant"
    ):
        iv.IntervenableModel(config, tiny("gpt2"))


def test_one_config_serves_several_models_and_shares_nothing_between_them():
    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(0, low_rank_dimension=2)], iv.LowRankRotatedSpaceIntervention
    )
    one, other = (iv.IntervenableModel(config, tiny(family)) for family in ("gpt2", "llama"))
    name = "layer_0.block_output.pos"
    assert one.interventions[name] is not other.interventions[name]


def test_constant_sources_of_the_config_are_used_as_those_of_the_representations():
    language_model = tiny("gpt2")
    base = tiny_inputs(language_model)
    constants = [torch.full((16,), 0.5), None]
    entries = [iv.RepresentationConfig(0), iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)]
    listed = iv.IntervenableConfig(entries, intervention_constant_sources=constants)
    own = iv.IntervenableConfig([iv.RepresentationConfig(0, source_representation=constants[0]), entries[1]])

    results = [
        iv.IntervenableModel(config, language_model)(base, unit_locations={"base": 1}).intervened.logits
        for config in (listed, own)
    ]
    assert_close(results[0], results[1], rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(results[0], language_model(**base).logits)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_configs_can_be_copied_and_pickled(copied):
    config = iv.IntervenableConfig(
        [
            iv.RepresentationConfig(
                0, source_representation=torch.ones(3), intervention_type=iv.ZeroIntervention
            )
        ]
    )
    assert copied(config) == config
    assert copied(config.representations[0]) == config.representations[0]


def test_equal_representations_hash_alike_and_others_are_unequal():
    fields = {
        "subspace_partition": [[0, 1], [1, 3]],
        "source_representation": torch.tensor([float("nan"), 1.0]),
    }
    one, same = (iv.RepresentationConfig(0, **copy.deepcopy(fields)) for _ in range(2))
    assert one == same
    assert len({one, same}) == 1
    others = [
        iv.RepresentationConfig(1, **fields),
        iv.RepresentationConfig(0, **{**fields, "subspace_partition": [[0, 1], [1, 4]]}),
        iv.RepresentationConfig(0, **{**fields, "source_representation": torch.tensor([float("nan"), 2.0])}),
        iv.RepresentationConfig(
            0, **{**fields, "source_representation": fields["source_representation"].half()}
        ),
        iv.RepresentationConfig(0, subspace_partition=[[0, 1], [1, 3]]),
        "a text",
    ]
    assert all(one != other for other in others)


def test_interventions_are_equal_if_they_do_the_same():
    def config(intervention):
        return iv.RepresentationConfig(0, intervention=intervention)

    assert config(iv.ScaleIntervention(2.0)) == config(iv.ScaleIntervention(2.0))
    assert config(iv.ScaleIntervention(2.0)) != config(iv.ScaleIntervention(3.0))
    assert config(iv.ScaleIntervention(2.0)) != config(iv.ZeroIntervention())
    rotation = iv.RotatedSpaceIntervention(4)
    assert config(rotation) == config(rotation)
    assert config(rotation) != config(iv.RotatedSpaceIntervention(4))


# --- JSON -------------------------------------------------------------------------------------------------


def there_and_back(declared):
    text = declared.model_dump_json()
    return type(declared).model_validate_json(text)


EVERY_FIELD = iv.IntervenableConfig(
    [
        iv.RepresentationConfig(
            1,
            "mlp_output",
            "pos",
            2,
            low_rank_dimension=3,
            intervention_type=iv.LowRankRotatedSpaceIntervention,
            subspace_partition=[[0, 2], iv.IndexSet([1, 3]), slice(2, 5), range(6, 8), [5, 3, 4]],
            group_key="first",
            intervention_link_key=7,
            moe_key=4,
            source_representation=torch.tensor([[0.1, -1e30], [float("inf"), 3.0]], dtype=torch.bfloat16),
            latent_dim=5,
            name="mine",
        ),
        iv.RepresentationConfig(-1, intervention=doubled, group_key=("a", 1)),
        iv.RepresentationConfig(component="h[0].mlp.output", intervention=AddNumber(2.5)),
        iv.RepresentationConfig(0, intervention=iv.CallableIntervention("tests/config/doubled")),
        iv.RepresentationConfig(0, intervention=iv.NoiseIntervention(0.5, seed=3)),
    ],
    [iv.LowRankRotatedSpaceIntervention, None, None, None, None],
    model_type="GPT2LMHeadModel",
    intervention_constant_sources=[None, None, None, torch.ones(2, dtype=torch.float16), None],
)


def test_every_field_goes_to_json_and_back():
    restored = there_and_back(EVERY_FIELD)
    assert restored == EVERY_FIELD
    entry = restored.representations[0]
    assert entry.intervention_type is iv.LowRankRotatedSpaceIntervention
    assert entry.source_representation.dtype is torch.bfloat16
    assert restored.representations[1].intervention is doubled
    assert restored.representations[1].group_key == ("a", 1)
    assert restored.representations[2].intervention.number == 2.5
    assert restored.representations[4].intervention.seed == 3


def test_json_holds_names_and_numbers():
    document = json.loads(EVERY_FIELD.model_dump_json())
    first, second, third = document["representations"][:3]
    assert document["intervention_types"] == ["LowRankRotatedSpaceIntervention", None, None, None, None]
    assert first["intervention_type"] == "LowRankRotatedSpaceIntervention"
    assert first["subspace_partition"] == [[0, 2], {"index_set": [1, 3]}, [2, 5], [6, 8], [5, 3, 4]]
    assert first["source_representation"]["dtype"] == "bfloat16"
    assert first["source_representation"]["shape"] == [2, 2]
    assert first["source_representation"]["values"][2:] == ["inf", 3.0]
    assert second["intervention"] == {"function": "tests/config/doubled"}
    assert second["group_key"] == ["a", 1]
    assert third["intervention"] == {"type": "tests/config/add-number", "arguments": {"number": 2.5}}


def test_json_keeps_what_a_configuration_does():
    language_model = tiny("gpt2")
    base = tiny_inputs(language_model)
    config = iv.IntervenableConfig(
        [
            iv.RepresentationConfig(0, intervention=doubled),
            iv.RepresentationConfig(1, intervention=AddNumber(0.5)),
            iv.RepresentationConfig(2, "mlp_output", source_representation=torch.linspace(0, 1, 16)),
        ]
    )
    results = [
        iv.IntervenableModel(one, language_model)(base, unit_locations={"base": [1, 3]}).intervened.logits
        for one in (config, there_and_back(config))
    ]
    assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"intervention": lambda base: base},
            'Only registered functions can be saved: register_callable("a/name", function).',
        ),
        (
            {"intervention_type": type("Mine", (iv.Intervention,), {})},
            "Make it known: register_intervention(Mine).",
        ),
        (
            {"intervention": iv.RotatedSpaceIntervention(4)},
            "This RotatedSpaceIntervention holds tensors (rotation.weight), which do not go into JSON: declare it by"
            " `intervention_type`, and keep its weights in a file of their own.",
        ),
        (
            {"group_key": frozenset({1})},
            "The key frozenset({1}) does not go into JSON: use a text, a number or a tuple of them.",
        ),
    ],
)
def test_what_json_cannot_hold_is_refused_when_it_is_written(entry, message):
    for declared in (iv.RepresentationConfig(**entry), iv.IntervenableConfig([entry])):
        with pytest.raises(iv.ConfigError) as caught:
            declared.model_dump_json()
        assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"intervention_types": "Zro"}, "Unknown intervention 'Zro'."),
        (
            {"representations": [{"intervention": {"function": "no/such"}}]},
            "representation 0: Unknown function",
        ),
        (
            {"representations": [{"intervention": {"type": "ScaleIntervention", "arguments": {"fctor": 2}}}]},
            "representation 0: ScaleIntervention cannot be made of {'fctor': 2}: ",
        ),
        (
            {"representations": [{"intervention": {"code": "import os"}}]},
            "representation 0: intervention is {'code': 'import os'}; in JSON it is",
        ),
        (
            {"representations": [{"source_representation": {"dtype": "nn", "values": [], "shape": []}}]},
            "representation 0: {'dtype': 'nn', 'values': [], 'shape': []} is no constant source",
        ),
        ({"representation": []}, "Unknown field 'representation'. Did you mean 'representations'?"),
    ],
)
def test_json_that_says_nothing_sensible_is_refused(document, message):
    with pytest.raises(iv.ConfigError) as caught:
        iv.IntervenableConfig.model_validate_json(json.dumps(document))
    assert str(caught.value).startswith(message)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(iv.ConfigError, match=r"^Invalid JSON: "):
        iv.IntervenableConfig.model_validate_json("{")


def test_the_schema_admits_what_is_dumped_and_refuses_what_is_not():
    schema = iv.IntervenableConfig.model_json_schema()
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    check.validate(json.loads(EVERY_FIELD.model_dump_json()))
    check.validate(json.loads(iv.IntervenableConfig().model_dump_json()))
    check.validate({"representations": [{"component": "model.layers[-1].mlp.output"}]})
    wrong = [
        {"representations": [{"component": "no_such"}]},
        {"representations": [{"unit": "t"}]},
        {"representations": [{"layer": "first"}]},
        {"representations": [{"max_number_of_units": 0}]},
        {"representations": [{"name": "a/b"}]},
        {"representations": [{"layr": 1}]},
        {"representations": 5},
        {"mode": "serial"},
        {"intervention_types": 3},
    ]
    for document in wrong:
        assert not check.is_valid(document), document
        with pytest.raises((iv.ConfigError, iv.NotAvailableError)):
            iv.IntervenableConfig.model_validate_json(json.dumps(document))


def test_the_schema_describes_every_field():
    schema = iv.IntervenableConfig.model_json_schema()
    assert set(schema["properties"]) == set(iv.IntervenableConfig.model_fields)
    assert set(schema["$defs"]["RepresentationConfig"]["properties"]) == set(
        iv.RepresentationConfig.model_fields
    )


# --- properties -------------------------------------------------------------------------------------------

law = settings(deadline=None, max_examples=50)

counts = st.none() | st.integers(1, 10**6)
texts = st.text("abé/ ", max_size=4)
keys = st.none() | texts | st.integers(-(2**53), 2**53) | st.tuples(texts, st.integers(0, 9))
parts = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(10, 20)).map(list),
    st.tuples(st.integers(0, 9), st.integers(10, 20)).map(lambda ends: slice(*ends)),
    st.tuples(st.integers(0, 9), st.integers(10, 20)).map(lambda ends: range(*ends, 3)),
    st.lists(st.integers(0, 30), min_size=2, max_size=2, unique=True).map(iv.IndexSet),
    st.lists(st.integers(0, 30), min_size=3, max_size=6, unique=True),
    st.lists(st.integers(0, 30), min_size=1, max_size=1),
)
partitions = st.none() | st.lists(parts, min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(dtypes)
    size = int(np.prod(shape))
    if dtype.is_floating_point:
        numbers = draw(st.lists(st.floats(width=32), min_size=size, max_size=size))
    else:
        numbers = draw(st.lists(st.integers(-9, 9), min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(shape)


entries_there = st.integers(-9, 9) | st.sampled_from(["last", "first", "all"])
levels_there = entries_there | st.lists(entries_there, min_size=1, max_size=3)


def sides(unit):
    """Locations of one run: positions alone, or what each level of the unit says."""
    if unit == "pos":
        return levels_there
    return st.fixed_dictionaries({}, optional=dict.fromkeys(LEVELS[unit], levels_there))


@st.composite
def representations(draw):
    component = draw(st.sampled_from([*COMPONENTS, "model.layers[3].mlp.output", "transformer.h.0.input"]))
    known = component in COMPONENTS
    in_block = known and COMPONENTS[component].scope == "block"
    units = COMPONENTS[component].units if known else ("pos",)
    unit = draw(st.sampled_from(units))
    one_side = st.none() | sides(unit)
    pattern = known and COMPONENTS[component].word == "attention_pattern"
    what = draw(st.sampled_from([{}, {"intervention_type": "ZeroIntervention"}, {"intervention": doubled}]))
    made_of = (
        {} if "intervention" in what else {"low_rank_dimension": draw(counts), "latent_dim": draw(counts)}
    )
    if made_of:
        made_of["subspace_partition"] = draw(partitions)
    return iv.RepresentationConfig(
        layer=draw(st.none() | st.integers(-50, 50)) if in_block else None,
        component=component,
        unit=unit,
        max_number_of_units=draw(st.integers(1, 99)),
        group_key=draw(keys),
        intervention_link_key=draw(keys),
        source_representation=draw(st.none() | tensors()),
        where=draw(one_side | st.tuples(one_side, one_side)),
        renormalize=draw(st.sampled_from(["none", "rows", "check"])) if pattern else "none",
        **made_of,
        **what,
    )


@law
@given(st.lists(representations(), max_size=4))
def test_any_configuration_goes_to_json_and_back(entries):
    config = iv.IntervenableConfig(entries, iv.AdditionIntervention)
    restored = there_and_back(config)
    assert restored == config
    assert restored.model_dump_json() == config.model_dump_json()
    # What pydantic makes of it in Python is again a config, and the same.
    assert iv.IntervenableConfig.model_validate(config.model_dump()) == config


@law
@given(st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True))
def test_a_partition_means_the_same_after_json(dimensions):
    written = iv.IndexSet(dimensions)
    entry = iv.RepresentationConfig(0, subspace_partition=[written])
    base, source = torch.zeros(12), torch.ones(12)
    for one in (entry, there_and_back(entry)):
        swap = iv.VanillaIntervention(subspace_partition=one.subspace_partition)
        assert swap(base, source, subspaces=0).nonzero().flatten().tolist() == sorted(dimensions)


def test_registered_functions_are_found_by_name():
    assert callable_named("tests/config/doubled") is doubled
