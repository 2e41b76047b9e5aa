"""Comparisons of methods on models in which it is known where a variable is, and what each method can find of it."""

from __future__ import annotations

import math

import pytest
import torch
from planted import WIDTH, Planted, planted_pairs
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable import causal
from intervenable.alignment_comparison import compare_methods
from intervenable.alignment_controls import shuffled_sources, untrained_like
from intervenable.alignment_features import FeatureMaskIntervention, active_part, read_autoencoder
from intervenable.alignment_methods import _hardened, activations
from intervenable.alignment_places import Place
from intervenable.alignment_study import make_study
from tiny_models import tiny

TRAINING = {"epochs": 12, "lr": 0.06}
HERE = {"component": "hidden.output", "unit_locations": {"sources->base": 0}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def dictionary(model: Planted) -> dict[str, torch.Tensor]:
    """An autoencoder with two features for each coordinate of the planted basis, up and down, and a dead one."""
    directions = torch.cat([model.basis, -model.basis, torch.ones(WIDTH, 1)], 1)
    dead = torch.zeros(2 * WIDTH + 1)
    dead[-1] = -1000
    return {"W_enc": directions, "W_dec": directions.T.clone(), "b_enc": dead, "b_dec": torch.zeros(WIDTH)}


@pytest.fixture(scope="module")
def compared(planted):
    return compare_methods(
        planted,
        planted_pairs(planted, 128, 0),
        planted_pairs(planted, 120, 1),
        rank=2,
        sae=dictionary(planted),
        seeds=(0, 1),
        **HERE,
        **TRAINING,
    )


# --- what methods find ------------------------------------------------------------------------------------


def test_methods_that_can_turn_the_basis_find_the_planted_plane(compared):
    for name in ("das", "boundless", "sae"):
        assert compared[name].iia.value > 0.93, name
        assert compared[name].above().low > 0.1, name


def test_methods_that_cannot_do_not(compared):
    assert compared["full"].iia.high < 0.7  # bit C comes along, which is right half the time
    assert compared["dbm"].iia.value < 0.9
    assert compared["pca"].iia.value < 0.5  # noise varies as much


def test_controls_do_not_find_it(compared):
    for method in compared:
        for name in method.controls:
            assert method.control(name).high < 0.9, (method.name, name)


def test_sizes_are_what_is_swapped(compared):
    assert compared["full"].size.tolist() == [WIDTH]
    assert compared["das"].size.tolist() == [2, 2]
    assert all(2 <= size < WIDTH for size in compared["boundless"].size)
    assert all(
        4 <= size <= 10 for size in compared["sae"].size
    )  # two bits, each with two directions, and noise
    assert torch.equal(compared["boundless"].controls["random"].size, compared["boundless"].size)


def test_each_method_has_the_controls_that_make_sense(compared):
    assert {method.name: tuple(method.controls) for method in compared} == {
        "full": ("untrained",),
        "pca": ("random", "untrained"),
        "dbm": ("random", "shuffled", "untrained"),
        "boundless": ("random", "shuffled", "untrained"),
        "das": ("random", "shuffled", "untrained"),
        "sae": ("random", "shuffled", "untrained"),
    }


def test_the_whole_vector_and_no_intervention_are_what_they_are_by_hand(planted, compared):
    rows = planted_pairs(planted, 120, 1)
    swapped = planted(rows["source_input_ids"]).argmax(-1) == rows["labels"]
    untouched = planted(rows["input_ids"]).argmax(-1) == rows["labels"]
    assert torch.equal(compared["full"].per_example[0].bool(), swapped)
    assert torch.equal(compared.baseline[0].bool(), untouched)


def test_pca_is_a_projection_on_the_components_of_all_activations(planted, compared):
    rows, held_out = planted_pairs(planted, 128, 0), planted_pairs(planted, 120, 1)
    seen = torch.cat([rows["input_ids"], rows["source_input_ids"]])  # the hidden layer is the identity
    std = seen.std(0)
    _, vectors = torch.linalg.eigh(torch.cov(((seen - seen.mean(0)) / std).T))
    largest = vectors[:, -2:]
    difference = held_out["source_input_ids"] - held_out["input_ids"]
    swapped = held_out["input_ids"] + (difference / std) @ largest @ largest.T * std
    expected = planted.score(swapped).argmax(-1) == held_out["labels"]
    assert torch.equal(compared["pca"].per_example[0].bool(), expected)


def test_a_random_subspace_is_where_training_begins(planted, compared):
    held_out = planted_pairs(planted, 120, 1)
    for index, seed in enumerate((0, 1)):
        torch.manual_seed(seed)
        basis = nn.init.orthogonal_(torch.empty(WIDTH, 2))
        difference = held_out["source_input_ids"] - held_out["input_ids"]
        swapped = held_out["input_ids"] + difference @ basis @ basis.T
        expected = planted.score(swapped).argmax(-1) == held_out["labels"]
        assert torch.equal(compared["das"].controls["random"].per_example[index].bool(), expected)


def test_the_hand_built_equality_network_is_solved_along_its_own_neuron_alone():
    task = causal.hierarchical_equality()
    net = task.solved_by_hand(distributed=False)
    rows, held_out = task.counterfactual(192, "WX", seed=0), task.counterfactual(100, "WX", seed=1)
    found = compare_methods(
        net.model,
        rows,
        held_out,
        layer=net.layer,
        unit_locations={"sources->base": 0},
        methods=("full", "dbm"),
        controls=("random", "shuffled"),
        epochs=12,
        lr=0.02,
        seeds=(0,),
    )
    # A mask over neurons is enough here: the variable is one of them.
    assert found["dbm"].iia.value == 1
    assert found["dbm"].above("random").low > 0.2
    assert found["dbm"].above("shuffled").low > 0.2
    assert found["full"].iia.value < 0.8
    assert found.unpatched.value == 0.5


def test_a_comparison_runs_on_a_language_model_at_several_tokens():
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 24, 5), generator=generator)
    rows = {"input_ids": ids[0], "source_input_ids": ids[1], "labels": ids[1, :, -1]}
    found = compare_methods(
        model,
        rows,
        rows,
        layer=1,
        unit_locations={"sources->base": ([0, 1], [2, 4])},
        rank=3,
        epochs=1,
        methods=("full", "pca", "dbm", "boundless", "das"),
    )
    width = model.config.hidden_size
    assert found["full"].size.item() == 2 * width
    swap = iv.IntervenableModel(iv.RepresentationConfig(1), model)
    output = swap(ids[0], [ids[1]], {"sources->base": ([0, 1], [2, 4])}).intervened
    right = output.logits[:, -1].argmax(-1) == rows["labels"]
    assert torch.equal(found["full"].per_example[0].bool(), right)
    assert [method.size.item() <= 2 * width for method in found] == [True] * 5


def test_the_same_call_gives_the_same_comparison(planted):
    rows = planted_pairs(planted, 40, 0)
    call = {"methods": ("dbm", "das"), "epochs": 1, **HERE}
    torch.manual_seed(1)
    one = compare_methods(planted, rows, 0.5, **call)
    torch.manual_seed(2)
    other = compare_methods(planted, rows, 0.5, **call)
    for name in ("dbm", "das"):
        assert torch.equal(one[name].per_example, other[name].per_example)
        assert torch.equal(one[name].loss, other[name].loss)
        for control in ("random", "shuffled", "untrained"):
            assert torch.equal(
                one[name].controls[control].per_example, other[name].controls[control].per_example
            )


def test_progress_counts_every_alignment(planted):
    rows = planted_pairs(planted, 20, 0)
    seen: list[tuple[int, int]] = []
    compare_methods(
        planted,
        rows,
        rows,
        methods=("full", "pca", "das"),
        seeds=(0, 1),
        epochs=1,
        progress=lambda *done: seen.append(done),
        **HERE,
    )
    # full, pca, 2 das; random: 2 pca, 2 das; shuffled: 2 das; untrained: 2 of each.
    assert seen == [(done, 16) for done in range(1, 17)]


def test_shares_become_all_or_nothing():
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(5, WIDTH, generator=generator), torch.randn(5, WIDTH, generator=generator)
    mask = iv.SigmoidMaskIntervention(WIDTH, temperature=3.0)
    with torch.no_grad():
        mask.mask.copy_(torch.tensor([0.2, -0.1, 0.0, 3.0, -2.0, 0.01, -0.01, 0.5]))
    assert _hardened(mask) == 4
    taken = torch.tensor([True, False, False, True, False, True, False, True])
    assert_close(mask(base, source).detach(), torch.where(taken, source, base))
    boundless = iv.BoundlessRotatedSpaceIntervention(WIDTH, temperature=0.5)
    with torch.no_grad():
        boundless.intervention_boundaries.fill_(0.4)  # 3.2 of 8
    assert _hardened(boundless) == 3
    basis = boundless.rotation().detach()[:, :3]
    expected = base + (source - base) @ basis @ basis.T
    assert_close(boundless(base, source).detach(), expected, atol=1e-6, rtol=1e-5)


# --- controls ---------------------------------------------------------------------------------------------


def test_shuffling_gives_every_base_the_source_of_another_example():
    rows = {
        "input_ids": list(range(10)),
        "source_input_ids": list(range(10)),
        "source_position": list(range(10)),
        "source_mask": [[True]] * 10,
        "labels": list(range(10)),
    }
    shuffled = shuffled_sources(rows, seed=0)
    assert shuffled["input_ids"] == shuffled["labels"] == list(range(10))
    assert sorted(shuffled["source_input_ids"]) == list(range(10))
    assert all(own != other for own, other in enumerate(shuffled["source_input_ids"]))
    assert shuffled["source_position"] == shuffled["source_input_ids"]
    assert shuffled["source_mask"] is not rows["source_mask"]
    assert shuffled_sources(rows, seed=0) == shuffled
    assert shuffled_sources(rows, seed=1) != shuffled


def test_sources_stay_among_the_examples_of_their_intervention():
    rows = {"source_input_ids": list(range(10)), "intervention_id": [0, 1] * 5}
    shuffled = shuffled_sources(rows, seed=0)["source_input_ids"]
    assert all(own % 2 == other % 2 and own != other for own, other in enumerate(shuffled))


def test_data_without_sources_have_nothing_to_shuffle():
    with pytest.raises(
        iv.ConfigError, match="no column that begins with 'source_', so there is nothing to shuffle"
    ):
        shuffled_sources({"input_ids": [1], "source_mask": [1]}, seed=0)


@pytest.mark.parametrize("make", [lambda: tiny("gpt2"), lambda: iv.MLPClassifier(4, 2, 3), Planted])
def test_an_untrained_model_has_the_same_shapes_and_other_weights(make):
    model = make().train()
    fresh, again, other = (untrained_like(model, seed) for seed in (0, 0, 1))
    assert type(fresh) is type(model)
    assert not fresh.training
    assert model.training
    different = False
    for (name, own), new in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert own.shape == new.shape, name
        assert torch.equal(new, again.state_dict()[name])
        different |= not torch.equal(new, other.state_dict()[name])
    assert different
    assert not torch.equal(
        torch.cat([p.flatten() for p in model.parameters()]),
        torch.cat([p.flatten() for p in fresh.parameters()]),
    )


def test_a_model_whose_beginning_is_unknown_asks_for_a_fresh_one():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(iv.ConfigError) as caught:
        untrained_like(Own(), 0)
    assert str(caught.value) == (
        "It is not known how a Own begins before training (scale has no reset_parameters). Give a model with fresh"
        " weights, untrained_model=..., or leave the control 'untrained' out."
    )


def test_a_given_untrained_model_is_used(planted):
    rows = planted_pairs(planted, 30, 0)
    still = Planted()
    nn.init.zeros_(still.score.weight)
    found = compare_methods(
        planted, rows, rows, methods="full", controls="untrained", untrained_model=still, seeds=(0, 1), **HERE
    )
    # All logits are equal, so the answer is always the first class.
    assert torch.equal(found["full"].controls["untrained"].per_example, (rows["labels"] == 0).float()[None])


# --- features ---------------------------------------------------------------------------------------------


def test_activations_are_those_of_bases_and_sources_at_their_own_places():
    model = tiny("gpt2")
    ids = torch.randint(3, 40, (2, 5, 6), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids[0], "source_input_ids": ids[1], "labels": [0] * 5}
    place = Place("here", {"sources->base": (1, [4])})
    study = make_study(model, rows, rows, "block_output", 0, place, None, {}, 1)
    found = activations(study)
    kept: list[torch.Tensor] = []
    handle = model.transformer.h[0].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(ids[0]), model(ids[1])
    handle.remove()
    assert_close(found, torch.cat([kept[0][:, 4], kept[1][:, 1]]))


def test_features_are_swapped_by_their_shares_and_the_rest_of_the_base_stays(planted):
    tensors = dictionary(planted)
    swap = FeatureMaskIntervention(read_autoencoder(tensors))
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(5, WIDTH, generator=generator), torch.randn(5, WIDTH, generator=generator)
    with torch.no_grad():
        swap.mask.fill_(-1.0)
        swap.mask[[0, WIDTH]] = 1.0  # both directions of the first coordinate
    direction = planted.basis[:, 0]
    expected = base + ((source - base) @ direction)[:, None] * direction
    assert_close(swap(base, source).detach(), expected, atol=1e-5, rtol=1e-4)
    assert [name for name, each in swap.named_parameters() if each.requires_grad] == ["mask"]


def test_features_that_never_change_are_left_out(planted):
    autoencoder = read_autoencoder(dictionary(planted))
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    part = active_part(autoencoder, rows)
    assert part.W_enc.shape == (WIDTH, 2 * WIDTH)
    assert_close(part.encode(rows), autoencoder.encode(rows)[:, :-1])
    with pytest.raises(iv.ConfigError, match="No feature of the autoencoder tells the examples apart"):
        active_part(autoencoder, rows[:1].expand(4, -1))


def test_autoencoders_are_read_from_every_usual_form():
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(4, 6, generator=generator), torch.randn(6, 4, generator=generator)
    biases = torch.randn(6, generator=generator), torch.randn(4, generator=generator)
    rows = torch.randn(9, 4, generator=generator)
    tensors = {"W_enc": encoder, "b_enc": biases[0], "W_dec": decoder, "b_dec": biases[1]}
    plain = torch.relu(rows @ encoder + biases[0])
    centred = torch.relu((rows - biases[1]) @ encoder + biases[0])
    linear = {
        "encoder.weight": encoder.T,
        "encoder.bias": biases[0],
        "decoder.weight": decoder.T,
        "decoder.bias": biases[1],
    }

    class Module(nn.Module):
        def __init__(self, subtracts: bool) -> None:
            super().__init__()
            for name, value in tensors.items():
                setattr(self, name, nn.Parameter(value))
            self.cfg = type("Cfg", (), {"apply_b_dec_to_input": subtracts})()

    for given, expected in (
        (tensors, plain),
        (linear, centred),
        (Module(False), plain),
        (Module(True), centred),
        ({**tensors, "threshold": torch.full((6,), 0.7)}, plain * (plain > 0.7)),
        ({**tensors, "log_threshold": torch.full((6,), math.log(0.7))}, plain * (plain > 0.7)),
        (iv.JumpReLUAutoencoderIntervention(4, 6, **tensors), plain),
    ):
        assert_close(read_autoencoder(given).encode(rows).detach(), expected, atol=1e-5, rtol=1e-4)


def test_what_is_no_autoencoder_is_refused():
    with pytest.raises(iv.ConfigError) as caught:
        read_autoencoder({"W_enc": torch.ones(2, 3), "b_enc": torch.ones(3)})
    assert str(caught.value) == (
        "sae is a dict without W_dec, b_dec. Give an autoencoder's module or state with W_enc, b_enc, W_dec, b_dec"
        " and, if it has one, threshold; or a JumpReLUAutoencoderIntervention."
    )
    tensors = {
        "W_enc": torch.ones(2, 3),
        "b_enc": torch.ones(3),
        "W_dec": torch.ones(2, 3),
        "b_dec": torch.ones(2),
    }
    with pytest.raises(iv.ConfigError, match=r"W_enc of shape \(2, 3\) and W_dec of \(2, 3\)"):
        read_autoencoder(tensors)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ("dass",)}, iv.UnknownNameError, "Unknown method 'dass'. Did you mean 'das'?"),
        ({"controls": ("chance",)}, iv.UnknownNameError, "Unknown control 'chance'."),
        ({"methods": ()}, iv.ConfigError, "methods=[]: give at least one, and each once."),
        (
            {"methods": ("das", "das")},
            iv.ConfigError,
            "methods=['das', 'das']: give at least one, and each once.",
        ),
        (
            {"methods": ("sae",)},
            iv.ConfigError,
            "The method 'sae' needs an autoencoder: give sae=..., or leave the method out.",
        ),
        (
            {"rank": 9},
            iv.ConfigError,
            "rank=9: give a number of directions from 1 to 8, the width of the activation.",
        ),
        ({"sparsity": -1}, iv.ConfigError, "sparsity=-1: give a number from 0 on."),
        ({"seeds": ()}, iv.ConfigError, "seeds=(): give whole numbers from 0 on, each once,"),
        ({"layer": 3}, iv.ConfigError, "leave layer out"),
        ({"epoch": 3}, iv.ConfigError, "Training has no option 'epoch'. Did you mean 'epochs'?"),
        (
            {"evaluation": 1.0},
            iv.ConfigError,
            "evaluation=1.0: give another data set, or a share of the 20 examples",
        ),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(planted, change, error, message):
    rows = planted_pairs(planted, 20, 0)
    call = {"evaluation": rows, "progress": lambda *_: pytest.fail("it was trained"), **HERE, **change}
    with pytest.raises(error) as caught:
        compare_methods(planted, rows, **call)
    assert message in str(caught.value)
