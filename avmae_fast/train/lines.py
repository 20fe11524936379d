"""Files of one JSON object a line, which a run appends to and a resumed one cuts back."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none where there is none; a last one that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file."""
    if text := _as_text(lines):
        with path.open("a") as file:
            file.write(text)


def cut_lines(path: Path, key: str, last: int) -> None:
    """Keep the lines whose `key` is at most `last`; the others will be written again."""
    if path.exists():
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(_as_text(line for line in read_lines(path) if line[key] <= last))
        os.replace(partial, path)


def _as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)
