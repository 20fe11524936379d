"""Ctrl-C from outside, as a terminal sends it: to the whole process group."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_options import overrides

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.train import pretrain as loop
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.stop import StopRequest

PATIENCE_S = 120


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_leaves_a_checkpoint_to_resume(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker process, whose death by the same Ctrl-C would break the step in hand."""
    config = make_config({"steps": 100_000, "checkpoint_every": 100_000}, {"workers": 1})
    command = [sys.executable, "-m", "avmae_fast.cli", "pretrain", "demo"]
    process = subprocess.Popen(
        [*command, *overrides(to_dict(config))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        _wait_for(config.train.out / "metrics.jsonl", process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "SIGINT: finishing this step" in err and "Traceback" not in err
    (saved,) = (config.train.out / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert f"stopped after step {step}; go on with\n  avmae pretrain demo --set" in out
    assert out.rstrip().endswith("--resume")

    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    steps = {"steps": step + 2, "checkpoint_every": 100_000}
    assert pretrain(make_config(steps), resume=True).step == step + 2


STUCK_STEP = """
import time
from avmae_fast.train.stop import StopRequest
with StopRequest():
    print("entered", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_every_signal_asks_for_the_same(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.exit_code is None
        signal.raise_signal(number)
        assert stop.exit_code == 75


def test_second_ctrl_c_exits_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_STEP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Ctrl-C again exits at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE_S) == 130
    finally:
        process.kill()
