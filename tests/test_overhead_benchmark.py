"""The benchmark compares like with like: every way of doing the swap gives the hand-written one's logits."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch.testing import assert_close

from benchmarks import overhead

TINY = ("tiny-gpt2", "tiny-llama")
BY_LABEL = {contender.label: contender for contender in overhead.CONTENDERS}
PEERS = [label for label, contender in BY_LABEL.items() if contender.package not in (None, "intervenable")]


def logits_of(label: str, model: str, batch: int) -> torch.Tensor:
    with torch.no_grad():
        return BY_LABEL[label].prepare(overhead.swap_on(overhead.MODELS[model](), batch))()


@pytest.mark.parametrize("model", TINY)
def test_the_hand_written_swap_changes_the_last_token_and_no_other(model):
    swap = overhead.swap_on(overhead.MODELS[model](), batch=2)
    with torch.no_grad():
        plain = swap.model(swap.base).logits
        swapped = overhead.raw(swap)()

    assert_close(swapped[:, :-1], plain[:, :-1], rtol=0, atol=0)
    assert (swapped[:, -1] - plain[:, -1]).abs().max() > 100 * overhead.TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("label", ["raw, source stopped", "intervenable"])
def test_a_stopped_source_run_gives_the_same_logits(label, model, batch):
    assert_close(logits_of(label, model, batch), logits_of("raw", model, batch), rtol=0, atol=1e-6)


# What the peers warn of is theirs (2026-11).
@pytest.mark.filterwarnings("ignore")
@pytest.mark.peers
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("label", PEERS)
def test_every_peer_gives_the_same_logits(label, model, batch):
    package = BY_LABEL[label].package
    assert importlib.util.find_spec(package), f"{package} is not installed: `make peers` installs it."
    assert_close(logits_of(label, model, batch), logits_of("raw", model, batch), rtol=0, atol=1e-5)


def test_a_copy_has_modules_of_its_own_and_the_very_same_weights():
    model = overhead.tiny_llama()
    copy = overhead.with_own_modules(model)

    assert all(own is other for own, other in zip(copy.parameters(), model.parameters(), strict=True))
    assert not set(map(id, copy.modules())) & set(map(id, model.modules()))


def test_the_report_has_every_contender_and_fails_when_logits_differ(capsys, monkeypatch):
    options = [
        "--json",
        "--no-imports",
        "--models=tiny-gpt2",
        "--batches=1",
        "--rounds=2",
        "--only=intervenable",
    ]
    monkeypatch.setattr(overhead, "BLOCK_SECONDS", 0.0)

    assert overhead.main(options) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["contender"] for result in results] == ["raw", "raw, source stopped", "intervenable"]
    assert all(result["milliseconds"]["median"] > 0 for result in results)

    monkeypatch.setattr(overhead, "TOLERANCE", -1.0)
    assert overhead.main(options) == 1
    assert "intervenable on tiny-gpt2, batch 1: the logits differ from raw's" in capsys.readouterr().err
