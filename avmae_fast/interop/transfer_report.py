"""What a transfer did with every tensor, to be read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCK = re.compile(r"(.+\.blocks)\.(\d+)\..+")


@dataclass(frozen=True)
class TransferReport:
    """Every tensor on both sides, by its state-dict name.

    copied: the source of each target that was loaded; a source may have several targets.
    resized: targets whose table was resized on the way, and how.
    left: why each unused source was left behind.
    fresh: why each other target stays at its initialisation.
    """

    copied: Mapping[str, str]
    resized: Mapping[str, str]
    left: Mapping[str, str]
    fresh: Mapping[str, str]

    @property
    def duplicated(self) -> dict[str, list[str]]:
        """Sources that went to more than one target."""
        targets: dict[str, list[str]] = {}
        for target, source in self.copied.items():
            targets.setdefault(source, []).append(target)
        return {source: each for source, each in targets.items() if len(each) > 1}

    def __str__(self) -> str:
        """A line for each run of layers or part of the model."""
        lines = [f"loaded {len(self.copied)} tensors"]
        lines += [f"  {line}" for line in _copied_lines(self.copied)]
        lines += [f"  {name}: resized from {how}" for name, how in self.resized.items()]
        if self.duplicated:
            lines.append(f"  {len(self.duplicated)} of them went to both modalities")
        for title, reasons in (("left behind", self.left), ("stay new", self.fresh)):
            lines.append(f"{title}: {len(reasons)} tensors")
            lines += [f"  {line}" for line in _reason_lines(reasons)]
        return "\n".join(lines)


def _copied_lines(copied: Mapping[str, str]) -> list[str]:
    """Runs of blocks that were shifted alike, and all other parts."""
    runs: dict[tuple[str, str, int], set[int]] = {}
    counts: dict[tuple[str, str, int], int] = {}
    for target, source in copied.items():
        (to, i), (origin, j) = _place(target), _place(source)
        key = (to, origin, j - i)
        runs.setdefault(key, set()).add(i)
        counts[key] = counts.get(key, 0) + 1
    lines = []
    for key, layers in runs.items():
        to, origin, shift = key
        if -1 in layers:
            lines.append(f"{to} <- {origin} ({counts[key]})")
        else:
            here, there = _ranges(layers), _ranges({i + shift for i in layers})
            lines.append(f"{to}.{here} <- {origin}.{there} ({counts[key]})")
    return lines


def _reason_lines(reasons: Mapping[str, str]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        key = (_place(name)[0], reason)
        counts[key] = counts.get(key, 0) + 1
    return [f"{place} ({count}): {reason}" for (place, reason), count in counts.items()]


def _ranges(layers: set[int]) -> str:
    """`0..3,5`: ascending runs."""
    starts = sorted(i for i in layers if i - 1 not in layers)
    ends = sorted(i for i in layers if i + 1 not in layers)
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in pairs)


def _place(name: str) -> tuple[str, int]:
    """The stack and layer a tensor belongs to, or the module and -1."""
    if block := _BLOCK.fullmatch(name):
        return block[1], int(block[2])
    owner, _, leaf = name.rpartition(".")
    return (owner if leaf in ("weight", "bias") else name), -1
