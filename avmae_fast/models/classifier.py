"""The classifier of clips that fine-tuning trains.

Shape letters: B clips, N tokens of a modality, K bottleneck tokens, D width, C classes.
Source: arXiv:2212.05922, section 4: stacks for each modality that exchange bottleneck tokens (MBT,
arXiv:2107.00135), a mean over the tokens, one head for all modalities, logits averaged at test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from avmae_fast.config import Modality
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models.blocks import Stack, seam
from avmae_fast.models.drop_path import DropPath, LayerDrop
from avmae_fast.models.encoder import check_inputs, layout_of, patch_of
from avmae_fast.models.init import (
    LEARNED_POS_STD,
    learned_positions,
    lecun_normal_linear,
    xavier_linear,
    zero_linear,
)
from avmae_fast.models.query_pool import QueryPool
from avmae_fast.models.streams import (
    Stream,
    advance,
    advance_looking,
    share_bottleneck,
    with_bottleneck,
)
from avmae_fast.positions import sincos1d, sincos_grid
from avmae_kernels.norm import add_layer_norm
from avmae_kernels.patch_embed import patch_embed_visible

_PROBE_EPS = 1e-6


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about a batch of clips.

    logits: [B, C], the average over the modalities: what evaluation uses.
    by_modality: [B, C] of each modality, each of which has its own loss as released; of "both"
        where features are merged.
    features: [B, D] of each modality, as they enter the head.
    """

    logits: Tensor
    by_modality: dict[str, Tensor]
    features: dict[Modality, Tensor]


class Classifier(nn.Module):
    """Video and audio in, logits out; with one modality a plain ViT.

    With a probe as its head the encoder does not train: its parameters require no gradient.

    Args:
        config: geometry, size, fusion and head.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        both, width, eps = config.modalities, config.encoder.width, config.layer_norm_eps
        self.patch_embed = nn.ModuleDict(
            {m: lecun_normal_linear(config.input(m).patch_dim, width) for m in both}
        )
        stacks = dict.fromkeys(config.stack_of(m) for m in both)
        self.encoder = nn.ModuleDict({name: Stack(config.encoder, config) for name in stacks})
        norms = dict.fromkeys(config.norm_of(m) for m in both)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width, eps) for name in norms})
        if config.middle_norm_at is not None:
            self.middle_norm = nn.ModuleDict({m: nn.LayerNorm(width, eps) for m in both})
        if config.has_bottleneck:
            shape = (config.bottleneck_tokens, width)
            self.bottleneck = nn.Parameter(torch.empty(shape).normal_(std=LEARNED_POS_STD))
        self._make_tokens()
        self._make_head()

    def _make_tokens(self) -> None:
        """What is added to the tokens, or put in front of them."""
        config, width = self.config, self.config.encoder.width

        def vectors() -> nn.ParameterDict:
            return nn.ParameterDict(
                {m: nn.Parameter(torch.zeros(width)) for m in config.modalities}
            )

        if config.modality_tokens:
            self.modality_token = vectors()
        if config.pool != "mean":
            self.cls = vectors()
        if config.positions == "learned":
            self.pos_embed = nn.ParameterDict(
                {m: learned_positions(config.input(m).tokens, width) for m in config.modalities}
            )
            return
        for m in config.modalities:
            spec = config.input(m)
            # The class token takes the first position of a table that has one more.
            count = spec.tokens + (config.pool == "cls_positioned")
            on_grid = config.positions == "sincos_grid"
            table = sincos_grid(spec.grid, width) if on_grid else sincos1d(count, width)
            self.register_buffer(f"pos_{m}", torch.tensor(table), persistent=False)

    def _make_head(self) -> None:
        config, width = self.config, self.config.encoder.width
        if config.head != "linear":
            self.requires_grad_(False)
        if config.head == "attentive_probe":
            heads = config.encoder.heads
            self.pool = nn.ModuleDict({m: QueryPool(width, heads) for m in config.modalities})
        if config.head == "linear_probe":
            self.feature_norm = nn.ModuleDict(
                {m: nn.BatchNorm1d(width, eps=_PROBE_EPS, affine=False) for m in config.modalities}
            )
        if config.representation is not None:
            self.pre_logits = xavier_linear(width, config.representation)
        self.head = zero_linear(config.representation or width, sum(config.heads.values()))

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        drop: DropPath | None = None,
        partial: bool = False,
    ) -> Prediction:
        """Logits of every clip.

        Args:
            video: [B, T, H, W, 3], uint8, or floating in [-1, 1].
            audio: standardised log-mel, [B, frames, mel_bins], floating.
            drop: stochastic depth of this step, which training asks for where `drop_path` is
                above 0 and evaluation does not know; see `drop_path.draw_dropped`.
            partial: whether a modality the model was configured with may be absent; the other
                then has the bottleneck to itself.

        Raises:
            ValueError: an input is missing, superfluous or not of the configured shape; or `drop`
                is missing or superfluous.
        """
        inputs = self._checked({"video": video, "audio": audio}, partial)
        self._check_drop(drop)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.head == "linear"):
            tokens = self.tokens(inputs, drop)
        return self.classify(tokens)

    def tokens(
        self, inputs: Mapping[Modality, Tensor], drop: DropPath | None = None
    ) -> dict[Modality, Tensor]:
        """The tokens that are pooled, [B, N, D] of each input (of checked shapes).

        Normalised where the closing LayerNorm sees tokens; a class token comes first.
        """
        streams = {m: Stream.of(self._embed(m, x)) for m, x in inputs.items()}
        lengths = {m: stream.length for m, stream in streams.items()}
        encoded = self._encode(streams, drop)
        if "both" in encoded:
            joint = self._closed("both", encoded["both"])
            parts = joint.split([lengths[m] for m in inputs], dim=1)
            return dict(zip(inputs, parts, strict=True))
        # The bottleneck has served its purpose: its rows are at the end of each sequence.
        return {m: self._closed(m, encoded[m])[:, : lengths[m]] for m in inputs}

    def classify(self, tokens: Mapping[Modality, Tensor]) -> Prediction:
        """Pool the tokens [B, N, D] of each modality and apply the head."""
        features = {m: self._pool(m, x) for m, x in tokens.items()}
        if self.config.merge == "features":
            merged = torch.stack(list(features.values())).mean(0)
            by_modality: dict[str, Tensor] = {"both": self._logits(merged)}
        else:
            by_modality = {m: self._logits(x) for m, x in features.items()}
        logits = torch.stack(list(by_modality.values())).mean(0)
        return Prediction(logits, by_modality, features)

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        """The logits [B, classes] of each head, from all of them side by side."""
        heads = self.config.heads
        return dict(zip(heads, logits.split(list(heads.values()), dim=-1), strict=True))

    def _checked(
        self, given: dict[Modality, Tensor | None], partial: bool
    ) -> dict[Modality, Tensor]:
        """The inputs once they are known to fit; with `partial` at least one of them."""
        config, absent = self.config, [m for m, x in given.items() if x is None]
        if partial and len(absent) < len(config.modalities):
            # The check is that of a model which never had what is absent.
            here = {m: None if given[m] is None else config.input(m) for m in config.modalities}
            config = replace(config, **here)  # type: ignore[arg-type]
        return check_inputs(config, **given)

    def _check_drop(self, drop: DropPath | None) -> None:
        wants = self.training and self.config.drop_path > 0
        if (drop is not None) != wants:
            state = "without" if drop is None else "with"
            mode = "training" if self.training else "evaluation"
            rate = self.config.drop_path
            raise ValueError(f"drop: {mode} at drop_path = {rate} was called {state} a DropPath")

    def _embed(self, m: Modality, source: Tensor) -> Tensor:
        """All tokens of a modality with their positions, [B, N, D]."""
        config = self.config
        batch, count = source.shape[0], config.input(m).tokens
        table: Tensor = (
            self.pos_embed[m] if config.positions == "learned" else self.get_buffer(f"pos_{m}")
        )
        first, pos = (table[:1], table[1:]) if config.pool == "cls_positioned" else (None, table)
        if config.modality_tokens:
            pos = pos + self.modality_token[m]
        visible = torch.arange(count, device=source.device).expand(batch, count)
        linear = cast(nn.Linear, self.patch_embed[m])
        tokens = patch_embed_visible(
            source,
            visible,
            linear.weight,
            linear.bias,
            pos.contiguous(),
            patch_of(config, m),
            layout=layout_of(source),
        )
        if config.pool == "mean":
            return tokens
        cls = self.cls[m] if first is None else self.cls[m] + first[0]
        return torch.cat([cls.to(tokens.dtype).expand(batch, 1, -1), tokens], dim=1)

    def _encode(
        self, streams: dict[Modality, Stream], drop: DropPath | None
    ) -> Mapping[str, Stream]:
        """All layers; fused into one stream "both" by early fusion."""
        config = self.config
        joined = len(config.modalities) > 1 and config.fusion != "late"
        fuses = joined and (self.training or config.fuse_at_test)
        now: dict[str, Stream] = {str(m): stream for m, stream in streams.items()}
        for layer in range(config.encoder.layers):
            if layer == config.middle_norm_at:
                now = {m: self._middle(m, stream) for m, stream in now.items()}
            if not fuses or layer < config.fusion_layer:
                now = {m: self._advance(m, layer, stream, drop) for m, stream in now.items()}
                continue
            if layer == config.fusion_layer:
                now = self._meet(now)
            if config.fusion == "cross" and len(now) > 1:
                now = self._look_at_each_other(layer, now, drop)
                continue
            now = {m: self._advance(m, layer, stream, drop) for m, stream in now.items()}
            if config.fusion == "bottleneck" and len(now) > 1:
                now = share_bottleneck(now)
        return now

    def _meet(self, streams: dict[str, Stream]) -> dict[str, Stream]:
        """Lay the sequences out for the layers that fuse."""
        if self.config.fusion == "bottleneck":
            return {m: with_bottleneck(stream, self.bottleneck) for m, stream in streams.items()}
        if self.config.fusion == "early":
            return {"both": Stream.of(torch.cat([s.tokens() for s in streams.values()], dim=1))}
        return streams

    def _look_at_each_other(
        self, layer: int, streams: dict[str, Stream], drop: DropPath | None
    ) -> dict[str, Stream]:
        """Each modality attends to the other's tokens as they were before this layer."""
        settled = {m: stream.settled() for m, stream in streams.items()}
        (a, of_a), (b, of_b) = settled.items()
        return {
            m: advance_looking(
                self._stack(m), layer, stream, other.tokens(), self._drop(drop, m, layer)
            )
            for m, stream, other in ((a, of_a, of_b), (b, of_b, of_a))
        }

    def _advance(self, name: str, layer: int, stream: Stream, drop: DropPath | None) -> Stream:
        return advance(self._stack(name), layer, stream, self._drop(drop, name, layer))

    def _stack(self, name: str) -> Stack:
        return cast(Stack, self.encoder[name if name in self.encoder else "both"])

    def _drop(self, drop: DropPath | None, name: str, layer: int) -> LayerDrop | None:
        return None if drop is None else drop.layers[name][layer]

    def _middle(self, m: str, stream: Stream) -> Stream:
        norm = cast(nn.LayerNorm, self.middle_norm[m])
        return Stream(seam(stream.x, stream.update, norm)[1], None, stream.layout, stream.batch)

    def _closed(self, name: str, stream: Stream) -> Tensor:
        """The sequences after their closing LayerNorm, [B, L, D]."""
        if self.config.norm == "pooled":
            return stream.tokens()
        norm = self.norm[name if name in self.norm else "both"]
        out = seam(stream.x, stream.update, cast(nn.LayerNorm, norm))[1]
        return out.unflatten(0, (stream.batch, -1))

    def _pool(self, m: Modality, tokens: Tensor) -> Tensor:
        """One feature [B, D] of a modality's tokens."""
        config = self.config
        if config.head == "attentive_probe":
            return self.pool[m](tokens)
        # A mean of thousands of bf16 numbers is summed and kept in fp32.
        wide = torch.promote_types(tokens.dtype, torch.float32)
        if config.pool == "mean":
            pooled = tokens.mean(1, dtype=wide)
        else:
            pooled = tokens[:, 0].to(wide).contiguous()
        if config.norm == "pooled":
            norm = cast(nn.LayerNorm, self.norm[config.norm_of(m)])
            pooled = add_layer_norm(pooled, None, norm.weight, norm.bias, norm.eps)[1]
        return self.feature_norm[m](pooled) if config.head == "linear_probe" else pooled

    def _logits(self, feature: Tensor) -> Tensor:
        if self.config.representation is not None:
            feature = torch.tanh(self.pre_logits(feature))
        return self.head(feature)
