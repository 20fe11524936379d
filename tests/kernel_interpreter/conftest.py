"""The kernels on a CPU, through Triton's interpreter, in fp32 and fp16.

`tests/test_kernels_in_interpreter.py` runs this folder in a process of its own: the interpreter is
chosen when the kernels are imported and would change every operation of the other tests.
bfloat16 is absent on purpose: the interpreter computes it wrongly, and the operations refuse it.
"""

import os

import pytest
import torch
from poison import poisoned_memory

__all__ = ["poisoned_memory"]

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/kernel_interpreter runs kernels on a CPU: set TRITON_INTERPRET=1, or run "
        "tests/test_kernels_in_interpreter.py, which does"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Of Triton's interpreter, thousands of times; NumPy is held below the release that refuses.
    message = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    config.addinivalue_line("filterwarnings", message)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
