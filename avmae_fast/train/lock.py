"""One run at a time in a folder."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

LOCK = "run.lock"


class LockedError(ValueError):
    """Another run is using the folder; the text names it."""


class RunLock:
    """Holds a folder for this process until it ends, however it ends. A context manager.

    Raises:
        LockedError: another process holds it.
        OSError: the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._file = path.open("a+")
        try:
            # The system lets go of it when the process dies, so none is ever left behind.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            self._file.close()
            raise LockedError(
                f"train.out = {str(folder)!r} is in use by {holder}: stop that run, or choose "
                "another train.out"
            ) from None
        self._file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        self._file.write(json.dumps(who))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
