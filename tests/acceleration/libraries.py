"""timm and transformers for tests, or a clear skip where they are absent.

PyPI's torchvision and torchaudio for Linux are built for CUDA. Beside a CPU build of PyTorch their
compiled parts do not load, and the import of all that uses them fails. Nothing here calls them.
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch

_DECLARED: list[torch.library.Library] = []


def library(name: str) -> ModuleType:
    """The package `name`, importable beside a CPU build of PyTorch."""
    _declare_torchvision_operators()
    _hide_broken_torchaudio()
    reason = f"{name} is not installed (pip install -e '.[test]')"
    return pytest.importorskip(name, reason=reason)


def _declare_torchvision_operators() -> None:
    """Give torchvision the operators it registers shapes for, where it could not load them."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)


def _hide_broken_torchaudio() -> None:
    try:
        importlib.import_module("torchaudio")
    except ImportError:
        pass
    except OSError:
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
