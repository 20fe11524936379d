"""The module that is built from `csrc/`; where it is not, NumPy computes the same bits."""

import functools
import importlib
import logging
from types import ModuleType

# Of what `csrc/bindings.cpp` offers; a module from before a change of it is not used.
VERSION = 2


@functools.cache
def compiled() -> ModuleType | None:
    """`avmae_kernels._C`; None where it is not built or is an older one, which is logged once."""
    try:
        module = importlib.import_module("avmae_kernels._C")
        if getattr(module, "VERSION", 1) != VERSION:
            raise ImportError("it was built from other sources than these")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "avmae_kernels._C cannot be used (%s): masks are drawn and pictures converted by "
            "NumPy, the same but slower. Install a C++17 compiler (g++ or clang++) and Python's "
            "headers, then reinstall avmae_fast.",
            error,
        )
        return None
    return module
