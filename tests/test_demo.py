"""The demo, run as its users run it: what it prints, the picture it writes, and what it says of a bad call."""

from __future__ import annotations

import re

import matplotlib.image
import pytest
import torch
import transformers

import intervenable as iv
from intervenable import demo
from intervenable.__main__ import main


@pytest.fixture(scope="module")
def small_lm():
    return iv.load_small_lm()


@pytest.fixture
def told(tmp_path, capsys):
    """Run the demo with options: its exit code, what it printed, what it said on standard error, the picture."""

    def tell(*options):
        picture = tmp_path / "pictures" / "map.png"
        code = main(["demo", "--out", str(picture), *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, picture

    return tell


# --- the story --------------------------------------------------------------------------------------------


def test_one_swap_turns_madrid_into_rome_and_the_map_is_drawn(told):
    code, out, _, picture = told()
    assert code == 0
    assert "base    'The capital of Spain is'\nsource  'The capital of Italy is'\n" in out
    before, after = re.search(
        r"^  before +after\n  (\S+) +[\d.]+% +(\S+) +[\d.]+%$", out, re.MULTILINE
    ).groups()
    assert (before, after) == ("_Madrid", "_Rome")
    assert re.search(
        r"^layer_4\.block_output\.pos +0 +model\.layers\.4\.output +positions 4 +' is' +1 +[\d.]+$",
        out,
        re.MULTILINE,
    )
    assert "Token by token, the source has ' Italy' for ' Spain'.\n" in out
    assert re.search(r"Where a swap makes ' Rome' most likely:\n\n  layers? 0.* at ' Spain' ", out)
    assert re.search(r"to 5 +at ' is' +[\d.]+% to [\d.]+%\n\n", out)
    assert out.endswith(f"framed: {picture}\n")
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 600
    assert height > 300
    assert 10_000 < picture.stat().st_size < 200_000


def test_prompts_of_other_lengths_are_paired_from_both_ends_and_this_is_said(told):
    code, out, _, _ = told("--base", "The capital of Spain is", "--source", "The capital city of Italy is")
    assert code == 0
    assert "Token by token, the source has ' Italy' for ' Spain'." in out
    assert "The prompts have different lengths, 5 and 6 tokens: their shared beginning is paired" in out
    assert "The base has no place for ' city' of the source." in out


def test_a_token_without_a_partner_is_left_out_and_this_is_said(told):
    code, out, _, _ = told("--base", "The capital city of Spain is", "--source", "The capital of Italy is")
    assert code == 0
    assert "The source has nothing for ' city': grey in the map." in out


def test_the_layer_of_the_swap_can_be_chosen(told):
    _, out, _, _ = told("--layer", "-1")
    assert "The output of layer 5 at the last token" in out
    assert "layer_5.block_output.pos" in out


def test_a_folder_with_another_mapped_model_is_run_too(told, small_lm, tmp_path):
    tokenizer, _ = small_lm
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
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
    )
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    code, out, err, picture = told("--model", str(tmp_path / "gpt2"))
    assert code == 0, err
    assert "model   GPT2LMHeadModel, 3 layers, " in out
    assert "layer_2.block_output.pos" in out
    assert picture.exists()


def test_the_map_holds_what_swaps_by_hand_give(small_lm):
    tokenizer, model = small_lm
    prompts = demo.read_prompts(tokenizer, "The capital of Spain is", "The capital of Italy is")
    answer = tokenizer(" Rome")["input_ids"][0]
    values = demo.sweep(prompts, model, layers=6, answer=answer)
    with torch.inference_mode():
        source = model(**prompts.source, output_hidden_states=True).hidden_states
    for layer, position in ((0, 3), (2, 4), (4, 3), (4, 0)):

        def swap(_module, _args, output, layer=layer, position=position):
            result = output.clone()
            result[:, position] = source[layer + 1][:, position]
            return result

        handle = model.model.layers[layer].register_forward_hook(swap)
        with torch.inference_mode():
            by_hand = model(**prompts.base).logits[0, -1].softmax(-1)[answer]
        handle.remove()
        assert values[layer, position].item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("base", "source", "partners"),
    [
        ("The capital of Spain is", "The capital of Italy is", [0, 1, 2, 3, 4]),
        ("The capital of Spain is", "The capital city of Italy is", [0, 1, 3, 4, 5]),
        ("The capital city of Spain is", "The capital of Italy is", [0, 1, None, 2, 3, 4]),
        ("The capital of", "The capital of Italy is", [0, 1, 4]),
        ("The capital of Italy is", "The capital of", [0, 1, None, None, 2]),
        ("Spain is", "The capital of Italy is", [3, 4]),
        ("is", "The capital of", [2]),
    ],
)
def test_a_shared_beginning_is_paired_from_the_front_and_the_rest_from_the_back(
    small_lm, base, source, partners
):
    assert demo.read_prompts(small_lm[0], base, source).partners == partners


# --- bad calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "6"], "Layer 6 is out of range: LlamaForCausalLM has layers 0 to 5."),
        (["--base", ""], "--base is empty. Give a text for the model to continue."),
        (["--source", ""], "--source is empty. Give a text for the model to continue."),
        (
            ["--source", "The capital of Spain is"],
            "--base and --source are both 'The capital of Spain is'. Give two prompts that differ.",
        ),
        (
            ["--source", "The capital city of Spain is"],
            "Both prompts are answered with ' Madrid', so a map would not show where the answer comes from."
            " Choose a --source that the model answers differently.",
        ),
        (["--out", "map.bmp"], "--out map.bmp: the name must end in one of .png, .pdf, .svg."),
        (
            ["--model", "/no/such/folder"],
            "--model /no/such/folder is no causal language model that can be loaded. ",
        ),
    ],
)
def test_a_bad_call_ends_with_code_two_and_the_reason(told, options, message):
    code, _, err, picture = told(*options)
    assert code == 2
    assert (
        err.splitlines()[-1].startswith(f"error: {message}") or f"error: representation 0: {message}" in err
    )
    assert "Traceback" not in err
    assert not picture.exists()


def test_a_folder_is_no_picture(tmp_path, capsys):
    (tmp_path / "map.png").mkdir()
    assert main(["demo", "--out", str(tmp_path / "map.png")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --out {tmp_path / 'map.png'} is a folder. Give the name of a file.\n"
    )


def test_a_model_that_no_map_was_written_for_is_mapped_and_swapped(told, small_lm, tmp_path):
    tokenizer, _ = small_lm
    ctrl = transformers.CTRLLMHeadModel(
        transformers.CTRLConfig(
            vocab_size=len(tokenizer), n_embd=16, dff=24, n_layer=2, n_head=2, n_positions=32
        )
    )
    ctrl.save_pretrained(tmp_path / "ctrl")
    tokenizer.save_pretrained(tmp_path / "ctrl")
    _, out, err, _ = told("--model", str(tmp_path / "ctrl"))
    assert "layer_1.block_output.pos" in out
    assert "transformer.h.1.output" in out
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["deom"], ["demo", "--layer", "four"], ["demo", "--modell", "x"]])
def test_a_wrong_command_line_ends_with_code_two_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m intervenable" in capsys.readouterr().err


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for option in ("--model", "--base", "--source", "--layer", "--out"):
        assert option in out
    assert "(default: at 80% of the depth)" in out
    assert "(default: out/heat_map.png)" in out
