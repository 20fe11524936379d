"""Position tables: recognised where they are sines and cosines, resized where that is asked for.

Shape letters: P prefix tokens, N tokens of the grid, D width.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_fast.config import AudioConfig, Modality, ModelConfig, VideoConfig
from avmae_fast.interop.entries import ConvertError
from avmae_fast.models.encoder import position_table

# Stored in float32, computed by formulas of their own: an angle of up to a hundred loses two digits
# of the seven.
_TABLE_TOLERANCE = 1e-5


def recognise(
    state: dict[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """The same model without the learned tables that are sines and cosines of the grid.

    Returns:
        state and configuration, and what to tell the user.
    """
    notes = []
    for owner, field in (("pos_embed", "positions"), ("decoder_pos_embed", "decoder_positions")):
        tables = {n: x for n, x in state.items() if n.split(".")[0] == owner}
        if not tables or getattr(config, field) != "learned":
            continue
        fixed = "sincos_grid" if field == "positions" else "fixed"
        fits = all(_is_sincos(x, config, n.split(".")[1]) for n, x in tables.items())
        # The decoder's fixed tables are of the encoder's kind.
        if fits and (field == "positions" or config.positions == "sincos_grid"):
            state = {n: x for n, x in state.items() if n not in tables}
            config = replace(config, **{field: fixed})  # type: ignore[arg-type]
            notes.append(f"{owner}: sines and cosines of the grid, computed anew")
        else:
            notes.append(f"{owner}: kept as a learned table")
    return state, config, notes


def write_out(
    state: Mapping[str, Tensor], config: ModelConfig, decoder: bool
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Undo `recognise`: fixed tables become stored ones."""
    full = dict(state)
    parts = [("pos_embed", "positions", config.encoder.width)]
    if decoder:
        parts.append(("decoder_pos_embed", "decoder_positions", config.decoder.width))
    learned = config
    for owner, field, width in parts:
        if getattr(config, field) == "learned":
            continue
        for m in config.modalities:
            full[f"{owner}.{m}"] = _fixed(config, m, width)
        learned = replace(learned, **{field: "learned"})  # type: ignore[arg-type]
    return full, learned


def resize(
    state: dict[str, Tensor], config: ModelConfig, spec: VideoConfig | AudioConfig
) -> dict[str, Tensor]:
    """Learned tables for another grid: cubic within a picture or spectrogram, linear in time.

    Args:
        spec: the input the model is to have.
    """
    m: Modality = "video" if isinstance(spec, VideoConfig) else "audio"
    resized = dict(state)
    for owner in ("pos_embed", "decoder_pos_embed"):
        if f"{owner}.{m}" in state:
            table = state[f"{owner}.{m}"]
            prefix, places = table.split([config.prefix_tokens, len(table) - config.prefix_tokens])
            grown = _resized(places, config.input(m).grid, spec.grid)
            resized[f"{owner}.{m}"] = torch.cat([prefix, grown.to(table.dtype)])
    return resized


def join_tables(space: Tensor, time: Tensor, prefix: Tensor) -> Tensor:
    """[1, P + T S, D] from tables of S places, T times and P prefix tokens, [1, ., D] each."""
    places = (time[:, :, None] + space[:, None]).flatten(1, 2)
    return torch.cat([prefix, places], dim=1)


def split_table(table: Tensor, times: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `join_tables`: tables of places, times and prefix tokens.

    Raises:
        ConvertError: the table is no sum of the two.
    """
    first, places = table.split([prefix, table.shape[1] - prefix], dim=1)
    grid = places.double().unflatten(1, (times, -1))
    # A constant may go to either; the first time gets none, so that the split is always the same.
    time = (grid - grid[:, :1]).mean(2)
    space = (grid - time[:, :, None]).mean(1)
    left = grid - time[:, :, None] - space[:, None]
    # Three roundings of float32 at the size of the entries.
    if left.abs().max() > 4 * torch.finfo(torch.float32).eps * max(1.0, float(grid.abs().max())):
        raise ConvertError("the positions are not a table of places plus a table of times")
    return space.to(table.dtype), time.to(table.dtype), first


def _fixed(config: ModelConfig, m: Modality, width: int) -> Tensor:
    positions = "sincos1d" if config.positions == "learned" else config.positions
    return position_table(replace(config, positions=positions), m, width)


def _is_sincos(table: Tensor, config: ModelConfig, m: str) -> bool:
    modality: Modality = "video" if m == "video" else "audio"
    width = table.shape[1]
    if width < 2 * len(config.input(modality).grid):
        return False
    fixed = position_table(replace(config, positions="sincos_grid"), modality, width)
    return bool((table.float() - fixed).abs().max() <= _TABLE_TOLERANCE)


def _resized(places: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """[N, D] on another grid."""
    grid = places.float().T.unflatten(1, old)
    if len(old) == 3:
        space = F.interpolate(grid.transpose(0, 1), new[1:], mode="bicubic", antialias=False)
        time = space.transpose(0, 1).flatten(2).transpose(1, 2)
        grid = F.interpolate(time, new[0], mode="linear").transpose(1, 2).unflatten(2, new[1:])
    else:
        grid = F.interpolate(grid[None], new, mode="bicubic", antialias=False)[0]
    return grid.flatten(1).T
