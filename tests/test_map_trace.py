"""A trace of a run: what each module is given and returns, as it was then, and of a part of the model alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intervenable.map_trace import trace


class ChangesInPlace(nn.Module):
    """Hands one tensor through three modules, and changes it in place between the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        values = self.second(self.first(values * 1.0))
        values.view(-1).add_(1.0)  # through a view, which shares its memory
        result: Tensor = self.third(values)
        return result


def test_a_tensor_changed_in_place_is_kept_as_it_was_and_as_it_is() -> None:
    values = torch.arange(6.0).view(2, 3)

    found = trace(ChangesInPlace(), {"values": values})

    (first,), (second,), (third,) = (found.of(path) for path in ("first", "second", "third"))
    torch.testing.assert_close(first.main_output, values, rtol=0, atol=0)
    torch.testing.assert_close(second.main_output, values, rtol=0, atol=0)
    torch.testing.assert_close(third.main_output, values + 1, rtol=0, atol=0)


def test_what_is_handed_on_unchanged_is_copied_once() -> None:
    found = trace(ChangesInPlace(), {"values": torch.ones(2, 3)})

    (first,), (second,) = found.of("first"), found.of("second")
    assert first.main_output is first.main_input is second.main_input is second.main_output


def test_a_trace_within_a_module_has_its_calls_and_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ReLU())

    found = trace(model, {"input": torch.ones(1, 2)}, within=model[1])

    assert [call.path for call in found.calls] == ["", "1", "1.0", "1.1"]
    assert [call.parent.path for call in found.calls if call.parent is not None] == ["", "1", "1"]


def test_inputs_made_in_inference_mode_are_kept_as_any_others() -> None:
    with torch.inference_mode():
        values = torch.ones(2, 3)  # counts no changes

    found = trace(nn.Identity(), {"input": values})

    torch.testing.assert_close(found.root.main_input, torch.ones(2, 3))
