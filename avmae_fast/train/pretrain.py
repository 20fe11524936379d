"""The training loop: read it from `pretrain` down."""

import gc
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from avmae_fast.config import Config, Run, TrainConfig
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import Manifest, ManifestError
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
from avmae_fast.train.flops import clip_flops
from avmae_fast.train.guard import Guard, NonFiniteError
from avmae_fast.train.inputs import InputStage, Stage
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
from avmae_fast.train.task import Model, Task
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
    task: Task
    world: World
    schedule: Schedule
    model: Model
    step: TrainStep
    stage: Stage

    @property
    def config(self) -> Run:
        return self.task.config


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
    world = World.of_environment()
    task = _Pretraining(config, prepare(config.train, world))
    return run_task(task, world, resume=resume, restart=restart, profile=profile)


class _Pretraining(Task):
    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self._config = config
        self._stage = InputStage(config, device)

    @property
    def clip_flops(self) -> int:
        return clip_flops(self._config.model)

    def stage(self, manifest: Manifest) -> Stage:
        return self._stage

    def build(self, resumed: bool) -> AudiovisualMAE:
        planes = self.config.data.pixels == "yuv420"
        check_kernels(self._config.model, self.device, self.autocast, planes)
        return build_model(self._config, self.device)

    def optimizer(self, model: Model) -> ReleasedAdamW:
        train = self.config.train
        return ReleasedAdamW(
            parameter_groups(model),
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            capturable=train.cuda_graph,
        )

    def opened(self) -> None:
        pass

    def validate(self, model: Model, held_out: ClipLoader, metrics: Metrics, step: int) -> None:
        assert isinstance(model, AudiovisualMAE)
        validate(model, held_out, self._stage, self.autocast, metrics, step)

    def finish(self, weights: dict[str, Tensor], step: int) -> Path:
        model = build_model(self._config, self.device)
        model.load_state_dict(weights)
        out = self.config.train.out
        export_encoder(model, self._config, out, {"step": step, "versions": versions()})
        return _report(self._config, model, self._stage, self.autocast)


def prepare(train: TrainConfig, world: World) -> torch.device:
    """See that a run can be made as configured; returns the device of this process."""
    require_wandb(train)
    world.require_batch(train)
    set_determinism(train)
    return choose_device(train, world)


def run_task(
    task: Task,
    world: World,
    *,
    resume: bool = False,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Do a run, whatever it trains for; arguments and errors as those of `pretrain`."""
    # The folder is this run's until the report is written; the processes part before.
    with ExitStack() as folder:
        with process_group(world, task.device):
            step, exit_code = _run_steps(task, world, resume, restart, profile, folder)
            # Sharded weights hold on to the group.
            gc.collect()
        if exit_code is not None or not world.writes:
            return Outcome(step, exit_code, None)
        last = checkpoints_of(task.config) / f"step-{step:08d}"
        weights = load_weights(last, task.config.train.sharded_checkpoints)
        return Outcome(step, None, task.finish(weights, step))


def _run_steps(
    task: Task,
    world: World,
    resume: bool,
    restart: bool,
    profile: tuple[int, int] | None,
    folder: ExitStack,
) -> tuple[int, int | None]:
    """Train; the steps done and, if asked to stop, the exit code. `folder` keeps the run's lock."""
    config, device = task.config, task.device
    train = config.train
    point = on_first(world, lambda: find_resume_point(config, resume, restart))
    samples = point.samples if point else 0
    excluded = on_first(world, lambda: files_to_exclude(train.out, samples))
    part = {"rank": world.rank, "world": world.size}
    with ExitStack() as stack:
        clips = stack.enter_context(
            ClipLoader(task.training_input, "train", samples, excluded=excluded, **part)
        )
        stage = task.stage(clips.manifest)
        schedule = Schedule.of(train, len(clips.manifest))
        held_out = _held_out_clips(config)
        if held_out is not None:
            stack.enter_context(held_out)
        model = task.build(resumed=point is not None)
        size = checkpoint_bytes(model)
        called = distribute(model, world, train.parallel)
        optimizer = task.optimizer(model)
        step_type = choose_step(train, device, world)
        train_step = step_type(
            model, optimizer, task.autocast, train.accumulate, train.clip_grad, called
        )
        opened = open_run(config, point, restart, size)
        on_first(world, lambda: folder.enter_context(opened))
        if world.writes:
            folder.enter_context(outputs(train.out))
            task.opened()
            if world.size > 1:
                print(world.arithmetic(train))
        if point is not None:
            restore_checkpoint(point.path, model, optimizer, train.sharded_checkpoints)
        run = _Run(task, world, schedule, model, train_step, stage)
        step = point.step if point else 0
        if step >= schedule.steps:
            logger.warning("this run is done: only what it leaves behind is written anew")
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


def _held_out_clips(config: Run) -> ClipLoader | None:
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
    device, flops = run.stage.device, run.task.clip_flops
    metrics = Metrics(run.config, schedule.steps, point, device, world, flops)
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
        run.task.validate(run.model, held_out, metrics, step)


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
                train = run.config.train
                keep_failed(train.out, weights, error, run.world.micro_batch(train))
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
