"""The encoder a run leaves behind, in the folder `encoder/` of the run, and how to load it."""

from pathlib import Path
from typing import Any

from avmae_fast.config import Config
from avmae_fast.models import AudiovisualMAE, Encoder
from avmae_fast.models.pretrained import save_model

ENCODER = "encoder"

# First parts of the state-dict names that an `Encoder` has; the rest is the decoder's.
_ENCODER_PARTS = ("patch_embed", "encoder", "modality_token", "prefix_token", "pos_embed")


def export_encoder(
    model: AudiovisualMAE, config: Config, folder: Path, provenance: dict[str, Any]
) -> None:
    """Write the encoder's weights and what is needed to use them.

    Args:
        folder: that of the run; `encoder/` goes into it, and replaces one that is there.
        provenance: what else its config.json should hold, such as the step and the versions.
    """
    chosen = encoder_names(model)
    weights = {name: x for name, x in model.state_dict().items() if name in chosen}
    # How frames and sound are sampled belongs to the input as much as their size does.
    data = {"fps": config.data.fps, "stride": config.data.stride}
    record = {**provenance, "data": data}
    save_model(folder / ENCODER, "Encoder", config.model, weights, record)


def encoder_names(model: AudiovisualMAE) -> set[str]:
    """State-dict names of the part of a model that is its encoder."""
    return {name for name in model.state_dict() if name.split(".")[0] in _ENCODER_PARTS}


def load_encoder(folder: Path | str) -> Encoder:
    """The encoder that a run left in its folder, in evaluation mode on the CPU.

    `encoder.config` holds the geometry of its inputs and the audio standardisation.

    Raises:
        FileNotFoundError: the folder holds no encoder.
    """
    return Encoder.from_pretrained(Path(folder) / ENCODER)
