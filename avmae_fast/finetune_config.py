"""What a classifier is made of: a frozen dataclass, checked on creation.

Defaults are those of the released fine-tuning; `ClassifierConfig.of_size` fills in the rest.
Source: arXiv:2212.05922, section 4 (fine-tuning), and MBT, arXiv:2107.00135, for the bottlenecks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from avmae_fast.config import (
    ENCODER_SIZES,
    MODALITIES,
    AudioConfig,
    ConfigError,
    DataConfig,
    Modality,
    Positions,
    StackConfig,
    TrainConfig,
    VideoConfig,
    _require,
    _require_choice,
    _require_positive,
)

ClassifierFusion = Literal["bottleneck", "cross", "early", "late"]
Pooling = Literal["mean", "cls", "cls_positioned"]
HeadKind = Literal["linear", "linear_probe", "attentive_probe"]
Loss = Literal["softmax", "sigmoid"]

# Layer of the first bottleneck: B as MBT, L as released for AudioSet, the others in proportion.
FUSION_LAYER = {"Ti": 8, "S": 8, "B": 8, "L": 18, "H": 24}
_ONLY_HEAD = "label"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A classifier of clips; `video=None` or `audio=None` makes it a plain ViT of the other.

    classes: how many, or how many of each head: `{"verb": 97, "noun": 300}`. Heads share one
        product; its outputs stand side by side in the order given.
    fusion: `bottleneck` has blocks for each modality which, from `fusion_layer` on, also attend to
        `bottleneck_tokens` tokens that both share; `cross` lets them attend to the other
        modality's tokens instead; `early` makes one sequence of both from `fusion_layer` on;
        in `late` the modalities meet in the head alone. One modality has nothing to fuse.
    share_blocks: one set of blocks for both modalities; early fusion always has one.
    fuse_at_test: whether evaluation uses the bottlenecks; otherwise it runs as late fusion.
    pool: `mean` over a modality's tokens; `cls` reads a learned token in front of them, which has
        no position or, in `cls_positioned`, the first one (tokens then count from 1).
    norm: the closing LayerNorm sees every token, or the pooled feature.
    separate_norms: each modality closes with a LayerNorm of its own; as released they share one.
    middle_norm_at: a LayerNorm of each modality in front of this layer, where mid-fusion
        pretraining had one; released fine-tuning has none.
    representation: width of a layer with tanh between feature and head, None for none.
    head: `linear` trains everything; the probes train on a frozen encoder: `linear_probe` with a
        BatchNorm without weights (He et al. 2021), `attentive_probe` with a query per modality
        that attends to all tokens in place of the pooling.
    merge: what is averaged over the modalities, `logits` (released: each modality has its own
        loss) or `features`.
    drop_path: rate of stochastic depth in the last layer, rising linearly from 0 in the first.
    drop_path_scaled: divide what is kept by its probability; the released code does not.
    """

    encoder: StackConfig
    classes: int | Mapping[str, int]
    video: VideoConfig | None = field(default_factory=lambda: VideoConfig(frames=32))
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    fusion: ClassifierFusion = "bottleneck"
    fusion_layer: int = 0
    bottleneck_tokens: int = 4
    share_blocks: bool = False
    fuse_at_test: bool = True
    pool: Pooling = "mean"
    norm: Literal["tokens", "pooled"] = "tokens"
    separate_norms: bool = False
    middle_norm_at: int | None = None
    representation: int | None = None
    head: HeadKind = "linear"
    merge: Literal["logits", "features"] = "logits"
    drop_path: float = 0.0
    drop_path_scaled: bool = False
    positions: Positions = "sincos1d"
    modality_tokens: bool = False
    gelu: Literal["tanh", "erf"] = "tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, choices in (
            ("fusion", ClassifierFusion),
            ("pool", Pooling),
            ("norm", Literal["tokens", "pooled"]),
            ("head", HeadKind),
            ("merge", Literal["logits", "features"]),
            ("positions", Positions),
            ("gelu", Literal["tanh", "erf"]),
        ):
            _require_choice(f"classifier.{name}", getattr(self, name), choices)
        _require(bool(self.modalities), "classifier.video and classifier.audio", None, "not absent")
        _require(bool(self.heads), "classifier.classes", self.classes, "a number or one for a head")
        for head, count in self.heads.items():
            ok = isinstance(count, int) and not isinstance(count, bool) and count > 0
            _require(ok, f"classifier.classes[{head!r}]", count, "a positive number")
        _require_positive(
            "classifier",
            bottleneck_tokens=self.bottleneck_tokens,
            layer_norm_eps=self.layer_norm_eps,
        )
        if self.representation is not None:
            _require_positive("classifier", representation=self.representation)
        self._check_layers()
        self._check_combinations()

    def _check_layers(self) -> None:
        last = self.encoder.layers - 1
        ok = 0 <= self.fusion_layer <= last
        valid = f"in 0..{last} for {self.encoder.layers} layers"
        _require(ok, "classifier.fusion_layer", self.fusion_layer, valid)
        at = self.middle_norm_at
        valid = f"None or in 1..{last} for {self.encoder.layers} layers"
        _require(at is None or 1 <= at <= last, "classifier.middle_norm_at", at, valid)
        ok = at is None or self.fusion not in ("bottleneck", "early") or at <= self.fusion_layer
        valid = f"at most fusion_layer {self.fusion_layer}, where the modalities first meet"
        _require(ok, "classifier.middle_norm_at", at, valid)

    def _check_combinations(self) -> None:
        ok = 0.0 <= self.drop_path < 1.0
        _require(ok, "classifier.drop_path", self.drop_path, "in [0, 1)")
        frozen = self.head != "linear"
        valid = f"0 with {self.head}: its encoder does not train"
        _require(not (frozen and self.drop_path), "classifier.drop_path", self.drop_path, valid)
        ok = not (self.separate_norms and self.fusion == "early" and self.has_shared_blocks)
        valid = "False with early fusion: its tokens end in one sequence"
        _require(ok, "classifier.separate_norms", self.separate_norms, valid)
        ok = self.head != "attentive_probe" or (self.pool == "mean" and self.norm == "tokens")
        valid = "linear or linear_probe unless pool is 'mean' and norm is 'tokens'"
        _require(ok, "classifier.head", self.head, valid)
        ok = self.pool != "cls_positioned" or self.positions == "sincos1d"
        valid = "'mean' or 'cls' unless positions are 'sincos1d'"
        _require(ok, "classifier.pool", self.pool, valid)

    @property
    def heads(self) -> dict[str, int]:
        """Classes of each head by its name; a lone number of classes belongs to head "label"."""
        if isinstance(self.classes, Mapping):
            return dict(self.classes)
        return {_ONLY_HEAD: self.classes}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities present, in the order of every concatenation: video, then audio."""
        return tuple(m for m in MODALITIES if getattr(self, m) is not None)

    @property
    def has_shared_blocks(self) -> bool:
        """Whether both modalities run through one set of blocks."""
        return len(self.modalities) > 1 and (self.share_blocks or self.fusion == "early")

    @property
    def has_bottleneck(self) -> bool:
        return len(self.modalities) > 1 and self.fusion == "bottleneck"

    @property
    def encoder_norm(self) -> bool:
        """No stack closes with a LayerNorm here: the classifier has its own."""
        return False

    def input(self, modality: Modality) -> VideoConfig | AudioConfig:
        """The configuration of a modality that is present."""
        config = self.video if modality == "video" else self.audio
        if config is None:
            raise ConfigError(f"classifier.{modality} is None: this model has no {modality}")
        return config

    def stack_of(self, modality: Modality) -> str:
        """Name of the stack of blocks that a modality runs through."""
        return "both" if self.has_shared_blocks else modality

    def norm_of(self, modality: Modality) -> str:
        """Name of the closing LayerNorm of a modality."""
        return modality if self.separate_norms else "both"

    def drop_rates(self) -> tuple[float, ...]:
        """Stochastic depth's rate of each layer: `drop_path * l / (layers - 1)`."""
        last = max(1, self.encoder.layers - 1)
        return tuple(self.drop_path * layer / last for layer in range(self.encoder.layers))

    @classmethod
    def of_size(
        cls, size: str, classes: int | Mapping[str, int], **fields: object
    ) -> "ClassifierConfig":
        """The configuration of a named size (Ti, S, B, L, H) with other fields as given."""
        valid = f"one of {', '.join(ENCODER_SIZES)}"
        _require(size in ENCODER_SIZES, "classifier.size", size, valid)
        base = cls(encoder=ENCODER_SIZES[size], classes=classes, fusion_layer=FUSION_LAYER[size])
        return replace(base, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What fine-tuning starts from, and what it does to clips and weights besides `TrainConfig`.

    init: the folder of a pretraining run, of an encoder or of a checkpoint, or a weights file
        beside which its configuration lies; None starts from scratch.
    norms, fresh, leave, interpolate_positions: see `avmae_fast.interop.transfer.transfer`.
    loss: `softmax` where a clip has one class of each head, `sigmoid` where it has any number.
    optimizer: `sgd` with `momentum` as released; or `adamw`, to which `train.betas`, `train.eps`
        and `train.weight_decay` belong. Both give each layer `layer_decay` of the next one's rate.
    mixup: alpha of the Beta distribution of each modality's share in each micro-batch of a process;
        0 mixes nothing.
    frequency_masks, time_masks: how many stretches of a spectrogram are set to 0, its mean, each
        shorter than `frequency_mask_bins` or `time_mask_frames`. The released time masks have no
        effect, so presets have none.
    time_shift: turn the spectrogram round by a random number of its frames.
    scale_jitter: range of the factors by which height and width are stretched, each its own.
    colour, greyscale: probability that a clip's colours are changed, or taken away.
    temporal_views, spatial_views: cuts of a clip whose logits evaluation averages.
    """

    init: Path | None = None
    norms: Literal["released", "keep"] = "released"
    fresh: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    interpolate_positions: bool = False
    loss: Loss = "softmax"
    label_smoothing: float = 0.3
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    layer_decay: float = 0.75
    mixup: float = 0.0
    frequency_masks: int = 0
    frequency_mask_bins: int = 0
    time_masks: int = 0
    time_mask_frames: int = 0
    time_shift: bool = False
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    colour: float = 0.0
    greyscale: float = 0.0
    temporal_views: int = 4
    spatial_views: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("norms", Literal["released", "keep"]),
            ("loss", Loss),
            ("optimizer", Literal["sgd", "adamw"]),
        ):
            _require_choice(f"finetune.{name}", getattr(self, name), choices)
        for name in ("label_smoothing", "momentum"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"finetune.{name}", value, "in [0, 1)")
        _require(0 < self.layer_decay <= 1, "finetune.layer_decay", self.layer_decay, "in (0, 1]")
        for name in ("colour", "greyscale"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"finetune.{name}", value, "a probability, in [0, 1]")
        names = ("frequency_masks", "frequency_mask_bins", "time_masks", "time_mask_frames")
        for name in ("mixup", *names):
            value = getattr(self, name)
            ok = math.isfinite(value) and value >= 0
            _require(ok, f"finetune.{name}", value, "at least 0")
        low, high = self.scale_jitter
        ok = 0.1 <= low <= high <= 10.0
        _require(ok, "finetune.scale_jitter", self.scale_jitter, "two rising factors in [0.1, 10]")
        _require_positive("finetune", temporal_views=self.temporal_views)
        ok = self.spatial_views in (1, 3)
        _require(ok, "finetune.spatial_views", self.spatial_views, "1 or 3")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A whole fine-tuning run, as one TOML file holds it."""

    model: ClassifierConfig
    data: DataConfig
    train: TrainConfig
    finetune: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        valid = "false: a step's shapes depend on which clips stochastic depth leaves out"
        _require(not self.train.cuda_graph, "train.cuda_graph", self.train.cuda_graph, valid)
        if self.finetune.optimizer == "sgd":
            valid = "'ddp' with finetune.optimizer = 'sgd', which does not update sharded weights"
            _require(self.train.parallel == "ddp", "train.parallel", self.train.parallel, valid)
        valid = "'rgb' in fine-tuning, which stretches, recolours and mixes pictures"
        _require(self.data.pixels == "rgb", "data.pixels", self.data.pixels, valid)
        repeated = self.data.repeat_windows * self.data.repeat_views
        valid = "1 in fine-tuning: mixup would mix a clip with itself"
        _require(repeated == 1, "data.repeat_windows * data.repeat_views", repeated, valid)

    @property
    def training_input(self) -> "FinetuneConfig":
        """This run with the picture that training clips are cut to on the host.

        Scale jitter needs more of it than the network gets: a region `1 / factor` of its size.
        """
        video, low = self.model.video, self.finetune.scale_jitter[0]
        if video is None or low >= 1.0:
            return self
        sides = (video.height, video.width)
        patches = video.tubelet[1:]
        tall, wide = (p * math.ceil(s / low / p) for s, p in zip(sides, patches, strict=True))
        largest = max(tall, wide)
        valid = f"at least {largest}, or finetune.scale_jitter[0] = {low} be larger: a crop is"
        ok = self.data.short_side >= largest
        _require(ok, "data.short_side", self.data.short_side, f"{valid} resized after it is cut")
        loaded = replace(video, height=tall, width=wide)
        return replace(self, model=replace(self.model, video=loaded))
