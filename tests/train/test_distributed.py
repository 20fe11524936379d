"""Several processes on gloo: the numbers of one process, whatever their number and how they share.

What differs between them is the order in which gradients are added, and so the last bits.
"""

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes

from avmae_fast.config import Config, ConfigError
from avmae_fast.data.bad_files import TooManyBadFiles
from avmae_fast.data.loader import ClipLoader
from avmae_fast.train import pretrain as loop
from avmae_fast.train.checkpoint import load_weights
from avmae_fast.train.distributed import World, on_first, process_group
from avmae_fast.train.lines import read_lines
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.pretrain import PeerFailed, pretrain

MakeConfig = Callable[..., Config]
STEPS = 6


def _pretrain(config: Config, resume: bool = False) -> tuple[int, int | None]:
    loop.write_report = lambda *_: None  # type: ignore[assignment]
    outcome = pretrain(config, resume=resume)
    return outcome.step, outcome.exit_code


def _run_of(make_config: MakeConfig, out: Path, **train: Any) -> Config:
    common = {"steps": STEPS, "batch": 8, "log_every": 1, "checkpoint_every": 3, "base_lr": 0.02}
    return make_config({**common, "clip_grad": 0.5, "out": str(out), **train})


def _weights(config: Config) -> dict[str, torch.Tensor]:
    folder = config.train.out / f"checkpoints/step-{STEPS:08d}"
    return load_weights(folder, config.train.sharded_checkpoints)


def _losses(config: Config) -> list[dict[str, float]]:
    lines = read_lines(config.train.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    kept = ("loss", "loss_video", "loss_audio", "grad_norm")
    return [{name: line[name] for name in kept} for line in lines]


def _assert_same_run(one: Config, other: Config) -> None:
    for mine, theirs in zip(_losses(one), _losses(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    a, b = _weights(one), _weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        # Adam divides by the root of a gradient squared: where that is 1e-5 of the largest, so is
        # what is left of its bits.
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def alone(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The run of one process."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    config = _run_of(make_config, tmp_path / "alone")
    pretrain(config)
    return config


@pytest.mark.parametrize(
    ("size", "parallel", "accumulate"), [(2, "ddp", 2), (2, "fsdp2", 2), (4, "ddp", 1)]
)
def test_equals_one_process(
    make_config: MakeConfig,
    tmp_path: Path,
    alone: Config,
    size: int,
    parallel: str,
    accumulate: int,
) -> None:
    config = _run_of(make_config, tmp_path / "run", parallel=parallel, accumulate=accumulate)
    assert run_processes(size, _pretrain, config) == [(STEPS, None)] * size
    _assert_same_run(config, alone)
    # Written once, by the first.
    assert (config.train.out / "encoder").exists() or (config.train.out / "encoder.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "sharded"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)]
)
@pytest.mark.parametrize("then", [1, 2, 8])
def test_saved_on_four_resumed_on_others(
    make_config: MakeConfig, tmp_path: Path, alone: Config, then: int, parallel: str, sharded: bool
) -> None:
    how = {"parallel": parallel, "sharded_checkpoints": sharded}
    config = _run_of(make_config, tmp_path / "run", **how)
    assert run_processes(4, _stopped_at, config, 3, 1) == [(3, 75)] * 4
    assert run_processes(then, _pretrain, config, True) == [(STEPS, None)] * then
    _assert_same_run(config, alone)


def _stopped_at(config: Config, step: int, rank: int) -> tuple[int, int | None]:
    """One of the processes gets a signal while the step before `step` is made."""
    add = Metrics.add
    counted = iter(range(1, 100))

    def add_and_signal(self: Metrics, *args: Any) -> None:
        add(self, *args)
        if next(counted) == step - 1 and int(os.environ["RANK"]) == rank:
            signal.raise_signal(signal.SIGTERM)

    Metrics.add = add_and_signal  # type: ignore[method-assign]
    try:
        return _pretrain(config)
    finally:
        Metrics.add = add  # type: ignore[method-assign]


def test_a_signal_to_one_stops_all_at_the_same_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = _run_of(make_config, tmp_path / "run", checkpoint_every=100)
    assert run_processes(2, _stopped_at, config, 4, 1) == [(4, 75)] * 2
    assert [path.name for path in (config.train.out / "checkpoints").iterdir()] == ["step-00000004"]


def _without_batches(config: Config, after: int, rank: int) -> tuple[int, int | None]:
    """One process finds its files unreadable."""
    iterate = ClipLoader.__iter__

    def broken(self: ClipLoader) -> Any:
        for number, batch in enumerate(iterate(self)):
            if number == after and int(os.environ["RANK"]) == rank:
                raise TooManyBadFiles("all files are bad")
            yield batch

    ClipLoader.__iter__ = broken  # type: ignore[method-assign]
    try:
        return _pretrain(config)
    finally:
        ClipLoader.__iter__ = iterate  # type: ignore[method-assign]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_without_data_ends_all(make_config: MakeConfig, tmp_path: Path, parallel: str) -> None:
    config = _run_of(make_config, tmp_path / "run", parallel=parallel)
    first, second = run_processes(2, _without_batches, config, 4, 1)
    assert isinstance(first, PeerFailed) and "step 5" in str(first)
    assert isinstance(second, TooManyBadFiles)
    # What was saved before is good, and nothing was saved after.
    assert [path.name for path in (config.train.out / "checkpoints").iterdir()] == ["step-00000003"]


def _fails_first(error: Exception) -> str:
    world = World.of_environment()

    def fail() -> None:
        raise error

    with process_group(world, torch.device("cpu")):
        assert on_first(world, lambda: os.environ["RANK"]) == "0"
        on_first(world, fail)
    return "not reached"


def test_an_error_of_the_first_is_everybodys() -> None:
    results = run_processes(2, _fails_first, ConfigError("train.x = 1 is not valid"))
    assert [str(result) for result in results] == ["train.x = 1 is not valid"] * 2


def test_batches_that_do_not_divide(make_config: MakeConfig, tmp_path: Path) -> None:
    train = _run_of(make_config, tmp_path / "run", accumulate=2).train
    World(0, 4, 0).require_batch(train)
    with pytest.raises(ConfigError, match="train.batch = 8 is not valid with 3 processes"):
        World(0, 3, 0).require_batch(train)
    text = World(0, 2, 0).arithmetic(dataclasses.replace(train, batch=512))
    assert text == "512 clips a step = 2 processes x 2 micro-batches x 128"
    assert math.prod((2, 2, 128)) == 512
