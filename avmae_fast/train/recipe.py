"""What a configuration comes to on this machine and this data set: steps, device, precision."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from avmae_fast.config import (
    Config,
    ConfigError,
    Modality,
    ModelConfig,
    TargetNorm,
    TrainConfig,
)
from avmae_fast.finetune_config import ClassifierConfig, FinetuneConfig
from avmae_fast.models import AudiovisualMAE, TrainedClassifier
from avmae_fast.models.blocks import set_checkpoint
from avmae_fast.train.distributed import World
from avmae_fast.train.step import Autocast, CapturedStep, TrainStep
from avmae_kernels._ptxas import use_newest_ptxas
from avmae_kernels._triton import HAVE_TRITON
from avmae_kernels.masking import MaskSpec
from avmae_kernels.self_check import Use, self_check


@dataclass(frozen=True)
class Schedule:
    """Length of a run in optimiser steps, and the learning rate it rises to.

    An epoch is `records // batch` steps, as in the authors' code.
    """

    steps: int
    warmup_steps: float
    peak_lr: float

    @classmethod
    def of(cls, train: TrainConfig, records: int) -> "Schedule":
        """The schedule of a run over `records` training clips."""
        per_epoch = max(1, records // train.batch)
        steps = train.steps if train.epochs is None else max(1, int(train.epochs * per_epoch))
        assert steps is not None
        warmup = train.warmup_steps or 0
        if train.warmup_epochs is not None:
            warmup = train.warmup_epochs * per_epoch
        if warmup >= steps:
            raise ConfigError(
                f"train.warmup_steps = {warmup:g} is not valid: it must be less than the "
                f"{steps} steps of the run (an epoch has {per_epoch})"
            )
        return cls(steps, warmup, train.base_lr * train.batch / 256)


def mask_specs(config: Config) -> dict[Modality, MaskSpec]:
    """Which tokens of each modality are masked.

    Raises:
        ConfigError: the kind does not fit the modality, or nothing is masked, left visible or left
            to predict.
    """
    specs: dict[Modality, MaskSpec] = {}
    for m in config.model.modalities:
        field = config.model.input(m)
        try:
            specs[m] = MaskSpec(field.mask, field.grid, field.mask_ratio)
        except ValueError as error:
            raise ConfigError(f"model.{m}.mask and model.{m}.mask_ratio: {error}") from error
        if specs[m].n_masked == 0:
            raise ConfigError(
                f"model.{m}.mask_ratio = {field.mask_ratio} is not valid: it must be high enough "
                f"to mask a token of {specs[m].n_tokens}"
            )
    if config.model.objective == "inpainting_released":
        _require_room(specs["video"], specs["audio"], "audio")
        _require_room(specs["audio"], specs["video"], "video")
    return specs


def _require_room(target: MaskSpec, shown: MaskSpec, other: Modality) -> None:
    """Released inpainting puts the visible tokens of one modality in the place of the other's."""
    if shown.n_visible >= target.n_tokens:
        raise ConfigError(
            f"model.{other}.mask_ratio = {shown.ratio} is not valid with inpainting_released: it "
            f"leaves {shown.n_visible} tokens visible, which must be fewer than the "
            f"{target.n_tokens} tokens they take the place of"
        )


def choose_device(train: TrainConfig, world: World | None = None) -> torch.device:
    """The device of a process: a GPU where there is one, unless `train.device` says otherwise."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda' is not valid: torch sees no CUDA device here")
    if train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = 0 if world is None else world.local_rank
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"{number + 1} processes or more were started on a machine with "
            f"{torch.cuda.device_count()} GPUs: start as many as there are"
        )
    return torch.device("cuda", number)


def choose_autocast(train: TrainConfig, device: torch.device) -> Autocast:
    """The context of every forward pass: bf16 matrix products on a GPU, fp32 on a CPU."""
    bf16 = train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"train.precision = 'bf16' is not valid on {name}: set it to 'fp32'")
    return lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def choose_step(train: TrainConfig, device: torch.device, world: World) -> type[TrainStep]:
    """How a step is launched: kernel by kernel, or as CUDA graphs."""
    if train.cuda_graph and world.size > 1:
        raise ConfigError(
            f"train.cuda_graph = True is not valid with {world.size} processes: it must be false"
        )
    if train.cuda_graph and device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graph = True is not valid on {device.type}: it must be false, or the "
            "run on a GPU"
        )
    return CapturedStep if train.cuda_graph else TrainStep


def require_wandb(train: TrainConfig) -> None:
    """Raise ConfigError if a run is to be logged to a package that is not installed."""
    if train.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb = {train.wandb!r} is not valid without the package wandb: "
            "pip install wandb"
        )


def set_determinism(train: TrainConfig) -> None:
    """Make libraries choose algorithms that give the same bits every time, if asked to."""
    if not train.deterministic:
        return
    # Read when cuBLAS is first used: without it, it may share its workspace between streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory it has not written; filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_kernels(
    model: ModelConfig | ClassifierConfig,
    device: torch.device,
    autocast: Autocast,
    planes: bool = False,
) -> None:
    """Try the kernels this model will run on this GPU; what fails is replaced, with a warning.

    planes: whether its video comes as planes.
    """
    if device.type != "cuda" or not HAVE_TRITON:
        return
    use_newest_ptxas()
    with autocast():
        on = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
    stacks = [model.encoder]
    target_norm: TargetNorm = "none"
    if isinstance(model, ModelConfig):
        stacks, target_norm = [*stacks, model.decoder], model.target_norm
    use = Use(
        dtype,
        widths=sorted({stack.width for stack in stacks}),
        hidden=sorted({stack.mlp for stack in stacks}),
        head_dims=sorted({stack.head_dim for stack in stacks}),
        video_patch=None if model.video is None else model.video.tubelet,
        audio_patch=None if model.audio is None else model.audio.patch,
        gelu=model.gelu,
        target_norm=target_norm,
        planes=planes,
    )
    self_check(device, use)


def build_model(config: Config, device: torch.device) -> AudiovisualMAE:
    """The model as the run's seed initialises it: the same on every device."""
    torch.manual_seed(config.train.seed)
    model = AudiovisualMAE(config.model)
    set_checkpoint(model, config.train.activation_checkpoint)
    return model.to(device)


def build_classifier(config: FinetuneConfig) -> TrainedClassifier:
    """The classifier as the run's seed initialises it, on the CPU."""
    torch.manual_seed(config.train.seed)
    model = TrainedClassifier(config.model, config.finetune)
    set_checkpoint(model, config.train.activation_checkpoint)
    return model
