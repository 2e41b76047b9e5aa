"""The engine that computes once what does not change gives what the plain path gives, on every family."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intervenable as iv
from intervenable.training_data import read_examples
from intervenable.training_engine import PlainEngine, Read
from intervenable.training_store import Budget, RowStore
from intervenable.training_suffix import WAYS, Shortcuts, SuffixEngine, make_engine, shared_records
from intervenable.wave_rows import NoShortcutError
from interventions import InterventionShapeError
from interventions.rotation import held_bases
from tiny_models import DECODERS, ENCODERS, VOCABULARY, tiny

COUNT, LENGTH = 8, 6
EVERYTHING = WAYS[0]


def frozen(family: str, **options: Any) -> nn.Module:
    return tiny(family, **options).requires_grad_(False)


def rows(
    padding: str | None = None, seed: int = 0, count: int = COUNT, groups: int = 0
) -> dict[str, list[Any]]:
    """Random counterfactual examples; with padding they have 3 to 6 tokens."""
    made = torch.Generator().manual_seed(seed)
    lengths = [LENGTH if padding is None else 3 + row % 4 for row in range(count)]

    def prompts() -> dict[str, Tensor]:
        ids = torch.randint(5, VOCABULARY, (count, LENGTH), generator=made)
        places = torch.arange(LENGTH)
        mask = torch.stack(
            [places >= LENGTH - n if padding == "left" else places < n for n in lengths]
        ).long()
        return {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": mask}

    base = prompts()
    sources = [prompts() for _ in range(groups or 1)]
    joined = {key: [source[key] for source in sources] for key in base}
    columns = {
        **base,
        **{f"source_{key}": torch.stack(value, 1) if groups else value[0] for key, value in joined.items()},
        "labels": torch.randint(0, VOCABULARY, (count,), generator=made),
    }
    return {key: list(value) for key, value in columns.items()}


def das(
    layer: int, component: str = "block_output", rank: int = 2, **options: Any
) -> iv.RepresentationConfig:
    return iv.RepresentationConfig(
        layer,
        component,
        low_rank_dimension=rank,
        intervention_type=iv.LowRankRotatedSpaceIntervention,
        **options,
    )


def engines(
    lm: nn.Module,
    declared: Any,
    columns: dict[str, list[Any]],
    unit_locations: Any = "last",
    way: Shortcuts = EVERYTHING,
    memory: int = 10**9,
    **options: Any,
) -> tuple[SuffixEngine, PlainEngine]:
    torch.manual_seed(0)
    model = iv.IntervenableModel(declared, lm)
    examples = read_examples(columns, model, unit_locations=unit_locations, **options)
    return SuffixEngine(model, examples, way, memory), PlainEngine(model, examples)


def gradients(model: nn.Module, read: Read) -> list[Tensor]:
    """Of a loss written out by hand."""
    logits = read.logits.log_softmax(-1)
    asked = read.labels != -100
    picked = logits.gather(-1, read.labels.clamp(min=0)[..., None])[..., 0]
    loss = -(picked * asked).sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_same(fast: SuffixEngine, plain: PlainEngine, some: list[int], tolerance: float = 1e-5) -> None:
    here, there = fast.step(some), plain.step(some)
    assert torch.equal(here.labels, there.labels)
    asked = (there.labels != -100)[..., None]
    torch.testing.assert_close(here.logits * asked, there.logits * asked, rtol=tolerance, atol=tolerance * 10)
    for one, other in zip(gradients(fast.model, here), gradients(plain.model, there), strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", [*DECODERS])
def test_logits_and_gradients_are_those_of_the_plain_path(family: str, padding: str | None) -> None:
    lm = frozen(family)
    fast, plain = engines(lm, das(1), rows(padding))
    assert_same(fast, plain, [2, 0, 5, 7])
    assert_same(fast, plain, [1, 3, 2])


@pytest.mark.parametrize("family", [*DECODERS])
def test_every_family_of_decoders_leaves_out_everything(family: str) -> None:
    lm = frozen(family)
    model = iv.IntervenableModel(das(1), lm)
    examples = read_examples(rows(), model, unit_locations="last")
    engine = make_engine(model, examples)
    assert isinstance(engine, SuffixEngine)
    assert engine.way == EVERYTHING


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_leave_out_blocks_and_no_tokens(family: str) -> None:
    lm = frozen(family, head="classifier")
    columns = rows("right")
    columns["labels"] = [int(label) % 3 for label in columns["labels"]]
    model = iv.IntervenableModel(das(1), lm)
    examples = read_examples(columns, model, unit_locations=1)
    plain = PlainEngine(model, examples)
    engine = make_engine(model, examples)
    assert isinstance(engine, SuffixEngine)
    assert engine.way.blocks
    assert not engine.way.tokens
    assert_same(engine, plain, [2, 0, 5, 7])


@pytest.mark.parametrize(
    "component", ["block_input", "block_output", "attention_output", "mlp_output", "mlp_input"]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_every_place_in_a_block_gives_the_same(component: str, layer: int) -> None:
    fast, plain = engines(frozen("llama"), das(layer, component), rows("right"), 1 if layer == 0 else "last")
    assert_same(fast, plain, [0, 4, 1])


def test_heads_give_the_same() -> None:
    where = {"sources->base": {"heads": [0, 2], "positions": -1}}
    columns = rows("left")
    lm = frozen("llama")
    width = iv.IntervenableModel(iv.RepresentationConfig(1, "head_attention_value_output", "h.pos"), lm)
    size = width._bound[0].site.width
    declared = iv.RepresentationConfig(
        1, "head_attention_value_output", "h.pos", intervention=iv.SigmoidMaskIntervention(size)
    )
    fast, plain = engines(lm, declared, columns, where)
    assert_same(fast, plain, [3, 6, 1])


def test_each_example_may_have_positions_and_subspaces_of_its_own() -> None:
    columns = rows("right")
    columns["base_position"] = [row % 3 for row in range(COUNT)]
    columns["source_position"] = [(row + 1) % 3 for row in range(COUNT)]
    columns["subspaces"] = [[[row % 2]] for row in range(COUNT)]
    fast, plain = engines(frozen("qwen2"), das(1), columns, None)
    assert_same(fast, plain, [2, 3, 7])
    assert_same(fast, plain, [0])


def test_labels_of_tokens_are_read_where_they_are_asked() -> None:
    columns = rows("right")
    labels = torch.full((COUNT, LENGTH), -100)
    labels[:, 2] = 7
    labels[::2, 1] = 9
    columns["labels"] = list(labels)
    fast, plain = engines(frozen("llama"), das(1), columns, 1)
    assert_same(fast, plain, [2, 3, 7])


def test_several_groups_of_linked_interventions_give_the_same() -> None:
    declared = [
        das(0, group_key="a", intervention_link_key="one"),
        das(2, group_key="b", intervention_link_key="one"),
    ]
    fast, plain = engines(frozen("gpt2"), declared, rows(groups=2), 3)
    assert len(list(fast.model.parameters())) == 1
    assert_same(fast, plain, [1, 2, 6])


def test_an_edit_without_a_source_gives_the_same() -> None:
    lm = frozen("llama")
    width = lm.config.hidden_size
    declared = iv.RepresentationConfig(1, "block_output", intervention=iv.LoreftIntervention(width, 2))
    columns = rows("left")
    columns = {key: value for key, value in columns.items() if not key.startswith("source")}
    fast, plain = engines(lm, declared, columns, -2)
    assert_same(fast, plain, [1, 2, 6])


def test_a_model_without_tokens_gives_the_same() -> None:
    torch.manual_seed(0)
    mlp = iv.MLPClassifier(width=6, layers=3, classes=4).requires_grad_(False).eval()
    columns = {
        "input_ids": list(torch.randn(COUNT, 6)),
        "source_input_ids": list(torch.randn(COUNT, 6)),
        "labels": [row % 4 for row in range(COUNT)],
    }
    model = iv.IntervenableModel(das(1), mlp)
    examples = read_examples(columns, model, unit_locations=0)
    plain = PlainEngine(model, examples)
    engine = make_engine(model, examples)
    assert isinstance(engine, SuffixEngine)
    assert engine.way.blocks
    assert_same(engine, plain, [2, 0, 5, 7])


def test_two_stacks_keep_their_source_values_alone() -> None:
    lm = frozen("t5")
    columns = rows()
    for key in ("input_ids", "source_input_ids"):
        columns[key.replace("input_ids", "decoder_input_ids")] = [row.flip(0) for row in columns[key]]
    model = iv.IntervenableModel(das(0, "decoder_block_output"), lm)
    examples = read_examples(columns, model, unit_locations="last")
    plain = PlainEngine(model, examples)
    engine = make_engine(model, examples)
    assert_same(engine, plain, [2, 0, 5]) if isinstance(engine, SuffixEngine) else None
    assert not (isinstance(engine, SuffixEngine) and engine.way.tokens)


# --- what is computed how often ---------------------------------------------------------------------------


def counted(module: nn.Module, act: Callable[[], object]) -> list[tuple[int, ...]]:
    """The shapes of what a module's own forward computes while something runs."""
    shapes: list[tuple[int, ...]] = []
    handle = module.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape)))
    try:
        act()
    finally:
        handle.remove()
    return shapes


def test_each_prompt_runs_once_however_often_it_is_asked_for() -> None:
    columns = rows()
    columns["input_ids"] = [columns["input_ids"][row % 3] for row in range(COUNT)]
    lm = frozen("llama")
    fast, _ = engines(lm, das(1), columns)
    inside = lm.model.layers[0].mlp  # stubbed blocks do not compute it

    ran = counted(inside, lambda: [fast.step([0, 1, 2, 3]), fast.step([4, 5, 6, 7]), fast.step([0, 7])])

    sources = [shape[0] for shape in ran]
    assert sum(sources) == 3 + COUNT  # three different bases, and each source


def test_a_step_computes_read_tokens_alone() -> None:
    lm = frozen("llama")
    fast, _ = engines(lm, das(1), rows())
    fast.step([0, 1, 2])
    above = lm.model.layers[2].mlp
    assert counted(above, lambda: fast.step([0, 1, 2])) == [(3, 1, lm.config.hidden_size)]
    assert counted(lm.lm_head, lambda: fast.step([0, 1, 2])) == [(3, 1, VOCABULARY)]


def test_what_does_not_fit_into_memory_is_kept_in_a_file_and_gives_the_same() -> None:
    fast, plain = engines(frozen("llama"), das(1), rows("left"), memory=1)
    assert_same(fast, plain, [2, 0, 5, 7])
    assert_same(fast, plain, [7, 1])
    assert "in a file" in fast.notes[-1]


def test_rows_come_back_as_they_were_put() -> None:
    for free in (10**6, 0):
        store = RowStore(5, torch.zeros(1, 2, 3), Budget(free))
        values = torch.randn(3, 2, 3)
        store.put([4, 0, 2], values)
        assert torch.equal(store.at(torch.tensor([0, 2, 4, 0])), values[[1, 2, 0, 1]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_gives_what_the_plain_path_gives_under_it(family: str) -> None:
    lm = frozen(family)
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = engines(lm, das(1), rows("right"))
        assert fast.is_exact(plain)
        here, there = fast.step([4, 2, 1]).logits.float(), plain.step([4, 2, 1]).logits.float()
    assert (here - there).norm() <= 0.02 * there.norm()


# --- the model is left alone ------------------------------------------------------------------------------


def test_the_model_is_as_it_was_even_if_a_step_fails() -> None:
    lm = frozen("gpt2")
    fast, _ = engines(lm, das(1), rows())
    before = {name: (set(vars(module)), dict(module._forward_hooks)) for name, module in lm.named_modules()}
    fast.step([0, 1])

    def fails(module: nn.Module, given: Any) -> None:
        raise RuntimeError("stop here")

    handle = lm.transformer.h[2].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="stop here"):
        fast.step([0, 1])
    handle.remove()
    after = {name: (set(vars(module)), dict(module._forward_hooks)) for name, module in lm.named_modules()}
    assert before == after


def test_another_thread_meets_the_whole_model_while_blocks_are_stubbed() -> None:
    lm = frozen("llama")
    fast, _ = engines(lm, das(1), rows())
    fast.step([0, 1])
    ids = torch.arange(5, 10)[None]
    truth = lm(ids).logits
    seen: list[Tensor] = []

    def elsewhere(module: nn.Module, given: Any) -> None:
        if not seen:
            seen.append(torch.zeros(()))
            other = Thread(target=lambda: seen.append(lm(ids).logits))
            other.start()
            other.join()

    handle = lm.model.layers[2].register_forward_pre_hook(elsewhere)
    fast.step([0, 1])
    handle.remove()
    torch.testing.assert_close(seen[1], truth)


def test_a_model_whose_blocks_say_more_than_hidden_states_is_not_believed() -> None:
    class Telling(nn.Module):
        """A block that counts up a number which the next block reads."""

        def __init__(self, inner: nn.Module, told: list[float]) -> None:
            super().__init__()
            self.inner, self.told = inner, told

        def forward(self, hidden: Tensor) -> Tensor:
            self.told[0] += float(hidden.detach().abs().mean())
            return self.inner(hidden) * (1 + self.told[0])

    torch.manual_seed(0)
    mlp = iv.MLPClassifier(width=6, layers=3, classes=4).requires_grad_(False).eval()
    told = [0.0]
    mlp.layers = nn.ModuleList(Telling(block, told) for block in mlp.layers)
    mlp.register_forward_pre_hook(lambda module, given: told.__setitem__(0, 0.0))
    columns = {
        "input_ids": list(torch.randn(COUNT, 6)),
        "source_input_ids": list(torch.randn(COUNT, 6)),
        "labels": [row % 4 for row in range(COUNT)],
    }
    model = iv.IntervenableModel(das(1), mlp)
    examples = read_examples(columns, model, unit_locations=0)
    engine = make_engine(model, examples)
    assert not (isinstance(engine, SuffixEngine) and engine.way.blocks)


def test_leaving_out_tokens_is_refused_where_none_come_first() -> None:
    with pytest.raises(NoShortcutError, match="no tokens come before"):
        engines(frozen("llama"), das(1), rows(), 0)


# --- bases that are made once -----------------------------------------------------------------------------


def test_a_held_basis_gathers_the_gradients_that_it_would_have_got_one_by_one() -> None:
    torch.manual_seed(0)
    swap = iv.LowRankRotatedSpaceIntervention(6, 2)
    base, source = torch.randn(2, 3, 6), torch.randn(2, 3, 6)

    def losses() -> list[Tensor]:
        return [(swap(b, s) ** 3).sum() for b, s in zip(base, source, strict=True)]

    sum(losses()).backward()
    truth = swap.rotation.weight.grad.clone()
    swap.zero_grad()
    with held_bases(swap):
        for loss in losses():
            loss.backward()
        assert swap.rotation.weight.grad is None
    torch.testing.assert_close(swap.rotation.weight.grad, truth)


def test_a_basis_is_let_go_when_a_step_fails() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(6, 2)

    def failing() -> None:
        with held_bases(swap):
            swap(torch.ones(1, 6), torch.zeros(1, 6)).sum().backward()
            swap(torch.ones(1, 5), torch.zeros(1, 5))

    with pytest.raises(InterventionShapeError):
        failing()
    assert swap.rotation.weight.grad is None
    swap.rotation.weight.data.neg_()
    swap(torch.ones(1, 6), torch.zeros(1, 6)).sum().backward()
    assert swap.rotation.weight.grad is not None


# --- several trainings ------------------------------------------------------------------------------------


def test_engines_in_one_block_share_what_they_record_of_the_same_prompts_at_the_same_place() -> None:
    lm = frozen("llama")
    columns = rows("right")
    inside = lm.model.layers[0].mlp

    def ran(declared: Any, given: dict[str, list[Any]], where: Any = "last") -> list[tuple[int, ...]]:
        fast, plain = engines(lm, declared, given, where)
        found = counted(inside, lambda: fast.step(range(COUNT)))
        assert_same(fast, plain, [2, 0, 5])
        return found

    with shared_records():
        assert len(ran(das(1), columns)) == 2  # bases, and sources
        assert ran(das(1, rank=3), columns) == []
        assert len(ran(das(2), columns)) == 2
        assert len(ran(das(1), columns, 1)) == 2
        assert len(ran(das(1), rows("right", seed=1))) == 2
        assert len(ran(das(1, "mlp_output"), columns)) == 2
    assert len(ran(das(1), columns)) == 2
