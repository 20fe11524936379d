"""The encoder as a building block: clips of any length, any of their tokens, no padding.

Shape letters: B clips, T, H, W frames, height, width; F mel bins; N tokens of a grid; V visible
tokens; D width.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.config import MODALITIES, Modality, Positions, VideoConfig
from avmae_fast.models.encoder import Encoder, patch_of
from avmae_fast.models.layout import TokenLayout
from avmae_fast.models.packed_tokens import PackedTokens
from avmae_fast.models.visible import Clips, Keep, Visible, by_modality, choose_visible, grids_of
from avmae_fast.positions import sincos1d, sincos_grid
from avmae_kernels.patch_embed import patch_embed_visible

# Position tables of so many grids are kept, some megabytes each.
_TABLES = 32


class MaskedEncoder(Encoder):
    """An `Encoder` for clips of different sizes and durations, each with visible tokens of its own.

    Its parameters have the names of the encoder's, so the weights of one load into the other.
    Where clips are of one size and keep equally many tokens, it computes what `Encoder` does.

    Args:
        config: as for `Encoder`. Of the sizes in it only learned positions depend.
    """

    @classmethod
    def from_encoder(cls, encoder: Encoder) -> "MaskedEncoder":
        """A masked encoder that shares its parameters with `encoder`, or with a whole autoencoder.

        What trains one trains the other.
        """
        with torch.device("meta"):
            made = cls(encoder.config)
        for name in made._modules:
            made._modules[name] = encoder._modules[name]
        for name in made._buffers:
            made._buffers[name] = encoder._buffers[name]
        return made.train(encoder.training)

    def forward(  # type: ignore[override]
        self,
        video_uint8: Clips | None = None,
        audio: Clips | None = None,
        keep: Keep | Mapping[Modality, Keep] | None = None,
    ) -> PackedTokens:
        """Return the features of the visible tokens of every clip, packed.

        Clips of one tensor with `keep` of one index tensor are embedded at once; otherwise each
        clip is embedded by a call of its own. The blocks run on all clips at once in either case.
        `prefix_tokens` come first among those of a clip and modality, numbered -1, -2, ...

        Args:
            video_uint8: [B, T, H, W, 3], or a list of B clips [T, H, W, 3] of any sizes that are
                multiples of the tubelet; uint8, or floating in [-1, 1].
            audio: standardised log-mel, [B, frames, F], or a list of B clips [frames, F].
                Each is for a model with that modality; one that has both takes either alone too.
            keep: which tokens to look at, in a mapping by modality where both are given: token
                numbers [B, V] int64, or a list of B index tensors [V_b] (empty where a clip lacks
                the modality), or masks, bool [B, N] or a list of [N_b], True where a token is
                visible. Masks are read on the host, which waits for a GPU; index tensors are not,
                and their values are checked on a CPU only. None looks at all tokens.

        Raises:
            ValueError: an input is superfluous or none is given; a shape or dtype is not as above;
                a token number lies outside its grid; or positions are learned and a clip has
                another grid than the model was made for.
        """
        given = {"video": video_uint8, "audio": audio}
        clips: dict[Modality, Clips] = {m: x for m in MODALITIES if (x := given[m]) is not None}
        if not clips:
            raise ValueError("MaskedEncoder wants video_uint8, audio or both, got neither")
        kept = by_modality(keep, clips)
        visible = {m: self._visible(m, x, kept[m]) for m, x in clips.items()}
        counts = {m: len(v.grids) for m, v in visible.items()}
        if min(counts.values()) != max(counts.values()):
            raise ValueError(f"video and audio differ in their number of clips: {counts}")
        if min(counts.values()) == 0:
            raise ValueError("MaskedEncoder wants at least one clip, got an empty batch")
        return self._encode_packed(visible)

    def _visible(self, m: Modality, clips: Clips, keep: Keep | None) -> Visible:
        if m not in self.config.modalities:
            raise ValueError(f"{m}: this model was configured without {m}")
        whole = isinstance(self.config.input(m), VideoConfig)
        grids = grids_of(m, clips, patch_of(self.config, m), whole)
        return choose_visible(m, clips, grids, keep)

    def _encode_packed(self, visible: Mapping[Modality, Visible]) -> PackedTokens:
        tokens = {m: self._embed_packed(m, v) for m, v in visible.items()}
        prefix = self.config.prefix_tokens
        lengths = {m: [prefix + n for n in v.lengths] for m, v in visible.items()}
        # Kernels are compiled for a fixed length: only where the caller says that it is one.
        fixed = all(v.together is not None for v in visible.values())
        if self.config.fusion in ("separate", "mid"):
            tokens = {
                m: self.encoder[m](x, _layout(x, lengths[m], fixed)) for m, x in tokens.items()
            }
        by_clip = list(zip(*lengths.values(), strict=True))
        packed = _clip_by_clip(tokens, lengths)
        together = _layout(packed, [sum(counts) for counts in by_clip], fixed)
        if "both" in self.encoder:
            layout = together
            if self.config.fusion == "shared":
                layout = _layout(packed, [n for counts in by_clip for n in counts], fixed)
            packed = self.encoder["both"](packed, layout)
        index = {m: _with_prefix(v.index, prefix) for m, v in visible.items()}
        return PackedTokens(packed, together, index, {m: v.grids for m, v in visible.items()})

    def _embed_packed(self, m: Modality, visible: Visible) -> Tensor:
        """Tokens of one modality, clip after clip, [T, D]."""
        linear = cast(nn.Linear, self.patch_embed[m])
        weights, patch = (linear.weight, linear.bias), patch_of(self.config, m)
        tables: dict[tuple[int, ...], Tensor] = {}
        embedded = []
        for clips, index, grid in visible.batches():
            if grid not in tables:
                tables[grid] = self._positions(m, grid)
            ahead, places = tables[grid].tensor_split([self.config.prefix_tokens])
            x = patch_embed_visible(clips, index, *weights, places, patch)
            if self.config.prefix_tokens:
                prefix = (self.prefix_token[m] + ahead).to(x.dtype).expand(len(x), -1, -1)
                x = torch.cat([prefix, x], dim=1)
            embedded.append(x.flatten(0, 1))
        return torch.cat(embedded)

    def _positions(self, m: Modality, grid: tuple[int, ...]) -> Tensor:
        """What is added to each prefix token and each token of a grid, [prefix_tokens + N, D]."""
        kind, trained = self.config.positions, self.config.input(m).grid
        if kind == "learned" and grid != trained:
            raise ValueError(
                f"{m}: a clip has the grid {grid}, positions were learned for {trained}; a model "
                "with positions = 'sincos1d' or 'sincos_grid' takes any"
            )
        pos: Tensor = self.pos_embed[m] if kind == "learned" else self.get_buffer(f"pos_{m}")
        if grid != trained:
            # A compiler traces the computation; a cache would stop it.
            table = _table if torch.compiler.is_compiling() else _kept_table
            pos = table(kind, grid, pos.shape[1], pos.dtype, pos.device)
            # Prefix tokens have no place.
            pos = F.pad(pos, (0, 0, self.config.prefix_tokens, 0))
        return pos + self.modality_token[m] if self.config.modality_tokens else pos


def _table(
    kind: Positions, grid: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    on_grid = kind == "sincos_grid"
    table = sincos_grid(grid, width) if on_grid else sincos1d(math.prod(grid), width)
    return torch.from_numpy(table).to(device, dtype)


@functools.lru_cache(_TABLES)
def _kept_table(*arguments: Any) -> Tensor:
    # Of use for training too, whoever asks first.
    with torch.inference_mode(False):
        return _table(*arguments)


def _with_prefix(index: tuple[Tensor, ...], prefix: int) -> tuple[Tensor, ...]:
    if not prefix:
        return index
    numbers = -1 - torch.arange(prefix, device=index[0].device)
    return tuple(torch.cat([numbers, own]) for own in index)


def _layout(packed: Tensor, lengths: list[int], fixed: bool) -> TokenLayout:
    if fixed and all(length == lengths[0] for length in lengths):
        return TokenLayout.fixed(len(lengths), lengths[0], packed.device)
    return TokenLayout.varying(lengths, packed.device)


def _clip_by_clip(
    tokens: Mapping[Modality, Tensor], lengths: Mapping[Modality, list[int]]
) -> Tensor:
    """The modalities of each clip side by side, [T, D], from those of all clips one by one."""
    parts = [x.split(lengths[m]) for m, x in tokens.items()]
    if len(parts) == 1:
        return next(iter(tokens.values()))
    return torch.cat([part for of_clip in zip(*parts, strict=True) for part in of_clip])
