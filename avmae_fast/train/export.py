"""The encoder a run leaves behind: encoder.safetensors and encoder.json, and how to load it."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from avmae_fast.config import Config
from avmae_fast.config_file import model_from_dict, to_dict
from avmae_fast.models import AudiovisualMAE, Encoder

_WEIGHTS = "encoder.safetensors"
_RECORD = "encoder.json"

# First parts of the state-dict names that an `Encoder` has; the rest is the decoder's.
_ENCODER_PARTS = ("patch_embed", "encoder", "modality_token", "pos_embed")


def export_encoder(
    model: AudiovisualMAE, config: Config, folder: Path, provenance: dict[str, Any]
) -> None:
    """Write the encoder's weights and what is needed to use them.

    Args:
        folder: where encoder.safetensors and encoder.json go; ones that are there are replaced.
        provenance: what else encoder.json should hold, such as the step and the versions.
    """
    chosen = encoder_names(model)
    weights = {n: x.cpu().contiguous() for n, x in model.state_dict().items() if n in chosen}
    # How frames and sound are sampled belongs to the input as much as their size does.
    data = {"fps": config.data.fps, "stride": config.data.stride}
    record = {**provenance, "model": to_dict(config.model), "data": data}
    partial = folder / f".partial-{_WEIGHTS}"
    save_file(weights, partial)
    os.replace(partial, folder / _WEIGHTS)
    partial = folder / f".partial-{_RECORD}"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, folder / _RECORD)


def encoder_names(model: AudiovisualMAE) -> set[str]:
    """State-dict names of the part of a model that is its encoder."""
    return {name for name in model.state_dict() if name.split(".")[0] in _ENCODER_PARTS}


def load_encoder(folder: Path | str) -> Encoder:
    """The encoder that a run left in its folder, in evaluation mode on the CPU.

    `encoder.config` holds the geometry of its inputs and the audio standardisation.

    Raises:
        FileNotFoundError: the folder has no encoder.safetensors or no encoder.json.
    """
    record = json.loads((Path(folder) / _RECORD).read_text())
    encoder = Encoder(model_from_dict(record["model"]))
    encoder.load_state_dict(load_file(Path(folder) / _WEIGHTS))
    return encoder.eval()
