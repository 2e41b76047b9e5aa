"""`transformers.Trainer` trains, evaluates and saves interventions with a collator, a loss and metrics of ours."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

import intervenable as iv
from intervenable import training
from tiny_models import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
SOURCES = [[15, 16, 17, 18], [19, 20], [21, 22, 23], [24, 25]]
ROWS = {"input_ids": PROMPTS, "source_input_ids": SOURCES, "labels": [1, 2, 3, 1]}
TOKENS = [[-100, 6, 7], [-100, -100, -100, 11, 12], [-100, 14], [-100, 16, -100]]


class LeftPadding:
    """As much of a tokenizer as padding asks for."""

    padding_side, pad_token_id = "left", 3

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def das(lm, tokenizer=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        entry = iv.RepresentationConfig(1, "block_output", low_rank_dimension=4)
        return iv.IntervenableModel(
            iv.IntervenableConfig([entry], iv.LowRankRotatedSpaceIntervention), lm, tokenizer=tokenizer
        )


def trainer_of(model, folder, rows=ROWS, **options):
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.05,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "epoch",
        **options,
    }
    model.disable_model_gradients()
    data = datasets.Dataset.from_dict(rows)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data,
        data_collator=training.Collator(model, unit_locations="last"),
        compute_loss_func=training.compute_loss,
        compute_metrics=training.compute_metrics,
    )


@pytest.mark.parametrize("tokenizer", [None, LeftPadding()])
def test_a_trainer_ends_where_ours_does_and_measures_and_saves_the_same(tmp_path, tokenizer):
    lm = tiny("llama")
    ours, theirs = das(lm, tokenizer), das(lm, tokenizer)
    done = training.train(
        ours, ROWS, unit_locations="last", optimizer="sgd", lr=0.5, schedule="constant", warmup=0, epochs=3,
        batch_size=3, accumulate=2,
    )  # fmt: skip
    # Of four rows, so a step of three and one: the mean over four, not the mean of means.
    trainer = trainer_of(
        theirs,
        tmp_path,
        optim="sgd",
        learning_rate=0.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    (ours_weight,), (weight,) = ours.parameters(), theirs.parameters()
    assert_close(weight, ours_weight, atol=1e-5, rtol=1e-4)
    assert (weight - next(das(lm).parameters())).norm() > 0.01
    measured = trainer.evaluate()
    assert_close(measured["eval_loss"], done.final["loss"], atol=1e-4, rtol=1e-4)
    assert_close(measured["eval_iia"], done.final["iia"], atol=1e-6, rtol=0)
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(saved) == set(theirs.state_dict())
    assert torch.equal(next(iter(saved.values())), weight)


def test_a_trainer_that_resumes_ends_with_the_same_weights(tmp_path):
    lm = tiny("llama")
    whole, resumed = das(lm), das(lm)
    trainer_of(whole, tmp_path).train()
    trainer_of(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(next(resumed.parameters()), next(whole.parameters()), atol=1e-7, rtol=0)


def test_labels_of_tokens_are_averaged_over_tokens_as_the_trainer_counts_them(tmp_path):
    model = das(tiny("llama"))
    rows = {**ROWS, "labels": TOKENS}
    trainer = trainer_of(model, tmp_path, rows, per_device_eval_batch_size=4)
    sums = training.evaluate(
        model,
        rows,
        unit_locations="last",
        metric=lambda z, y: training.cross_entropy(z, y) * (y != -100).sum(1),
    )
    asked = sum(label != -100 for row in TOKENS for label in row)
    assert_close(trainer.evaluate()["eval_loss"], float(sums.per_example.sum()) / asked, atol=1e-4, rtol=1e-4)


def test_a_batch_says_what_the_logits_at_each_place_predict():
    model = das(tiny("llama"), LeftPadding())
    batch = training.Collator(model)([{key: value[row] for key, value in ROWS.items()} for row in (0, 2)])
    assert batch["labels"].tolist() == [[-100, -100, 1], [-100, -100, 3]]
    assert batch["base"]["input_ids"].tolist() == [[5, 6, 7], [3, 13, 14]]
    assert batch["use_cache"] is False
    tokens = [{"input_ids": PROMPTS[1], "source_input_ids": SOURCES[1], "labels": TOKENS[1]}]
    assert training.Collator(model)(tokens)["labels"].tolist() == [[-100, -100, 11, 12, -100]]


def test_classifiers_are_trained_too(tmp_path):
    model = das(tiny("llama", head="classifier"))
    trainer = trainer_of(model, tmp_path, num_train_epochs=1)
    trainer.train()
    ours = training.evaluate(model, ROWS, unit_locations="last")
    assert_close(trainer.evaluate()["eval_iia"], ours.value, atol=1e-6, rtol=0)


def test_columns_that_the_trainer_removed_are_asked_for(tmp_path):
    trainer = trainer_of(das(tiny("llama")), tmp_path, remove_unused_columns=True)
    with pytest.raises(iv.DatasetError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "the batch has no column 'input_ids', the inputs of the base. It has: labels. A Trainer removes what the"
        " model does not take by name, unless it is told not to: TrainingArguments(remove_unused_columns=False)."
    )


def test_labels_that_do_not_fit_the_logits_are_refused():
    lm = tiny("llama")
    model = das(lm)
    output = model(torch.tensor([[5, 6, 7]]), [torch.tensor([[8, 9, 10]])], {"sources->base": 0})
    with pytest.raises(iv.InputError, match="There are no labels"):
        training.compute_loss(output, None)
    with pytest.raises(iv.InputError, match=r"The labels have shape \(1, 2\), and the logits \(1, 3, 72\)"):
        training.compute_loss(output, torch.tensor([[1, 2]]))


def test_other_fields_of_a_config_are_refused_still():
    config = iv.IntervenableConfig([iv.RepresentationConfig(1, "block_output")])
    config.use_cache = False
    assert config == iv.IntervenableConfig([iv.RepresentationConfig(1, "block_output")])
    assert "use_cache" not in config.model_dump()
    with pytest.raises(ValueError, match="use_cahce"):
        config.use_cahce = False
