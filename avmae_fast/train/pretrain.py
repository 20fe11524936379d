"""The training loop: read it from `pretrain` down."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.checkpoint import load_checkpoint, save_checkpoint
from avmae_fast.train.export import export_encoder
from avmae_fast.train.inputs import Inputs, InputStage
from avmae_fast.train.metrics import Metrics, files_to_exclude
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups
from avmae_fast.train.recipe import (
    Autocast,
    Schedule,
    build_model,
    choose_autocast,
    choose_device,
)
from avmae_fast.train.report import write_report
from avmae_fast.train.run_folder import (
    ResumePoint,
    checkpoints_of,
    find_resume_point,
    open_run,
    versions,
)
from avmae_fast.train.stop import StopRequest
from avmae_fast.train.validate import validate

logger = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; no weight has been touched by it."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    step: optimiser steps done so far.
    exit_code: None where the run is done, else what the program should exit with (`StopRequest`).
    report: the page of the report, once the run is done.
    """

    step: int
    exit_code: int | None
    report: Path | None


@dataclass(frozen=True)
class _Run:
    config: Config
    schedule: Schedule
    model: AudiovisualMAE
    optimizer: ReleasedAdamW
    stage: InputStage
    autocast: Autocast


def pretrain(config: Config, *, resume: bool = False, restart: bool = False) -> Outcome:
    """Pretrain a masked autoencoder as configured; leave its encoder and a report in `train.out`.

    Args:
        resume: go on from the newest checkpoint in `train.out` that verifies.
        restart: delete the run that is there and start anew.

    Raises:
        ConfigError, ManifestError, RunFolderError, CheckpointError: before anything is written.
        TooManyBadFiles, NonFiniteError: while training; checkpoints stay as they are.
    """
    train = config.train
    device = choose_device(train)
    stage, autocast = InputStage(config, device), choose_autocast(train, device)
    point = find_resume_point(config, resume, restart)
    with ExitStack() as stack:
        samples = point.samples if point else 0
        excluded = files_to_exclude(train.out, samples)
        clips = stack.enter_context(ClipLoader(config, "train", samples, excluded=excluded))
        schedule = Schedule.of(train, len(clips.manifest))
        held_out = _held_out_clips(config)
        if held_out is not None:
            stack.enter_context(held_out)
        model = build_model(config, device)
        optimizer = ReleasedAdamW(
            parameter_groups(model),
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
        open_run(config, point, restart)
        if point is not None:
            load_checkpoint(point.path, model, optimizer)
        run = _Run(config, schedule, model, optimizer, stage, autocast)
        step = point.step if point else 0
        if step < schedule.steps:
            step, exit_code = _train(run, clips, held_out, point)
            if exit_code is not None:
                return Outcome(step, exit_code, None)
        else:
            logger.warning("this run is done: only its encoder and report are written anew")
        export_encoder(model, config, train.out, {"step": step, "versions": versions()})
        if point is not None:
            # The report reads the training clips from position 0 on, so that it is always the same.
            clips = stack.enter_context(ClipLoader(config, "train"))
        report = write_report(config, model, stage, autocast, clips, held_out)
        return Outcome(step, None, report)


def _held_out_clips(config: Config) -> ClipLoader | None:
    try:
        return ClipLoader(config, "val")
    except ManifestError:
        # The training clips are known to be good, so all that is wrong is that none are held out.
        if config.train.val_every or config.data.val_manifest is not None:
            raise
        return None


def _train(
    run: _Run, clips: ClipLoader, held_out: ClipLoader | None, point: ResumePoint | None
) -> tuple[int, int | None]:
    """Train to the end or until asked to stop; the steps done and, if asked, the exit code."""
    train, schedule = run.config.train, run.schedule
    step, samples = (point.step, point.samples) if point else (0, 0)
    with Metrics(run.config, schedule.steps, point) as metrics, StopRequest() as stop:
        inputs = run.stage.ahead(metrics.watch(iter(clips)))
        while step < schedule.steps:
            # Before the step, so that a run resumed here validates here.
            if held_out is not None and train.val_every and step and step % train.val_every == 0:
                validate(run.model, held_out, run.stage, run.autocast, metrics, step)
            began_s = time.monotonic()
            lr = learning_rate(step, schedule.peak_lr, schedule.steps, schedule.warmup_steps)
            values = _step(run, inputs, lr, step)
            step, samples = step + 1, samples + train.batch
            metrics.add(values, time.monotonic() - began_s)
            # Read once: a signal from here on is the next step's.
            exit_code = stop.exit_code
            last = step == schedule.steps
            if step % train.log_every == 0 or step == 1 or last:
                metrics.write(step, samples, lr)
            if step % train.checkpoint_every == 0 or last or exit_code is not None:
                _save(run, metrics, step, samples)
            if exit_code is not None:
                return step, exit_code
    return step, None


def _step(run: _Run, inputs: Iterator[Inputs], lr: float, step: int) -> dict[str, float]:
    """One optimiser step over `accumulate` micro-batches; its losses and gradient norm."""
    train = run.config.train
    micro_losses = []
    run.optimizer.zero_grad()
    for _ in range(train.accumulate):
        batch = next(inputs)
        with run.autocast():
            out = run.model(**batch)
        (out.loss / train.accumulate).backward()
        micro_losses.append(torch.stack([out.loss, *out.losses.values()]).detach())
    limit = math.inf if train.clip_grad is None else train.clip_grad
    norm = clip_grad_norm_(run.model.parameters(), limit)
    names = ["loss", *(f"loss_{m}" for m in out.losses), "grad_norm"]
    losses = torch.stack(micro_losses).double().mean(0).tolist()
    values = dict(zip(names, [*losses, float(norm)], strict=True))
    _require_finite(values, step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    return values


def _require_finite(values: dict[str, float], step: int) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        shown = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"{' and '.join(broken)} not finite at step {step + 1} ({shown}); the run stops, its "
            "checkpoints are good. Resume with a lower train.base_lr or train.clip_grad = 1, or "
            "with train.precision = 'fp32'"
        )


def _save(run: _Run, metrics: Metrics, step: int, samples: int) -> None:
    state = {
        "samples": samples,
        "config": to_dict(run.config),
        "versions": versions(),
        "metrics": metrics.state(),
    }
    train = run.config.train
    folder = checkpoints_of(run.config)
    save_checkpoint(folder, step, run.model, run.optimizer, state, train.keep_checkpoints)
