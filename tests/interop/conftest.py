"""Makes timm and transformers importable beside a CPU build of PyTorch, and small models of theirs.

PyPI's torchvision and torchaudio for Linux are built for CUDA. Beside a CPU build of PyTorch their
compiled parts do not load, and the import of the whole package fails at the first operator. Nothing
here calls one.
"""

import importlib
import sys

import pytest
import torch

_NOT_LOADED: list[torch.library.Library] = []


def _declare_torchvision_operators() -> None:
    """Give torchvision the operators whose names it registers for, where it could not load them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _NOT_LOADED.append(library)


def _hide_broken_torchaudio() -> None:
    try:
        importlib.import_module("torchaudio")
    except ImportError:
        pass
    except OSError:
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def timm():  # noqa: ANN201
    """The package timm."""
    _declare_torchvision_operators()
    return importlib.import_module("timm")


@pytest.fixture(scope="session")
def transformers():  # noqa: ANN201
    """The package transformers."""
    _declare_torchvision_operators()
    _hide_broken_torchaudio()
    return importlib.import_module("transformers")
