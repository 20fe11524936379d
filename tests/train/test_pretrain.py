"""The loop: what it writes, and that stopping and resuming changes nothing."""

import csv
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avmae_fast.config import Config, ConfigError
from avmae_fast.data.bad_files import TooManyBadFiles
from avmae_fast.data.manifest import ManifestError
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train import pretrain as loop
from avmae_fast.train.checkpoint import CheckpointError
from avmae_fast.train.export import load_encoder
from avmae_fast.train.lines import read_lines
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.pretrain import NonFiniteError, pretrain
from avmae_fast.train.run_folder import RunFolderError

# What may differ between a run and its resumed twin: the clock.
CLOCK = {"time_s", "clips_per_s", "data_wait_fraction"}

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own."""
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out / "report")


def _signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal while it makes a step (numbered from 1 within the process)."""
    counted, add = iter(range(1, 1000)), Metrics.add

    def add_and_signal(self: Metrics, *args: Any) -> None:
        add(self, *args)
        if next(counted) == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Metrics, "add", add_and_signal)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path)
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def _manifest_with_bad_file(clips: Path, folder: Path) -> Path:
    """The clips, the first training clip of which is no media file."""
    (folder / "broken.mp4").write_bytes(b"not a media file")
    with clips.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["path"] = str(clips.parent / row["path"])
    rows[0]["path"] = str(folder / "broken.mp4")
    with (folder / "manifest.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def test_resumed_twice_equals_straight(
    make_config: MakeConfig, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser, metrics, validation and bad samples are those of an unbroken run."""
    data = {"manifest": str(_manifest_with_bad_file(clips, tmp_path)), "max_bad_fraction": 1.0}
    common = {"accumulate": 2, "val_every": 4, "checkpoint_every": 100, "clip_grad": 0.5}
    straight = make_config({**common, "out": str(tmp_path / "straight")}, data)
    broken = make_config({**common, "out": str(tmp_path / "broken")}, data)
    assert pretrain(straight).exit_code is None

    # Stopped at 4, where a validation is due, and at 7, in the middle of a logged window.
    for stop, more in ((4, 4), (7, 3)):
        with monkeypatch.context() as patch:
            _signal_at(patch, more, signal.SIGINT)
            outcome = pretrain(broken, resume=stop != 4)
        assert (outcome.step, outcome.exit_code, outcome.report) == (stop, 75, None)
    assert pretrain(broken, resume=True).exit_code is None

    for name in ("model.safetensors", "optimizer.safetensors"):
        path = Path("checkpoints/step-00000010") / name
        a, b = load_file(straight.train.out / path), load_file(broken.train.out / path)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    for name in ("metrics.jsonl", "validation.jsonl", "bad_samples.jsonl"):
        assert _lines(straight.train.out / name) == _lines(broken.train.out / name), name
    metrics = _lines(straight.train.out / "metrics.jsonl")
    assert [(line["step"], line["samples"]) for line in metrics] == [
        (1, 4),
        (4, 16),
        (8, 32),
        (10, 40),
    ]
    assert [line["step"] for line in _lines(straight.train.out / "validation.jsonl")] == [4, 8]
    # 40 samples of 9 clips: the bad one is met once an epoch.
    bad = _lines(straight.train.out / "bad_samples.jsonl")
    assert [line["position"] // 9 for line in bad] == [0, 1, 2, 3, 4]


def test_resume_takes_the_newest_good_checkpoint(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged one is named and set aside, and its steps are made again with the same result."""
    config = make_config()
    pretrain(config)
    last = config.train.out / "checkpoints/step-00000010"
    wanted = (last / "model.safetensors").read_bytes()
    lines = _lines(config.train.out / "metrics.jsonl")
    (last / "model.safetensors").write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))

    pretrain(config, resume=True)
    assert "refused step-00000010: model.safetensors is not what was written" in caplog.text
    assert (last / "model.safetensors").read_bytes() == wanted
    assert last.with_name("refused-step-00000010").is_dir()
    assert _lines(config.train.out / "metrics.jsonl") == lines


def test_metrics_and_encoder_of_a_run(make_config: MakeConfig) -> None:
    config = make_config()
    pretrain(config)
    line = read_lines(config.train.out / "metrics.jsonl")[-1]
    assert line["loss"] == pytest.approx(0.5 * line["loss_video"] + 0.5 * line["loss_audio"])
    assert line["grad_norm"] > 0 and line["clips_per_s"] > 0
    assert 0 <= line["data_wait_fraction"] <= 1
    # base_lr 0.1 times 4 / 256, update 9 of 10 down the cosine.
    assert line["lr"] == pytest.approx(0.1 * 4 / 256 * (1 + math.cos(0.9 * math.pi)) / 2)

    encoder = load_encoder(config.train.out)
    record = json.loads((config.train.out / "encoder/config.json").read_text())
    assert encoder.config == config.model
    assert record["step"] == 10 and record["data"] == {"fps": 10.0, "stride": 2}
    weights = load_file(config.train.out / "checkpoints/step-00000010/model.safetensors")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    # Same features as the whole model's.
    model = AudiovisualMAE(config.model)
    model.load_state_dict(weights)
    video = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    audio = torch.randn(2, 32, 32)
    features = encoder(video, audio)
    wanted = model.encode({"video": video, "audio": audio}, None)
    assert all(torch.equal(features[m], wanted[m]) for m in ("video", "audio"))


def test_a_run_on_planes(make_config: MakeConfig) -> None:
    """Through training and validation to the pictures of the report."""
    config = make_config({"steps": 4, "val_every": 2}, {"pixels": "yuv420"})
    assert pretrain(config).step == 4
    losses = [line["loss_video"] for line in _lines(config.train.out / "metrics.jsonl")]
    assert losses and all(map(math.isfinite, losses))


def test_accumulation_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for accumulate in (1, 4):
        out = tmp_path / f"accumulate-{accumulate}"
        config = make_config(
            {"accumulate": accumulate, "out": str(out), "steps": 4, "log_every": 1}
        )
        pretrain(config)
        losses.append([line["loss"] for line in read_lines(out / "metrics.jsonl")])
    # The same numbers summed in another order; Adam takes the sign of the smallest gradients.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_sigterm_stops_with_its_code(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _signal_at(monkeypatch, 2, signal.SIGTERM)
    config = make_config()
    assert pretrain(config).exit_code == 75
    assert (config.train.out / "checkpoints/step-00000002").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _break(monkeypatch: pytest.MonkeyPatch, where: str, steps: set[int]) -> None:
    """Make the loss or the gradient of some steps NaN or infinite (numbered from 1)."""
    calls, forward = iter(range(1, 100)), AudiovisualMAE.forward

    def broken(self: AudiovisualMAE, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if next(calls) in steps:
            if where == "loss":
                object.__setattr__(out, "loss", out.loss * math.nan)
            else:
                out.loss.register_hook(lambda grad: grad * math.inf)
        return out

    monkeypatch.setattr(AudiovisualMAE, "forward", broken)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_three_bad_steps_in_a_row_stop_before_anything_is_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Steps 6 to 8: checkpoint 5 stays as it was, there is none after it, the batch is kept."""
    config = make_config()
    _break(monkeypatch, where, {6, 7, 8})
    with pytest.raises(
        NonFiniteError, match=r"not finite at step 8 \(samples 28 to 31\).*3 in a row"
    ):
        pretrain(config)
    (saved,) = (config.train.out / "checkpoints").iterdir()
    assert saved.name == "step-00000005"
    weights = load_file(saved / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    events = read_lines(config.train.out / "events.jsonl")
    assert [(e["step"], e["event"], e["first_sample"]) for e in events] == [
        (6, "skipped", 20),
        (7, "skipped", 24),
        (8, "skipped", 28),
    ]
    kept = load_file(config.train.out / "failed/step-00000008/model.safetensors")
    # The three steps have changed nothing.
    torch.testing.assert_close(kept, weights, rtol=0, atol=0)


def test_a_bad_step_is_skipped(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on with what it had, also through a stop, and other steps are not touched."""
    config = make_config({"log_every": 1})
    _break(monkeypatch, "gradient", {4, 6, 7})
    assert pretrain(config).exit_code is None
    assert "samples 12 to 15): the step is skipped" in caplog.text
    lines = read_lines(config.train.out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" not in line] == [4, 6, 7]
    assert all(math.isfinite(line[name]) for line in lines for name in line.keys() - {"mfu"})


def test_folder_with_checkpoints_needs_a_word(make_config: MakeConfig) -> None:
    config = make_config({"steps": 2})
    pretrain(config)
    with pytest.raises(RunFolderError, match="--resume to go on.*--restart"):
        pretrain(config)
    (config.train.out / "notes.txt").write_text("the user's own")
    assert pretrain(config, restart=True).step == 2
    assert (config.train.out / "notes.txt").exists()


def test_finished_run_says_so(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config({"steps": 2})
    pretrain(config)
    before = (config.train.out / "metrics.jsonl").read_text()
    outcome = pretrain(config, resume=True)
    assert "this run is done" in caplog.text
    assert outcome.report is not None and outcome.step == 2
    assert (config.train.out / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_starts_anew(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert pretrain(make_config({"steps": 1}), resume=True).step == 1
    assert "nothing to resume" in caplog.text


def test_resume_of_another_model_names_the_fields(make_config: MakeConfig) -> None:
    pretrain(make_config({"steps": 2}))
    other = make_config({"steps": 2}, model={"fusion": "early", "audio": None})
    with pytest.raises(
        CheckpointError, match=r"model\.audio: a table, now None; model\.fusion: 'mid', now 'early'"
    ):
        pretrain(other, resume=True)


def test_no_checkpoint_verifies(make_config: MakeConfig) -> None:
    config = make_config({"steps": 2})
    pretrain(config)
    (config.train.out / "checkpoints/step-00000002/state.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000002: state.json is missing"):
        pretrain(config, resume=True)


def _bad_runs() -> Iterator[Any]:
    def case(name: str, error: type[Exception], match: str, **tables: dict) -> Any:
        return pytest.param(tables, error, match, id=name)

    yield case("mask-kind", ConfigError, "model.video.mask", model={"video": {"mask": "frequency"}})
    masked = {"audio": {"mask_ratio": 0.001}}
    yield case(
        "nothing-masked", ConfigError, "audio.mask_ratio = 0.001.*mask a token", model=masked
    )
    crowded = {"objective": "inpainting_released", "audio": {"frames": 32, "mel_bins": 16}}
    match = "video.mask_ratio = 0.9 .*inpainting_released.* 4 tokens visible.*the 2 tokens"
    large = {"frames": 4, "height": 16, "width": 16, "tubelet": [2, 4, 4]}
    yield case("no-room", ConfigError, match, model={**crowded, "video": large})
    yield case("warmup", ConfigError, "train.warmup_steps = 10", train={"warmup_steps": 10})
    manifest = {"manifest": "absent.csv"}
    yield case("manifest", ManifestError, "absent.csv", data=manifest)
    yield case("out-is-a-file", RunFolderError, "it is a file", train={"out": __file__})
    unwritable = {"out": "/dev/null/run"}
    yield case(
        "unwritable", RunFolderError, "train.out = '/dev/null/run'.*written", train=unwritable
    )


@pytest.mark.parametrize(("tables", "error", "match"), list(_bad_runs()))
def test_bad_input_writes_nothing(
    make_config: MakeConfig, tmp_path: Path, tables: dict, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        pretrain(make_config(**tables))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_absent_gpu_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="train.device = 'cuda'"):
        pretrain(make_config({"device": "cuda"}))


def test_foreign_folder_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds files but no run"):
        pretrain(make_config(), restart=True)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_validation_without_held_out_clips(
    make_config: MakeConfig, clips: Path, tmp_path: Path
) -> None:
    data = {"manifest": str(clips.parent / "train.csv")}
    with pytest.raises(ManifestError, match="no clips of the split val.*data.val_manifest"):
        pretrain(make_config({"val_every": 2}, data))
    assert not (tmp_path / "run").exists()


def test_too_many_bad_files_stop_the_run(
    make_config: MakeConfig, clips: Path, tmp_path: Path
) -> None:
    data = {"manifest": str(_manifest_with_bad_file(clips, tmp_path)), "max_bad_fraction": 0.0}
    with pytest.raises(TooManyBadFiles, match="broken.mp4"):
        pretrain(make_config(data=data))


def test_tensorboard_gets_scalars_and_a_picture(make_config: MakeConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config({"tensorboard": True, "val_every": 2, "steps": 3})
    pretrain(config)
    events = EventAccumulator(str(config.train.out / "tensorboard"))
    events.Reload()
    assert {"train/loss_video", "train/grad_norm", "validation/loss"} <= set(
        events.Tags()["scalars"]
    )
    assert {"validation/video", "validation/audio"} <= set(events.Tags()["images"])
