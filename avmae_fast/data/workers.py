"""Worker processes: how they start, what they are told, and what happens when one hangs or dies.

The training process tells each worker what to do through a pipe and asks nobody's permission to
kill it: tasks are pure functions of their content, so another worker does them again.
"""

import atexit
import ctypes
import fcntl
import logging
import multiprocessing
import os
import signal
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from avmae_fast.data.clip import ErrorKind
from avmae_fast.data.stages import stage
from avmae_fast.data.watchdog import Board, Reading

logger = logging.getLogger(__name__)

# Workers import torch and the reader, on storage that may be busy.
START_S = 120.0

# Whoever waits for data longer than this is told what for, and again every so often.
TELL_AFTER_S, TELL_EVERY_S = 20.0, 60.0

# More dead workers than this within an hour stop the run. Hanging files do not count: they are bad
# files, of which there may be `data.max_bad_fraction`.
MAX_DEATHS = 10

# A file that was being read when a worker died is read once more, for it may be innocent: the
# system ends the largest process when memory runs out.
_CRASHES_OF_A_BAD_FILE = 2

# Decoders leave holes in the heap, some megabytes in thousands of clips: after this many tasks a
# worker gives them back to the system.
_TASKS_TO_TRIM = 256

_POLL_S = 0.5
# How long a worker may take to end: by itself, and when it is killed. A process that waits for
# storage that does not answer cannot be killed.
_GRACE_S, _KILL_S = 1.0, 10.0

TaskT = TypeVar("TaskT")
ReplyT = TypeVar("ReplyT")
_TaskIn = TypeVar("_TaskIn", contravariant=True)
_ReplyOut = TypeVar("_ReplyOut", covariant=True)
Watch = Callable[[int], AbstractContextManager[None]]


class LoaderFailed(RuntimeError):
    """The workers cannot go on; the text says why."""


class LoaderStalled(LoaderFailed):
    """The workers have stopped delivering."""


class WorkersDied(LoaderFailed):
    """Workers end again and again, for instance because memory runs out."""


class Job(Protocol[_TaskIn, _ReplyOut]):
    """What workers do. It is sent to each of them once, when they start."""

    def run(self, task: _TaskIn, watch: Watch) -> _ReplyOut:
        """Do a task; while record number i is read, `with watch(i):` must be open."""
        ...

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        """From now on a record counts as one that cannot be read, for this reason."""
        ...

    def path(self, record: int) -> Path:
        """The file of a record."""
        ...


class Pool(Protocol[TaskT, ReplyT]):
    """Does tasks, in any order."""

    def submit(self, task: TaskT) -> None: ...

    def wait(self) -> list[tuple[TaskT, ReplyT | None]]:
        """Tasks that are done, at least one, with their replies; None for one that was cancelled.

        Raises:
            LoaderStalled, WorkersDied: and whatever a task raised.
        """
        ...

    def cancel(self) -> None:
        """Tasks submitted so far need not be done; `wait` still returns them."""
        ...

    def seconds(self) -> dict[str, float]:
        """Seconds of the workers in each of `STAGES`, and of processor time (`cpu`)."""
        ...

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        ...

    def close(self) -> None: ...


def open_pool(job: Job[TaskT, ReplyT], workers: int, timeout_s: float) -> Pool[TaskT, ReplyT]:
    """`workers` processes for a job, or this one where workers is 0.

    Args:
        timeout_s: a worker that reads one record for longer is killed. Without workers there is
            nothing to kill: then only the limits of the readers themselves hold.
    """
    return ProcessPool(job, workers, timeout_s) if workers else InlinePool(job)


class InlinePool(Generic[TaskT, ReplyT]):
    """Tasks done in this process, when somebody waits for them."""

    def __init__(self, job: Job[TaskT, ReplyT]) -> None:
        self._job = job
        self._tasks: deque[TaskT] = deque()
        self._cancelled = 0
        self._board = Board(1)

    def submit(self, task: TaskT) -> None:
        self._tasks.append(task)

    def wait(self) -> list[tuple[TaskT, ReplyT | None]]:
        task = self._tasks.popleft()
        if self._cancelled:
            self._cancelled -= 1
            return [(task, None)]
        reply = self._job.run(task, lambda record: nullcontext())
        self._board.note_seconds(0)
        return [(task, reply)]

    def cancel(self) -> None:
        self._cancelled = len(self._tasks)

    def seconds(self) -> dict[str, float]:
        return self._board.seconds()

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        self._tasks.clear()


class _Worker(Generic[TaskT]):
    """A process, our end of its pipe, and the tasks it has been given, oldest first."""

    def __init__(
        self, context: ForkServerContext, number: int, job: Job[Any, Any], board: Board
    ) -> None:
        self.number = number
        self.tasks: dict[int, tuple[int, TaskT]] = {}
        self.ready = False
        self.heard_s = time.monotonic()
        self.pipe, theirs = context.Pipe()
        their_lifeline, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work,
            args=(number, job, theirs, their_lifeline, board),
            name=f"avmae_fast loader {number}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        their_lifeline.close()

    def give(self, number: int, generation: int, task: TaskT) -> None:
        if not self.tasks:
            self.heard_s = time.monotonic()
        self.tasks[number] = (generation, task)
        self.send((number, generation, task))

    def send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            pass  # it has died, which its sentinel says too

    def received(self) -> list[Any]:
        """What it has sent by now; a dead one's last messages too."""
        messages = []
        try:
            while self.pipe.poll():
                messages.append(self.pipe.recv())
        except (EOFError, OSError):
            pass
        return messages

    def hang_up(self) -> None:
        """Tell it that nobody needs it any more."""
        self.pipe.close()
        self._lifeline.close()

    def kill(self) -> bool:
        """End it by force; False where that does not work."""
        self.process.kill()
        self.process.join(_KILL_S)
        return not self.process.is_alive()

    def how_it_ended(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "was killed (SIGKILL), as the system does when memory runs out"
        return f"crashed ({name})"


class ProcessPool(Generic[TaskT, ReplyT]):
    """Processes that do tasks, watched over whenever somebody waits for a reply."""

    def __init__(self, job: Job[TaskT, ReplyT], workers: int, timeout_s: float) -> None:
        self._job = job
        self._timeout_s = timeout_s
        self._board = Board(workers)
        self._context = _context()
        self._submitted = 0
        self._crashes: Counter[int] = Counter()
        self._deaths_s: deque[float] = deque()
        self._workers = [self._start(number) for number in range(workers)]
        _OPEN.add(self)

    def _start(self, number: int) -> _Worker[TaskT]:
        return _Worker(self._context, number, self._job, self._board)

    def submit(self, task: TaskT) -> None:
        worker = min(self._workers, key=lambda w: len(w.tasks))
        worker.give(self._submitted, self._board.generation, task)
        self._submitted += 1

    def wait(self) -> list[tuple[TaskT, ReplyT | None]]:
        if not any(worker.tasks for worker in self._workers):
            raise ValueError("no task is under way")
        began_s = time.monotonic()
        tell_s = began_s + TELL_AFTER_S
        try:
            while True:
                connection.wait([w.pipe for w in self._workers], _POLL_S)
                done = [reply for worker in self._workers for reply in self._collect(worker)]
                self._look_after()
                if done:
                    return done
                if time.monotonic() > tell_s:
                    logger.warning("no data for %s", self._state(time.monotonic() - began_s))
                    tell_s += TELL_EVERY_S
        except LoaderFailed:
            self.close()
            raise

    def _collect(self, worker: _Worker[TaskT]) -> list[tuple[TaskT, ReplyT | None]]:
        """The tasks that a worker has done."""
        done = []
        for message in worker.received():
            worker.ready, worker.heard_s = True, time.monotonic()
            if message is None:  # it has started
                continue
            number, reply = message
            _, task = worker.tasks.pop(number)
            if isinstance(reply, _Raised):
                raise reply.error
            done.append((task, reply))
        return done

    def _look_after(self) -> None:
        """Put another worker in the place of each that has died or hangs."""
        for worker in list(self._workers):
            reading = self._board.look(worker.number)
            if not worker.process.is_alive():
                # Replies that came since are lost; their tasks are done again.
                self._bury(worker, reading)
            elif reading is not None and reading.seconds > self._timeout_s:
                self._kill(worker, reading)
            elif reading is None and worker.tasks:
                silent_s = time.monotonic() - worker.heard_s
                if silent_s > (self._timeout_s if worker.ready else START_S):
                    self._kill_silent(worker, silent_s)

    def _kill(self, worker: _Worker[TaskT], reading: Reading) -> None:
        """A worker hangs in a file."""
        path = self._job.path(reading.record)
        if not worker.kill():
            raise LoaderStalled(
                f"nothing came from {path} for {reading.seconds:.0f} s, and the worker that reads "
                "it cannot be killed: the storage does not answer"
            )
        # Until it was killed it may have gone on: only what it was still reading is to blame.
        last = self._board.look(worker.number)
        if last is not None and last.since_ns == reading.since_ns:
            detail = f"the reader did not come back within data.timeout_s = {self._timeout_s:g} s"
            self._exclude(reading.record, "timeout", detail)
        self._replace(worker)

    def _kill_silent(self, worker: _Worker[TaskT], silent_s: float) -> None:
        """A worker does nothing although it has a task: it has been stopped, or cannot start."""
        if not worker.ready or not worker.kill():
            raise LoaderStalled(
                f"nothing came from loader worker {worker.number} for {silent_s:.0f} s: it "
                + ("cannot be killed" if worker.ready else "did not start")
            )
        self._count_death(f"loader worker {worker.number} stood still and was killed")
        self._replace(worker)

    def _bury(self, worker: _Worker[TaskT], reading: Reading | None) -> None:
        """A worker has died."""
        how = worker.how_it_ended()
        if not worker.ready:
            raise WorkersDied(f"loader worker {worker.number} {how} while it started")
        what = f"loader worker {worker.number} {how}"
        if reading is not None:
            path = self._job.path(reading.record)
            what += f" while it read {path}"
            self._crashes[reading.record] += 1
            if self._crashes[reading.record] == _CRASHES_OF_A_BAD_FILE:
                detail = f"the worker that read it {how}, {_CRASHES_OF_A_BAD_FILE} times"
                self._exclude(reading.record, "crash", detail)
        self._count_death(what)
        self._replace(worker)

    def _count_death(self, what: str) -> None:
        now_s = time.monotonic()
        self._deaths_s.append(now_s)
        while self._deaths_s[0] < now_s - 3600:
            self._deaths_s.popleft()
        if len(self._deaths_s) > MAX_DEATHS:
            raise WorkersDied(
                f"{len(self._deaths_s)} loader workers died within an hour, the last because "
                f"{what}. If memory runs out use fewer data.workers; if a decoder crashes try "
                "another data.reader"
            )
        logger.warning("%s; another takes its place and does its work again", what)

    def _exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._job.exclude(record, kind, detail)
        for worker in self._workers:
            worker.send((None, record, kind, detail))

    def _replace(self, worker: _Worker[TaskT]) -> None:
        """Start another worker, which knows all excluded records, with the same tasks."""
        worker.hang_up()
        self._board.clear(worker.number)
        replacement = self._start(worker.number)
        self._workers[self._workers.index(worker)] = replacement
        for number, (generation, task) in worker.tasks.items():
            replacement.give(number, generation, task)

    def _state(self, waited_s: float) -> str:
        """What everybody is waiting for, in words."""
        reads = []
        for worker in self._workers:
            if reading := self._board.look(worker.number):
                path = self._job.path(reading.record)
                reads.append(f"worker {worker.number} reads {path} for {reading.seconds:.0f} s")
        return f"{waited_s:.0f} s: {'; '.join(reads) or 'no worker is reading a file'}"

    def cancel(self) -> None:
        self._board.advance()

    def seconds(self) -> dict[str, float]:
        return self._board.seconds()

    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.hang_up()
        deadline_s = time.monotonic() + _GRACE_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline_s - time.monotonic()))
            if worker.process.is_alive():
                worker.kill()
        self._workers.clear()


class _Raised:
    """What a task raised, on its way to the training process."""

    def __init__(self, error: Exception) -> None:
        error.add_note("".join(traceback.format_exception(error)))
        self.error = error


def _context() -> ForkServerContext:
    """How processes are started: by a fork server, which imports once what every worker needs.

    A fork of the training process would copy its threads' locks (CUDA, OpenMP, TensorBoard) in
    whatever state they are.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avmae_fast.data.loader", "avmae_fast.data.reader_pyav"])
    return context


def _work(
    number: int, job: Job[TaskT, ReplyT], pipe: Connection, lifeline: Connection, board: Board
) -> None:
    """What a worker does from its start to its end, which is the end of the pipe."""
    _settle_in(lifeline)
    trim, tasks = getattr(ctypes.CDLL(None), "malloc_trim", None), 0  # glibc has it
    try:
        pipe.send(None)
        while True:
            with stage("wait"):
                message = pipe.recv()
            if message[0] is None:
                job.exclude(*message[1:])
                continue
            task_number, generation, task = message
            reply: ReplyT | _Raised | None = None
            if generation == board.generation:
                try:
                    reply = job.run(task, lambda record: board.reading(number, record))
                except Exception as error:
                    reply = _Raised(error)
            pipe.send((task_number, reply))
            board.note_seconds(number)
            tasks += 1
            if tasks % _TASKS_TO_TRIM == 0 and trim is not None:
                trim(0)
    except (EOFError, OSError):
        pass  # the pipe is closed: the loader is, or the training process has ended


def _settle_in(lifeline: Connection) -> None:
    """One thread; signals left to the training process; no life without it.

    Ctrl-C reaches the whole process group; the training process decides when to stop. However that
    ends, the kernel closes its end of the lifeline and sends the SIGIO that was asked for here,
    which ends even a worker that hangs in a decoder and never gets back to Python.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    file = lifeline.fileno()
    fcntl.fcntl(file, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # it was closed before
        os._exit(0)


_OPEN: "weakref.WeakSet[ProcessPool[Any, Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # The interpreter ends its children by a signal that the workers do not heed.
    for pool in list(_OPEN):
        pool.close()
