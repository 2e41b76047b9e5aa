"""Sweeps of alignments find what was planted, go on after a kill, and give the same in several processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Planted, failing_loss, planted_pairs, squared_loss
from torch.testing import assert_close

import intervenable as iv
from intervenable.alignment_sweep import sweep_alignments
from intervenable.alignment_sweep_result import AlignmentSweep
from intervenable.sweep_checkpoints import Checkpoints
from intervenable.training_evaluation import evaluate
from intervenable.training_loop import train
from tiny_models import tiny

TRAINING = {"epochs": 1, "batch_size": 16, "lr": 0.01}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def token_pairs(count: int = 24, seed: int = 0, length: int = 5) -> dict[str, list[object]]:
    """Counterfactuals of random tokens, of two lengths, with the place of a token in base and source."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> list[list[int]]:
        return [
            torch.randint(3, 40, (length - row % 2,), generator=generator).tolist() for row in range(count)
        ]

    base, source = drawn(), drawn()
    return {
        "input_ids": base,
        "source_input_ids": source,
        "labels": torch.randint(3, 40, (count,), generator=generator).tolist(),
        "subject": [row % 3 for row in range(count)],
        "source_subject": [(row + 1) % 3 for row in range(count)],
    }


def mlp_pairs(model: iv.MLPClassifier, count: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """Counterfactuals whose answer is that of the source."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    base, source = (torch.randn(count, width, generator=generator) for _ in range(2))
    return {"input_ids": base, "source_input_ids": source, "labels": model(source).argmax(-1)}


@pytest.fixture(scope="module")
def mlp() -> iv.MLPClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return iv.MLPClassifier(width=6, layers=3, classes=3)


def same(one: AlignmentSweep, other: AlignmentSweep) -> bool:
    return (
        torch.equal(one.per_example, other.per_example)
        and torch.equal(one.loss.nan_to_num(-1), other.loss.nan_to_num(-1))
        and (one.layers, one.positions, one.ranks, one.seeds)
        == (other.layers, other.positions, other.ranks, other.seeds)
        and one.settings == other.settings
    )


# --- what it finds ----------------------------------------------------------------------------------------


def test_a_planted_plane_is_found_at_its_rank_and_not_below(planted):
    train_rows, test_rows = planted_pairs(planted, 128, 0), planted_pairs(planted, 100, 1)

    sweep = sweep_alignments(
        planted,
        train_rows,
        test_rows,
        component="hidden.output",
        positions=0,
        ranks=(1, 2, "random 2", "full"),
        seeds=(0, 1),
        epochs=12,
        lr=0.06,
    )

    one, two, random, full = sweep.iia.flatten().tolist()
    assert two > 0.93
    assert random < 0.6
    assert not torch.equal(*sweep.per_example[0, 0, 2])  # each seed has directions of its own
    # One direction has at most one of the two bits; the whole vector brings bit C of the source, right half the time.
    assert one < 0.7
    given_by_hand = planted(test_rows["source_input_ids"]).argmax(-1) == test_rows["labels"]
    assert full == pytest.approx(given_by_hand.float().mean().item())
    assert sweep.cell(rank=2).iia.low > sweep.cell(rank=1).iia.high
    assert sweep.layers == (None,)


def test_a_cell_is_what_train_and_evaluate_give_for_it_alone(mlp):
    rows, held_out = mlp_pairs(mlp), mlp_pairs(mlp, 20, seed=1)
    sweep = sweep_alignments(mlp, rows, held_out, ranks=(1, 2), seeds=(3, 4), **TRAINING)
    for layer, (number, rank), (index, seed) in itertools.product(
        range(3), enumerate((1, 2)), enumerate((3, 4))
    ):
        torch.manual_seed(seed)
        representation = iv.RepresentationConfig(layer, "block_output", low_rank_dimension=rank)
        alone = iv.IntervenableModel(
            iv.IntervenableConfig(representation, iv.LowRankRotatedSpaceIntervention), mlp
        )
        trained = train(alone, rows, unit_locations={"sources->base": "last"}, seed=seed, **TRAINING)
        expected = evaluate(alone, held_out, unit_locations={"sources->base": "last"})
        assert torch.equal(sweep.per_example[layer, 0, number, index], expected.per_example)
        assert_close(sweep.loss[layer, 0, number, index].item(), trained.final["loss"])


def test_a_cell_does_not_depend_on_the_others_of_its_sweep(mlp):
    rows = mlp_pairs(mlp)
    torch.manual_seed(5)
    large = sweep_alignments(mlp, rows, rows, ranks=(1, 2), seeds=(0, 1), **TRAINING)
    torch.manual_seed(6)
    small = sweep_alignments(mlp, rows, rows, layers=2, ranks=2, seeds=1, **TRAINING)
    assert torch.equal(large.per_example[2, 0, 1, 1], small.per_example[0, 0, 0, 0])
    assert large.loss[2, 0, 1, 1] == small.loss[0, 0, 0, 0]


def test_the_restart_of_the_lowest_training_loss_is_kept(mlp):
    rows, held_out = mlp_pairs(mlp), mlp_pairs(mlp, 20, seed=1)
    options = {"layers": 0, "ranks": 1, **TRAINING}
    singles = [
        sweep_alignments(mlp, rows, held_out, seeds=seed, **options) for seed in (0, 10_000, 20_000, 30_000)
    ]
    best = min(singles, key=lambda sweep: sweep.loss.item())
    assert len({sweep.loss.item() for sweep in singles}) == 4
    kept = sweep_alignments(mlp, rows, held_out, seeds=0, restarts=4, **options)
    assert torch.equal(kept.per_example, best.per_example)
    assert kept.loss.item() == best.loss.item()


def test_positions_are_entries_pairs_and_columns():
    model = tiny("llama")
    rows = token_pairs()
    sweep = sweep_alignments(
        model,
        rows,
        rows,
        layers=[1],
        positions={"last": "last", "the subject": "subject", "crossed": (0, 2), "two": [0, 1]},
        ranks="full",
    )
    assert sweep.positions == ("last", "the subject", "crossed", "two")
    config = iv.IntervenableConfig(iv.RepresentationConfig(1), iv.VanillaIntervention)
    swap = iv.IntervenableModel(config, model)
    by_hand = {
        "last": lambda base, source, row: ([len(source) - 1], [len(base) - 1]),
        "the subject": lambda base, source, row: ([(row + 1) % 3], [row % 3]),
        "crossed": lambda base, source, row: ([0], [2]),
        "two": lambda base, source, row: ([0, 1], [0, 1]),
    }
    for number, label in enumerate(sweep.positions):
        for row, (base, source) in enumerate(zip(rows["input_ids"], rows["source_input_ids"], strict=True)):
            there, here = by_hand[label](base, source, row)
            _, output = swap(
                torch.tensor([base]), [torch.tensor([source])], {"sources->base": ([[there]], [[here]])}
            )
            right = int(output.logits[0, -1].argmax()) == rows["labels"][row]
            assert bool(sweep.per_example[0, number, 0, 0, row]) == right


def test_the_columns_of_positions_are_the_default():
    rows = token_pairs()
    named = {**rows, "base_position": rows["subject"], "source_position": rows["source_subject"]}
    model = tiny("gpt2")
    by_default = sweep_alignments(model, named, named, ranks="full")
    assert by_default.positions == ("position",)
    assert torch.equal(
        by_default.per_example,
        sweep_alignments(model, rows, rows, positions="subject", ranks="full").per_example,
    )


def test_one_alignment_over_two_positions_is_as_wide_as_both():
    rows = token_pairs()
    model = tiny("llama")
    sweep = sweep_alignments(model, rows, rows, layers=[0], positions=[[0, 2]], ranks=(3,), **TRAINING)
    assert sweep.positions == ("0, 2",)
    assert sweep.loss.isfinite().all()


def test_interventions_without_a_rank_are_swept_too(mlp):
    rows = mlp_pairs(mlp)
    sweep = sweep_alignments(
        mlp, rows, rows, ranks=None, intervention_type=iv.BoundlessRotatedSpaceIntervention, **TRAINING
    )
    assert sweep.ranks == (None,)
    assert sweep.labels["rank"] == ("learned",)


def test_a_share_of_the_data_can_be_put_aside(mlp):
    rows = mlp_pairs(mlp, 40)
    sweep = sweep_alignments(mlp, rows, 0.25, ranks="full")
    assert sweep.per_example.shape[-1] == 10
    assert sweep.settings["trained_on"] == 30


def test_the_model_is_as_it_was(mlp):
    mlp.train()
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    sweep_alignments(mlp, mlp_pairs(mlp), mlp_pairs(mlp), layers=1, **TRAINING)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert mlp.training
    assert all(each.requires_grad and each.grad is None for each in mlp.parameters())
    mlp.eval()


def test_another_loss_and_metric_reach_the_training(mlp):
    rows = mlp_pairs(mlp)
    sweep = sweep_alignments(mlp, rows, rows, layers=0, loss=squared_loss, metric="probability", **TRAINING)
    assert sweep.metric == "probability"
    assert 0 < sweep.iia.item() < 1
    assert 0 < sweep.loss.item() < 2


# --- killed and resumed -----------------------------------------------------------------------------------


class StopError(Exception):
    """What stands for a kill."""


def test_a_sweep_stopped_after_any_cell_goes_on_to_the_same_result(mlp, tmp_path):
    rows = mlp_pairs(mlp)
    options = {"layers": [0, 2], "ranks": (1, "full"), "seeds": (0, 1), **TRAINING}
    whole = sweep_alignments(mlp, rows, rows, **options)
    for last in range(1, 6):
        folder = tmp_path / str(last)

        def stop(done: int, total: int, last: int = last) -> None:
            assert total == 6
            if done == last:
                raise StopError

        with pytest.raises(StopError):
            sweep_alignments(mlp, rows, rows, checkpoint=folder, progress=stop, **options)
        assert len(list(folder.glob("wave-*.safetensors"))) == last
        assert same(sweep_alignments(mlp, rows, rows, checkpoint=folder, **options), whole)


def test_finished_cells_are_taken_from_the_folder(mlp, tmp_path):
    rows = mlp_pairs(mlp)
    options = {"layers": [0, 1], "ranks": (1,), **TRAINING}
    first = sweep_alignments(mlp, rows, rows, checkpoint=tmp_path, **options)
    # A value that no training gives, put into the second cell by hand.
    import json

    about = json.loads((tmp_path / "sweep.json").read_text())["sweep"]
    with Checkpoints(tmp_path, {k: v for k, v in about.items() if k != "waves"}, about["waves"]) as kept:
        kept.write(1, {"per_example": torch.full((40,), 0.5), "loss": torch.tensor(7.0)})
    again = sweep_alignments(mlp, rows, rows, checkpoint=tmp_path, **options)
    assert torch.equal(again.per_example[0], first.per_example[0])
    assert again.loss.flatten().tolist() == [first.loss[0].item(), 7.0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 0.5}, "training"),
        ({"seeds": (1,)}, "seeds"),
        ({"positions": 0}, "positions"),
        ({"restarts": 2}, "restarts"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(mlp, tmp_path, change, name):
    rows = mlp_pairs(mlp)
    options = {"layers": 0, "ranks": (1,), "seeds": (0,), **TRAINING}
    sweep_alignments(mlp, rows, rows, checkpoint=tmp_path, **options)
    with pytest.raises(iv.StorageError, match=f"has the checkpoints of another sweep: {name} was "):
        sweep_alignments(mlp, rows, rows, checkpoint=tmp_path, **{**options, **change})


def test_a_folder_of_another_model_or_of_other_data_is_refused(mlp, tmp_path):
    rows = mlp_pairs(mlp)
    sweep_alignments(mlp, rows, rows, checkpoint=tmp_path, layers=0, ranks="full")
    other = {**rows, "labels": (rows["labels"] + 1) % 3}
    with pytest.raises(iv.StorageError, match="another sweep: dataset was "):
        sweep_alignments(mlp, other, rows, checkpoint=tmp_path, layers=0, ranks="full")
    fresh = iv.MLPClassifier(width=6, layers=3, classes=3)
    with pytest.raises(iv.StorageError, match="another sweep: weights was "):
        sweep_alignments(fresh, rows, rows, checkpoint=tmp_path, layers=0, ranks="full")


PROGRAM = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_alignment_sweep import TRAINING, mlp_pairs
import intervenable as iv
from intervenable.alignment_sweep import sweep_alignments
torch.manual_seed(0)
mlp = iv.MLPClassifier(width=6, layers=3, classes=3)
rows = mlp_pairs(mlp)
def kill(done, total):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
sweep_alignments(mlp, rows, rows, ranks=(1, 2), checkpoint=sys.argv[1], progress=kill, **TRAINING)
"""


def test_a_killed_sweep_goes_on_to_the_same_result(mlp, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        timeout=300,
        check=False,
    )
    assert ended.returncode == -9
    assert len(list(tmp_path.glob("wave-*.safetensors"))) == 4
    rows = mlp_pairs(mlp)
    resumed = sweep_alignments(mlp, rows, rows, ranks=(1, 2), checkpoint=tmp_path, **TRAINING)
    assert same(resumed, sweep_alignments(mlp, rows, rows, ranks=(1, 2), **TRAINING))


# --- several processes ------------------------------------------------------------------------------------


def test_two_processes_give_what_one_gives(tmp_path):
    model = tiny("gpt2")  # its output embedding is the input one: one tensor under two names
    rows = token_pairs()
    options = {"layers": [0, 2], "positions": "subject", "ranks": (2, "full"), **TRAINING}
    one = sweep_alignments(model, rows, rows, **options)
    seen: list[tuple[int, int]] = []
    two = sweep_alignments(
        model,
        rows,
        rows,
        processes=2,
        checkpoint=tmp_path,
        progress=lambda *done: seen.append(done),
        **options,
    )
    assert same(one, two)
    assert seen == [(done, 4) for done in range(1, 5)]
    # What they kept serves one process too.
    assert same(sweep_alignments(model, rows, rows, checkpoint=tmp_path, **options), one)


@pytest.mark.slow
def test_an_error_in_another_process_is_raised_here(mlp):
    rows = mlp_pairs(mlp)
    with pytest.raises(ArithmeticError) as caught:
        sweep_alignments(mlp, rows, rows, processes=2, loss=failing_loss, **TRAINING)
    assert str(caught.value) == "this loss is never there"
    assert "In a process of the sweep:" in caught.value.__notes__[0]


def test_what_cannot_be_handed_to_another_process_is_refused(mlp):
    rows = mlp_pairs(mlp)
    with pytest.raises(
        iv.ConfigError, match="processes=2 hands model, data and options to other processes, and"
    ):
        sweep_alignments(mlp, rows, rows, processes=2, loss=lambda logits, labels: logits.sum(-1), **TRAINING)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"epoch": 3},
            iv.ConfigError,
            "Training has no option 'epoch'. Did you mean 'epochs'?\nAllowed: loss, metric, optimizer, lr,",
        ),
        (
            {"checkpoint_every": 3},
            iv.ConfigError,
            "checkpoint_every is not an option here: each alignment is trained with its own.",
        ),
        ({"ranks": ()}, iv.ConfigError, "ranks=[]: give at least one, and each once."),
        (
            {"ranks": (0,)},
            iv.ConfigError,
            "0 is no rank. Give a number of directions from 1 on, 'full' for all at once, or 'random 8' for 8 random"
            " ones.",
        ),
        (
            {"ranks": 2, "intervention_type": iv.SigmoidMaskIntervention},
            iv.ConfigError,
            "SigmoidMaskIntervention has no rank to choose, and 2 is given. Give ranks=None, or 'full'.",
        ),
        ({"ranks": 7}, iv.ConfigError, "low_rank_dimension=7 is out of range"),
        ({"layers": [0, -3]}, iv.ConfigError, "layers=[0, -3]: give each layer once, and at least one of 3."),
        ({"layers": 3}, iv.LayerRangeError, "Layer 3 is out of range: MLPClassifier has layers 0 to 2."),
        ({"component": "block_ouput"}, iv.UnknownNameError, "Did you mean 'block_output'?"),
        ({"positions": 1}, iv.LocationRangeError, "Position 1 in the base locations"),
        ({"positions": []}, iv.ConfigError, "positions is empty. Give at least one, such as 'last'."),
        (
            {"positions": [0, 0]},
            iv.ConfigError,
            "Two positions are called '0'. Give them names: positions={'name': ...}.",
        ),
        ({"seeds": (1, 1)}, iv.ConfigError, "seeds=(1, 1): give whole numbers from 0 on, each once,"),
        ({"restarts": 0}, iv.ConfigError, "restarts=0: give a whole number from 1 on."),
        ({"processes": 0}, iv.ConfigError, "processes=0: give a whole number from 1 on."),
        ({"confidence": 95}, iv.ConfigError, "confidence=95: give a number between 0 and 1, such as 0.95."),
        ({"include_model": True}, iv.ConfigError, "include_model trains the model itself,"),
        ({"metric": ["iia", "probability"]}, iv.ConfigError, "An alignment has one figure. Give one metric,"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(mlp, change, error, message):
    rows = mlp_pairs(mlp)
    with pytest.raises(error) as caught:
        sweep_alignments(mlp, rows, rows, progress=lambda *_: pytest.fail("it was trained"), **change)
    assert message in str(caught.value)


def test_a_bound_model_is_refused(mlp):
    rows = mlp_pairs(mlp)
    bound = iv.IntervenableModel(iv.RepresentationConfig(0), mlp)
    with pytest.raises(iv.ConfigError) as caught:
        sweep_alignments(bound, rows, rows)
    assert str(caught.value) == (
        "model is a IntervenableModel. Give the model itself: each alignment gets its own intervention."
    )


def test_an_optimizer_that_exists_already_is_refused(mlp):
    rows = mlp_pairs(mlp)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(
        iv.ConfigError, match=r"optimizer is an object, which belongs to one set of parameters."
    ):
        sweep_alignments(mlp, rows, rows, optimizer=optimizer)


def test_a_place_of_another_size_in_some_examples_is_refused():
    rows = token_pairs(count=4)
    rows["phrase"] = [[0], [0, 1], [1], [0, 1, 2]]
    with pytest.raises(iv.LocationError) as caught:
        sweep_alignments(tiny("llama"), rows, rows, positions="phrase")
    assert (
        "'phrase' has another number of positions in some examples: 1 in row 0 of dataset, 2 in row 1"
        in str(caught.value)
    )


def test_a_column_that_the_held_out_data_lack_is_named():
    rows = token_pairs(count=4)
    lacking = {name: values for name, values in rows.items() if name != "subject"}
    with pytest.raises(iv.ConfigError) as caught:
        sweep_alignments(tiny("llama"), rows, lacking, positions="subject")
    assert str(caught.value) == "evaluation has no column 'subject', which says where 'subject' is."
