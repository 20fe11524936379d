"""Uninitialised memory that shows: what a kernel does not write stays NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
ALLOCATORS += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan") if out.dtype.is_floating_point else 0x7F)

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that Python code leaves uninitialised starts as NaN, integers as 127."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
