"""Checkpoints: folders that are either whole or not there, and are checked before they are used.

    checkpoints/step-00001000/
        model.safetensors       weights, by state-dict name
        optimizer.safetensors   optimiser state, "<parameter>/<key>"
        parts/                  in place of these two: see avmae_fast.train.parts
        state.json              step, position in the data, configuration, versions, other scalars
        MANIFEST.json           size and CRC-32 of all others

A folder gets its name only once all of it is on the disk, and is never written again. One flipped
bit in a tensor loads without complaint, so every file is compared with the manifest first.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avmae_fast.train import parts
from avmae_fast.train.snapshot import Snapshot

_FORMAT = 1
_STATE = "state.json"
_WHOLE = ("model.safetensors", "optimizer.safetensors")
_MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"
_CHUNK_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not belong to this run; the text says which and why."""


@dataclass(frozen=True)
class Refused:
    """A checkpoint that does not verify, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


def save_checkpoint(
    folder: Path,
    step: int,
    snapshot: Snapshot,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>` and delete all but the `keep` newest that verify.

    Args:
        state: what else is to be kept, JSON-able.

    Raises:
        FileExistsError: there is a checkpoint of this step.
        OSError: it could not be written; nothing of it is left.
    """
    partial = begin_checkpoint(folder, step)
    with removed_on_error(partial):
        _save_tensors(snapshot.weights, partial / "model.safetensors")
        _save_tensors(snapshot.moments, partial / "optimizer.safetensors")
    return finish_checkpoint(partial, step, snapshot.scalars, state, keep)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; it does not count as one yet.

    Raises:
        FileExistsError: there is a checkpoint of this step.
    """
    path = folder / f"step-{step:08d}"
    if path.exists():
        raise FileExistsError(f"{path} exists: a checkpoint is never overwritten")
    _remove_partials(folder)
    partial = folder / f"{_PARTIAL}{path.name}"
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(
    partial: Path, step: int, scalars: Mapping[str, Any], state: Mapping[str, Any], keep: int
) -> Path:
    """Make a folder that holds all tensors a checkpoint, and delete older ones.

    Args:
        scalars: optimiser state that is not in a tensor.
        state, keep: as in `save_checkpoint`.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    path = partial.with_name(partial.name.removeprefix(_PARTIAL))
    with removed_on_error(partial):
        contents = {"format": _FORMAT, "step": step, **state, "optimizer": scalars}
        (partial / _STATE).write_text(json.dumps(contents, indent=1))
        _seal(partial)
        os.rename(partial, path)
    fsync(path.parent)
    _prune(path.parent, path, keep)
    return path


@contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """Inside, an error takes what is written of a checkpoint with it."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoint_bytes(model: nn.Module) -> int:
    """About what a checkpoint takes: the weights and two moments of each."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())


def steps_saved(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a folder by name alone, newest first."""
    if not folder.is_dir():
        return []
    found = [(match, entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return sorted(((int(match[1]), entry) for match, entry in found), reverse=True)


def newest_verified(folder: Path) -> tuple[Path | None, list[Refused]]:
    """The newest checkpoint whose files are as they were written, and the newer ones refused."""
    refused: list[Refused] = []
    for _, path in steps_saved(folder):
        reason = damage(path)
        if reason is None:
            return path, refused
        refused.append(Refused(path, reason))
    return None, refused


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is."""
    try:
        recorded = json.loads((path / _MANIFEST).read_text())["files"]
        whole, in_parts = set(_WHOLE) <= set(recorded), any(map(_is_part, recorded))
        if _STATE not in recorded or not (whole or in_parts):
            return f"{_MANIFEST} does not name all files"
        for name in recorded:
            if name not in (_STATE, *_WHOLE) and not _is_part(name):
                return f"{_MANIFEST} names a file that is none of a checkpoint"
            size, crc32 = recorded[name]["size_bytes"], recorded[name]["crc32"]
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes, {size} were written"
            if _crc32(path / name) != crc32:
                return f"{name} is not what was written (CRC-32)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{_MANIFEST} is damaged"
    return None


def _is_part(name: str) -> bool:
    folder, _, file = name.partition("/")
    return (
        folder == parts.FOLDER and re.fullmatch(r"\.metadata|__\d+_\d+\.distcp", file) is not None
    )


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that verifies.

    Raises:
        CheckpointError: another version of this program wrote it, or another program.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        written, wrote = state["format"], state.get("versions", {}).get("avmae_fast", "?")
        state["step"], state["optimizer"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_STATE} is not what a run writes") from error
    if written != _FORMAT:
        raise CheckpointError(
            f"{path} has format {written!r}, this version reads {_FORMAT}: "
            f"use avmae_fast {wrote}, which wrote it"
        )
    return state


def restore_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool
) -> None:
    """Put weights and optimiser state of a checkpoint that verifies in place.

    Args:
        sharded: whether one in parts may be read.

    Raises:
        CheckpointError: it is in parts and may not, or is not what a run writes.
    """
    scalars = read_state(path)["optimizer"]
    if _require_readable(path, sharded):
        parts.load_parts(path, model, optimizer, scalars)
        return
    weights, moments = (load_tensors(path / name) for name in _WHOLE)
    snapshot = Snapshot(weights, moments, scalars)
    if misfit := snapshot.misfit(model):
        raise CheckpointError(f"{path} does not fit the model: {misfit}")
    snapshot.restore(model, optimizer)


def load_weights(path: Path, sharded: bool = False) -> dict[str, Tensor]:
    """The weights alone, by state-dict name; arguments and errors of `restore_checkpoint`."""
    if _require_readable(path, sharded):
        return parts.load_whole_weights(path)
    return load_tensors(path / "model.safetensors")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _require_readable(path: Path, sharded: bool) -> bool:
    """Whether a checkpoint is in parts, which is refused unless it was asked for."""
    in_parts = (path / parts.FOLDER).is_dir()
    if in_parts and not sharded:
        raise CheckpointError(
            f"{path} is in parts, whose .metadata is a pickle and could run a stranger's code: if "
            "this run is your own, set train.sharded_checkpoints = true"
        )
    return in_parts


def set_aside(refused: list[Refused]) -> None:
    """Rename refused checkpoints, so that the run can write theirs anew and nothing is lost."""
    for item in refused:
        target = item.path.with_name(f"refused-{item.path.name}")
        count = 1
        while target.exists():
            count += 1
            target = item.path.with_name(f"refused-{count}-{item.path.name}")
        os.rename(item.path, target)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # It reports a full disk by a number in its text.
        if code := re.search(r"(?:os error|code:) (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _seal(partial: Path) -> None:
    """Write MANIFEST.json from what can be read back, and force everything onto the disk."""
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        fsync(path)
        entry = {"size_bytes": path.stat().st_size, "crc32": _crc32(path)}
        files[path.relative_to(partial).as_posix()] = entry
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        fsync(folder)
    manifest = partial / _MANIFEST
    manifest.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1))
    fsync(manifest)
    fsync(partial)


def _prune(folder: Path, written: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest checkpoints that verify, as `written` does."""
    saved = [path for _, path in steps_saved(folder)]
    if len(saved) <= keep:
        return
    verified = 0
    for path in saved:
        if verified >= keep:
            # Out of its name first: a half-deleted folder must not pass for a checkpoint.
            gone = path.with_name(f"{_PARTIAL}{path.name}")
            os.rename(path, gone)
            shutil.rmtree(gone)
        elif path == written or damage(path) is None:
            verified += 1


def _remove_partials(folder: Path) -> None:
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"
