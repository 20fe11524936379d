"""Two runs cannot share a folder; a dead one leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avmae_fast.train.lock import LOCK, LockedError, RunLock

HOLD = """
import sys, time
from pathlib import Path
from avmae_fast.train.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"in use by process {process.pid} on "):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        with RunLock(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    finally:
        process.kill()


def test_released_on_exit(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            RunLock(tmp_path)
    with RunLock(tmp_path):
        pass
