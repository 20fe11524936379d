"""The training loop: read it from `pretrain` down."""

import gc
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.checkpoint import (
    begin_checkpoint,
    checkpoint_bytes,
    finish_checkpoint,
    load_weights,
    restore_checkpoint,
    save_checkpoint,
)
from avmae_fast.train.distributed import World, distribute, on_first, process_group
from avmae_fast.train.export import export_encoder
from avmae_fast.train.guard import Guard, NonFiniteError
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.memory_advice import memory_advice
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups
from avmae_fast.train.parts import save_parts
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
    files_to_exclude,
    find_resume_point,
    open_run,
    outputs,
    read_run,
    versions,
)
from avmae_fast.train.snapshot import Snapshot, whole_weights
from avmae_fast.train.step import TrainStep
from avmae_fast.train.stop import STOPPED, StopRequest
from avmae_fast.train.validate import validate

logger = logging.getLogger(__name__)


class PeerFailed(RuntimeError):
    """Another process of this run had no batch to train on; what it prints says why."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    step: optimiser steps done so far.
    exit_code: None where the run is done, else what the program should exit with (`StopRequest`).
    report: the page of the report, once the run is done, on the process that writes it.
    """

    step: int
    exit_code: int | None
    report: Path | None


@dataclass(frozen=True)
class _Run:
    config: Config
    world: World
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

    Started by torchrun, each of its processes calls this, and together they do what one would.

    Args:
        resume: go on from the newest checkpoint in `train.out` that verifies.
        restart: delete the run that is there and start anew.
        profile: first and last step of a trace to write below `train.out/profile`.

    Raises:
        ConfigError, ManifestError, RunFolderError, CheckpointError: before anything is written.
        TooManyBadFiles, NonFiniteError, OutputError: while training; checkpoints stay as they are.
    """
    train, world = config.train, World.of_environment()
    require_wandb(train)
    world.require_batch(train)
    set_determinism(train)
    device = choose_device(train, world)
    stage, autocast = InputStage(config, device), choose_autocast(train, device)
    # The folder is this run's until the report is written; the processes part before.
    with ExitStack() as folder:
        with process_group(world, device):
            step, exit_code = _run_steps(
                config, world, stage, autocast, resume, restart, profile, folder
            )
            # Sharded weights hold on to the group.
            gc.collect()
        if exit_code is not None or not world.writes:
            return Outcome(step, exit_code, None)
        model = build_model(config, device)
        last = checkpoints_of(config) / f"step-{step:08d}"
        model.load_state_dict(load_weights(last, train.sharded_checkpoints))
        export_encoder(model, config, train.out, {"step": step, "versions": versions()})
        return Outcome(step, None, _report(config, model, stage, autocast))


def _run_steps(
    config: Config,
    world: World,
    stage: InputStage,
    autocast: Autocast,
    resume: bool,
    restart: bool,
    profile: tuple[int, int] | None,
    folder: ExitStack,
) -> tuple[int, int | None]:
    """Train; the steps done and, if asked to stop, the exit code. `folder` keeps the run's lock."""
    train, device = config.train, stage.device
    point = on_first(world, lambda: find_resume_point(config, resume, restart))
    samples = point.samples if point else 0
    excluded = on_first(world, lambda: files_to_exclude(train.out, samples))
    part = {"rank": world.rank, "world": world.size}
    with ExitStack() as stack:
        clips = stack.enter_context(ClipLoader(config, "train", samples, excluded=excluded, **part))
        schedule = Schedule.of(train, len(clips.manifest))
        held_out = _held_out_clips(config)
        if held_out is not None:
            stack.enter_context(held_out)
        check_kernels(config.model, device, autocast, config.data.pixels == "yuv420")
        model = build_model(config, device)
        size = checkpoint_bytes(model)
        called = distribute(model, world, train.parallel)
        optimizer = ReleasedAdamW(
            parameter_groups(model),
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            capturable=train.cuda_graph,
        )
        step_type = choose_step(train, device, world)
        train_step = step_type(
            model, optimizer, autocast, train.accumulate, train.clip_grad, called
        )
        opened = open_run(config, point, restart, size)
        on_first(world, lambda: folder.enter_context(opened))
        if world.writes:
            folder.enter_context(outputs(train.out))
            if world.size > 1:
                print(world.arithmetic(train))
        if point is not None:
            restore_checkpoint(point.path, model, optimizer, train.sharded_checkpoints)
        run = _Run(config, world, schedule, model, train_step, stage, autocast)
        step = point.step if point else 0
        if step >= schedule.steps:
            logger.warning("this run is done: only its encoder and report are written anew")
            return step, None
        profiler = Profiler(train.out / PROFILE, profile if world.writes else None)
        with memory_advice(train, model, device), profiler:
            return _train(run, clips, held_out, point, profiler)


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
    model.load_state_dict(load_weights(point.path, config.train.sharded_checkpoints))
    stage, autocast = InputStage(config, device), choose_autocast(config.train, device)
    return _report(config, model, stage, autocast)


def _report(config: Config, model: AudiovisualMAE, stage: InputStage, autocast: Autocast) -> Path:
    """Read clips from position 0 on, so that the report of a model is always the same."""
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
    train, schedule, world = run.config.train, run.schedule, run.world
    step, samples = (point.step, point.samples) if point else (0, 0)
    saved = point.state.get("guard") if point else None
    log = train.out / EVENTS if world.writes else None
    guard = Guard(log, run.step.names, train.batch, saved)
    metrics = Metrics(run.config, schedule.steps, point, run.stage.device, world)
    with metrics, StopRequest() as stop:
        inputs, readback = run.stage.ahead(metrics.watch(iter(clips))), Readback()
        while step < schedule.steps:
            # Before the step, so that a run resumed here validates here.
            if held_out is not None and train.val_every and step and step % train.val_every == 0:
                _validate(run, held_out, metrics, step)
            profiler.before(step + 1)
            began_s = time.monotonic()
            lr = learning_rate(step, schedule.peak_lr, schedule.steps, schedule.warmup_steps)
            values = run.step(inputs, lr, stop.exit_code is not None)
            step, samples = step + 1, samples + train.batch
            stops = _note(run, guard, metrics, readback.push(step, samples, values))
            metrics.took(time.monotonic() - began_s)
            if world.size == 1:
                # Read once: a signal from here on is the next step's.
                stops = stop.exit_code is not None
            last = step == schedule.steps
            logs = step % train.log_every == 0 or step == 1 or last
            saves = step % train.checkpoint_every == 0 or last or stops
            if logs or saves or guard.alert:
                _note(run, guard, metrics, readback.drain())
            if logs:
                metrics.write(step, samples, lr)
            if saves:
                _save(run, guard, metrics, step, samples)
            if stops:
                return step, STOPPED
    return step, None


def _validate(run: _Run, held_out: ClipLoader, metrics: Metrics, step: int) -> None:
    """On every process where the model is in parts, else on the one that writes."""
    if run.world.writes or run.config.train.parallel == "fsdp2":
        validate(run.model, held_out, run.stage, run.autocast, metrics, step)


def _note(run: _Run, guard: Guard, metrics: Metrics, reads: Iterable[Read]) -> bool:
    """Look at the steps whose values have arrived, and count them.

    Returns:
        Whether a process had been asked to stop when it made one of them.
    """
    stops = False
    for read in reads:
        if read.failed:
            raise PeerFailed(f"another process had no batch for step {read.step}")
        try:
            values = guard.check(read)
        except NonFiniteError as error:
            weights = whole_weights(run.model, run.world.writes)
            if run.world.writes:
                keep_failed(run.config.train.out, weights, error)
            raise
        if values is not None:
            metrics.add(values)
        stops = stops or read.stop_asked
    return stops


def _save(run: _Run, guard: Guard, metrics: Metrics, step: int, samples: int) -> None:
    state = {
        "samples": samples,
        "config": to_dict(run.config),
        "versions": versions(),
        "metrics": metrics.state(),
        "guard": guard.state(),
    }
    world, train = run.world, run.config.train
    folder, keep = checkpoints_of(run.config), train.keep_checkpoints
    if train.sharded_checkpoints:
        partial = on_first(world, lambda: begin_checkpoint(folder, step))
        scalars = save_parts(partial, run.model, run.step.optimizer)
        on_first(world, lambda: finish_checkpoint(partial, step, scalars, state, keep))
        return
    snapshot = Snapshot.of(run.model, run.step.optimizer, world.writes)
    on_first(world, lambda: save_checkpoint(folder, step, snapshot, state, keep))
