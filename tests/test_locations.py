"""Unit locations: every form in which users write positions and heads, and what it means."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import intervenable as iv
from intervenable.inputs import RunInputs
from intervenable.locations import Subject, read_locations
from intervenable.units import Skipped, Units, Whole
from tiny_models import HEADS, HIDDEN, PAD, tiny

LENGTH = 4
HEAD_WIDTH = HIDDEN // HEADS
NAME = "layer_0.block_output.pos"

law = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def gpt2():
    return tiny("gpt2", head="base")


def ids(batch: int = 2, length: int = LENGTH, seed: int = 0):
    return torch.randint(3, 72, (batch, length), generator=torch.Generator().manual_seed(seed))


def zeroed(language_model, unit_locations, base=None, entries=None, **options) -> list[set[int]]:
    """For each example the positions at which a zeroing of layer 0's output arrives as zero in layer 1."""
    base = {"input_ids": ids()} if base is None else base
    model = iv.IntervenableModel(
        entries or iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention), language_model
    )
    arrived = []
    watch = language_model.h[1].register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
    try:
        model(base, unit_locations=unit_locations, **options)
    finally:
        watch.remove()
    # The last run: before the first left-padded one the library may try out what the model does about padding.
    return [set((row == 0).all(-1).nonzero().flatten().tolist()) for row in arrived[-1]]


# --- short forms and the full one -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "positions"),
    [
        (1, [{1}, {1}]),
        (0, [{0}, {0}]),
        (-1, [{3}, {3}]),
        ([0, 1, 2], [{0, 1, 2}] * 2),
        ([0, 1], [{0, 1}] * 2),  # a list is a set of positions, never a pair
        ([3], [{3}, {3}]),
        ([-1, 0], [{0, 3}] * 2),
        (range(1, 3), [{1, 2}] * 2),
        (slice(1, None), [{1, 2, 3}] * 2),
        ([0, slice(2, 4)], [{0, 2, 3}] * 2),
        (slice(None, None, -2), [{1, 3}] * 2),
        (np.int64(2), [{2}, {2}]),
        (np.array([0, 2]), [{0, 2}] * 2),
        (torch.tensor([0, 2]), [{0, 2}] * 2),
        (torch.tensor(2), [{2}, {2}]),
        (None, [{0, 1, 2, 3}] * 2),
        ([[[0, 1], [0, 1]]], [{0, 1}] * 2),
        ([[[0], [2]]], [{0}, {2}]),
        ([[[0], [1, -1]]], [{0}, {1, 3}]),
        ([[range(2), [slice(1, 3), 0]]], [{0, 1}, {0, 1, 2}]),
        (np.array([[[0], [2]]]), [{0}, {2}]),
        (torch.tensor([[[0], [2]]]), [{0}, {2}]),
        ([torch.tensor([[0], [2]])], [{0}, {2}]),
        (torch.tensor([[True, False, True, False], [False, False, False, True]]), [{0, 2}, {3}]),
        (np.array([[True, False, True, False], [False, False, False, True]]), [{0, 2}, {3}]),
        ([torch.tensor([[True, False, True, False], [False, False, False, True]])], [{0, 2}, {3}]),
        (iv.get_loc(2, batch_size=2), [{2}, {2}]),
        (iv.get_loc([0, 2], batch_size=2), [{0, 2}] * 2),
    ],
)
def test_base_locations_mean_these_positions(gpt2, written, positions):
    assert zeroed(gpt2, {"base": written}) == positions


@pytest.mark.parametrize(
    ("written", "positions"),
    [
        (1, {1}),
        ([0, 1], {0, 1}),
        ((0, 1), {1}),
        ((None, 1), {1}),
        (([0, 1], [2, 3]), {2, 3}),
        ((0, [1, 2]), {1, 2}),
        (([[[0], [0]]], [[[3], [3]]]), {3}),
        ((0, [[[3], [3]]]), {3}),
        ((-1, -2), {2}),
        ((slice(0, 2), slice(2, 4)), {2, 3}),
        (None, {0, 1, 2, 3}),
    ],
)
def test_locations_of_source_and_base_mean_these_positions_of_the_base(gpt2, written, positions):
    assert zeroed(gpt2, {"sources->base": written}) == [positions] * 2


def test_no_locations_at_all_mean_the_whole_tensor(gpt2):
    assert zeroed(gpt2, None) == [{0, 1, 2, 3}] * 2


def hidden_states(language_model, input_ids):
    """Output of layer 0, from a hook of the test's own."""
    seen = []
    watch = language_model.h[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        language_model(input_ids)
    watch.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("written", "pairs"),
    [
        ((0, 3), [[(0, 3)], [(0, 3)]]),
        (2, [[(2, 2)], [(2, 2)]]),
        (([0, 1], [2, 3]), [[(0, 2), (1, 3)]] * 2),
        (([1, 0], [2, 3]), [[(1, 2), (0, 3)]] * 2),
        ((1, [0, 3]), [[(1, 0), (1, 3)]] * 2),
        (([[[0], [-1]]], [[[1], [2]]]), [[(0, 1)], [(3, 2)]]),
        (([[[0], [3, 1]]], [[[1], [2, 0]]]), [[(0, 1)], [(3, 2), (1, 0)]]),
        (([[[0], [3]]], [[[1], [2, 0]]]), [[(0, 1)], [(3, 2), (3, 0)]]),
    ],
)
def test_a_tuple_pairs_source_positions_with_base_positions(gpt2, written, pairs):
    base, source = ids(), ids(seed=1)
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    expected, donor = hidden_states(gpt2, base).clone(), hidden_states(gpt2, source)
    for example, row in enumerate(pairs):
        for there, here in row:
            expected[example, here] = donor[example, there]

    arrived = []
    with torch.no_grad():
        watch = gpt2.h[1].register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
        model({"input_ids": base}, [{"input_ids": source}], {"sources->base": written})
        watch.remove()
    assert_close(arrived[-1], expected, rtol=0, atol=0)


def test_source_and_base_may_differ_in_length(gpt2):
    source = ids(length=7, seed=1)
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    out = model({"input_ids": ids()}, [{"input_ids": source}], {"sources->base": (6, 0)})
    again = model({"input_ids": ids()}, [{"input_ids": source}], {"sources->base": (-1, -4)})
    assert_close(out.intervened[0], again.intervened[0], rtol=0, atol=0)
    with pytest.raises(iv.LocationRangeError, match=r"^Position 6 in the base locations of"):
        model({"input_ids": ids()}, [{"input_ids": source}], {"sources->base": 6})


# --- several interventions --------------------------------------------------------------------------------


def both(first: int = 0, second: int = 0):
    return [
        iv.RepresentationConfig(first, intervention_type=iv.ZeroIntervention, name="one"),
        iv.RepresentationConfig(second, intervention_type=iv.ZeroIntervention, name="two"),
    ]


@pytest.mark.parametrize(
    ("written", "positions"),
    [
        (2, [{2}, {2}]),
        ([0, 1], [{0, 1}] * 2),
        ([[[0], [1]], [[2], [3]]], [{0, 2}, {1, 3}]),
        ([None, [[2], [3]]], [{2}, {3}]),
        ([[[0], [1]], None], [{0}, {1}]),
        ([None, None], [set(), set()]),
        ([torch.tensor([[0], [1]]), None], [{0}, {1}]),
    ],
)
def test_the_full_form_has_an_entry_for_each_intervention_and_none_skips(gpt2, written, positions):
    assert zeroed(gpt2, {"base": written}, entries=both()) == positions


def test_a_skipped_intervention_is_told_in_the_receipt(gpt2):
    model = iv.IntervenableModel(both(), gpt2)
    receipt = model({"input_ids": ids()}, unit_locations={"base": [None, [[2], [3]]]}).receipt
    assert receipt.skipped == ("one",)
    assert {line.name for line in receipt} == {"two"}


# --- padding ----------------------------------------------------------------------------------------------


LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
RIGHT = LEFT.flip(-1)


@pytest.mark.parametrize(
    ("mask", "written", "positions"),
    [
        (LEFT, 0, [{0}, {2}]),
        (LEFT, -1, [{3}, {3}]),
        (RIGHT, -1, [{3}, {1}]),
        (RIGHT, 1, [{1}, {1}]),
        (LEFT, [[[3], [1]]], [{3}, {3}]),
        (LEFT, slice(1, None), [{1, 2, 3}, {3}]),
        (RIGHT, slice(1, None), [{1, 2, 3}, {1}]),
        # A mask is of the tensor as it is, padding and all.
        (LEFT, torch.tensor([[True, False, False, False], [True, False, True, False]]), [{0}, {0, 2}]),
    ],
)
def test_positions_count_the_real_tokens_of_each_example(gpt2, mask, written, positions):
    base = {"input_ids": ids().masked_fill(mask == 0, PAD), "attention_mask": mask}
    assert zeroed(gpt2, {"base": written}, base) == positions


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_positions_may_count_the_tensor_instead(gpt2, mask):
    base = {"input_ids": ids().masked_fill(mask == 0, PAD), "attention_mask": mask}
    assert zeroed(gpt2, {"base": [0, 3]}, base, relative_to="tensor") == [{0, 3}] * 2


def test_padding_has_no_positions(gpt2):
    base = {"input_ids": ids().masked_fill(LEFT == 0, PAD), "attention_mask": LEFT}
    with pytest.raises(iv.LocationRangeError) as caught:
        zeroed(gpt2, {"base": 2}, base)
    assert str(caught.value) == (
        f"Position 2 in the base locations of '{NAME}' is out of range for example 1, which has positions 0 to 1 (or"
        " -2 to -1)."
    )


# --- heads ------------------------------------------------------------------------------------------------


def test_get_loc_writes_the_full_form():
    assert iv.get_loc(4) == [[[4]]]
    assert iv.get_loc([0, 3], batch_size=2) == [[[0, 3], [0, 3]]]
    assert iv.get_loc((1, 2)) == [[[[1]], [[2]]]]
    assert iv.get_loc(([1, 2], [0, 3, 2]), batch_size=2) == [[[[1, 2], [1, 2]], [[0, 3, 2], [0, 3, 2]]]]


def values_by_head(language_model, input_ids):
    """Value projection of layer 0, `[b, heads, s, dh]`, from a hook of the test's own."""
    seen = []
    watch = language_model.h[0].attn.c_attn.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.no_grad():
        language_model(input_ids)
    watch.remove()
    values = seen[0][..., 2 * HIDDEN :]
    return values.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)


def collected(language_model, unit, unit_locations):
    entry = iv.RepresentationConfig(0, "head_value_output", unit, intervention_type=iv.CollectIntervention)
    out = iv.IntervenableModel(entry, language_model)({"input_ids": ids()}, unit_locations=unit_locations)
    name = f"layer_0.head_value_output.{unit}"
    return out.collected[name], out.collected_mask.get(name)


def test_heads_and_positions_make_a_grid(gpt2):
    locations = {"base": [[[[1, 2], [1, 2]], [[0, 3, 2], [0, 3, 2]]]]}
    found, mask = collected(gpt2, "h.pos", locations)
    assert found.shape == (2, 2, 3, HEAD_WIDTH)
    assert_close(found, values_by_head(gpt2, ids())[:, [1, 2]][:, :, [0, 3, 2]], rtol=0, atol=0)
    assert mask is None


def test_heads_alone_have_all_positions(gpt2):
    found, _ = collected(gpt2, "h", {"base": [[[1, 2], [1, 2]]]})
    assert found.shape == (2, 2, LENGTH, HEAD_WIDTH)
    assert_close(found, values_by_head(gpt2, ids())[:, [1, 2]], rtol=0, atol=0)
    assert_close(collected(gpt2, "h", {"base": [1, 2]})[0], found, rtol=0, atol=0)
    assert_close(collected(gpt2, "h", {"base": [-3, 2]})[0], found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("written", "positions"), [(1, [1]), (-1, [3]), ([0, 2], [0, 2]), (slice(1, 3), [1, 2])]
)
def test_short_positions_with_heads_mean_every_head(gpt2, written, positions):
    found, _ = collected(gpt2, "h.pos", {"base": written})
    assert_close(found, values_by_head(gpt2, ids())[:, :, positions], rtol=0, atol=0)


def test_heads_and_positions_may_differ_by_example_also_in_number(gpt2):
    values = values_by_head(gpt2, ids())
    found, mask = collected(gpt2, "h.pos", {"base": [[[[1], [0, 3]], [[0, 2], [-1]]]]})
    assert found.shape == (2, 2, 2, HEAD_WIDTH)
    expected, real = torch.zeros_like(found), torch.zeros(2, 2, 2, dtype=torch.bool)
    expected[0, 0], real[0, 0] = values[0, 1, [0, 2]], True
    expected[1, :, 0], real[1, :, 0] = values[1, [0, 3], 3], True
    assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(mask, real)


def test_no_locations_of_heads_are_all_heads(gpt2):
    for unit in ("h", "h.pos"):
        assert_close(collected(gpt2, unit, None)[0], values_by_head(gpt2, ids()), rtol=0, atol=0)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"base": (0, 1)},
            "{'base': (0, 1)} is a tuple, which means a (source, base) pair, but 'base' has no source side. Write a"
            " list for a set of positions: [0, 1].",
        ),
        (
            {"sources->base": (0, 1, 2)},
            "(0, 1, 2) is a tuple of 3, and a tuple is a (source, base) pair. Write a list for a set of positions.",
        ),
        (
            {"base": [[0], [2]]},
            "The base locations [[0], [2]] are lists in a list, which could mean interventions, examples or"
            " positions. Write positions for all as a flat list, or the full form [interventions][examples]"
            "[positions]: [[[0], [2]]] if these are the examples of one intervention.",
        ),
        (
            {"base": 1.0},
            "1.0 among the base locations is not a position: give ints (-1 is the last), slices, names such as"
            " 'last', or parts of the text.",
        ),
        (
            {"base": torch.tensor([1.0])},
            "1.0 among the base locations is not a position: give ints (-1 is the last), slices, names such as"
            " 'last', or parts of the text.",
        ),
        (
            {"base": True},
            "True among the base locations is not a position: give ints (-1 is the last), slices, names such as"
            " 'last', or parts of the text.",
        ),
        (
            {"base": "Spain"},
            f"'Spain' in the base locations of '{NAME}' is looked for in the text of example 0, and there is no"
            " tokenizer to tell it. Give one: IntervenableModel(config, model, tokenizer=...), or say where by ints.",
        ),
        (
            {"base": [None, 1]},
            "None among the base locations is not a position: give ints (-1 is the last), slices, names such as"
            " 'last', or parts of the text. To skip an intervention put None in its place in the full form: [None,"
            " [[4], [4]]].",
        ),
        ({"base": []}, "The base locations are an empty list. Give at least one position, or None to skip."),
        (
            {"base": [[[0], []]]},
            f"The base locations of '{NAME}' name no positions for example 1. Give at least one.",
        ),
        (
            {"base": slice(4, None)},
            f"The base locations of '{NAME}' name no positions for example 0. Give at least one.",
        ),
        (
            {"base": [[[0], [0.5]]]},
            f"0.5 in the base locations of '{NAME}' is not an index: give ints (-1 is the last), slices, names such"
            " as 'last', or parts of the text.",
        ),
        (
            {"base": [[[0]]]},
            f"The base locations of '{NAME}' list positions for 1 examples, and the batch has 2.",
        ),
        (
            {"base": [[[0], [1]], [[0], [1]]]},
            f"The base locations have 2 entries for 1 interventions ({NAME}). Give one for each, None to skip.",
        ),
        (
            {"base": [[[[0]], [[1]]]]},
            f"[0] in the base locations of '{NAME}' is not an index: give ints (-1 is the last), slices, names such"
            " as 'last', or parts of the text.",
        ),
        (
            {"base": torch.ones(2, 3, dtype=torch.bool)},
            f"The base locations of '{NAME}' are a mask of shape (2, 3); a mask is for unit 'pos' and has the shape"
            " (2, 4) of the tokens.",
        ),
        (
            {"base": torch.tensor([[True] * 4, [False] * 4])},
            f"The base locations of '{NAME}' are a mask that names no position for example 1.",
        ),
        (
            {"base": [[[1], [2, 0, -2, 1, -3]]]},
            f"The base locations of '{NAME}' name positions 1, 2 more than once for example 1. Each can be written"
            " once.",
        ),
        (
            [[[0]]],
            "unit_locations is a list. Give a mapping with the key 'sources->base' (a position, or a pair of source"
            " and base locations) or 'base' (base locations alone).",
        ),
        ({}, "unit_locations has the keys none. Allowed: 'sources->base' or 'base', one of them."),
        (
            {"base": 1, "sources->base": 1},
            "unit_locations has the keys 'base', 'sources->base'. Allowed: 'sources->base' or 'base', one of them."
            " Arrow keys between sources belong to the serial mode.",
        ),
        (
            {"source_0->source_1": 1},
            "unit_locations has the keys 'source_0->source_1'. Allowed: 'sources->base' or 'base', one of them. Arrow"
            " keys between sources belong to the serial mode.",
        ),
    ],
)
def test_locations_that_say_nothing_sensible_are_refused(gpt2, written, message):
    with pytest.raises(iv.LocationError) as caught:
        zeroed(gpt2, written)
    assert str(caught.value) == message


def test_faults_of_all_interventions_are_reported_at_once(gpt2):
    with pytest.raises(iv.LocationRangeError) as caught:
        zeroed(gpt2, {"base": [[[0], [9]], [[-9], [0]]]}, entries=both())
    assert str(caught.value) == (
        "2 faults in the locations:"
        "\n- Position 9 in the base locations of 'one' is out of range for example 1, which has positions 0 to 3 (or"
        " -4 to -1)."
        "\n- Position -9 in the base locations of 'two' is out of range for example 0, which has positions 0 to 3 (or"
        " -4 to -1)."
    )


def test_a_position_may_be_read_twice_though_not_written(gpt2):
    entry = iv.RepresentationConfig(0, intervention_type=iv.CollectIntervention)
    found = iv.IntervenableModel(entry, gpt2)(
        {"input_ids": ids()}, unit_locations={"base": [1, 1]}
    ).collected[NAME]
    assert_close(found[:, 0], found[:, 1], rtol=0, atol=0)
    # A source position may be copied to several base positions.
    swap = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    swap({"input_ids": ids()}, {"input_ids": ids(seed=1)}, {"sources->base": ([1, 1], [2, 3])})


def test_heads_and_positions_that_are_not_two_lists_are_refused(gpt2):
    with pytest.raises(iv.LocationError) as caught:
        collected(gpt2, "h.pos", {"base": [[[1], [2], [3]]]})
    assert str(caught.value) == (
        "The base locations of 'layer_0.head_value_output.h.pos' must be two lists, heads and positions (unit"
        " 'h.pos'), not [[1], [2], [3]]."
    )
    with pytest.raises(iv.LocationRangeError) as caught:
        collected(gpt2, "h.pos", {"base": iv.get_loc((HEADS, 0), batch_size=2)})
    assert str(caught.value) == (
        f"Head {HEADS} in the base locations of 'layer_0.head_value_output.h.pos' is out of range for example 0,"
        f" which has heads 0 to {HEADS - 1} (or -{HEADS} to -1)."
    )


@pytest.mark.parametrize(
    "written",
    [
        {"base": [0, -1]},
        {"base": [[[0, -1], [slice(0, 2)]]]},
        {"sources->base": ([[[0, 1], [0, 1]]], [[[-1, 2], [0, 1]]])},
        {"base": torch.tensor([[[0], [-1]]])},
        {"base": np.array([-1, 0])},
    ],
)
def test_what_the_user_wrote_is_not_changed(gpt2, written):
    before = copy.deepcopy(written)
    zeroed(gpt2, written)
    assert repr(written) == repr(before)


# --- properties -------------------------------------------------------------------------------------------


def inputs_of(batch: int, length: int, mask: torch.Tensor | None = None) -> RunInputs:
    return RunInputs((), {}, None, batch, length, mask, None)


def read(written, inputs: RunInputs, unit: str = "pos", heads: int | None = None, writes: bool = False):
    subject = Subject("x", unit, heads, writes)
    (slot,) = read_locations({"base": written}, [subject], inputs, [None])[1]
    return slot


def entries_for(size: int) -> st.SearchStrategy:
    bound = st.none() | st.integers(-size - 2, size + 2)
    slices = st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, -1, -3]))
    return st.integers(-size, size - 1) | slices.filter(lambda one: len(range(size)[one]) > 0)


@law
@given(st.data())
def test_entries_are_pythons_own_indices(data):
    batch, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    rows = [data.draw(st.lists(entries_for(size), min_size=1, max_size=4)) for _ in range(batch)]
    units = read([rows], inputs_of(batch, size))

    numbers = list(range(size))
    for row, found in zip(rows, units.positions, strict=True):
        expected = []
        for entry in row:
            expected += numbers[entry] if isinstance(entry, slice) else [numbers[entry]]
        assert list(found) == expected


@law
@given(st.data())
def test_positions_are_indices_into_the_real_tokens(data):
    length = data.draw(st.integers(1, 8))
    # Any mask with a real token, holes included.
    mask = torch.tensor(
        [data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length).filter(any))]
    )
    real = [index for index, is_real in enumerate(mask[0].tolist()) if is_real]
    row = data.draw(st.lists(entries_for(len(real)), min_size=1, max_size=3))

    (found,) = read([[row]], inputs_of(1, length, mask)).positions

    expected = []
    for entry in row:
        expected += real[entry] if isinstance(entry, slice) else [real[entry]]
    assert list(found) == expected


@law
@given(st.data())
def test_an_entry_outside_is_refused_and_so_is_one_written_twice(data):
    size = data.draw(st.integers(1, 6))
    outside = data.draw(st.integers(size, size + 5) | st.integers(-size - 5, -size - 1))
    with pytest.raises(iv.LocationRangeError):
        read(outside, inputs_of(1, size))
    row = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=5))
    twice = len({entry % size for entry in row}) < len(row)
    if twice:
        with pytest.raises(iv.LocationError, match="more than once"):
            read([[row]], inputs_of(1, size), writes=True)
    else:
        assert isinstance(read([[row]], inputs_of(1, size), writes=True), Units)


@law
@given(st.data())
def test_examples_in_another_order_give_the_units_in_that_order(data):
    batch, size, heads = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 4)),
    )
    order = data.draw(st.permutations(range(batch)))
    mask = torch.tensor(
        [
            data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(any))
            for _ in range(batch)
        ]
    )
    counts = mask.sum(1).tolist()
    positions = [data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=3)) for n in counts]
    chosen = [
        data.draw(st.lists(st.integers(-heads, heads - 1), min_size=1, max_size=3)) for _ in range(batch)
    ]

    straight = read([[chosen, positions]], inputs_of(batch, size, mask), "h.pos", heads)
    turned = read(
        [[[chosen[i] for i in order], [positions[i] for i in order]]],
        inputs_of(batch, size, mask[list(order)]),
        "h.pos",
        heads,
    )

    assert turned.positions == tuple(straight.positions[i] for i in order)
    assert turned.heads == tuple(straight.heads[i] for i in order)
    if straight.real is not None:
        assert torch.equal(turned.real, straight.real[list(order)])


@law
@given(st.data())
def test_ragged_rows_are_filled_up_and_the_mask_says_where(data):
    batch, size = data.draw(st.integers(1, 4)), 6
    rows = [
        data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True))
        for _ in range(batch)
    ]
    units = read([rows], inputs_of(batch, size))

    width = max(map(len, rows))
    assert units.filled["positions"].shape == (batch, width)
    real = torch.ones(batch, width, dtype=torch.bool) if units.real is None else units.real
    assert [index[keep].tolist() for index, keep in zip(units.filled["positions"], real, strict=True)] == rows
    assert units.ragged == (len(set(map(len, rows))) > 1)


def test_slots_say_what_was_left_out():
    inputs = inputs_of(1, 3)
    assert isinstance(read(None, inputs), Whole)
    assert isinstance(read([None], inputs), Skipped)
    with pytest.raises(iv.LocationError) as caught:
        read_locations({"base": 1}, [Subject("x", "pos", None, True)], inputs, [None], relative_to="text")
    assert str(caught.value) == "relative_to='text' is unknown. Allowed: 'tokens', 'tensor'."
