"""Where pyvene is right we are equal to it: the same weights and the same calls give the same results.

Every call is made in both libraries, each on a copy of the model of its own, because pyvene freezes the model
it wraps and takes off every hook on it. The differences that are meant are on the migration page and tested
in `test_migration_page.py`.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import FEATURES, tiny, tiny_inputs

# What pyvene and its dependencies warn of is theirs (2026-11).
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-5
LAYER = 1
FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "gemma", "gemma2", "olmo2")
NOT_IN_THE_WHEEL = {"olmo2": "llama"}
"""Families that pyvene's repository maps and its published 0.1.8 does not, with the family whose table it copies."""

STREAM = (
    "block_input",
    "block_output",
    "attention_input",
    "attention_output",
    "attention_value_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
)
PROJECTIONS = ("query_output", "key_output", "value_output")
HEADS = ("head_attention_value_output",)
HEAD_PROJECTIONS = ("head_query_output", "head_key_output", "head_value_output")
COMPONENTS = {
    family: STREAM + HEADS + (() if family == "gpt_neox" else PROJECTIONS + HEAD_PROJECTIONS)
    for family in FAMILIES
}
CELLS = [(family, component) for family in FAMILIES for component in COMPONENTS[family]]

NO_SUCH_PATH = "its table names paths that GPT-Neo does not have"
NOT_REACHED = {
    **{
        ("gpt_neo", component): NO_SUCH_PATH
        for component in ("attention_value_output", *HEADS, *PROJECTIONS, *HEAD_PROJECTIONS)
    },
    ("gemma", "head_value_output"): "its table reads a size `hhead_dim`",
}
"""Components that pyvene's tables list and that raise an AttributeError in pyvene itself."""

WRITTEN_TWICE = {("olmo2", "attention_input"), ("olmo2", "mlp_input")}
"""Here the stream itself goes into the module, without a norm, so that pyvene's edits in place change both."""


@pytest.fixture(scope="module")
def pv() -> Any:
    """The peer. `make peers` sets PEERS, so that there it has to be there."""
    try:
        import pyvene
    except ImportError as error:
        if os.environ.get("PEERS") == "required":
            raise
        pytest.skip(f"pyvene cannot be imported ({error}); `make peers` installs it")
    return pyvene


# --- the same call in both --------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one library made of a call."""

    logits: Tensor
    plain: Tensor
    collected: list[Tensor]


def same_sizes(family: str) -> nn.Module:
    """A tiny model whose heads together are as wide as its stream, as pyvene's table of sizes assumes."""
    model = tiny(family)
    config = copy.deepcopy(model.config)
    if family.startswith("gpt"):
        return model
    config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(model)(config)
        for parameter in made.parameters():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return made.eval()


def known_to(pv: Any, family: str, model: nn.Module) -> nn.Module:
    """Give pyvene the row of its table that its next version has for this family."""
    from pyvene.models import intervenable_modelcard as card

    if family in NOT_IN_THE_WHEEL:
        like = type(tiny(NOT_IN_THE_WHEEL[family]))
        card.type_to_module_mapping[type(model)] = card.type_to_module_mapping[like]
        card.type_to_dimension_mapping[type(model)] = card.type_to_dimension_mapping[like]
    return model


def wrap(library: Any, model: nn.Module, entries: list[dict[str, Any]], kind: str | list[str] | None) -> Any:
    """The same declaration in one of the two libraries."""
    representations = [library.RepresentationConfig(**entry) for entry in entries]
    if kind is None:  # each representation brings its intervention
        config = library.IntervenableConfig(representations)
    else:
        listed = (
            [getattr(library, name) for name in kind] if isinstance(kind, list) else getattr(library, kind)
        )
        config = library.IntervenableConfig(representations, listed)
    return library.IntervenableModel(config, copy.deepcopy(model))


def call(model: Any, base: Any, sources: Any = None, unit_locations: Any = None, **options: Any) -> Outcome:
    """One call; pyvene lengthens a list of sources that it is given, so each call has its own."""
    listed = list(sources) if isinstance(sources, list) else sources
    output = model(
        dict(base),
        listed,
        copy.deepcopy(unit_locations),
        output_original_output=True,
        return_dict=True,
        **options,
    )
    collected = output.collected_activations or []
    return Outcome(output.intervened_outputs.logits, output.original_outputs.logits, list(collected))


def assert_equal(ours: Outcome, theirs: Outcome, *, changes: bool = True) -> None:
    """Equal, and not for the reason that nothing happened."""
    assert_close(ours.plain, theirs.plain, rtol=0, atol=TOLERANCE)
    assert_close(ours.logits, theirs.logits, rtol=0, atol=TOLERANCE)
    assert len(ours.collected) == len(theirs.collected)
    for mine, other in zip(ours.collected, theirs.collected, strict=True):
        assert_close(mine, other, rtol=0, atol=TOLERANCE)
    assert bool((ours.logits - ours.plain).abs().max() > 100 * TOLERANCE) == changes


def both(
    pv: Any,
    model: nn.Module,
    entries: list[dict[str, Any]],
    kind: str | list[str] | None,
    base: Any,
    sources: Any = None,
    unit_locations: Any = None,
    **options: Any,
) -> tuple[Outcome, Outcome]:
    """The outcome of one declaration and one call in both libraries, ours first."""
    return tuple(
        call(wrap(library, model, entries, kind), base, sources, unit_locations, **options)
        for library in (iv, pv)
    )  # type: ignore[return-value]


def prompts(model: nn.Module, lengths: tuple[int, ...] = (7, 7), batch: int = 2) -> list[dict[str, Tensor]]:
    """Prompts of these lengths, the base first."""
    return [tiny_inputs(model, batch=batch, length=length, seed=seed) for seed, length in enumerate(lengths)]


def at(component: str = "block_output", units: int = 1, **fields: Any) -> dict[str, Any]:
    return {"layer": LAYER, "component": component, "unit": "pos", "max_number_of_units": units, **fields}


# --- every component of every family ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_pyvene_can_reach_in_a_family_is_compared(pv, family):
    from pyvene.models.intervenable_modelcard import type_to_module_mapping

    model = known_to(pv, family, tiny(family))
    # The pattern is no component of pyvene's that runs: transformers 5 never calls the module it hooks.
    theirs = set(type_to_module_mapping[type(model)]) - {"attention_weight"}
    assert theirs == set(COMPONENTS[family])


def units_of(component: str) -> dict[str, tuple[Any, Any]]:
    """Unit -> source and base locations of two examples, which differ from each other and between the two."""
    positions = ([[[0, 5], [3, 1]]], [[[2, 6], [4, 3]]])
    if not component.startswith("head_"):
        return {"pos": positions}
    heads = ([[[1, 0], [0, 1]]], [[[0, 1], [0, 1]]])
    return {
        "h": heads,
        "h.pos": tuple([[head[0], position[0]]] for head, position in zip(heads, positions, strict=True)),
    }


@pytest.mark.parametrize(
    ("family", "component"), [cell for cell in CELLS if cell not in NOT_REACHED and cell not in WRITTEN_TWICE]
)
def test_a_component_is_written_alike(pv, family, component):
    model = known_to(pv, family, same_sizes(family))
    base, source = prompts(model)
    for unit, locations in units_of(component).items():
        entries = [at(component, units=2, unit=unit)]
        outcomes = both(
            pv, model, entries, "VanillaIntervention", base, [source], {"sources->base": locations}
        )
        assert_equal(*outcomes)


@pytest.mark.parametrize(("family", "component"), [cell for cell in CELLS if cell not in NOT_REACHED])
def test_a_component_is_read_alike(pv, family, component):
    model = known_to(pv, family, same_sizes(family))
    (base,) = prompts(model, (7,))
    for unit, (_, locations) in units_of(component).items():
        entries = [at(component, units=2, unit=unit)]
        ours, theirs = both(pv, model, entries, "CollectIntervention", base, None, {"base": locations})
        assert_equal(ours, theirs, changes=False)
        assert ours.collected[0].abs().max() > 0.01


@pytest.mark.parametrize(("family", "component"), NOT_REACHED)
def test_what_pyvene_lists_and_cannot_reach_runs_here(pv, family, component):
    model = same_sizes(family)
    (base,) = prompts(model, (7,))
    unit, (_, locations) = next(iter(units_of(component).items()))
    entries = [at(component, unit=unit)]
    with pytest.raises(AttributeError):
        wrap(pv, model, entries, "ZeroIntervention")
    ours = call(wrap(iv, model, entries, "ZeroIntervention"), base, None, {"base": locations})
    assert (ours.logits - ours.plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(("family", "component"), sorted(WRITTEN_TWICE))
def test_pyvene_writes_into_the_stream_where_it_is_itself_the_input_and_we_do_not(pv, family, component):
    model = known_to(pv, family, same_sizes(family))
    (base,) = prompts(model, (7,))
    path = {"attention_input": "self_attn", "mlp_input": "mlp"}[component]

    def by_hand(*, in_place: bool) -> Tensor:
        def clear(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            new = given if in_place else given.clone()
            new[:, 3] = 0
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        hooked = model.get_submodule(f"model.layers.{LAYER}.{path}")
        handle = hooked.register_forward_pre_hook(clear, with_kwargs=True)
        with torch.no_grad():
            logits = model(**base).logits
        handle.remove()
        return logits

    ours, theirs = both(pv, model, [at(component)], "ZeroIntervention", base, None, {"base": 3})
    assert_close(ours.logits, by_hand(in_place=False), rtol=0, atol=TOLERANCE)
    assert_close(theirs.logits, by_hand(in_place=True), rtol=0, atol=TOLERANCE)
    assert (ours.logits - theirs.logits).abs().max() > 100 * TOLERANCE


def test_a_module_path_is_reached_alike(pv):
    model = tiny("gpt2")
    base, source = prompts(model)
    entries = [
        {"component": "transformer.h[1].mlp.output"},
        {"component": "transformer.h[2].attn.c_proj.input"},
    ]
    outcomes = []
    for library in (iv, pv):
        representations = [
            library.RepresentationConfig(**entry, intervention=library.VanillaIntervention())
            for entry in entries
        ]
        wrapped = library.IntervenableModel(library.IntervenableConfig(representations), copy.deepcopy(model))
        locations = {"sources->base": ([[[1], [2]]] * 2, [[[3], [4]]] * 2)}
        outcomes.append(call(wrapped, base, [source, source], locations))
    assert_equal(*outcomes)


# --- locations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "locations",
    [
        pytest.param({"sources->base": 4}, id="int"),
        pytest.param({"sources->base": (1, 5)}, id="pair"),
        pytest.param({"sources->base": [0, 2, 5]}, id="three positions"),
        pytest.param({"sources->base": ([[[0, 2]] * 2], [[[1, 6]] * 2])}, id="two positions in full"),
        pytest.param({"sources->base": ([[[0], [6]]], [[[3], [2]]])}, id="of each example"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_locations_mean_the_same(pv, family, locations):
    model = same_sizes(family)
    base, source = prompts(model)
    assert_equal(*both(pv, model, [at()], "VanillaIntervention", base, [source], locations))


@pytest.mark.parametrize("locations", [{"base": 2}, {"base": [0, 2, 5]}, {"base": [[[1], [3]]]}, None])
def test_locations_of_the_base_alone_mean_the_same(pv, locations):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    assert_equal(*both(pv, model, [at()], "ZeroIntervention", base, None, locations))


@pytest.mark.parametrize("length", [4, 11])
def test_a_source_may_be_shorter_or_longer_than_the_base(pv, length):
    model = same_sizes("llama")
    base, source = prompts(model, (7, length))
    locations = {"sources->base": ([[[length - 1], [0]]], [[[6], [3]]])}
    assert_equal(*both(pv, model, [at("mlp_output")], "VanillaIntervention", base, [source], locations))


def test_the_grid_of_heads_and_positions_is_read_in_the_order_in_which_it_is_written(pv):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    entries = [at("head_attention_value_output", units=2, unit="h.pos")]
    locations = {"base": [[[[1, 2], [1, 2]], [[0, 3, 2], [0, 3, 2]]]]}
    ours, theirs = both(pv, model, entries, "CollectIntervention", base, None, locations)
    assert_equal(ours, theirs, changes=False)
    assert ours.collected[0].shape == (2, 2, 3, 4)


def test_several_heads_at_several_positions_are_patched_alike_from_a_longer_source(pv):
    model = same_sizes("llama")
    base, source = prompts(model, (7, 10))
    entries = [
        at("head_value_output", units=2, unit="h.pos"),
        at("head_query_output", units=3, unit="h.pos", layer=2),
    ]
    locations = {
        "sources->base": (
            [[[[0, 1]] * 2, [[8, 9], [2, 7]]], [[[3, 0, 2]] * 2, [[9], [8]]]],
            [[[[1, 0]] * 2, [[5, 6], [0, 4]]], [[[0, 1, 3]] * 2, [[6], [2]]]],
        )
    }
    assert_equal(*both(pv, model, entries, "VanillaIntervention", base, [source, source], locations))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_that_count_padding_are_those_of_pyvene(pv, padding):
    model = same_sizes("llama")
    base, source = (tiny_inputs(model, batch=3, padding=padding, seed=seed) for seed in (0, 1))
    # Filled in by us where a model needs them, and never by pyvene.
    counted = [(row["attention_mask"].cumsum(-1) - 1).clamp(min=0) for row in (base, source)]
    base, source = (
        {**row, "position_ids": positions} for row, positions in zip((base, source), counted, strict=True)
    )
    locations = {"sources->base": ([[[3], [4], [2]]], [[[4], [2], [3]]])}
    ours = wrap(iv, model, [at()], "VanillaIntervention")(
        base, [source], locations, relative_to="tensor"
    ).intervened.logits
    theirs = wrap(pv, model, [at()], "VanillaIntervention")(base, [source], locations)[1].logits
    real = base["attention_mask"].bool()
    assert_close(ours[real], theirs[real], rtol=0, atol=TOLERANCE)
    assert (ours - model(**base).logits)[real].abs().max() > 100 * TOLERANCE


# --- interventions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["VanillaIntervention", "AdditionIntervention", "SubtractionIntervention"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_interventions_of_source_and_base_agree(pv, family, kind):
    model = same_sizes(family)
    base, source = prompts(model)
    locations = {"sources->base": ([[[0, 3], [2, 5]]], [[[1, 4], [6, 0]]])}
    assert_equal(*both(pv, model, [at(units=2)], kind, base, [source], locations))


def test_a_skipped_module_hands_on_what_went_into_it_in_the_source_run(pv):
    model = same_sizes("llama")
    base, source = prompts(model)
    for sources in (source, base):
        locations = {"sources->base": ([[[0, 3], [2, 5]]], [[[0, 3], [2, 5]]])}
        assert_equal(*both(pv, model, [at(units=2)], "SkipIntervention", base, [sources], locations))


def test_the_fixed_noise_is_pyvenes_where_pyvene_has_any(pv):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    locations = {"base": [[[0, 2, 3, 6]] * 2]}
    theirs = call(wrap(pv, model, [at("block_input")], "NoiseIntervention"), base, None, locations)
    noise = iv.NoiseIntervention(seed=1, shape="fixed")
    ours = call(wrap(iv, model, [at("block_input", intervention=noise)], None), base, None, locations)
    assert_equal(ours, theirs)


def trained(pv: Any, model: nn.Module, entry: dict[str, Any], kind: str) -> tuple[Any, Any]:
    """Both libraries' wrapped models with one trainable intervention of the same weights."""
    torch.manual_seed(1)
    mine, other = (wrap(library, model, [entry], kind) for library in (iv, pv))
    (ours,) = mine.interventions.values()
    (theirs,) = other.interventions.values()
    if hasattr(ours, "rotation"):
        ours.rotation.weight.data = theirs.rotate_layer.weight.detach().clone()
    return mine, other


def swapped(pv: Any, wrapped: tuple[Any, Any], inputs: list[Any], locations: Any, **options: Any) -> None:
    base, source = inputs
    with torch.no_grad():
        assert_equal(*(call(model, base, [source], locations, **options) for model in wrapped))


TWO_POSITIONS = {"sources->base": ([[[0, 3], [2, 5]]], [[[1, 4], [6, 0]]])}
ONE_POSITION = {"sources->base": ([[[0], [2]]], [[[1], [4]]])}


@pytest.mark.parametrize("subspaces", [None, [0, 7, 30], [[[0, 4], [9, 31]]], [[[3], [3]]]])
def test_rotated_spaces_agree(pv, subspaces):
    model = tiny("gpt2")
    wrapped = trained(pv, model, at(units=2), "RotatedSpaceIntervention")
    swapped(pv, wrapped, prompts(model), TWO_POSITIONS, subspaces=subspaces)


@pytest.mark.parametrize("subspaces", [None, 1, [0, 2], [[[1, 2], [1, 2]]]])
def test_low_rank_rotated_spaces_agree(pv, subspaces):
    model = same_sizes("llama")
    wrapped = trained(pv, model, at(units=2, low_rank_dimension=3), "LowRankRotatedSpaceIntervention")
    swapped(pv, wrapped, prompts(model), TWO_POSITIONS, subspaces=subspaces)


@pytest.mark.parametrize(
    ("partition", "subspaces"),
    [
        ([[0, 2], [2, 5], [5, 6]], [0, 2]),
        ([[0, 2], [2, 4], [4, 6]], [[[1], [2]]]),
        ([[0, 3, 5], [1, 2, 4]], [[[1], [0]]]),
    ],
)
@pytest.mark.parametrize("kind", ["RotatedSpaceIntervention", "LowRankRotatedSpaceIntervention"])
def test_partitions_of_a_rotated_space_agree(pv, kind, partition, subspaces):
    model = tiny("gpt2")
    rank = {"low_rank_dimension": 6} if kind.startswith("Low") else {}
    wrapped = trained(pv, model, at(**rank, subspace_partition=partition), kind)
    swapped(pv, wrapped, prompts(model), ONE_POSITION, subspaces=subspaces)


@pytest.mark.parametrize(
    ("partition", "subspaces"),
    [
        (None, [1, 3]),
        (None, 5),
        ([[0, 4], [4, 16]], [1]),
        ([[0, 3, 5], [1, 2, 4]], [[[1], [1]]]),
        # Ids that differ are right in pyvene where their numbers do too.
        (None, [[[0], [1, 2]]]),
        ([[0, 4], [4, 10], [10, 16]], [[[2], [0, 1]]]),
    ],
)
@pytest.mark.parametrize("kind", ["VanillaIntervention", "AdditionIntervention", "ZeroIntervention"])
def test_subspaces_of_the_plain_basis_agree(pv, kind, partition, subspaces):
    model = tiny("gpt2")
    base, source = prompts(model)
    sources, locations = ([source], ONE_POSITION)
    if kind == "ZeroIntervention":
        sources, locations = None, {"base": [[[1], [4]]]}
    entries = [at(subspace_partition=partition)]
    assert_equal(*both(pv, model, entries, kind, base, sources, locations, subspaces=subspaces))


def test_collected_subspaces_agree(pv):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    outcomes = both(pv, model, [at()], "CollectIntervention", base, None, {"base": 3}, subspaces=[2, 0, 9])
    assert_equal(*outcomes, changes=False)
    assert outcomes[0].collected[0].shape == (2, 1, 3)


def test_heads_in_a_joint_rotation_agree(pv):
    model = tiny("gpt2")
    entry = at("head_attention_value_output", units=2, unit="h.pos", low_rank_dimension=3)
    wrapped = trained(pv, model, entry, "LowRankRotatedSpaceIntervention")
    locations = {"sources->base": ([[[[1, 2]] * 2, [[0, 5], [3, 3]]]], [[[[2, 0]] * 2, [[4, 6], [1, 2]]]])}
    swapped(pv, wrapped, prompts(model), locations)


def test_sigmoid_masks_and_their_gradients_agree(pv):
    model = tiny("gpt2")
    base, source = prompts(model)
    wrapped = trained(pv, model, at(), "SigmoidMaskIntervention")
    gradients = []
    for library in wrapped:
        (intervention,) = library.interventions.values()
        intervention.mask.data = torch.linspace(-2, 2, 16)
        intervention.set_temperature(torch.tensor(0.7))
        outcome = call(library, base, [source], ONE_POSITION)
        outcome.logits.square().mean().backward()
        gradients.append(intervention.mask.grad)
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=TOLERANCE)
    assert gradients[0].abs().max() > 1e-3
    swapped(pv, wrapped, [base, source], ONE_POSITION)


def test_sigmoid_masks_over_a_rotated_space_agree(pv):
    model = tiny("gpt2")
    wrapped = trained(pv, model, at(units=2), "SigmoidMaskRotatedSpaceIntervention")
    (ours,), (theirs,) = (library.interventions.values() for library in wrapped)
    mask = torch.linspace(-80, 80, 32)
    ours.mask.data, theirs.masks.data = mask, mask.clone()
    swapped(pv, wrapped, prompts(model), TWO_POSITIONS)


@pytest.mark.parametrize("temperature", [50.0, 1.0])
def test_boundless_rotated_spaces_agree_but_for_the_half_in_the_mask(pv, temperature):
    model = tiny("gpt2")
    wrapped = trained(pv, model, at(units=2), "BoundlessRotatedSpaceIntervention")
    (ours,), (theirs,) = (library.interventions.values() for library in wrapped)
    for intervention in (ours, theirs):
        intervention.set_temperature(torch.tensor(temperature))
        intervention.intervention_boundaries.data = torch.tensor([0.3])
    half = torch.arange(32) + 0.5
    theirs.intervention_population = nn.Parameter(half, requires_grad=False)
    swapped(pv, wrapped, prompts(model), TWO_POSITIONS)


@pytest.mark.parametrize("subspaces", [None, [0, 3]])
def test_all_principal_components_agree(pv, subspaces):
    model = tiny("gpt2")
    base, source = prompts(model)

    class Fitted:
        components_ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[
            0
        ].numpy()

    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    mine = iv.PCARotatedSpaceIntervention(torch.tensor(Fitted.components_), mean, std)
    other = pv.PCARotatedSpaceIntervention(
        embed_dim=16, pca=Fitted, pca_mean=mean.numpy(), pca_std=std.numpy()
    )
    outcomes = [
        call(
            wrap(library, model, [at(intervention=one)], None),
            base,
            [source],
            ONE_POSITION,
            subspaces=subspaces,
        )
        for library, one in ((iv, mine), (pv, other))
    ]
    assert_equal(*outcomes)


@pytest.mark.parametrize("subspaces", [None, [0, 3]])
def test_jump_relu_autoencoders_agree_where_there_is_a_latent_for_each_dimension(pv, subspaces):
    model = tiny("gpt2")
    base, source = prompts(model)
    wrapped = trained(pv, model, at(low_rank_dimension=16), "JumpReLUAutoencoderIntervention")
    generator = torch.Generator().manual_seed(0)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        values = None
        for library in wrapped:
            (intervention,) = library.interventions.values()
            tensor = getattr(intervention, name)
            values = torch.randn(tensor.shape, generator=generator).mul(0.3) if values is None else values
            tensor.data.copy_(values)
    swapped(pv, wrapped, [base, source], ONE_POSITION, subspaces=subspaces)


# --- several interventions --------------------------------------------------------------------------------


def test_several_interventions_with_a_source_each_agree(pv):
    model = same_sizes("llama")
    base, *sources = prompts(model, (7, 7, 5, 9))
    entries = [at("block_output", layer=0), at("mlp_output"), at("attention_value_output", layer=2)]
    locations = {
        "sources->base": ([[[1], [2]], [[4], [0]], [[8], [7]]], [[[3], [4]], [[5], [5]], [[6], [1]]])
    }
    assert_equal(*both(pv, model, entries, "VanillaIntervention", base, sources, locations))


def test_one_source_serves_all_interventions_alike(pv):
    model = tiny("gpt2")
    base, source = prompts(model)
    entries = [at(layer=0), at("mlp_output", layer=2)]
    assert_equal(*both(pv, model, entries, "VanillaIntervention", base, [source], {"sources->base": (2, 5)}))


def test_groups_share_a_source_alike(pv):
    model = tiny("gpt2")
    base, *sources = prompts(model, (7, 7, 6))
    entries = [at(layer=0, group_key=0), at("mlp_output", group_key=0), at(layer=2, group_key=1)]
    locations = {
        "sources->base": ([[[1], [2]], [[4], [0]], [[5], [3]]], [[[3], [4]], [[5], [5]], [[6], [1]]])
    }
    assert_equal(*both(pv, model, entries, "VanillaIntervention", base, sources, locations))


@pytest.mark.parametrize("active", [0, 1, 2])
def test_interventions_without_source_and_locations_are_skipped_alike(pv, active):
    model = tiny("gpt2")
    base, source = prompts(model)
    entries = [at(), at(), at()]
    only = [[[3], [3]] if index == active else None for index in range(3)]
    sources = [source if index == active else None for index in range(3)]
    locations = {"sources->base": (only, only)}
    assert_equal(*both(pv, model, entries, "VanillaIntervention", base, sources, locations))


def test_interventions_at_one_place_meet_in_declared_order_alike(pv):
    model = tiny("gpt2")
    base, source = prompts(model)
    entries = [at(), at(), at()]
    kinds = ["VanillaIntervention", "AdditionIntervention", "SubtractionIntervention"]
    locations = {"sources->base": ([[[1], [2]], [[4], [0]], [[5], [3]]], [[[3], [4]]] * 3)}
    for order in (kinds, kinds[::-1]):
        assert_equal(*both(pv, model, entries, order, base, [source], locations))


def test_readings_see_what_was_written_before_them_alike(pv):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    entries = [at(), at(), at(), at("mlp_output", layer=2)]
    kinds = ["CollectIntervention", "ZeroIntervention", "CollectIntervention", "CollectIntervention"]
    locations = {"base": [[[3], [4]]] * 4}
    ours, theirs = both(pv, model, entries, kinds, base, None, locations)
    assert_equal(ours, theirs)
    assert ours.collected[0].abs().max() > 0
    assert ours.collected[1].abs().max() == 0


def test_readings_have_the_same_shapes(pv):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    entries = [at(units=1), at("mlp_output", units=2, layer=0)]
    locations = {"base": [[[0], [0]], [[1, 2], [1, 2]]]}
    ours, theirs = both(pv, model, entries, "CollectIntervention", base, None, locations)
    assert_equal(ours, theirs, changes=False)
    assert [tuple(reading.shape) for reading in ours.collected] == [(2, 1, 16), (2, 2, 16)]


def test_a_whole_stream_is_read_alike(pv):
    model = same_sizes("llama")
    (base,) = prompts(model, (7,))
    # pyvene cuts a reading to the units that it was declared for.
    ours, theirs = both(pv, model, [at(units=7)], "CollectIntervention", base)
    assert_equal(ours, theirs, changes=False)
    assert ours.collected[0].shape == (2, 7, 16)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("linked", [True, False])
def test_two_subspaces_of_one_place_agree_linked_or_not(pv, linked, order):
    model = tiny("gpt2")
    base, *sources = prompts(model, (7, 7, 7))
    link = {"intervention_link_key": 0} if linked else {}
    entry = at(low_rank_dimension=4, subspace_partition=[[0, 2], [2, 4]], **link)
    torch.manual_seed(1)
    mine, other = (
        wrap(library, model, [entry, entry], "LowRankRotatedSpaceIntervention") for library in (iv, pv)
    )
    for ours, theirs in zip(mine.interventions.values(), other.interventions.values(), strict=True):
        ours.rotation.weight.data = theirs.rotate_layer.weight.detach().clone()
    subspaces = [[[part]] * 2 for part in order]
    with torch.no_grad():
        outcomes = [
            call(one, base, sources, {"sources->base": (2, 5)}, subspaces=subspaces) for one in (mine, other)
        ]
    assert_equal(*outcomes)


# --- constant sources and functions -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16)])
@pytest.mark.parametrize("kind", ["VanillaIntervention", "AdditionIntervention"])
def test_declared_constant_sources_agree(pv, kind, shape):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    value = torch.linspace(-1, 1, 16).reshape(shape)
    entries = [at(source_representation=value)]
    assert_equal(*both(pv, model, entries, kind, base, None, {"base": [0, 2, 5]}))


@pytest.mark.parametrize("form", ["tensor", "list", "mapping"])
def test_source_representations_of_a_call_agree(pv, form):
    model = tiny("gpt2")
    (base,) = prompts(model, (7,))
    values = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    entries = [at(layer=0), at(layer=2)]
    outcomes = []
    for library in (iv, pv):
        wrapped = wrap(library, model, entries, "VanillaIntervention")
        names = list(wrapped.interventions)
        given = {
            "tensor": values[0],
            "list": list(values),
            "mapping": dict(zip(names, values, strict=True)),
        }[form]
        locations = {"sources->base": (None, [[[3], [1]], [[4], [6]]])}
        outcomes.append(call(wrapped, base, None, locations, source_representations=given))
    assert_equal(*outcomes)


def test_functions_agree(pv):
    model = tiny("gpt2")
    base, source = prompts(model)

    def halfway(base: Tensor, source: Tensor) -> Tensor:
        return (base + source) / 2

    entries = [at(intervention=halfway)]
    locations = {"sources->base": ([[[0, 3], [2, 5]]], [[[1, 4], [6, 0]]])}
    assert_equal(*both(pv, model, entries, None, base, [source], locations))


def test_a_function_without_locations_is_given_the_whole_stream_alike(pv):
    model = same_sizes("llama")
    (base,) = prompts(model, (7,))
    seen = []

    def doubled(base: Tensor, source: Tensor | None = None) -> Tensor:
        seen.append(tuple(base.shape))
        return base * 2

    assert_equal(*both(pv, model, [at(intervention=doubled)], None, base))
    assert seen == [(2, 7, 16), (2, 7, 16)]


# --- other models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["base", "classifier"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_with_other_heads_agree(pv, family, head):
    model = tiny(family, head=head)
    base, source = prompts(model)
    results = [
        wrap(library, model, [at()], "VanillaIntervention")(base, [source], {"sources->base": 6})[1][0]
        for library in (iv, pv)
    ]
    assert_close(*results, rtol=0, atol=TOLERANCE)
    assert (results[0] - model(**base)[0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("subspaces", [None, [[[0], [0]]], [[[1], [1]]]])
def test_perceptrons_agree(pv, subspaces):
    from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification

    torch.manual_seed(0)
    theirs = MLPForClassification(
        MLPConfig(h_dim=FEATURES, n_layer=3, num_classes=4, pdrop=0.0, activation_function="relu")
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    mine = iv.MLPClassifier(width=FEATURES, layers=3, classes=4)
    for own, other in zip(mine.layers, theirs.mlp.h, strict=True):
        own.linear.load_state_dict(other.ff1.state_dict())
    mine.score.load_state_dict(theirs.score.state_dict())
    base, source = torch.randn(2, 2, 1, FEATURES)
    entry = at(subspace_partition=[[0, 4], [4, 10]])
    other = wrap(pv, theirs.eval(), [entry], "VanillaIntervention")
    own = wrap(iv, mine, [entry], "VanillaIntervention")
    options = {"unit_locations": {"sources->base": 0}, "subspaces": subspaces}
    result = own(base, [source], **options).intervened.squeeze(1)
    expected = other({"inputs_embeds": base}, [{"inputs_embeds": source}], **options)[1][0]
    assert_close(result, expected, rtol=0, atol=TOLERANCE)
    assert (result - mine(base).squeeze(1)).abs().max() > 100 * TOLERANCE
