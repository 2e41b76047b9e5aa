"""Positions as people say them, where activations are collected."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

import intervenable as iv

TEXTS = ["The capital of Spain is", "After the capital of Italy is", "The capital of Spain is"]
COUNTRY = iv.Regex(r"of (\w+)", group=1)
BY_INTS = [[3], [4], [3]]


@pytest.fixture(scope="module")
def small_lm():
    return iv.load_small_lm()


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("entry", [COUNTRY, [COUNTRY], "country", iv.PerExample(["Spain", "Italy", 3])])
def test_words_are_collected_where_they_stand_in_each_text(small_lm, entry, batch_size):
    tokenizer, model = small_lm
    resolver = iv.PositionResolver(tokenizer, names={"country": COUNTRY})

    def collected(where):
        return iv.collect(
            model,
            TEXTS,
            "block_output",
            1,
            positions=where,
            tokenizer=resolver,
            batch_size=batch_size,
            ragged="pad",
        )["block_output", 1]

    assert iv.positions(resolver, TEXTS, entry) == BY_INTS
    assert_close(collected(entry), collected(BY_INTS), rtol=0, atol=0)


def test_words_need_a_tokenizer(small_lm):
    inputs = small_lm[0](TEXTS[:1], return_tensors="pt")
    with pytest.raises(
        iv.LocationError, match="is looked for in the text of example 0, and there is no tokenizer"
    ):
        iv.collect(small_lm[1], inputs, "block_output", 1, positions="Spain")
