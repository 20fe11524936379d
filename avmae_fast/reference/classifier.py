"""The fine-tuned classifier on dense tensors: what the engine's `Classifier` must compute.

Shape letters: B clips, N tokens of a modality, K bottleneck tokens, D width, C classes.
Source: arXiv:2212.05922, section 4, with the fusion of MBT, arXiv:2107.00135; what the papers
leave open is as in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.config import Modality
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.positions import sincos1d, sincos_grid
from avmae_fast.reference.blocks import Block, Stack
from avmae_fast.reference.init import init_parameter
from avmae_fast.reference.preprocess import normalise_frames
from avmae_fast.reference.targets import patchify

Parts = dict[Modality, Tensor]


@dataclass(frozen=True)
class ReferenceLogits:
    """What a classification step computes.

    logits: [B, C], the average over the modalities.
    by_modality: [B, C] of each modality, or of "both" where features are merged.
    features: [B, D] of each modality, in front of the head.
    encoded: [B, N, D], the tokens that are pooled.
    """

    logits: Tensor
    by_modality: dict[str, Tensor]
    features: Parts
    encoded: Parts


class ReferenceClassifier(nn.Module):
    """Any `ClassifierConfig`; its state-dict names are the engine's."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        both, width = config.modalities, config.encoder.width
        self.patch_embed = nn.ModuleDict(
            {m: nn.Linear(config.input(m).patch_dim, width) for m in both}
        )
        stacks = dict.fromkeys(config.stack_of(m) for m in both)
        layers = config.encoder.layers
        self.encoder = nn.ModuleDict({s: Stack(config.encoder, config, layers) for s in stacks})
        norms = dict.fromkeys(config.norm_of(m) for m in both)
        eps = config.layer_norm_eps
        self.norm = nn.ModuleDict({n: nn.LayerNorm(width, eps) for n in norms})
        if config.middle_norm_at is not None:
            self.middle_norm = nn.ModuleDict({m: nn.LayerNorm(width, eps) for m in both})
        if config.has_bottleneck:
            self.bottleneck = nn.Parameter(torch.empty(config.bottleneck_tokens, width))
        self._make_tokens()
        self._make_head()
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter)

    def _make_tokens(self) -> None:
        """What is added to the tokens, or put in front of them."""
        config, width = self.config, self.config.encoder.width

        def vectors() -> nn.ParameterDict:
            return nn.ParameterDict(
                {m: nn.Parameter(torch.empty(width)) for m in config.modalities}
            )

        if config.modality_tokens:
            self.modality_token = vectors()
        if config.pool != "mean":
            self.cls = vectors()
        if config.positions == "learned":
            self.pos_embed = nn.ParameterDict()
        for m in config.modalities:
            spec = config.input(m)
            if config.positions == "learned":
                self.pos_embed[m] = nn.Parameter(torch.empty(spec.tokens, width))
                continue
            # The class token takes the first position of a table that has one more.
            count = spec.tokens + (config.pool == "cls_positioned")
            on_grid = config.positions == "sincos_grid"
            table = sincos_grid(spec.grid, width) if on_grid else sincos1d(count, width)
            self.register_buffer(f"pos_{m}", torch.from_numpy(table), False)

    def _make_head(self) -> None:
        config, width = self.config, self.config.encoder.width
        if config.head == "attentive_probe":
            heads = config.encoder.heads
            self.pool = nn.ModuleDict({m: QueryPool(width, heads) for m in config.modalities})
        if config.head == "linear_probe":
            self.feature_norm = nn.ModuleDict(
                {m: nn.BatchNorm1d(width, eps=1e-6, affine=False) for m in config.modalities}
            )
        if config.representation is not None:
            self.pre_logits = nn.Linear(width, config.representation)
        self.head = nn.Linear(config.representation or width, sum(config.heads.values()))

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> ReferenceLogits:
        """Logits of every clip.

        Args:
            video: [B, T, H, W, 3], uint8, or floating and already in [-1, 1].
            audio: log-mel as the network is to see it, [B, frames, mel_bins], floating.
            dropped: branches that stochastic depth leaves out, [layers, 2, B] bool of each
                modality, attention before MLP; of "both" where early fusion has joined them.
        """
        given: dict[Modality, Tensor | None] = {"video": video, "audio": audio}
        tokens = {m: self._tokens(m, x) for m, x in given.items() if x is not None}
        encoded = self._encode(tokens, dropped)
        if self.config.head != "linear":
            encoded = {m: x.detach() for m, x in encoded.items()}
        if self.config.norm == "tokens":
            encoded = {m: self.norm[self.config.norm_of(m)](x) for m, x in encoded.items()}
        features = {m: self._pool(m, x) for m, x in encoded.items()}
        if self.config.merge == "features":
            merged = torch.stack(list(features.values())).mean(0)
            by_modality: dict[str, Tensor] = {"both": self._classify(merged)}
        else:
            by_modality = {m: self._classify(x) for m, x in features.items()}
        logits = torch.stack(list(by_modality.values())).mean(0)
        return ReferenceLogits(logits, by_modality, features, encoded)

    def _tokens(self, m: Modality, x: Tensor) -> Tensor:
        """All tokens of a modality with their positions, [B, N, D]."""
        dtype = self.head.weight.dtype
        x = normalise_frames(x, dtype) if x.dtype == torch.uint8 else x.to(dtype)
        spec, learned = self.config.input(m), self.config.positions == "learned"
        patch = spec.tubelet if m == "video" else spec.patch  # type: ignore[union-attr]
        tokens = self.patch_embed[m](patchify(x, patch))
        if self.config.modality_tokens:
            tokens = tokens + self.modality_token[m]
        table = self.pos_embed[m] if learned else self.get_buffer(f"pos_{m}")
        if self.config.pool == "mean":
            return tokens + table
        cls = self.cls[m].expand(len(tokens), 1, -1)
        if self.config.pool == "cls":
            return torch.cat([cls, tokens + table], dim=1)
        return torch.cat([cls, tokens], dim=1) + table

    def _encode(self, tokens: Parts, dropped: Mapping[str, Tensor] | None) -> Parts:
        """All layers, fusing as configured from `fusion_layer` on."""
        config = self.config
        fuses = len(config.modalities) > 1 and (self.training or config.fuse_at_test)
        shared: Tensor | None = None
        if config.has_bottleneck:
            shared = self.bottleneck.expand(len(next(iter(tokens.values()))), -1, -1)
        for layer in range(config.encoder.layers):
            if layer == config.middle_norm_at:
                tokens = {m: self.middle_norm[m](x) for m, x in tokens.items()}
            if not fuses or config.fusion == "late" or layer < config.fusion_layer:
                tokens = {m: self._layer(m, layer, x, x, dropped) for m, x in tokens.items()}
            elif config.fusion == "bottleneck":
                assert shared is not None
                tokens, shared = self._bottleneck_layer(layer, tokens, shared, dropped)
            elif config.fusion == "cross":
                seen = {m: torch.cat([*_others(tokens, m), x], dim=1) for m, x in tokens.items()}
                tokens = {m: self._layer(m, layer, x, seen[m], dropped) for m, x in tokens.items()}
            else:
                joint = torch.cat(list(tokens.values()), dim=1)
                joint = self._layer("both", layer, joint, joint, dropped)
                parts = joint.split([x.shape[1] for x in tokens.values()], dim=1)
                tokens = dict(zip(tokens, parts, strict=True))
        return tokens

    def _bottleneck_layer(
        self, layer: int, tokens: Parts, shared: Tensor, dropped: Mapping[str, Tensor] | None
    ) -> tuple[Parts, Tensor]:
        """Each modality with its own copy of the bottleneck, which are then averaged."""
        count = shared.shape[1]
        out = {}
        for m, x in tokens.items():
            seen = torch.cat([x, shared], dim=1)
            out[m] = self._layer(m, layer, seen, seen, dropped)
        shared = torch.stack([x[:, -count:] for x in out.values()]).mean(0)
        return {m: x[:, :-count] for m, x in out.items()}, shared

    def _layer(
        self,
        name: str,
        layer: int,
        x: Tensor,
        seen: Tensor,
        dropped: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Block `layer` on x, whose last tokens attend to all of `seen`, of which they are part."""
        stack = name if name in self.encoder else "both"
        block = self.encoder[stack].get_submodule(f"blocks.{layer}")
        assert isinstance(block, Block)
        rate = self.config.drop_rates()[layer]
        scale = 1.0 / (1.0 - rate) if self.config.drop_path_scaled else 1.0
        if dropped is None:
            keep = x.new_ones(2, len(x), 1, 1)
        else:
            keep = (~dropped[name][layer]).to(x.dtype)[..., None, None] * scale
        x = x + keep[0] * block.attn(block.norm1(seen))[:, -x.shape[1] :]
        return x + keep[1] * block.mlp(block.norm2(x))

    def _pool(self, m: Modality, x: Tensor) -> Tensor:
        """One feature [B, D] of a modality's tokens."""
        if self.config.head == "attentive_probe":
            return self.pool[m](x)
        pooled = x.mean(1) if self.config.pool == "mean" else x[:, 0]
        if self.config.norm == "pooled":
            pooled = self.norm[self.config.norm_of(m)](pooled)
        return self.feature_norm[m](pooled) if self.config.head == "linear_probe" else pooled

    def _classify(self, feature: Tensor) -> Tensor:
        if self.config.representation is not None:
            feature = torch.tanh(self.pre_logits(feature))
        return self.head(feature)


class QueryPool(nn.Module):
    """A learned query attends to all tokens: [B, N, D] to [B, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        k, v = self.kv(x_BND).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.view(self.heads, 1, -1).expand(len(x_BND), -1, -1, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


def _others(tokens: Parts, m: Modality) -> list[Tensor]:
    return [x for other, x in tokens.items() if other != m]
