"""Interchange of every component of every family, against pairs of hooks written by hand."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, components_of, heads_of, is_inside, main_output, stored, wrapped
from torch.testing import assert_close

from tiny_models import CASES, tiny, tiny_inputs

TAKEN, GIVEN = [2, 0], [3, 5]
"""Positions in the source and where they go in the base, in both examples."""

OWN_TESTS = ("block_mid", "head_attention_output", "final_norm_scale")
"""Components that no module hands over: `test_block_mid.py`, `test_derived_components.py`."""


def swapped_by_hand(model, component, unit, columns, base, source):
    """The base's output with the source's values in it."""
    value = by_hand.seen(model, component, source)
    chosen = columns if columns is None or unit == "pos" else columns[-1:]
    width = torch.arange(value.shape[-1]) if chosen is None else chosen.flatten()

    def put(stream):
        new = stream.clone()
        for row in range(2):
            if unit == "h":
                new[row, :, width] = value[row, :, width]
                continue
            for taken, given in zip(TAKEN, GIVEN, strict=True):
                new[row, given, width] = value[row, taken, width]
        return new

    return by_hand.run_with(model, component, put, base)


def swapped(model, component, unit, base, source):
    last = heads_of(model, component) - 1
    forms = {
        "pos": lambda positions: [positions] * 2,
        "h": lambda positions: [[last]] * 2,
        "h.pos": lambda positions: [[[last]] * 2, [positions] * 2],
    }
    locations = ([forms[unit](TAKEN)], [forms[unit](GIVEN)])
    declared = wrapped(model, at(model, component, unit))
    return declared(base, [source], {"sources->base": locations}).intervened


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_swap_of_every_component_equals_hooks_written_by_hand(family, variant):
    model = tiny(family, variant=variant)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    places = [(component, unit) for component, unit in stored(model) if component not in OWN_TESTS]
    with torch.no_grad():
        plain = main_output(model(**base))
        for component, unit in places:
            columns = by_hand.columns(family, variant, component)
            expected = main_output(swapped_by_hand(model, component, unit, columns, base, source))

            result = main_output(swapped(model, component, unit, base, source))

            assert_close(result, expected, atol=1e-6, rtol=1e-5, msg=f"{component} {unit}")
            assert (result - plain).abs().max() > 1e-4, f"{component} {unit} changed nothing"


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_reading_of_every_component_is_what_a_hook_sees(family, variant):
    from intervenable import CollectIntervention

    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    names = [name for name in components_of(model) if name not in OWN_TESTS and not is_inside(name)]
    declared = wrapped(model, *(at(model, name, name=name) for name in names), types=CollectIntervention)
    with torch.no_grad():
        collected = declared(inputs).collected
        for name in names:
            expected = by_hand.seen(model, name, inputs)
            columns = by_hand.columns(family, variant, name)
            if columns is not None and name.startswith("head_"):
                expected = expected[..., columns].transpose(1, 2)
            elif columns is not None:
                expected = expected[..., columns.flatten()]
            assert torch.equal(collected[name], expected), name
