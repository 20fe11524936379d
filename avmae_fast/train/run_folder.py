"""The folder of a run: what may be there before it starts, and where it goes on from.

run.json               the configuration and the versions that ran it
checkpoints/           see avmae_fast.train.checkpoint
metrics.jsonl, validation.jsonl, bad_samples.jsonl, tensorboard/
encoder.safetensors, encoder.json, report/       written at the end
"""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avmae_fast.config import Config
from avmae_fast.config_file import differing_fields, to_dict
from avmae_fast.train.checkpoint import (
    CheckpointError,
    Refused,
    newest_verified,
    read_state,
    set_aside,
    steps_saved,
)

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
TENSORBOARD = "tensorboard"
REPORT = "report"
_CHECKPOINTS = "checkpoints"
_RUN = "run.json"
_CONTENTS = (
    _CHECKPOINTS,
    TENSORBOARD,
    REPORT,
    METRICS,
    VALIDATION,
    BAD_SAMPLES,
    "encoder.safetensors",
    "encoder.json",
    _RUN,
)


class RunFolderError(ValueError):
    """The folder of a run cannot be used as asked; the text says what to do."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint, what its state.json holds, and newer ones that do not verify."""

    path: Path
    state: dict[str, Any]
    refused: list[Refused]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def samples(self) -> int:
        """Samples trained on, which is the position of the next one."""
        return self.state["samples"]


def checkpoints_of(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return config.train.out / _CHECKPOINTS


def find_resume_point(config: Config, resume: bool, restart: bool) -> ResumePoint | None:
    """Where the run goes on from, None for its beginning. Writes nothing.

    Args:
        resume: go on from the newest checkpoint that verifies, if there is any checkpoint.
        restart: start anew although the folder holds an earlier run.

    Raises:
        RunFolderError: the folder holds other files, or checkpoints and neither was asked for.
        CheckpointError: no checkpoint verifies, or they are of another architecture.
    """
    out, folder = config.train.out, checkpoints_of(config)
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"train.out = {str(out)!r} is not valid: it is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / _RUN).exists():
        raise RunFolderError(
            f"train.out = {str(out)!r} is not valid: it holds files but no run; "
            "it must be absent, empty or the folder of an earlier run"
        )
    if restart or not steps_saved(folder):
        if resume:
            logger.warning("nothing to resume in %s: starting at step 0", out)
        return None
    if not resume:
        raise RunFolderError(
            f"train.out = {str(out)!r} holds the checkpoints of an earlier run: add --resume to "
            "go on with it, --restart to delete it and start anew, or choose another train.out"
        )
    path, refused = newest_verified(folder)
    if path is None:
        reasons = "; ".join(map(str, refused))
        raise CheckpointError(f"no checkpoint in {folder} can be used ({reasons})")
    state = read_state(path)
    _require_same_model(config, state, path)
    return ResumePoint(path, state, refused)


def open_run(config: Config, point: ResumePoint | None, restart: bool) -> None:
    """Make the folder, or take over the one that is there, and write down the configuration.

    Raises:
        RunFolderError: it cannot be written.
    """
    out = config.train.out
    try:
        if restart:
            _delete_run(out)
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".partial-{_RUN}"
        record = {"config": to_dict(config), "versions": versions()}
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, out / _RUN)
        if point is not None and point.refused:
            logger.warning("refused %s", "; ".join(map(str, point.refused)))
            set_aside(point.refused)
    except OSError as error:
        raise RunFolderError(
            f"train.out = {str(out)!r} is not valid: it must be a folder that can be written "
            f"({error.strerror})"
        ) from error


def versions() -> dict[str, str]:
    """What ran: the versions that decide numbers and formats."""
    return {
        "avmae_fast": package_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def package_version() -> str:
    """The installed version of this package, "unknown" where it runs from its sources."""
    try:
        return importlib.metadata.version("avmae_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _require_same_model(config: Config, state: dict[str, Any], path: Path) -> None:
    wrote, asked = state["config"], to_dict(config)
    differ = differing_fields(wrote["model"], asked["model"], "model.")
    if differ:
        raise CheckpointError(
            f"{path} is of another model ({'; '.join(differ)}): set these fields as they were, "
            "or choose another train.out"
        )
    changed = [
        field
        for section in ("data", "train")
        for field in differing_fields(wrote[section], asked[section], f"{section}.")
    ]
    if changed:
        logger.warning("resuming with other settings than before: %s", "; ".join(changed))


def _delete_run(out: Path) -> None:
    """Delete what runs write; anything else in the folder stays."""
    for name in _CONTENTS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
