"""The memory of a worker does not grow with the samples it has read."""

import ctypes
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
from loader_cases import ROWS, make_config

from avmae_fast.data.clip import ClipError
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import Record
from avmae_fast.data.readers import open_record
from benchmarks.loader import private_mib


@pytest.mark.parametrize("samples", [600, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_worker_stays_as_it_is(clips, samples):
    config = make_config(clips, ROWS, batch=20, workers=1, flip=True)
    with ClipLoader(config) as loader:
        batches = iter(loader)
        for _ in islice(batches, 10):  # every file has been read, every slot used
            pass
        (pid,) = loader.worker_pids
        sizes = [private_mib(pid)]
        for _ in islice(batches, samples // 20):
            sizes.append(private_mib(pid))
    assert max(sizes) - min(sizes) < 5


class _MallocInfo(ctypes.Structure):
    """glibc's mallinfo2; `uordblks` are the bytes that are in use."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]  # noqa: RUF012


@pytest.mark.parametrize(
    "name", ["1.mov", "aac.mp4", "no_sound.mp4", "truncated.mp4", "random.mp4"]
)
def test_reading_a_file_loses_no_bytes(clips, name):
    """Counted, not measured by what the system has given: a demuxer left open costs 160 bytes."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("this C library does not count")
    mallinfo.restype = _MallocInfo
    record = Record(clips / name, 0, 0.0, np.inf)

    def read(times):
        for _ in range(times):
            with suppress(ClipError), open_record(record, "pyav") as clip:
                clip.read_video(np.array([0.1, 0.3]), 48)
                clip.read_audio(400, 3000)
        info = mallinfo()
        return info.uordblks + info.hblkhd

    before = read(100)
    assert read(300) - before < 300 * 64
