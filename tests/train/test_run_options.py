"""What a run can be asked for beside training: determinism, traces, other logs, advice."""

import gzip
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_options import overrides
from safetensors.torch import load_file

from avmae_fast.cli import main
from avmae_fast.config import Config, ConfigError, TrainConfig
from avmae_fast.config_file import to_dict
from avmae_fast.train import pretrain as loop
from avmae_fast.train.lock import LockedError, RunLock
from avmae_fast.train.memory_advice import advice
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.run_folder import RunFolderError

MakeConfig = Callable[..., Config]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out / "report")


@pytest.fixture
def determinism_restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_equal(
    make_config: MakeConfig, tmp_path: Path, no_report: None, determinism_restored: None
) -> None:
    weights = []
    for name in ("one", "two"):
        config = make_config({"steps": 4, "deterministic": True, "out": str(tmp_path / name)})
        pretrain(config)
        assert torch.are_deterministic_algorithms_enabled()
        weights.append(load_file(config.train.out / "checkpoints/step-00000004/model.safetensors"))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_trace_of_some_steps(make_config: MakeConfig, no_report: None) -> None:
    config = make_config({"steps": 4})
    pretrain(config, profile=(2, 3))
    with gzip.open(config.train.out / "profile/steps-2-3.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    # Two forward passes of a model with two patch embeddings.
    assert sum(name.startswith("Optimizer.step") for name in names) == 2


@pytest.mark.parametrize("text", ["20", "20:", "5:4", "0:3", "a:b", "-1:2"])
def test_trace_refuses(text: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "demo", f"--profile={text}"])
    assert stopped.value.code == 2


def test_wandb_gets_what_the_file_gets(
    make_config: MakeConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    asked: dict[str, Any] = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (asked.update(options), run)[1]  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    pretrain(make_config({"steps": 4, "wandb": "av"}))
    assert asked["project"] == "av" and asked["resume"] == "allow"
    assert [step for step, _ in logged] == [1, 4]
    assert {"train/loss", "train/grad_norm", "train/lr"} <= logged[0][1].keys()
    assert all(math.isfinite(value) for _, values in logged for value in values.values())


def test_absent_wandb_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config({"wandb": "av"})
    with pytest.raises(ConfigError, match="pip install wandb"):
        pretrain(config)
    assert not config.train.out.exists()


def test_second_run_in_a_folder(make_config: MakeConfig) -> None:
    config = make_config()
    config.train.out.mkdir()
    with RunLock(config.train.out), pytest.raises(LockedError, match="in use by process"):
        pretrain(config)


def test_no_room_for_checkpoints(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("avmae_fast.train.run_folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(RunFolderError, match="checkpoints need .* GiB more, 0.00 GiB are free"):
        pretrain(make_config())


def test_full_disk_leaves_what_was_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; the run is told, and goes on later."""
    config = make_config({"steps": 3, "checkpoint_every": 2, "val_every": 0})
    arguments = ["pretrain", "demo", *overrides(to_dict(config))]
    code = (
        "import resource, sys\n"
        "from avmae_fast.cli import main\n"
        "from avmae_fast.train import checkpoint\n"
        "save = checkpoint._save_tensors\n"
        "def save_on_a_small_disk(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, resource.RLIM_INFINITY))\n"
        "    save(*args)\n"
        "checkpoint._save_tensors = save_on_a_small_disk\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 73, done.stderr
    assert "cannot be written (File too large): it has no checkpoint" in done.stderr
    assert not list((config.train.out / "checkpoints").iterdir())


def test_report_of_a_run_once_more(make_config: MakeConfig, capsys: Any) -> None:
    config = make_config({"steps": 2})
    page = pretrain(config).report
    assert page is not None
    page.unlink()
    assert main(["report", str(config.train.out)]) == 0
    assert page.exists() and "report:" in capsys.readouterr().out
    assert main(["report", str(config.train.out / "checkpoints")]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


GIB = 2**30


def test_advice_names_a_batch_that_fits() -> None:
    train = TrainConfig(out=Path("x"), steps=1, batch=512, accumulate=2)
    # 60 GiB for 256 clips: 0.234 GiB each, so 0.92 * 80 - 10 = 63.6 GiB would hold 271; but 256
    # did not fit, so the next split of 512 is asked for.
    text = advice(train, 80 * GIB, 70 * GIB, 10 * GIB)
    assert "micro-batch of 256 clips" in text and "80.0 GiB" in text and "take 10.0 GiB" in text
    assert "train.accumulate = 4 (micro-batches of 128)" in text
    # Half of the memory is somebody else's: less fits.
    assert "train.accumulate = 16 (" in advice(train, 24 * GIB, 70 * GIB, 10 * GIB)
    assert "Not even one clip" in advice(train, 10 * GIB, 10 * GIB, 10 * GIB)
