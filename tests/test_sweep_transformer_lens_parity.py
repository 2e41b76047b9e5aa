"""Patching functions give TransformerLens' own numbers, and names the activations they name there.

TransformerLens gets the same weights in a bridge around a copy of the model, without folding or centring.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable import patching
from intervenable.transformer_lens_names import HOOK_NAMES
from model_maps import COMPONENTS
from tiny_models import HEADS, LAYERS, tiny, tiny_inputs

# What TransformerLens and its dependencies warn of is theirs (2026-11).
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

FAMILIES = ("gpt2", "llama")
TOLERANCE = 1e-3
SAME = (
    "get_act_patch_resid_pre",
    "get_act_patch_resid_mid",
    "get_act_patch_attn_out",
    "get_act_patch_mlp_out",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_block_every",
)
GROUPED = ("get_act_patch_attn_head_all_pos_every", "get_act_patch_attn_head_by_pos_every")


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9] + 0.3 * logits[:, 1, 7]).mean()


class Case:
    """One model here and in a bridge, and two prompts."""

    def __init__(self, family: str, theirs: Any) -> None:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        self.model, self.theirs = tiny(family), theirs
        copied = copy.deepcopy(self.model)  # it replaces modules of the model it is given
        self.bridge = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config)
        self.bridge.set_use_attn_result(True)
        self.clean, self.corrupted = (
            tiny_inputs(self.model, length=5, seed=seed)["input_ids"] for seed in (0, 1)
        )
        with torch.no_grad():
            _, self.clean_cache = self.bridge.run_with_cache(self.clean)
            _, self.corrupted_cache = self.bridge.run_with_cache(self.corrupted)

    def their(self, name: str, *rest: Any, **options: Any) -> Any:
        """What TransformerLens' function gives."""
        with torch.no_grad():
            function = getattr(self.theirs, name)
            return function(self.bridge, self.corrupted, self.clean_cache, *rest, **options)

    def our(self, name: str, *rest: Any, **options: Any) -> Any:
        """What ours gives."""
        return getattr(patching, name)(self.model, self.corrupted, self.clean, *rest, **options)

    @property
    def unpatched(self) -> Tensor:
        with torch.no_grad():
            return metric(self.model(self.corrupted).logits)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """A case for each family. `make peers` sets PEERS, so that there TransformerLens has to be there."""
    try:
        import transformer_lens.patching as theirs
    except ImportError as error:
        if os.environ.get("PEERS") == "required":
            raise
        pytest.skip(f"transformer_lens cannot be imported ({error}); `make peers` installs it")
    return {family: Case(family, theirs) for family in FAMILIES}


def close(found: Tensor, expected: Tensor, case: Case) -> None:
    assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - case.unpatched).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SAME)
def test_a_function_gives_the_numbers_it_gives_there(cases, name, family):
    case = cases[family]
    close(case.our(name, metric), case.their(name, metric), case)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GROUPED)
def test_shared_heads_are_filled_up_with_zeros_as_there_if_asked_for(cases, name, family):
    case = cases[family]
    close(case.our(name, metric, gqa="zeros"), case.their(name, metric), case)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_after_attention_is_all_of_it_here_whether_or_not_gradients_are_on(cases, family):
    case = cases[family]
    name = "get_act_patch_resid_mid"
    with torch.enable_grad():
        ours = case.our(name, metric)
        # There the stream is written in place, and so reaches the residual; with gradients on it is a copy, and the
        # patch reaches the MLP alone.
        theirs = getattr(case.theirs, name)(case.bridge, case.corrupted, case.clean_cache, metric)
    close(ours, case.their(name, metric), case)
    assert (theirs - ours).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["resid_pre", "z", "v", "pattern", "attn_scores"])
def test_a_rule_of_ones_own_gives_the_numbers_it_gives_there(cases, activation, family):
    case = cases[family]
    matrix = activation in ("pattern", "attn_scores")

    def mixed(value: Tensor, index: Any, clean: Tensor) -> Tensor:
        place = (slice(None), index[1]) if not matrix else (slice(None), index[1], -1)
        new = value.clone()
        new[place] = 0.5 * value[place] + 0.5 * clean[place]
        return new

    arguments = (metric, mixed, activation)
    axes = ("layer", "head") if matrix else ("layer", "pos")
    ours = case.our("generic_activation_patch", *arguments, axes)
    theirs = case.their("generic_activation_patch", *arguments, axes)
    close(ours, theirs, case)
    table = pd.DataFrame([(2, 1), (0, 2), (2, 1)], columns=list(axes))
    rows = {"index_df": table, "return_index_df": True}
    ours, own = case.our("generic_activation_patch", *arguments, None, **rows)
    theirs, _ = case.their("generic_activation_patch", *arguments, None, **rows)
    assert own is table
    assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_table_give_the_numbers_they_give_there(cases, family):
    case = cases[family]
    table = pd.DataFrame([(1, 2, 3), (0, 0, 1), (2, 4, 0), (1, 2, 3)], columns=["layer", "pos", "head"])
    name = "get_act_patch_attn_head_q_by_pos"
    theirs = case.their(name, metric, index_axis_names=None, index_df=table)
    assert_close(case.our(name, metric, index_df=table), theirs, rtol=0, atol=TOLERANCE)


# --- direct paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "component"), [("gpt2", "q"), ("gpt2", "k"), ("gpt2", "v"), ("llama", "q")]
)
def test_direct_paths_are_those_there_where_there_are_any(cases, family, component):
    case = cases[family]
    rest = (case.corrupted_cache, metric, 0, 2, component)
    theirs = case.their("get_act_patch_direct_path", *rest, verbose=False)
    ours = case.our("get_act_patch_direct_path", None, *rest[1:], verbose=False)
    assert ours[0].isnan().all()
    assert (theirs[0] == 0).all()
    close(ours[1:], theirs[1:], case)


def test_all_direct_paths_are_those_there(cases):
    case = cases["gpt2"]
    name = "get_act_patch_direct_path_all_sources"
    theirs = case.their(name, case.corrupted_cache, metric, verbose=False)
    ours = case.our(name, None, metric, verbose=False)
    assert ours.shape == theirs.shape == (LAYERS, HEADS, LAYERS, HEADS)
    assert_close(ours.nan_to_num(0.0), theirs, rtol=0, atol=TOLERANCE)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["hooked", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_a_hook_there_with_our_numbers(cases, family, style):
    case = cases[family]
    compared = 0
    for row in HOOK_NAMES:
        if not row.in_style(style) or (family == "gpt2" and row.component.startswith("rotary")):
            continue
        layer = None if COMPONENTS[row.component].scope == "model" else 1
        theirs = case.clean_cache[patching.tl_name(row.component, layer, style)]
        cache = iv.collect(case.model, case.clean, row.component, layers=None if layer is None else [layer])
        ours = cache[row.component, layer]
        if ours.dim() == 4 and ours.shape != theirs.shape:
            ours = ours.transpose(1, 2)
        if COMPONENTS[row.component].axes == "matrix":  # what is masked is written differently
            seen = torch.ones(ours.shape[-2:], dtype=torch.bool).tril()
            ours, theirs = ours[..., seen], theirs[..., seen]
        assert_close(ours, theirs, rtol=0, atol=1e-4, msg=f"{row.component}: {{}}".format)
        compared += 1
    assert compared > 15


@pytest.mark.parametrize(
    "given",
    [
        ("k", 6, "a"),
        ("pre", 2),
        ("embed",),
        ("normalized", 27, "ln2"),
        ("k6",),
        ("scale4ln1",),
        ("pre5",),
        ("attn", 3),
        ("attn_logits", 3),
        ("mlp_post", 3),
        ("value", 3),
        ("resid_mid", 4, "b"),
        ("rot_q", 4),
        ("scale",),
        ("k",),
        ("blocks.3.attn.hook_k",),
        ("hook_embed",),
        ("out", 3, "attention"),
        ("pre_linear", 2, "m"),
    ],
)
def test_short_names_are_completed_as_there(cases, given):
    from transformer_lens.utilities import get_act_name

    assert patching.get_act_name(*given) == get_act_name(*given)
