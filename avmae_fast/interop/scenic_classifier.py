"""Fine-tuned weights of the authors' code (Scenic, Flax) to our classifier and back.

Two of their models are one of ours: MBT (both modalities, or one) and ViViT (one modality), which
name a few leaves differently. Layouts are those of `avmae_fast.interop.scenic`.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from avmae_fast.config import Modality
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.scenic import (
    SCENIC_MODALITY,
    Array,
    Entry,
    block_entries,
    dense_entries,
    embedding_entries,
    norm_entries,
    read_leaves,
    token_entry,
    write_leaves,
)

Family = Literal["mbt", "vivit"]

_INTERNAL_NAME = "embedding_spec/"
_PUBLIC_NAME = "embedding_spectrogram/"


def classifier_from_scenic(
    params: Mapping[str, Array], config: ClassifierConfig, family: Family = "mbt"
) -> dict[str, Tensor]:
    """Our state dict, from Flax leaves by path.

    The spectrogram's embedding may have either of the two names it has in released code. A
    bottleneck that a model of one modality carries along unused is left out.

    Args:
        params: every parameter of the model; dtypes are kept.
        config: the model the parameters belong to.
        family: the authors' model class.

    Raises:
        ValueError: leaves are missing, superfluous or of another shape; the text names them. Or
            the authors' code has no such model.
    """
    leaves = {name.replace(_INTERNAL_NAME, _PUBLIC_NAME): x for name, x in params.items()}
    if len(config.modalities) == 1:
        leaves.pop("bottleneck", None)
    return read_leaves(leaves, classifier_entries(config, family))


def classifier_to_scenic(
    state: Mapping[str, Tensor], config: ClassifierConfig, family: Family = "mbt"
) -> dict[str, Array]:
    """Flax leaves by path, from our state dict (or from gradients under the same names).

    Raises:
        ValueError: names are missing, superfluous or of another shape; the text names them. Or
            the authors' code has no such model.
    """
    return write_leaves(state, classifier_entries(config, family))


def classifier_entries(config: ClassifierConfig, family: Family = "mbt") -> list[Entry]:
    """The whole table: one entry for each parameter of a classifier."""
    _refuse_what_scenic_lacks(config, family)
    width, head = config.encoder.width, ""
    if family == "mbt":
        head = "ProjectionHeadAndClassifier_0/"
    entries = [e for m in config.modalities for e in _modality_entries(config, m, family)]
    for stack in dict.fromkeys(config.stack_of(m) for m in config.modalities):
        # The stack of the second modality carries a suffix.
        suffix = "_spec" if stack == "audio" and len(config.modalities) == 2 else ""
        for i in range(config.encoder.layers):
            scenic = f"Transformer/encoderblock_{i}{suffix}"
            entries += block_entries(f"encoder.{stack}.blocks.{i}", scenic, config.encoder)
    norm = "encoder_norm" if config.norm == "pooled" else "Transformer/encoder_norm"
    entries += norm_entries("norm.both", norm, width)
    if config.has_bottleneck:
        shape = (config.bottleneck_tokens, width)
        entries.append(Entry("bottleneck", ("bottleneck",), (1, *shape), shape))
    feature = width
    if config.representation is not None:
        feature = config.representation
        entries += dense_entries("pre_logits", f"{head}pre_logits", width, feature)
    count = int(np.sum(list(config.heads.values())))
    return entries + dense_entries("head", f"{head}output_projection", feature, count)


def _modality_entries(config: ClassifierConfig, m: Modality, family: Family) -> list[Entry]:
    width, name = config.encoder.width, SCENIC_MODALITY[m]
    embedding = "embedding" if m == "video" or family == "vivit" else f"embedding_{name}"
    entries = embedding_entries(f"patch_embed.{m}", embedding, config.input(m), width)
    if config.modality_tokens:
        entries.append(token_entry(f"modality_token.{m}", f"Encoder_modality_token_{name}", width))
    if config.pool != "mean":
        first = m == config.modalities[0]
        entries.append(token_entry(f"cls.{m}", "cls" if first else f"cls{name}", width))
    return entries


def _refuse_what_scenic_lacks(config: ClassifierConfig, family: Family) -> None:
    if family == "vivit" and len(config.modalities) != 1:
        raise ValueError("the authors' ViViT classifier has one modality, this one has two")
    for name, value in (
        ("separate_norms", False),
        ("middle_norm_at", None),
        ("head", "linear"),
    ):
        got = getattr(config, name)
        if got != value:
            raise ValueError(f"the authors' classifiers have {name} = {value!r}, got {got!r}")
    if config.positions == "learned":
        raise ValueError("the authors' classifiers have no learned positions, this one has")
