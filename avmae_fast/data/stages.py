"""Where the time of a process that loads clips goes."""

import threading
import time

# wait: for a task; open: header and index; decode: to the decoder's pictures; convert: to RGB and
# to the size wanted, of pictures that are resized or turned; sound: decoding and resampling it;
# copy: crop, flip and, of all other pictures, conversion to RGB, into the batch.
STAGES = ("wait", "order", "open", "decode", "convert", "sound", "copy", "other")


class _Clock(threading.local):
    """Seconds spent in each stage by this thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage = "other"
        self._since_s = time.perf_counter()

    def switch(self, stage: str) -> str:
        """From now on time belongs to `stage`; returns the stage before."""
        now_s = time.perf_counter()
        before = self._stage
        self.seconds[before] += now_s - self._since_s
        self._stage, self._since_s = stage, now_s
        return before


_CLOCK = _Clock()


class stage:  # noqa: N801 - used as a statement, as contextlib.suppress is
    """Time spent in this context belongs to a stage; one inside another pauses it."""

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._before = _CLOCK.switch(self._name)

    def __exit__(self, *exc: object) -> None:
        _CLOCK.switch(self._before)


def take_seconds() -> list[float]:
    """Seconds in each of `STAGES` since the last call in this thread."""
    _CLOCK.switch(_CLOCK.switch("other"))
    taken = [_CLOCK.seconds[name] for name in STAGES]
    _CLOCK.seconds = dict.fromkeys(STAGES, 0.0)
    return taken
