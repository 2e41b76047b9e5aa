"""Attention patterns in a few numbers: blocks of queries and keys, and what would be expected of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import intervenable as iv
from tiny_models import tiny, tiny_inputs

SIZE = 7
UNIFORM = torch.tensor([[1 / (i + 1) if j <= i else 0.0 for j in range(SIZE)] for i in range(SIZE)])
RISING = torch.tensor(
    [[(j + 1) / sum(range(1, i + 2)) if j <= i else 0.0 for j in range(SIZE)] for i in range(SIZE)]
)
"""Each query reads later keys more."""
ROWS, COLUMNS = [(2, 3), (5, 6)], [(0, 1), (4,)]
NAN = math.nan


@pytest.mark.parametrize(
    ("pattern", "method", "expected"),
    [
        (UNIFORM, "mean", [[0.291667, 0], [0.154762, 0.154762]]),
        (UNIFORM, "sum", [[1.166667, 0], [0.619048, 0.309524]]),
        (UNIFORM, "row_mass", [[0.583333, 0], [0.309524, 0.154762]]),
        (UNIFORM, "baseline_ratio", [[1, NAN], [1, 1]]),
        (RISING, "mean", [[0.2, 0], [0.0625, 0.208333]]),
        (RISING, "sum", [[0.8, 0], [0.25, 0.416667]]),
        (RISING, "baseline_ratio", [[0.685714, NAN], [0.403846, 1.346154]]),
    ],
)
def test_blocks_of_a_causal_pattern_have_the_values_computed_by_hand(pattern, method, expected):
    allowed = "causal" if method == "baseline_ratio" else None
    blocks = iv.pattern_blocks(pattern, COLUMNS, ROWS, method, allowed=allowed, nan_policy="nan")
    assert_close(blocks, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0, equal_nan=True)


def test_a_ratio_of_nothing_is_what_the_policy_says():
    def ratio(policy):
        return iv.pattern_blocks(
            UNIFORM, COLUMNS, ROWS, "baseline_ratio", allowed="causal", nan_policy=policy
        )[0, 1]

    assert ratio("zero") == 0
    assert ratio("nan").isnan()
    with pytest.raises(
        iv.CacheError,
        match="No query of row group 0 may read any key of column group 1, so their ratio is 0 / 0",
    ):
        ratio("raise")


def test_rows_are_the_groups_of_columns_unless_they_are_given():
    groups = [(0, 1), (2, 4)]
    assert_close(iv.pattern_blocks(RISING, groups), iv.pattern_blocks(RISING, groups, groups))
    assert_close(iv.pattern_blocks(RISING, groups)[1, 0], RISING[[2, 4]][:, [0, 1]].mean())


def test_a_group_of_two_positions_is_those_two_and_not_what_lies_between():
    assert_close(iv.pattern_blocks(RISING, [(1, 3)], [6], "sum")[0, 0], RISING[6, 1] + RISING[6, 3])


def test_without_a_method_the_entries_come_back_even_where_groups_differ_in_size():
    entries = iv.pattern_blocks(RISING, [(0, 1), 4], [(2, 3), (5,), 6], "none")
    assert torch.equal(entries, RISING[[2, 3, 5, 6]][:, [0, 1, 4]])


def test_groups_may_be_slices_ranges_and_negative():
    one = iv.pattern_blocks(RISING, [slice(0, 2), range(2, 4), -1], [-1], "sum")
    assert_close(one, iv.pattern_blocks(RISING, [(0, 1), (2, 3), 6], [6], "sum"))


def test_examples_may_have_groups_of_their_own():
    batch = torch.stack([UNIFORM, RISING])[:, None].expand(-1, 3, -1, -1)
    columns = [[(0, 1), 4], [(2,), (3, 5)]]
    for method in ("mean", "sum", "row_mass"):
        blocks = iv.pattern_blocks(batch, columns, [6], method)
        assert blocks.shape == (2, 3, 1, 2)
        assert_close(blocks[0, 2], iv.pattern_blocks(UNIFORM, columns[0], [6], method))
        assert_close(blocks[1, 0], iv.pattern_blocks(RISING, columns[1], [6], method))
    entries = iv.pattern_blocks(batch, [[0, 1], [2, 3]], [6], "none")
    assert torch.equal(entries[1, 0], RISING[6:, [2, 3]])


def disjoint_groups(draw):
    chosen = draw(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE, unique=True))
    cut = draw(st.integers(0, len(chosen) - 1))
    return [tuple(part) for part in (chosen[:cut], chosen[cut:]) if part]


@given(st.data())
def test_blocks_are_what_loops_over_their_entries_give(data):
    rows, columns = disjoint_groups(data.draw), disjoint_groups(data.draw)
    pattern = torch.rand(
        2, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).softmax(-1)
    for method in ("mean", "sum", "row_mass"):
        blocks = iv.pattern_blocks(pattern, columns, rows, method)
        for i, row_group in enumerate(rows):
            for j, column_group in enumerate(columns):
                total = sum(pattern[:, r, c] for r in row_group for c in column_group)
                count = {"sum": 1, "row_mass": len(row_group), "mean": len(row_group) * len(column_group)}[
                    method
                ]
                assert_close(blocks[:, i, j], total / count)


@given(st.data())
def test_a_uniform_pattern_has_the_ratio_one_whatever_the_mask_and_the_groups(data):
    mask = (
        torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) > 0.4
    )
    ratio = iv.pattern_blocks(
        iv.uniform_pattern(mask),
        disjoint_groups(data.draw),
        disjoint_groups(data.draw),
        "baseline_ratio",
        allowed=mask,
        nan_policy="nan",
    )
    assert_close(ratio[~ratio.isnan()], torch.ones_like(ratio[~ratio.isnan()]))


def test_the_mask_of_a_model_with_padding_and_a_window_makes_its_uniform_patterns_uniform():
    model = tiny("mistral")  # a window of four positions
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()  # all scores are equal, so each query reads all it may alike
    inputs = tiny_inputs(model, batch=3, length=7, padding="left")
    cache = iv.collect(model, inputs, ["attention_pattern", "attention_scores"], layers=1)
    pattern, allowed = cache["attention_pattern", 1], cache["attention_scores", 1] > -torch.inf
    assert int(allowed[0, 0].sum(-1).max()) == 4
    blocks = {"columns": [(2, 3), (4,)], "rows": [(4, 5), 6], "method": "baseline_ratio"}
    assert_close(iv.pattern_blocks(pattern, **blocks, allowed=allowed), torch.ones(3, 4, 2, 2))
    off = iv.pattern_blocks(pattern, **blocks, allowed="causal")
    assert float((off - 1).abs().max()) > 0.3


def test_queries_that_are_fewer_than_keys_are_the_last_ones():
    assert torch.equal(
        iv.pattern_blocks(UNIFORM[5:], [(0, 6)], [0], "baseline_ratio", allowed="causal"),
        iv.pattern_blocks(UNIFORM, [(0, 6)], [5], "baseline_ratio", allowed="causal"),
    )


def test_a_mask_of_another_pattern_is_found_out():
    with pytest.raises(iv.CacheError, match="reads keys that `allowed` forbids"):
        iv.pattern_blocks(torch.full((3, 3), 1 / 3), [2], [0], "baseline_ratio", allowed="causal")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"columns": []}, iv.LocationError, "columns is []. Give a list of groups: columns=[(0, 1), 4]."),
        ({"columns": [()]}, iv.LocationError, "A group in columns is empty. Give at least one position."),
        (
            {"columns": [(1, 1)]},
            iv.LocationError,
            "The group (1, 1) in columns names a position more than once.",
        ),
        (
            {"columns": [7]},
            iv.LocationRangeError,
            "Position 7 in columns is out of range: the pattern has positions 0 to 6 there.",
        ),
        (
            {"columns": ["last"]},
            iv.LocationError,
            "'last' in columns is not a position: give ints, tuples of ints or slices.",
        ),
        (
            {"columns": [0], "method": "average"},
            iv.UnknownNameError,
            "Unknown method 'average'.\nAllowed: baseline_ratio, mean, none, row_mass, sum.",
        ),
        (
            {"columns": [0], "method": "baseline_ratio"},
            iv.CacheError,
            "method='baseline_ratio' compares with reading all allowed keys equally: say which those are,"
            " allowed=cache['attention_scores', layer] > -torch.inf, or 'causal' or 'all' where there is no padding"
            " and no window.",
        ),
        (
            {"columns": [[0], [1], [2]]},
            iv.LocationError,
            "columns has groups for 3 examples, and the pattern (2, 7, 7) has 2.",
        ),
        (
            {"columns": [[0, 1], [1]]},
            iv.LocationError,
            "columns has 1 to 2 groups, depending on the example; give as many in each.",
        ),
    ],
)
def test_what_is_wrong_with_groups_is_said(arguments, error, message):
    with pytest.raises(error) as caught:
        iv.pattern_blocks(torch.stack([UNIFORM, RISING]), **arguments)
    assert str(caught.value) == message


def test_a_pattern_weighted_by_values_is_the_pattern_times_their_norms():
    pattern = torch.rand(2, 4, 3, 5)
    values = torch.randn(2, 2, 5, 6)  # two key-value heads for four query heads
    weighted = iv.value_weighted_pattern(pattern, values)
    for head in range(4):
        for key in range(5):
            norm = values[:, head // 2, key].pow(2).sum(-1).sqrt()
            assert_close(weighted[:, head, :, key], pattern[:, head, :, key] * norm[:, None])
    with pytest.raises(iv.CacheError, match=r"for \(..., H, q, k\) they must be \(..., H, k, d\)"):
        iv.value_weighted_pattern(pattern, values[:, :, :4])


def test_a_uniform_pattern_needs_a_size_only_where_the_mask_has_none():
    assert torch.equal(iv.uniform_pattern("causal", SIZE), UNIFORM)
    assert torch.equal(iv.uniform_pattern("all", 2), torch.full((2, 2), 0.5))
    assert torch.equal(iv.uniform_pattern(torch.tensor([[False, False]])), torch.zeros(1, 2))
    with pytest.raises(iv.CacheError, match="needs the number of positions"):
        iv.uniform_pattern("causal")
