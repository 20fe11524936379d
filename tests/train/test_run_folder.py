"""Folders that a run finds: what an earlier one left, and what none did."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.train.checkpoint import CheckpointError, save_checkpoint
from avmae_fast.train.run_folder import (
    RunFolderError,
    checkpoints_of,
    find_resume_point,
    open_run,
    read_run,
)
from avmae_fast.train.snapshot import Snapshot

MakeConfig = Callable[..., Config]


def test_killed_before_run_json_was_there(make_config: MakeConfig) -> None:
    """The folder holds a lock and half a file: it can be used."""
    config = make_config()
    out = config.train.out
    out.mkdir()
    (out / "run.lock").touch()
    (out / ".partial-run.json").write_text("{")
    assert find_resume_point(config, resume=True, restart=False) is None
    with open_run(config, None, False, 0):
        assert read_run(out) == config
    (out / "thesis.tex").touch()
    (out / "run.json").unlink()
    with pytest.raises(RunFolderError, match="it holds files but no run"):
        find_resume_point(config, resume=True, restart=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": []}', "[" * 100_000, "1" * 5000])
def test_run_json_of_somebody_else(make_config: MakeConfig, text: str) -> None:
    out = make_config().train.out
    out.mkdir()
    (out / "run.json").write_text(text)
    with pytest.raises(RunFolderError, match="is not the folder of a run"):
        read_run(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"),
        ("step", True),
        ("samples", -4),
        ("samples", 2**63),
        ("samples", None),
        ("config", {"model": {}, "data": []}),
        ("metrics", {"sums": {"loss": "a"}, "count": 1, "time_s": 0.0}),
        ("metrics", {"sums": {}, "count": 1, "time_s": float("nan")}),
        ("metrics", {"sums": {"loss": 10**400}, "count": 1, "time_s": 0.0}),
        ("guard", {"skipped": [1.5], "norms": []}),
        ("guard", None),
    ],
)
def test_a_state_that_no_run_saved(make_config: MakeConfig, field: str, value: object) -> None:
    config = make_config()
    state = {
        "samples": 12,
        "config": to_dict(config),
        "metrics": {"sums": {"loss": 1}, "count": 1, "time_s": 0.5},
        "guard": {"skipped": [2], "norms": [0.5]},
    }
    with open_run(config, None, False, 0):
        pass
    path = save_checkpoint(checkpoints_of(config), 3, Snapshot({}, {}, {}), state, 2)
    assert find_resume_point(config, resume=True, restart=False) is not None
    written = json.loads((path / "state.json").read_text())
    _write(path, {**written, field: value})
    with pytest.raises(CheckpointError, match="state.json is not what a run writes"):
        find_resume_point(config, resume=True, restart=False)


def _write(path: Path, state: dict) -> None:
    """Another state, with sums that fit."""
    from soak.kill_loop import seal

    seal(path, json.dumps(state).encode())
