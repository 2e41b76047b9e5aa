"""Records of the survey of maps, kept in a file: what was found out is not asked again while nothing has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "out" / "maps.jsonl"
ASKED = ("intervenable", "interventions", "model_maps")
"""The packages on whose sources the records depend, beside those of the tiny models."""


class KeptRecords:
    """A file with a record in each line, of use as long as the sources that it was made with are the same.

    Args:
        file: The file; made when the first record is kept.
    """

    def __init__(self, file: Path = KEPT) -> None:
        self._file = file

    @cached_property
    def sources(self) -> str:
        """What the records depend on: the sources of the library and of the tiny models, and the versions below."""
        digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
        files = [path for name in ASKED for path in (ROOT / name).rglob("*.py")]
        files += [*(ROOT / "tests").glob("tiny_registry*.py"), ROOT / "tests" / "map_survey.py"]
        for path in sorted(files):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records that are of use: none if sources have changed since; what was cut off is left out."""
        if not self._file.exists():
            return
        for line in self._file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["sources"] == self.sources:
                yield entry["record"]

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep one more."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sources": self.sources, "record": record}) + "\n")

    def cleared(self) -> KeptRecords:
        """The same, with nothing left in the file but what is of use."""
        records = list(self)
        self._file.unlink(missing_ok=True)
        for record in records:
            self.add(record)
        return self
