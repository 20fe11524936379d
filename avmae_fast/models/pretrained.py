"""Models in folders, in the convention of Hugging Face.

    config.json          the class of the model, its configuration, and where it came from
    model.safetensors    its weights, by state-dict name
    left_out.safetensors what converted weights held besides, as the scores of a classifier

A folder is written beside its place and moved there whole: a reader finds the old one or the new.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avmae_fast.config import ConfigError, ModelConfig
from avmae_fast.config_file import model_from_dict, to_dict
from avmae_fast.finetune_config import ClassifierConfig, FinetuneConfig

CONFIG, WEIGHTS, LEFT_OUT = "config.json", "model.safetensors", "left_out.safetensors"


class PretrainedError(ValueError):
    """A folder holds no model that can be used; the text says what is wrong with it."""


class Pretrained(nn.Module):
    """A module made from a `ModelConfig`, with `save_pretrained` and `from_pretrained`."""

    config: ModelConfig

    def save_pretrained(self, folder: Path | str, record: Mapping[str, Any] | None = None) -> None:
        """Write the model to `folder`; what is there already is replaced.

        Args:
            folder: the folder to write; it may hold nothing but an earlier model.
            record: what else config.json should say, such as where the weights came from.

        Raises:
            PretrainedError: the folder holds other files.
        """
        save_model(folder, type(self).__name__, self.config, self.state_dict(), record)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model of a folder, in evaluation mode on the CPU.

        An `Encoder` is also read from the folder of a whole autoencoder.

        Args:
            folder: a local folder, else the name of a model on the Hugging Face hub, which is
                fetched with the package huggingface_hub.

        Raises:
            FileNotFoundError: there is no such folder.
            PretrainedError: its files are damaged, or another model's.
        """
        config, weights, record = load_model(_local(folder))
        # Each layer has weights: a configuration of a billion layers is not even tried.
        if (layers := max(config.encoder.layers, config.decoder.layers)) > len(weights):
            raise PretrainedError(
                f"the weights in {folder} do not fit {CONFIG}: {layers} layers, "
                f"{len(weights)} tensors"
            )
        try:
            model = cls(config)
        except (ValueError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
            what = f"{Path(folder) / CONFIG} asks for a model that cannot be made"
            raise PretrainedError(f"{what}: {type(error).__name__} {str(error)[:200]}") from error
        names = model.state_dict().keys()
        if missing := sorted(names - weights.keys()):
            raise PretrainedError(
                f"{folder} holds no {cls.__name__}: it is the {record.get('architecture')} of "
                f"{len(weights)} tensors, and {len(missing)} more are wanted, as {missing[0]}"
            )
        try:
            model.load_state_dict({name: weights[name] for name in names})
        except RuntimeError as error:
            raise PretrainedError(
                f"the weights in {folder} do not fit {CONFIG}: {error}"
            ) from error
        return model.eval()


def save_model(
    folder: Path | str,
    architecture: str,
    config: ModelConfig | ClassifierConfig,
    weights: Mapping[str, Tensor],
    record: Mapping[str, Any] | None = None,
    left_out: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a model, as `Pretrained.save_pretrained` does."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or _others(folder)):
        raise PretrainedError(f"{folder} is in the way: it is not the folder of an earlier model")
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Tensors that share memory, or are views of larger ones, are written on their own.
    own = {name: x.detach().cpu().contiguous().clone() for name, x in weights.items()}
    save_file(own, partial / WEIGHTS, metadata={"format": "pt"})
    if left_out:
        save_file({n: x.contiguous().clone() for n, x in left_out.items()}, partial / LEFT_OUT)
    text = {"architecture": architecture, "model": to_dict(config), **(record or {})}
    (partial / CONFIG).write_text(json.dumps(text, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save_finetuned(
    folder: Path,
    run: FinetuneConfig,
    classes: Sequence[str],
    weights: Mapping[str, Tensor],
    record: Mapping[str, Any],
    left_out: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a `Classifier`, the run that made it and the names of its classes."""
    record = {**record, "classes": list(classes), "run": to_dict(run)}
    save_model(folder, "Classifier", run.model, weights, record, left_out)


def architecture_of(folder: Path) -> str | None:
    """The class of the model in a folder; None where there is no model of ours."""
    try:
        record = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and "model" in record
    return record.get("architecture") if ours else None


def load_left_out(folder: Path) -> dict[str, Tensor]:
    """What converted weights held besides the model's."""
    return load_file(folder / LEFT_OUT) if (folder / LEFT_OUT).is_file() else {}


def load_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, weights and the whole of config.json.

    Raises:
        FileNotFoundError: the folder, or one of its files, is absent.
        PretrainedError: a file is damaged, or config.json describes no model of ours.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not the folder of a model")
    try:
        record = json.loads((folder / CONFIG).read_text())
        config = model_from_dict(record["model"])
        return config, load_file(folder / WEIGHTS), record
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise PretrainedError(f"{folder / CONFIG} is not valid: {error}") from error
        raise PretrainedError(
            f"{folder} holds no model of avmae_fast: {type(error).__name__} {error}"
        ) from error


def _others(folder: Path) -> bool:
    return any(path.name not in (CONFIG, WEIGHTS, LEFT_OUT) for path in folder.iterdir())


def _local(folder: Path | str) -> Path:
    """The folder itself, or where huggingface_hub put the model of that name."""
    if Path(folder).exists():
        return Path(folder)
    name = str(folder)
    if isinstance(folder, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name!r} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name!r} is no local folder; if it is a model on the Hugging Face hub, "
            "pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
