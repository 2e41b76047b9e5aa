"""What `train` reads: columns in any form, padded and masked, sources by group, places and subspaces by row."""

# ruff: noqa: E501  # messages stand on one line, to be found as they are

from __future__ import annotations

import datasets
import pytest
import torch
from torch.testing import assert_close
from training_by_hand import das, make_mlp, make_rows

import intervenable as iv
from intervenable import training
from intervenable.training_data import read_examples
from intervenable.training_engine import PlainEngine
from tiny_models import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
SOURCES = [[15, 16, 17, 18], [19, 20], [21, 22, 23]]


class Tokenizer:
    """As much of a tokenizer as padding asks for."""

    def __init__(self, side, pad=3):
        self.padding_side, self.pad_token_id = side, pad

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def swap(model, *representations, tokenizer=None, kind=iv.VanillaIntervention):
    entries = representations or (iv.RepresentationConfig(1, "block_output"),)
    return iv.IntervenableModel(iv.IntervenableConfig(list(entries), kind), model, tokenizer=tokenizer)


def pairs(**columns):
    return {"input_ids": PROMPTS, "source_input_ids": SOURCES, "labels": [1, 2, 3], **columns}


# --- forms ------------------------------------------------------------------------------------------------


class Torch(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


ROWS = [dict(zip(pairs(), values, strict=True)) for values in zip(*pairs().values(), strict=True)]


@pytest.mark.parametrize(
    "dataset",
    [
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("torch"),
        ROWS,
        Torch(ROWS),
        Torch([{key: torch.tensor(value) for key, value in row.items()} for row in ROWS]),
        pairs(),
        {**pairs(), "labels": torch.tensor([1, 2, 3]), "note": ["a", "b", "c"]},
    ],
)
def test_a_data_set_is_read_in_any_form(dataset):
    examples = read_examples(dataset, swap(tiny("llama")))
    assert examples.base["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12], [13, 14, 0, 0, 0]]
    assert examples.base["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    (source,) = examples.sources
    assert source["input_ids"].tolist() == [[15, 16, 17, 18], [19, 20, 0, 0], [21, 22, 23, 0]]
    assert source["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0], [1, 1, 1, 0]]
    assert examples.labels.tolist() == [1, 2, 3]
    assert len(examples) == 3


def test_prompts_are_padded_as_the_tokenizer_does():
    examples = read_examples(pairs(), swap(tiny("llama"), tokenizer=Tokenizer("left")))
    assert examples.base["input_ids"].tolist() == [[3, 3, 5, 6, 7], [8, 9, 10, 11, 12], [3, 3, 3, 13, 14]]
    assert examples.base["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]


def test_masks_that_begin_with_padding_are_padded_there():
    masks = [[0, 1, 1], [1] * 5, [1, 1]]
    examples = read_examples(pairs(attention_mask=masks), swap(tiny("llama")))
    assert examples.base["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]


def test_prompts_of_one_length_have_no_mask_and_a_batch_is_cut_to_its_longest():
    model = swap(tiny("llama"))
    assert set(read_examples(pairs(input_ids=[[1, 2]] * 3), model).base) == {"input_ids"}
    batch = read_examples(pairs(), model).batch([2, 0])
    assert batch.base["input_ids"].tolist() == [[13, 14, 0], [5, 6, 7]]
    assert batch.sources[0]["input_ids"].tolist() == [[21, 22, 23, 0], [15, 16, 17, 18]]
    assert batch.labels.tolist() == [3, 1]
    assert batch.rows == (2, 0)
    token_labels = pairs(labels=[[-100, 6, 7], [-100, -100, -100, 11, 12], [-100, 14]])
    examples = read_examples(token_labels, model)
    assert examples.labels.tolist() == [
        [-100, 6, 7, -100, -100],
        [-100, -100, -100, 11, 12],
        [-100, 14, *[-100] * 3],
    ]
    assert examples.batch([2]).labels.tolist() == [[-100, 14]]


# --- what the model makes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_read_at_the_last_real_token_however_prompts_are_padded(side):
    model = swap(tiny("llama"), tokenizer=Tokenizer(side))
    examples = read_examples(pairs(base_position=[-1, -1, -1], source_position=[-1, 0, 1]), model)
    with torch.no_grad():
        read = PlainEngine(model, examples).step([0, 1, 2])
        for row, place in enumerate([-1, 0, 1]):
            base, source = torch.tensor([PROMPTS[row]]), torch.tensor([SOURCES[row]])
            locations = {"sources->base": ([[[place]]], [[[-1]]])}
            alone = model({"input_ids": base}, [{"input_ids": source}], locations).intervened.logits[0, -1]
            assert_close(read.logits[row], alone, atol=1e-5, rtol=1e-4)


def test_labels_of_tokens_are_predicted_from_the_token_before():
    model = swap(tiny("llama"))
    labels = [[-100, 6, 7], [-100, -100, -100, 11, 12], [-100, 14]]
    examples = read_examples(pairs(labels=labels, base_position=[0] * 3), model)
    with torch.no_grad():
        read = PlainEngine(model, examples).step([0, 1, 2])
        loss = training.cross_entropy(read.logits, read.labels)
        for row in range(3):
            base, source = torch.tensor([PROMPTS[row]]), torch.tensor([SOURCES[row]])
            output = model(
                {"input_ids": base}, [{"input_ids": source}], {"sources->base": 0}
            ).intervened.logits[0]
            asked = [(place, label) for place, label in enumerate(labels[row]) if label != -100]
            each = [-output[place - 1].log_softmax(-1)[label] for place, label in asked]
            assert_close(loss[row], torch.stack(each).mean(), atol=1e-5, rtol=1e-4)


def test_masked_models_are_asked_for_the_token_itself():
    model = swap(tiny("bert", head="BertForMaskedLM"))
    examples = read_examples(
        pairs(input_ids=[[5, 6, 7]] * 3, labels=[[-100, 2, -100]] * 3, base_position=[0] * 3), model
    )
    with torch.no_grad():
        read = PlainEngine(model, examples).step([0])
        batch = examples.batch([0])
        output = model(batch.base, batch.sources, batch.unit_locations).intervened
    assert read.labels.tolist() == [[2]]
    assert_close(read.logits[0, 0], next(iter(output.values()))[0, 1])


def test_places_may_be_given_for_all_or_by_a_function_or_by_the_declaration():
    lm, data = tiny("llama"), pairs()
    expected = training.evaluate(
        swap(lm), {**data, "base_position": [-1] * 3}, metric="probability"
    ).per_example
    declared = swap(lm, iv.RepresentationConfig(1, "block_output", where="last"))
    ways = [
        training.evaluate(swap(lm), data, unit_locations=-1, metric="probability"),
        training.evaluate(swap(lm), data, unit_locations=(-1, -1), metric="probability"),
        training.evaluate(swap(lm), data, unit_locations={"sources->base": "last"}, metric="probability"),
        training.evaluate(swap(lm), data, unit_locations={"sources->base": ([[[-1]] * 3], [[[-1]] * 3])}, metric="probability"),
        training.evaluate(swap(lm), data, unit_locations=lambda batch: {"sources->base": [[[-1]] * len(batch.rows)]}, metric="probability"),
        training.evaluate(declared, data, metric="probability"),
    ]  # fmt: skip
    for way in ways:
        assert_close(way.per_example, expected, atol=1e-6, rtol=1e-5)
    other = training.evaluate(swap(lm), data, unit_locations=0, metric="probability").per_example
    assert not torch.allclose(other, expected, atol=1e-5)


def test_several_positions_and_positions_of_heads_come_from_columns():
    lm = tiny("llama")
    data = pairs(base_position=[[0, 1], [3, 4], [0, 1]], source_position=[[0, 1], [0, 1], [1, 2]])
    model = swap(lm, iv.RepresentationConfig(1, "block_output", max_number_of_units=2))
    batch = read_examples(data, model).batch([1, 2])
    assert batch.unit_locations == {"sources->base": ([[[0, 1], [1, 2]]], [[[3, 4], [0, 1]]])}
    heads = swap(lm, iv.RepresentationConfig(1, "head_attention_value_output", "h.pos"))
    batch = read_examples(data, heads).batch([1])
    assert batch.unit_locations == {
        "sources->base": ([[[[0, 1, 2, 3]], [[0, 1]]]], [[[[0, 1, 2, 3]], [[3, 4]]]])
    }
    two = swap(lm, iv.RepresentationConfig(0, "block_output"), iv.RepresentationConfig(1, "block_output"))
    batch = read_examples(pairs(base_position=[[[0], [1, 2]], [[3], [4]], [[0], [1]]]), two).batch([0, 1])
    assert batch.unit_locations["sources->base"][1] == [[[0], [3]], [[1, 2], [4]]]


def test_subspaces_come_from_columns_row_by_row():
    parts = [[0, 1, 2], [3, 4, 5]]
    model = swap(make_mlp(), iv.RepresentationConfig(1, "block_output", subspace_partition=parts))
    rows = make_rows(3)
    examples = read_examples({**rows, "subspaces": [[[0]], [[1]], [[0, 1]]]}, model)
    assert examples.batch([2, 0]).subspaces == [[[0, 1], [0]]]
    assert read_examples({**rows, "subspaces": [0, 1, 0]}, model).batch([1]).subspaces == [[[1]]]
    assert read_examples(rows, model, subspaces=1).batch([1]).subspaces == 1


def test_a_source_that_is_left_out_is_the_base_at_its_own_place():
    lm = tiny("llama")
    two = swap(lm, *(iv.RepresentationConfig(1, "block_output", group_key=group) for group in (0, 1)))
    data = pairs(
        source_input_ids=[[source, [1, 2, 3]] for source in SOURCES],
        source_mask=[[True, False], [False, True], [True, True]],
        base_position=[2, 4, 1],
        source_position=[0, 1, 0],
    )
    examples = read_examples(data, two)
    first, second = examples.sources
    assert first["input_ids"][1, :5].tolist() == PROMPTS[1]
    assert second["input_ids"][0, :3].tolist() == PROMPTS[0]
    assert second["input_ids"][1, :3].tolist() == [1, 2, 3]
    sides = examples.batch([0, 1, 2]).unit_locations["sources->base"]
    assert sides == ([[[0], [4], [0]], [[2], [1], [0]]], [[[2], [4], [1]]] * 2)


def test_positions_of_sources_may_be_given_for_each_group():
    lm = tiny("llama")
    entries = [
        iv.RepresentationConfig(layer, "block_output", group_key=key)
        for layer, key in ((0, "a"), (1, "a"), (2, "b"))
    ]
    data = pairs(
        source_input_ids=[[source, source] for source in SOURCES],
        base_position=[2, 4, 1],
        source_position=[[[0], [1]], [[1], [0]], [[2], [1]]],
    )
    sides = read_examples(data, swap(lm, *entries)).batch([0, 2]).unit_locations["sources->base"]
    assert sides == ([[[0], [2]], [[0], [2]], [[1], [1]]], [[[2], [1]]] * 3)


@pytest.mark.parametrize("where", ["columns", "last", None])
@pytest.mark.parametrize("token_labels", [False, True])
def test_what_is_left_out_undoes_nothing_before_it(where, token_labels):
    """A group at a later layer that sits out an example must not write the base's own values over the first one's."""
    lm = tiny("llama")
    entries = [iv.RepresentationConfig(layer, "block_output", group_key=layer) for layer in (0, 1)]
    model = swap(lm, *entries)
    bases, sources = torch.tensor([[5, 6, 7, 8]] * 4), torch.tensor([[9, 10, 11, 12], [13, 14, 15, 16]])
    data = {
        "input_ids": bases,
        "source_input_ids": sources.expand(4, 2, 4),
        "labels": [[-100, -100, 2, 3]] * 4 if token_labels else [1] * 4,
        "source_mask": [[True, False], [True, True], [False, True], [False, False]],
    }
    if where == "columns":
        data["base_position"] = [-1] * 4
    locations = {"columns": -1, "last": "last", None: None}[where]
    examples = read_examples(data, model, unit_locations="last" if where == "last" else None)
    first, second = (swap(lm, entry) for entry in entries)
    with torch.no_grad():
        read = PlainEngine(model, examples).step([2, 0, 3, 1])
        given = None if locations is None else {"sources->base": locations}
        alone = [
            second({"input_ids": bases[:1]}, [{"input_ids": sources[1:]}], given).intervened.logits,
            first({"input_ids": bases[:1]}, [{"input_ids": sources[:1]}], given).intervened.logits,
            lm(bases[:1]).logits,
            model(
                {"input_ids": bases[:1]}, [{"input_ids": source[None]} for source in sources], given
            ).intervened.logits,
        ]
    expected = torch.cat(alone)[:, 1:3] if token_labels else torch.cat(alone)[:, -1]
    assert_close(read.logits, expected, atol=1e-5, rtol=1e-4)
    fast = training.evaluate(
        model, data, unit_locations="last" if where == "last" else None, metric="probability"
    )
    plain = training.evaluate(
        model, data, unit_locations="last" if where == "last" else None, metric="probability", fast=False
    )
    assert_close(fast.per_example, plain.per_example, atol=1e-6, rtol=1e-5)


def test_reft_learns_an_answer_of_several_tokens_from_a_few_examples():
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    answers = [[20, 21], [22, 23, 24], [25]]
    data = {
        "input_ids": [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)],
        "labels": [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)],
        "base_position": [len(prompt) - 1 for prompt in prompts],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        change = iv.LoreftIntervention(16, 4)
    reft = iv.IntervenableModel(
        [iv.RepresentationConfig(1, "block_output", intervention=change)], tiny("llama")
    )
    result = training.train(reft, data, lr=0.1, epochs=60, batch_size=3)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.6 * losses[0]


# --- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"input_ids": PROMPTS, "labels": [1, 2, 3]}, "dataset has no column 'source_input_ids', and 'layer_1.block_output.pos' (VanillaIntervention) takes a source. It has: input_ids, labels."),
        ({"input_ids": PROMPTS, "source_input_ids": SOURCES}, "dataset has no column 'labels'. It has: input_ids, source_input_ids."),
        ({"input_ids": PROMPTS, "source_input_ids": SOURCES, "label": [1, 2, 3]}, "dataset has no column 'labels'. It has: input_ids, source_input_ids, label. 'label' is there: is it meant for 'labels'?"),
        ({"inptu_ids": PROMPTS, "labels": [1, 2, 3]}, "dataset has no column 'input_ids', the inputs of the base. It has: inptu_ids, labels. 'inptu_ids' is there: is it meant for 'input_ids'?"),
        ({"base": ["a"], "source": ["b"], "label": ["c"]}, "dataset has no column 'input_ids', the inputs of the base. It has: base, source, label. It has words: iv.causal.tokenized(dataset, tokenizer) makes ids of them."),
        (pairs(labels=[1, -3, 2]), "The label of row 1 of dataset is -3. Labels are classes or token ids from 0 on, or -100 for tokens that are not asked for."),
        (pairs(labels=[1, 2.5, 2]), "The label of row 1 of dataset is 2.5, not a whole number."),
        (pairs(labels=[1, 2, -100]), "No label of row 2 of dataset is asked for: all are -100."),
        (pairs(labels=["a", "b", "c"]), "'labels' of row 0 of dataset is 'a' (str), which makes no tensor (new(): invalid data type 'str')."),
        (pairs(labels=[[1, 2, 3], [1, 2], [1, 2]]), "labels of row 1 of dataset has 2 values, and its input_ids 5."),
        (pairs(labels=[1, 2]), "The columns of dataset have different lengths: input_ids 3, source_input_ids 3, labels 2."),
        (pairs(attention_mask=[[1, 1, 1], [1, 1], [1, 1]]), "attention_mask of row 1 of dataset has 2 values, and its input_ids 5."),
        (pairs(source_input_ids=[[[1], [2]]] * 3), "'source_input_ids' of dataset has 2 sources for an example, and the model has 1 group of interventions (layer_1.block_output.pos). Give one source, or one for each group."),
        (pairs(source_mask=[[True, False, True]] * 3), "source_mask of dataset has 3 values for an example, and the model has 1 group of interventions. Give one for each group."),
        (pairs(source_position=[0, 0, 0]), "dataset has 'source_position' and no 'base_position'. Give both, or the latter alone for both."),
        (pairs(base_position=[0, [], 0]), "base_position of row 1 of dataset is []. Give a position, a list of them, or a list for each of the 1 representation, or for each group of them."),
        (pairs(subspaces=[[[0], [1]]] * 3), "subspaces of row 0 of dataset is [[0], [1]]; the model has 1 representation. Give a list of ids for each, [representations][ids]."),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": 2}], "Rows 0 and 1 of dataset have different columns: 'labels' is in one alone."),
        ([[1, 2]], "Row 0 of dataset is a list, not a dict. Give a datasets.Dataset, a list of dicts, a mapping of columns, or a torch Dataset of dicts."),
        ([], "dataset has no examples."),
        (3, "dataset is a int. Give a datasets.Dataset, a list of dicts, a mapping of columns, or a torch Dataset of dicts."),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "dataset is a dict of splits ('train'). Give one of them."),
    ],
)  # fmt: skip
def test_a_data_set_that_does_not_fit_is_refused(data, message):
    with pytest.raises(iv.DatasetError) as caught:
        read_examples(data, swap(tiny("llama")))
    assert str(caught.value) == message


@pytest.mark.parametrize("fast", [True, False])
def test_a_label_outside_the_vocabulary_is_refused_before_any_step(fast):
    model, rows = das(make_mlp()), make_rows()
    rows["labels"][17] = 3
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(iv.DatasetError) as caught:
        training.train(model, rows, batch_size=4, fast=fast)
    assert (
        str(caught.value) == "The label of row 17 of dataset is 3, and the model gives logits for 3 (0 to 2)."
    )
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    with pytest.raises(iv.DatasetError, match="The label of row 17 of evaluation is 3"):
        training.train(model, make_rows(), evaluation=rows, epochs=1, fast=fast)


def test_sources_of_another_shape_are_refused():
    rows = make_rows()
    rows["source_input_ids"] = rows["source_input_ids"][:, :4]
    with pytest.raises(iv.DatasetError) as caught:
        training.evaluate(das(make_mlp()), rows)
    assert str(caught.value) == (
        "source_input_ids of row 0 of dataset has the shape (4,), and input_ids (6,). Both go to the same model, and are"
        " to be equally wide."
    )
