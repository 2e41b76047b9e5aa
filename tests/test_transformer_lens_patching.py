"""TransformerLens' patching functions by their names: shapes, tables of indices, and what is better here."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch
from declared import main_output
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable import generic_patching, transformer_lens_patching
from intervenable.generic_patching import (
    PatchSetter,
    generic_activation_patch,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from intervenable.sweeping import sweep
from intervenable.transformer_lens_every import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_block_every,
    of_all_heads,
)
from intervenable.transformer_lens_patching import NAMED_SWEEPS
from intervenable.transformer_lens_rows import boxes, make_df_from_ranges, read_rows
from tiny_models import HEADS, KEY_VALUE_HEADS, LAYERS, tiny, tiny_inputs

LENGTH = 5
# The table of the specification: component, shape of the result with L layers, P tokens, H heads, K key-value heads.
L, P, H, K = LAYERS, LENGTH, HEADS, KEY_VALUE_HEADS
BY_POS, ALL_POS = ("layer", "pos", "head"), ("layer", "head")
TABLE = {
    "get_act_patch_resid_pre": ("block_input", ("layer", "pos"), (L, P)),
    "get_act_patch_resid_mid": ("block_mid", ("layer", "pos"), (L, P)),
    "get_act_patch_attn_out": ("attention_contribution", ("layer", "pos"), (L, P)),
    "get_act_patch_mlp_out": ("mlp_contribution", ("layer", "pos"), (L, P)),
    "get_act_patch_attn_head_out_by_pos": ("head_attention_value_output", BY_POS, (L, P, H)),
    "get_act_patch_attn_head_q_by_pos": ("head_query_output", BY_POS, (L, P, H)),
    "get_act_patch_attn_head_k_by_pos": ("head_key_output", BY_POS, (L, P, K)),
    "get_act_patch_attn_head_v_by_pos": ("head_value_output", BY_POS, (L, P, K)),
    "get_act_patch_attn_head_pattern_by_pos": ("attention_pattern", ("layer", "head", "query"), (L, H, P)),
    "get_act_patch_attn_head_pattern_dest_src_pos": (
        "attention_pattern",
        ("layer", "head", "query", "key"),
        (L, H, P, P),
    ),
    "get_act_patch_attn_head_out_all_pos": ("head_attention_value_output", ALL_POS, (L, H)),
    "get_act_patch_attn_head_q_all_pos": ("head_query_output", ALL_POS, (L, H)),
    "get_act_patch_attn_head_k_all_pos": ("head_key_output", ALL_POS, (L, K)),
    "get_act_patch_attn_head_v_all_pos": ("head_value_output", ALL_POS, (L, K)),
    "get_act_patch_attn_head_pattern_all_pos": ("attention_pattern", ALL_POS, (L, H)),
}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def prompts(llama):
    return tuple(tiny_inputs(llama, length=LENGTH, seed=seed) for seed in (0, 1))


def function(name):
    return getattr(transformer_lens_patching, name)


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_has_every_function_of_the_specification():
    assert {name: row.component for name, row in NAMED_SWEEPS.items()} == {
        name: component for name, (component, *_) in TABLE.items()
    }


@pytest.mark.parametrize("name", TABLE)
def test_each_function_is_its_sweep_in_the_documented_shape(llama, prompts, name):
    clean, corrupted = prompts
    component, axes, shape = TABLE[name]
    found = function(name)(llama, corrupted, clean, metric)
    assert found.shape == shape
    assert_close(found, sweep(llama, clean, corrupted, component, axes, metric).values)


@pytest.mark.parametrize("name", TABLE)
def test_each_function_has_its_name_and_says_what_it_does(name):
    made = function(name)
    row = NAMED_SWEEPS[name]
    assert made.__name__ == made.__qualname__ == name
    assert made.__module__ == "intervenable.transformer_lens_patching"
    assert row.component in made.__doc__
    assert ", ".join(row.axes) in made.__doc__
    assert list(inspect.signature(made).parameters)[:6] == [
        "model",
        "corrupted_tokens",
        "clean_cache",
        "patching_metric",
        "index_df",
        "return_index_df",
    ]


def test_tokens_alone_and_collected_activations_are_taken_too(llama, prompts):
    clean, corrupted = prompts
    expected = function("get_act_patch_resid_pre")(llama, corrupted, clean, metric)
    cache = iv.collect(llama, clean, "block_input")
    found = function("get_act_patch_resid_pre")(llama, corrupted["input_ids"], cache, metric)
    assert_close(found, expected)


def test_options_of_sweep_go_beside(llama, prompts):
    clean, corrupted = prompts
    pattern = function("get_act_patch_attn_head_pattern_by_pos")
    whole = pattern(llama, corrupted, clean, metric)
    part = pattern(llama, corrupted, clean, metric, layers=[2], heads=[0, 3], queries=[-1], progress=False)
    assert_close(part, whole[2:, [0, 3]][..., -1:])


# --- tables of indices ------------------------------------------------------------------------------------


def test_ranges_make_a_table_with_the_last_column_fastest():  # example 2 of the specification
    table = make_df_from_ranges([2, 3], ["layer", "pos"])
    assert list(table.columns) == ["layer", "pos"]
    assert table.values.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert make_df_from_ranges([], []).shape[1] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([2], ["a", "b"]), "1 maxima and 2 names"),
        (([2, -1], ["a", "b"]), "-1 is no number"),
        (([True], ["a"]), "True"),
    ],
)
def test_ranges_that_are_none_are_explained(arguments, words):
    with pytest.raises(iv.ConfigError, match=words):
        make_df_from_ranges(*arguments)


def test_rows_are_patched_in_order_and_repeated_ones_are_equal(
    llama, prompts
):  # example 3 of the specification
    clean, corrupted = prompts
    table = pd.DataFrame([(1, 2), (0, 0), (1, 2)], columns=["layer", "pos"])
    patch = function("get_act_patch_resid_pre")
    whole = patch(llama, corrupted, clean, metric)
    found = patch(llama, corrupted, clean, metric, index_df=table)
    assert found.shape == (3,)
    assert found[0] == found[2]
    assert_close(found, whole[[1, 0, 1], [2, 0, 2]])


def test_the_table_is_given_back_with_the_result(llama, prompts):
    clean, corrupted = prompts
    patch = function("get_act_patch_attn_head_pattern_all_pos")
    values, table = patch(llama, corrupted, clean, metric, return_index_df=True)
    assert list(table.columns) == ["layer", "head_index"]
    assert table.values.tolist() == [[layer, head] for layer in range(L) for head in range(H)]
    own = pd.DataFrame({"layer": [2], "head_index": [1]})
    found, same = patch(llama, corrupted, clean, metric, index_df=own, return_index_df=True)
    assert same is own
    assert_close(found, values[2, 1][None])
    part, rows = patch(llama, corrupted, clean, metric, layers=[2, 0], return_index_df=True)
    assert part.shape == (2, H)
    assert rows["layer"].tolist() == [2] * H + [0] * H


def test_columns_of_other_numbers_and_of_words_are_no_hindrance(llama, prompts):
    clean, corrupted = prompts
    patch = function("get_act_patch_resid_pre")
    whole = patch(llama, corrupted, clean, metric)
    table = pd.DataFrame({"layer": [1, 2], "why": ["a", "b"], "pos": [2.0, -1.0], "weight": [0.5, 0.25]})
    assert_close(patch(llama, corrupted, clean, metric, index_df=table), whole[[1, 2], [2, -1]])


def test_columns_go_by_name_and_without_names_by_order(llama, prompts):
    clean, corrupted = prompts
    patch = function("get_act_patch_attn_head_out_by_pos")
    whole = patch(llama, corrupted, clean, metric)
    for columns, rows in (
        (["layer", "pos", "head"], [(0, 4, 1), (2, 3, 3)]),
        (["head_index", "layer", "position"], [(1, 0, 4), (3, 2, 3)]),
        (["a", "b", "c"], [(0, 4, 1), (2, 3, 3)]),
    ):
        found = patch(llama, corrupted, clean, metric, index_df=pd.DataFrame(rows, columns=columns))
        assert_close(found, whole[[0, 2], [4, 3], [1, 3]])


def test_rows_of_a_pattern_may_call_their_tokens_positions(llama, prompts):
    clean, corrupted = prompts
    patch = function("get_act_patch_attn_head_pattern_by_pos")
    table = pd.DataFrame([(1, 4, 2)], columns=["layer", "pos", "head"])
    assert_close(
        patch(llama, corrupted, clean, metric, index_df=table),
        patch(llama, corrupted, clean, metric)[1, 2, 4][None],
    )


def test_no_rows_give_no_values(llama, prompts):
    clean, corrupted = prompts
    table = pd.DataFrame({"layer": [], "pos": []})
    assert function("get_act_patch_resid_pre")(llama, corrupted, clean, metric, index_df=table).shape == (0,)


def test_tables_need_no_second_argument_but_take_it(llama, prompts):
    clean, corrupted = prompts
    table = pd.DataFrame({"layer": [1], "pos": [2]})
    patch = function("get_act_patch_resid_pre")
    one = patch(llama, corrupted, clean, metric, index_df=table)
    assert torch.equal(one, patch(llama, corrupted, clean, metric, index_axis_names=None, index_df=table))
    whole = patch(llama, corrupted, clean, metric, index_axis_names=("layer", "position"))
    assert whole.shape == (L, P)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"layer": [1], "head": [2]},
            "index_df has the columns 'layer', 'head', and a patch is told by layer, pos.",
        ),
        ({"layer": [1]}, "a patch is told by layer, pos"),
        ({"a": [1], "b": [2], "c": [3]}, "Name them so."),
        (
            {"layer": [1], "pos": [0.5]},
            "Row 0 of index_df has 0.5 in the column 'pos', which is no whole number.",
        ),
        ({"layer": ["one"], "pos": [0]}, "Row 0 of index_df has 'one' in the column 'layer'"),
        ({"layer": [1], "pos": [0], "position": [1]}, "a patch is told by layer, pos"),
        ([(1, 2)], "index_df is a list. Give a pandas DataFrame"),
        ({"layer": [3], "pos": [0]}, "layer 3 is not there"),
    ],
)
def test_a_table_that_does_not_fit_is_explained(llama, prompts, table, words):
    clean, corrupted = prompts
    frame = pd.DataFrame(table) if isinstance(table, dict) else table
    with pytest.raises(iv.ConfigError) as error:
        function("get_act_patch_resid_pre")(llama, corrupted, clean, metric, index_df=frame)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": "none"}, "Unknown option 'reduce'"),
        ({"reduce": "none"}, "A metric may give a number for each example"),
        ({"baseline": True}, "`sweep` gives the metric of the unpatched runs too"),
        ({"layer": [1]}, "Did you mean 'layers'?"),
        ({"component": "block_input"}, "Unknown option 'component'"),
        ({"index_axis_names": ("layer",)}, "get_act_patch_resid_pre has the axes layer, pos"),
        ({"index_df": pd.DataFrame({"layer": [1], "pos": [1]}), "layers": [1]}, "leave out layers"),
    ],
)
def test_an_option_that_is_none_is_explained(llama, prompts, options, words):
    clean, corrupted = prompts
    with pytest.raises(iv.ConfigError) as error:
        function("get_act_patch_resid_pre")(llama, corrupted, clean, metric, **options)
    assert words in str(error.value)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=40))
def test_grids_cover_the_rows(rows):
    grids = boxes(rows)
    cells = [cell for grid in grids for cell in torch.cartesian_prod(*map(torch.tensor, grid)).tolist()]
    assert len(cells) == len({tuple(cell) for cell in cells})
    assert {tuple(cell) for cell in cells} >= set(rows)
    if len(grids) > 1:
        assert {tuple(cell) for cell in cells} == set(rows)


def test_far_apart_rows_are_not_filled_up():
    scattered = [(layer, 31 * layer % 101, layer * 7 % 12) for layer in range(12)]
    assert sum(len(a) * len(b) * len(c) for a, b, c in boxes(scattered)) == 12
    assert boxes([(layer, pos) for layer in range(9) for pos in (0, 5, 7)]) == [(tuple(range(9)), (0, 5, 7))]


def test_rows_are_read_before_anything_is_run():
    frame = pd.DataFrame({"dest_pos": [1], "layer": [2], "head_index": [3]})
    assert read_rows(frame, ("layer", "head", "query")) == [(2, 3, 1)]


# --- several at once --------------------------------------------------------------------------------------


def test_shared_heads_are_expanded_padded_or_zeroed():  # example 1 of the specification
    shared = torch.tensor([[1.0, 2.0]])
    assert of_all_heads(shared, 1, 4, "expand").tolist() == [[1, 1, 2, 2]]
    assert of_all_heads(shared, 1, 4, "zeros").tolist() == [[1, 2, 0, 0]]
    padded = of_all_heads(shared, 1, 4, "pad")
    assert padded[0, :2].tolist() == [1, 2]
    assert padded[0, 2:].isnan().all()
    assert of_all_heads(shared, 1, 2, "pad") is shared


@pytest.mark.parametrize("gqa", ["expand", "pad", "zeros"])
def test_all_kinds_of_heads_are_stacked(llama, prompts, gqa):
    clean, corrupted = prompts
    found = get_act_patch_attn_head_all_pos_every(llama, corrupted, clean, metric, gqa=gqa)
    assert found.shape == (5, L, H)
    for number, kind in enumerate(("out", "q", "k", "v", "pattern")):
        one = function(f"get_act_patch_attn_head_{kind}_all_pos")(llama, corrupted, clean, metric)
        assert_close(found[number], of_all_heads(one, 1, H, gqa), equal_nan=True)


def test_all_kinds_of_heads_by_position_are_stacked(llama, prompts):
    clean, corrupted = prompts
    found = get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric, positions=[0, 3, -1])
    assert found.shape == (5, L, 3, H)
    for number, kind in enumerate(("out", "q", "k", "v", "pattern")):
        one = function(f"get_act_patch_attn_head_{kind}_by_pos")(llama, corrupted, clean, metric)
        one = one.transpose(1, 2) if kind == "pattern" else one
        assert_close(found[number], of_all_heads(one, 2, H, "expand")[:, [0, 3, -1]])


def test_windows_of_tokens_are_those_of_patterns_too(llama, prompts):
    clean, corrupted = prompts
    found = get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric, window={"pos": 2})
    rows = sweep(
        llama, clean, corrupted, "attention_pattern", ("layer", "query", "head"), metric, window={"query": 2}
    )
    assert_close(found[4], rows.values)


def test_kinds_apart_have_the_heads_they_have(llama, prompts):
    clean, corrupted = prompts
    apart = get_act_patch_attn_head_all_pos_every(llama, corrupted, clean, metric, "native")
    assert {kind: values.shape for kind, values in apart.items()} == {
        kind: (L, K if kind in "kv" else H) for kind in ("out", "q", "k", "v", "pattern")
    }
    by_pos = get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric, gqa="native")
    assert by_pos["v"].shape == (L, P, K)
    assert by_pos["pattern"].shape == (L, P, H)


def test_stream_attention_and_mlp_are_stacked(llama, prompts):
    clean, corrupted = prompts
    found = get_act_patch_block_every(llama, corrupted, clean, metric)
    assert found.shape == (3, L, P)
    for number, kind in enumerate(("resid_pre", "attn_out", "mlp_out")):
        assert_close(found[number], function(f"get_act_patch_{kind}")(llama, corrupted, clean, metric))


def test_some_heads_are_asked_for_where_a_number_means_one_thing(llama, prompts):
    full = tiny("llama", variant="full")
    clean, corrupted = prompts
    part = get_act_patch_attn_head_all_pos_every(full, corrupted, clean, metric, heads=[1, 3])
    whole = get_act_patch_attn_head_all_pos_every(full, corrupted, clean, metric)
    assert_close(part, whole[..., [1, 3]])
    with pytest.raises(iv.ConfigError, match="4 query heads share 2 heads of keys and values"):
        get_act_patch_attn_head_all_pos_every(llama, corrupted, clean, metric, heads=[1])
    with pytest.raises(iv.UnknownNameError, match="Did you mean 'expand'"):
        get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric, gqa="expnad")


def test_finished_sweeps_are_kept_apart(llama, prompts, tmp_path):
    clean, corrupted = prompts
    for _ in range(2):
        found = get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric, checkpoint=tmp_path)
    assert_close(found, get_act_patch_attn_head_by_pos_every(llama, corrupted, clean, metric))
    assert {path.name for path in tmp_path.iterdir()} == {"vectors", "pattern"}


# --- what is better here ----------------------------------------------------------------------------------


def test_neither_tokens_nor_collected_activations_are_changed(llama, prompts):
    clean, corrupted = prompts
    cache = iv.collect(llama, clean, "block_input")
    before = {key: value.clone() for key, value in cache.items()}, corrupted["input_ids"].clone()

    def in_place(activation, index, clean_activation):
        clean_activation[:] = 7.0
        activation[:] = clean_activation
        return activation

    function("get_act_patch_resid_pre")(llama, corrupted, cache, metric)
    generic_activation_patch(llama, corrupted, cache, metric, in_place, "resid_pre", ["layer"])
    assert all(torch.equal(cache[key], before[0][key]) for key in cache)
    assert torch.equal(corrupted["input_ids"], before[1])


@pytest.mark.parametrize("length", [4, 6])
def test_a_clean_prompt_of_another_length_is_refused(llama, prompts, length):
    _, corrupted = prompts
    other = tiny_inputs(llama, length=length)
    with pytest.raises(iv.ConfigError, match=f"has 5 tokens in the run that is patched and {length}"):
        function("get_act_patch_resid_pre")(llama, corrupted, other, metric)
    with pytest.raises(iv.InputError, match="Give prompts of the same length"):
        generic_activation_patch(llama, corrupted, other, metric, lambda a, i, c: c, "resid_pre", ["layer"])


def test_metrics_may_give_tensors_and_keep_their_numbers(llama, prompts):
    clean, corrupted = prompts
    patch = function("get_act_patch_mlp_out")
    each = patch(llama, corrupted, clean, lambda logits: logits[:, -1, 3:6].double())
    assert each.shape == (L, P, 2, 3)
    assert each.dtype == torch.float64
    two = patch(llama, corrupted, clean, {"mean": metric, "other": lambda logits: logits[0, -1, 0]})
    assert two.shape == (L, P, 2)
    assert_close(two[..., 0], patch(llama, corrupted, clean, metric))


def test_what_needs_a_flag_there_is_simply_there(llama, prompts):
    clean, corrupted = prompts
    by_result = generic_activation_patch(
        llama, corrupted, clean, metric, layer_head_vector_patch_setter, "result", ("layer", "head")
    )
    by_output = function("get_act_patch_attn_head_out_all_pos")(llama, corrupted, clean, metric)
    assert_close(by_result, by_output, atol=1e-5, rtol=1e-5)


def test_progress_can_be_turned_off_and_told(llama, prompts, capsys):
    clean, corrupted = prompts
    told: list[tuple[int, int]] = []
    function("get_act_patch_resid_pre")(
        llama, corrupted, clean, metric, progress=lambda *now: told.append(now)
    )
    assert told[-1] == (L * P, L * P)
    function("get_act_patch_resid_pre")(llama, corrupted, clean, metric, progress=False)
    assert capsys.readouterr() == ("", "")


# --- rules ------------------------------------------------------------------------------------------------

RULES = {
    layer_pos_patch_setter: "get_act_patch_resid_pre",
    layer_pos_head_vector_patch_setter: "get_act_patch_attn_head_v_by_pos",
    layer_head_vector_patch_setter: "get_act_patch_attn_head_q_all_pos",
    layer_head_pattern_patch_setter: "get_act_patch_attn_head_pattern_all_pos",
    layer_head_pos_pattern_patch_setter: "get_act_patch_attn_head_pattern_by_pos",
    layer_head_dest_src_pos_pattern_patch_setter: "get_act_patch_attn_head_pattern_dest_src_pos",
}


@pytest.mark.parametrize(("rule", "name"), RULES.items(), ids=RULES.values())
def test_a_rule_of_ones_own_gives_what_the_same_rule_of_ours_gives(llama, prompts, rule, name):
    clean, corrupted = prompts
    row = NAMED_SWEEPS[name]
    subsets = make_df_from_ranges([1, 2, 2, 3][: len(row.axes)], list(row.axes))
    subsets["layer"] = 1

    def slow(corrupted, index, clean):
        return rule(corrupted, index, clean)

    found = generic_activation_patch(llama, corrupted, clean, metric, slow, row.activation, index_df=subsets)
    fast = generic_activation_patch(llama, corrupted, clean, metric, rule, row.activation, index_df=subsets)
    whole = function(name)(llama, corrupted, clean, metric)
    expected = torch.stack([whole[tuple(index)] for index in subsets.values.tolist()])
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_close(fast, expected, atol=1e-5, rtol=1e-5)


def test_a_rule_sees_positions_before_heads_and_rows_as_they_are(llama, prompts):
    clean, corrupted = prompts
    seen = []

    def rule(activation, index, clean_activation):
        seen.append((activation.shape, index, clean_activation.shape))
        return activation * 0

    table = pd.DataFrame({"layer": [1.0, 2.0], "factor": [0.5, 2.0], "note": ["a", "b"]})
    _, same = generic_activation_patch(
        llama, corrupted, clean, metric, rule, "k", index_df=table, return_index_df=True, progress=False
    )
    assert same is table
    shape = (2, P, K, 6)
    assert seen == [(shape, [1, 0.5, "a"], shape), (shape, [2, 2, "b"], shape)]


def test_a_rule_is_run_for_each_combination_of_axes(llama, prompts):
    clean, corrupted = prompts

    def rule(activation, index, clean_activation):
        new = activation.clone()
        new[:, index[1]] = clean_activation[:, index[1]]
        return new

    arguments = (llama, corrupted, clean, metric, rule)
    found = generic_activation_patch(*arguments, "blocks.0.hook_resid_pre", ("layer", "pos"))
    assert_close(
        found, function("get_act_patch_resid_pre")(llama, corrupted, clean, metric), atol=1e-5, rtol=1e-5
    )
    kept, table = generic_activation_patch(*arguments, "block_input", ["layer", "pos"], return_index_df=True)
    assert torch.equal(kept, found)
    assert len(table) == L * P
    assert generic_activation_patch(*arguments, "z", ("layer", "pos", "head_index")).shape == (L, P, H)


def test_a_rule_may_be_measured_by_any_metric(llama, prompts):
    clean, corrupted = prompts
    with torch.no_grad():
        unpatched = main_output(llama(**corrupted))
    arguments = (llama, corrupted, clean)
    rule = (lambda activation, index, clean_activation: activation, "resid_pre", ["layer"])
    found = generic_activation_patch(*arguments, {"a": metric, "b": lambda z: z[0, -1, 0]}, *rule)
    assert_close(found, torch.stack([metric(unpatched), unpatched[0, -1, 0]]).expand(L, 2))
    ours = generic_activation_patch(*arguments, iv.metrics.kl_divergence("corrupted"), *rule)
    assert_close(ours, torch.zeros(L), atol=1e-6, rtol=0)
    whole = (lambda activation, index, clean_activation: clean_activation, "resid_pre", ["layer"])
    with torch.no_grad():
        answers = [main_output(llama(**inputs))[:, -1].log_softmax(-1) for inputs in (clean, corrupted)]
    expected = (answers[0].exp() * (answers[0] - answers[1])).sum(-1).mean()
    cache = iv.collect(llama, clean, "block_input")
    assert generic_activation_patch(*arguments, iv.metrics.kl_divergence("clean"), *whole)[0].abs() < 1e-5
    same = (lambda activation, index, clean_activation: activation, "resid_pre", ["layer"])
    found = generic_activation_patch(*arguments, iv.metrics.kl_divergence("clean"), *same)
    assert_close(found, expected.expand(L), atol=1e-5, rtol=1e-5)
    with pytest.raises(iv.MetricError, match="clean run, which was not given as inputs"):
        generic_activation_patch(llama, corrupted, cache, iv.metrics.kl_divergence("clean"), *same)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"index_axis_names": None},
            "index_axis_names, for all combinations, or index_df, for its rows: one of the two",
        ),
        ({"index_df": pd.DataFrame({"layer": [1]})}, "one of the two"),
        ({"activation_name": "resid_per"}, "Did you mean 'resid_pre'?"),
        ({"index_axis_names": ("pos", "layer")}, "the first axis is the layer"),
        ({"index_axis_names": ("layer", "head")}, "block_input has no axis 'head'"),
        ({"index_axis_names": ("layer", "token")}, "Unknown axis 'token'"),
        ({"patching_metric": lambda z: "good"}, "gave a str for (0,), not a number"),
        ({"patching_metric": lambda z: z.mean() * torch.nan}, "gave NaN for (0,)"),
        (
            {"patching_metric": lambda z, seen=[]: seen.append(1) or torch.zeros(len(seen))},
            "gave the shape (2,) for (1,)",
        ),
        ({"memory": "1GB"}, "Unknown option 'memory' for a patch_setter of your own"),
        ({"model": iv.IntervenableModel([], tiny("llama"))}, "needs the plain model"),
        ({"patch_setter": layer_pos_patch_setter}, "this rule takes ('layer', 'pos')"),
        (
            {"patch_setter": lambda a, i, c: a[:, :2]},
            "gave the shape (2, 2, 16) for block_input of layer 0 in the row (0,)",
        ),
        (
            {"patch_setter": lambda a, i, c: None},
            "gave a NoneType for block_input of layer 0 in the row (0,). Return the",
        ),
        ({"patch_setter": lambda a, i, c: c[:1], "clean_cache": None}, "inputs is a NoneType"),
    ],
)
def test_a_rule_that_cannot_be_run_is_explained(llama, prompts, changes, words):
    clean, corrupted = prompts
    call = {
        "model": llama,
        "corrupted_tokens": corrupted,
        "clean_cache": clean,
        "patching_metric": metric,
        "patch_setter": lambda activation, index, clean_activation: clean_activation,
        "activation_name": "resid_pre",
        "index_axis_names": ("layer",),
    }
    with pytest.raises(iv.IntervenableError) as error:
        generic_activation_patch(**{**call, **changes})
    assert words in str(error.value)


def test_a_rule_of_ours_wants_a_whole_row():
    with pytest.raises(iv.ConfigError, match=r"The row \(1,\) has 1 entries. Give layer, pos."):
        layer_pos_patch_setter(torch.zeros(1, 2, 3), (1,), torch.zeros(1, 2, 3))
    rules = [value for value in vars(generic_patching).values() if isinstance(value, PatchSetter)]
    assert len(rules) == len(RULES)
