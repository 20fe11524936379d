"""The pages of the documentation as the tests see them: what is fenced, and in which language."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# What else tells a user what to type.
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(text: str, *languages: str) -> Iterator[str]:
    """The blocks of these languages, in order; "" is a fence that names none."""
    for found in _FENCE.finditer(text):
        if found[1] in languages:
            yield found[2]


def without_fences(text: str) -> str:
    """The prose and its inline code."""
    return _FENCE.sub("", text)
