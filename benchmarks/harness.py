"""What every benchmark shares: fair timing, a record of where it ran, one way to report."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch


class BenchmarkError(Exception):
    """Why a benchmark cannot run here, in words for its user."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, over all samples."""

    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    minimum_s: float


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, sample_s: float = 0.01
) -> dict[str, Timing]:
    """Time each candidate `repeats` times, all in turn, so that a busy moment hits all alike.

    A sample is as many calls as fit into about `sample_s` (one at least), so that every candidate
    is timed in its own steady state and not while it fetches its memory back from the one before.
    Candidates are called before they are timed. One that works on a GPU must wait for it before it
    returns.
    """
    calls = {name: _calls_in(candidate, sample_s) for name, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            seconds[name].append(_time(candidate, calls[name]) / calls[name])
    return {name: summary(values) for name, values in seconds.items()}


def _time(candidate: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    return time.perf_counter() - start


def _calls_in(candidate: Callable[[], object], sample_s: float) -> int:
    _time(candidate, 1)
    calls = 1
    while (elapsed := _time(candidate, calls)) < sample_s:
        # At most tenfold at a time: the first calls are slower than those to come.
        calls = max(calls + 1, min(10 * calls, int(calls * sample_s / max(elapsed, 1e-9)) + 1))
    return calls


def summary(seconds: list[float]) -> Timing:
    """Median, quartiles and minimum of samples."""
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), float(lower), float(upper), min(seconds))


def environment() -> dict[str, Any]:
    """When, on what machine, and with which versions and commit: what makes numbers comparable."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version(), **versions("numpy", "torch", "triton")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, None where there is none."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """The commit of the source tree, `-dirty` added if files differ from it.

    Outside git what AVMAE_COMMIT says, or None.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("AVMAE_COMMIT")
    return result.stdout.strip()


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` whole or not at all."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        # mkstemp's file is the owner's alone; a result is for everybody the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `--json FILE`, to which a benchmark adds its own options."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return options


def run(
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    argv: list[str] | None = None,
) -> int:
    """Run a benchmark as a command: measure, print, write; returns the exit code.

    `measure` returns a flat dict of numbers; where and when they were taken is added here.
    """
    args = options.parse_args(argv)
    try:
        if args.json is not None:
            check_writable(args.json)
        result = measure(args)
        for name, value in result.items():
            print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")
        if args.json is not None:
            write_json(args.json, {**result, **environment()})
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    if path.is_dir():
        raise BenchmarkError(f"--json {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise BenchmarkError(f"--json {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise BenchmarkError(f"--json {path}: the folder {path.parent} is not writable")
