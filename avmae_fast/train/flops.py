"""Arithmetic of a training step, and what share of a GPU's it is (MFU).

Counted are the products a step cannot do without, two operations a multiplication and addition:
visible tokens in the encoder, scored tokens alone in the last decoder block, the backward pass as
twice the forward pass. What is computed again to save memory does not count.
"""

import torch

from avmae_fast.config import Modality, ModelConfig, StackConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_kernels.masking import MaskSpec

# Dense bf16 products a second, from the vendor's data sheets, by a part of the device's name. The
# first that fits counts. A GPU that is not here has no MFU rather than a guessed one.
PEAK_FLOPS: dict[str, float] = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.0e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a GPU; None for a CPU or a GPU that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def clip_flops(config: ModelConfig) -> int:
    """Operations of one training step for one clip, forward and backward."""
    visible = {m: _visible(config, m) for m in config.modalities}
    scored = {m: _scored(config, m, visible) for m in config.modalities}
    total = 0
    for m, count in visible.items():
        total += _product(count, config.input(m).patch_dim, config.encoder.width)
        shown = config.prefix_tokens + count
        total += _product(shown, config.encoder.width, config.decoder.width)
        total += _product(scored[m], config.decoder.width, config.input(m).patch_dim)
    for lengths, layers in _encoder_sequences(config, visible):
        total += sum(layers * _block(config.encoder, n, n) for n in lengths)
    for queries, keys in _decoder_sequences(config, visible, scored):
        last = _block(config.decoder, queries, keys)
        total += (config.decoder.layers - 1) * _block(config.decoder, keys, keys) + last
    return 3 * total


def classifier_flops(config: ClassifierConfig) -> int:
    """Operations of one step of fine-tuning for one clip; stochastic depth counts as computed."""
    tokens = {m: config.input(m).tokens + (config.pool != "mean") for m in config.modalities}
    width, embedding = config.encoder.width, 0
    for m, count in tokens.items():
        embedding += _product(count, config.input(m).patch_dim, width)
    blocks = 0
    for layer in range(config.encoder.layers):
        meets = len(tokens) > 1 and config.fusion != "late" and layer >= config.fusion_layer
        extra = config.bottleneck_tokens if meets and config.fusion == "bottleneck" else 0
        sequences = [(n + extra, n + extra) for n in tokens.values()]
        if meets and config.fusion == "early":
            sequences = [(sum(tokens.values()),) * 2]
        elif meets and config.fusion == "cross":
            sequences = [(n, sum(tokens.values())) for n in tokens.values()]
        blocks += sum(_block(config.encoder, queries, keys) for queries, keys in sequences)
    # A frozen encoder has no backward pass.
    return (3 if config.head == "linear" else 1) * (embedding + blocks)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _block(stack: StackConfig, queries: int, keys: int) -> int:
    """A block that finishes `queries` of its `keys` tokens."""
    D = stack.width
    projections = _product(queries, D, D) * 2 + _product(keys, D, 2 * D)
    attention = 2 * _product(queries, D, keys)
    return projections + attention + 2 * _product(queries, D, stack.mlp)


def _visible(config: ModelConfig, m: Modality) -> int:
    field = config.input(m)
    return MaskSpec(field.mask, field.grid, field.mask_ratio).n_visible


def _scored(config: ModelConfig, m: Modality, visible: dict[Modality, int]) -> int:
    tokens = config.input(m).tokens
    if config.objective == "inpainting" or config.loss_on == "all":
        return tokens
    if config.objective == "inpainting_released":
        return tokens - visible[_other(m)]
    return tokens - visible[m]


def _other(m: Modality) -> Modality:
    return "audio" if m == "video" else "video"


def _encoder_sequences(
    config: ModelConfig, visible: dict[Modality, int]
) -> list[tuple[list[int], int]]:
    """Lengths of the sequences of a clip in each part of the encoder, and its layers."""
    own = [config.prefix_tokens + count for count in visible.values()]
    joint, layers = [sum(own)], config.encoder.layers
    if config.fusion == "early":
        return [(joint, layers)]
    if config.fusion == "mid":
        return [(own, layers - config.fusion_layers), (joint, config.fusion_layers)]
    return [(own, layers)]


def _decoder_sequences(
    config: ModelConfig, visible: dict[Modality, int], scored: dict[Modality, int]
) -> list[tuple[int, int]]:
    """(scored tokens, all tokens) of each decoder sequence of a clip."""
    sequences = []
    for m, count in scored.items():
        shown = visible[m] if config.objective == "reconstruction" else visible[_other(m)]
        masked = config.input(m).tokens if config.objective == "inpainting" else None
        if masked is None:
            masked = config.input(m).tokens - shown
        sequences.append((count, config.prefix_tokens + shown + masked))
    if config.decoding == "joint":
        return [(sum(q for q, _ in sequences), sum(k for _, k in sequences))]
    return sequences
