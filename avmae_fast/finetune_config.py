"""What a classifier is made of: a frozen dataclass, checked on creation.

Defaults are those of the released fine-tuning; `ClassifierConfig.of_size` fills in the rest.
Source: arXiv:2212.05922, section 4 (fine-tuning), and MBT, arXiv:2107.00135, for the bottlenecks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from avmae_fast.config import (
    ENCODER_SIZES,
    MODALITIES,
    AudioConfig,
    ConfigError,
    Modality,
    Positions,
    StackConfig,
    VideoConfig,
    _require,
    _require_choice,
    _require_positive,
)

ClassifierFusion = Literal["bottleneck", "cross", "early", "late"]
Pooling = Literal["mean", "cls", "cls_positioned"]
HeadKind = Literal["linear", "linear_probe", "attentive_probe"]

# Layer of the first bottleneck: B as MBT, L as released for AudioSet, the others in proportion.
_FUSION_LAYER = {"Ti": 8, "S": 8, "B": 8, "L": 18, "H": 24}
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
        base = cls(encoder=ENCODER_SIZES[size], classes=classes, fusion_layer=_FUSION_LAYER[size])
        return replace(base, **fields)  # type: ignore[arg-type]
