"""Which assembler Triton uses: a newer one than its own, where one is installed.

Triton 3.6 carries ptxas 12.8, which has turned correct PTX for sm_90 into wrong code; from 13.1 on
it is right. NVIDIA's wheel `nvidia-cuda-nvcc` and every CUDA toolkit hold one. Code assembled by a
toolkit newer than the driver does not load, so the driver's release is the limit.
"""

import functools
import logging
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from avmae_kernels._triton import HAVE_TRITON, triton

log = logging.getLogger(__name__)

Release = tuple[int, int]
VARIABLE = "TRITON_PTXAS_PATH"


def release_of(ptxas: Path) -> Release | None:
    """(major, minor) of the CUDA release of an assembler, None if it does not run."""
    try:
        text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text.stdout)
    return (int(found[1]), int(found[2])) if found else None


@functools.cache
def use_newest_ptxas() -> str:
    """Point Triton to the newest assembler the driver can load; says which one it is.

    Nothing is changed where the user has set TRITON_PTXAS_PATH. To be called before the first
    kernel is compiled.
    """
    if not HAVE_TRITON:
        return "Triton is not installed"
    if chosen := os.environ.get(VARIABLE):
        return f"{chosen}, named by {VARIABLE}"
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    limit = _driver_release()
    path, release = bundled, release_of(bundled) or (0, 0)
    for candidate in _candidates():
        found = release_of(candidate)
        # Releases of one major version run on every driver of it.
        if found is not None and found > release and found[0] <= limit[0]:
            path, release = candidate, found
    if path != bundled:
        os.environ[VARIABLE] = str(path)
        log.info("Triton assembles with %s, CUDA %d.%d", path, *release)
    return f"{path}, CUDA {release[0]}.{release[1]}"


def _driver_release() -> Release:
    """The newest CUDA release the driver knows."""
    version: int = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return version // 1000, version % 1000 // 10


def _candidates() -> Iterator[Path]:
    """Where wheels and toolkits put an assembler, existing ones only."""
    packages = Path(sysconfig.get_path("purelib"))
    places = [*packages.glob("nvidia/*/bin/ptxas")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += [Path(home) / "bin" / "ptxas" for home in homes if home]
    places += sorted(Path("/usr/local").glob("cuda-*/bin/ptxas"))
    if on_path := shutil.which("ptxas"):
        places.append(Path(on_path))
    return (place for place in places if place.is_file())
