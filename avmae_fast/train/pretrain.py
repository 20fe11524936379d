"""The training loop: read it from `pretrain` down."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.checkpoint import (
    checkpoint_bytes,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from avmae_fast.train.export import export_encoder
from avmae_fast.train.guard import Guard, NonFiniteError
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.memory_advice import memory_advice
from avmae_fast.train.metrics import Metrics, files_to_exclude
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups
from avmae_fast.train.profiler import Profiler
from avmae_fast.train.readback import Read, Readback
from avmae_fast.train.recipe import (
    Autocast,
    Schedule,
    build_model,
    check_kernels,
    choose_autocast,
    choose_device,
    choose_step,
    require_wandb,
    set_determinism,
)
from avmae_fast.train.replay import keep_failed
from avmae_fast.train.report import write_report
from avmae_fast.train.run_folder import (
    EVENTS,
    PROFILE,
    ResumePoint,
    RunFolderError,
    checkpoints_of,
    find_resume_point,
    open_run,
    outputs,
    read_run,
    versions,
)
from avmae_fast.train.snapshot import Snapshot
from avmae_fast.train.step import TrainStep
from avmae_fast.train.stop import StopRequest
from avmae_fast.train.validate import validate

logger = logging.getLogger(__name__)


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
    step: TrainStep
    stage: InputStage
    autocast: Autocast


def pretrain(
    config: Config,
    *,
    resume: bool = False,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Pretrain a masked autoencoder as configured; leave its encoder and a report in `train.out`.

    Args:
        resume: go on from the newest checkpoint in `train.out` that verifies.
        restart: delete the run that is there and start anew.
        profile: first and last step of a trace to write below `train.out/profile`.

    Raises:
        ConfigError, ManifestError, RunFolderError, CheckpointError: before anything is written.
        TooManyBadFiles, NonFiniteError: while training; checkpoints stay as they are.
    """
    train = config.train
    require_wandb(train)
    set_determinism(train)
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
        check_kernels(config.model, device, autocast)
        model = build_model(config, device)
        optimizer = ReleasedAdamW(
            parameter_groups(model),
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            capturable=train.cuda_graph,
        )
        step_type = choose_step(train, device)
        train_step = step_type(model, optimizer, autocast, train.accumulate, train.clip_grad)
        size = checkpoint_bytes(model)
        stack.enter_context(open_run(config, point, restart, size))
        stack.enter_context(outputs(train.out))
        if point is not None:
            load_checkpoint(point.path).restore(model, optimizer)
        run = _Run(config, schedule, model, train_step, stage, autocast)
        step = point.step if point else 0
        if step < schedule.steps:
            profiler = Profiler(train.out / PROFILE, profile)
            with memory_advice(train, model, device), profiler:
                step, exit_code = _train(run, clips, held_out, point, profiler)
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


def report(out: Path) -> Path:
    """Write the report of the newest checkpoint of a run anew; returns its page.

    Raises:
        RunFolderError, CheckpointError: there is no run in `out`, or no checkpoint that verifies.
        ConfigError, ManifestError: its clips are not there any more.
    """
    config = read_run(out)
    config = replace(config, train=replace(config.train, out=out))
    point = find_resume_point(config, resume=True, restart=False)
    if point is None:
        raise RunFolderError(f"{str(out)!r} holds no checkpoint to report on")
    device = choose_device(config.train)
    model = build_model(config, device)
    model.load_state_dict(load_weights(point.path))
    stage, autocast = InputStage(config, device), choose_autocast(config.train, device)
    held_out = _held_out_clips(config)
    with ClipLoader(config, "train") as clips, held_out or nullcontext():
        return write_report(config, model, stage, autocast, clips, held_out)


def _held_out_clips(config: Config) -> ClipLoader | None:
    try:
        return ClipLoader(config, "val")
    except ManifestError:
        # The training clips are known to be good, so all that is wrong is that none are held out.
        if config.train.val_every or config.data.val_manifest is not None:
            raise
        return None


def _train(
    run: _Run,
    clips: ClipLoader,
    held_out: ClipLoader | None,
    point: ResumePoint | None,
    profiler: Profiler,
) -> tuple[int, int | None]:
    """Train to the end or until asked to stop; the steps done and, if asked, the exit code."""
    train, schedule = run.config.train, run.schedule
    step, samples = (point.step, point.samples) if point else (0, 0)
    saved = point.state.get("guard") if point else None
    guard = Guard(train.out / EVENTS, run.step.names, train.batch, saved)
    device = run.stage.device
    with Metrics(run.config, schedule.steps, point, device) as metrics, StopRequest() as stop:
        inputs, readback = run.stage.ahead(metrics.watch(iter(clips))), Readback()
        while step < schedule.steps:
            # Before the step, so that a run resumed here validates here.
            if held_out is not None and train.val_every and step and step % train.val_every == 0:
                validate(run.model, held_out, run.stage, run.autocast, metrics, step)
            profiler.before(step + 1)
            began_s = time.monotonic()
            lr = learning_rate(step, schedule.peak_lr, schedule.steps, schedule.warmup_steps)
            values = run.step(inputs, lr)
            step, samples = step + 1, samples + train.batch
            _note(run, guard, metrics, readback.push(step, samples, values))
            metrics.took(time.monotonic() - began_s)
            # Read once: a signal from here on is the next step's.
            exit_code = stop.exit_code
            last = step == schedule.steps
            logs = step % train.log_every == 0 or step == 1 or last
            saves = step % train.checkpoint_every == 0 or last or exit_code is not None
            if logs or saves or guard.alert:
                _note(run, guard, metrics, readback.drain())
            if logs:
                metrics.write(step, samples, lr)
            if saves:
                _save(run, guard, metrics, step, samples)
            if exit_code is not None:
                return step, exit_code
    return step, None


def _note(run: _Run, guard: Guard, metrics: Metrics, reads: Sequence[Read]) -> None:
    """Look at the steps whose values have arrived, and count them."""
    for read in reads:
        try:
            values = guard.check(read)
        except NonFiniteError as error:
            keep_failed(run.config.train.out, run.model, error)
            raise
        if values is not None:
            metrics.add(values)


def _save(run: _Run, guard: Guard, metrics: Metrics, step: int, samples: int) -> None:
    state = {
        "samples": samples,
        "config": to_dict(run.config),
        "versions": versions(),
        "metrics": metrics.state(),
        "guard": guard.state(),
    }
    train = run.config.train
    folder = checkpoints_of(run.config)
    snapshot = Snapshot.of(run.model, run.step.optimizer)
    save_checkpoint(folder, step, snapshot, state, train.keep_checkpoints)
