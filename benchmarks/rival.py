"""B+: the pretraining model as a good engineer writes it in plain PyTorch, to be compiled.

Everything that can be had without a kernel of one's own: uint8 frames normalised on the GPU, only
visible patches embedded and only by a linear layer, decoder sequences put together without putting
tokens back in order (attention does not care), heads and targets for masked tokens alone, cuDNN's
attention preferred, the next batch copied on a stream of its own, fused AdamW, and torch.compile
with its autotuning. Weights have the reference's names; loss and gradients are the reference's.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from avmae_fast.config import Modality, ModelConfig
from avmae_fast.models.encoder import patch_of
from avmae_fast.reference.blocks import Stack
from avmae_fast.reference.masking import MaskLike
from avmae_fast.reference.model import encoder_stacks, fixed_positions, take_tokens
from avmae_fast.reference.targets import patchify
from benchmarks.harness import BenchmarkError

# What a Hopper user of SDPA asks for; the others step in where cuDNN cannot run.
PREFERENCE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Parts = dict[Modality, Tensor]


class RivalMAE(nn.Module):
    """The presets' model: reconstruction of masked patches with raw or per-patch targets.

    Raises:
        BenchmarkError: the configuration asks for anything else.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        plain = (
            config.objective == "reconstruction"
            and config.target_norm in ("none", "patch")
            and config.positions != "learned"
            and config.loss_on == "masked"
            and not config.modality_tokens
            and not config.prefix_tokens
            and config.decoder_positions != "learned"
        )
        if not plain:
            raise BenchmarkError("the rival knows the presets' objective and fixed positions only")
        self.config = config
        width, narrow, both = config.encoder.width, config.decoder.width, config.modalities
        self.patch_embed = nn.ModuleDict(
            {m: nn.Linear(config.input(m).patch_dim, width) for m in both}
        )
        stacks = encoder_stacks(config)
        self.encoder = nn.ModuleDict(
            {name: Stack(config.encoder, config, *stack) for name, stack in stacks.items()}
        )
        self.decoder_embed = nn.ModuleDict(
            {m: nn.Linear(width, narrow, bias=config.projection_bias) for m in both}
        )
        self.mask_token = nn.ParameterDict({m: nn.Parameter(torch.zeros(narrow)) for m in both})
        names = both if config.decoding == "separate" else ("both",)
        layers = config.decoder.layers
        self.decoder = nn.ModuleDict({n: Stack(config.decoder, config, layers) for n in names})
        self.head = nn.ModuleDict({m: nn.Linear(narrow, config.input(m).patch_dim) for m in both})
        for m in both:
            self.register_buffer(f"pos_{m}", fixed_positions(config, m, width), False)
            self.register_buffer(f"decoder_pos_{m}", fixed_positions(config, m, narrow), False)

    def forward(self, video: Tensor, audio: Tensor, masks: Mapping[Modality, MaskLike]) -> Tensor:
        """The loss. video: uint8 [B, T, H, W, 3]; audio: standardised log-mel [B, rows, bins]."""
        patches = {
            "video": patchify(video, patch_of(self.config, "video")),
            "audio": patchify(audio, patch_of(self.config, "audio")),
        }
        with sdpa_kernel(PREFERENCE, set_priority=True):
            tokens: Parts = {}
            for m in self.config.modalities:
                visible = masks[m].visible
                picked = _floating(take_tokens(patches[m], visible), self.mask_token[m].dtype)
                tokens[m] = self.patch_embed[m](picked) + self.get_buffer(f"pos_{m}")[visible]
            encoded = self._encode(tokens)
            predictions = self._decode(encoded, masks)
        losses = []
        for m, pred in predictions.items():
            target = _floating(take_tokens(patches[m], masks[m].masked), torch.float32)
            losses.append(self.config.input(m).loss_weight * self._loss(pred, target))
        return torch.stack(losses).sum()

    def _encode(self, tokens: Parts) -> Parts:
        fusion = self.config.fusion
        if fusion in ("separate", "mid"):
            tokens = {m: self.encoder[m](x) for m, x in tokens.items()}
        if fusion == "shared":
            return {m: self.encoder["both"](x) for m, x in tokens.items()}
        return _joint(self.encoder["both"], tokens) if "both" in self.encoder else tokens

    def _decode(self, encoded: Parts, masks: Mapping[Modality, MaskLike]) -> Parts:
        sequences: Parts = {}
        for m, x in encoded.items():
            pos = self.get_buffer(f"decoder_pos_{m}")
            shown = self.decoder_embed[m](x) + pos[masks[m].visible]
            asked = self.mask_token[m] + pos[masks[m].masked]
            sequences[m] = torch.cat([shown, asked.to(shown.dtype)], dim=1)
        if self.config.decoding == "joint":
            decoded = _joint(self.decoder["both"], sequences)
        else:
            separate = self.config.decoding == "separate"
            decoded = {m: self.decoder[m if separate else "both"](x) for m, x in sequences.items()}
        return {m: self.head[m](x[:, encoded[m].shape[1] :]) for m, x in decoded.items()}

    def _loss(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.config.target_norm == "patch":
            variance, mean = torch.var_mean(target, dim=-1, correction=0, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        if self.config.loss_mean_over_patch:
            return F.mse_loss(pred.float(), target)
        return F.mse_loss(pred.float(), target) * pred.shape[-1]


def _floating(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) * (2.0 / 255.0) - 1.0 if x.dtype == torch.uint8 else x.to(dtype)


def _joint(stack: nn.Module, parts: Parts) -> Parts:
    out = stack(torch.cat(list(parts.values()), dim=1))
    split = out.split([x.shape[1] for x in parts.values()], dim=1)
    return dict(zip(parts, split, strict=True))


class Prefetcher:
    """Copies the next batch to the device on a stream of its own while the model computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[int, list[Tensor]] | None = None

    def take(self, host: tuple[Tensor, ...], coming: tuple[Tensor, ...]) -> list[Tensor]:
        """`host` on the device; `coming`, which is asked for next, is copied meanwhile."""
        if self._stream is None:
            return [x.to(self._device) for x in host]
        if self._coming is None or self._coming[0] != host[0].data_ptr():
            self._copy(host)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        ready = cast(tuple[int, list[Tensor]], self._coming)[1]
        for x in ready:
            # Allocated on the other stream: its memory is not to be reused before ours is done.
            x.record_stream(current)
        self._copy(coming)
        return ready

    def _copy(self, host: tuple[Tensor, ...]) -> None:
        with torch.cuda.stream(self._stream):
            device_tensors = [x.to(self._device, non_blocking=True) for x in host]
        self._coming = (host[0].data_ptr(), device_tensors)
