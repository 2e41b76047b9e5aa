"""The garbage collector is off in a block and as it was behind it, also where threads do it at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from intervenable.collections_paused import collections_paused
from intervenable.map_making import make_map
from model_maps import UnmappedModelError


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


def test_it_is_off_in_the_block_and_in_those_inside_of_it_and_on_again_behind_them() -> None:
    with collections_paused():
        with collections_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    with collections_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_it_is_on_again_whatever_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt), collections_paused():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_it_is_off_until_the_last_of_several_threads_has_left_its_block() -> None:
    inside, leave, seen = threading.Barrier(3), threading.Event(), []

    def stay() -> None:
        with collections_paused():
            inside.wait(30)
            leave.wait(30)

    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(stay)
        with collections_paused():
            other = pool.submit(stay)
            inside.wait(30)
        seen.append(gc.isenabled())
        leave.set()
        staying.result()
        other.result()
    assert seen == [False]
    assert gc.isenabled()


class Broken(Starcoder2ForCausalLM):
    def forward(self, input_ids: torch.Tensor) -> None:  # type: ignore[override]
        raise RuntimeError("it does not run")


def config() -> Starcoder2Config:
    narrow = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 72}
    return Starcoder2Config(**narrow, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)


def test_it_is_on_again_when_a_map_was_made() -> None:
    assert make_map(Starcoder2ForCausalLM(config())).blocks == "model.layers"
    assert gc.isenabled()


def test_it_is_on_again_when_none_could_be_made() -> None:
    with pytest.raises(UnmappedModelError, match="it does not run"):
        make_map(Broken(config()))
    assert gc.isenabled()
