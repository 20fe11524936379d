"""Triton, or a stand-in that lets the kernels' files be imported where it is not installed.

Without Triton the plain-PyTorch meaning of every operation still works, on any device.
"""

import logging
import os
from typing import Any

log = logging.getLogger(__name__)

# With TRITON_INTERPRET=1, set before the first import, the kernels run on CPU tensors.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _Absent:
        """Takes the decorators and annotations of a kernel's source; is never run."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()

_warned = False


def kernels_usable() -> bool:
    """Whether CUDA tensors can go through our kernels; says once what to install if not."""
    global _warned
    if not HAVE_TRITON and not _warned:
        _warned = True
        log.warning(
            "Triton is not installed: operations run as plain PyTorch, slower and with more "
            "memory. Install it with `pip install triton` (Linux)."
        )
    return HAVE_TRITON


__all__ = ["HAVE_TRITON", "INTERPRET", "kernels_usable", "tl", "triton"]
