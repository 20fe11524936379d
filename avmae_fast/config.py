"""What a model, its data and a training run are made of: frozen dataclasses, checked on creation.

Every value that the paper or the authors' code fixes is the default ("as released"). Each error
names the field, the value it got and what would be valid.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

Fusion = Literal["early", "mid", "separate", "shared"]
Decoding = Literal["joint", "shared", "separate"]
Objective = Literal["reconstruction", "inpainting_released", "inpainting"]
Positions = Literal["sincos1d", "sincos_grid", "learned"]
DecoderPositions = Literal["fixed", "learned"]
TargetNorm = Literal["none", "patch", "patch_channel", "patch_unbiased", "videomae"]
MaskKind = Literal["random", "tube", "block", "time", "frequency", "time_frequency"]
Modality = Literal["video", "audio"]

MODALITIES: tuple[Modality, ...] = ("video", "audio")


class ConfigError(ValueError):
    """A field has a value it cannot have; the text names the field, the value and the choices."""


def _require(ok: bool, name: str, value: object, valid: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r} is not valid: it must be {valid}")


def _require_choice(name: str, value: object, choices: object) -> None:
    valid = get_args(choices)
    _require(value in valid, name, value, "one of " + ", ".join(map(repr, valid)))


def _require_positive(owner: str, **values: int | float) -> None:
    for name, value in values.items():
        ok = not isinstance(value, bool) and math.isfinite(value) and value > 0
        _require(ok, f"{owner}.{name}", value, "positive")


def _require_ratio(name: str, value: float) -> None:
    _require(0.0 <= value < 1.0, name, value, "in [0, 1): 1 would leave nothing to encode")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One transformer stack: `layers` pre-norm blocks of `width` channels (spec: ViT)."""

    width: int
    layers: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        _require_positive(
            "stack", width=self.width, layers=self.layers, heads=self.heads, mlp=self.mlp
        )
        _require(
            self.width % self.heads == 0, "stack.heads", self.heads, f"a divisor of {self.width}"
        )
        _require(self.width % 2 == 0, "stack.width", self.width, "even (sin-cos pairs)")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# ViT sizes; the decoders of B and L are the paper's, those of Ti, S and H follow their neighbours.
ENCODER_SIZES: dict[str, StackConfig] = {
    "Ti": StackConfig(width=192, layers=12, heads=3, mlp=768),
    "S": StackConfig(width=384, layers=12, heads=6, mlp=1536),
    "B": StackConfig(width=768, layers=12, heads=12, mlp=3072),
    "L": StackConfig(width=1024, layers=24, heads=16, mlp=4096),
    "H": StackConfig(width=1280, layers=32, heads=16, mlp=5120),
}
_DECODER_BASE = StackConfig(width=384, layers=4, heads=6, mlp=1536)
_DECODER_LARGE = StackConfig(width=512, layers=4, heads=8, mlp=2048)
DECODER_SIZES: dict[str, StackConfig] = {
    "Ti": _DECODER_BASE,
    "S": _DECODER_BASE,
    "B": _DECODER_BASE,
    "L": _DECODER_LARGE,
    "H": _DECODER_LARGE,
}


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Geometry and masking of the video: `[frames, height, width, 3]` in tubelets of (t, h, w)."""

    frames: int = 16
    height: int = 224
    width: int = 224
    tubelet: tuple[int, int, int] = (2, 16, 16)
    mask: MaskKind = "random"
    mask_ratio: float = 0.9
    loss_weight: float = 0.5

    def __post_init__(self) -> None:
        _require(len(self.tubelet) == 3, "video.tubelet", self.tubelet, "(time, height, width)")
        _require_positive("video", frames=self.frames, height=self.height, width=self.width)
        for name, size, patch in zip(
            ("frames", "height", "width"),
            (self.frames, self.height, self.width),
            self.tubelet,
            strict=True,
        ):
            _require_positive("video.tubelet", **{name: patch})
            _require(size % patch == 0, f"video.{name}", size, f"a multiple of tubelet {patch}")
        _require_choice("video.mask", self.mask, MaskKind)
        _require_ratio("video.mask_ratio", self.mask_ratio)
        _require(self.loss_weight >= 0, "video.loss_weight", self.loss_weight, "at least 0")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (time, height, width); tokens are numbered row-major."""
        t, h, w = self.tubelet
        return self.frames // t, self.height // h, self.width // w

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Values in one tubelet, in the order (time, height, width, channel)."""
        return math.prod(self.tubelet) * 3


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Geometry and masking of the log-mel spectrogram `[frames, mel_bins]`, patches (time, freq).

    Frames and bins that do not fill a patch are dropped, as the authors' VALID convolution does
    (1000 frames make 62 rows of 16). `mean` and `std` standardise the log-mel before the network;
    0 and 1 are what the released pretraining used.
    """

    frames: int = 1000
    mel_bins: int = 128
    patch: tuple[int, int] = (16, 16)
    mask: MaskKind = "random"
    mask_ratio: float = 0.7
    loss_weight: float = 0.5
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _require(len(self.patch) == 2, "audio.patch", self.patch, "(time, frequency)")
        _require_positive("audio", frames=self.frames, mel_bins=self.mel_bins, std=self.std)
        _require_positive("audio.patch", time=self.patch[0], frequency=self.patch[1])
        _require(self.frames >= self.patch[0], "audio.frames", self.frames, "one patch or more")
        _require(
            self.mel_bins >= self.patch[1], "audio.mel_bins", self.mel_bins, "one patch or more"
        )
        _require_choice("audio.mask", self.mask, MaskKind)
        _require_ratio("audio.mask_ratio", self.mask_ratio)
        _require(self.loss_weight >= 0, "audio.loss_weight", self.loss_weight, "at least 0")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along (time, frequency); tokens are numbered row-major."""
        return self.frames // self.patch[0], self.mel_bins // self.patch[1]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Values in one patch, in the order (time, frequency)."""
        return math.prod(self.patch)


class Backbone(Protocol):
    """What all models say about their tokens and blocks, whatever they are trained for."""

    @property
    def video(self) -> VideoConfig | None: ...
    @property
    def audio(self) -> AudioConfig | None: ...
    @property
    def encoder_norm(self) -> bool: ...
    @property
    def gelu(self) -> Literal["tanh", "erf"]: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def modalities(self) -> tuple[Modality, ...]: ...
    def input(self, modality: Modality) -> VideoConfig | AudioConfig: ...


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An audiovisual masked autoencoder; `video=None` or `audio=None` makes it unimodal.

    fusion: how the encoder sees both modalities (paper: early, mid, separate, shared encoders);
        `fusion_layers` is the number of joint layers of mid fusion.
    decoding: joint, shared or separate decoders.
    objective: `reconstruction` of each modality's masked tokens; `inpainting_released` as the
        authors' code does it; `inpainting` with every mask token at its own position.
    positions: `sincos1d` over the flattened index (released), `sincos_grid` over (t, h, w), or
        (h, w) of one time step, and (time, frequency), or `learned` in the encoder with
        `sincos1d` in the decoder.
    decoder_positions: `fixed` as `positions` says, or `learned`.
    prefix_tokens: learned tokens in front of each modality's own, such as one class token. No mask
        hides them and nothing is predicted for them; features come out with them in front.
    middle_norm: whether mid fusion normalises each modality before the joint layers (released).
    target_norm: `patch` and `patch_channel` standardise with the biased variance and 1e-6,
        `patch_unbiased` as MAE and `videomae`, by channel, as VideoMAE with the unbiased one;
        `patch_channel` and `videomae` leave the spectrogram raw.
    """

    encoder: StackConfig
    decoder: StackConfig
    video: VideoConfig | None = field(default_factory=VideoConfig)
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    fusion: Fusion = "mid"
    fusion_layers: int = 2
    decoding: Decoding = "shared"
    objective: Objective = "reconstruction"
    positions: Positions = "sincos1d"
    decoder_positions: DecoderPositions = "fixed"
    modality_tokens: bool = False
    prefix_tokens: int = 0
    encoder_norm: bool = True
    middle_norm: bool = True
    projection_bias: bool = True
    gelu: Literal["tanh", "erf"] = "tanh"
    layer_norm_eps: float = 1e-6
    target_norm: TargetNorm = "none"
    loss_on: Literal["masked", "all"] = "masked"
    loss_mean_over_patch: bool = True

    def __post_init__(self) -> None:
        _require_choice("model.fusion", self.fusion, Fusion)
        _require_choice("model.decoding", self.decoding, Decoding)
        _require_choice("model.objective", self.objective, Objective)
        _require_choice("model.positions", self.positions, Positions)
        _require_choice("model.decoder_positions", self.decoder_positions, DecoderPositions)
        _require_choice("model.target_norm", self.target_norm, TargetNorm)
        _require_choice("model.gelu", self.gelu, Literal["tanh", "erf"])
        _require_choice("model.loss_on", self.loss_on, Literal["masked", "all"])
        _require_positive("model", layer_norm_eps=self.layer_norm_eps)
        _require(bool(self.modalities), "model.video and model.audio", None, "not both absent")
        if self.fusion == "mid":
            valid = f"in 1..{self.encoder.layers - 1} for {self.encoder.layers} layers"
            ok = 1 <= self.fusion_layers < self.encoder.layers
            _require(ok, "model.fusion_layers", self.fusion_layers, valid)
        if self.objective != "reconstruction":
            ok = len(self.modalities) == 2
            _require(ok, "model.objective", self.objective, "reconstruction with one modality")
        _require(self.prefix_tokens >= 0, "model.prefix_tokens", self.prefix_tokens, "at least 0")
        ok = self.prefix_tokens == 0 or self.objective == "reconstruction"
        _require(ok, "model.objective", self.objective, "reconstruction with prefix_tokens")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities present, in the order of every concatenation: video, then audio."""
        return tuple(m for m in MODALITIES if getattr(self, m) is not None)

    def input(self, modality: Modality) -> VideoConfig | AudioConfig:
        """The configuration of a modality that is present."""
        config = self.video if modality == "video" else self.audio
        if config is None:
            raise ConfigError(f"model.{modality} is None: this model has no {modality}")
        return config

    @classmethod
    def of_size(cls, size: str, **fields: object) -> "ModelConfig":
        """The configuration of a named size (Ti, S, B, L, H) with other fields as given."""
        _require(size in ENCODER_SIZES, "model.size", size, f"one of {', '.join(ENCODER_SIZES)}")
        base = cls(encoder=ENCODER_SIZES[size], decoder=DECODER_SIZES[size])
        return replace(base, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and how a training sample is cut out of one.

    A sample is `video.frames` frames, `stride` ticks of a clock of `fps` apart, and
    `audio.frames` spectrogram rows (10 ms each) from the same start. `clip_end` says what happens
    where a window passes the end of a clip: `wrap` to its start (released) or `pad` (the last
    frame stands still, the sound is silent). `pixels` is what travels to the GPU: `rgb`, or
    `yuv420`, the planes that a decoder leaves, in half the bytes and without a conversion on the
    host; RGB is then made where patches are gathered.

    `repeat_windows` stretches of time are drawn from a record each time that it is opened, and
    `repeat_views` crops, flips and masks from each of those: repeated sampling, which saves
    decoding. The number of samples trained on stays the same: `train.epochs` counts samples, so a
    record is opened once in `repeat_windows * repeat_views` epochs.
    A worker that reads one record for longer than `timeout_s` is killed; the file counts as bad.
    """

    manifest: Path
    val_manifest: Path | None = None
    reader: Literal["auto", "pyav", "torchcodec", "decord"] = "auto"
    fps: float = 25.0
    stride: int = 4
    short_side: int = 256
    pixels: Literal["rgb", "yuv420"] = "rgb"
    flip: bool = True
    clip_end: Literal["wrap", "pad"] = "wrap"
    missing_audio: Literal["substitute", "silence"] = "substitute"
    workers: int = 2
    timeout_s: float = 60.0
    repeat_windows: int = 1
    repeat_views: int = 1
    cache: Literal["none", "ram"] = "none"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        _require_choice("data.reader", self.reader, Literal["auto", "pyav", "torchcodec", "decord"])
        _require_choice("data.pixels", self.pixels, Literal["rgb", "yuv420"])
        _require_choice("data.clip_end", self.clip_end, Literal["wrap", "pad"])
        _require_choice("data.cache", self.cache, Literal["none", "ram"])
        choices = Literal["substitute", "silence"]
        _require_choice("data.missing_audio", self.missing_audio, choices)
        _require_positive("data", fps=self.fps, stride=self.stride, short_side=self.short_side)
        _require(self.workers >= 0, "data.workers", self.workers, "at least 0")
        _require_positive(
            "data",
            timeout_s=self.timeout_s,
            repeat_windows=self.repeat_windows,
            repeat_views=self.repeat_views,
        )
        ok = 0.0 <= self.max_bad_fraction <= 1.0
        _require(ok, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe of a run. The peak learning rate is `base_lr * batch / 256`.

    `batch` counts samples per optimiser step; `accumulate` splits it into as many micro-batches.
    `activation_checkpoint` says which activations are not kept but computed again in the backward
    pass (see `avmae_fast.models.memory`). `cuda_graph` launches each step as CUDA graphs: for
    steps so small that the host cannot keep up with the GPU. `deterministic` makes two runs on one
    machine equal to the bit; the engine's own kernels are so anyway, libraries are slower for it.
    `wandb` is a project of Weights & Biases to log to as well.
    Where torchrun starts several processes, each trains on its part of every micro-batch;
    `parallel` says whether all hold the whole model (ddp) or each a part of it (fsdp2).
    `sharded_checkpoints` has each write what it holds; only for models too large to be gathered,
    since such checkpoints must not come from a stranger (see `avmae_fast.train.parts`).
    Exactly one of `steps` and `epochs` is set; `warmup_epochs` or `warmup_steps` likewise.
    """

    out: Path
    batch: int = 512
    accumulate: int = 1
    steps: int | None = None
    epochs: float | None = None
    base_lr: float = 3e-4
    warmup_steps: float | None = None
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float | None = None
    activation_checkpoint: Literal["none", "selective", "full"] = "selective"
    cuda_graph: bool = False
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    sharded_checkpoints: bool = False
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = 20
    val_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        _require_choice("train.device", self.device, Literal["auto", "cpu", "cuda"])
        _require_choice("train.precision", self.precision, Literal["auto", "fp32", "bf16"])
        _require_positive(
            "train",
            batch=self.batch,
            accumulate=self.accumulate,
            base_lr=self.base_lr,
            eps=self.eps,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )
        ok = self.batch % self.accumulate == 0
        _require(ok, "train.accumulate", self.accumulate, f"a divisor of train.batch {self.batch}")
        # Every random number is keyed by it, as an unsigned 64-bit word.
        _require(0 <= self.seed < 2**64, "train.seed", self.seed, "in [0, 2**64)")
        _require(self.val_every >= 0, "train.val_every", self.val_every, "at least 0")
        valid = "at least 2: the last one may be torn while it is written"
        _require(self.keep_checkpoints >= 2, "train.keep_checkpoints", self.keep_checkpoints, valid)
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        _require_one_of("train.steps", self.steps, "train.epochs", self.epochs)
        if self.warmup_steps is not None or self.warmup_epochs is not None:
            names = ("train.warmup_steps", "train.warmup_epochs")
            for name, value in zip(names, (self.warmup_steps, self.warmup_epochs), strict=True):
                _require(value is None or value >= 0, name, value, "at least 0")
            ok = self.warmup_steps is None or self.warmup_epochs is None
            _require(ok, names[0], self.warmup_steps, f"absent where {names[1]} is set")
        ok = all(0 <= beta < 1 for beta in self.betas)
        _require(ok, "train.betas", self.betas, "two numbers in [0, 1)")
        _require_choice("train.parallel", self.parallel, Literal["ddp", "fsdp2"])
        choices = Literal["none", "selective", "full"]
        _require_choice("train.activation_checkpoint", self.activation_checkpoint, choices)
        if self.clip_grad is not None:
            _require_positive("train", clip_grad=self.clip_grad)


def _require_one_of(name_a: str, a: int | float | None, name_b: str, b: int | float | None) -> None:
    if (a is None) == (b is None):
        raise ConfigError(f"exactly one of {name_a} = {a!r} and {name_b} = {b!r} must be set")
    name, value = (name_a, a) if a is not None else (name_b, b)
    _require(value is not None and value > 0, name, value, "positive")


class Run(Protocol):
    """What every run says, whatever it trains: `Config`, and fine-tuning's `FinetuneConfig`."""

    @property
    def model(self) -> Backbone: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole pretraining run, as one TOML file holds it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        audio = self.model.audio
        if audio is not None:
            # Odd frames are lost in the released recipe too; lost mel bins are a typing error.
            ok = audio.mel_bins % audio.patch[1] == 0
            valid = f"a multiple of audio.patch[1] = {audio.patch[1]}"
            _require(ok, "audio.mel_bins", audio.mel_bins, valid)
        repeat = self.data.repeat_windows * self.data.repeat_views
        micro_batch = self.train.batch // self.train.accumulate
        # A record that two micro-batches share would be decoded for each.
        valid = f"a multiple of data.repeat_windows * data.repeat_views = {repeat}"
        _require(micro_batch % repeat == 0, "train.batch // train.accumulate", micro_batch, valid)
        video = self.model.video
        if video is not None and self.data.pixels == "yuv420":
            valid = "even with data.pixels = 'yuv420': two pixels share their chroma"
            for name in ("height", "width"):
                side = getattr(video, name)
                _require(side % 2 == 0, f"video.{name}", side, valid)
