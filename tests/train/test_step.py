"""One optimiser step: its values, its gradients, and what a step that went wrong leaves alone."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config
from tiny_classifier import clips, labels_of, tiny_classifier_config

from avmae_fast.finetune_config import RecipeConfig
from avmae_fast.models import AudiovisualMAE, TrainedClassifier
from avmae_fast.train import step as step_module
from avmae_fast.train.optim import ReleasedAdamW, parameter_groups
from avmae_fast.train.readback import Readback
from avmae_fast.train.step import CapturedStep, TrainStep

LR = 0.01


def _model() -> AudiovisualMAE:
    torch.manual_seed(0)
    return AudiovisualMAE(tiny_config())


def _batch(seed: int) -> dict[str, Any]:
    batch = tiny_batch(tiny_config(), batch=2, seed=seed)
    return {**batch, "audio": batch["audio"].float()}


def _step(model: AudiovisualMAE, **options: Any) -> TrainStep:
    return TrainStep(model, ReleasedAdamW(parameter_groups(model)), nullcontext, **options)


def test_values_are_those_of_the_model() -> None:
    model, batch = _model(), _batch(0)
    expected = copy.deepcopy(model)
    out = expected(**batch)
    out.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    step = _step(model)
    values = dict(zip(step.names, step(iter([batch]), LR).tolist(), strict=False))
    assert values["loss"] == out.loss.item() and values["grad_norm"] == norm.item()
    assert values["loss_video"] == out.losses["video"].item()
    assert values["loss_audio"] == out.losses["audio"].item()


def test_micro_batches_are_averaged() -> None:
    whole, split = _model(), _model()
    parts = [_batch(0), _batch(1)]
    values = _step(split, accumulate=2)(iter(parts), LR)
    losses = []
    for part in parts:
        out = whole(**part)
        (out.loss / 2).backward()
        losses.append(out.loss.item())
    optimizer = ReleasedAdamW(parameter_groups(whole), lr=LR)
    optimizer.step()
    torch.testing.assert_close(split.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert values[0].item() == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_clipping_limits_the_norm() -> None:
    model = _model()
    values = _step(model, clip_grad=1e-3)(iter([_batch(0)]), LR)
    assert values[-3] > 1e-3  # what is reported is the norm before
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = _model()
    step = _step(model)
    step(iter([_batch(0)]), LR)
    before = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()["state"]))
    broken = _batch(1)
    broken["audio"][0, 0, 0] = bad
    # Seen by the encoder or by the loss, wherever the patch is.
    assert not step(iter([broken]), LR).isfinite().all()
    after = (model.state_dict(), step.optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    step(iter([_batch(2)]), LR)
    assert not torch.equal(model.head["video"].bias, before[0]["head.video.bias"])


def test_a_step_that_is_not_finite_leaves_no_trace_in_running_statistics() -> None:
    torch.manual_seed(0)
    config = tiny_classifier_config(head="linear_probe")
    model = TrainedClassifier(config, RecipeConfig())
    step = TrainStep(model, ReleasedAdamW(parameter_groups(model)), nullcontext, accumulate=2)

    def batch(seed: int) -> dict[str, Any]:
        found = {name: x.float() for name, x in clips(config, seed=seed).items()}
        labels = {name: x.float() for name, x in labels_of(config, seed=seed).items()}
        return {**found, "labels": labels}

    step(iter([batch(0), batch(1)]), LR)
    before = copy.deepcopy(model.state_dict())
    broken = batch(2)
    broken["audio"][0, 0, 0] = float("nan")
    assert not step(iter([batch(3), broken]), LR).isfinite().all()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert step(iter([batch(4), batch(5)]), LR).isfinite().all()
    for m in config.modalities:
        name = f"feature_norm.{m}.running_mean"
        assert not torch.equal(model.state_dict()[name], before[name])
    assert model.feature_norm["video"].num_batches_tracked == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_step_follows_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """The order of replays and the copies of inputs, with a recorder that calls functions."""
    plain, captured = _model(), _model()
    expected = _step(plain, accumulate=accumulate)
    monkeypatch.setattr(CapturedStep, "EAGER_STEPS", 0)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(step_module, "_record", lambda function, *_: function)
    step = CapturedStep(
        captured, ReleasedAdamW(parameter_groups(captured)), nullcontext, accumulate=accumulate
    )
    for number in range(3):
        batches = [_batch(accumulate * number + i) for i in range(accumulate)]
        values = step(iter(copy.deepcopy(batches)), LR)
        assert torch.equal(values, expected(iter(batches), LR)), number
    torch.testing.assert_close(captured.state_dict(), plain.state_dict(), rtol=0, atol=0)
    short = _batch(0)
    short["video"] = short["video"][:1]
    with pytest.raises(ValueError, match="micro-batches of one shape.*video"):
        step(iter([short]), LR)


def test_readback_on_a_cpu_is_at_once() -> None:
    readback = Readback()
    (read,) = readback.push(7, 28, torch.tensor([1.0, 2.0, 0.5, 0.0]))
    assert (read.step, read.samples, read.values) == (7, 28, [1.0, 2.0])
    assert read.stop_asked and not read.failed
    assert readback.drain() == []
