"""Patching: what becomes of a model's answer when activations of another run are put into it.

`sweep` patches every layer, token or head in turn; `compare_patched` compares whole answers for a few patches.
"""

from __future__ import annotations

from intervenable.comparing import PatchingComparison, compare_patched
from intervenable.sweep_result import SweepResult
from intervenable.sweeping import sweep
from intervenable.wave_learning import forget

__all__ = ["PatchingComparison", "SweepResult", "compare_patched", "forget", "sweep"]
