"""Worker processes of the loader: how they start, deliver and end."""

import atexit
import multiprocessing
import signal
import time
import weakref
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

# Workers that deliver nothing for this long hang.
STALL_S = 120

# How long a worker may take to end by itself. One that hangs in a decoder never would.
_GRACE_S = 1.0


class LoaderStalled(RuntimeError):
    """The workers have stopped delivering."""


def worker_options(workers: int) -> dict[str, Any]:
    """How a DataLoader is to run `workers` processes; nothing where there are none.

    They are started by a fork server: a fork of the training process would copy its threads'
    locks (CUDA, OpenMP, TensorBoard) in whatever state they are. The server imports once what
    every worker needs.
    """
    if not workers:
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avmae_fast.data.loader", "avmae_fast.data.reader_pyav"])
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "worker_init_fn": _start_worker,
        "timeout": STALL_S,
    }


def _start_worker(_: int) -> None:
    """Runs first in each worker: one thread, and signals left to the training process.

    Ctrl-C reaches the whole process group; the training process decides when to stop.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Feed:
    """What a DataLoader delivers, one item at a time, until it is closed with its workers."""

    def __init__(self, loader: DataLoader[Any], reader: str) -> None:
        self._loader: DataLoader[Any] | None = loader
        self._items: Any = None
        self._reader = reader
        self._processes: set[BaseProcess] = set()
        _OPEN.add(self)

    def start(self) -> None:
        """Start, or start again, from the first item."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        before = set(multiprocessing.active_children())
        self._items = iter(self._loader)
        self._processes |= set(multiprocessing.active_children()) - before

    def next(self) -> Any | None:
        """The next item; None after the last one.

        Raises:
            LoaderStalled: nothing came for `STALL_S` seconds. The feed is closed.
        """
        try:
            return None if self._items is None else next(self._items, None)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            stalled = LoaderStalled(
                f"nothing came from the workers for {STALL_S} s: one hangs in the reader "
                f"{self._reader}, or the storage does not answer. decord 0.6.0 is known to hang"
            )
            self.close()
            raise stalled from error

    def close(self) -> None:
        """End the workers: by torch, which asks them to, then by force."""
        self._items = self._loader = None
        deadline_s = time.monotonic() + _GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()


_OPEN: "weakref.WeakSet[Feed]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # The interpreter ends its children by a signal that the workers do not heed.
    for feed in list(_OPEN):
        feed.close()
