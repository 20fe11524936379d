"""What to change when a step does not fit into a GPU's memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from avmae_fast.config import TrainConfig

# Weights, gradient and Adam's two moments, in float32.
_BYTES_PER_PARAMETER = 16
# Left to the allocator's rounding and to libraries.
_USABLE = 0.92


class OutOfMemory(RuntimeError):
    """A step does not fit; the text says what would."""


@contextmanager
def memory_advice(train: TrainConfig, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, running out of GPU memory is told with the batch that would fit.

    Raises:
        OutOfMemory
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.mem_get_info(device)[1]
        peak = torch.cuda.max_memory_allocated(device)
        fixed = _BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
        raise OutOfMemory(advice(train, total, peak, fixed)) from error


def advice(train: TrainConfig, total: int, peak: int, fixed: int) -> str:
    """The text: what was used, and a split of the batch that would fit.

    Args:
        total: bytes of the device.
        peak: bytes in use when it ran out, which a whole step would have exceeded.
        fixed: bytes that do not depend on the batch.
    """
    micro = train.batch // train.accumulate
    gib = {"total": total, "fixed": fixed, "rest": max(0, peak - fixed)}
    shown = {name: f"{value / 2**30:.1f} GiB" for name, value in gib.items()}
    text = (
        f"a micro-batch of {micro} clips does not fit into the GPU's {shown['total']}: weights, "
        f"gradient and optimiser take {shown['fixed']}, activations had taken {shown['rest']} when "
        "it was full. "
    )
    per_clip = max(1, peak - fixed) / micro
    # What was in use is the least a micro-batch needs, so a smaller one must fit all the better.
    fits = min(micro - 1, int((_USABLE * total - fixed) / per_clip))
    splits = [n for n in range(train.accumulate + 1, train.batch + 1) if train.batch % n == 0]
    split = next((n for n in splits if train.batch // n <= fits), None)
    if split is None:
        return text + "Not even one clip fits: take a smaller model or a larger GPU"
    change = f"train.accumulate = {split} (micro-batches of {train.batch // split}) should"
    if train.activation_checkpoint != "full":
        change += ", train.activation_checkpoint = 'full' may"
    return text + f"The same batch with {change}"
