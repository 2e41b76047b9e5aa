"""The parts of the engine: row axes, trees of tensors, plans of waves, budgets, and reading a few logits."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from intervenable import ConfigError, UnsupportedModelError, wave_plan
from intervenable.hooks import hooked
from intervenable.wave_budget import bytes_of
from intervenable.wave_plan import Blocks, Costs, leaves_tokens_out, plan_waves
from intervenable.wave_readout import Reading, Readout, furthest, largest, logits_of
from intervenable.wave_rows import (
    NoShortcutError,
    RowAxis,
    mapped,
    row_axes,
    shapes_in,
    tensors_in,
    with_groups,
)
from tiny_models import tiny, tiny_inputs

sizes = st.integers(1, 4)

# --- row axes ---------------------------------------------------------------------------------------------


@given(st.lists(sizes, max_size=4), st.integers(0, 4), sizes)
def test_the_axis_that_grows_with_the_groups_counts_rows(others, place, unit):
    place = min(place, len(others))
    two, three = ([*others[:place], groups * unit, *others[place:]] for groups in (2, 3))
    assert row_axes({("x",): two}, {("x",): three}) == {("x",): RowAxis(place, unit)}


@given(st.lists(sizes, max_size=4))
def test_what_does_not_grow_has_no_row_axis(shape):
    assert row_axes({(0,): shape}, {(0,): shape}) == {(0,): None}


@pytest.mark.parametrize(
    ("two", "three"), [((2, 4), (3, 6)), ((4,), (5,)), ((2, 7), (3, 8)), ((2,), (4,)), ((6,), (6 + 2,))]
)
def test_what_grows_in_another_way_is_no_row_axis(two, three):
    with pytest.raises(NoShortcutError, match="2 groups"):
        row_axes({("mask",): two}, {("mask",): three})


def test_what_is_in_one_of_the_runs_alone_is_not_told_of():
    assert row_axes({(0,): (2, 5), (1,): (2,), (2,): (2, 2)}, {(0,): (3, 5), (2,): (3,)}) == {
        (0,): RowAxis(0, 1)
    }


@given(sizes, sizes)
def test_row_axes_scale_with_the_examples(per_example, batch):
    assert RowAxis(1, per_example * 2).scaled(batch, 2) == RowAxis(1, per_example * batch)


def test_examples_without_a_whole_number_of_entries_are_refused():
    with pytest.raises(NoShortcutError, match="2 examples have 3"):
        RowAxis(0, 3).scaled(1, 2)


@given(st.integers(0, 2), sizes, sizes, sizes, st.integers(0, 3))
def test_a_tensor_is_cut_or_filled_with_its_first_group(axis, unit, there, wanted, seed):
    shape = [2, 3, 2]
    shape[axis] = there * unit
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    groups = list(tensor.split(unit, axis))
    expected = torch.cat([groups[i] if i < there else groups[0] for i in range(wanted)], axis)
    before = tensor.clone()
    assert torch.equal(with_groups(tensor, RowAxis(axis, unit), wanted), expected)
    assert torch.equal(tensor, before)


def test_no_row_axis_leaves_a_tensor_and_no_whole_groups_are_refused():
    tensor = torch.ones(3, 2)
    assert with_groups(tensor, None, 5) is tensor
    assert with_groups(tensor, RowAxis(0, 3), 1) is tensor
    with pytest.raises(NoShortcutError, match="3 rows"):
        with_groups(tensor, RowAxis(0, 2), 2)


# --- trees ------------------------------------------------------------------------------------------------

leaves = st.one_of(st.none(), st.integers(), st.builds(lambda n: torch.full((n,), float(n)), sizes))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=8,
)


def at_path(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@given(trees)
def test_all_tensors_of_a_tree_are_mapped_and_nothing_else(tree):
    places = dict(tensors_in(tree))
    assert shapes_in(tree) == {path: tuple(tensor.shape) for path, tensor in places.items()}
    assert all(at_path(tree, path) is tensor for path, tensor in places.items())
    seen = {}

    def double(path, tensor):
        seen[path] = tensor
        return tensor * 2

    new = mapped(tree, double)
    assert seen.keys() == places.keys()
    assert dict(tensors_in(new)).keys() == places.keys()
    assert all(torch.equal(at_path(new, path), tensor * 2) for path, tensor in places.items())
    assert type(new) is type(tree)


@given(trees)
def test_a_tree_of_which_nothing_changes_is_the_same_object(tree):
    assert mapped(tree, lambda path, tensor: tensor) is tree


def test_lists_and_dictionaries_are_changed_where_they_are_and_tuples_anew():
    Pair = namedtuple("Pair", "left right")
    inner = {"x": torch.ones(1)}
    listed = [torch.ones(2), inner]
    tree = Pair(listed, torch.ones(3))
    new = mapped(tree, lambda path, tensor: tensor + 1)
    assert new.left is listed
    assert listed[1] is inner
    assert inner["x"].item() == 2
    assert isinstance(new, Pair)
    assert new is not tree
    assert tree.right.tolist() == [1, 1, 1]


# --- plans ------------------------------------------------------------------------------------------------

costs = st.builds(
    Costs,
    calls=st.integers(1, 6),
    call=st.floats(0, 500),
    row_bytes=st.integers(1, 50).map(float),
    logit_bytes=st.integers(0, 50).map(float),
)


@st.composite
def sweeps(draw):
    length, batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    cost = draw(costs)
    count = draw(st.integers(0, 40))
    cells = draw(st.permutations(range(count)))
    first = {cell: draw(st.integers(0, length - 1)) for cell in cells}
    joins = {cell: draw(st.integers(-1, cost.calls - 1)) for cell in cells}
    least = batch * (cost.row_bytes * length + cost.logit_bytes)
    memory = int(least * draw(st.floats(1, 60))) + 1
    return first, joins, length, batch, cost, memory


@given(sweeps(), st.booleans())
@settings(max_examples=60)
def test_every_cell_is_in_one_wave_that_begins_early_enough_and_fits(sweep, suffix):
    first, joins, length, batch, cost, memory = sweep
    waves = plan_waves(first, joins, length, batch, cost, memory, suffix)
    assert sorted(cell for wave in waves for cell in wave.cells) == sorted(first)
    for wave in waves:
        assert wave.start == (min(first[cell] for cell in wave.cells) if suffix else 0)
        rows = len(wave.cells) * batch
        assert rows * (cost.row_bytes * (length - wave.start) + cost.logit_bytes) <= memory
        assert [joins[cell] for cell in wave.cells] == sorted(joins[cell] for cell in wave.cells)
    again = plan_waves(dict(sorted(first.items())), joins, length, batch, cost, memory, suffix)
    assert again == waves


def price(waves, joins, length, batch, cost):
    """What waves cost: weights are read once a call, and each row computes its tokens from its call on."""
    return sum(
        cost.calls * (cost.call + (length - wave.start) * batch)
        + sum(cost.calls - max(0, joins[cell]) for cell in wave.cells) * (length - wave.start) * batch
        for wave in waves
    )


@given(sweeps())
@settings(max_examples=40)
def test_waves_cost_no_more_than_one_for_all_or_one_for_each_token(sweep):
    first, joins, length, batch, cost, _ = sweep
    memory = 10**9
    waves = plan_waves(first, joins, length, batch, cost, memory, True)
    if not first:
        assert waves == []
        return
    each = [
        plan_waves({c: t for c, t in first.items() if t == token}, joins, length, batch, cost, memory, True)
        for token in sorted(set(first.values()))
    ]
    together = plan_waves(first, joins, length, batch, Costs(cost.calls, 1e12, 1.0, 0.0), memory, True)
    assert len(together) == 1
    paid = price(waves, joins, length, batch, cost)
    for other in (together, [wave for one in each for wave in one]):
        assert paid <= price(other, joins, length, batch, cost) * (1 + 1e-9)


def plan_of(call):
    first = {cell: cell % 4 for cell in range(48)}
    joins = {cell: cell // 16 for cell in range(48)}
    return plan_waves(first, joins, 5, 1, Costs(3, call, 1.0, 0.0), 10**6, True)


def test_tokens_go_together_where_reading_weights_costs_most_and_apart_where_it_costs_nothing():
    assert [wave.start for wave in plan_of(1e6)] == [0]
    assert [wave.start for wave in plan_of(0.0)] == [0, 1, 2, 3]


def test_a_budget_for_less_than_a_cell_names_one_that_will_do():
    cost = Costs(3, 25.0, 40.0, 8.0)
    first, joins = {0: 0, 1: 3}, {0: 0, 1: 1}
    for suffix in (True, False):
        with pytest.raises(ConfigError, match=r"memory=100 bytes.*2 example.*5 tokens") as caught:
            plan_waves(first, joins, 5, 2, cost, 100, suffix)
        enough = int(str(caught.value).rpartition("Give memory=")[2].split(" ")[0])
        assert len(plan_waves(first, joins, 5, 2, cost, enough, suffix)) == 2


def test_waves_leave_tokens_out_of_large_models_alone(monkeypatch):
    monkeypatch.setattr(wave_plan, "WORTH", 1e6)
    small, large = nn.Linear(10, 10), nn.Linear(1000, 1000)
    assert leaves_tokens_out(Blocks([large, large]), 5)
    assert not leaves_tokens_out(Blocks([small, small]), 5)
    assert leaves_tokens_out(Blocks([small, small]), 10_000)
    monkeypatch.setattr(wave_plan, "WORTH", 0.0)
    assert leaves_tokens_out(Blocks([small]), 5)
    assert not leaves_tokens_out(Blocks([]), 5)


def test_costs_are_those_of_the_blocks():
    block = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    few, many = (Costs.of(Blocks([block] * count), 10, 100) for count in (2, 12))
    assert (few.calls, many.calls) == (2, 12)
    assert few.logit_bytes == 400
    assert Costs.of(Blocks([block]), 1000, 1).row_bytes > Costs.of(Blocks([block]), 10, 1).row_bytes > 64 * 4
    assert (
        Costs.of(Blocks([nn.Linear(2, 2)]), 10, 1).call > Costs.of(Blocks([nn.Linear(900, 900)]), 10, 1).call
    )
    assert few.rows(10**6, 10) == int(10**6 // (few.row_bytes * 10 + 400))


# --- budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, 10**9),
        (5, 5),
        (2.9, 2),
        ("7", 7),
        ("512MB", 512 * 10**6),
        (" 1.5 gb ", 1500 * 10**6),
        ("2KiB", 2048),
        ("1GiB", 2**30),
        ("3b", 3),
        ("2tb", 2 * 10**12),
    ],
)
def test_budgets_are_bytes_or_text(given, expected):
    assert bytes_of(given) == expected


@pytest.mark.parametrize(
    "given",
    ["", "lots", "5 parsecs", "-1GB", "1.2.3MB", ".", "MB", True, [5], 0, -3, 0.5, "0MB", float("nan")],
)
def test_what_is_no_budget_is_refused_with_examples(given):
    with pytest.raises(ConfigError, match=r"memory=.*'500MB' or '2GB'"):
        bytes_of(given)


# --- reading ----------------------------------------------------------------------------------------------


@st.composite
def readings(draw):
    length, vocabulary = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    positions = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    tokens = draw(st.one_of(st.none(), st.sets(st.integers(0, vocabulary - 1), min_size=1).map(sorted)))
    chosen = None if tokens is None else torch.tensor(tokens)
    return Reading(torch.tensor(positions), chosen, length), vocabulary


@given(readings(), st.integers(0, 6))
def test_a_reading_takes_its_positions_and_tokens(reading_of, start):
    reading, vocabulary = reading_of
    logits = torch.arange(2.0 * reading.length * vocabulary).view(2, reading.length, vocabulary)
    tokens = range(vocabulary) if reading.tokens is None else reading.tokens.tolist()
    expected = [
        [[float(logits[e, p, t]) for t in tokens] for p in reading.positions.tolist()] for e in range(2)
    ]
    assert reading.of(logits).tolist() == expected
    start = min(start, reading.length - 1)
    later = [p for p in reading.positions.tolist() if p >= start]
    assert (reading.after(start) + start).tolist() == later
    kept = reading.kept(start)
    assert 1 <= kept <= reading.length - start
    assert all(p >= reading.length - kept for p in later)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tokens", [None, [3, 70]])
def test_logits_that_are_read_are_those_of_the_whole_run(family, narrow, whole, tokens):
    model = tiny(family)
    inputs = tiny_inputs(model)
    reading = Reading(torch.tensor([2, 5]), None if tokens is None else torch.tensor(tokens), 7)
    readout = Readout(model, reading, 0, narrow, whole)
    options = {"logits_to_keep": readout.keep} if readout.keep else {}
    shapes = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(args[0].shape[1])
    )
    with torch.no_grad():
        expected = model(**inputs).logits[:, [2, 5]]
        with hooked(readout.hooks, model):
            found = readout.of(model(**inputs, **options))
    handle.remove()
    expected = expected if tokens is None else expected[..., tokens]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert shapes[-1] == (7 if whole or narrow else 5)  # before our hook, if it is there
    assert readout.keep == (5 if not (whole or narrow) else 0)


def test_what_a_model_gives_first_are_its_logits():
    three = torch.ones(1, 2, 3)
    assert logits_of(three, nn.Linear(1, 1)) is three
    assert logits_of((None, three), nn.Linear(1, 1)) is three
    assert logits_of({"loss": 1.0, "scores": three}, nn.Linear(1, 1)) is three
    assert logits_of(torch.ones(2, 3), nn.Linear(1, 1)).shape == (2, 1, 3)
    with pytest.raises(UnsupportedModelError, match="Linear gives no logits"):
        logits_of(torch.ones(2), nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match="no logits"):
        logits_of({"loss": 1.0}, nn.Linear(1, 1))


def test_differences_of_infinities_are_none_where_they_are_the_same():
    infinite = torch.tensor([1.0, -torch.inf, 3.0])
    assert largest(infinite) == 3
    assert largest(torch.tensor([-torch.inf])) == 0
    assert furthest(infinite, infinite) == 0
    assert furthest(infinite, torch.tensor([1.5, -torch.inf, 3.0])) == 0.5
    assert furthest(infinite, torch.tensor([1.0, 0.0, 3.0])) == torch.inf
    assert furthest(torch.ones(0), torch.ones(0)) == 0
