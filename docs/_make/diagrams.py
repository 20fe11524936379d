"""The pictures of the kernel guide: `python docs/_make/diagrams.py` writes docs/pictures/*.svg.

What can be computed is computed by the code that the pictures explain.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from svg import AUDIO, MASKED, PLAIN, VIDEO, WORK, Picture

from avmae_kernels.attention_layout import SLOT, slot_owners_reference
from avmae_kernels.masking import MaskSpec, sample_masks

PICTURES = Path(__file__).parents[1] / "pictures"
_COLOURS = (VIDEO, AUDIO, WORK)


def slots() -> Picture:
    """Three sequences, the slots they own, and the tiles of programs."""
    lengths, scale, left = (306, 157, 40), 0.9, 90
    offsets = [0, *itertools.accumulate(lengths)]
    owners = slot_owners_reference(torch.tensor(offsets, dtype=torch.int32), offsets[-1]).tolist()
    picture = Picture(720, 190, "Sequences, slots and tiles of packed attention")
    picture.text(10, 44, "rows")
    for s, (start, length) in enumerate(zip(offsets, lengths, strict=False)):
        words = f"sequence {s}: {length}" if length > 99 else str(length)
        picture.box(left + start * scale, 24, length * scale, 32, _COLOURS[s], words)
    picture.text(10, 104, "slots")
    width = 620 / len(owners)
    for slot, owner in enumerate(owners):
        colour = _COLOURS[owner] if owner < len(lengths) else MASKED
        first = owners.index(owner)
        rows = lengths[owner] if owner < len(lengths) else 0
        used = max(0, min(SLOT, rows - SLOT * (slot - first)))
        picture.box(left + slot * width, 84, width - 4, 32, PLAIN)
        if used:
            picture.box(left + slot * width, 84, (width - 4) * used / SLOT, 32, colour)
        words = f"of {owner}: {used}" if owner < len(lengths) else "past the end"
        picture.text(left + slot * width + (width - 4) / 2, 104, words, "middle")
    picture.text(10, 150, "tiles")
    for tile in range(2 * len(owners)):
        picture.box(left + tile * width / 2, 134, width / 2 - 4, 24, PLAIN, "64")
    formula = " + ".join(f"{n}" for n in (offsets[-1] // SLOT, len(lengths), 1))
    picture.text(
        left,
        180,
        f"{offsets[-1]} rows in {len(lengths)} sequences: {formula} = {len(owners)} slots",
    )
    return picture


def scores() -> Picture:
    """Which tiles of the matrix of scores are computed, padded and packed."""
    lengths, cell = (5, 2, 3), 13
    longest, total = max(lengths), sum(lengths)
    picture = Picture(560, 215, "Scores computed with padding and packed")
    padded = len(lengths) * longest**2
    picture.text(20, 20, f"padded: {padded} tiles")
    for s, length in enumerate(lengths):
        for i, j in itertools.product(range(longest), repeat=2):
            colour = _COLOURS[s] if max(i, j) < length else MASKED
            picture.box(20 + (s * (longest + 1) + j) * cell, 34 + i * cell, cell, cell, colour)
    picture.text(300, 20, f"packed: {sum(n * n for n in lengths)} tiles of {total**2}")
    starts = [0, *itertools.accumulate(lengths)]
    picture.box(300, 34, total * cell, total * cell, PLAIN)
    for s, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        for i, j in itertools.product(range(length), repeat=2):
            x, y = 300 + (start + j) * cell, 34 + (start + i) * cell
            picture.box(x, y, cell, cell, _COLOURS[s])
    picture.text(20, 200, "grey: computed and thrown away; white: never touched")
    return picture


def gather() -> Picture:
    """Visible patches of a frame become rows of the matrix that is multiplied."""
    grid, cell = (6, 6), 22
    spec = MaskSpec("random", (1, *grid), 0.75)
    masks = sample_masks(spec, np.array([3]), seed=0, modality="video")
    visible = sorted(masks.visible[0].tolist())
    picture = Picture(720, 230, "Visible patches are gathered, normalised and multiplied")
    picture.text(20, 22, "uint8 frames, most patches masked")
    for token in range(math.prod(grid)):
        row, column = divmod(token, grid[1])
        seen = token in visible
        words = str(token) if seen else ""
        box = 20 + column * cell, 34 + row * cell, cell, cell
        picture.box(*box, VIDEO if seen else MASKED, words)
    picture.arrow(160, 100, 240, 100)
    picture.text(200, 90, "gather", "middle")
    picture.text(200, 118, "x * 2/255 - 1", "middle")
    picture.text(250, 22, f"bf16 [{len(visible)}, patch values]")
    for i, token in enumerate(visible):
        picture.box(250, 34 + 16 * i, 110, 16, VIDEO, str(token))
    picture.arrow(365, 100, 425, 100)
    picture.text(395, 90, "cuBLAS", "middle")
    picture.box(430, 34, 90, 16 * len(visible), PLAIN, "product")
    picture.arrow(525, 100, 585, 100)
    picture.text(555, 84, "+ bias", "middle")
    picture.text(555, 118, "+ position", "middle")
    picture.box(590, 34, 90, 16 * len(visible), VIDEO, "tokens")
    picture.text(
        20, 215, "Masked patches are neither read nor converted; no tensor of all patches exists."
    )
    return picture


def assembly() -> Picture:
    """The decoder's sequence of one clip."""
    spec = MaskSpec("random", (1, 3, 4), 0.6)
    masks = sample_masks(spec, np.array([1]), seed=0, modality="video")
    visible, masked = masks.visible[0].tolist(), masks.masked[0].tolist()
    cell = 48
    picture = Picture(720, 200, "How the decoder's sequence is put together")
    for i, token in enumerate([*visible, *masked]):
        seen = i < len(visible)
        x = 100 + i * cell
        picture.box(x, 24, cell, 26, VIDEO if seen else MASKED, "token" if seen else "[mask]")
        picture.text(x + cell / 2, 68, "+", "middle")
        picture.box(x, 76, cell, 26, PLAIN, f"pos {token}")
        picture.arrow(x + cell / 2, 104, x + cell / 2, 128)
        picture.box(x, 130, cell, 26, VIDEO if seen else MASKED, str(token))
    picture.text(10, 42, "what")
    picture.text(10, 94, "where")
    picture.text(10, 148, "one pass")
    end = 100 + len(visible) * cell
    picture.text(100, 178, f"{len(visible)} encoded tokens: keys and values")
    picture.text(end, 178, f"{len(masked)} mask tokens: the tail, which the loss looks at")
    return picture


def seam() -> Picture:
    """What lies between two products of a block, in separate operations and in one."""
    picture = Picture(720, 220, "The seam between two sub-layers")
    steps = ["times keep", "plus x", "LayerNorm", "to bf16"]
    picture.text(20, 24, "apart: every arrow is a tensor written to memory and read again")
    picture.box(20, 40, 80, 40, WORK, "proj + bias")
    for i, step in enumerate(steps):
        x = 126 + i * 124
        picture.arrow(x - 25, 60, x - 2, 60)
        picture.box(x, 44, 98, 32, PLAIN, step)
    picture.arrow(597, 60, 622, 60)
    picture.box(624, 40, 70, 40, WORK, "fc1")
    picture.text(20, 124, "add_layer_norm: the row stays in registers")
    picture.box(20, 140, 80, 40, WORK, "proj")
    picture.arrow(101, 160, 170, 160)
    picture.text(135, 152, "update", "middle")
    words = "add bias, scale, add to x, round once,\nmean and variance in fp32, normalise"
    picture.box(172, 136, 390, 48, VIDEO, words)
    picture.arrow(563, 160, 622, 160)
    picture.text(593, 152, "bf16", "middle")
    picture.box(624, 140, 70, 40, WORK, "fc1")
    picture.arrow(367, 185, 367, 208)
    picture.text(375, 204, "x + update, fp32: the residual stream")
    return picture


def gelu() -> Picture:
    """The activation, and what is kept of it."""
    picture = Picture(720, 130, "What bias_gelu reads, writes and keeps")
    picture.box(20, 30, 90, 40, WORK, "fc1\nz = x W")
    picture.arrow(111, 50, 178, 50)
    picture.text(144, 42, "z, bf16", "middle")
    picture.box(180, 26, 230, 48, VIDEO, "bias_gelu: gelu(z + bias)\nin fp32, rounded once")
    picture.arrow(411, 50, 478, 50)
    picture.box(480, 30, 90, 40, WORK, "fc2")
    picture.arrow(295, 75, 295, 100)
    picture.text(295, 118, "kept: z and bias; the slope is computed anew", "middle")
    return picture


def loss() -> Picture:
    """The reconstruction loss and its gradient."""
    picture = Picture(720, 210, "The reconstruction loss")
    picture.box(20, 24, 150, 36, VIDEO, "uint8 clip")
    picture.box(20, 84, 150, 36, PLAIN, "scored token numbers")
    picture.box(20, 144, 150, 36, WORK, "predictions")
    for y in (42, 102, 162):
        picture.arrow(171, y, 218, 102)
    picture.box(
        220,
        62,
        210,
        80,
        VIDEO,
        "one row a scored token:\ntarget in registers,\nits mean and spread,\nprediction - target",
    )
    picture.arrow(431, 86, 488, 58)
    picture.box(490, 36, 210, 40, PLAIN, "differences (the gradient,\nbut for a factor)")
    picture.arrow(431, 118, 488, 146)
    picture.box(490, 124, 210, 40, PLAIN, "a partial sum of squares\na program")
    picture.arrow(595, 165, 595, 184)
    picture.text(595, 198, "one block adds them up in order", "middle")
    return picture


DIAGRAMS: dict[str, Callable[[], Picture]] = {
    "slots": slots,
    "scores": scores,
    "gather": gather,
    "assembly": assembly,
    "seam": seam,
    "gelu": gelu,
    "loss": loss,
}


def main() -> None:
    for name, draw in DIAGRAMS.items():
        (PICTURES / f"{name}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()
