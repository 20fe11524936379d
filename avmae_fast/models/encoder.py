"""The audiovisual encoder: embed the visible tokens, then one of four ways to fuse.

Shape letters: B clips, T, H, W frames, height, width; F mel bins; V visible tokens; D width.
Source: arXiv:2212.05922, section 3.1 (early, mid, separate and shared encoders).
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.config import MODALITIES, AudioConfig, Backbone, Modality, ModelConfig, VideoConfig
from avmae_fast.models.blocks import Stack
from avmae_fast.models.init import learned_positions, lecun_normal_linear
from avmae_fast.models.layout import TokenMask, pack, unpack
from avmae_fast.models.pretrained import Pretrained
from avmae_fast.positions import sincos1d, sincos_grid
from avmae_kernels.patch_embed import patch_embed_visible
from avmae_kernels.patches import VideoLayout


class Encoder(Pretrained):
    """Visible tokens of one or two modalities in, one feature vector a token out.

    Args:
        config: geometry, size and fusion. Only the encoder's part is used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        self.patch_embed = nn.ModuleDict(
            {m: lecun_normal_linear(config.input(m).patch_dim, width) for m in config.modalities}
        )
        self.encoder = nn.ModuleDict(
            {
                name: Stack(config.encoder, config, layers, norm)
                for name, (layers, norm) in _stacks(config).items()
            }
        )
        if config.modality_tokens:
            self.modality_token = zero_vectors(config, width)
        if config.prefix_tokens:
            self.prefix_token = nn.ParameterDict(
                {m: learned_positions(config.prefix_tokens, width) for m in config.modalities}
            )
        if config.positions == "learned":
            self.pos_embed = learned_tables(config, width)
        else:
            for m in config.modalities:
                table = position_table(config, m, width)
                self.register_buffer(f"pos_{m}", table, persistent=False)

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        masks: Mapping[Modality, TokenMask] | None = None,
    ) -> dict[Modality, Tensor]:
        """Return the features of the visible tokens, [B, V, D] for each modality.

        Those of `prefix_tokens` come first: [B, prefix_tokens + V, D].

        Args:
            video: [B, T, H, W, 3], uint8, or floating in [-1, 1], or planes [B, T, 3H/2, W] uint8
                of limited BT.601 (see `avmae_kernels.yuv`). Left out for an audio model.
            audio: standardised log-mel, [B, frames, mel_bins], floating.
            masks: which tokens of each modality to look at; None looks at all of them.

        Raises:
            ValueError: an input is missing, superfluous or not of the configured shape.
        """
        return self.encode(self.check_inputs(video, audio), masks)

    def check_inputs(self, video: Tensor | None, audio: Tensor | None) -> dict[Modality, Tensor]:
        """The inputs by modality, once they are known to have the configured shapes."""
        return check_inputs(self.config, video, audio)

    def encode(
        self, inputs: Mapping[Modality, Tensor], masks: Mapping[Modality, TokenMask] | None
    ) -> dict[Modality, Tensor]:
        """`forward` without the checks."""
        tokens = {}
        for m, source in inputs.items():
            if masks is None:
                count = self.config.input(m).tokens
                mask = TokenMask.all_visible(source.shape[0], count, source.device)
            else:
                mask = masks[m]
            tokens[m] = self._embed(m, source, mask)
        return self._fuse(tokens)

    def _embed(self, m: Modality, source: Tensor, mask: TokenMask) -> Tensor:
        learned = self.config.positions == "learned"
        pos: Tensor = self.pos_embed[m] if learned else self.get_buffer(f"pos_{m}")
        if self.config.modality_tokens:
            pos = pos + self.modality_token[m]
        linear = cast(nn.Linear, self.patch_embed[m])
        patch, layout = patch_of(self.config, m), layout_of(source)
        ahead, places = pos.split([self.config.prefix_tokens, self.config.input(m).tokens])
        x = patch_embed_visible(
            source, mask.visible, linear.weight, linear.bias, places, patch, layout=layout
        )
        if not self.config.prefix_tokens:
            return x
        prefix = (self.prefix_token[m] + ahead).to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([prefix, x], dim=1)

    def _fuse(self, tokens: dict[Modality, Tensor]) -> dict[Modality, Tensor]:
        fusion = self.config.fusion
        if fusion in ("separate", "mid"):
            tokens = {
                m: run_stack(self.encoder[m], {m: x}, joint=False)[m] for m, x in tokens.items()
            }
        if "both" in self.encoder:
            tokens = run_stack(self.encoder["both"], tokens, joint=fusion != "shared")
        return tokens


def check_inputs(
    config: Backbone, video: Tensor | None, audio: Tensor | None
) -> dict[Modality, Tensor]:
    """The inputs by modality, once they are known to have the configured shapes.

    Raises:
        ValueError: an input is missing, superfluous or not of the configured shape.
    """
    inputs: dict[Modality, Tensor] = {}
    for m, tensor in zip(MODALITIES, (video, audio), strict=True):
        spec = config.video if m == "video" else config.audio
        if (tensor is None) != (spec is None):
            state = "without" if spec is None else "with"
            got = "none" if tensor is None else list(tensor.shape)
            raise ValueError(f"{m}: this model was configured {state} {m}, got {got}")
        if tensor is None or spec is None:
            continue
        shape = input_shape(spec, planes=tensor.ndim == 4)
        if tuple(tensor.shape[1:]) != shape:
            want = ["B", *shape]
            raise ValueError(f"{m} has shape {list(tensor.shape)}, this model wants {want}")
        inputs[m] = tensor
    # Compared one by one: the sizes that torch.export traces with cannot go into a set.
    first, *others = (tensor.shape[0] for tensor in inputs.values())
    if any(size != first for size in others):
        sizes = {m: tensor.shape[0] for m, tensor in inputs.items()}
        raise ValueError(f"video and audio differ in their number of clips: {sizes}")
    return inputs


def run_stack(
    stack: nn.Module,
    tokens: dict[Modality, Tensor],
    joint: bool,
    tails: dict[Modality, int] | None = None,
) -> dict[Modality, Tensor]:
    """Run [B, length, D] tokens through one stack; with tails, only those come out."""
    packed, layout, tail = pack(tokens, joint, tails)
    batch = next(iter(tokens.values())).shape[0]
    lengths = tails or {m: x.shape[1] for m, x in tokens.items()}
    return unpack(stack(packed, layout, tail), batch, lengths, joint)


def zero_vectors(config: ModelConfig, width: int) -> nn.ParameterDict:
    """A learned vector for each modality, zero at first: mask tokens and modality tokens."""
    return nn.ParameterDict({m: nn.Parameter(torch.zeros(width)) for m in config.modalities})


def learned_tables(config: ModelConfig, width: int) -> nn.ParameterDict:
    """A position of each prefix token and each token of a modality, to be learned."""
    rows = {m: config.prefix_tokens + config.input(m).tokens for m in config.modalities}
    return nn.ParameterDict({m: learned_positions(n, width) for m, n in rows.items()})


def position_table(config: ModelConfig, m: Modality, width: int) -> Tensor:
    """Sin-cos positions of every token of a modality, [prefix_tokens + N, width] fp32.

    Prefix tokens have no place: their rows are zero.
    """
    on_grid, spec = config.positions == "sincos_grid", config.input(m)
    table = sincos_grid(spec.grid, width) if on_grid else sincos1d(spec.tokens, width)
    return F.pad(torch.tensor(table), (0, 0, config.prefix_tokens, 0))


def input_shape(config: VideoConfig | AudioConfig, planes: bool = False) -> tuple[int, ...]:
    """Shape of one clip: (T, H, W, 3), as planes (T, 3H/2, W), or (frames, mel_bins)."""
    if not isinstance(config, VideoConfig):
        return config.frames, config.mel_bins
    if planes:
        return config.frames, config.height * 3 // 2, config.width
    return config.frames, config.height, config.width, 3


def layout_of(source: Tensor) -> VideoLayout:
    """How a model's input lies in memory: planes are what has four axes."""
    return "I420" if source.ndim == 4 else "THWC"


def patch_of(config: Backbone, m: Modality) -> tuple[int, ...]:
    """Size of a patch of modality `m` along each axis of its grid."""
    spec = config.input(m)
    return spec.tubelet if isinstance(spec, VideoConfig) else spec.patch


def _stacks(config: ModelConfig) -> dict[str, tuple[int, bool]]:
    """Name and depth of each stack the encoder needs, and whether a LayerNorm may close it."""
    layers = config.encoder.layers
    if config.fusion in ("early", "shared"):
        return {"both": (layers, True)}
    if config.fusion == "separate":
        return dict.fromkeys(config.modalities, (layers, True))
    own = (layers - config.fusion_layers, config.middle_norm)
    return {**dict.fromkeys(config.modalities, own), "both": (config.fusion_layers, True)}
