"""The folder of a run: what may be there before it starts, and where it goes on from.

run.json               the configuration and the versions that ran it
checkpoints/           see avmae_fast.train.checkpoint
metrics.jsonl, validation.jsonl, events.jsonl, bad_samples.jsonl, tensorboard/
failed/                weights and samples of a step that stopped a run, see avmae_fast.train.replay
run.lock               see avmae_fast.train.lock
encoder/, report/      written at the end of pretraining
transfer.txt           what fine-tuning took over, see avmae_fast.interop.transfer_report
classifier/, evaluation/   written at the end of fine-tuning
"""

import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avmae_fast.config import Config, Run
from avmae_fast.config_file import differing_fields, finetune_from_dict, from_dict, to_dict
from avmae_fast.data.clip import ErrorKind
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train.checkpoint import (
    CheckpointError,
    Refused,
    newest_verified,
    read_state,
    set_aside,
    steps_saved,
)
from avmae_fast.train.export import ENCODER
from avmae_fast.train.lines import cut_lines, read_lines
from avmae_fast.train.lock import LOCK, RunLock

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
EVENTS = "events.jsonl"
_BAD_SAMPLES = "bad_samples"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
REPORT = "report"
FAILED = "failed"
CLASSIFIER = "classifier"
TRANSFER = "transfer.txt"
EVALUATION = "evaluation"
_CHECKPOINTS = "checkpoints"
_PARTIAL = ".partial-"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
RUN = "run.json"
_CONTENTS = (
    _CHECKPOINTS,
    TENSORBOARD,
    PROFILE,
    "wandb",
    REPORT,
    METRICS,
    VALIDATION,
    EVENTS,
    FAILED,
    ENCODER,
    CLASSIFIER,
    TRANSFER,
    EVALUATION,
    RUN,
)


# What a run goes on from: a type, the fields of a table, [type] for a list, (type,) for any table.
_STATE = {
    "step": int,
    "samples": int,
    "config": {"model": dict, "data": dict, "train": dict},
    "metrics": {"sums": (float,), "count": int, "time_s": float},
}
_GUARD = {"skipped": [int], "norms": [float]}


class RunFolderError(ValueError):
    """The folder of a run cannot be used as asked; the text says what to do."""


class OutputError(RuntimeError):
    """The disk of a run is full or fails; what was saved before is whole."""


@contextmanager
def outputs(out: Path) -> Iterator[None]:
    """Inside, an error of the disk is told as one of the run's folder.

    Raises:
        OutputError: the disk is full, read-only or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        saved = steps_saved(out / _CHECKPOINTS)
        step = (
            f"its newest checkpoint is of step {saved[0][0]}" if saved else "it has no checkpoint"
        )
        raise OutputError(
            f"train.out = {str(out)!r} cannot be written ({error.strerror}): {step}; see to the "
            "disk and go on with --resume"
        ) from error


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


def checkpoints_of(config: Run) -> Path:
    """Where a run keeps its checkpoints."""
    return config.train.out / _CHECKPOINTS


def checkpoints_in(out: Path) -> Path:
    """Where the run in a folder keeps its checkpoints."""
    return out / _CHECKPOINTS


def find_resume_point(config: Run, resume: bool, restart: bool) -> ResumePoint | None:
    """Where the run goes on from, None for its beginning. Writes nothing.

    Args:
        resume: go on from the newest checkpoint that verifies, if there is any checkpoint.
        restart: start anew although the folder holds an earlier run.

    Raises:
        RunFolderError: the folder holds other files or symbolic links, or checkpoints and neither
            was asked for.
        CheckpointError: no checkpoint verifies, or they are of another architecture.
    """
    out, folder = config.train.out, checkpoints_of(config)
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"train.out = {str(out)!r} is not valid: it is a file")
    _refuse_links(out)
    strangers = out.is_dir() and any(
        entry.name != LOCK and not entry.name.startswith(_PARTIAL) for entry in out.iterdir()
    )
    if strangers and not (out / RUN).exists():
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
    if not _fits(state, _STATE):
        raise CheckpointError(f"{path}: its state.json is not what a run writes")
    _require_same_model(config, state, path)
    return ResumePoint(path, state, refused)


def _refuse_links(out: Path) -> None:
    """A link among the files of a run could make it write or delete files of somebody else."""
    for folder in (out, out / _CHECKPOINTS, out / FAILED):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_symlink():
                raise RunFolderError(
                    f"{str(entry)!r} is a symbolic link: a run writes to files of its own only; "
                    "remove it, or make train.out itself a link"
                )


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value read from JSON is made of what `shape` says; `guard` may be absent."""
    if isinstance(shape, dict):
        fields = {**shape, "guard": _GUARD} if shape is _STATE and "guard" in value else shape
        return isinstance(value, dict) and all(
            name in value and _fits(value[name], inner) for name, inner in fields.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(x, shape[0]) for x in value)
    if isinstance(shape, tuple):
        return isinstance(value, dict) and all(_fits(x, shape[0]) for x in value.values())
    if shape is int:
        return type(value) is int and 0 <= value < 2**62
    if shape is float:
        return type(value) in (int, float) and abs(value) < sys.float_info.max
    return isinstance(value, shape)


@contextmanager
def open_run(
    config: Run, point: ResumePoint | None, restart: bool, checkpoint_bytes: int
) -> Iterator[None]:
    """Make the folder, or take over the one that is there, and write down the configuration.

    Inside, no other run can use the folder.

    Args:
        checkpoint_bytes: size of a checkpoint, as far as is known.

    Raises:
        RunFolderError: it cannot be written, or has no room for its checkpoints.
        LockedError: another run is using it.
    """
    out = config.train.out
    with ExitStack() as stack:
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(out))
            if restart:
                _delete_run(out)
            _require_room(out, config.train.keep_checkpoints, checkpoint_bytes)
            _cut_back(out, point)
            _write_down(config, point)
        yield


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"train.out = {str(out)!r} is not valid: it must be a folder that can be written "
            f"({error.strerror})"
        ) from error


def _require_room(out: Path, keep: int, checkpoint_bytes: int) -> None:
    """One more checkpoint than are kept is there for a while."""
    present = len(steps_saved(out / _CHECKPOINTS))
    needed = max(1, keep + 1 - present) * checkpoint_bytes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RunFolderError(
            f"train.out = {str(out)!r} is not valid: its checkpoints need {needed / 2**30:.2f} GiB "
            f"more, {free / 2**30:.2f} GiB are free; free some, set train.keep_checkpoints = 2, or "
            "choose another disk"
        )


def _cut_back(out: Path, point: ResumePoint | None) -> None:
    """Drop what an earlier run wrote beyond the point where this one goes on."""
    step, samples = (point.step, point.samples) if point else (0, 0)
    cut_lines(out / METRICS, "step", step)
    cut_lines(out / EVENTS, "step", step)
    # A validation at `step` comes after its checkpoint, so it is done again.
    cut_lines(out / VALIDATION, "step", step - 1)
    for path in _bad_sample_files(out):
        cut_lines(path, "position", samples - 1)


def _write_down(config: Run, point: ResumePoint | None) -> None:
    out = config.train.out
    partial = out / f"{_PARTIAL}{RUN}"
    record = {"config": to_dict(config), "versions": versions()}
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, out / RUN)
    if point is not None and point.refused:
        logger.warning("refused %s", "; ".join(map(str, point.refused)))
        set_aside(point.refused)


def read_run(out: Path) -> Config:
    """The configuration a pretraining run was last started with.

    Raises:
        RunFolderError: there is no such run in the folder.
    """
    config = read_any_run(out)
    if isinstance(config, FinetuneConfig):
        raise RunFolderError(f"{str(out)!r} holds a fine-tuning run, a pretraining run is wanted")
    return config


def read_any_run(out: Path) -> Config | FinetuneConfig:
    """The configuration a run was last started with.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    try:
        table = json.loads((out / RUN).read_text())["config"]
        return finetune_from_dict(table) if "finetune" in table else from_dict(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{str(out)!r} is not the folder of a run: no {RUN} in it") from error


def bad_samples_of(rank: int) -> str:
    """Name of the file in which a process notes what it could not read."""
    return f"{_BAD_SAMPLES}.rank{rank}.jsonl" if rank else f"{_BAD_SAMPLES}.jsonl"


def read_bad_samples(out: Path) -> list[dict[str, Any]]:
    """What all processes of a run could not read, in the order of the samples."""
    fields = {"position": int, "path": str, "kind": str, "detail": str}
    lines = [line for path in _bad_sample_files(out) for line in read_lines(path, fields)]
    return sorted(lines, key=lambda line: line["position"])


def files_to_exclude(out: Path, samples: int) -> dict[str, tuple[ErrorKind, str]]:
    """Files on which the first `samples` samples of a run hung or crashed: path, kind and detail.

    What a reader does to such a file need not be the same every time, so a resumed run leaves them
    alone, as the run did from then on.
    """
    return {
        line["path"]: (line["kind"], line["detail"])
        for line in read_bad_samples(out)
        if line["position"] < samples and line["kind"] in ("timeout", "crash")
    }


def _bad_sample_files(out: Path) -> list[Path]:
    return sorted(out.glob(f"{_BAD_SAMPLES}*.jsonl"))


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


def _require_same_model(config: Run, state: dict[str, Any], path: Path) -> None:
    wrote, asked = state["config"], to_dict(config)
    differ = differing_fields(wrote["model"], asked["model"], "model.")
    if differ:
        raise CheckpointError(
            f"{path} is of another model ({'; '.join(differ)}): set these fields as they were, "
            "or choose another train.out"
        )
    changed = [
        field
        for section in asked
        if section != "model"
        for field in differing_fields(wrote.get(section, {}), asked[section], f"{section}.")
    ]
    if changed:
        logger.warning("resuming with other settings than before: %s", "; ".join(changed))


def _delete_run(out: Path) -> None:
    """Delete what runs write; anything else in the folder stays."""
    for path in _bad_sample_files(out):
        path.unlink()
    for name in _CONTENTS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
