"""Examples worked by hand, run through whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import tiny, tiny_inputs

law = settings(deadline=None, max_examples=30)


class Passage(nn.Module):
    """A model whose one part hands on what it gets, so that an edit there is the whole result."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stream(inputs)


def at_stream(**fields):
    return iv.RepresentationConfig(component="stream.output", **fields)


def run(entries, base, sources=None, locations=None, types=iv.VanillaIntervention, **call) -> Tensor:
    """The stream after the edits, `[b, s, d]`; `base` and sources are lists of that shape."""
    model = iv.IntervenableModel(iv.IntervenableConfig(entries, types), Passage())
    tensors = None if sources is None else [torch.tensor(source) for source in sources]
    return model(torch.tensor(base), tensors, locations, **call).intervened


# --- subspaces: C-Ex5, C-Ex6 ------------------------------------------------------------------------------

BASE, SOURCE = [[[1.0, 2.0, 3.0, 4.0]]], [[[10.0, 20.0, 30.0, 40.0]]]


@pytest.mark.parametrize(
    ("partition", "subspaces", "result"),
    [
        (None, [1, 3], [1.0, 20.0, 3.0, 40.0]),
        (None, 2, [1.0, 2.0, 30.0, 4.0]),
        (None, [[[1, 3]]], [1.0, 20.0, 3.0, 40.0]),
        (None, None, [10.0, 20.0, 30.0, 40.0]),
        ([[0, 1], [1, 4]], 1, [1.0, 20.0, 30.0, 40.0]),
        ([[0, 1], [1, 4]], [0], [10.0, 2.0, 3.0, 4.0]),
        ([[0, 1], [1, 4]], [[[0, 1]]], [10.0, 20.0, 30.0, 40.0]),
        ([[0, 1], [1, 4]], [None], [10.0, 20.0, 30.0, 40.0]),
        ([[1, 3], [0, 2, 3]], 0, [1.0, 20.0, 30.0, 4.0]),  # two ints are a range, three are a set
        ([iv.IndexSet([1, 3])], 0, [1.0, 20.0, 3.0, 40.0]),
    ],
)
def test_subspaces_choose_dimensions_or_parts(partition, subspaces, result):
    entry = at_stream(subspace_partition=partition)
    found = run(entry, BASE, [SOURCE], {"sources->base": 0}, subspaces=subspaces)
    assert_close(found, torch.tensor([[result]]), rtol=0, atol=0)


def test_subspaces_of_a_reading_come_in_the_order_given():
    entry = at_stream(intervention_type=iv.CollectIntervention)
    model = iv.IntervenableModel(entry, Passage())
    out = model(torch.tensor(BASE), unit_locations={"base": 0}, subspaces=[2, 0])
    assert_close(out.collected["stream.output.pos"], torch.tensor([[[3.0, 1.0]]]), rtol=0, atol=0)
    assert_close(out.intervened, torch.tensor(BASE), rtol=0, atol=0)


@pytest.mark.parametrize("positions", [1, 2])
def test_ids_belong_to_examples_and_not_to_positions(positions):
    base = torch.arange(1.0, 1 + 2 * positions * 3).view(2, positions, 3).tolist()
    found = run(
        at_stream(),
        base,
        types=iv.ZeroIntervention,
        locations={"base": list(range(positions))},
        subspaces=[[[0], [1]]],
    )
    expected = torch.tensor(base)
    expected[0, :, 0] = 0
    expected[1, :, 1] = 0
    assert_close(found, expected, rtol=0, atol=0)


def test_examples_may_have_different_numbers_of_ids():
    base = [[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]
    found = run(at_stream(), base, types=iv.ZeroIntervention, subspaces=[[[0], [1, 2]]])
    assert_close(found, torch.tensor([[[0.0, 2.0, 3.0]], [[4.0, 0.0, 0.0]]]), rtol=0, atol=0)


def test_ids_of_positions_are_asked_for_by_name():
    base = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]
    per_position = iv.SubspacePerPosition([[0], [1, 2]])
    found = run(at_stream(), base, types=iv.ZeroIntervention, subspaces=[per_position])
    assert_close(found, torch.tensor([[[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]]]), rtol=0, atol=0)


# --- two edits at one place: C-Ex3 and C.17 ---------------------------------------------------------------

THREE = [[[1.0, 2.0, 3.0]]]
TENS, HUNDREDS = [[[10.0, 20.0, 30.0]]], [[[100.0, 200.0, 300.0]]]


def both(link, partition):
    return [at_stream(intervention_link_key=link, subspace_partition=partition) for _ in range(2)]


@pytest.mark.parametrize(
    ("subspaces", "result"),
    [([0, 1], [100.0, 20.0, 30.0]), ([0, 0], [1.0, 200.0, 300.0]), ([1, 0], [10.0, 200.0, 300.0])],
)
def test_linked_swaps_of_parts_compose(subspaces, result):
    found = run(
        both("shared", [[1, 3], [0, 1]]),
        THREE,
        [TENS, HUNDREDS],
        {"sources->base": 0},
        subspaces=[[[ids]] for ids in subspaces],
    )
    assert_close(found, torch.tensor([[result]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("subspaces", "result"), [([0, 0], [100.0, 2.0, 3.0]), ([0, 1], [10.0, 200.0, 300.0])]
)
def test_unlinked_swaps_of_parts_compose(subspaces, result):
    found = run(
        both(None, [[0, 1], [1, 3]]),
        THREE,
        [TENS, HUNDREDS],
        {"sources->base": 0},
        subspaces=[[[ids]] for ids in subspaces],
    )
    assert_close(found, torch.tensor([[result]]), rtol=0, atol=0)


def test_linked_edits_at_two_positions_read_their_own_base():
    """Sharing means weights: the second addition sees base[2], not what the first has written."""
    entries = [at_stream(intervention_link_key=0, source_representation=[1.0, 1.0, 1.0]) for _ in range(2)]
    base = torch.arange(12.0).view(1, 4, 3)
    found = run(entries, base.tolist(), types=iv.AdditionIntervention, locations={"base": [[[1]], [[2]]]})
    expected = base.clone()
    expected[:, [1, 2]] += 1
    assert_close(found, expected, rtol=0, atol=0)


# --- partitions say the same as ids -----------------------------------------------------------------------

PARTS = [[0, 2], [5, 2, 3], [4, 5]]


def made(cls, partition):
    """A representation of which each call gives the same; an instance, for an identity tells no width."""
    if cls is iv.VanillaIntervention:
        return at_stream(subspace_partition=partition)
    sizes = {"low_rank_dimension": 6} if cls is iv.LowRankRotatedSpaceIntervention else {}
    torch.manual_seed(3)
    return at_stream(intervention=cls(embed_dim=6, subspace_partition=partition, **sizes))


@pytest.mark.parametrize(
    "cls", [iv.VanillaIntervention, iv.RotatedSpaceIntervention, iv.LowRankRotatedSpaceIntervention]
)
@law
@given(st.data())
def test_parts_equal_the_ids_they_hold(cls, data):
    chosen = [data.draw(st.lists(st.integers(0, 2), min_size=1, unique=True)) for _ in range(2)]
    ids = [sorted({dim for part in row for dim in ((0, 1), (5, 2, 3), (4,))[part]}) for row in chosen]
    base, source = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    by_part, by_id = (
        iv.IntervenableModel(made(cls, parts), Passage())(
            base, [source], {"sources->base": (1, 2)}, subspaces=[subspaces]
        ).intervened
        for parts, subspaces in ((PARTS, chosen), (None, ids))
    )
    assert_close(by_part, by_id, rtol=0, atol=1e-6)
    assert not torch.allclose(by_part, base)


# --- C-Ex2, C-Ex14 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_editing_what_enters_a_block_equals_editing_what_leaves_the_one_below(family):
    language_model = tiny(family)
    base, source = tiny_inputs(language_model), tiny_inputs(language_model, seed=1)
    results = [
        iv.IntervenableModel(iv.RepresentationConfig(*where), language_model)(
            base, [source], {"sources->base": (2, [1, 3])}
        ).intervened.logits
        for where in ((2, "block_input"), (1, "block_output"))
    ]
    assert_close(results[0], results[1], rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(results[0], language_model(**base).logits, atol=1e-3)


def wide_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=72, n_embd=24, n_layer=3, n_head=4, n_positions=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


IDS = torch.arange(3, 15).view(2, 6)


def test_readings_have_the_shapes_of_what_they_read():
    entries = [
        iv.RepresentationConfig(1, "block_output", intervention_type=iv.CollectIntervention),
        iv.RepresentationConfig(0, "mlp_output", intervention_type=iv.CollectIntervention),
    ]
    model = iv.IntervenableModel(entries, wide_gpt2())
    out = model({"input_ids": IDS}, unit_locations={"base": [[[0], [0]], [[1, 2], [1, 2]]]})
    assert list(out.collected) == ["layer_1.block_output.pos", "layer_0.mlp_output.pos"]
    assert [tuple(value.shape) for value in out.collected.values()] == [(2, 1, 24), (2, 2, 24)]


# --- joint rotations of several units ---------------------------------------------------------------------


def joint(**fields):
    return iv.RepresentationConfig(
        1,
        max_number_of_units=2,
        low_rank_dimension=3,
        intervention_type=iv.LowRankRotatedSpaceIntervention,
        **fields,
    )


def test_a_low_rank_rotation_of_two_units_is_one_matrix_and_is_counted_once_when_linked():
    language_model = wide_gpt2()
    linked = iv.IntervenableModel(
        [joint(intervention_link_key=0), joint(intervention_link_key=0)], language_model
    )
    apart = iv.IntervenableModel([joint(), joint()], language_model)
    assert sum(parameter.numel() for parameter in linked.parameters()) == 144  # 2 units x 24 wide x rank 3
    assert sum(parameter.numel() for parameter in apart.parameters()) == 288


def test_a_joint_rotation_is_the_formula_on_the_concatenated_units():
    language_model = wide_gpt2()
    model = iv.IntervenableModel(joint(), language_model)
    streams = {}
    for name, ids in (("base", IDS), ("source", IDS.flip(-1))):
        with torch.no_grad():
            streams[name] = language_model(ids, output_hidden_states=True).hidden_states[2]
    arrived = []
    watch = language_model.transformer.h[2].register_forward_pre_hook(
        lambda module, args: arrived.append(args[0])
    )
    with torch.no_grad():
        model({"input_ids": IDS}, {"input_ids": IDS.flip(-1)}, {"sources->base": ([0, 3], [1, 4])})
    watch.remove()

    (rotation,) = model.parameters()
    columns = torch.linalg.qr(rotation.detach())[0]
    old = streams["base"][:, [1, 4]].flatten(1)
    difference = streams["source"][:, [0, 3]].flatten(1) - old
    expected = streams["base"].clone()
    expected[:, [1, 4]] = (old + difference @ columns @ columns.mT).view(2, 2, 24)
    assert_close(arrived[-1], expected, rtol=0, atol=1e-5)


def test_gradients_flow_through_two_unlinked_low_rank_edits():
    language_model = wide_gpt2()
    model = iv.IntervenableModel([joint(), joint()], language_model)
    sources = [{"input_ids": IDS.flip(-1)}, {"input_ids": IDS.roll(1, -1)}]
    out = model({"input_ids": IDS}, sources, {"sources->base": ([0, 3], [1, 4])})
    out.intervened.logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert len(gradients) == 2
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_linked_parts_in_either_order_give_the_same_result_and_gradients():
    """Parts of one rotation are at right angles, so swapping one leaves the other as it was."""
    language_model = wide_gpt2()
    entry = {"intervention_link_key": "one rotation", "subspace_partition": [[0, 1], [1, 3]]}
    model = iv.IntervenableModel([joint(**entry), joint(**entry)], language_model)
    (rotation,) = model.parameters()
    sources = [{"input_ids": IDS.flip(-1)}, {"input_ids": IDS.roll(1, -1)}]

    results, gradients = [], []
    for order, inputs in (([0, 1], sources), ([1, 0], sources[::-1])):
        rotation.grad = None
        out = model(
            {"input_ids": IDS},
            inputs,
            {"sources->base": ([0, 3], [1, 4])},
            subspaces=[[[part]] * 2 for part in order],
        )
        out.intervened.logits.square().mean().backward()
        results.append(out.intervened.logits.detach())
        gradients.append(rotation.grad.clone())

    assert_close(results[0], results[1], rtol=0, atol=1e-5)
    assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3
    swapped = model(
        {"input_ids": IDS}, sources, {"sources->base": ([0, 3], [1, 4])}, subspaces=[[[1]] * 2, [[0]] * 2]
    )
    assert (
        swapped.intervened.logits - results[0]
    ).abs().max() > 1e-3  # which source feeds which part matters


# --- on a perceptron --------------------------------------------------------------------------------------


def test_an_activation_without_positions_has_one_position():
    torch.manual_seed(0)
    perceptron = iv.MLPClassifier(width=4, layers=2, classes=3)
    base, source = torch.randn(5, 4), torch.randn(5, 4)
    expected = perceptron.score(perceptron.layers[1](perceptron.layers[0](source)))
    for locations in (None, {"sources->base": 0}, {"sources->base": -1}):
        out = iv.IntervenableModel(iv.RepresentationConfig(0), perceptron)(base, [source], locations)
        assert_close(out.intervened, expected)
    with pytest.raises(iv.LocationRangeError):
        iv.IntervenableModel(iv.RepresentationConfig(0), perceptron)(base, [source], {"sources->base": 1})


def test_parts_of_a_hidden_layer_may_come_from_different_sources():
    torch.manual_seed(0)
    perceptron = iv.MLPClassifier(width=4, layers=2, classes=3)
    base, one, two = torch.randn(3, 5, 4).unbind()
    halves = [iv.RepresentationConfig(0, subspace_partition=[[0, 2], [2, 4]]) for _ in range(2)]
    out = iv.IntervenableModel(halves, perceptron)(base, [one, two], subspaces=[[[0]] * 5, [[1]] * 5])

    hidden = torch.cat([perceptron.layers[0](one)[:, :2], perceptron.layers[0](two)[:, 2:]], dim=1)
    assert_close(out.intervened, perceptron.score(perceptron.layers[1](hidden)))


def test_one_source_serves_two_edits_that_share_no_group():
    found = run(both(None, [[0, 1], [1, 3]]), THREE, [TENS], {"sources->base": 0}, subspaces=[[[0]], [[1]]])
    assert_close(found, torch.tensor(TENS), rtol=0, atol=0)
