"""The activation cache: a frozen mapping whose methods give new ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import intervenable as iv
from intervenable.cache_layout import Layout, TokenAxis
from intervenable.cache_memory import format_bytes
from tiny_models import tiny, tiny_inputs


def some(batch=2, length=3, value=1.0, **info):
    """A cache of two layers of residuals, a pattern and logits."""
    return iv.ActivationCache(
        {
            ("block_output", 0): torch.full((batch, length, 4), value),
            ("block_output", 2): torch.full((batch, length, 4), value * 2),
            ("attention_pattern", 2): torch.full((batch, 2, length, length), value),
            "logits": torch.full((batch, length, 5), value),
        },
        info={"layers": 3, **info},
    )


# --- looking ----------------------------------------------------------------------------------------------


def test_activations_are_found_by_component_and_layer():
    cache = some()
    assert cache["block_output", 2][0, 0, 0] == 2
    assert cache["block_output", -1] is cache["block_output", 2]
    assert cache["logits"] is cache["logits", None]
    assert cache["attention_weight", 2] is cache["attention_pattern", 2]
    assert list(cache) == [
        ("block_output", 0),
        ("block_output", 2),
        ("attention_pattern", 2),
        ("logits", None),
    ]
    assert ("block_output", 2) in cache
    assert "logits" in cache
    assert ("block_output", 1) not in cache
    assert cache.get(("block_output", 1)) is None
    assert cache.components == ("block_output", "attention_pattern", "logits")
    assert cache.layers_of("block_output") == (0, 2)


def test_axes_have_names_by_what_a_component_is():
    axes = iv.ActivationCache(
        {
            ("block_output", 0): torch.zeros(1, 2, 3),
            ("head_value_output", 0): torch.zeros(1, 2, 3, 4),
            ("head_attention_output", 0): torch.zeros(1, 2, 3, 4),
            ("attention_scores", 0): torch.zeros(1, 2, 3, 3),
            ("mlp_hidden", 0): torch.zeros(1, 2, 3),
            ("query_output", 0): torch.zeros(1, 2, 3),
            "logits": torch.zeros(1, 2, 3),
            "final_norm_scale": torch.zeros(1, 2, 1),
            "model.pooler.output": torch.zeros(1, 2),
        }
    ).axes
    assert list(axes.values()) == [
        ("batch", "position", "hidden"),
        ("batch", "head", "position", "head_dim"),
        ("batch", "head", "position", "hidden"),
        ("batch", "head", "query", "key"),
        ("batch", "position", "neuron"),
        ("batch", "position", "heads_joined"),
        ("batch", "position", "vocabulary"),
        ("batch", "position", "one"),
        ("batch", "axis_1"),
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "block_ouput",
            "Unknown activation 'block_ouput' in this cache. Did you mean 'block_output'?"
            "\nAllowed: attention_pattern, block_output, logits. To have it: iv.collect(model, inputs,"
            " ['block_ouput', ...]).",
        ),
        ("block_output", "block_output is there for layer(s) 0, 2: write cache['block_output', 0]."),
        (("block_output", 1), "block_output was not collected in layer 1, but in layer(s) 0, 2."),
        (("logits", 0), "logits is outside the blocks and has no layer: write cache['logits']."),
        (
            ("block_output", "2"),
            "('block_output', '2') names no activation: write a component with its layer, cache['block_output', 4].",
        ),
    ],
)
def test_what_is_not_there_is_a_key_error_that_says_what_is(key, message):
    with pytest.raises(iv.MissingActivationError) as caught:
        some()[key]
    assert str(caught.value) == message
    assert isinstance(caught.value, KeyError)


def test_what_is_required_and_missing_is_named_with_how_to_have_it():
    cache = some()
    assert cache.require(["block_output", ("attention_pattern", 2)]) is cache
    with pytest.raises(iv.MissingActivationError) as caught:
        cache.require([("block_output", 1), "mlp_output", "logits"])
    assert str(caught.value) == (
        "Not collected: ('block_output', 1), 'mlp_output'. Collect it too: iv.collect(model, inputs,"
        " [('block_output', 1), 'mlp_output', ...])."
        "\nThere is: block_output of layer 0, block_output of layer 2, attention_pattern of layer 2, logits."
    )


def test_a_cache_is_frozen():
    cache = some()
    with pytest.raises(TypeError):
        cache["logits"] = torch.zeros(1)
    with pytest.raises(TypeError):
        del cache["logits"]
    with pytest.raises(AttributeError):
        cache.info = {}
    cache.info["layers"] = 7
    assert cache.info["layers"] == 3


def test_what_is_no_tensor_or_no_axis_is_refused():
    with pytest.raises(iv.CacheError, match=r"'logits' is a list. A cache keeps tensors"):
        iv.ActivationCache({"logits": [1, 2]})
    with pytest.raises(iv.CacheError, match=r"its tensor has shape \(2, 3\). Give each axis one name"):
        iv.ActivationCache({"logits": torch.zeros(2, 3)}, {"logits": Layout(("batch",))})
    with pytest.raises(iv.CacheError, match="There is a layout for"):
        iv.ActivationCache({}, {"logits": Layout(("batch",))})


def test_printing_shows_what_there_is():
    assert repr(some()).splitlines()[:2] == [
        "ActivationCache with 4 activation(s)",
        "  block_output of layer 0: [2, 3, 4] ('batch', 'position', 'hidden')",
    ]


# --- new ones from old ------------------------------------------------------------------------------------


def unchanged(cache, before):
    return list(cache) == list(before) and all(
        torch.equal(cache[key], value) for key, value in before.items()
    )


def test_no_method_changes_the_cache():
    cache = some()
    before = {key: value.clone() for key, value in cache.items()}
    cache.to(torch.float64)
    cache.cpu()
    cache.cat(some())
    cache + some(value=3.0)
    cache.select_examples(0)
    cache.select_examples([1])[("block_output", 0)].zero_()
    some(batch=1).remove_batch_dim()
    cache.only(["logits"])
    assert unchanged(cache, before)


def test_the_right_of_a_sum_wins():
    both = some(text="a", kept=1) + some(value=5.0, text="b")
    assert both["logits"][0, 0, 0] == 5
    assert both.info == {"layers": 3, "text": "b", "kept": 1}
    more = some() + {("mlp_output", 0): torch.zeros(2, 3, 4)}
    assert ("mlp_output", 0) in more
    assert more.axes["mlp_output", 0] == ("batch", "position", "hidden")


def test_devices_and_types_of_numbers():
    cache = some() + {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    half = cache.to(torch.bfloat16)
    assert half["logits"].dtype == torch.bfloat16
    assert half["input_ids"].dtype == torch.long
    there = cache.to("meta")
    assert {value.device.type for value in there.values()} == {"meta"}
    assert {value.device.type for value in cache.to(device="meta", dtype=torch.float64).values()} == {"meta"}
    assert unchanged(cache.cpu(), dict(cache))


def test_only_some_activations():
    cache = some()
    assert list(cache.only(["block_output"])) == [("block_output", 0), ("block_output", 2)]
    assert list(cache.only([("block_output", -1), "logits"])) == [("block_output", 2), ("logits", None)]
    with pytest.raises(iv.MissingActivationError, match="Not collected: 'mlp_output'"):
        cache.only(["mlp_output"])


def collected(**options):
    model = tiny("llama")
    return iv.collect(model, tiny_inputs(model, batch=3), ["block_output", "attention_pattern"], 1, **options)


def test_examples_are_selected_with_their_tokens():
    cache = collected(positions=[[0], [1, 2], [3, 4, 5]], queries=[[0], [1], [2, 3]])
    two = cache.select_examples([2, 0])
    assert two.positions["block_output", 1].tolist() == [[3, 4, 5], [0, -1, -1]]
    assert torch.equal(two["block_output", 1], cache["block_output", 1][[2, 0]])
    assert torch.equal(
        cache.select_examples(slice(1, None))["attention_pattern", 1], cache["attention_pattern", 1][1:]
    )
    one = cache.select_examples(1)
    assert one.axes["attention_pattern", 1] == ("head", "query", "key")
    assert one.layouts["attention_pattern", 1].tokens["query"].positions.tolist() == [1, -1]
    assert torch.equal(one["block_output", 1], cache["block_output", 1][1])
    with pytest.raises(iv.CacheError, match="There is no example 3: there are 3"):
        cache.select_examples(3)
    with pytest.raises(iv.CacheError, match="has no batch axis any more"):
        one.select_examples(0)


def test_the_batch_axis_goes_where_there_is_one_example():
    alone = some(batch=1).remove_batch_dim()
    assert alone["attention_pattern", 2].shape == (2, 3, 3)
    assert alone.axes["logits"] == ("position", "vocabulary")
    with pytest.raises(iv.CacheError) as caught:
        some().remove_batch_dim()
    assert (
        str(caught.value)
        == "There are 2 examples; remove_batch_dim() is for one. Pick it: select_examples(0)."
    )


def test_groups_that_are_not_there_or_differ_in_size():
    with pytest.raises(iv.CacheError, match="block_output of layer 1 has no groups"):
        collected().by_group(("block_output", 1))
    uneven = collected(positions={"0": [[1], [], [2]], "all": slice(None)}, queries=0)
    with pytest.raises(iv.CacheError, match="The group '0' has 0 to 1 positions"):
        uneven.by_group(("block_output", 1))
    with pytest.raises(iv.CacheError, match="has no position of the group '0' in example 1"):
        collected(positions={"0": [[1], [], [2]], "all": 0}, queries=0).only(["block_output"]).group_means()
    with pytest.raises(iv.CacheError, match=r"its groups are averaged by iv.pattern_blocks"):
        collected(positions=0, queries=0).group_means()


def test_means_of_groups_leave_filler_out():
    cache = collected(positions={"a": [[0, 1], [2], [3]], "b": -1})
    means = cache.only(["block_output"]).group_means()
    whole = collected()["block_output", 1]
    expected = [whole[0, [0, 1]].mean(0), whole[1, 2], whole[2, 3]]
    torch.testing.assert_close(means["block_output", 1][:, 0], torch.stack(expected))
    torch.testing.assert_close(means["block_output", 1][:, 1], whole[:, -1])


def test_copies_are_possible():
    cache = collected(positions=[[0], [1], [2]])
    assert unchanged(copy.deepcopy(cache), dict(cache))


# --- joining ----------------------------------------------------------------------------------------------


def test_examples_are_joined_in_order():
    both = some().cat(some(batch=1, value=3.0), some(batch=3, value=4.0))
    assert both["logits"][:, 0, 0].tolist() == [1, 1, 3, 4, 4, 4]
    assert both["block_output", 2][:, 0, 0].tolist() == [2, 2, 6, 8, 8, 8]
    empty = iv.ActivationCache({})
    assert unchanged(empty.cat(some()), dict(some()))
    assert unchanged(some().cat(empty), dict(some()))
    assert len(empty.cat(empty)) == 0


def test_caches_with_other_activations_are_not_joined():
    with pytest.raises(iv.CacheError) as caught:
        (some() + {"input_ids": torch.zeros(2, 3)}).cat(some() + {"metric": torch.zeros(2)})
    assert str(caught.value) == (
        "The caches hold different activations: only the left has input_ids, and only the right has metric. Keep what"
        " both have: cache.only([...])."
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: some(length=5),
            r"3 and 5 long on the axis 'position', and cannot be joined. Allow it: ragged=",
        ),
        (
            lambda: some().to(torch.float64),
            "is torch.float32 on cpu in one cache and torch.float64 on cpu in another",
        ),
        (lambda: some(batch=1).remove_batch_dim(), "has the axes"),
    ],
)
def test_activations_that_differ_in_kind_are_not_joined(other, message):
    with pytest.raises(iv.CacheError, match=message):
        some().cat(other())


def test_widths_that_differ_are_never_filled_up():
    wide = iv.ActivationCache({"logits": torch.zeros(1, 3, 6)})
    with pytest.raises(iv.CacheError, match=r"5 and 6 long on the axis 'vocabulary', and cannot be joined.$"):
        some().only(["logits"]).cat(wide, ragged="pad")
    with pytest.raises(iv.CacheError, match=r"ragged='fill' is unknown. Allowed: 'error', 'list', 'pad'"):
        some().cat(some(), ragged="fill")


def test_heads_that_differ_are_not_joined():
    model = tiny("llama")
    one, other = (
        iv.collect(model, tiny_inputs(model), "head_query_output", 0, heads=[head]) for head in (0, 1)
    )
    with pytest.raises(iv.CacheError, match=r"of heads \[0\] .*in one cache and .* of heads \[1\]"):
        one.cat(other)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_filled_up_or_listed_the_examples_stay_what_they_were(lengths):
    caches = [
        iv.ActivationCache(
            {
                ("block_output", 0): torch.rand(2, length, 3),
                ("attention_pattern", 0): torch.rand(2, 2, length, length),
            }
        )
        for length in lengths
    ]
    padded = caches[0].cat(*caches[1:], ragged="pad")
    listed = caches[0].cat(*caches[1:], ragged="list")
    for key in padded:
        rows = [row for cache in caches for row in cache[key]]
        assert all(map(torch.equal, listed[key], rows))
        if len(set(lengths)) > 1:
            assert all(map(torch.equal, padded.by_example(key), rows))
        assert padded[key].shape[-1] == max(lengths) or key[0] == "block_output"


def test_listed_examples_go_through_everything():
    cache = some(length=2).cat(some(length=3), ragged="list")
    again = cache.cat(some(length=1), ragged="list")
    assert [len(row) for row in again["block_output", 0]] == [2, 2, 3, 3, 1, 1]
    assert again.to(torch.float64)["block_output", 0][4].dtype == torch.float64
    assert [len(row) for row in again.select_examples([4, 0])["block_output", 0]] == [1, 2]
    assert again.select_examples(2)["block_output", 0].shape == (3, 4)
    assert again.memory()["block_output", 0] == 12 * 4 * 4
    assert again.by_example(("logits", None))[0].shape == (2, 5)
    assert "6 tensors" in repr(again)


def test_components_may_be_aggregated_in_other_ways():
    def largest(old, new):
        return torch.maximum(old, new)

    ways = {"block_*": "sum", "logits": largest, "attention_pattern": "first"}
    one = some().cat(some(value=3.0), some(value=2.0), aggregation=ways)
    assert one["block_output", 2].unique().item() == 12
    assert one["logits"].unique().item() == 3
    assert one["attention_pattern", 2].unique().item() == 1
    assert some().cat(some(value=3.0), aggregation={"*": "last"})["logits"].unique().item() == 3


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        (
            {"logit": "sum"},
            "There is an aggregation for 'logit', which is not there. There is: attention_pattern,",
        ),
        (
            {"logits": "mean"},
            "The aggregation of 'logits' is 'mean'. Allowed: 'cat', 'first', 'last', 'sum', or a",
        ),
        (
            {"logits": lambda old, new: 3},
            "The aggregation of logits returned a int. Return a tensor with the axes",
        ),
        ({"logits": lambda old, new: old.sum()}, "The aggregation of logits returned shape ()."),
    ],
)
def test_aggregations_that_are_none_are_refused(ways, message):
    with pytest.raises(iv.CacheError) as caught:
        some().cat(some(), aggregation=ways)
    assert message in str(caught.value)


def test_sums_need_equal_shapes():
    with pytest.raises(iv.CacheError, match=r"has the shapes \(2, 3, 4\) and \(1, 3, 4\): no sum"):
        some().cat(some(batch=1), aggregation={"*": "sum"})


def test_tokens_are_joined_with_what_they_belong_to():
    cache = collected(positions={"a": (0, 1)}, queries=0).cat(collected(positions={"a": (2, 3)}, queries=1))
    assert cache.positions["block_output", 1].tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    assert cache.layouts["attention_pattern", 1].tokens["query"].positions.flatten().tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    one, other = (collected(positions={name: 0}).only(["block_output"]) for name in "ab")
    assert one.cat(other).layouts["block_output", 1].tokens["position"].groups is None
    with pytest.raises(
        iv.CacheError, match=r"of groups \['a'\] in one cache and .* of groups \['b'\] in another"
    ):
        one.group_means().cat(other.group_means())


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_is_counted_in_bytes_and_shown_in_units():
    cache = some()
    assert cache.memory() == {
        ("block_output", 0): 96,
        ("block_output", 2): 96,
        ("attention_pattern", 2): 144,
        ("logits", None): 120,
    }
    assert cache.memory_table().splitlines() == [
        "activation         layers   size",
        "block_output       0, 2    192 B",
        "attention_pattern  2       144 B",
        "logits                     120 B",
        "all                        456 B",
    ]
    assert cache.memory_table("key").splitlines()[1:3] == [
        "block_output       0        96 B",
        "block_output       2        96 B",
    ]
    with pytest.raises(iv.CacheError, match="by='layer' is unknown"):
        cache.memory_table("layer")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (7e15, "7000.0 TB"),
    ],
)
def test_units_are_decimal_and_fit_their_numbers(size, text):
    assert format_bytes(int(size)) == text


def test_a_cache_does_not_keep_the_model():
    import gc
    import weakref

    model = tiny("llama")
    cache = iv.collect(
        model, tiny_inputs(model), "block_output", gradients_of=lambda output: output.logits[:, 0, 0]
    )
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(cache) == 7


def test_filler_is_told_from_tokens():
    axis = TokenAxis(torch.tensor([[0, 1], [2, -1]]))
    assert axis.filled
    assert axis.real.tolist() == [[True, True], [True, False]]
