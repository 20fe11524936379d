"""A configuration as options of the command line, for tests that start one."""

import json
from collections.abc import Iterator
from typing import Any


def overrides(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A whole configuration as options of the command."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from overrides(value, f"{prefix}{name}.")
        else:
            text = "none" if value is None else json.dumps(value)
            yield from ("--set", f"{prefix}{name}={text}")
