"""A result file that grows row by row, so that a run cut short leaves what it had measured."""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import device as devices
from benchmarks import harness

Row = dict[str, Any]


class Result:
    """What one benchmark found on one device.

    rows: what was measured. not_run: the same names, and `why` there is no number.
    """

    def __init__(self, benchmark: str, device: torch.device, path: Path | None) -> None:
        self.path = path
        self.device = device
        self.rows: list[Row] = []
        self.not_run: list[Row] = []
        self.extra: dict[str, Any] = {}
        self._head = {
            "benchmark": benchmark,
            "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
            **devices.record(device),
            **harness.environment(),
        }

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        self.save()

    def skip(self, why: str | BaseException, **row: Any) -> None:
        """Say that there is no number, and why."""
        if isinstance(why, BaseException):
            why = reason(why)
        self.not_run.append({**row, "why": why})
        print(f"{line(row)}  not run: {why}", flush=True)
        self.save()

    def save(self, complete: bool = False) -> None:
        if self.path is None:
            return
        found = {
            **self._head,
            "complete": complete,
            **self.extra,
            "rows": self.rows,
            "not_run": self.not_run,
        }
        harness.write_json(self.path, found)


def reason(error: BaseException) -> str:
    """One line on why something could not run."""
    if devices.out_of_memory(error):
        return "out of memory"
    text = str(error).strip() or "no message"
    # torch.compile's errors run over pages, their first line says what is the matter. Where this
    # machine keeps its files is nobody's business.
    first = re.sub(r"(?<!\w)(/[^\s/:]+)+/", "", text.splitlines()[0])
    return f"{type(error).__name__}: {first[:300]}"


def line(row: Row) -> str:
    """A row as a line of text: names first, then numbers; lists stay in the file."""
    parts = []
    for name, value in row.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif not isinstance(value, list | dict) and value is not None:
            parts.append(f"{value}" if isinstance(value, str) else f"{name} {value}")
    return "  ".join(parts)


def load(path: Path) -> dict[str, Any] | None:
    """A saved result, or None where the file is absent or is no whole JSON."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Deadline:
    """The end of a stage: what would start after it is skipped."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


OUT_OF_TIME = "the stage's time was up; run it alone, or with a longer --budget-s"


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark that runs on a GPU."""
    options = harness.parser(description.partition("\n")[0])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--tiny", action="store_true", help="tiny shapes: try rows, not speed")
    options.add_argument("--budget-s", type=float, help="start no row after so many seconds")
    return options


def run(
    benchmark: str,
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Result, Deadline], None],
    argv: list[str] | None = None,
) -> int:
    """Run a benchmark as a command; returns the exit code."""
    args = options.parse_args(argv)
    try:
        if args.json is not None:
            harness.check_writable(args.json)
        device = devices.choose(args.device)
        result = Result(benchmark, device, args.json)
        measure(args, result, Deadline(args.budget_s))
        result.save(complete=not any(row["why"] == OUT_OF_TIME for row in result.not_run))
    except (harness.BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
