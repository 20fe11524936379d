"""Checkpoints: folders that are either whole or not there, and are checked before they are used.

    checkpoints/step-00001000/
        model.safetensors       weights, by state-dict name
        optimizer.safetensors   optimiser state, "<parameter>/<key>"
        state.json              step, position in the data, configuration, versions, other scalars
        MANIFEST.json           size and CRC-32 of the three

A folder gets its name only once all of it is on the disk, and is never written again. One flipped
bit in a tensor loads without complaint, so every file is compared with the manifest first.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avmae_fast.train.snapshot import Snapshot

_FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
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
    path = folder / f"step-{step:08d}"
    if path.exists():
        raise FileExistsError(f"{path} exists: a checkpoint is never overwritten")
    _remove_partials(folder)
    partial = folder / f"{_PARTIAL}{path.name}"
    partial.mkdir(parents=True)
    try:
        _save_tensors(snapshot.weights, partial / "model.safetensors")
        _save_tensors(snapshot.moments, partial / "optimizer.safetensors")
        contents = {"format": _FORMAT, "step": step, **state, "optimizer": snapshot.scalars}
        (partial / "state.json").write_text(json.dumps(contents, indent=1))
        _seal(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(folder)
    _prune(folder, path, keep)
    return path


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
        recorded = json.loads((path / "MANIFEST.json").read_text())["files"]
        for name in _FILES:
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
    except (ValueError, KeyError, TypeError):
        return "MANIFEST.json is damaged"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that verifies.

    Raises:
        CheckpointError: another version of this program wrote it.
    """
    state = json.loads((path / "state.json").read_text())
    if state.get("format") != _FORMAT:
        wrote = state.get("versions", {}).get("avmae_fast", "?")
        raise CheckpointError(
            f"{path} has format {state.get('format')!r}, this version reads {_FORMAT}: "
            f"use avmae_fast {wrote}, which wrote it"
        )
    return state


def load_checkpoint(path: Path) -> Snapshot:
    """What a checkpoint that verifies keeps."""
    moments = load_file(path / "optimizer.safetensors")
    return Snapshot(load_weights(path), moments, read_state(path)["optimizer"])


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights alone, by state-dict name."""
    return load_file(path / "model.safetensors")


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
    for name in _FILES:
        fsync(partial / name)
        size = (partial / name).stat().st_size
        files[name] = {"size_bytes": size, "crc32": _crc32(partial / name)}
    manifest = partial / "MANIFEST.json"
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
