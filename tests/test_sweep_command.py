"""The sweep from the shell, run as its users run it: what it prints, what it writes, what it says of a bad call."""

from __future__ import annotations

import re

import matplotlib.image
import pandas as pd
import pytest
import torch
import transformers

import intervenable as iv
from intervenable import sweep_command
from intervenable.__main__ import main
from intervenable.patching import SweepResult


@pytest.fixture(scope="module")
def small_lm():
    return iv.load_small_lm()


@pytest.fixture
def told(tmp_path, capsys):
    """Run the sweep with options: its exit code, what it printed, what it said on standard error, the picture."""

    def tell(*options):
        picture = tmp_path / "pictures" / "map.png"
        code = main(["sweep", "--out", str(picture), *map(str, options)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, picture

    return tell


def swapped(model, clean, corrupted, layer, position):
    """The logits after the last token with one block input of the corrupted run taken from the clean one."""
    with torch.inference_mode():
        states = model(**clean, output_hidden_states=True).hidden_states

        def swap(_module, args, kwargs):
            given = args[0] if args else kwargs["hidden_states"]
            result = given.clone()
            result[:, position] = states[layer][:, position]
            return ((result, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": result})

        handle = model.model.layers[layer].register_forward_pre_hook(swap, with_kwargs=True)
        logits = model(**corrupted).logits[0, -1]
        handle.remove()
    return logits


# --- what it tells and writes ------------------------------------------------------------------------------


def test_without_options_it_maps_the_capital_of_spain(told):
    code, out, _, picture = told()
    assert code == 0
    assert "clean      'The capital of Spain is', answered with ' Madrid'\n" in out
    assert "corrupted  'The capital of Italy is', answered with ' Rome'\n" in out
    assert re.search(r"^logit difference: clean 10\.\d+, corrupted -10\.\d+$", out, re.MULTILINE)
    assert re.search(r"^layer +The +capital +of +Italy +is$", out, re.MULTILINE)
    assert re.search(r"^30 cells in [\d.]+ s.\n  \w", out, re.MULTILINE)
    assert out.endswith(f"picture  {picture}\n")
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 600
    assert height > 300


def test_the_table_holds_what_swaps_by_hand_give(told, small_lm):
    tokenizer, model = small_lm
    texts = ("The capital of France is", "The capital of Japan is")
    clean, corrupted = (tokenizer(text, return_tensors="pt") for text in texts)
    code, out, err, _ = told("--clean", texts[0], "--corrupted", texts[1], "--no-picture")
    assert code == 0, err
    rows = {
        int(match[1]): [float(number) for number in match[2].split()]
        for match in re.finditer(r"^(\d)((?: +-?[\d.]+){5})$", out, re.MULTILINE)
    }
    paris, tokyo = (tokenizer(word).input_ids[0] for word in (" Paris", " Tokyo"))
    for layer, position in ((0, 3), (3, 4), (5, 4), (2, 1)):
        logits = swapped(model, clean, corrupted, layer, position)
        assert rows[layer][position] == pytest.approx((logits[paris] - logits[tokyo]).item(), abs=6e-3)


def test_files_hold_the_same_as_the_library_gives(told, small_lm, tmp_path):
    tokenizer, model = small_lm
    saved, table = tmp_path / "new" / "result.safetensors", tmp_path / "other" / "cells.csv"
    options = (
        "--component",
        "mlp_output",
        "--layers",
        "1,3-4",
        "--positions",
        "Italy,last",
        "--answer",
        " Athens",
    )
    code, out, err, _ = told(*options, "--save", saved, "--csv", table, "--no-picture")
    assert code == 0, err
    assert f"result   {saved}\n" in out
    assert out.endswith(f"table    {table}\n")
    wanted = iv.patching.sweep(
        model,
        tokenizer("The capital of Spain is", return_tensors="pt"),
        tokenizer("The capital of Italy is", return_tensors="pt"),
        "mlp_output",
        metric=iv.metrics.logit_difference(tokenizer, " Athens", " Rome"),
        layers=[1, 3, 4],
        positions=["Italy", "last"],
        tokenizer=tokenizer,
    )
    result = SweepResult.load(saved)
    assert result.entries == wanted.entries
    assert torch.equal(result.values, wanted.values)
    cells = pd.read_csv(table)
    assert cells["layer"].tolist() == [1, 1, 3, 3, 4, 4]
    assert torch.allclose(torch.tensor(cells["value"]).float(), wanted.values.flatten(), atol=1e-5)


def test_several_components_are_listed_by_what_they_change(told):
    code, out, err, picture = told(
        "--component", "attention_output", "--component", "mlp_output", "--axes", "layer"
    )
    assert code == 0, err
    changes = [
        float(match[1]) for match in re.finditer(r"^  \w+, layer \d: .*\(([-+.\d]+)\)$", out, re.MULTILINE)
    ]
    assert len(changes) == 10
    assert changes == sorted(changes, key=abs, reverse=True)
    assert picture.exists()


@pytest.mark.parametrize("metric", sorted(set(sweep_command.METRICS) - {"logit_difference"}))
def test_every_metric_can_be_asked_for(told, metric, small_lm):
    tokenizer, model = small_lm
    code, out, err, _ = told("--metric", metric, "--layers", "0", "--positions", "3", "--no-picture")
    assert code == 0, err
    inputs = tokenizer("The capital of Spain is", return_tensors="pt")
    with torch.inference_mode():
        chances = model(**inputs).logits[0, -1].log_softmax(-1)
    best = chances.max().item()
    wanted = {
        "probability": torch.tensor(best).exp().item(),
        "log_probability": best,
        "loss": -best,
        "rank": 0.0,
        "kl_divergence": 0.0,
        "accuracy": 1.0,
    }
    shown = float(re.search(rf"^{metric.replace('_', ' ')}: clean ([-\d.e]+)", out, re.MULTILINE)[1])
    if metric in wanted:
        assert shown == pytest.approx(wanted[metric], abs=1e-4)


def test_ablations_change_the_clean_run(told):
    code, out, err, _ = told("--component", "mlp_output", "--value", "zero", "--no-picture")
    assert code == 0, err
    assert re.search(r"^layer +The +capital +of +Spain +is$", out, re.MULTILINE)


def test_corrupted_values_can_go_into_the_clean_run(told):
    code, out, err, _ = told("--direction", "noise", "--layers", "0", "--no-picture")
    assert code == 0, err
    [row] = re.findall(r"^0((?: +-?[\d.]+){5})$", out, re.MULTILINE)
    values = [float(number) for number in row.split()]
    assert values[0] > 10
    assert values[3] < -10


def test_prompts_of_other_lengths_are_paired_and_this_is_said(told):
    code, out, err, _ = told("--clean", "The capital city of Spain is", "--no-picture")
    assert code == 0, err
    assert "The prompts have different lengths: tokens are paired by what they share" in out


def test_a_window_patches_neighbours_together(told):
    code, out, err, _ = told("--window", "layer=3", "--no-picture")
    assert code == 0, err
    assert re.findall(r"^(\d-\d) ", out, re.MULTILINE) == ["0-1", "0-2", "1-3", "2-4", "3-5", "4-5"]


def test_cells_can_be_checked_without_shortcuts(told):
    code, _, err, _ = told("--exact-check", "3", "--layers", "2", "--no-picture")
    assert code == 0, err


def test_what_is_kept_in_a_folder_is_used_again(told, tmp_path):
    folder = tmp_path / "kept"
    options = ("--checkpoint", folder, "--no-picture")
    _, first, _, _ = told(*options)
    assert any(folder.iterdir())
    code, second, err, _ = told(*options)
    assert code == 0, err
    assert first.split("cells in")[0] == second.split("cells in")[0]
    code, _, err, _ = told(*options, "--component", "mlp_output")
    assert code == 2
    assert str(folder) in err


def test_the_picture_can_be_normalized_and_named(told):
    code, _, err, picture = told("--normalized", "--title", "mine", "--layers", "0-1", "--axes", "layer,pos")
    assert code == 0, err
    assert picture.exists()


def test_a_folder_with_another_model_is_swept_by_module_paths(told, small_lm, tmp_path):
    tokenizer, _ = small_lm
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=32,
        tie_word_embeddings=False,
        initializer_range=1.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    options = ("--model", tmp_path / "gpt2", "--metric", "kl_divergence", "--no-picture")
    code, by_name, err, _ = told(*options, "--component", "mlp_output")
    assert code == 0, err
    assert "model      GPT2LMHeadModel" in by_name
    code, by_path, err, _ = told(*options, "--component", "transformer.h[{layer}].mlp.output")
    assert code == 0, err
    assert by_path.split("cells in")[0] == by_name.split("cells in")[0]


# --- bad calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clean", ""], "--clean is empty. Give a text for the model to continue."),
        (["--corrupted", ""], "--corrupted is empty. Give a text for the model to continue."),
        (
            ["--corrupted", "The capital of Spain is"],
            "--clean and --corrupted are both 'The capital of Spain is'. Give two prompts that differ.",
        ),
        (
            ["--corrupted", "The capital city of Spain is"],
            "Both prompts are answered with ' Madrid', so there is no difference to measure. Give prompts that are"
            " answered differently, --answer and --other, or another --metric.",
        ),
        (
            ["--model", "/no/such/folder"],
            "--model /no/such/folder is no causal language model that can be loaded.",
        ),
        (["--out", "map.bmp"], "--out map.bmp: the name must end in one of .png, .pdf, .svg."),
        (["--save", "x.pt"], "--save x.pt: the name must end in .safetensors."),
        (["--csv", "x.txt"], "--csv x.txt: the name must end in .csv."),
        (["--layers", "0;3"], "--layers '0;3': '0;3' cannot be read. Give numbers and ranges, as 0,3-5,-1."),
        (["--layers", "5-3"], "--layers '5-3': '5-3' cannot be read."),
        (["--positions", "0,,1"], "--positions '0,,1': '' cannot be read. Give numbers, ranges and words"),
        (["--window", "layer"], "--window 'layer' cannot be read. Give an axis and a number, as layer=3"),
        (["--component", "mlp_ouput"], "Unknown component 'mlp_ouput'"),
        (["--axes", "layer,possition"], "axes: 'possition' is no axis. Did you mean 'position'?"),
        (["--axes", "layer,head"], ""),
        (["--layers", "6"], ""),
        (["--positions", "France"], ""),
        (["--positions", "9"], ""),
        (["--value", "nil"], ""),
        (["--memory", "much"], ""),
        (["--answer", "Madrid and Rome"], ""),
        (["--answer", "Xyzzy"], ""),
        (["--exact-check", "-1"], "--exact-check -1: give a number of cells, 0 or more."),
    ],
)
def test_a_bad_call_ends_with_code_two_and_one_line_of_reason(told, options, message):
    code, _, err, picture = told(*options)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"error: {message}")
    assert len(last) > len("error: ") + 20
    assert "Traceback" not in err
    assert not picture.exists()


def test_a_file_is_no_folder_to_keep_work_in(told, tmp_path):
    (tmp_path / "kept").write_text("")
    code, _, err, _ = told("--checkpoint", tmp_path / "kept")
    assert code == 2
    assert err == f"error: --checkpoint {tmp_path / 'kept'} is a file. Give the name of a folder.\n"


def test_what_no_picture_can_hold_is_written_to_files_before_that_is_said(told, tmp_path, small_lm):
    tokenizer, _ = small_lm
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=130,
        n_layer=2,
        n_head=65,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    table = tmp_path / "cells.csv"
    options = (
        "--component",
        "head_attention_value_output",
        "--axes",
        "layer,pos,head",
        "--metric",
        "kl_divergence",
    )
    code, out, err, picture = told(
        "--model", tmp_path / "gpt2", *options, "--positions", "3-4", "--csv", table
    )
    assert code == 2
    assert "error: This would be 65 maps, and one picture holds 64. Choose some:" in err
    assert f"table    {table}\n" in out
    assert len(pd.read_csv(table)) == 2 * 2 * 65
    assert not picture.exists()


@pytest.mark.parametrize("arguments", [["--lairs", "0"], ["--metric", "speed"], ["--direction", "up"]])
def test_a_wrong_command_line_ends_with_code_two_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *arguments])
    assert caught.value.code == 2
    assert "usage: python -m intervenable" in capsys.readouterr().err
