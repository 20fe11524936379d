"""Ctrl-C, SIGTERM and SIGUSR1 end a run after the step in hand, with a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

# SIGUSR1 is what batch systems send ahead of the end of a job.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130  # as shells report a program that Ctrl-C ended: nothing was saved
STOPPED = 75  # EX_TEMPFAIL: stopped in good order, to be run again


class StopRequest:
    """While entered, the first signal sets `exit_code`; a second Ctrl-C exits at once.

    Only the main thread of a program can catch signals: elsewhere nothing is ever requested.

    exit_code: what the program should exit with, None while nobody has asked it to stop.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        if self.exit_code is None:
            self.exit_code = STOPPED
            name = signal.Signals(number).name
            again = "; Ctrl-C again exits at once" if number == signal.SIGINT else ""
            # os.write: a handler may have interrupted a print.
            text = f"\n{name}: finishing this step, then writing a checkpoint{again}\n"
            os.write(2, text.encode())
