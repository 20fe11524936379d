"""Files of one JSON object a line, which a run appends to and a resumed one cuts back."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class LinesError(ValueError):
    """A file of lines is not as a run wrote it; the text names the file and the line."""


def read_lines(path: Path, fields: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """The lines of a file, none where there is none; a last one that was cut off is left out.

    Args:
        fields: what every line must hold, and of which type.

    Raises:
        LinesError: another line cannot be read, or lacks a field.
    """
    if not path.exists():
        return []
    texts = path.read_bytes().splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(texts):
                break
            raise _damaged(path, number, "is not JSON") from error
        for name, wanted in (fields or {}).items():
            if not isinstance(line, dict) or not isinstance(line.get(name), wanted):
                raise _damaged(path, number, f"has no {name!r} as it was written")
        lines.append(line)
    return lines


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file."""
    if text := _as_text(lines):
        with path.open("a") as file:
            file.write(text)


def cut_lines(path: Path, key: str, last: int) -> None:
    """Keep the lines whose `key` is at most `last`; the others will be written again."""
    if path.exists():
        kept = [line for line in read_lines(path, {key: int}) if line[key] <= last]
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(_as_text(kept))
        os.replace(partial, path)


def _damaged(path: Path, number: int, what: str) -> LinesError:
    return LinesError(f"{path}, line {number} {what}: repair the file, or move it away")


def _as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)
