"""Checkpoint files of the authors' code: which tree they hold, and the model it belongs to.

Pretraining files keep the parameters under optimizer/target (with or without another `params`),
fine-tuning files under params. The trees name every part, but not how tokens are laid out, nor
whether a single stack was early or shared fusion; see `ScenicShape`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.config import (
    AudioConfig,
    Decoding,
    Fusion,
    Modality,
    ModelConfig,
    Objective,
    StackConfig,
    VideoConfig,
)
from avmae_fast.interop.entries import ConvertError, Entry, listed
from avmae_fast.interop.flax_msgpack import Tree, flatten, nest
from avmae_fast.interop.scenic import (
    SCENIC_MODALITY,
    block_entries,
    embedding_entries,
    norm_entries,
    token_entry,
)
from avmae_fast.interop.scenic_classifier import Family

Leaves = Mapping[str, NDArray | Tensor]

_CLASSIFIER = "ProjectionHeadAndClassifier_0/"
_VIVIT_HEAD = ("output_projection/", "pre_logits/")
# One and the same embedding in checkpoints of two generations of the fine-tuning code.
_INTERNAL, _PUBLIC = "embedding_spec/", "embedding_spectrogram/"
_ATTENTION = "MultiHeadDotProductAttention_0/query/kernel"


@dataclass(frozen=True, kw_only=True)
class ScenicShape:
    """What the tree of a model does not say; the defaults are the released AudioSet model's.

    fusion: `early` or `shared`, needed where the encoder is one stack.
    decoding: `shared` or `joint` where the decoder is one stack.
    frames, size: of the video. audio_frames, mel_bins: of the spectrogram.
    """

    fusion: Fusion | None = None
    decoding: Decoding = "shared"
    objective: Objective = "reconstruction"
    frames: int = 16
    size: tuple[int, int] = (224, 224)
    audio_frames: int = 1000
    mel_bins: int = 128


def parameters(tree: Tree) -> dict[str, NDArray | Tensor]:
    """The parameters in the tree of a checkpoint file, by path.

    Raises:
        ConvertError: it is neither of the two kinds of file.
    """
    node: Any = tree
    if isinstance(tree, dict) and isinstance(tree.get("optimizer"), dict):
        node = tree["optimizer"].get("target")
    elif isinstance(tree, dict) and isinstance(tree.get("params"), dict):
        node = tree["params"]
    else:
        found = listed(sorted(map(str, tree))) if isinstance(tree, dict) else type(tree).__name__
        raise ConvertError(f"a checkpoint has 'optimizer' or 'params' at its top, got {found}")
    if isinstance(node, dict) and set(node) == {"params"}:
        node = node["params"]
    if not isinstance(node, dict):
        raise ConvertError("the checkpoint's optimizer has no target: it holds no parameters")
    return {name.replace(_INTERNAL, _PUBLIC): leaf for name, leaf in flatten(node).items()}


def checkpoint(leaves: Leaves, step: int, finetuned: bool) -> Tree:
    """The tree of a checkpoint file that holds these parameters and no optimiser state."""
    tree = nest(leaves)
    if finetuned:
        return {"params": tree, "opt_state": {}, "global_step": step, "model_state": {}}
    return {
        "global_step": step,
        "optimizer": {"target": tree, "state": {}},
        "model_state": {},
        "accum_train_time": 0,
    }


def family_of(leaves: Leaves) -> Family | None:
    """Which of the authors' classifiers the tree belongs to; None for a pretraining tree."""
    if any(name.startswith(_CLASSIFIER) for name in leaves):
        return "mbt"
    return "vivit" if _VIVIT_HEAD[0] + "kernel" in leaves else None


def pretraining_config(leaves: Leaves, shape: ScenicShape) -> ModelConfig:
    """The model of a pretraining tree.

    Raises:
        ConvertError: the tree is of no model we know, or `shape` is needed to tell which.
    """
    tops = {name.split("/")[0] for name in leaves}
    fusion, layers, joint = _fusion(leaves, tops, shape)
    first = next(n for n in sorted(tops) if n.startswith("Transformer"))
    separate = any(top.startswith("Decoder_") and not top.startswith("Decoder_mod") for top in tops)
    decoder = next((t for t in sorted(tops) if t == "Decoder" or t.startswith("Decoder_r")), None)
    decoder = decoder or next((t for t in sorted(tops) if t.startswith("Decoder_s")), None)
    if decoder is None:
        raise ConvertError(f"the tree has no Decoder, only {listed(sorted(tops))}")
    present: list[Modality] = [
        m for m, name in SCENIC_MODALITY.items() if f"embedding_{name}" in tops
    ]
    names = [SCENIC_MODALITY[m] for m in present]
    return ModelConfig(
        encoder=_stack(leaves, first, layers),
        decoder=_stack(leaves, decoder, _depth(leaves, decoder)),
        video=_video(leaves, "embedding_rgb", shape) if "video" in present else None,
        audio=_audio(leaves, "embedding_spectrogram", shape) if "audio" in present else None,
        fusion=fusion,
        fusion_layers=joint or 2,
        decoding="separate" if separate else shape.decoding,
        objective=shape.objective,
        positions="learned" if any(t.startswith("posembed_input_") for t in tops) else "sincos1d",
        modality_tokens=any(t.startswith("Encoder_modality_token_") for t in tops),
        encoder_norm=f"{first}/encoder_norm/scale" in leaves,
        projection_bias=f"decoder_projection_{names[0]}/bias" in leaves,
    )


def finetuned_config(leaves: Leaves, shape: ScenicShape) -> tuple[ModelConfig, str]:
    """The encoder of a classifier of one modality, and what it calls the patch embedding.

    Raises:
        ConvertError: the tree is of both modalities, whose bottlenecks an `Encoder` has not.
    """
    if any(_PUBLIC in name for name in leaves) and "embedding/kernel" in leaves:
        raise ConvertError(
            "this classifier fuses video and audio by bottleneck tokens, which an encoder of ours "
            "has not: --classifier CONFIG, as in --classifier audioset-ft-av, makes a classifier "
            "of it"
        )
    m: Modality = "video" if _ndim(leaves, "embedding/kernel") == 5 else "audio"
    embedding = "embedding" if "embedding/kernel" in leaves else _PUBLIC.rstrip("/")
    stack = classifier_stack(leaves)
    inputs = {"video": None, "audio": None}
    spec = (_video if m == "video" else _audio)(leaves, embedding, shape)
    config = ModelConfig(
        encoder=stack,
        decoder=StackConfig(width=384, layers=4, heads=6, mlp=1536),
        fusion="separate",
        modality_tokens=f"Encoder_modality_token_{SCENIC_MODALITY[m]}" in leaves,
        **{**inputs, m: spec},  # type: ignore[arg-type]
    )
    return config, embedding


def classifier_stack(leaves: Leaves) -> StackConfig:
    """Width, depth and heads of a classifier's encoder."""
    return _stack(leaves, "Transformer", _depth(leaves, "Transformer"))


def classifier_encoder_entries(config: ModelConfig, embedding: str) -> list[Entry]:
    """The table of the encoder inside a classifier of one modality."""
    (m,) = config.modalities
    width = config.encoder.width
    entries = embedding_entries(f"patch_embed.{m}", embedding, config.input(m), width)
    if config.modality_tokens:
        token = f"Encoder_modality_token_{SCENIC_MODALITY[m]}"
        entries.append(token_entry(f"modality_token.{m}", token, width))
    for i in range(config.encoder.layers):
        block = f"Transformer/encoderblock_{i}"
        entries += block_entries(f"encoder.{m}.blocks.{i}", block, config.encoder)
    return entries + norm_entries(f"encoder.{m}.norm", "Transformer/encoder_norm", width)


def split_classifier(leaves: Leaves) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's leaves, and the classifier's own: its head, and bottlenecks it never uses."""
    head = (_CLASSIFIER, *_VIVIT_HEAD)
    own = {n: x for n, x in leaves.items() if n.startswith(head) or n == "bottleneck"}
    return {n: x for n, x in leaves.items() if n not in own}, own


def _fusion(leaves: Leaves, tops: set[str], shape: ScenicShape) -> tuple[Fusion, int, int]:
    """Fusion, layers in all, and how many of them are joint."""
    separate = [t for t in (f"Transformer_{n}" for n in SCENIC_MODALITY.values()) if t in tops]
    joint = _depth(leaves, "Transformer_concat")
    if separate and joint:
        return "mid", _depth(leaves, separate[0]) + joint, joint
    if separate:
        return "separate", _depth(leaves, separate[0]), 0
    if "Transformer" not in tops:
        raise ConvertError(f"the tree has no Transformer, only {listed(sorted(tops))}")
    if shape.fusion not in ("early", "shared"):
        raise ConvertError(
            "the encoder is one stack, and the tree does not say whether it saw both modalities "
            f"together: fusion = {shape.fusion!r} must be 'early' or 'shared'"
        )
    return shape.fusion, _depth(leaves, "Transformer"), 0


def _depth(leaves: Leaves, stack: str) -> int:
    start = f"{stack}/encoderblock_"
    numbers = {n.removeprefix(start).split("/")[0] for n in leaves if n.startswith(start)}
    return len({number for number in numbers if number.isdigit()})


def _stack(leaves: Leaves, name: str, layers: int) -> StackConfig:
    block = f"{name}/encoderblock_0"
    query, hidden = f"{block}/{_ATTENTION}", f"{block}/MlpBlock_0/Dense_0/bias"
    if _ndim(leaves, query) != 3 or _ndim(leaves, hidden) != 1:
        raise ConvertError(f"missing {query} [D, heads, head_dim] or {hidden}")
    width, heads, _ = leaves[query].shape
    return StackConfig(width=width, layers=layers, heads=heads, mlp=leaves[hidden].shape[0])


def _video(leaves: Leaves, embedding: str, shape: ScenicShape) -> VideoConfig:
    kernel = f"{embedding}/kernel"
    if _ndim(leaves, kernel) != 5:
        raise ConvertError(f"missing {kernel} [t, h, w, 3, D]")
    t, h, w = leaves[kernel].shape[:3]
    height, width = shape.size
    return VideoConfig(frames=shape.frames, height=height, width=width, tubelet=(t, h, w))


def _audio(leaves: Leaves, embedding: str, shape: ScenicShape) -> AudioConfig:
    kernel = f"{embedding}/kernel"
    if _ndim(leaves, kernel) != 4:
        raise ConvertError(f"missing {kernel} [time, frequency, 1, D]")
    time, frequency = leaves[kernel].shape[:2]
    return AudioConfig(frames=shape.audio_frames, mel_bins=shape.mel_bins, patch=(time, frequency))


def _ndim(leaves: Leaves, name: str) -> int:
    leaf = leaves.get(name)
    return -1 if leaf is None else cast(np.ndarray, leaf).ndim
