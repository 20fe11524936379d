"""Files of weights: safetensors, PyTorch's own read without executing anything, Flax msgpack."""

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avmae_fast.interop.entries import ConvertError, listed
from avmae_fast.interop.flax_msgpack import read_flax

# Where training scripts keep the weights inside what they save, and what wrappers put before names.
_OUTER = ("model", "module", "model_state", "state_dict", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")
_TORCH = (".pt", ".pth", ".bin", ".tar", ".torch", ".ckpt")
_HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, or of a Hugging Face folder, by name; and the folder's config.json.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none.
        ConvertError: it is damaged, or a pickle that holds more than tensors.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        config = read_json(path / "config.json") | read_json(path / "preprocessor_config.json")
        found = [path / name for name in _HF_WEIGHTS if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither of {', '.join(_HF_WEIGHTS)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), config
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{path} is not a whole safetensors file: {error}") from error
    return _inner(_torch_load(path), path), config


def read_tree(path: Path) -> Any:
    """The tree of a Flax checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return read_flax(path)


def is_flax(path: Path) -> bool:
    """Whether a file begins as a MessagePack map does: no zip, no pickle and no safetensors do."""
    if not path.is_file() or path.suffix == ".safetensors" or path.suffix in _TORCH:
        return False
    with path.open("rb") as file:
        first = file.read(1)
    # A map of 1 to 15 entries, or one whose size follows in 16 or 32 bits.
    return first != b"" and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, or a PyTorch file where the name ends so; whole or not at all."""
    own = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in _TORCH:
        torch.save({"model": own}, partial)
    else:
        save_file(own, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def write_bytes(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConvertError(f"{path} holds {type(table).__name__}, want a table")
    return table


def _torch_load(path: Path) -> Any:
    try:
        # Training scripts save their arguments beside the weights: names and values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What torch itself goes on to advise is to execute the file.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {found[1]}" if found else "it is no pickle of torch.save"
        raise ConvertError(
            f"{path} is no file of tensors alone: {reason}. It is not read any further, since "
            "that could execute what it holds; save the tensors as safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ConvertError(f"{path} is not a whole file of torch.save: {reason}") from error


def _inner(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The flat map of tensors inside what a training script saved."""
    for name in _OUTER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping):
        raise ConvertError(f"{path} holds {type(loaded).__name__}, want tensors by name")
    strange = sorted(str(name) for name, x in loaded.items() if not isinstance(x, Tensor))
    if strange or not loaded:
        raise ConvertError(f"{path} holds {listed(strange) or 'nothing'}, want tensors by name")
    return {unwrapped(str(name)): x for name, x in loaded.items()}


def unwrapped(name: str) -> str:
    """A parameter's name without what DataParallel, DDP and torch.compile put before it."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
