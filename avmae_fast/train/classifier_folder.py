"""The classifier a fine-tuning run leaves behind, in the folder `classifier/` of the run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avmae_fast.config import ConfigError
from avmae_fast.config_file import finetune_from_dict
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.models import Classifier
from avmae_fast.models.pretrained import CONFIG, WEIGHTS, PretrainedError, save_finetuned
from avmae_fast.train.run_folder import CLASSIFIER, RUN, RunFolderError


@dataclass(frozen=True)
class FinetunedModel:
    """model: in evaluation mode. config: the run that made it. classes: names, in order."""

    model: Classifier
    config: FinetuneConfig
    classes: tuple[str, ...]


def save_classifier(
    config: FinetuneConfig,
    classes: tuple[str, ...],
    weights: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Write a run's classifier into its folder; one that is there already is replaced.

    Args:
        record: what else config.json should say, such as the step and the versions.
    """
    save_finetuned(config.train.out / CLASSIFIER, config, classes, weights, record)


def load_classifier(path: Path) -> FinetunedModel:
    """The classifier of a finished fine-tuning run, or of a folder `classifier/`, on the CPU.

    Raises:
        RunFolderError: there is none.
        PretrainedError: it is damaged.
    """
    folder = path / CLASSIFIER if (path / RUN).is_file() else path
    if not (folder / CONFIG).is_file():
        what = "a finished fine-tuning run" if folder != path else "a run or of a classifier"
        raise RunFolderError(f"{str(path)!r} is not the folder of {what}: there is no {folder}")
    try:
        record = json.loads((folder / CONFIG).read_text())
        if record.get("architecture") != "Classifier":
            raise RunFolderError(f"{folder} holds an {record.get('architecture')}, no classifier")
        config = finetune_from_dict(record["run"])
        model = Classifier(config.model)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, SafetensorError, ConfigError, RuntimeError) as error:
        raise PretrainedError(f"{folder} holds no classifier that can be used: {error}") from error
    except json.JSONDecodeError as error:
        raise PretrainedError(f"{folder / CONFIG} is damaged: {error}") from error
    return FinetunedModel(model.eval(), config, tuple(record["classes"]))
