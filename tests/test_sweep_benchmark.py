"""The benchmark of sweeps compares like with like, and counts what it says it counts."""

from __future__ import annotations

import importlib.util
import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    overhead,
    sweep,
    sweep_arithmetic,
    sweep_contenders,
    sweep_growth,
    sweep_memory,
    sweep_turns,
)
from benchmarks.sweep_contenders import HEADS, HOOKS, OURS, PAIRS, RESIDUAL, SWEEPS, Case
from scripts.fetch_smollm2 import smollm2_folder

TINY = ("tiny-gpt2", "tiny-llama")
BY_LABEL = {contender.label: contender for contender in sweep_contenders.CONTENDERS}
LIBRARIES = [label for label, contender in BY_LABEL.items() if contender.package == OURS]
PEERS = [label for label, contender in BY_LABEL.items() if contender.package not in (None, OURS)]


@pytest.fixture(params=TINY)
def model(request):
    return overhead.MODELS[request.param]()


def tiny_case(model, sweep: str = RESIDUAL, pair: str = "5 tokens") -> Case:
    return sweep_contenders.case_on("tiny", model, PAIRS[pair], sweep)


def table_of(label: str, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return BY_LABEL[label].prepare(case)()


def plain_metric(case: Case, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return case.metric(case.model(ids).logits)


@pytest.mark.parametrize("pair", PAIRS)
def test_prompts_differ_where_the_pair_says_and_nowhere_else(model, pair):
    case = tiny_case(model, pair=pair)

    assert case.clean.shape == case.corrupted.shape == (1, PAIRS[pair].tokens)
    assert (case.clean != case.corrupted)[0].nonzero().flatten().tolist() == list(PAIRS[pair].differing)


@pytest.mark.smollm2
@pytest.mark.parametrize("pair", PAIRS)
def test_the_prompts_have_those_tokens_in_smollm2_too(pair):
    try:
        smollm2_folder(download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    case = sweep_contenders.case_on("smollm2", overhead.smollm2(), PAIRS[pair], RESIDUAL)

    assert case.clean.shape == case.corrupted.shape == (1, PAIRS[pair].tokens)
    assert (case.clean != case.corrupted)[0].nonzero().flatten().tolist() == list(PAIRS[pair].differing)
    assert plain_metric(case, case.clean) > 0 > plain_metric(case, case.corrupted)


def test_by_hand_the_one_differing_token_carries_everything_and_those_before_it_nothing(model):
    case = tiny_case(model)
    table = table_of(HOOKS, case)
    clean, corrupted = plain_metric(case, case.clean), plain_metric(case, case.corrupted)

    assert_close(table[0, 3], clean, rtol=0, atol=0)
    assert_close(table[:, :3], corrupted.expand(4, 3), rtol=0, atol=0)
    assert (table[1:, 3:] - corrupted).abs().min() > 1e-5


def test_by_hand_a_head_is_a_slice_of_what_is_mixed(model):
    case = tiny_case(model, HEADS)
    places = torch.zeros(1, 2, model.config.hidden_size)
    for head in case.heads:
        places[case.place(head)] += head + 1

    assert_close(places[0, 0], torch.arange(1.0, 5).repeat_interleave(16))
    assert table_of(HOOKS, case).std() > 1e-3


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("label", LIBRARIES)
def test_this_library_gives_the_numbers_of_the_hooks(label, sweep, pair, model):
    case = tiny_case(model, sweep, pair)
    assert_close(table_of(label, case), table_of(HOOKS, case), rtol=0, atol=1e-6)


# What the peers warn of is theirs (2026-11).
@pytest.mark.filterwarnings("ignore")
@pytest.mark.peers
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("label", PEERS)
def test_every_peer_gives_the_numbers_of_the_hooks(label, sweep, model):
    package = BY_LABEL[label].package
    assert importlib.util.find_spec(package), f"{package} is not installed: `make peers` installs it."
    for case in (tiny_case(model, sweep), replace(tiny_case(model, sweep), sampled=2)):
        assert_close(table_of(label, case), table_of(HOOKS, case), rtol=0, atol=1e-6)


def test_the_multiply_adds_of_a_pass_are_those_that_torch_counts(model):
    case = sweep_contenders.random_case(model, 2, 7, [3], RESIDUAL)
    model.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(case.clean)
    cost = sweep_arithmetic.TokenCosts.of(case)
    hidden_by_the_mask = 2 * 4 * (7 * 6 // 2) * cost.score  # prompts, layers, pairs

    assert sweep_arithmetic.plain_pass(case) == counter.get_total_flops() // 2 - hidden_by_the_mask


def changed_positions(case: Case, layer: int, column: int) -> list[list[int]]:
    """For the patched layer the positions that the patch writes anew; for each above, those that it changes."""
    blocks = [case.model.get_submodule(case.block_path(above)) for above in case.layers[layer + 1 :]]
    seen: list[torch.Tensor] = []

    def read(module, args):
        seen.append(args[0].clone())

    with torch.no_grad():
        clean = sweep_contenders.inputs_of(case.model, case, case.clean)
        corrupted = sweep_contenders.inputs_of(case.model, case, case.corrupted)
        with sweep_contenders.pre_hooked(dict.fromkeys(blocks, read)):
            case.model(case.corrupted)
            sweep_contenders.patched_by_hand(case.model, case, clean, layer, column)
    place = case.place(column)
    patched = corrupted[layer].clone()
    patched[place] = clean[layer][place]
    pairs = [(corrupted[layer], patched), *zip(seen[: len(blocks)], seen[len(blocks) :], strict=True)]
    return [(before != after).any(-1)[0].nonzero().flatten().tolist() for before, after in pairs]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_changed_multiply_adds_are_those_of_positions_that_a_patch_changes(model, pair):
    case = tiny_case(model, pair=pair)
    cost, tokens = sweep_arithmetic.TokenCosts.of(case), len(case.positions)

    def of_layer(layer: int, positions: list[int]) -> int:
        if layer == case.layers[-1]:  # keys and values, and the last position
            return (len(positions) - 1) * cost.key_value + cost.block + tokens * cost.score
        return len(positions) * cost.block + sum(position + 1 for position in positions) * cost.score

    for layer in case.layers:
        for column in case.columns:
            written, *above = changed_positions(case, layer, column)
            # In the patched layer all that follows the patched position is computed anew.
            begun = [list(range(column, tokens))] if written else []
            layers = zip(case.layers[layer:], begun + above, strict=bool(written))
            expected = sum(of_layer(*entry) for entry in layers) + 2 * cost.unembedding if written else 0
            assert sweep_arithmetic.changed_by(case, layer, column) == expected, (layer, column)


def test_a_head_changes_what_mixes_it_and_the_layers_above_from_the_first_differing_token_on(model):
    case = tiny_case(model, HEADS)
    cost = sweep_arithmetic.TokenCosts.of(case)
    after_attention, logits = cost.block - cost.attention, 2 * cost.unembedding

    assert changed_positions(case, 2, 0) == [[3, 4], [3, 4]]
    assert sweep_arithmetic.changed_by(case, 3, 0) == after_attention + logits
    assert sweep_arithmetic.changed_by(case, 2, 0) == (
        2 * after_attention + cost.key_value + cost.block + 5 * cost.score + logits
    )


def test_a_peer_is_compared_with_the_sweeps_of_this_library_before_and_after_it(monkeypatch):
    case = tiny_case(overhead.tiny_llama())
    table = torch.arange(20.0).view(4, 5)
    history = [
        sweep_turns.Turn(OURS, 1.0, table),
        sweep_turns.Turn(HOOKS, 40.0, table),
        sweep_turns.Turn(OURS, 3.0, table),
        sweep_turns.Turn("pyvene", 100.0, table + 0.19),
        sweep_turns.Turn(OURS, 2.0, table),
    ]
    monkeypatch.setattr(sweep_turns, "turns", lambda *_: iter(history))
    contenders = [BY_LABEL[label] for label in (HOOKS, OURS, "pyvene")]
    hooks, ours, pyvene = sweep_turns.measure("tiny", "5 tokens", case, contenders, 1)

    assert (hooks.ratio.median, pyvene.ratio.median) == (20.0, 40.0)
    assert ours.seconds.median == statistics.median([1, 2, 3])
    assert (hooks.difference, pyvene.difference) == (0.0, pytest.approx(0.01, rel=1e-4))


def test_another_shape_is_another_result():
    assert sweep_turns.difference(torch.zeros(4, 5), torch.zeros(5, 4)) == float("inf")


def test_this_library_sweeps_between_all_others_and_learns_the_model_anew_where_it_says_so():
    prepared: list[str] = []

    def contender(label: str, package: str | None, fresh: bool = False) -> sweep_contenders.Contender:
        def prepare(case):
            prepared.append(label)
            return lambda: torch.zeros(4, 5)

        return sweep_contenders.Contender(label, package, prepare, fresh)

    chosen = [
        contender(HOOKS, None),
        contender(OURS, OURS),
        contender("first", OURS, True),
        contender("peer", "peer"),
    ]
    with torch.no_grad():
        order = [turn.label for turn in sweep_turns.turns(chosen, tiny_case(overhead.tiny_llama()), rounds=2)]

    assert order == [OURS, HOOKS, OURS, "first", OURS, "peer", OURS, "first", OURS, "peer", OURS, HOOKS, OURS]
    assert prepared.count(OURS) == prepared.count("peer") == 1
    assert prepared.count("first") == 2


@pytest.mark.parametrize("sweep", SWEEPS)
def test_hooks_in_some_layers_give_those_rows_of_the_table(sweep, model):
    case = tiny_case(model, sweep)
    some = replace(case, sampled=2)

    assert some.rows == [1, 3]
    assert_close(table_of(HOOKS, some), table_of(HOOKS, case)[[1, 3]], rtol=0, atol=0)


def test_the_seconds_of_some_layers_stand_for_all_and_those_of_this_library_are_its_own(monkeypatch):
    case = replace(tiny_case(overhead.tiny_llama()), sampled=2)
    clock = iter(range(1000))
    monkeypatch.setattr(sweep_turns.time, "process_time", lambda: next(clock))
    contenders = [
        sweep_contenders.Contender(HOOKS, None, lambda case: lambda: torch.ones(2, 5)),
        sweep_contenders.Contender(OURS, OURS, lambda case: lambda: torch.arange(20.0).view(4, 5)),
    ]
    with torch.no_grad():
        ours, hooks, _ = sweep_turns.turns(contenders, case, rounds=1)

    assert (
        hooks.seconds == 21 / 11
    )  # 20 cells and the clean run, of which 10 cells and the clean run were run
    assert ours.seconds == 1
    assert ours.values.tolist() == [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]


def test_the_peak_of_memory_is_what_was_held_at_most():
    sweep_memory.forget_the_peak()
    before = sweep_memory.peak()
    held = torch.ones(50_000_000)
    after = sweep_memory.peak()
    del held

    assert after - before > 150_000_000  # 200 MB were held; what was freed just before may be used again
    assert sweep_memory.peak() > after - 20_000_000  # the system counts in steps


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    found = sweep_memory.memory("tiny-llama", "5 tokens", RESIDUAL, sweep_memory.PLAIN)
    assert 50 < found.peak < 2000  # megabytes: torch and transformers, and not this process beside them


def test_growth_has_a_row_for_each_size(model):
    with torch.no_grad():
        rows = list(sweep_growth.growth("tiny", model, "layers", (2, 3), repeats=1))

    assert [(row.varied, row.value, row.cells) for row in rows] == [("layers", 2, 20), ("layers", 3, 30)]
    assert all(row.hooks > 0 and row.ours > 0 for row in rows)


def test_a_size_is_a_sweep_of_that_many_layers_positions_and_prompts(model):
    case = sweep_growth.Size(layers=3, positions=6, prompts=2).case(model)

    assert (len(case.layers), tuple(case.clean.shape)) == (3, (2, 6))
    assert case.model.config.hidden_size == model.config.hidden_size
    assert (case.clean != case.corrupted).nonzero().tolist() == [[0, 3], [1, 3]]


def test_the_report_has_every_contender_and_fails_when_numbers_differ(capsys, monkeypatch):
    options = [
        "--models=tiny-gpt2",
        "--pairs=5 tokens",
        "--sweeps=heads",
        "--repeats=1",
        "--only=intervenable",
    ]
    options += ["--parts=speed"]
    monkeypatch.setattr(sweep_turns, "BLOCK_SECONDS", 0.0)

    assert sweep.main([*options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [result["contender"] for result in figures["results"]] == [HOOKS, *LIBRARIES]
    assert all(result["seconds"]["median"] > 0 for result in figures["results"])
    assert figures["limits"][0]["by_hooks"] > figures["limits"][0]["changed"] > 0

    monkeypatch.setattr(sweep, "TOLERANCE", -1.0)
    assert sweep.main([*options, "--markdown"]) == 1
    output = capsys.readouterr()
    assert "| hooks by hand | " in output.out
    assert "intervenable, heads of tiny-gpt2, 5 tokens: the numbers differ from the hooks' by" in output.err
