"""What was swapped in a model and what was not, in words."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

ATTENTION, NORM, GELU = "attention", "residual + LayerNorm", "GELU + bias"


@dataclass(frozen=True)
class Finding:
    """One place of a model.

    name: the module, as `named_modules` calls it.
    operation: what is computed there.
    reason: why it is left as it is; None where it is swapped.
    condition: when a place that is swapped runs its own code all the same.
    """

    name: str
    operation: str
    reason: str | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Report:
    """Every place that was looked at. `str` gives a summary: `blocks.*.attn` for all blocks."""

    findings: tuple[Finding, ...]

    @property
    def swapped(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.reason is None]

    @property
    def left(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.reason is not None]

    def __str__(self) -> str:
        return "\n".join(_section("swapped", self.swapped) + _section("left", self.left))


def _section(title: str, findings: Iterable[Finding]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for found in findings:
        note = found.reason or found.condition or ""
        groups.setdefault((found.operation, note), []).append(found.name)
    lines = []
    for (operation, note), names in groups.items():
        patterns = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) or "the model" for name in names)
        text = f"{title:7} {operation:20} {len(names):3}  {', '.join(patterns)}"
        lines.append(f"{text}: {note}" if note else text)
    return lines
