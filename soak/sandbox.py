"""Tells what code does to the system outside one folder: files written, programs started, pickles.

It hears of it through the interpreter's audit events, so the same process must do it. What
libraries write on their own is not heard.
"""

import os
import sys
from pathlib import Path
from typing import Any

# Which arguments of an event are paths that are written to, and which is the folder that a
# relative one starts at.
_WRITES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "os.mkdir": ((0,), 2),
    "os.rename": ((0, 1), None),
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.symlink": ((1,), 2),
    "os.link": ((1,), 3),
    "os.truncate": ((0,), None),
    "os.chmod": ((0,), 2),
    "shutil.rmtree": ((0,), None),
}
_NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect",
)  # fmt: skip
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Sandbox:
    """Watches this process for good.

    Args:
        inside: the folder that may be written to.
    """

    def __init__(self, inside: Path) -> None:
        self._inside = os.path.realpath(inside)
        self._found: list[str] = []
        self.watching = False
        # Modules that are imported late would write what they are compiled to.
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hear)

    def take(self) -> list[str]:
        """What was done outside since it was last asked."""
        found, self._found = self._found, []
        return found

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in _NEVER:
            self._found.append(event)
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike) and flags & _OPENED_TO_WRITE:
                self._check(event, path, None)
        elif event in _WRITES:
            places, folder = _WRITES[event]
            for place in places:
                self._check(event, args[place], None if folder is None else args[folder])

    def _check(self, event: str, path: Any, folder: int | None) -> None:
        if isinstance(path, int):
            return
        start = os.getcwd() if folder in (None, -1) else os.readlink(f"/proc/self/fd/{folder}")
        where = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if where != self._inside and not where.startswith(self._inside + os.sep):
            self._found.append(f"{event} {where}")
