"""The batch that stopped a run is made again, and the broken sample and layer are named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from avmae_fast.cli import main
from avmae_fast.config import Config
from avmae_fast.data.loader import ClipLoader
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train import pretrain as loop
from avmae_fast.train.finetune import finetune
from avmae_fast.train.finetune_inputs import FinetuneStage
from avmae_fast.train.guard import NonFiniteError
from avmae_fast.train.inputs import Inputs, Stage
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.recipe import build_classifier
from avmae_fast.train.replay import keep_failed, replay
from avmae_fast.train.run_folder import RunFolderError
from avmae_fast.train.targets import Targets

BAD_SAMPLES = {5, 9, 13}
STEPS = {"batch": 4, "steps": 10, "checkpoint_every": 100}

MakeConfig = Callable[..., Config]
MakeFinetune = Callable[..., FinetuneConfig]


@pytest.fixture
def bad_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples whose spectrogram is not a number, as if a file were so."""
    make = Stage._audio

    def broken(self: Stage, batch: Any, config: Any) -> Any:
        audio = make(self, batch, config)
        if audio is not None:
            for row, key in enumerate(batch.keys.tolist()):
                if key in BAD_SAMPLES:
                    audio[row] = math.nan
        return audio

    monkeypatch.setattr(Stage, "_audio", broken)


def test_names_sample_and_layer(make_config: MakeConfig, bad_samples: None) -> None:
    config = make_config(STEPS)
    with pytest.raises(NonFiniteError, match="at step 4"):
        pretrain(config)
    replayed = list(replay(config.train.out, "cpu"))
    assert [one.sample for one in replayed] == [12, 13, 14, 15]
    assert [one.sample for one in replayed if not one.finite] == [13]
    (broken,) = [one for one in replayed if not one.finite]
    assert broken.layer is not None and broken.layer.startswith("encoder.audio")
    assert "sample 13: loss nan, first not finite after encoder.audio" in str(broken)


def test_views_of_a_window_are_samples_too(make_config: MakeConfig, bad_samples: None) -> None:
    config = make_config(STEPS, {"repeat_views": 2})
    with pytest.raises(NonFiniteError, match="at step 4"):
        pretrain(config)
    replayed = list(replay(config.train.out, "cpu"))
    assert [(one.sample, one.finite) for one in replayed] == [
        (12, True), (13, False), (14, True), (15, True)
    ]  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_blends_do_not_hide_who_broke_them(
    make_finetune: MakeFinetune, bad_samples: None, accumulate: int, capsys: Any
) -> None:
    """Mixup spreads one bad sample over two; by itself only the one is not finite."""
    recipe = {"mixup": 0.5, "scale_jitter": [0.9, 1.33]}
    config = make_finetune(
        {**STEPS, "accumulate": accumulate}, model={"drop_path": 0.5}, finetune=recipe
    )
    with pytest.raises(NonFiniteError, match="at step 4"):
        finetune(config)
    replayed = list(replay(config.train.out, "cpu"))
    single = [(one.sample, one.finite) for one in replayed if one.count == 1]
    assert single == [(12, True), (13, False), (14, True), (15, True)]
    assert all(one.finite for one in replayed if one.count > 1)
    (broken,) = [one for one in replayed if not one.finite]
    assert broken.layer is not None and broken.layer.startswith("encoder.audio")
    capsys.readouterr()
    assert main(["replay-batch", str(config.train.out), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "sample 13: loss nan, first not finite after encoder.audio" in printed
    assert "not finite: 1" in printed


@pytest.mark.parametrize("head", ["linear_probe", "attentive_probe"])
def test_probes(make_finetune: MakeFinetune, bad_samples: None, head: str) -> None:
    """BatchNorm has no statistics of one sample."""
    config = make_finetune(STEPS, model={"head": head})
    with pytest.raises(NonFiniteError, match="at step 4"):
        finetune(config)
    replayed = list(replay(config.train.out, "cpu"))
    assert [one.sample for one in replayed if not one.finite] == [13]


class _Recorded(Exception):
    pass


@pytest.mark.parametrize("world", [1, 2])
def test_together_is_what_the_step_had(
    make_finetune: MakeFinetune, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """The very inputs of every micro-batch of a process: blends, labels, stochastic depth."""
    recipe = {"mixup": 0.5, "scale_jitter": [0.9, 1.33], "colour": 0.8, "time_shift": True}
    config = make_finetune({**STEPS, "batch": 8, "accumulate": 2}, None, {"drop_path": 0.5}, recipe)
    made: list[tuple[int, Inputs]] = []
    make = FinetuneStage._make

    def record(self: FinetuneStage, batch: Any) -> Inputs:
        inputs = make(self, batch)
        if len(batch) > 1:
            made.append((int(batch.keys[0]), inputs))
        return inputs

    monkeypatch.setattr(FinetuneStage, "_make", record)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_note", _raise_recorded)
        with pytest.raises(_Recorded):
            finetune(config)
    if world == 1:
        expected = dict(made)
        micro_batch = 4
    else:
        expected, micro_batch = _of_two_processes(config), 2
    made.clear()
    weights = build_classifier(config).state_dict()
    keep_failed(config.train.out, weights, NonFiniteError("", 1, 0, 8), micro_batch)
    replayed = list(replay(config.train.out, "cpu"))
    assert [one.sample for one in replayed] == list(range(8)) and all(o.finite for o in replayed)
    assert [first for first, _ in made] == list(range(0, 8, micro_batch))
    for first, inputs in made:
        _assert_equal(inputs, expected[first])


def _raise_recorded(*args: Any) -> bool:
    raise _Recorded


def _of_two_processes(config: FinetuneConfig) -> dict[int, Inputs]:
    found = {}
    for rank in range(2):
        with ClipLoader(config.training_input, "train", rank=rank, world=2) as clips:
            targets = Targets(clips.manifest, config.model.heads, "softmax")
            stage = FinetuneStage(config, targets, torch.device("cpu"))
            for batch, _ in zip(clips, range(2), strict=False):
                found[int(batch.keys[0])] = stage(batch)
    return found


def _assert_equal(ours: Inputs, theirs: Inputs) -> None:
    assert ours.keys() == theirs.keys() == {"video", "audio", "labels", "drop"}
    assert torch.equal(ours["video"], theirs["video"])
    assert torch.equal(ours["audio"], theirs["audio"])
    for name, labels in theirs["labels"].items():
        assert torch.equal(ours["labels"][name], labels)
    assert str(ours["drop"]) == str(theirs["drop"])


def test_what_only_a_blend_breaks_is_told(
    make_finetune: MakeFinetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that are finite by themselves and not as they were in the step."""
    make = FinetuneStage._make

    def broken(self: FinetuneStage, batch: Any) -> Inputs:
        inputs = make(self, batch)
        if len(batch) > 1 and 13 in batch.keys:
            inputs["audio"][0] = math.nan
        return inputs

    config = make_finetune({**STEPS, "steps": 1, "accumulate": 2}, finetune={"mixup": 0.5})
    finetune(config)
    monkeypatch.setattr(FinetuneStage, "_make", broken)
    weights = build_classifier(config).state_dict()
    keep_failed(config.train.out, weights, NonFiniteError("", 4, 12, 4), 2)
    replayed = list(replay(config.train.out, "cpu"))
    assert [one.sample for one in replayed] == [12, 13, 12, 14, 15]
    assert [one.finite for one in replayed] == [True, True, False, True, True]
    assert str(replayed[2]).startswith("samples 12 to 13 together: loss nan, first not finite")


def test_folder_without_a_failure(
    make_config: MakeConfig, make_finetune: MakeFinetune, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out)
    runs = ((make_config({"steps": 1}), pretrain), (make_finetune({"steps": 1}), finetune))
    for config, train in runs:
        with pytest.raises(RunFolderError, match="not the folder of a run"):
            list(replay(config.train.out))
        train(config)  # type: ignore[operator]
        with pytest.raises(RunFolderError, match="no failed step"):
            list(replay(config.train.out))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"first_sample": -1, "samples": 4}', '{"first_sample": "0", "samples": 4}']
    + ['{"first_sample": 0, "samples": 4, "micro_batch": 0}'],
)
def test_damaged_record(make_finetune: MakeFinetune, text: str) -> None:
    config = make_finetune({"steps": 1})
    finetune(config)
    weights = build_classifier(config).state_dict()
    folder = keep_failed(config.train.out, weights, NonFiniteError("", 1, 0, 4), 4)
    (folder / "failed.json").write_text(text)
    with pytest.raises(RunFolderError, match="failed.json is damaged"):
        list(replay(config.train.out))


def test_records_that_say_nothing_of_micro_batches(
    make_config: MakeConfig, bad_samples: None
) -> None:
    config = make_config({**STEPS, "accumulate": 2})
    with pytest.raises(NonFiniteError):
        pretrain(config)
    (path,) = Path(config.train.out).glob("failed/*/failed.json")
    record = json.loads(path.read_text())
    assert record.pop("micro_batch") == 2
    path.write_text(json.dumps(record))
    assert [one.sample for one in replay(config.train.out, "cpu") if not one.finite] == [13]
