"""The packages whose models ours are compared with."""

from types import ModuleType

import pytest
from libraries import library


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The package timm."""
    return library("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The package transformers."""
    return library("transformers")
