"""Every architecture is mapped and its map keeps all laws, or says what it does not offer and why."""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict

import map_survey_records
import pytest
from map_survey import GROUPS, PAGE, Asker, Record, kept_records, page, survey
from map_survey_records import KeptRecords
from tiny_registry import TASKS, UNBUILDABLE_FOR, build, model_types, registered

from model_maps import COMPONENTS

BLOCKS = ("block_input", "block_output")
VIEWS = GROUPS["q k v z"]
MATRICES = GROUPS["scores"]

REPRESENTATIVE = (
    ("causal-lm", "gpt2", ""),
    ("causal-lm", "llama", ""),
    ("causal-lm", "gpt_neo", ""),  # a module around the attention module
    ("causal-lm", "gpt_neox", ""),  # fused by heads, in parallel
    ("causal-lm", "codegen", ""),  # fused in the order q, v, k
    ("causal-lm", "bloom", ""),  # the child adds the residual
    ("causal-lm", "falcon", ""),  # one key-value head, outputs changed in place
    ("causal-lm", "gpt_bigcode", ""),
    ("causal-lm", "phi3", ""),  # fused groups
    ("causal-lm", "gemma2", ""),  # norms before and after, soft-caps
    ("causal-lm", "olmo2", ""),  # norms after only, and over all heads
    ("causal-lm", "opt", ""),  # a flat MLP
    ("causal-lm", "mixtral", ""),
    ("causal-lm", "deepseek_v3", ""),  # latent attention, shared experts
    ("causal-lm", "gpt_oss", ""),  # a sink
    ("causal-lm", "jamba", ""),  # states and attention in turn
    ("causal-lm", "qwen3_next", ""),  # gated queries, linear attention
    ("causal-lm", "granite", ""),  # scaled contributions
    ("causal-lm", "xlm", ""),  # layers in lists beside each other
    ("causal-lm", "inkling2_text", ""),  # blocks that keep what those before them returned
    ("causal-lm", "xlnet", ""),  # heads made by functions of parameters
    ("masked-lm", "bert", ""),
    ("masked-lm", "distilbert", ""),
    ("masked-lm", "roberta", ""),
    ("seq2seq-lm", "t5", "encoder decoder cross"),
    ("seq2seq-lm", "bart", "encoder decoder cross"),
    ("seq2seq-lm", "encoder-decoder", "encoder decoder cross"),  # one model's blocks read another's
    ("image-classification", "vit", ""),
    ("zero-shot", "clip", "vision text"),
    ("image-text-to-text", "qwen2_5_vl", ""),
    ("image-text-to-text", "paligemma", ""),
    ("audio-classification", "wav2vec2", ""),
    ("speech-seq2seq", "whisper", "encoder decoder cross"),
)
"""What the whole registry is asked with `-m registry`, these are asked in every run: task, type, stacks."""


@pytest.mark.parametrize(("task", "model_type", "stacks"), REPRESENTATIVE)
def test_the_stream_and_the_attention_of_every_kind_of_architecture_are_offered(task, model_type, stacks):
    found = survey(model_type, task)

    for prefix in stacks.split() or [""]:
        words = (*VIEWS, *MATRICES) if prefix == "cross" else (*BLOCKS, *MATRICES)
        missing = {word if not prefix else f"{prefix}_{word}" for word in words} - set(found.components)
        assert not missing, {name: found.refused.get(name) or found.absent.get(name) for name in missing}


FLOORS = {
    "causal-lm": {BLOCKS: 182, VIEWS: 172, MATRICES: 177},
    "masked-lm": {BLOCKS: 48, VIEWS: 40, MATRICES: 42},
    "seq2seq-lm": {BLOCKS: 36, VIEWS: 36, MATRICES: 36},
    "image-text-to-text": {BLOCKS: 92, VIEWS: 92, MATRICES: 92},
    "image-classification": {BLOCKS: 34, VIEWS: 23, MATRICES: 23},
    "zero-shot": {BLOCKS: 10, VIEWS: 10, MATRICES: 10},
    "audio-classification": {BLOCKS: 12, VIEWS: 12, MATRICES: 12},
    "ctc": {BLOCKS: 12, VIEWS: 12, MATRICES: 12},
    "speech-seq2seq": {BLOCKS: 20, VIEWS: 20, MATRICES: 20},
}
"""For each task: how many of its types must have these components, in one stack at least."""


OF_TWO_STACKS = {
    "encoder": (*BLOCKS, *VIEWS, *MATRICES),
    "decoder": (*BLOCKS, *VIEWS, *MATRICES),
    "cross": (*VIEWS, *MATRICES),
}
"""What every model that has an encoder and a decoder must have."""

LACKING = {
    ("prophetnet", "decoder"): "at one time",  # n-grams beside the tokens
    ("t5gemma2", "cross"): "in one matrix",
}
"""Of which types which stack lacks some of it, and what each reason says."""


@pytest.fixture(scope="module")
def asker():
    beside = Asker()
    yield beside
    beside.close()


@pytest.mark.registry
@pytest.mark.parametrize("task", TASKS)
def test_as_many_types_of_a_task_as_promised_are_mapped(task, asker):
    kept = {record.model_type: record for record in kept_records() if record.task == task}
    found = [kept.get(model_type) or asker.ask(survey, model_type, task) for model_type in model_types(task)]

    for words, floor in FLOORS.get(task, {}).items():
        having = [record.model_type for record in found if _has(record, words)]
        lacking = sorted(set(model_types(task)) - set(having))
        assert len(having) >= floor, f"{words} in {len(having)} of {floor}, not in {', '.join(lacking)}"
    assert not {record.model_type: record.error for record in found if record.failed}
    for record in found:
        if record.error:
            continue
        for name in BLOCKS:
            assert _has(record, (name,)) or _says_why(record, name), f"{record.model_type} {name}"


@pytest.mark.registry
@pytest.mark.parametrize("task", ["seq2seq-lm", "speech-seq2seq"])
def test_encoders_decoders_and_what_is_read_across_are_mapped_in_every_type_of_two_stacks(task, asker):
    kept = {record.model_type: record for record in kept_records() if record.task == task}
    found = [kept.get(model_type) or asker.ask(survey, model_type, task) for model_type in model_types(task)]

    _is_whole_or_says_why(record for record in found if {"encoder", "decoder"} <= set(record.stacks))


def _is_whole_or_says_why(records):
    for record in records:
        for prefix, words in OF_TWO_STACKS.items():
            missing = {f"{prefix}_{word}" for word in words} - set(record.components)
            reasons = {name: record.refused.get(name) or record.absent.get(name, "") for name in missing}
            known = LACKING.get((record.model_type, prefix))
            unknown = {name: why for name, why in reasons.items() if not known or not re.search(known, why)}
            assert not unknown, f"{record.model_type}: {unknown}"
            assert missing or not known, f"{record.model_type} has all of its {prefix} by now"


@pytest.mark.parametrize(
    ("model_type", "gone", "reason"),
    [
        ("bart", "cross_attention_pattern", "it does not attend to another stack"),
        ("t5gemma2", "cross_attention_pattern", "it does not attend to another stack"),
        ("prophetnet", "", ""),
    ],
)
def test_a_type_of_two_stacks_that_lacks_what_it_should_have_is_told(model_type, gone, reason):
    names = [f"{prefix}_{word}" for prefix, words in OF_TWO_STACKS.items() for word in words]
    kept = tuple(name for name in names if name != gone)
    record = Record("seq2seq-lm", model_type, {"encoder": 4, "decoder": 4}, kept, absent={gone: reason})

    with pytest.raises(AssertionError, match=model_type):
        _is_whole_or_says_why([record])


def _has(record, words):
    return any(
        all((f"{prefix}_{word}" if prefix else word) in record.components for word in words)
        for prefix in record.stacks
    )


def _says_why(record, name):
    prefixes = record.stacks or ("",)
    named = [f"{prefix}_{name}" if prefix else name for prefix in prefixes]
    return any(one in record.refused or one in record.absent for one in named)


# --- what the survey stands on ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_registered_type_is_made_or_has_a_reason_why_not(task):
    assert set(model_types(task)) | set(UNBUILDABLE_FOR[task]) == set(registered(task))
    assert all(UNBUILDABLE_FOR[task].values())


@pytest.mark.parametrize(
    ("task", "model_type", "names"),
    [
        ("masked-lm", "bert", {"input_ids"}),
        ("seq2seq-lm", "t5", {"input_ids", "decoder_input_ids"}),
        ("image-classification", "vit", {"pixel_values"}),
        ("zero-shot", "clip", {"input_ids", "pixel_values"}),
        ("speech-seq2seq", "whisper", {"input_features", "decoder_input_ids"}),
    ],
)
def test_a_tiny_model_is_run_on_what_its_task_is_about(task, model_type, names):
    assert set(build(model_type, task).inputs) == names


def test_a_kind_of_layer_is_cut_with_the_layers_of_its_tower():
    config = build("t5gemma", "seq2seq-lm").model.config
    assert len(config.encoder.layer_types) == config.encoder.num_hidden_layers == 2
    assert len(config.decoder.layer_types) == config.decoder.num_hidden_layers == 4


def _crash(model_type, task):
    os._exit(7)


def _hang(model_type, task):
    time.sleep(60)


def _stumble(model_type, task):
    raise ValueError(f"not {model_type}")


def _find(model_type, task):
    return Record(task, model_type, {"": 4}, BLOCKS)


@pytest.mark.registry
def test_a_type_that_ends_its_process_is_a_record_and_the_next_is_asked(asker):
    def said(function, seconds=60.0):
        return asker.ask(function, "llama", "causal-lm", seconds).error

    assert said(_find) == ""
    assert said(_stumble).startswith("ValueError: not llama")
    assert said(_crash) == "the process ended with code 7"
    assert said(_hang, 0.5) == "no answer after 0.5 seconds"
    assert said(_find) == ""


def test_a_record_is_kept_until_a_source_changes(tmp_path):
    file = tmp_path / "records" / "maps.jsonl"
    kept = KeptRecords(file)
    one = Record("causal-lm", "one", {"": 4}, BLOCKS, {"block_mid": "why"}, {"block_mid": "residual@1"})

    assert list(kept) == []
    kept.add(asdict(one))
    kept.add({"model_type": "cut off"})
    file.write_text(file.read_text()[:-30])

    (found,) = KeptRecords(file)
    assert Record(**{**found, "components": tuple(found["components"])}) == one
    file.write_text(file.read_text().replace(kept.sources, "f" * 64))
    assert list(KeptRecords(file).cleared()) == []
    assert not file.exists()


def test_what_a_record_depends_on_are_the_sources_of_the_library_and_of_the_tiny_models(
    tmp_path, monkeypatch
):
    (tmp_path / "model_maps").mkdir()
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(map_survey_records, "ROOT", tmp_path)
    (tmp_path / "tests" / "map_survey.py").write_text("")
    seen = {KeptRecords().sources}

    for place in ("model_maps/schema.py", "tests/tiny_registry_inputs.py", "tests/map_survey.py"):
        (tmp_path / place).write_text("# changed")
        seen.add(KeptRecords().sources)
    (tmp_path / "tests" / "test_other.py").write_text("# changed")
    seen.add(KeptRecords().sources)

    assert len(seen) == 4


def test_the_page_counts_what_was_found_and_names_the_gaps():
    text = page(
        [
            Record("causal-lm", "one", {"": 4}, (*BLOCKS, *VIEWS, *MATRICES)),
            Record(
                "causal-lm",
                "two",
                {"": 3},
                ("block_input",),
                {"block_output": "it breaks 'chain' in layer 1, off by 1 where 0.1 is allowed; a way out"},
                absent={"attention_pattern": "it has no pattern"},
            ),
        ]
    )

    assert "blocks in **1**, all four views by heads in **1**, scores and patterns in **1**" in text
    assert "| two |  | 3 | part |" in text
    assert "- `block_output`: it breaks 'chain'. (1: two)" in text
    assert "it has no pattern" not in text


def test_the_columns_of_the_page_are_components():
    assert {name for names in GROUPS.values() for name in names} <= set(COMPONENTS)
    assert PAGE.name == "architectures.md"
