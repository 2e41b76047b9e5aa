"""Collecting from many examples: batches in any form give what the examples give one by one, and means are means."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.testing import assert_close

import intervenable as iv
from tiny_models import PAD, VOCABULARY, tiny

LENGTHS = (7, 4, 6, 5, 7)


def prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows, side="right"):
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(rows):
        where = slice(longest - len(prompt), longest) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model, rows, names, **options):
    """For each activation a list with what each prompt gives alone."""
    caches = [iv.collect(model, {"input_ids": row[None]}, names, **options) for row in rows]
    return {key: [cache[key][0] for cache in caches] for key in caches[0]}


NAMES = ["block_output", "attention_pattern", "head_value_output"]


def as_one_batch(rows):
    return padded(rows), {}


def as_parts(rows):
    return padded(rows, "left"), {"batch_size": 2}


def as_list_of_batches(rows):
    return [padded(rows[:2]), padded(rows[2:], "left")], {"ragged": "pad"}


def as_generator(rows):
    return ({"input_ids": row[None]} for row in rows), {"ragged": "pad"}


def as_dataset(rows):
    return datasets.Dataset.from_dict(
        {"input_ids": [row.tolist() for row in rows], "label": [0] * len(rows)}
    ), {
        "batch_size": 2,
        "ragged": "pad",
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("form", [as_one_batch, as_parts, as_list_of_batches, as_generator, as_dataset])
def test_batches_in_any_form_give_what_their_examples_give_alone(family, form):
    model = tiny(family)
    rows = prompts()
    inputs, options = form(rows)
    cache = iv.collect(model, inputs, NAMES, layers=[0, 2], **options)
    for key, expected in one_by_one(model, rows, NAMES, layers=[0, 2]).items():
        found = cache.by_example(key)
        assert len(found) == len(rows)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_batches_of_other_lengths_are_an_error_unless_that_is_allowed():
    model = tiny("llama")
    batches = [padded(prompts((7,))), padded(prompts((5,)))]
    with pytest.raises(iv.CacheError) as caught:
        iv.collect(model, batches, "block_output", 0)
    assert str(caught.value) == (
        "block_output of layer 0 is 5 and 7 long on the axis 'position', and cannot be joined. Allow it:"
        ' ragged="pad" or ragged="list".'
    )
    listed = iv.collect(model, batches, "block_output", 0, ragged="list")
    assert [tuple(value.shape) for value in listed["block_output", 0]] == [(7, 16), (5, 16)]


def test_texts_and_datasets_of_texts_are_tokenized():
    tokenizer, model = iv.load_small_lm()
    texts = ["The capital of Spain is", "The capital of Italy is", "Spain"]
    by_text = iv.collect(model, texts, "block_output", 1, positions=-1, tokenizer=tokenizer)
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    expected = one_by_one(model, rows, "block_output", layers=1, positions=-1)["block_output", 1]
    assert_close(by_text["block_output", 1], torch.stack(expected), atol=1e-4, rtol=1e-4)
    table = datasets.Dataset.from_dict({"text": texts, "answer": ["Madrid", "Rome", "?"]})
    by_table = iv.collect(model, table, "block_output", 1, positions=-1, tokenizer=tokenizer, batch_size=2)
    assert_close(by_table["block_output", 1], by_text["block_output", 1], atol=1e-4, rtol=1e-4)
    with pytest.raises(iv.InputError, match="inputs are texts, which need a tokenizer"):
        iv.collect(model, texts, "block_output")
    with pytest.raises(iv.InputError, match=r"columns answer, of which \w+ takes none, and none of them"):
        iv.collect(model, datasets.Dataset.from_dict({"answer": [1, 2]}), "block_output", tokenizer=tokenizer)


def test_positions_of_each_example_are_dealt_out_to_the_batches():
    model = tiny("llama")
    rows = prompts((6, 6, 6, 6, 6))
    positions = [[0], [1], [2], [3], [5]]
    whole = iv.collect(model, padded(rows), "block_output", 1, positions=positions)
    for inputs, options in (as_parts(rows), as_generator(rows), ([padded(rows[:3]), padded(rows[3:])], {})):
        cache = iv.collect(model, inputs, "block_output", 1, positions=positions, **options)
        assert cache.positions["block_output", 1].tolist() == positions
        assert_close(cache["block_output", 1], whole["block_output", 1], atol=1e-5, rtol=1e-4)
    with pytest.raises(iv.LocationError, match="Positions are given for 4 examples, and there are 5"):
        iv.collect(model, padded(rows), "block_output", 1, positions=positions[:4], batch_size=2)


def test_examples_with_other_numbers_of_units_join_without_being_asked_within_a_batch():
    model = tiny("llama")
    cache = iv.collect(model, padded(prompts((6, 6))), "block_output", 1, positions=[[0, 2], [1]])
    assert cache.positions["block_output", 1].tolist() == [[0, 2], [1, -1]]


@pytest.mark.parametrize("sources", [1, 5])
def test_sources_go_with_their_examples_or_with_all(sources):
    model = tiny("llama")
    base, source = padded(prompts((6,) * 5)), padded(prompts((6,) * sources, seed=1))
    swap = iv.IntervenableModel([iv.RepresentationConfig(0, "block_output")], model)
    where = {"sources->base": 2}
    whole = iv.collect(swap, base, "block_output", sources=[source], unit_locations=where)
    parts = iv.collect(swap, base, "block_output", sources=[source], unit_locations=where, batch_size=2)
    expected = iv.collect(model, source, "block_output", 0)["block_output", 0][:, 2].expand(5, -1)
    assert torch.equal(whole["block_output", 0][:, 2], expected)
    assert_close(parts["block_output", 2], whole["block_output", 2], atol=1e-5, rtol=1e-4)


def test_interventions_act_in_every_batch():
    model = tiny("llama")
    rows = prompts((6, 6, 6))
    edited = iv.IntervenableModel(
        [iv.RepresentationConfig(1, "block_output", intervention=lambda base: base * 2)], model
    )
    cache = iv.collect(edited, padded(rows), "block_output", 1, batch_size=1, unit_locations={"base": 2})
    plain = iv.collect(model, padded(rows), "block_output", 1)["block_output", 1]
    plain[:, 2] *= 2
    assert_close(cache["block_output", 1], plain, atol=1e-5, rtol=1e-4)


# --- means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_mean_over_examples_does_not_depend_on_how_they_come(size):
    model = tiny("llama")
    rows = prompts((6,) * 5)
    whole = iv.collect(model, padded(rows), NAMES)
    mean = iv.collect(model, padded(rows), NAMES, average="examples", batch_size=size)
    for key, value in whole.items():
        assert_close(mean[key], value.mean(0), atol=1e-6, rtol=1e-5)
        assert mean.axes[key] == whole.axes[key][1:]
    assert mean.positions["block_output", 0].tolist() == list(range(6))


def test_examples_weigh_the_same_in_batches_of_other_sizes():
    model = tiny("llama")
    rows = prompts((6,) * 5)
    batches = [padded(rows[:4]), padded(rows[4:])]
    mean = iv.collect(model, batches, "block_output", 1, average="examples")
    whole = iv.collect(model, padded(rows), "block_output", 1)
    assert_close(mean["block_output", 1], whole["block_output", 1].mean(0), atol=1e-6, rtol=1e-5)


def test_the_mean_over_tokens_counts_each_real_token_once():
    model = tiny("llama")
    rows = prompts()
    cache = iv.collect(
        model, as_list_of_batches(rows)[0], ["block_output", "head_value_output"], 1, average="tokens"
    )
    alone = one_by_one(model, rows, ["block_output", "head_value_output"], layers=1)
    assert_close(cache["block_output", 1], torch.cat(alone["block_output", 1]).mean(0), atol=1e-5, rtol=1e-4)
    heads = torch.cat(alone["head_value_output", 1], dim=1).mean(1)
    assert_close(cache["head_value_output", 1], heads, atol=1e-5, rtol=1e-4)
    assert cache.axes["head_value_output", 1] == ("head", "head_dim")


def test_means_of_groups_make_examples_of_other_lengths_comparable():
    model = tiny("llama")
    rows = prompts()
    groups = {"start": (0, 1), "end": (-1,)}
    mean = iv.collect(
        model,
        as_generator(rows)[0],
        "block_output",
        1,
        positions=groups,
        group_means=True,
        average="examples",
    )
    alone = one_by_one(model, rows, "block_output", layers=1)["block_output", 1]
    expected = torch.stack([torch.stack([row[:2].mean(0), row[-1]]) for row in alone]).mean(0)
    assert_close(mean["block_output", 1], expected, atol=1e-5, rtol=1e-4)
    assert mean.axes["block_output", 1] == ("group", "hidden")
    assert mean.layouts["block_output", 1].tokens["group"].labels == ("start", "end")


def test_there_is_no_mean_over_examples_of_other_lengths():
    model = tiny("llama")
    with pytest.raises(iv.CacheError, match="has other numbers of tokens in different examples"):
        iv.collect(model, padded(prompts()), "block_output", 1, average="examples")
    batches = [padded(prompts((7,))), padded(prompts((5,)))]
    with pytest.raises(
        iv.CacheError, match=r"has the shape \(5, 16\) .* in one batch and \(7, 16\) .* in another"
    ):
        iv.collect(model, batches, "block_output", 1, average="examples")
    with pytest.raises(iv.CacheError, match=r"input_ids is torch.int64 and has no mean"):
        iv.collect(model, padded(prompts((5, 5))), ["input_ids", "block_output"], 1, average="examples")
    with pytest.raises(iv.CacheError, match="has no position axis"):
        iv.collect(model, padded(prompts((5, 5))), "attention_pattern", 1, average="tokens")


def test_means_of_half_precision_are_kept_wide():
    model = tiny("llama", dtype=torch.bfloat16)
    rows = prompts((4,) * 40)
    mean = iv.collect(model, padded(rows), "block_output", 2, average="examples", batch_size=1)
    exact = iv.collect(model, padded(rows), "block_output", 2, dtype=torch.float64, batch_size=1)
    assert mean["block_output", 2].dtype == torch.float32
    assert_close(mean["block_output", 2], exact["block_output", 2].mean(0).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "inputs has no examples"),
        (3, {}, "inputs is a int. Give what the model takes"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, {"batch_size": 0}, "batch_size is 0."),
    ],
)
def test_what_is_no_input_is_refused(inputs, options, message):
    with pytest.raises(iv.InputError) as caught:
        iv.collect(tiny("llama"), inputs, "block_output", **options)
    assert message in str(caught.value)


def test_what_is_made_of_each_batch_is_averaged_in_the_place_of_what_was_read():
    model = tiny("llama")
    rows = prompts((6,) * 5)
    names = ["attention_pattern", "head_value_output"]

    def weighted(cache):
        vectors = iv.head_vectors(model, 1, cache["head_value_output", 1])
        pattern = iv.value_weighted_pattern(cache["attention_pattern", 1], vectors)
        return iv.ActivationCache({("value_weighted_pattern", 1): pattern})

    mean = iv.collect(model, padded(rows), names, 1, transform=weighted, average="examples", batch_size=2)
    whole = weighted(iv.collect(model, padded(rows), names, 1))["value_weighted_pattern", 1]
    assert list(mean) == [("value_weighted_pattern", 1)]
    assert mean.axes["value_weighted_pattern", 1] == ("head", "query", "key")
    assert_close(mean["value_weighted_pattern", 1], whole.mean(0), atol=1e-5, rtol=1e-4)
