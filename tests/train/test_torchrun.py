"""Under torchrun: stopped by a signal to the launcher, restarted when a process is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avmae_fast.train.checkpoint import newest_verified
from avmae_fast.train.lines import read_lines
from soak.case import STEPS, Case, what_it_left

pytestmark = pytest.mark.slow

PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("case"))


@contextmanager
def _torchrun(
    case: Case, out: Path, *options: str, resume: bool = False
) -> Iterator["subprocess.Popen[str]"]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    command = ["--nproc-per-node", "2", "-m", "avmae_fast.cli", *case.command(out, 0, resume)]
    process = subprocess.Popen(
        [*launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _finish(case: Case, out: Path, *options: str, resume: bool = False) -> str:
    with _torchrun(case, out, *options, resume=resume) as process:
        text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def unbroken(case: Case) -> dict:
    out = case.root / "unbroken"
    _finish(case, out)
    return what_it_left(out)


def _wait_for(condition, process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def _rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank: a child of the launcher with the rank in its environment."""
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == str(launcher) and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def test_a_signal_to_the_launcher_stops_all_at_one_step(case: Case, unbroken: dict) -> None:
    out = case.root / "stopped"
    with _torchrun(case, out) as process:
        _wait_for(lambda: read_lines(out / "metrics.jsonl"), process)
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=PATIENCE_S)
    # torchrun kills what has not ended 30 s after the signal.
    assert time.monotonic() - began_s < 30
    assert process.returncode != 0
    steps = re.findall(r"stopped after step (\d+); go on with", text)
    assert len(steps) == 2 and len(set(steps)) == 1, text
    step = int(steps[0])
    assert 1 <= step < STEPS
    path, refused = newest_verified(out / "checkpoints")
    assert path is not None and path.name == f"step-{step:08d}" and not refused
    _finish(case, out, resume=True)
    assert what_it_left(out) == unbroken


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_made_up_for(case: Case, unbroken: dict, rank: int) -> None:
    """torchrun starts all anew, with the same command, and they go on from the checkpoint."""
    out = case.root / f"killed-{rank}"
    with _torchrun(case, out, "--max-restarts", "1", resume=True) as process:
        _wait_for(lambda: newest_verified(out / "checkpoints")[0], process)
        os.kill(_rank_pid(process.pid, rank), signal.SIGKILL)
        text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    assert what_it_left(out) == unbroken
