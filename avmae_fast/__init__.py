"""Pretrain and fine-tune masked audiovisual transformers, fast.

accelerate, restore    somebody else's model on our operations, in place (`acceleration`)
MaskedEncoder          visible tokens of clips of any length, as a building block (`models`)

They are imported when they are asked for: `import avmae_fast` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avmae_fast.acceleration import accelerate, restore
    from avmae_fast.models.masked_encoder import MaskedEncoder

__all__ = ["MaskedEncoder", "accelerate", "restore"]

_HOMES = {
    "MaskedEncoder": "avmae_fast.models.masked_encoder",
    "accelerate": "avmae_fast.acceleration",
    "restore": "avmae_fast.acceleration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
