"""The audiovisual masked autoencoder that is pretrained.

Shape letters: B clips, N tokens of a modality, V visible, S scored tokens, P values in a patch.
Source: arXiv:2212.05922, section 3; loss as in the authors' code (0.5 each by default).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avmae_fast.config import Modality, ModelConfig
from avmae_fast.models.blocks import Stack
from avmae_fast.models.decoder import Question, question
from avmae_fast.models.encoder import (
    Encoder,
    layout_of,
    learned_tables,
    patch_of,
    position_table,
    run_stack,
    zero_vectors,
)
from avmae_fast.models.init import xavier_linear, zero_linear
from avmae_fast.models.layout import TokenMask
from avmae_kernels.assemble import assemble_decoder
from avmae_kernels.reconstruction_loss import reconstruction_loss


@dataclass(frozen=True)
class Reconstruction:
    """What a pretraining step returns.

    loss: weighted sum of `losses`, a scalar.
    losses: mean squared error of each modality, unweighted scalars.
    predictions: [B, S, P] predicted patches of the scored tokens, normalised as the target is.
    scored: [B, S] int64, token number of each prediction.
    """

    loss: Tensor
    losses: dict[Modality, Tensor]
    predictions: dict[Modality, Tensor]
    scored: dict[Modality, Tensor]


class AudiovisualMAE(Encoder):
    """An `Encoder` with the decoder that pretrains it; its encoder keeps the same names.

    Args:
        config: geometry, size, fusion, decoding and objective.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, stack = config.decoder.width, config.decoder
        self.decoder_embed = nn.ModuleDict(
            {
                m: xavier_linear(config.encoder.width, width, bias=config.projection_bias)
                for m in config.modalities
            }
        )
        self.mask_token = zero_vectors(config, width)
        if config.modality_tokens:
            self.decoder_modality_token = zero_vectors(config, width)
        names = config.modalities if config.decoding == "separate" else ("both",)
        self.decoder = nn.ModuleDict({name: Stack(stack, config) for name in names})
        self.head = nn.ModuleDict(
            {m: zero_linear(width, config.input(m).patch_dim) for m in config.modalities}
        )
        if config.decoder_positions == "learned":
            self.decoder_pos_embed = learned_tables(config, width)
            return
        for m in config.modalities:
            table = position_table(config, m, width)
            self.register_buffer(f"decoder_pos_{m}", table, persistent=False)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What has a loss of its own: each modality."""
        return self.config.modalities

    def forward(  # type: ignore[override]
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        masks: Mapping[Modality, TokenMask],
        valid: Tensor | None = None,
    ) -> Reconstruction:
        """Encode the visible tokens, predict the others and compare.

        Args:
            video: [B, T, H, W, 3], uint8, or floating in [-1, 1], or planes [B, T, 3H/2, W] uint8
                of limited BT.601 (see `avmae_kernels.yuv`). Left out for an audio model.
            audio: standardised log-mel, [B, frames, mel_bins], floating.
            masks: visible and masked tokens of each modality.
            valid: weight of each clip in the loss, [B]; 0 leaves it out. None: all ones.

        Raises:
            ValueError: an input is missing, superfluous or not of the configured shape.
        """
        inputs = self.check_inputs(video, audio)
        features = self.encode(inputs, masks)
        questions = {m: question(self.config, m, masks) for m in inputs}
        predictions = self.decode(features, questions)
        losses = {
            m: reconstruction_loss(
                predictions[m],
                source,
                questions[m].scored,
                patch_of(self.config, m),
                self.config.target_norm,
                valid,
                self.config.loss_mean_over_patch,
                layout=layout_of(source),
            )
            for m, source in inputs.items()
        }
        parts = [self.config.input(m).loss_weight * loss for m, loss in losses.items()]
        scored = {m: asked.scored for m, asked in questions.items()}
        return Reconstruction(torch.stack(parts).sum(), losses, predictions, scored)

    def decode(
        self, features: Mapping[Modality, Tensor], questions: Mapping[Modality, Question]
    ) -> dict[Modality, Tensor]:
        """Predicted patches [B, S, P] of the scored tokens, from encoder features [B, V, D].

        In front of the V visible tokens are those of `prefix_tokens`.
        """
        shown = {m: self.decoder_embed[m](x) for m, x in features.items()}
        tables = {m: self._decoder_table(m) for m in features}
        sequences = {}
        for m, asked in questions.items():
            sequences[m] = assemble_decoder(
                shown[asked.source],
                self._rows(asked.token_index, with_prefix=True),
                tables[asked.token_table],
                self.mask_token[m],
                self._rows(asked.mask_index),
                tables[m],
            )
        tails = {m: asked.scored.shape[1] for m, asked in questions.items()}
        if self.config.decoding == "separate":
            decoded: dict[Modality, Tensor] = {}
            for m, x in sequences.items():
                decoded |= run_stack(self.decoder[m], {m: x}, joint=False, tails={m: tails[m]})
        else:
            joint = self.config.decoding == "joint"
            decoded = run_stack(self.decoder["both"], sequences, joint, tails)
        return {m: self.head[m](x) for m, x in decoded.items()}

    def _rows(self, index: Tensor, with_prefix: bool = False) -> Tensor:
        """Where a decoder table has tokens `index` [B, V], and the prefix tokens before them."""
        count = self.config.prefix_tokens
        if not count:
            return index
        if not with_prefix:
            return index + count
        prefix = torch.arange(count, device=index.device).expand(index.shape[0], -1)
        return torch.cat([prefix, index + count], dim=1)

    def _decoder_table(self, m: Modality) -> Tensor:
        """What the decoder adds to each row, [prefix_tokens + N, width]."""
        learned = self.config.decoder_positions == "learned"
        table = self.decoder_pos_embed[m] if learned else self.get_buffer(f"decoder_pos_{m}")
        if self.config.modality_tokens:
            return table + self.decoder_modality_token[m]
        return table
