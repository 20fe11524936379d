"""The pretrained weights that fine-tuning starts from, wherever they lie."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avmae_fast.config import ConfigError, ModelConfig
from avmae_fast.config_file import model_from_dict
from avmae_fast.models.pretrained import CONFIG, WEIGHTS, PretrainedError
from avmae_fast.train.checkpoint import CheckpointError, damage, newest_verified
from avmae_fast.train.export import ENCODER
from avmae_fast.train.run_folder import RUN, checkpoints_in

_STATE = "state.json"


@dataclass(frozen=True)
class InitialWeights:
    """weights: by state-dict name. config: what was pretrained. source: the file they are from."""

    weights: Mapping[str, Tensor]
    config: ModelConfig
    source: Path


def load_initial_weights(path: Path) -> InitialWeights:
    """The weights at `path`: a run's folder, an encoder's, a checkpoint's, or a weights file.

    A run gives the encoder it left, or what its newest checkpoint that verifies holds. Beside a
    file must lie the config.json or the state.json it was written with.

    Raises:
        ConfigError: there is nothing of the kind, or it holds a classifier.
        CheckpointError, PretrainedError: it is damaged.
    """
    if path.is_file():
        return _read(path.parent, path)
    if not path.is_dir():
        raise _bad(path, "it does not exist")
    if (path / RUN).is_file():
        if (path / ENCODER / WEIGHTS).is_file():
            return _read(path / ENCODER, path / ENCODER / WEIGHTS)
        folder, refused = newest_verified(checkpoints_in(path))
        if folder is None:
            reasons = "; ".join(map(str, refused)) or "there is none"
            raise CheckpointError(f"no checkpoint of {path} can be used ({reasons})")
        return _read(folder, folder / WEIGHTS)
    return _read(path, path / WEIGHTS)


def _read(folder: Path, weights: Path) -> InitialWeights:
    """A weights file and what the JSON file beside it says that it is."""
    if (folder / _STATE).is_file():
        if reason := damage(folder):
            raise CheckpointError(f"{folder} cannot be used: {reason}")
        record = json.loads((folder / _STATE).read_text())["config"]
    elif (folder / CONFIG).is_file():
        record = _json(folder / CONFIG)
    else:
        raise _bad(folder, f"it holds no {RUN}, {CONFIG} or {_STATE}")
    if "finetune" in record or record.get("architecture") == "Classifier":
        raise _bad(folder, "it holds a classifier, which only --resume goes on with")
    if "model" not in record:
        raise _bad(folder, f"its {CONFIG} describes no model of avmae_fast (see avmae convert)")
    try:
        return InitialWeights(load_file(weights), model_from_dict(record["model"]), weights)
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{weights} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PretrainedError(f"{path} is damaged: {error}") from error


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"finetune.init = {str(path)!r} is not valid: {why}; it must be the folder of a "
        "pretraining run, of an encoder or of a checkpoint, or a weights file in one"
    )
