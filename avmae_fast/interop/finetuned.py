"""Fine-tuned checkpoints of the authors' code as folders of ours that can be evaluated, and back.

The tree of such a checkpoint holds weights only. What it leaves open, as the layer of the first
bottleneck, the grids of tokens and which scores are whose, is told by the configuration of the run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avmae_fast.config_file import classifier_from_dict
from avmae_fast.finetune_config import ClassifierConfig, FinetuneConfig
from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.flax_msgpack import Tree
from avmae_fast.interop.scenic_classifier import (
    Family,
    classifier_from_scenic,
    classifier_to_scenic,
)
from avmae_fast.interop.scenic_files import (
    Leaves,
    checkpoint,
    classifier_stack,
    family_of,
    parameters,
)
from avmae_fast.models.pretrained import CONFIG, WEIGHTS, load_left_out, save_finetuned

_FORMAT = "scenic-classifier"


@dataclass(frozen=True)
class FinetunedRun:
    """What a fine-tuned checkpoint does not hold: the run that made it, and its classes' names."""

    config: FinetuneConfig
    classes: Sequence[str]


def import_classifier(tree: Tree, run: FinetunedRun, out: Path) -> list[str]:
    """Write the classifier of a checkpoint's tree to the folder `out`, as fine-tuning runs do.

    Returns:
        What was found, assumed and left out, a line each.

    Raises:
        ConvertError: the tree is no classifier's, or not the one that `run` configures.
    """
    leaves = parameters(tree)
    family = family_of(leaves)
    if family is None:
        raise ConvertError(
            "this is a pretraining checkpoint, it has no classes: leave --classifier out"
        )
    config = run.config.model
    _require_fit(leaves, config)
    try:
        state = classifier_from_scenic(cast(Mapping[str, Any], leaves), config, family)
    except ValueError as error:
        raise ConvertError(str(error)) from error
    idle = {} if config.has_bottleneck else {n: x for n, x in leaves.items() if n == "bottleneck"}
    record = {"source": {"format": _FORMAT, "family": family}}
    kept = {name: torch.from_numpy(np.array(x)) for name, x in idle.items()}
    save_finetuned(out, run.config, run.classes, state, record, kept)
    notes = [f"a classifier of {' and '.join(config.modalities)}, {len(run.classes)} classes"]
    if config.has_bottleneck:
        notes.append(f"as configured, the file does not say: fusion_layer = {config.fusion_layer}")
    if idle:
        notes.append(f"left out: {sorted(idle)}")
    return notes


def export_classifier(folder: Path) -> Tree:
    """The tree of a checkpoint of the authors' code, from the folder of a classifier.

    Raises:
        ConvertError: the folder is damaged, or the authors' code has no such model.
    """
    try:
        record = json.loads((folder / CONFIG).read_text())
        config = classifier_from_dict(record["model"])
        state = load_file(folder / WEIGHTS)
        left_out = load_left_out(folder)
        source = record.get("source") or {}
        family: Family = source.get("family", "mbt")
        leaves = {**classifier_to_scenic(state, config, family), **_arrays(left_out)}
    except (OSError, KeyError, SafetensorError, ValueError) as error:
        raise ConvertError(f"{folder} cannot become a checkpoint: {error}") from error
    return checkpoint(leaves, 0, finetuned=True)


def _require_fit(leaves: Leaves, config: ClassifierConfig) -> None:
    """Raise ConvertError where the tree shows that it belongs to another configuration."""
    stack, wanted = classifier_stack(leaves), config.encoder
    compared = [
        (f"model.encoder.{name}", getattr(wanted, name), getattr(stack, name))
        for name in ("width", "layers", "heads", "mlp")
    ]
    biases = [x for n, x in leaves.items() if n.endswith("output_projection/bias")]
    compared.append(("model.classes", sum(config.heads.values()), biases[0].shape[0]))
    if config.has_bottleneck and "bottleneck" in leaves:
        tokens = leaves["bottleneck"].shape[1]
        compared.append(("model.bottleneck_tokens", config.bottleneck_tokens, tokens))
    for field, configured, found in compared:
        if configured != found:
            raise ConvertError(f"{field} = {configured} does not fit the file, which has {found}")


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: x.numpy() for name, x in tensors.items()}
