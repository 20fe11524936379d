"""A loader's job on whose files readers hang, crash or go astray: what their names say they do."""

import ctypes
import os
import signal
import time

from avmae_fast.data.cache import _WholeClips
from avmae_fast.data.loading import LoadJob


class HangingJob(LoadJob):
    """Files named `hangs*`, `crashes*`, `crashes_once*`, `raises*` do so when they are opened."""

    def _open(self, record):
        path = self.path(record)
        if record not in self._excluded:
            _misbehave(path)
        return super()._open(record)


class HangingClips(_WholeClips):
    """The same when a cache decodes them."""

    def _decode(self, source, room):
        _misbehave(self.path(room.record))
        return super()._decode(source, room)


def never_start(*args):
    """In the place of what a worker does: nothing."""
    time.sleep(3600)


def _misbehave(path):
    if path.name.startswith("hangs"):
        ctypes.PyDLL(None).sleep(3600)  # as a decoder does: in C, and never giving up the GIL
    elif path.name.startswith("crashes_once"):
        marker = path.with_suffix(".crashed")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif path.name.startswith("crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif path.name.startswith("raises"):
        raise KeyError("a mistake of ours")
