"""Feed damaged files to everything that reads files of others: manifests, configurations, ...

Each input is read in a worker under a watchdog, with 4 GiB of memory. Counted are the inputs that
read, those that fail with one of the target's typed errors, and the faults: an error of another
type, a hang, a crash, a file written outside of the folder, a program started, a pickle read.
`python -m soak.fuzz --count 10000 --json FILE`.
"""

import argparse
import logging
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from avmae_fast.data.clip import ErrorKind
from avmae_fast.data.workers import Watch, open_pool
from benchmarks import harness
from soak.fuzz_targets import TARGETS, Target
from soak.sandbox import Sandbox

_MEMORY_BYTES = 4 << 30
_SHOWN = 8


class Input(NamedTuple):
    number: int


class FuzzJob:
    """Reads damaged inputs of one target; see `avmae_fast.data.workers.Job`.

    Args:
        folder: the inputs of each worker are written to a folder of its own, `inside-<pid>`.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._excluded: dict[int, ErrorKind] = {}
        self._target: Target | None = None

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._excluded[record] = kind

    def path(self, record: int) -> Path:
        return self._folder / f"input-{record}"

    def run(self, task: Input, watch: Watch) -> str:
        if task.number in self._excluded:
            return f"fault: {self._excluded[task.number]}"
        if self._target is None:
            self._target = self._begin()
        with watch(task.number):
            return self._read(self._target, task.number)

    def _begin(self) -> Target:
        inside = self._folder / f"inside-{os.getpid()}"
        inside.mkdir()
        os.chdir(inside)
        logging.disable()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
        target = TARGETS[self._name](inside)
        self._sandbox = Sandbox(inside)
        return target

    def _read(self, target: Target, number: int) -> str:
        self._sandbox.watching = True
        try:
            target(random.Random(f"{self._name} {number}"))
            outcome = "ok"
        except target.typed as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"fault: {type(error).__name__}: {error}"[:200]
        finally:
            self._sandbox.watching = False
        if escaped := self._sandbox.take():
            return f"fault: outside: {escaped[0]}"[:200]
        return outcome


def fuzz(name: str, count: int, workers: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """What became of `count` inputs of a target."""
    with tempfile.TemporaryDirectory(prefix="avmae_fast-fuzz-") as place:
        folder = Path(place)
        # Where the paths with `..` among the inputs lead.
        outside = folder / "outside"
        outside.mkdir()
        pool = open_pool(FuzzJob(name, folder), workers, timeout_s)
        outcomes: Counter[str] = Counter()
        first: dict[str, int] = {}
        tasks = map(Input, range(count))
        began_s = time.perf_counter()
        try:
            for task in islice(tasks, 4 * workers):
                pool.submit(task)
            while outcomes.total() < count:
                for done, outcome in pool.wait():
                    outcomes[str(outcome)] += 1
                    first.setdefault(str(outcome), done.number)
                    for task in islice(tasks, 1):
                        pool.submit(task)
        finally:
            pool.close()
        seconds = time.perf_counter() - began_s
        # What a library wrote without the interpreter knowing.
        beside = [path for path in folder.iterdir() if not path.name.startswith("inside-")]
        written = [path.name for path in [*beside, *outside.iterdir()] if path != outside]
    if written:
        outcomes[f"fault: outside: {', '.join(written)}"] += 1
    return _summary(outcomes, first, seconds)


def _summary(outcomes: Counter[str], first: dict[str, int], seconds: float) -> dict[str, Any]:
    faults = {text: n for text, n in outcomes.items() if text.startswith("fault: ")}
    typed = {text: n for text, n in sorted(outcomes.items()) if text not in faults}
    return {
        "inputs": outcomes.total(),
        "ok": typed.pop("ok", 0),
        "typed_errors": typed,
        "faults": sum(faults.values()),
        "first_faults": [
            f"input {first.get(text, -1)}, {n} times: {text}"
            for text, n in islice(faults.items(), _SHOWN)
        ],
        "ms_per_input": 1e3 * seconds / outcomes.total(),
    }


def fuzz_all(count: int, workers: int, names: list[str] | None = None) -> dict[str, Any]:
    """What became of `count` inputs of every target."""
    results = {}
    for name in names or TARGETS:
        result = results[name] = fuzz(name, count, workers)
        print(f"{name}: {result}", flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("Feed damaged files to everything that reads files of others.")
    options.add_argument("--count", type=int, default=10_000, help="inputs a target (10000)")
    options.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options.add_argument("--target", action="append", choices=TARGETS, help="this one only")
    results: dict[str, Any] = {}

    def measure(args: argparse.Namespace) -> dict[str, Any]:
        if args.count < 1:
            raise harness.BenchmarkError(f"--count wants 1 or more, got {args.count}")
        results.update(fuzz_all(args.count, args.workers, args.target))
        return results

    return harness.run(options, measure, argv) or int(any(r["faults"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
