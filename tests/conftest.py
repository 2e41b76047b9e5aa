"""What holds for every test: one thread, no network, every shortcut of sweeps."""

from __future__ import annotations

import os

# Before transformers is imported anywhere, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from intervenable import wave_plan

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps take every shortcut, also those that are not worth the trouble in models as small as ours."""
    monkeypatch.setattr(wave_plan, "WORTH", 0.0)
