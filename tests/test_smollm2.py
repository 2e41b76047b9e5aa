"""The main story on real pretrained weights: where SmolLM2-135M keeps the country, and when it moves on."""

from __future__ import annotations

import matplotlib.image
import pytest
import torch

import intervenable as iv
from intervenable import demo
from intervenable.__main__ import main
from scripts.fetch_smollm2 import smollm2_folder

pytestmark = pytest.mark.smollm2

SPAIN, LAST = 3, 4  # positions
TURN = 23
"""The first layer whose output at the last token carries the country."""


@pytest.fixture(scope="module")
def folder():
    try:
        return smollm2_folder(download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(folder):
    return demo.load(str(folder))


@pytest.fixture(scope="module")
def prompts(smollm2):
    return demo.read_prompts(smollm2[0], "The capital of Spain is", "The capital of Italy is")


def test_a_swap_of_the_last_token_at_layer_24_turns_madrid_into_rome(smollm2, prompts):
    tokenizer, lm = smollm2
    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(24, "block_output", "pos", 1)], iv.VanillaIntervention
    )
    model = iv.IntervenableModel(config, lm, tokenizer=tokenizer)
    with torch.inference_mode():
        output = model(
            prompts.base, [prompts.source], {"sources->base": ([[[4]]], [[[4]]])}, output_original_output=True
        )
    (before, p_before), (after, p_after) = (
        iv.top_vals(tokenizer, result.logits[0, -1].softmax(-1), 1, return_results=True)[0]
        for result in output
    )
    assert (before, after) == ("_Madrid", "_Rome")
    assert p_before == pytest.approx(0.377, abs=2e-3)
    assert p_after == pytest.approx(0.369, abs=2e-3)
    [line] = output.receipt
    assert (line.tokens, line.positions, line.fired) == ((" is",), (4,), 1)
    assert line.change == pytest.approx(159.6, abs=0.5)


def test_the_map_turns_from_the_country_to_the_last_token_around_layer_23(smollm2, prompts):
    tokenizer, lm = smollm2
    [rome] = tokenizer(" Rome")["input_ids"]
    values = demo.sweep(prompts, lm, layers=30, answer=rome)
    where = values.argmax(dim=1).tolist()
    assert where == [SPAIN] * TURN + [LAST] * (30 - TURN)
    assert values.max(dim=1).values.min() > 0.3
    assert values[:TURN, LAST].max() < 0.02
    assert values[TURN:, SPAIN].max() < 0.02
    assert values[:, :SPAIN].max() < 0.01  # the same tokens before the country: nothing can differ there


def test_the_demo_tells_this_story(folder, tmp_path, capsys):
    picture = tmp_path / "map.png"
    assert main(["demo", "--model", str(folder), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "The output of layer 24 at the last token of the base is replaced by that of the source." in out
    assert "layers 0 to 22     at ' Spain'" in out
    assert "layers 23 to 29    at ' is'" in out
    height, width, _ = matplotlib.image.imread(picture).shape
    assert height > 800
    assert width > 600
