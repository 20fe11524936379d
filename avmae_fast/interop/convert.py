"""Files of weights from one format to another: what `avmae convert` does.

Nothing is ever unpickled into more than tensors, nothing is overwritten, and what is written
appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avmae_fast.interop import huggingface
from avmae_fast.interop.detect import FORMATS, detect
from avmae_fast.interop.entries import ConvertError, to_theirs
from avmae_fast.interop.exchange import Imported, export_weights, import_weights
from avmae_fast.interop.files import is_flax, read_tree, read_weights, write_bytes, write_weights
from avmae_fast.interop.finetuned import (
    FinetunedRun,
    export_classifier,
    import_classifier,
)
from avmae_fast.interop.flax_msgpack import pack_tree
from avmae_fast.interop.scenic import entries_of, read_leaves
from avmae_fast.interop.scenic_files import (
    ScenicShape,
    checkpoint,
    classifier_encoder_entries,
    family_of,
    finetuned_config,
    parameters,
    pretraining_config,
    split_classifier,
)
from avmae_fast.interop.vit import Shape
from avmae_fast.models.encoder import Encoder
from avmae_fast.models.pretrained import (
    CONFIG,
    WEIGHTS,
    architecture_of,
    load_left_out,
    load_model,
    save_model,
)

OURS, SCENIC = "avmae", "scenic"
ALL_FORMATS = (OURS, SCENIC, *FORMATS)
_FOLDERS = (OURS, "hf-vit", "hf-vitmae", "hf-videomae")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the caller says about the weights; see `import_weights` and `ScenicShape`.

    classifier: makes a classifier of a fine-tuned checkpoint of the authors' code.
    """

    shape: Shape = Shape()
    scenic: ScenicShape = ScenicShape()
    classifier: FinetunedRun | None = None
    pixels: str | None = None
    encoder_only: bool = False
    resize_to: tuple[int, ...] | None = None


def convert(
    source: Path, out: Path, read_as: str | None, write_as: str, wishes: Wishes | None = None
) -> list[str]:
    """Write the weights of `source` to `out` in another format.

    Args:
        source: a file, or a folder of ours or of Hugging Face.
        out: a folder for ours and Hugging Face's formats, else a file: safetensors, of PyTorch
            where its name ends so, or Flax msgpack for scenic. It must not exist.
        read_as, write_as: of `ALL_FORMATS`; `read_as` None finds it out.

    Returns:
        What was found, assumed and left out, a line each.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `source` does not.
        ConvertError: the weights cannot be read, or the format has no such model.
    """
    wishes = wishes or Wishes()
    for field, value in (("--from", read_as), ("--to", write_as)):
        if value is not None and value not in ALL_FORMATS:
            raise ConvertError(f"{field} {value!r} is not one of {', '.join(ALL_FORMATS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: it is not overwritten")
    if wishes.classifier is not None:
        _require_way(read_as or SCENIC, write_as, SCENIC, OURS)
        return import_classifier(read_tree(source), wishes.classifier, out)
    if architecture_of(source) == "Classifier":
        _require_way(read_as or OURS, write_as, OURS, SCENIC)
        write_bytes(out, pack_tree(export_classifier(source)))
        return [f"{source} is a classifier of ours"]
    found, model = _read(source, read_as, wishes)
    notes = [f"{source} is {found}" + ("" if read_as else ", told by its names"), *model.notes]
    return notes + _write(out, model, write_as, wishes)


def _require_way(read_as: str, write_as: str, source: str, target: str) -> None:
    """Raise ConvertError for a way that classifiers do not go."""
    if (read_as, write_as) != (source, target):
        raise ConvertError(
            f"--from {read_as!r} --to {write_as!r} is not a way for a whole classifier: one of "
            f"ours goes to {SCENIC!r}, a fine-tuned checkpoint with --classifier from {SCENIC!r}"
        )


def _read(source: Path, read_as: str | None, wishes: Wishes) -> tuple[str, Imported]:
    """The format of the weights, and the model they make."""
    if read_as == OURS or (read_as is None and architecture_of(source) is not None):
        return OURS, _asked_of(_read_ours(source), wishes)
    if read_as == SCENIC or (read_as is None and is_flax(source)):
        return SCENIC, _asked_of(import_scenic(read_tree(source), wishes.scenic), wishes)
    tensors, config = read_weights(source)
    found = read_as or detect(tensors, config)
    model = import_weights(
        tensors,
        found,
        shape=wishes.shape,
        pixels=wishes.pixels,
        encoder_only=wishes.encoder_only,
        resize_to=wishes.resize_to,
        config=config,
    )
    return found, model


def _asked_of(model: Imported, wishes: Wishes) -> Imported:
    """The model, without its decoder where only the encoder is asked for."""
    if not (wishes.encoder_only and model.decoder):
        return model
    names = Encoder(model.config).state_dict().keys()
    state = {name: x for name, x in model.state.items() if name in names}
    return replace(model, state=state, decoder=False, notes=[*model.notes, "left out: the decoder"])


def import_scenic(tree: Any, shape: ScenicShape) -> Imported:
    """A model of ours from the tree of a checkpoint of the authors' code.

    A classifier of one modality gives its encoder; its head is left out.

    Raises:
        ConvertError: the tree is of no model that ours can be.
    """
    leaves = parameters(tree)
    left_out: dict[str, Any] = {}
    if family_of(leaves):
        leaves, left_out = split_classifier(leaves)
        config, embedding = finetuned_config(leaves, shape)
        entries = classifier_encoder_entries(config, embedding)
        source = {"format": "scenic-finetuned", "embedding": embedding}
    else:
        config = pretraining_config(leaves, shape)
        entries, source = entries_of(config), {"format": SCENIC}
    state = read_leaves(leaves, entries)  # type: ignore[arg-type]
    whole = source["format"] == SCENIC
    notes = [f"{config.fusion} encoder, {config.decoding} decoder"] if whole else []
    if left_out:
        notes.append(f"left out: {sorted(left_out)}")
    kept = {name: _tensor(leaf) for name, leaf in left_out.items()}
    return Imported(config, state, whole, source, notes, kept)


def _write(out: Path, model: Imported, write_as: str, wishes: Wishes) -> list[str]:
    """Write the model; returns what its new code must be told."""
    if write_as == OURS:
        architecture = "AudiovisualMAE" if model.decoder else "Encoder"
        record = {"source": model.source}
        save_model(out, architecture, model.config, model.state, record, model.left_out)
        return []
    same = model.source.get("format") == write_as
    left_out = model.left_out if same else {}
    if write_as == SCENIC:
        write_bytes(out, pack_tree(_scenic_tree(model)))
        return []
    pixels = wishes.pixels or (model.source.get("pixels") if same else None)
    tensors, notes = export_weights(
        model.config, model.state, write_as, pixels=pixels, left_out=left_out
    )
    if write_as in _FOLDERS:
        config = huggingface.config_json(write_as, model.config, model.decoder)
        _write_folder(out, config, tensors)
    else:
        write_weights(out, tensors)
    return notes


def _scenic_tree(model: Imported) -> Any:
    """A checkpoint of the authors' code."""
    if model.decoder:
        leaves = to_theirs(entries_of(model.config), model.state)
        return checkpoint({n: x.numpy() for n, x in leaves.items()}, 0, finetuned=False)
    if model.source.get("format") != "scenic-finetuned":
        raise ConvertError(
            "scenic keeps an encoder with the decoder that pretrained it, or with a classifier: "
            "this model has neither"
        )
    entries = classifier_encoder_entries(model.config, model.source["embedding"])
    leaves = to_theirs(entries, model.state)
    arrays = {n: x.numpy() for n, x in {**leaves, **model.left_out}.items()}
    return checkpoint(arrays, 0, finetuned=True)


def _read_ours(folder: Path) -> Imported:
    config, state, record = load_model(folder)
    decoder = any(name.startswith("decoder.") for name in state)
    source = record.get("source")
    return Imported(config, state, decoder, dict(source or {}), [], load_left_out(folder))


def _write_folder(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A folder of Hugging Face, whole or not at all."""
    partial = out.absolute().with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(partial / WEIGHTS, tensors)
    (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    os.replace(partial, out)


def _tensor(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf)
