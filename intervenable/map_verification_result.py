"""What a verification came to: every finding, what is refused for it, and the table that people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from intervenable.errors import MapError
from intervenable.map_laws import LAWS, Finding
from model_maps import COMPONENTS, ModelMap

if TYPE_CHECKING:
    import pandas as pd

WAY_OUT = "register a map that places it with iv.register_map(...), or name its module path"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What the laws came to for each component of a map, in one model."""

    model: str
    """The class of the model."""

    findings: tuple[Finding, ...]
    """Every law that was looked at, for every component and layer."""

    refused: Mapping[str, str]
    """Component -> which law it broke, where, by how much; also what depends on such a one."""

    absent: Mapping[str, str]
    """Component -> why the map has none."""

    map: ModelMap
    """The map without what was refused: there it says why."""

    components: tuple[str, ...]
    """The components that keep all laws, in every layer that the map gives them."""

    shortcuts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a run of the model can leave out -> how exactly, or why not; what `verify` looks at besides."""

    @property
    def passed(self) -> bool:
        """Whether nothing was refused."""
        return not self.refused

    def check(self) -> Verification:
        """The same verification, if every component kept every law.

        Raises:
            MapError: one did not; every law that was broken is listed.
        """
        if self.refused:
            lines = [f"- {name}: {why.removesuffix(f'; {WAY_OUT}')}" for name, why in self.refused.items()]
            count = len(lines)
            raise MapError(
                f"The map of {self.model} is wrong about {count} component{'s' if count > 1 else ''}:\n"
                + "\n".join(lines)
                + f"\nCorrect the sites, or {WAY_OUT}."
            )
        return self

    def __str__(self) -> str:
        return _table(self)

    def __repr__(self) -> str:
        return _table(self)  # at a prompt it is there to be read

    def to_pandas(self) -> pd.DataFrame:
        """The findings as a table, one a row."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(finding) for finding in self.findings])


def _table(verification: Verification) -> str:
    laws = [law for law in LAWS if any(finding.law == law for finding in verification.findings)]
    names = [*verification.components, *(name for name in verification.refused)]
    names = [name for name in COMPONENTS if name in names]
    results: dict[tuple[str, str], bool] = {}
    for finding in verification.findings:
        key = (finding.component, finding.law)
        results[key] = results.get(key, True) and finding.passed
    marks = {None: "·", True: "✓", False: "✗"}
    width = max(map(len, names), default=0)
    height = max(map(len, laws), default=0)
    right, wrong = len(verification.components), len(verification.refused)
    keep = f"{right} component keeps" if right == 1 else f"{right} components keep"
    lines = [f"{verification.model}: {keep} every law"]
    if wrong:
        lines[0] += f", {wrong} {'is' if wrong == 1 else 'are'} refused"
    lines += [" " * width + "  " + " ".join(law.rjust(height)[row] for law in laws) for row in range(height)]
    for name in names:
        lines.append(f"{name.ljust(width)}  " + " ".join(marks[results.get((name, law))] for law in laws))
    lines += [f"refused {name}: {why}." for name, why in verification.refused.items()]
    reasons = dict.fromkeys(verification.absent.values())
    for why in reasons:
        lines.append(
            f"absent {', '.join(name for name, own in verification.absent.items() if own == why)}: {why}."
        )
    lines += [f"a run can {name}: {how}." for name, how in verification.shortcuts.items()]
    return "\n".join(line.rstrip() for line in lines)
