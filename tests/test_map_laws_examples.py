"""What is one example's own among what a model is given, holds and returns for several at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from intervenable.map_inference import infer_map
from intervenable.map_inputs import example_inputs
from intervenable.map_laws import deviation
from intervenable.map_laws_examples import Examples
from intervenable.map_laws_residual import _equal
from intervenable.map_laws_runs import Bench
from intervenable.map_twin import twin_of
from intervenable.map_verification import check_map
from model_maps import ModelMap, Site


@pytest.fixture(scope="module")
def of_pairs() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in which each clip is compared with each text, whose vectors depend on the clip."""
    with torch.device("meta"):
        model = transformers.XCLIPModel(transformers.XCLIPConfig())
    twin = twin_of(model)
    return twin, example_inputs(twin)


def test_of_vectors_for_each_pair_an_example_has_that_of_its_own(of_pairs: Any) -> None:
    model, inputs = of_pairs
    with torch.no_grad():
        output = model(**inputs)
        second = model(**{name: value[1:] for name, value in inputs.items()})
    assert output.text_embeds.shape[:2] == (2, 2)

    found = Examples(model, inputs).in_output(output)

    torch.testing.assert_close(found[1], torch.cat([second.text_embeds[0, 0], second.video_embeds[0]]))


def test_experiments_are_made_with_one_example_where_it_returns_what_it_does_beside_others(
    of_pairs: Any,
) -> None:
    model, inputs = of_pairs
    bench = Bench(model, ModelMap(("XCLIPModel",), None, {}), inputs)

    assert bench.narrow(bench.plain())
    assert {len(value) for value in bench.experimented.values()} == {1}


def test_a_place_that_has_more_of_an_example_the_more_are_beside_it_is_refused(of_pairs: Any) -> None:
    model, inputs = of_pairs

    found = check_map(model, infer_map(model, inputs), inputs)

    assert "depends on how many are beside it" in found.refused["decoder_block_output"]
    assert {"vision_block_output", "encoder_query_output"} <= {*found.components}


class Growing(nn.Module):
    """Blocks in which each example has as many positions as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, vectors: Tensor) -> Tensor:
        stream = self.embedding(vectors)[:, None] + self.embedding(vectors)[None]
        for block in self.blocks:
            stream = stream + block(stream)
        return stream.sum(1)


def test_what_grows_with_the_examples_is_refused() -> None:
    torch.manual_seed(0)
    model = Growing().eval()
    described = ModelMap(("Growing",), "blocks", {"block_input": Site("", "input"), "block_output": Site("")})

    found = check_map(model, described, {"vectors": torch.randn(3, 4)})

    assert not found.components
    assert all("depends on how many are beside it" in found.refused[name] for name in described.sites)


@given(
    st.lists(st.floats(-9, 9, width=32) | st.just(float("inf")), min_size=12, max_size=12),
    st.lists(st.sampled_from([0.0, 0.0, 1e-6, 1e-3, 1.0]), min_size=12, max_size=12),
    st.sampled_from([1e-4, 1e-2, 0.5]),
)
def test_vectors_are_equal_where_they_deviate_within_the_limit(
    values: list[float], changes: list[float], limit: float
) -> None:
    one = torch.tensor(values).view(2, 2, 3)
    other = one + torch.tensor(changes).view(2, 2, 3)

    assert _equal(other, one, limit) == (deviation(other, one) <= limit)
