"""An encoder as a program of `torch.export`: a graph of operations that needs none of its code.

It calls the operations of `avmae_kernels`, which importing `avmae_fast.models` registers: do that
before a saved program is loaded.
"""

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from avmae_fast.models import Encoder
from avmae_fast.models.encoder import input_shape

# What the sizes of a batch are traced with: 0 and 1 would be taken for constants.
_TRACED_CLIPS = 2


def export_program(encoder: Encoder, pixels: torch.dtype = torch.uint8) -> ExportedProgram:
    """The encoder on all tokens of any number of clips.

    `program.module()(video, audio)` returns what `encoder(video, audio)` does, without gradients;
    a model of one modality takes it by name, as in `module(audio=audio)`.

    Args:
        encoder: in evaluation mode or not; its weights go into the program.
        pixels: dtype of the video, which the program is bound to.
    """
    device = next(encoder.parameters()).device
    clips = Dim("clips", min=1)
    inputs: dict[str, Tensor] = {}
    for m in encoder.config.modalities:
        shape = _TRACED_CLIPS, *input_shape(encoder.config.input(m))
        inputs[m] = torch.zeros(shape, dtype=pixels if m == "video" else None, device=device)
    shapes = {m: {0: clips} for m in inputs}
    with torch.no_grad():
        return torch.export.export(encoder, (), inputs, dynamic_shapes=shapes)
