"""Pretrain and fine-tune masked audiovisual transformers, fast.

accelerate, restore    somebody else's model on our operations, in place (`acceleration`)

They are imported when they are asked for: `import avmae_fast` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avmae_fast.acceleration import accelerate, restore

__all__ = ["accelerate", "restore"]

_HOMES = {
    "accelerate": "avmae_fast.acceleration",
    "restore": "avmae_fast.acceleration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
