"""Checkpoints are whole or absent, verified, never overwritten, and pruned with care."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from avmae_fast.train import checkpoint
from avmae_fast.train.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    damage,
    finish_checkpoint,
    load_weights,
    newest_verified,
    read_state,
    restore_checkpoint,
    save_checkpoint,
    set_aside,
    steps_saved,
)
from avmae_fast.train.optim import ReleasedAdamW, parameter_groups
from avmae_fast.train.parts import save_parts
from avmae_fast.train.snapshot import Snapshot

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimiser that have made three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = ReleasedAdamW(parameter_groups(model), lr=0.1)
    for _ in range(3):
        _train_step(model, optimizer)
    return model, optimizer


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    optimizer.zero_grad()
    (model(x) - x[:, :3]).square().sum().backward()
    optimizer.step()


def _save(folder: Path, step: int, trained: tuple, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, Snapshot.of(*trained), {"samples": 4 * step}, keep)


def _flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_load_gives_back_weights_and_moments(tmp_path: Path, trained: tuple) -> None:
    model, optimizer = trained
    path = _save(tmp_path, 3, trained)
    assert read_state(path)["step"] == 3 and read_state(path)["samples"] == 12

    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    other_optimizer = ReleasedAdamW(parameter_groups(other), lr=0.1)
    restore_checkpoint(path, other, other_optimizer, sharded=False)
    # One more step uses everything that was saved.
    _train_step(model, optimizer)
    _train_step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key]), key


def test_moments_go_by_name_not_by_order(tmp_path: Path, trained: tuple) -> None:
    path = _save(tmp_path, 3, trained)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    groups = [{"params": list(reversed(list(model.parameters())))}]
    optimizer = ReleasedAdamW(groups, lr=0.1)
    restore_checkpoint(path, model, optimizer, sharded=False)
    for (name, a), b in zip(trained[0].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(trained[1].state[a]["exp_avg"], optimizer.state[b]["exp_avg"]), name


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_flipped_bit_refuses_the_newest(tmp_path: Path, trained: tuple, name: str) -> None:
    older, newer = _save(tmp_path, 1, trained), _save(tmp_path, 2, trained)
    size = (newer / name).stat().st_size
    _flip_bit(newer / name, size // 2)
    found, refused = newest_verified(tmp_path)
    assert found == older
    assert [item.path for item in refused] == [newer]
    # A manifest that names a wrong checksum blames the file.
    assert name == "MANIFEST.json" or name in refused[0].reason


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_missing_or_cut_file_is_refused(
    tmp_path: Path, trained: tuple, name: str, fault: str
) -> None:
    path = _save(tmp_path, 1, trained)
    if fault == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-20])
    found, refused = newest_verified(tmp_path)
    assert found is None and len(refused) == 1


def test_never_overwrites(tmp_path: Path, trained: tuple) -> None:
    path = _save(tmp_path, 1, trained)
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="step-00000001.*never overwritten"):
        _save(tmp_path, 1, trained)
    assert (path / "model.safetensors").read_bytes() == before


def test_keeps_the_newest_that_verify(tmp_path: Path, trained: tuple) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, trained)
    assert [step for step, _ in steps_saved(tmp_path)] == [3, 2]
    _flip_bit(tmp_path / "step-00000003" / "model.safetensors", 100)
    _save(tmp_path, 4, trained)
    # 3 does not count, so 2 is the second newest good one.
    assert [step for step, _ in steps_saved(tmp_path)] == [4, 3, 2]
    _save(tmp_path, 5, trained)
    assert [step for step, _ in steps_saved(tmp_path)] == [5, 4]


def test_failed_write_leaves_nothing(
    tmp_path: Path, trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1, trained)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2, trained)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_interrupted_write_is_cleared_away(tmp_path: Path, trained: tuple) -> None:
    leftover = tmp_path / ".partial-step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest_verified(tmp_path) == (None, [])
    _save(tmp_path, 2, trained)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


def test_refused_ones_are_set_aside(tmp_path: Path, trained: tuple) -> None:
    for _ in range(2):
        path = _save(tmp_path, 1, trained)
        (path / "state.json").unlink()
        set_aside(newest_verified(tmp_path)[1])
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "refused-step-00000001",
        "refused-2-step-00000001",
    }


def test_other_format_is_refused(tmp_path: Path, trained: tuple) -> None:
    path = _save(tmp_path, 1, trained)
    state = json.loads((path / "state.json").read_text())
    state |= {"format": 99, "versions": {"avmae_fast": "7.0"}}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="format 99.*use avmae_fast 7.0"):
        read_state(path)


def test_in_parts(tmp_path: Path, trained: tuple) -> None:
    """Read only where it was asked for, since its metadata is a pickle; then equal to the bit."""
    model, optimizer = trained
    partial = begin_checkpoint(tmp_path, 3)
    scalars = save_parts(partial, model, optimizer)
    path = finish_checkpoint(partial, 3, scalars, {"samples": 12}, 2)
    assert newest_verified(tmp_path) == (path, [])
    other = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    other_optimizer = ReleasedAdamW(parameter_groups(other), lr=0.1)
    with pytest.raises(CheckpointError, match="in parts.*train.sharded_checkpoints = true"):
        restore_checkpoint(path, other, other_optimizer, sharded=False)
    restore_checkpoint(path, other, other_optimizer, sharded=True)
    for one, two in ((model, optimizer), (other, other_optimizer)):
        _train_step(one, two)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert load_weights(path, sharded=True).keys() == model.state_dict().keys()


def test_manifest_of_strange_files_is_refused(tmp_path: Path, trained: tuple) -> None:
    path = _save(tmp_path, 3, trained)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["../../secret"] = {"size_bytes": 1, "crc32": "00000000"}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert newest_verified(tmp_path)[1][0].reason.endswith("none of a checkpoint")
    del manifest["files"]["../../secret"], manifest["files"]["optimizer.safetensors"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert newest_verified(tmp_path)[1][0].reason.endswith("does not name all files")


def test_not_what_a_run_writes_is_refused(tmp_path: Path, trained: tuple) -> None:
    """Sums say only that files are as they were written, by whomever."""
    path = _save(tmp_path, 1, trained)
    good = (path / "model.safetensors").read_bytes()
    strange = ('{"format": 1, "step": 1, "optimizer": "a"}', '{"files": [null]}', '{"files": [7]}')
    for text in ("[1]", "{}", '{"format": 1}', "[" * 100_000, "1" * 5000, "\xff", *strange):
        (path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match="state.json is not what a run writes"):
            read_state(path)
        (path / "MANIFEST.json").write_text(text)
        assert damage(path) == "MANIFEST.json is damaged"
    for data in (b"", good[:20], (2**63).to_bytes(8, "little") + good[8:]):
        (path / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="model.safetensors is not a safetensors file"):
            load_weights(path)


@pytest.mark.parametrize(
    ("part", "name", "shape", "message"),
    [
        ("weights", "0.weight", (3, 5), r"0.weight has shape \(3, 5\), wanted is \(3, 4\)"),
        ("weights", "7.weight", (1,), r"7.weight has shape \(1,\), wanted is None"),
        ("weights", "0.bias", None, r"0.bias has shape None, wanted is \(3,\)"),
        ("moments", "0.weight/exp_avg", (4, 3), "0.weight/exp_avg is no optimiser state"),
        ("moments", "7.weight/exp_avg", (1,), "7.weight/exp_avg is no optimiser state"),
        ("moments", "0.weight/step", (3, 4), "0.weight/step is no optimiser state"),
        ("moments", "0.weight/exp_avg", None, "some parameters have other optimiser state"),
    ],
)
def test_another_models_is_refused(
    tmp_path: Path, trained: tuple, part: str, name: str, shape: tuple | None, message: str
) -> None:
    snapshot = Snapshot.of(*trained)
    tensors = getattr(snapshot, part)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    path = save_checkpoint(tmp_path, 1, snapshot, {}, 2)
    with pytest.raises(CheckpointError, match=f"does not fit the model: {message}"):
        restore_checkpoint(path, *trained, sharded=False)
    assert snapshot.misfit(trained[0]) is not None
    assert Snapshot.of(*trained).misfit(trained[0]) is None
