"""Trainers that are real processes, and what is left of one that was killed."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from soak.trainer import REPORT, run_in_child

# How long a run may take, and the children of a killed one to notice.
PATIENCE_S, _END_S = 900.0, 20.0
_NAMED = Path("/dev/shm")


class Trainer(Protocol):
    """A running trainer; a session of its own, so that its children can be told from others."""

    @property
    def pid(self) -> int: ...

    def exit_code(self) -> int | None:
        """None while it runs; -9 for one that was killed."""
        ...


@dataclass(frozen=True)
class _Forked:
    process: Any

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        return self.process.exitcode


@dataclass(frozen=True)
class _Executed:
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        return self.process.poll()


def start(marks: Path, argv: Sequence[str], log: Path, cold: bool) -> Trainer:
    """Start a trainer.

    Args:
        cold: in a new interpreter, as a user does; else as a fork of a process that has imported
            the program already, which saves seconds. Its workers start in the same way in both.
    """
    if cold:
        command = [sys.executable, "-m", "soak.trainer", str(marks), *argv]
        with log.open("ab") as file:
            return _Executed(
                subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soak.trainer"])
    environment = {REPORT: os.environ.get(REPORT, "1")}
    process = context.Process(target=run_in_child, args=(marks, list(argv), log, environment))
    process.start()
    return _Forked(process)


def kill(trainer: Trainer) -> int:
    """SIGKILL to the trainer alone; its exit code, which is another if it was faster."""
    with suppress(ProcessLookupError):
        os.kill(trainer.pid, signal.SIGKILL)
    return wait(trainer)


def wait(trainer: Trainer) -> int:
    """Wait for its end; its exit code. Raises TimeoutError for one that hangs, which is killed."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (code := trainer.exit_code()) is None:
        if time.monotonic() > deadline_s:
            os.kill(trainer.pid, signal.SIGKILL)
            raise TimeoutError(f"a trainer did not end in {PATIENCE_S:.0f} s")
        time.sleep(0.001)
    return code


@dataclass
class Leftovers:
    """What killed processes left behind that they should not have."""

    processes: int = 0
    shared_memory: set[str] = field(default_factory=set)
    _seen: set[str] = field(default_factory=set)

    def watch(self, trainer: Trainer) -> None:
        """Note the names of the shared memory that a trainer and its children use."""
        for pid in _session(trainer.pid):
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            self._seen |= set(re.findall(rf"{_NAMED}/(\S+)$", maps, re.MULTILINE))

    def look(self, trainer: Trainer) -> None:
        """Count what is left of a trainer that is dead."""
        deadline_s = time.monotonic() + _END_S
        while (alive := _session(trainer.pid)) and time.monotonic() < deadline_s:
            time.sleep(0.002)
        self.processes += len(alive)
        self.shared_memory |= {name for name in self._seen if (_NAMED / name).exists()}


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name, which is in brackets: state, parent, group, session.
            words = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[3]) == leader and words[0] not in ("Z", "X"):
            found.append(int(entry.name))
    return found
