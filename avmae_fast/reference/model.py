"""The audiovisual masked autoencoder on dense tensors.

Shape letters: B clips, N tokens of a modality, V visible tokens, S tokens of a decoder sequence,
P values in a patch, D and E widths of encoder and decoder.
Source: arXiv:2212.05922, section 3; what the paper leaves open is as in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.config import AudioConfig, Modality, ModelConfig, VideoConfig
from avmae_fast.positions import sincos1d, sincos_grid
from avmae_fast.reference.blocks import Stack, run_joint
from avmae_fast.reference.init import init_parameter
from avmae_fast.reference.masking import MaskLike
from avmae_fast.reference.preprocess import normalise_frames
from avmae_fast.reference.targets import patchify, reconstruction_loss, reconstruction_target

Parts = dict[Modality, Tensor]


@dataclass(frozen=True)
class ReferenceOutput:
    """What a pretraining step computes, from the tokens to the loss; a tensor for each modality.

    loss: weighted sum of `losses`, a scalar.
    losses: unweighted loss of each modality, scalars.
    predictions: [B, N, P] for all tokens in their order, normalised as the targets are.
    targets: [B, N, P].
    weights: [B, N], how much each token counts in the loss (0 or 1, times `valid`).
    tokens: [B, N, D], embedded patches with their positions.
    encoded: [B, V, D], encoder output, visible tokens in the order of the mask.
    projected: [B, V, E], the same in the decoder's width.
    decoder_input, decoder_output: [B, S, E].
    """

    loss: Tensor
    losses: Parts
    predictions: Parts
    targets: Parts
    weights: Parts
    tokens: Parts
    encoded: Parts
    projected: Parts
    decoder_input: Parts
    decoder_output: Parts


class ReferenceMAE(nn.Module):
    """Encoder, decoder and loss of any `ModelConfig`; its state-dict names are the engine's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        both = config.modalities
        width, narrow = config.encoder.width, config.decoder.width
        patch_dims = {m: config.input(m).patch_dim for m in both}
        self.patch_embed = nn.ModuleDict({m: nn.Linear(patch_dims[m], width) for m in both})
        self.encoder = nn.ModuleDict(
            {
                name: Stack(config.encoder, config, layers, norm)
                for name, (layers, norm) in encoder_stacks(config).items()
            }
        )
        self.decoder_embed = nn.ModuleDict(
            {m: nn.Linear(width, narrow, bias=config.projection_bias) for m in both}
        )
        self.mask_token = nn.ParameterDict({m: nn.Parameter(torch.empty(narrow)) for m in both})
        if config.modality_tokens:
            self.modality_token = nn.ParameterDict(
                {m: nn.Parameter(torch.empty(width)) for m in both}
            )
            self.decoder_modality_token = nn.ParameterDict(
                {m: nn.Parameter(torch.empty(narrow)) for m in both}
            )
        if config.prefix_tokens:
            shape = config.prefix_tokens, width
            self.prefix_token = nn.ParameterDict(
                {m: nn.Parameter(torch.empty(shape)) for m in both}
            )
        names = both if config.decoding == "separate" else ("both",)
        layers = config.decoder.layers
        self.decoder = nn.ModuleDict({n: Stack(config.decoder, config, layers) for n in names})
        self.head = nn.ModuleDict({m: nn.Linear(narrow, patch_dims[m]) for m in both})
        self._make_positions()
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter)

    def _make_positions(self) -> None:
        """Tables of encoder [P + N, D] and decoder [P + N, E], for P prefix tokens first."""
        config = self.config
        if config.positions == "learned":
            self.pos_embed = nn.ParameterDict()
        if config.decoder_positions == "learned":
            self.decoder_pos_embed = nn.ParameterDict()
        for m in config.modalities:
            rows = config.prefix_tokens + config.input(m).tokens
            width, narrow = config.encoder.width, config.decoder.width
            if config.positions == "learned":
                self.pos_embed[m] = nn.Parameter(torch.empty(rows, width))
            else:
                self.register_buffer(f"pos_{m}", fixed_positions(config, m, width), False)
            if config.decoder_positions == "learned":
                self.decoder_pos_embed[m] = nn.Parameter(torch.empty(rows, narrow))
            else:
                self.register_buffer(f"decoder_pos_{m}", fixed_positions(config, m, narrow), False)

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        masks: Mapping[Modality, MaskLike],
        valid: Tensor | None = None,
        shuffle: Mapping[Modality, Tensor] | None = None,
    ) -> ReferenceOutput:
        """Encode the visible tokens, predict all tokens and compare them with the targets.

        Args:
            video: [B, T, H, W, 3], uint8, or floating and already in [-1, 1].
            audio: log-mel as the network is to see it, [B, frames, mel_bins], floating.
            masks: visible and masked tokens of every modality.
            valid: weight of each clip in the loss, [B]; None counts all alike.
            shuffle: a permutation [B, N] of each modality's decoder sequence, for the authors'
                shuffled variant of released inpainting: token i moves to place `shuffle[i]`, its
                weight with it, and the targets stay.

        Raises:
            ValueError: an input or a mask is missing, superfluous or not of the configured shape,
                `shuffle` comes without released inpainting, or released inpainting has no place
                left for a mask token.
        """
        config = self.config
        inputs = self._inputs(video, audio)
        if masks.keys() != inputs.keys():
            raise ValueError(f"masks must be given for {sorted(inputs)}, got {sorted(masks)}")
        tokens = {m: self._tokens(m, x) for m, x in inputs.items()}
        visible = {m: take_tokens(x, masks[m].visible) for m, x in tokens.items()}
        encoded = self._fuse({m: self._with_prefix(m, x) for m, x in visible.items()})
        projected = {m: self.decoder_embed[m](x) for m, x in encoded.items()}
        questions = {m: self._question(m, projected, masks) for m in inputs}
        if shuffle is not None:
            questions = {m: self._shuffle(*asked, shuffle[m]) for m, asked in questions.items()}
        sequences = {m: sequence for m, (sequence, _) in questions.items()}
        weights = {m: self._weight(asked, valid) for m, (_, asked) in questions.items()}
        decoded = self._decode(sequences)
        # In every objective the last N tokens of a sequence are the ones with an answer.
        answers = {m: x[:, -config.input(m).tokens :] for m, x in decoded.items()}
        predictions = {m: self.head[m](x) for m, x in answers.items()}
        targets = {
            m: reconstruction_target(x, self._patch(m), config.target_norm)
            for m, x in inputs.items()
        }
        losses = {}
        for m, pred in predictions.items():
            mean = config.loss_mean_over_patch
            losses[m] = reconstruction_loss(pred, targets[m], weights[m], mean)
        return ReferenceOutput(
            loss=torch.stack([config.input(m).loss_weight * x for m, x in losses.items()]).sum(),
            losses=losses,
            predictions=predictions,
            targets=targets,
            weights=weights,
            tokens=tokens,
            encoded=encoded,
            projected=projected,
            decoder_input=sequences,
            decoder_output=decoded,
        )

    def encode(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        masks: Mapping[Modality, MaskLike] | None = None,
    ) -> Parts:
        """Features of the visible tokens [B, V, D], or of all tokens [B, N, D] without masks.

        Those of the prefix tokens come first.
        """
        tokens = {m: self._tokens(m, x) for m, x in self._inputs(video, audio).items()}
        if masks is not None:
            tokens = {m: take_tokens(x, masks[m].visible) for m, x in tokens.items()}
        return self._fuse({m: self._with_prefix(m, x) for m, x in tokens.items()})

    def _inputs(self, video: Tensor | None, audio: Tensor | None) -> Parts:
        """The inputs in the dtype of the weights, pixels in [-1, 1]."""
        given: dict[Modality, Tensor | None] = {"video": video, "audio": audio}
        inputs: Parts = {}
        for m, x in given.items():
            if (x is None) != (m not in self.config.modalities):
                state = "is missing" if x is None else "is given, but this model has none"
                raise ValueError(f"{m} {state}: it takes {', '.join(self.config.modalities)}")
            if x is None:
                continue
            shape = _input_shape(self.config.input(m))
            if x.shape[1:] != shape:
                raise ValueError(f"{m} has shape {list(x.shape)}, want {['B', *shape]}")
            dtype = self.mask_token[m].dtype
            inputs[m] = normalise_frames(x, dtype) if x.dtype == torch.uint8 else x.to(dtype)
        return inputs

    def _patch(self, m: Modality) -> tuple[int, ...]:
        spec = self.config.input(m)
        return spec.tubelet if isinstance(spec, VideoConfig) else spec.patch

    def _tokens(self, m: Modality, x: Tensor) -> Tensor:
        """All tokens of a modality with their positions, [B, N, D]."""
        pos = self._encoder_table(m)[self.config.prefix_tokens :]
        return self.patch_embed[m](patchify(x, self._patch(m))) + pos

    def _with_prefix(self, m: Modality, tokens: Tensor) -> Tensor:
        """The prefix tokens of a modality in front of its own."""
        count = self.config.prefix_tokens
        if not count:
            return tokens
        prefix = self.prefix_token[m] + self._encoder_table(m)[:count]
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _encoder_table(self, m: Modality) -> Tensor:
        """What the encoder adds to a token of `m` at each position, [P + N, D]."""
        learned = self.config.positions == "learned"
        table = self.pos_embed[m] if learned else self.get_buffer(f"pos_{m}")
        return table + self.modality_token[m] if self.config.modality_tokens else table

    def _fuse(self, tokens: Parts) -> Parts:
        """The encoder: four ways for the modalities to meet."""
        fusion = self.config.fusion
        if fusion == "shared":
            return {m: self.encoder["both"](x) for m, x in tokens.items()}
        if fusion in ("separate", "mid"):
            tokens = {m: self.encoder[m](x) for m, x in tokens.items()}
        return tokens if fusion == "separate" else run_joint(self.encoder["both"], tokens)

    def _question(
        self, m: Modality, projected: Parts, masks: Mapping[Modality, MaskLike]
    ) -> tuple[Tensor, Tensor]:
        """The decoder sequence of `m`, [B, S, E], and 1 for each token asked for, [B, N]."""
        batch, tokens = projected[m].shape[0], self.config.input(m).tokens
        mask_token = self.mask_token[m].to(projected[m].dtype).expand(batch, tokens, -1)
        asked = torch.ones_like(mask_token[..., 0], dtype=self.mask_token[m].dtype)
        table = self._decoder_table(m)
        if self.config.objective == "reconstruction":
            visible, count = masks[m].visible, self.config.prefix_tokens
            prefix, shown = projected[m][:, :count], projected[m][:, count:]
            sequence = torch.cat([prefix, place_tokens(mask_token, visible, shown)], dim=1)
            return sequence + table, asked.scatter(1, visible, 0.0)
        other: Modality = "audio" if m == "video" else "video"
        shown = projected[other]
        if self.config.objective == "inpainting":
            shown = shown + self._decoder_table(other)[masks[other].visible]
            return torch.cat([shown, mask_token + table], dim=1), asked
        count = shown.shape[1]
        if count >= tokens:
            raise ValueError(
                f"released inpainting puts {count} visible {other} tokens in front of the mask "
                f"tokens of {m}, which has {tokens} places: mask more of {other}"
            )
        # As released: the other modality's tokens take the first places and their positions.
        sequence = torch.cat([shown, mask_token[:, count:]], dim=1) + table
        return sequence, torch.cat([torch.zeros_like(asked[:, :count]), asked[:, count:]], dim=1)

    def _shuffle(self, sequence: Tensor, asked: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.objective != "inpainting_released":
            raise ValueError(
                "shuffle belongs to objective 'inpainting_released', "
                f"this model's is {self.config.objective!r}"
            )
        return place_tokens(sequence, order, sequence), asked.scatter(1, order, asked)

    def _weight(self, asked: Tensor, valid: Tensor | None) -> Tensor:
        """How much each token counts in the loss, [B, N], from which tokens were asked for."""
        weight = torch.ones_like(asked) if self.config.loss_on == "all" else asked
        return weight if valid is None else weight * valid[:, None].to(weight)

    def _decoder_table(self, m: Modality) -> Tensor:
        """What the decoder adds to a token of `m` at each position, [P + N, E]."""
        learned = self.config.decoder_positions == "learned"
        table = self.decoder_pos_embed[m] if learned else self.get_buffer(f"decoder_pos_{m}")
        return table + self.decoder_modality_token[m] if self.config.modality_tokens else table

    def _decode(self, sequences: Parts) -> Parts:
        """Joint, shared or separate decoders."""
        if self.config.decoding == "joint":
            return run_joint(self.decoder["both"], sequences)
        separate = self.config.decoding == "separate"
        return {m: self.decoder[m if separate else "both"](x) for m, x in sequences.items()}


def encoder_stacks(config: ModelConfig) -> dict[str, tuple[int, bool]]:
    """Name and depth of each stack of the encoder, and whether a LayerNorm closes it.

    Mid fusion keeps both kinds of stack for one modality.
    """
    layers = config.encoder.layers
    if config.fusion in ("early", "shared"):
        return {"both": (layers, True)}
    if config.fusion == "separate":
        return dict.fromkeys(config.modalities, (layers, True))
    own = (layers - config.fusion_layers, config.middle_norm)
    return {**dict.fromkeys(config.modalities, own), "both": (config.fusion_layers, True)}


def _input_shape(spec: VideoConfig | AudioConfig) -> tuple[int, ...]:
    if isinstance(spec, VideoConfig):
        return spec.frames, spec.height, spec.width, 3
    return spec.frames, spec.mel_bins


def fixed_positions(config: ModelConfig, m: Modality, width: int) -> Tensor:
    """Sines and cosines of every token of a modality, [P + N, width]; zeros for prefix tokens."""
    spec = config.input(m)
    on_grid = config.positions == "sincos_grid"
    table = sincos_grid(spec.grid, width) if on_grid else sincos1d(spec.tokens, width)
    return F.pad(torch.from_numpy(table), (0, 0, config.prefix_tokens, 0))


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b]]` of every clip: [B, N, D] and [B, K] give [B, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def place_tokens(x: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """`x` with `x[b, index[b]] = tokens[b]` for every clip, out of place."""
    return x.scatter(1, index[..., None].expand_as(tokens), tokens)
