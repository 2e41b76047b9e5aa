"""Inferred maps are those that were written by hand, and toy models' are what their code says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny_registry import build
from torch import Tensor, nn
from written_maps import find_map

from intervenable.map_inference import infer_map
from model_maps import COMPONENTS, HeadColumns, ModelMap, Site, columns_of, sizes_of
from tiny_models import CASES, ENCODER_DECODER_CASES, MULTIMODAL, RECURRENT, tiny, tiny_inputs

WRITTEN = [
    (family, variant)
    for family, variant in (*CASES, *ENCODER_DECODER_CASES, (MULTIMODAL, None))
    # How many heads share keys changes no path; Llama's show that it changes the columns as written.
    if family not in RECURRENT and (family == "llama" or variant not in ("full", "single"))
]

OTHERWISE = {
    # The head of masked language models is all of what returns the logits; `BertForPreTraining` returns more.
    ("bert", "logits"): "cls",
}
"""Paths that are inferred otherwise than written, to a module that returns the same."""


def written_map(model: nn.Module) -> ModelMap:
    return find_map([cls.__name__ for cls in type(model).__mro__], model.config)


def place(site: Site | None, model: nn.Module) -> Any:
    """What two sites for one tensor have in common, however their columns are stated."""
    if site is None:
        return None
    columns = columns_of(site, sizes_of(model.config))
    firsts = None if columns is None else _columns(columns)
    return site.path, site.side, site.slot, site.flat, site.plus, site.scale, site.axes, site.function, firsts


def _columns(columns: HeadColumns) -> list[tuple[int, int]]:
    return [(columns.first_column(head), columns.width) for head in range(columns.heads)]


@pytest.mark.parametrize(("family", "variant"), WRITTEN)
def test_the_inferred_map_is_the_written_one(family: str, variant: str | None) -> None:
    model = tiny(family, variant=variant)
    written = written_map(model)

    found = infer_map(model, tiny_inputs(model))

    assert (found.blocks, found.stacks, found.causal) == (written.blocks, written.stacks, written.causal)
    assert found.kinds == ()
    assert found.decoder_reads == written.decoder_reads
    expected = {name: place(written.site(name), model) for name in COMPONENTS}
    for (other, name), path in OTHERWISE.items():
        if other == family:
            expected[name] = (path, *expected[name][1:])
    assert {name: place(found.site(name), model) for name in COMPONENTS} == expected


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "bert", "t5"])
def test_a_model_without_a_head_has_the_same_sites_and_no_logits(family: str) -> None:
    model = tiny(family, head="base")
    written = written_map(model)

    found = infer_map(model, tiny_inputs(model))

    assert {n: place(found.site(n), model) for n in COMPONENTS} == {
        n: place(written.site(n), model) for n in COMPONENTS
    }
    assert found.reason("logits") == "it is the bare stack of blocks, without a head"


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert"])
def test_every_absent_component_has_a_reason(family: str) -> None:
    model = tiny(family)

    found = infer_map(model, tiny_inputs(model))

    for name in COMPONENTS:
        assert (found.site(name) is None) == bool(found.reason(name))
        assert found.reason(name) != "its map does not place it"


# --- toy models -------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Each position gets the running mean of a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)

    def forward(self, stream: Tensor) -> Tensor:
        summed = self.projection(stream).cumsum(1)
        return summed / torch.arange(1, stream.shape[1] + 1)[:, None]


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)

    def forward(self, stream: Tensor) -> Tensor:
        return self.down(self.act(self.up(stream)))


class Block(nn.Module):
    """A block that mixes, then computes; `style` says how it adds."""

    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        self.before, self.mixing = nn.LayerNorm(width), Mixing(width)
        self.between, self.mlp = nn.LayerNorm(width), Perceptron(width)
        self.style = style

    def forward(self, stream: Tensor) -> Tensor:
        if self.style == "parallel":
            return stream + self.mixing(self.before(stream)) + self.mlp(self.between(stream))
        if self.style == "scaled":
            stream = stream + 0.25 * self.mixing(self.before(stream))
            return stream + 0.5 * self.mlp(self.between(stream))
        if self.style == "after":
            stream = self.before(stream + self.mixing(stream))
            return self.between(stream + self.mlp(stream))
        if self.style == "gated":
            return torch.tanh(stream) * self.mixing(stream) + self.mlp(self.between(stream))
        stream = stream + self.mixing(self.before(stream))
        return stream + self.mlp(self.between(stream))


class Toy(nn.Module):
    """Token embedding, blocks, norm, head."""

    def __init__(self, style: str = "before", layers: int = 3, times: int = 1, width: int = 12) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.blocks = nn.ModuleList(Block(width, style) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 30)
        self.times = times

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.table(input_ids)
        for _ in range(self.times):
            for block in self.blocks:
                stream = block(stream)
        return self.head(self.norm(stream))


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Mapping[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval(), {"input_ids": torch.randint(0, 30, (2, 7))}


def paths(found: ModelMap, *names: str) -> dict[str, tuple[str, str]]:
    sites = {name: found.site(name) for name in names}
    return {name: (site.path, site.side) for name, site in sites.items() if site is not None}


def test_a_block_is_taken_apart_as_its_code_says() -> None:
    found = infer_map(*made(Toy))

    assert found.blocks == "blocks"
    assert paths(found, *COMPONENTS) == {
        "embedding_output": ("table", "output"),
        "block_input": ("", "input"),
        "block_mid": ("mixing", "output"),
        "block_output": ("", "output"),
        "mixer_input": ("mixing", "input"),
        "mixer_output": ("mixing", "output"),
        "mixer_contribution": ("mixing", "output"),
        "mlp_input": ("mlp", "input"),
        "mlp_pre_activation": ("mlp.act", "input"),
        "mlp_activation": ("mlp.act", "output"),
        "mlp_hidden": ("mlp.down", "input"),
        "mlp_output": ("mlp", "output"),
        "mlp_contribution": ("mlp", "output"),
        "final_norm_input": ("norm", "input"),
        "final_norm_output": ("norm", "output"),
        "final_norm_scale": ("norm", "output"),
        "logits": ("head", "output"),
    }
    assert found.site("block_mid").plus == "block_input"
    assert found.causal


def test_parallel_branches_have_no_stream_between_them() -> None:
    found = infer_map(*made(lambda: Toy("parallel")))

    assert found.site("block_mid") is None
    assert (
        found.reason("block_mid")
        == "it adds attention and MLP in parallel, so there is no stream between them"
    )
    assert found.site("mlp_input") == Site("mlp", "input", width="any")


def test_a_factor_of_a_contribution_is_its_scale() -> None:
    found = infer_map(*made(lambda: Toy("scaled")))

    assert found.site("mixer_contribution").scale == 0.25
    assert found.site("mlp_contribution").scale == 0.5
    assert found.site("mlp_output").scale == 1.0
    assert (found.site("block_mid").scale, found.site("block_mid").plus) == (0.25, "block_input")


def test_where_norms_follow_the_sums_the_first_norm_returns_the_middle() -> None:
    found = infer_map(*made(lambda: Toy("after")))

    assert paths(found, "block_mid", "mlp_input") == {
        "block_mid": ("before", "output"),
        "mlp_input": ("mlp", "input"),
    }
    assert found.site("block_mid").plus is None


def test_what_is_no_sum_is_refused_with_the_reason_and_the_rest_is_placed() -> None:
    found = infer_map(*made(lambda: Toy("gated")))

    assert "is no sum" in found.reason("block_mid")
    assert "is no sum" in found.reason("mlp_contribution")
    assert paths(found, "block_output", "mlp_output") == {
        "block_output": ("", "output"),
        "mlp_output": ("mlp", "output"),
    }


def test_blocks_that_run_twice_are_refused_with_the_number_of_times() -> None:
    found = infer_map(*made(lambda: Toy(times=2)))

    assert found.site("block_output") is None
    assert "run 2 times in a forward pass" in found.reason("block_output")
    assert found.site("logits") is not None


def test_a_part_that_blocks_share_is_refused() -> None:
    def sharing() -> Toy:
        toy = Toy()
        for block in toy.blocks:
            block.mlp = toy.blocks[0].mlp
        return toy

    found = infer_map(*made(sharing))

    assert found.site("mlp_output") is None
    assert "runs 3 times in a forward pass" in found.reason("mlp_output")
    assert found.site("mixer_output") is not None


def test_a_list_of_modules_that_is_no_chain_is_no_stack() -> None:
    class Beside(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            stream = self.table(input_ids)
            return self.head(self.norm(sum(block(stream) for block in self.blocks)))

    found = infer_map(*made(Beside))

    assert found.blocks is None
    assert "hands a stream" in found.reason("block_output")


def test_layers_of_another_kind_are_listed_apart() -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(width), Perceptron(width)

        def forward(self, stream: Tensor) -> Tensor:
            return stream + self.mlp(self.norm(stream))

    def hybrid() -> Toy:
        toy = Toy(layers=4)
        toy.blocks[1] = Bare(12)
        return toy

    found = infer_map(*made(hybrid))

    (kind,) = found.kinds
    assert kind.layers == (1,)
    assert found.site("mixer_output", 0) is not None
    assert found.site("mixer_output", 1) is None
    assert found.reason("mixer_output", 1) == "its blocks mix positions by attention alone"
    assert found.site("mlp_hidden", 1).path == "mlp.down"


def test_a_layer_that_adds_its_result_as_it_is_has_no_factor_of_other_layers() -> None:
    def uneven() -> Toy:
        toy = Toy("scaled", layers=4)
        toy.blocks[2].style = "before"
        return toy

    found = infer_map(*made(uneven))

    assert [found.site("mlp_contribution", layer).scale for layer in range(4)] == [0.5, 0.5, 1.0, 0.5]
    assert [found.site("block_mid", layer).scale for layer in range(4)] == [0.25, 0.25, 1.0, 0.25]


def test_a_block_that_is_not_called_has_no_components() -> None:
    class Short(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            stream = self.table(input_ids)
            for block in list(self.blocks)[:-1]:
                stream = block(stream)
            return self.head(self.norm(stream))

    found = infer_map(*made(lambda: Short(layers=4)))

    assert found.site("block_output", 2) is not None
    assert found.reason("block_output", 3) == "a forward pass does not call it"


def test_inference_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = tiny("llama")
    inputs = tiny_inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value.clone() for name, value in inputs.items()}
    state = torch.random.get_rng_state()

    infer_map(model, inputs)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(inputs[name], value) for name, value in given.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- architectures without a written map ------------------------------------------------------------------


def inferred(model_type: str) -> ModelMap:
    tiny_model = build(model_type)
    return infer_map(tiny_model.model, tiny_model.inputs)


def test_positions_are_on_the_first_axis_of_xlnet() -> None:
    found = inferred("xlnet")

    assert [found.site(name).axes for name in ("embedding_output", "block_input", "mlp_hidden")] == [
        (1, 0)
    ] * 3
    assert not found.causal


def test_the_multiplier_of_granite_is_the_scale_of_what_is_added() -> None:
    model = build("granite", seed=0).model
    model.config.residual_multiplier = 0.22
    for block in model.model.layers:
        block.residual_multiplier = 0.22

    found = infer_map(model, {"input_ids": torch.arange(10, 24).view(2, 7)})

    assert found.site("attention_contribution").scale == pytest.approx(0.22, rel=1e-5)
    assert found.site("mlp_contribution").scale == pytest.approx(0.22, rel=1e-5)


def test_layers_with_a_state_space_and_layers_with_attention_are_two_kinds() -> None:
    found = inferred("jamba")
    attending = [layer for layer in range(4) if found.site("attention_pattern", layer)]
    mixing = [layer for layer in range(4) if found.site("mixer_output", layer)]

    assert attending
    assert sorted(attending + mixing) == [0, 1, 2, 3]
    assert all(found.site("mixer_state", layer) for layer in mixing)
    assert all(found.site("block_mid", layer) for layer in range(4))


def test_blocks_that_run_several_times_in_a_forward_pass_say_so() -> None:
    found = inferred("hrm_text")

    assert found.site("block_output") is None
    assert "times in a forward pass" in found.reason("block_output")
    assert found.site("logits").path == "lm_head"


class _Shrinks(nn.Module):
    """A module with a part that hands on half of its columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, width // 2)

    def forward(self, given: Tensor) -> Tensor:
        return self.narrow(given)


class _Narrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.stages = nn.ModuleList(_Shrinks(width) for width in (32, 16, 8))

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.table(input_ids)
        for stage in self.stages:
            stream = stage(stream)
        return stream


def test_of_modules_whose_stream_changes_its_size_the_reason_says_which() -> None:
    torch.manual_seed(0)

    found = infer_map(_Narrowing(), {"input_ids": torch.arange(14).view(2, 7)})

    assert found.blocks is None
    assert found.reason("block_output") == (
        "what its modules hand on is no stream of one size: 'stages.0' is given (7, 32) for each example and hands on"
        " (7, 16)"
    )


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "falcon", "xlnet", "deepseek_v3"])
def test_as_many_positions_as_heads_are_told_from_them(model_type):
    made = build(model_type)
    heads = sizes_of(made.model.config).query_heads
    short = {name: value[:, :heads] for name, value in made.inputs.items()}
    assert short["input_ids"].shape[1] == heads != made.inputs["input_ids"].shape[1]
    assert infer_map(made.model, short).sites == infer_map(made.model, made.inputs).sites
