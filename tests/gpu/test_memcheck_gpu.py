"""Every kernel under NVIDIA's memory checker, on small shapes: no access out of bounds."""

import os
import shutil
import subprocess
import sys

import pytest

CODE = """
import torch
from avmae_kernels.self_check import Use, self_check

use = Use(torch.bfloat16, (96,), (80,), (32, 64, 80), (2, 16, 16), (16, 16))
bad = [v for v in self_check(torch.device("cuda"), use) if not v.passed]
assert not bad, bad
"""


@pytest.mark.slow
def test_no_access_out_of_bounds() -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    done = subprocess.run(
        [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        timeout=400,
        # Torch's allocator would hide an access past the end of a tensor in a larger block.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
