"""Kill a run over and over, resume it each time, and compare what it leaves with an unbroken run.

SIGKILL to the trainer: while it starts, inside a step, between steps, inside a validation, inside
a checkpoint's write, inside the report. Its workers change in number with every restart. What must
be equal: the bytes of weights and optimiser, every line of metrics, validation, events and bad
samples, the report's numbers. A run whose checkpoint was tampered with must differ.
`python -m soak.kill_loop --kills 200 --json FILE`.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avmae_fast.train.checkpoint import newest_verified
from benchmarks import harness
from soak.case import BATCH, Case, logged_steps, what_it_left
from soak.marks import PARTS, Marks
from soak.processes import PATIENCE_S, Leftovers, Trainer, kill, start, wait

# The last two of a run are in its report.
KILLS_A_RUN, _IN_REPORT = 20, 2
_COLD_EVERY = 10
_WORKERS = (0, 1, 2)
_MOST_ENTRIES = {"start": 1, "step": 6, "between": 8, "validation": 1, "checkpoint": 2, "report": 1}
_WATCH_EVERY_S = 0.25
# After that many there is enough to look at.
_MOST_BROKEN = 3
# Of the other kills of a run.
_WEIGHTS = {"start": 2, "step": 3, "between": 1, "validation": 2, "checkpoint": 4}


class Broken(Exception):
    """A run is not what an unbroken one is, or did not start again."""


@dataclass(frozen=True)
class Aim:
    """When to kill: `delay_s` after a part has begun for the `entry`-th time."""

    part: str
    entry: int
    delay_s: float


@dataclass
class Count:
    """What was done so far, and what it led to."""

    parts: Counter[str] = field(default_factory=Counter)
    workers: Counter[int] = field(default_factory=Counter)
    left: Leftovers = field(default_factory=Leftovers)
    starts: int = 0
    cold: int = 0
    torn: int = 0
    resumes: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.parts.total()


class KillLoop:
    """Kills the runs of one case.

    Args:
        kills: how many, over all runs.
        seed: of where to kill.
    """

    def __init__(self, case: Case, kills: int, seed: int) -> None:
        self._case, self._kills = case, kills
        self._random = random.Random(seed)
        self.count = Count()

    def unbroken(self) -> dict[str, Any]:
        """Run to the end without a kill; learn how long each part takes."""
        out = self._case.root / "unbroken"
        trainer, marks = self._start(out, 1, resume=False, cold=True)
        if code := wait(trainer):
            raise Broken(f"the unbroken run ended with exit code {code}: {_tail(out)}")
        self._usual_s = {part: marks.usual_s(part) for part in PARTS}
        return what_it_left(out)

    def run(self, wanted: dict[str, Any], seconds: float | None = None) -> None:
        """Runs, each killed `KILLS_A_RUN` times, until there were enough kills, or no time."""
        deadline_s = time.monotonic() + (seconds or float("inf"))
        number = 0
        while self.count.kills < self._kills and time.monotonic() < deadline_s:
            number += 1
            out = self._case.root / f"killed-{number}"
            try:
                resumes = self._kill_one(out, min(KILLS_A_RUN, self._kills - self.count.kills))
                _require_equal(wanted, what_it_left(out), out.name)
            except (Broken, TimeoutError) as error:
                self.count.broken.append(str(error))
                print(error, file=sys.stderr)
                if len(self.count.broken) == _MOST_BROKEN:
                    return
                continue
            self.count.resumes.append(resumes)
            print(
                f"run {number}: {resumes} resumes, equal; {self.count.kills} kills in all",
                flush=True,
            )

    def tampered_differs(self, wanted: dict[str, Any]) -> bool:
        """The control: a run that goes on from another sample than it should must differ."""
        out = self._case.root / "tampered"
        trainer, marks = self._start(out, 0, resume=False)
        self._kill_at(trainer, marks, Aim("checkpoint", 2, 0.0))
        path, _ = newest_verified(out / "checkpoints")
        if path is None:
            raise Broken("the control run left no checkpoint")
        _edit_samples(path)
        trainer, _ = self._start(out, 0, resume=True)
        if code := wait(trainer):
            raise Broken(f"the control run ended with exit code {code}: {_tail(out)}")
        left = what_it_left(out)
        return all(left[n] != wanted[n] for n in ("model.safetensors", "optimizer.safetensors"))

    def _kill_one(self, out: Path, kills: int) -> int:
        """Kill a run `kills` times and let it finish; how often it was resumed."""
        killed = 0
        while True:
            workers = self._random.choice(_WORKERS) if killed < kills else 0
            trainer, marks = self._start(out, workers, resume=killed > 0)
            if killed == kills:
                code = wait(trainer)
            else:
                code = self._kill_at(trainer, marks, self._aim(killed >= kills - _IN_REPORT))
            if code == 0:
                return killed
            if code != -9:
                raise Broken(f"{out.name} ended with exit code {code}: {_tail(out)}")
            killed += 1
            self._note(out, trainer, marks, workers)

    def _start(
        self, out: Path, workers: int, resume: bool, cold: bool | None = None
    ) -> tuple[Trainer, Marks]:
        marks = self._case.root / "marks"
        fresh = Marks.fresh(marks)
        self.count.starts += 1
        if cold is None:
            cold = self.count.starts % _COLD_EVERY == 0
        self._cold = cold
        command = self._case.command(out, workers, resume)
        return start(marks, command, out.with_suffix(".log"), cold), fresh

    def _aim(self, in_report: bool) -> Aim:
        part = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        if in_report:
            part = "report"
        entry = self._random.randint(1, _MOST_ENTRIES[part])
        return Aim(part, entry, self._random.uniform(0, self._usual_s[part]))

    def _kill_at(self, trainer: Trainer, marks: Marks, aim: Aim) -> int:
        """Kill when a part is reached, or where it does not come any more, in the report."""
        watch_s = time.monotonic()
        deadline_s = watch_s + PATIENCE_S
        while marks.entries(aim.part) < aim.entry:
            if marks.entries("report"):
                aim = self._aim(in_report=True)
            if (code := trainer.exit_code()) is not None:
                return code
            if time.monotonic() > deadline_s:
                kill(trainer)
                raise TimeoutError(f"no {aim.part} began in {PATIENCE_S:.0f} s")
            if time.monotonic() > watch_s:
                self.count.left.watch(trainer)
                watch_s = time.monotonic() + _WATCH_EVERY_S
            time.sleep(0.0002)
        time.sleep(aim.delay_s)
        return kill(trainer)

    def _note(self, out: Path, trainer: Trainer, marks: Marks, workers: int) -> None:
        """Count a kill, and look at what it left."""
        count = self.count
        count.left.look(trainer)
        count.parts[marks.part] += 1
        count.workers[workers] += 1
        count.cold += self._cold
        # What an earlier kill tore is there until the next checkpoint is begun.
        torn = any((out / "checkpoints").glob(".partial-*"))
        count.torn += marks.part == "checkpoint" and torn


def _require_equal(wanted: dict[str, Any], left: dict[str, Any], name: str) -> None:
    differ = [what for what in wanted if left.get(what) != wanted[what]]
    if differ:
        raise Broken(f"{name} differs from the unbroken run in {', '.join(differ)}")
    if [line["step"] for line in left["metrics"]] != logged_steps():
        raise Broken(f"{name}: metrics.jsonl has not each logged step once")


def _edit_samples(path: Path) -> None:
    """Move a checkpoint's position in the data by a batch, and seal it again."""
    state = json.loads((path / "state.json").read_text())
    state["samples"] += BATCH
    seal(path, json.dumps(state).encode())


def seal(path: Path, data: bytes) -> None:
    """Give a checkpoint another state.json, with sums that fit."""
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    entry = {"size_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    manifest["files"]["state.json"] = entry
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def _tail(out: Path) -> str:
    return out.with_suffix(".log").read_text()[-1500:]


def kill_loop(kills: int, seed: int = 0, seconds: float | None = None) -> dict[str, Any]:
    """Make a case, kill its runs, and count."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="avmae_fast-soak-") as folder:
        began_s = time.monotonic()
        loop = KillLoop(Case.make(Path(folder)), kills, seed)
        wanted = loop.unbroken()
        loop.run(wanted, seconds)
        differs = loop.tampered_differs(wanted)
        return _summary(loop.count, differs, time.monotonic() - began_s)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, only errors of the package are logged: that a killed run is resumed is no news."""
    log = logging.getLogger("avmae_fast")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _summary(count: Count, differs: bool, seconds: float) -> dict[str, Any]:
    return {
        "kills": count.kills,
        **{f"kills_in_{part}": count.parts[part] for part in PARTS},
        "kills_with_workers": {str(n): count.workers[n] for n in _WORKERS},
        "kills_of_cold_starts": count.cold,
        "kills_that_tore_a_checkpoint": count.torn,
        "runs": len(count.resumes) + len(count.broken),
        "runs_equal": len(count.resumes),
        "most_resumes_of_a_run": max(count.resumes, default=0),
        "orphans": count.left.processes,
        "shared_memory_left": len(count.left.shared_memory),
        "control_differs": differs,
        "seconds": seconds,
        "broken": count.broken,
    }


def passed(result: dict[str, Any]) -> bool:
    """Whether every run was equal, nothing was left behind, and the control differed."""
    clean = not (result["broken"] or result["orphans"] or result["shared_memory_left"])
    return clean and result["runs_equal"] > 0 and result["control_differs"]


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("Kill a run again and again; compare it with an unbroken one.")
    options.add_argument("--kills", type=int, default=200, help="how many (default 200)")
    options.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options.add_argument("--seconds", type=float, help="start no further run after this time")
    result: dict[str, Any] = {}

    def measure(args: argparse.Namespace) -> dict[str, Any]:
        if args.kills < 1:
            raise harness.BenchmarkError(f"--kills wants 1 or more, got {args.kills}")
        result.update(kill_loop(args.kills, args.seed, args.seconds))
        return result

    return harness.run(options, measure, argv) or int(not passed(result))


if __name__ == "__main__":
    sys.exit(main())
